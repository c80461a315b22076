"""How time, memory and work grow with the length: `python benchmarks/scaling.py --output CSV`.

Dense kernels, sweep and plain PyTorch (`eager`), forward and backward, over lengths and kinds of
states; then the fitted exponents, and with `--plot` a figure. `--bands` prints instead which share
of the pairs a sweep meets one by one, with `--model DIR` on the states of a trained model;
`--compare` how long it takes beside the dense kernels on friendly and hostile states; `--train`
times whole training steps of `evolve`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    COLUMNS,
    MODES,
    Runner,
    available_mb,
    environment,
    peak_mb,
    percentile,
    return_freed_memory,
    speed_up,
    synchronize,
    time_in_turn,
)  # fmt: skip
from files import write_csv
from lm_curves import save_svg, svg_pyplot

import qflux_kernels
from qflux_kernels import Sparsemax, Threshold

SIZES = [1 << n for n in range(10, 23)]
FIT_FROM = 1 << 16
# Options of `interact` and `evolve` by provider.
PROVIDERS = {
    "dense": {"algorithm": "dense"},
    "sweep": {"algorithm": "sweep"},
    "eager": {"backend": "reference"},
}


def _clusters(length: int, generator: torch.Generator) -> torch.Tensor:
    centres = 2 * torch.randn(8, 2, generator=generator)
    which = torch.randint(8, (length,), generator=generator)
    return centres[which] + 0.1 * torch.randn(length, 2, generator=generator)


def _clamped(length: int, generator: torch.Generator) -> torch.Tensor:
    states = torch.randn(length, 2, generator=generator)
    radius = states.norm(dim=-1, keepdim=True)
    return states / radius * radius.clamp(0.1, 1.0)


def _jumps(length: int, generator: torch.Generator) -> torch.Tensor:
    """A new mean every 1,024 tokens."""
    means = torch.randn(length // 1024 + 1, 2, generator=generator)
    noise = torch.randn(length, 2, generator=generator)
    return noise + means.repeat_interleave(1024, 0)[:length]


def _walk(length: int, generator: torch.Generator) -> torch.Tensor:
    """A mean that wanders: windows never settle."""
    steps = torch.randn(length, 2, generator=generator).double().cumsum(0).float()
    return torch.randn(length, 2, generator=generator) + 0.02 * steps


def _turning(turns: float) -> Callable[[int, torch.Generator], torch.Tensor]:
    """A mean that circles: thresholds and keys come and go together."""

    def states(length: int, generator: torch.Generator) -> torch.Tensor:
        angle = 2 * math.pi * turns * torch.arange(length) / length
        mean = 2 * torch.stack([angle.cos(), angle.sin()], -1)
        return mean + 0.3 * torch.randn(length, 2, generator=generator)

    return states


def _growing(length: int, generator: torch.Generator) -> torch.Tensor:
    scale = torch.exp(10 * torch.arange(length) / length)
    return torch.randn(length, 2, generator=generator) * scale[:, None]


def _heavy_tailed(length: int, generator: torch.Generator) -> torch.Tensor:
    scale = torch.rand(length, 1, generator=generator)
    return torch.randn(length, 2, generator=generator) / scale**2


def _noisy_line(length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(length, 2, generator=generator) * torch.tensor([1.0, 1e-4])


def _circle(length: int, generator: torch.Generator) -> torch.Tensor:
    states = torch.randn(length, 2, generator=generator)
    return states / states.norm(dim=-1, keepdim=True)


# What data are like, and then what a sweep finds hard.
DATA = {
    "random": lambda length, generator: torch.randn(length, 2, generator=generator),
    "circle": _circle,
    "clamped": _clamped,
    "clusters": _clusters,
    "jumps": _jumps,
    "walk": _walk,
}
HARD = {
    "few turns": _turning(2),
    "many turns": _turning(300),
    "growing": _growing,
    "heavy-tailed": _heavy_tailed,
    "noisy line": _noisy_line,
    "line": lambda length, generator: (
        torch.randn(length, 1, generator=generator) * torch.tensor([0.6, 0.8])
    ),
    "equal": lambda length, _: torch.tensor([0.3, 0.7]).expand(length, 2).clone(),
}


def draw(data: str, length: int) -> torch.Tensor:
    return (DATA | HARD)[data](length, torch.Generator().manual_seed(0))


def read_score(words: list[str]) -> Threshold | Sparsemax:
    if words[0] == "sparsemax":
        (scale,) = words[1:]
        return Sparsemax(float(scale))
    sigma, eps, stats = words
    return Threshold(float(sigma), stats, float(eps))


def score_and_mask(options: argparse.Namespace) -> dict[str, object]:
    return {"causal": options.causal, "score": options.score}


def score_suffix(options: argparse.Namespace) -> str:
    """What tells a row of the CSV from those of the usual score and values."""
    score = f":sparsemax:{options.score.scale:g}" if isinstance(options.score, Sparsemax) else ""
    return score + (f":D{options.value_dim}" if options.value_dim else "")


def reduction_of(score: object) -> str:
    """What keeps the dynamics of `evolve` independent of the length."""
    return "sum" if isinstance(score, Sparsemax) else "mean"


def make_runner(
    provider: str, operator: str, states: torch.Tensor, value_dim: int, options: dict
) -> Runner:
    leaves = [states.requires_grad_()]
    how = PROVIDERS[provider] | options
    weights = torch.ones_like(states)
    if value_dim:
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(len(states), value_dim, generator=generator).to(states.device)
        leaves.append(values.requires_grad_())
        weights = torch.ones_like(values)

    def forward() -> torch.Tensor:
        if operator == "interact":
            values = leaves[1] if value_dim else None
            return qflux_kernels.interact(states, values=values, **how).context
        reduction = reduction_of(options["score"])
        return qflux_kernels.evolve(states, 0.1, reduction=reduction, **how).states

    return Runner(forward, lambda out: torch.autograd.grad(out, leaves, weights))


def measure(options: argparse.Namespace, provider: str, length: int) -> list[dict[str, object]]:
    """One provider at one length: a row for each mode."""
    device = options.device
    states = draw(options.data, length).to(device)
    runner = make_runner(
        provider, options.operator, states, options.value_dim, score_and_mask(options)
    )
    samples = time_in_turn({provider: runner}, device, options.rounds, options.seconds)[provider]
    return_freed_memory()
    peak = {
        "forward": peak_mb(runner.forward, device),
        "both": peak_mb(lambda: runner.backward(runner.forward()), device),
    }
    peak["backward"] = peak["both"]
    interactions = 1 if options.operator == "interact" else 2
    pairs = interactions * (length * (length + 1) / 2 if options.causal else length**2)
    return [
        {
            "kernel": f"{options.operator}:{options.data}{score_suffix(options)}",
            "provider": provider,
            "mode": mode,
            "S": length,
            "status": "ok",
            **{f"p{p}_ms": f"{1e3 * percentile(samples.calls[mode], p):.5g}" for p in (20, 50, 80)},
            "peak_mb": f"{peak[mode]:.1f}",
            "pairs_per_s": f"{pairs / percentile(samples.calls[mode], 50):.4g}",
            **environment(device),
        }
        for mode in MODES
    ]


def measure_apart(options: argparse.Namespace, provider: str, length: int) -> list[dict] | None:
    """The same in a process of its own, so that peaks and allocators start afresh."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", provider, str(length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        print(f"{provider:6} {length:8}  {last}", flush=True)
        return None
    return json.loads(done.stdout)


def exponent(rows: list[dict], provider: str, mode: str) -> float | None:
    """The power of the length that time grows with, from 65,536 to 1,048,576."""
    return power(
        (row["S"], float(row["p50_ms"]))
        for row in rows
        if row["provider"] == provider and row["mode"] == mode and FIT_FROM <= row["S"] <= 1 << 20
    )


def power(measured: Iterable[tuple[int, float]]) -> float | None:
    """The slope of log time over log length, of lengths and times; None for fewer than two."""
    points = [(math.log(length), math.log(taken)) for length, taken in measured]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(p[axis] for p in points) / len(points) for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def run(options: argparse.Namespace) -> list[dict]:
    rows: list[dict] = []
    print("provider      S   forward ms  backward ms     both ms  peak MB")
    for provider in options.providers:
        last = 0.0
        for length in options.sizes:
            growth = 2.2 if provider == "sweep" else 4.2
            too_long = last * growth > 1e3 * options.time_budget
            # Plain PyTorch holds several float32 matrices of all pairs.
            too_large = provider == "eager" and 24 * length**2 / 2**20 > 0.8 * available_mb(
                options.device
            )
            if too_long or too_large:
                why = "time budget" if too_long else "memory"
                print(f"{provider:6} {length:8}  beyond the {why}", flush=True)
                break
            found = measure_apart(options, provider, length)
            if found is None:
                break
            rows += found
            times = [float(row["p50_ms"]) for row in found]
            last = times[2]
            shown = "".join(f"{time:12.4g}" for time in times)
            print(f"{provider:6} {length:8} {shown} {found[2]['peak_mb']:>8}", flush=True)
    for provider in options.providers:
        for mode in MODES:
            slope = exponent(rows, provider, mode)
            if slope is not None:
                print(f"{provider} {mode}: time grows with S^{slope:.2f} from 65,536 to 1,048,576")
    return rows


def plot(pyplot: Any, rows: list[dict], path: Path) -> None:
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for provider in dict.fromkeys(row["provider"] for row in rows):
        chosen = [r for r in rows if r["provider"] == provider and r["mode"] == "both"]
        lengths = [r["S"] for r in chosen]
        time.loglog(lengths, [float(r["p50_ms"]) / 1e3 for r in chosen], "o-", label=provider)
        memory.loglog(
            lengths, [max(float(r["peak_mb"]), 0.1) for r in chosen], "o-", label=provider
        )
    time.set(xlabel="tokens", ylabel="seconds, forward + backward")
    memory.set(xlabel="tokens", ylabel="peak memory, MB")
    for axes in (time, memory):
        axes.grid(True, alpha=0.3)
        axes.legend()
    save_svg(figure, path)


def shares(states: torch.Tensor, keys: torch.Tensor | None, score: Threshold) -> torch.Tensor:
    """Shares of the causal pairs that a sweep meets one by one, `(sequences, 2)`.

    In the last dimension: densely, and in the bands around the thresholds.
    """
    length = states.shape[-2]
    sigma = torch.as_tensor(score.sigma).expand(states.shape[:-2]).flatten().tolist()
    states = states.reshape(-1, length, 2)
    keys = None if keys is None else keys.reshape(-1, length, 2)
    counts = [
        torch.ops.qflux_kernels.sweep_work(
            states[n : n + 1].contiguous(),
            None if keys is None else keys[n : n + 1].contiguous(),
            sigma[n], score.eps, score.stats == "row", True,
        )
        for n in range(len(states))
    ]  # fmt: skip
    return torch.stack(counts) / (length * (length + 1) / 2)


def model_states(folder: Path, length: int, text: Path | None) -> list[tuple[str, torch.Tensor]]:
    """(where, shares) for each layer with a threshold, in one pass over held-out text.

    Of a layer with a value path these are its queries and keys, of any other its states.
    """
    from qflux.text.data import load_text
    from qflux.train.checkpoint import load_model

    model, vocabulary = load_model(folder)
    held_out = "".join(load_text(text).validation.values())
    ids = vocabulary.encode(held_out)[:length][None]
    if ids.shape[1] < length:
        sys.exit(f"--model-length {length}: only {ids.shape[1]} tokens are held out")
    with torch.no_grad():
        records = model(ids, return_layers=True).layers
    found = []
    for record in records:
        if not isinstance(record.score, Threshold):
            continue
        alone = record.keys is record.queries
        keys = None if alone else record.keys
        name = "states" if alone else "values"
        found.append((name, shares(record.queries, keys, record.score)))
    return found


def bands(options: argparse.Namespace) -> None:
    print("states                S  sigma  met densely %  in bands %      all %")

    def show(name: str, length: int, sigma: str, share: torch.Tensor) -> None:
        dense, band = (100 * share.mean(0)).tolist()
        print(f"{name:14} {length:8} {sigma:>6} {dense:9.2f} {band:11.2f} {dense + band:10.2f}")

    if not options.model:
        for data in DATA:
            for length in (1 << 14, 1 << 17, 1 << 20):
                states = draw(data, length)
                for sigma in (0.5, 1.4):
                    show(data, length, f"{sigma}", shares(states, None, Threshold(sigma)))
        return
    calls = model_states(options.model, options.model_length, options.text)
    for number, (name, share) in enumerate(calls):
        show(f"{name} {number}", options.model_length, "all", share)
        worst = share[share.sum(-1).argmax()]
        show("  its worst", options.model_length, "", worst[None])


def train_states(options: argparse.Namespace) -> None:
    """Whole training steps: states and time step of one evolution learn to reach a point."""
    print("      S  step     loss  forward s  backward s  peak MB")
    target = torch.tensor([1.0, 0.0], device=options.device)
    return_freed_memory()
    for length in options.sizes:
        states = draw(options.data, length).to(options.device).requires_grad_()
        dt = torch.tensor(0.1, device=options.device, requires_grad=True)
        optimizer = torch.optim.SGD(
            [{"params": [states], "lr": 0.1 * length}, {"params": [dt], "lr": 0.01}]
        )
        for number in range(options.train):
            step = TrainingStep(states, dt, target, optimizer, score_and_mask(options))
            peak = peak_mb(step, options.device)
            print(
                f"{length:8} {number:4} {step.loss:8.4f} {step.forward_s:10.3f} "
                f"{step.backward_s:11.3f} {peak:8.1f}",
                flush=True,
            )


@dataclass
class TrainingStep:
    """Called, it trains once and knows its loss and times."""

    states: torch.Tensor
    dt: torch.Tensor
    target: torch.Tensor
    optimizer: torch.optim.Optimizer
    how: dict[str, object]
    loss: float = math.nan
    forward_s: float = math.nan
    backward_s: float = math.nan

    def __call__(self) -> None:
        start = self.now()
        reduction = reduction_of(self.how["score"])
        evolved = qflux_kernels.evolve(self.states, self.dt, reduction=reduction, **self.how)
        loss = (evolved.states - self.target).square().sum(-1).mean()
        middle = self.now()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.forward_s, self.backward_s = middle - start, self.now() - middle
        self.loss = loss.item()

    def now(self) -> float:
        synchronize(self.states.device)
        return time.perf_counter()


def compare(options: argparse.Namespace) -> None:
    """How much longer or shorter than the dense kernels the sweep takes, kind by kind of states."""
    print("states                S  forward  backward     both   (sweep / dense)")
    device, how = options.device, score_and_mask(options)
    for data in DATA | HARD:
        for length in options.sizes:
            runners = {
                algorithm: make_runner(
                    algorithm, "interact", draw(data, length).to(device), options.value_dim, how
                )
                for algorithm in ("dense", "sweep")
            }
            taken = time_in_turn(runners, device, options.rounds, options.seconds)
            ratios = [1 / speed_up(taken["sweep"], taken["dense"], mode) for mode in MODES]
            print(f"{data:14} {length:8}", *(f"{ratio:8.2f}" for ratio in ratios), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--providers", choices=PROVIDERS, nargs="+", default=list(PROVIDERS))
    parser.add_argument("--operator", choices=("interact", "evolve"), default="interact")
    parser.add_argument("--data", choices=DATA | HARD, default="random")
    parser.add_argument("--all-pairs", dest="causal", action="store_false", help="not causal")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="where times are taken"
    )
    parser.add_argument(
        "--score",
        nargs="+",
        default=["0.5", "1e-6", "prefix"],
        metavar="WORD",
        help="SIGMA EPS STATS (default 0.5 1e-6 prefix), or sparsemax SCALE",
    )
    parser.add_argument(
        "--value-dim", type=int, default=0, help="of values, else they are the keys"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round")
    parser.add_argument("--time-budget", type=float, default=20.0, help="seconds of one call")
    parser.add_argument("--output", type=Path, help="CSV to write")
    parser.add_argument("--plot", type=Path, help="SVG to write")
    parser.add_argument("--bands", action="store_true", help="shares of the pairs met one by one")
    parser.add_argument("--model", type=Path, help="for --bands: only those of a trained model")
    parser.add_argument("--model-length", type=int, default=16384, help="characters of text")
    parser.add_argument("--text", type=Path, help="text for --model, by default the one inside")
    parser.add_argument("--train", type=int, metavar="STEPS", help="time steps of training evolve")
    parser.add_argument("--compare", action="store_true", help="sweep beside dense, all --data")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        options.score = read_score(options.score)
    except (TypeError, ValueError) as error:
        parser.error(f"--score must be SIGMA EPS STATS or sparsemax SCALE: {error}")
    if options.value_dim and options.operator != "interact":
        parser.error("--value-dim is for --operator interact")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.bands:
        return bands(options)
    if options.compare:
        return compare(options)
    if options.train:
        return train_states(options)
    if options.one:
        return print(json.dumps(measure(options, options.one[0], int(options.one[1]))))
    pyplot = svg_pyplot("scaling.py --plot") if options.plot else None
    rows = run(options)
    if options.output:
        write_csv(options.output, COLUMNS, rows)
    if options.plot:
        plot(pyplot, rows, options.plot)


if __name__ == "__main__":
    main()
