"""Trees beside the dense kernels for a sparsemax: `python benchmarks/sparsemax.py --output CSV`.

Three parts, each with values of width 4 and a causal mask, forward with its graph and backward:

- `growth`: flat to sharp scales over lengths, the dense kernels up to `--dense-up-to`; then the
  exponent of the trees' time from 65,536 tokens on. `--plot` draws it.
- `model`: the same on the states of a trained model (`--model DIR`), three cylinders of each layer,
  the one of the flattest scale, of the median and of the sharpest.
- `hostile`: what `algorithm="auto"` takes beside the dense kernels, over kinds of states.

Both sides are timed in turn, by processor time where one thread works, which others disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import environment
from files import write_csv
from lm_curves import save_svg, svg_pyplot
from scaling import DATA, FIT_FROM, HARD, draw, power

import qflux_kernels
from qflux_kernels import Sparsemax

COLUMNS = [
    "part", "states", "scale", "S", "kept", "algorithm", "mode", "ms", "dense_ms", "ratio",
    "dtype", "device", "threads", "machine", "instruction_set", "torch", "python", "commit", "date",
]  # fmt: skip
MODES = ("forward", "backward", "both")
SIZES = [16384, 32768, 65536, 131072, 262144, 1048576]
SCALES = [0.001, 0.05, 50.0]
HOSTILE_SIZES = [8192, 24576]
VALUE_DIM = 4
# Calls that take longer in all are made once, others once more to warm up.
LONG_SECONDS = 10.0


@dataclass
class Case:
    """One sequence and its scale."""

    part: str
    states: str
    scale: float
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def call(self, algorithm: str, clock: Callable[[], float]) -> tuple[float, float, float]:
        """Seconds forward, backward and together."""
        start = clock()
        output = qflux_kernels.interact(
            *self.leaves, score=Sparsemax(self.scale), algorithm=algorithm
        ).context
        middle = clock()
        torch.autograd.grad(output, self.leaves, torch.ones_like(output))
        end = clock()
        return middle - start, end - middle, end - start

    def kept(self) -> float:
        """The mean number of keys that a row keeps."""
        with torch.no_grad():
            found = qflux_kernels.interact(*self.leaves, score=Sparsemax(self.scale))
        return found.degree.float().mean().item()


def make_case(
    part: str, name: str, scale: float, queries: torch.Tensor, keys: torch.Tensor
) -> Case:
    """With values at random, which times do not depend on."""
    generator = torch.Generator().manual_seed(1)
    leaves = (queries, keys, torch.randn(len(keys), VALUE_DIM, generator=generator))
    for leaf in leaves:
        leaf.requires_grad_()
    return Case(part, name, scale, leaves)


def drawn_case(part: str, data: str, scale: float, length: int) -> Case:
    states = draw(data, length)
    return make_case(part, data, scale, states, states.clone())


def model_cases(folder: Path, text: Path | None, length: int) -> Iterator[Case]:
    """Cylinders of each layer while it reads so many held-out tokens."""
    from qflux.text.data import load_text
    from qflux.train.checkpoint import load_model

    model, vocabulary = load_model(folder)
    held_out = "".join(load_text(text).validation.values())
    ids = vocabulary.encode(held_out)[:length][None]
    if ids.shape[1] < length:
        sys.exit(f"--model: only {ids.shape[1]} tokens are held out")
    with torch.no_grad():
        records = model(ids, return_layers=True).layers
    for layer, record in enumerate(records):
        shape = record.queries.shape[:-2]
        scales = torch.as_tensor(record.score.scale).expand(shape).flatten()
        order = scales.abs().argsort().tolist()
        for cylinder in (order[0], order[len(order) // 2], order[-1]):
            points = [
                t.reshape(-1, length, 2)[cylinder].detach().clone()
                for t in (record.queries, record.keys)
            ]
            scale = scales[cylinder].item()
            yield make_case("model", f"layer {layer}, cylinder {cylinder}", scale, *points)


def measure(case: Case, algorithm: str, dense: bool, calls: int) -> list[dict[str, object]]:
    """Rows of a case: medians of calls in turn, and of their ratios to the dense kernels."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    names = ["dense", algorithm] if dense else [algorithm]
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    first = {name: case.call(name, clock) for name in names}
    if sum(call[2] for call in first.values()) > LONG_SECONDS:
        samples = {name: [call] for name, call in first.items()}
    else:
        for _ in range(calls):
            for name in names:
                samples[name].append(case.call(name, clock))
    kept = case.kept()
    rows = []
    for number, mode in enumerate(MODES):
        mine = [sample[number] for sample in samples[algorithm]]
        row: dict[str, object] = {
            "part": case.part,
            "states": case.states,
            "scale": f"{case.scale:.4g}",
            "S": len(case.leaves[0]),
            "kept": f"{kept:.4g}",
            "algorithm": algorithm,
            "mode": mode,
            "ms": f"{1e3 * statistics.median(mine):.4g}",
        }
        if dense:
            theirs = [sample[number] for sample in samples["dense"]]
            ratio = statistics.median(m / t for m, t in zip(mine, theirs, strict=True))
            row["dense_ms"] = f"{1e3 * statistics.median(theirs):.4g}"
            row["ratio"] = f"{ratio:.3g}"
        rows.append(row | environment(torch.device("cpu")))
    shown = "".join(f"{row['ms']:>9}" for row in rows)
    beside = "".join(f"{row.get('dense_ms', ''):>9}" for row in rows)
    ratios = "".join(f"{row.get('ratio', ''):>7}" for row in rows)
    print(
        f"{case.states:22} {case.scale:8.3g} {rows[0]['S']:8} {kept:8.1f}{shown}{beside}{ratios}",
        flush=True,
    )
    return rows


