"""`interact` as a language model calls it, against attention of the same model: many sequences.

python benchmarks/short.py [--threads 2] [--rounds 10]

The first rows have the shapes of one layer of `lm`, 32 cylinders with values of width 4 and soft
thresholds, and of `scaled_dot_product_attention` with 4 heads of 32. The last rows are calls on a
few tokens, which cost what a call costs. `--mass` compares thresholds instead: those by mass, flat
to sharp, with the soft ones.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import MODES, Runner, environment, percentile, speed_up, time_in_turn

from qflux_kernels import Sparsemax, Threshold, evolve, interact
from qflux_kernels.options import Score

SCORE = Threshold(shrinkage="soft")
# Sequences of a batch and their length.
SIZES = [(12, 64), (12, 256), (2, 1024), (1, 4096)]
# Of queries and keys that are standard normal: flat to sharp.
SCALES = [0.001, 0.01, 0.05, 0.3, 1.0, 8.0, 50.0]
# A call repeated so often is long enough to be timed.
CALLS = 20


def random_inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def runner(function, inputs: list[torch.Tensor], calls: int = 1) -> Runner:
    """Closures that make so many calls."""
    with torch.no_grad():
        grad = torch.randn_like(function(*inputs))
    return Runner(
        lambda: [function(*inputs) for _ in range(calls)],
        lambda outputs: [torch.autograd.grad(output, inputs, grad) for output in outputs],
    )


def attention(batch: int, length: int, calls: int = 1) -> Runner:
    shape = (batch, 4, length, 32)
    return runner(
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True),
        random_inputs(shape, shape, shape),
        calls,
    )


def layer(batch: int, length: int, calls: int = 1, score: Score = SCORE) -> Runner:
    points, values = (batch, 32, length, 2), (batch, 32, length, 4)
    return runner(
        lambda states, keys, values: interact(states, keys, values, score=score).context,
        random_inputs(points, points, values),
        calls,
    )


def plain(batch: int, length: int, calls: int) -> Runner:
    return runner(
        lambda states: interact(states).context, random_inputs((batch, 4, length, 2)), calls
    )


def step(batch: int, length: int, calls: int) -> Runner:
    return runner(
        lambda states: evolve(states, 0.1).states, random_inputs((batch, 4, length, 2)), calls
    )


def cases(sizes: list[tuple[int, int]]) -> dict[str, tuple[Runner, Runner, int]]:
    """What to call it; ours, attention's, and how many calls one of them makes."""
    found = {
        f"layer, {batch} x 32 x {length}": (layer(batch, length), attention(batch, length), 1)
        for batch, length in sizes
    }
    for name, make in (("layer", layer), ("interact(states)", plain), ("evolve", step)):
        found[f"{name}, 1 x 16 tokens"] = (make(1, 16, CALLS), attention(1, 16, CALLS), CALLS)
    return found


def compare_mass(device: torch.device, length: int, rounds: int, seconds: float) -> None:
    """Times of `Sparsemax` over those of the soft threshold, medians over the rounds."""
    print(f"{f'layer, 1 x 32 x {length}':32}{'forward':>10}{'backward':>10}")
    for scale in SCALES:
        samples = time_in_turn(
            {"soft": layer(1, length), "mass": layer(1, length, score=Sparsemax(scale))},
            device, rounds, seconds,
        )  # fmt: skip
        ratios = [speed_up(samples["soft"], samples["mass"], mode) for mode in MODES[:2]]
        print(f"{f'scale {scale:g}':32}{ratios[0]:10.2f}{ratios[1]:10.2f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a provider in a round")
    parser.add_argument("--largest", type=int, default=4096, help="longest sequence to time")
    parser.add_argument("--mass", action="store_true", help="thresholds by mass over soft ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    facts = environment(device)
    print(", ".join(f"{name} {facts[name]}" for name in ("machine", "instruction_set", "threads")))
    if options.mass:
        return compare_mass(device, min(options.largest, 1024), options.rounds, options.seconds)
    print(f"X{'qflux ms':>10}{'SDPA ms':>10}{'SDPA/qflux':>12}")
    sizes = [size for size in SIZES if size[1] <= options.largest]
    for name, (ours, theirs, calls) in cases(sizes).items():
        samples = time_in_turn(
            {"qflux": ours, "sdpa": theirs}, device, options.rounds, options.seconds
        )
        for mode in MODES:
            times = [percentile(s.calls[mode], 50) * 1e3 / calls for s in samples.values()]
            ratio = speed_up(samples["qflux"], samples["sdpa"], mode)
            print(f"{name:32}{mode:10}{times[0]:10.4f}{times[1]:10.4f}{ratio:12.2f}", flush=True)


if __name__ == "__main__":
    main()