def exponent(rows: list[dict[str, object]]) -> float | None:
    """The power of the length that time grows with from 65,536 tokens on."""
    return power((row["S"], float(row["ms"])) for row in rows if row["S"] >= FIT_FROM)


def growth(options: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    for data in ("random", "circle"):
        for scale in options.scales:
            found = []
            for length in options.sizes:
                case = drawn_case("growth", data, scale, length)
                found += measure(case, "sweep", length <= options.dense_up_to, options.calls)
            rows += found
            slope = exponent([row for row in found if row["mode"] == "both"])
            if slope is not None:
                print(f"{data}, scale {scale:g}: time grows with S^{slope:.2f} from {FIT_FROM:,}")
    return rows


def trained(options: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    for case in model_cases(options.model, options.text, options.dense_up_to):
        rows += measure(case, "sweep", True, options.calls)
    return rows


def hostile(options: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    for scale in options.scales:
        for data in DATA | HARD:
            for length in options.hostile_sizes:
                case = drawn_case("hostile", data, scale, length)
                rows += measure(case, options.hostile_algorithm, True, options.calls)
    for mode in MODES:
        chosen = [row for row in rows if row["mode"] == mode]
        worst = max(chosen, key=lambda row: float(row["ratio"]))
        where = f"{worst['states']}, scale {worst['scale']}, {worst['S']:,} tokens"
        print(f"worst {mode}: {worst['ratio']} times the dense kernels ({where})")
    return rows


def plot(pyplot: Any, rows: list[dict[str, object]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for side, data in zip(axes, ("random", "circle"), strict=True):
        of_data = [
            row
            for row in rows
            if row["part"] == "growth" and row["states"] == data and row["mode"] == "both"
        ]
        for number, scale in enumerate(dict.fromkeys(row["scale"] for row in of_data)):
            chosen = [row for row in of_data if row["scale"] == scale]
            beside = [row for row in chosen if "dense_ms" in row]
            color = f"C{number}"
            side.loglog(
                [row["S"] for row in chosen], [float(row["ms"]) / 1e3 for row in chosen],
                "o-", color=color, label=f"trees, scale {scale}",
            )  # fmt: skip
            side.loglog(
                [row["S"] for row in beside], [float(row["dense_ms"]) / 1e3 for row in beside],
                "x--", color=color, label="dense" if number == 0 else None,
            )  # fmt: skip
        side.set(xlabel="tokens", title="standard normal" if data == "random" else "unit circle")
        side.grid(True, alpha=0.3)
    axes[0].set(ylabel="seconds, forward + backward")
    axes[0].legend(fontsize="small")
    save_svg(figure, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("growth", "model", "hostile"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--dense-up-to", type=int, default=131072, help="tokens, and of --model")
    parser.add_argument("--hostile-sizes", type=int, nargs="+", default=HOSTILE_SIZES)
    parser.add_argument("--hostile-algorithm", choices=("auto", "sweep"), default="auto")
    parser.add_argument("--model", type=Path, help="folder of a trained model")
    parser.add_argument("--text", type=Path, help="text for --model, by default the one inside")
    parser.add_argument("--calls", type=int, default=3, help="of each side, in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV to write")
    parser.add_argument("--plot", type=Path, help="SVG to write")
    options = parser.parse_args(arguments)
    parts = options.parts or ["growth", "hostile", *(["model"] if options.model else [])]
    if "model" in parts and not options.model:
        parser.error("--parts model needs --model DIR")
    pyplot = svg_pyplot("sparsemax.py --plot") if options.plot else None
    torch.set_num_threads(options.threads)
    print(
        "states                    scale        S     kept   ms: forward, backward, both;", end=" "
    )
    print("the same densely; ratios")
    rows = []
    for name, part in (("growth", growth), ("model", trained), ("hostile", hostile)):
        if name in parts:
            rows += part(options)
    if options.output:
        write_csv(options.output, COLUMNS, rows)
    if options.plot:
        plot(pyplot, rows, options.plot)


if __name__ == "__main__":
    main()
