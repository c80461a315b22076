"""`interact` and one `evolve` step against what else computes them, by sequence length.

python benchmarks/kernels.py --quick    a table in less than a minute, no file
python benchmarks/kernels.py --full     every size and provider, with peak memory, into a CSV
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# Before pykeops is imported: its generated code does not belong in the home directory.
os.environ.setdefault("KEOPS_CACHE_FOLDER", str(Path(tempfile.gettempdir()) / "qflux-keops"))

import torch
from common import (
    COLUMNS,
    MODES,
    Runner,
    Samples,
    available_mb,
    environment,
    missing_module,
    nothing_missing,
    peak_mb,
    percentile,
    return_freed_memory,
    speed_up,
    time_in_turn,
    time_once,
)
from files import write_csv
from transformer import TransformerConfig, TransformerLayer

import qflux_kernels
from qflux_kernels import Radius, Threshold, reference

KERNELS = ("evolve", "interact")
FULL_SIZES = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
QUICK_SIZES = [256, 1024, 4096]
DT = 1e-3
SCORE, RADIUS = Threshold(), Radius()

Interact = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def heun_step(interact: Interact, x: torch.Tensor) -> torch.Tensor:
    """One default step of `evolve` around some way to compute context and strength."""
    context, strength = interact(x)
    k1 = DT * context
    k2 = DT * interact(x + k1)[0]
    moved = x + (k1 + k2) / 2
    norm = (moved * moved).sum(-1).sqrt().clamp(min=1e-6)
    free = norm + RADIUS.rate * strength - RADIUS.reversion * (norm - RADIUS.target)
    return moved * (free.clamp(RADIUS.min, RADIUS.max) / norm)[:, None]


def closed_form_threshold(x: torch.Tensor) -> torch.Tensor:
    """tau of every row from prefix moments: no pass over pairs, as a user would optimise it."""
    px, py = x.unbind(-1)
    count = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    mx, my, xx, xy, yy = torch.stack((px, py, px * px, px * py, py * py)).cumsum(1) / count
    cxx, cxy, cyy = xx - mx * mx, xy - mx * my, yy - my * my
    mean = (px * mx + py * my + 1) / 2
    variance = (px * px * cxx + 2 * px * py * cxy + py * py * cyy) / 4
    return (mean + SCORE.sigma * (variance.clamp(min=0) + SCORE.eps).sqrt()).detach()


def broadcast_weights(x: torch.Tensor) -> torch.Tensor:
    tau = closed_form_threshold(x)
    px, py = x.unbind(-1)
    s = (px[:, None] * px + py[:, None] * py + 1) / 2
    # In the dtype of the scores, or the compiler mixes vector widths.
    index = torch.arange(len(x), dtype=x.dtype, device=x.device)
    return torch.where((s >= tau[:, None]) & (index <= index[:, None]), s, 0.0)


def by_planes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three reductions of one broadcast expression."""
    w = broadcast_weights(x)
    return torch.stack(((w * x[:, 0]).sum(1), (w * x[:, 1]).sum(1)), -1), w.sum(1)


def by_points(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One reduction of a broadcast of points."""
    w = broadcast_weights(x)
    return (w[..., None] * x).sum(1), w.sum(1)


def by_product(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix product, for which the weights must be stored."""
    w = broadcast_weights(x)
    return w @ x, w.sum(1)


# Without these, the compiler stores the weights because several reductions read them.
FUSE = {"realize_reads_threshold": 64, "realize_opcount_threshold": 512}


@functools.cache
def keops_interact() -> Interact:
    import pykeops

    pykeops.set_verbose(False)
    from pykeops.torch import LazyTensor

    def interact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.arange(len(x), dtype=x.dtype, device=x.device)[:, None]
        x_i, x_j = LazyTensor(x[:, None]), LazyTensor(x[None])
        tau_i = LazyTensor(closed_form_threshold(x)[:, None, None])
        row, key = LazyTensor(index[:, None]), LazyTensor(index[None])
        s = (x_i | x_j) / 2 + 0.5
        w = s * (s - tau_i).step() * (row - key).step()
        sums = LazyTensor.concat(w * x_j, w).sum(dim=1)
        return sums[:, :2], sums[:, 2]

    return interact


def runner(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Runner:
    x = x.requires_grad_()
    with torch.no_grad():
        grad = torch.ones_like(function(x))
    return Runner(lambda: function(x), lambda output: torch.autograd.grad(output, x, grad))


@functools.cache
def step_of(kernel: str, interact: Interact) -> Callable[[torch.Tensor], torch.Tensor]:
    """The kernel made of some way to compute an interaction."""
    if kernel == "interact":
        return lambda x: interact(x)[0]
    return lambda x: heun_step(interact, x)


@functools.cache
def compile_step(
    kernel: str, interact: Interact, fuse: bool, dynamic: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(step_of(kernel, interact), dynamic=dynamic, options=FUSE if fuse else None)


Build = Callable[[str, torch.Tensor, bool], Runner]


@dataclass(frozen=True)
class Provider:
    """Something that computes the kernels.

    Args:
        build: (kernel, states `(S, 2)`, dynamic) to the closures that are timed; `dynamic` asks
            for one compilation for every size.
        missing: why it cannot run here, or None.
        kernels: those of `KERNELS` that it stands beside.
        quick_limit: the largest S that a quick run, which weighs nothing first, may ask of it.
    """

    build: Build
    missing: Callable[[], str | None] = nothing_missing
    kernels: tuple[str, ...] = KERNELS
    quick_limit: int = 8192


def from_package(package: ModuleType) -> Build:
    """`qflux_kernels`, or its reference of the same signatures."""

    def build(kernel: str, states: torch.Tensor, dynamic: bool) -> Runner:
        how = {"score": SCORE, "algorithm": "dense"}
        if kernel == "interact":
            return runner(lambda x: package.interact(x, **how).context, states)
        return runner(lambda x: package.evolve(x, DT, radius=RADIUS, **how).states, states)

    return build


def compiled(interact: Interact, fuse: bool = False) -> Build:
    """A broadcast form through `torch.compile`."""
    return lambda kernel, states, dynamic: runner(
        compile_step(kernel, interact, fuse, dynamic), states
    )


def from_keops(kernel: str, states: torch.Tensor, dynamic: bool) -> Runner:
    return runner(step_of(kernel, keops_interact()), states)


def transformer_layer(kernel: str, states: torch.Tensor, dynamic: bool) -> Runner:
    """A layer of width 768 with 12 heads on as many tokens: what an `evolve` step stands in for."""
    torch.manual_seed(0)
    # Positions are the model's matter, so that the layer is attention and an MLP alone.
    config = TransformerConfig(vocab_size=1, hidden_dim=768, num_heads=12, positions="learned")
    layer = TransformerLayer(config).to(states.device)
    x = torch.randn(1, len(states), config.hidden_dim).to(states.device).requires_grad_()
    wanted = [x, *layer.parameters()]
    grad = torch.ones_like(x)
    return Runner(lambda: layer(x), lambda out: torch.autograd.grad(out, wanted, grad))


PROVIDERS = {
    "qflux": Provider(from_package(qflux_kernels), quick_limit=1 << 20),
    "eager": Provider(from_package(reference)),
    "compile": Provider(compiled(by_planes, fuse=True)),
    "compile-planes": Provider(compiled(by_planes)),
    "compile-points": Provider(compiled(by_points)),
    "compile-product": Provider(compiled(by_product)),
    "keops": Provider(from_keops, missing=missing_module("pykeops")),
    "transformer": Provider(transformer_layer, kernels=("evolve",), quick_limit=1024),
}
QUICK_PROVIDERS = ("qflux", "eager", "compile", "transformer")


def build(kernel: str, provider: str, length: int, device: torch.device, dynamic: bool) -> Runner:
    """The closures of one provider at one size."""
    states = torch.randn(length, 2, generator=torch.Generator().manual_seed(0)).to(device)
    return PROVIDERS[provider].build(kernel, states, dynamic)


def pairs(kernel: str, length: int) -> float:
    """Causal pairs of one call; an evolution step has two stages."""
    return length * (length + 1) / 2 * (2 if kernel == "evolve" else 1)


def probe(kernel: str, provider: str, options: argparse.Namespace) -> None:
    """Weigh one provider at growing sizes, a line of JSON each, until a budget would break."""
    return_freed_memory()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    memory_budget = options.memory_share * available_mb(device)
    last: dict[str, float] | None = None
    growth = 2.0
    for length in options.sizes:
        found: dict[str, object] = {"S": length, "status": "ok"}
        if last is not None:
            scale = length / last["S"]
            if last["seconds"] * scale**2 > options.time_budget:
                found["status"] = "over time budget"
            elif last["both"] * scale**growth > memory_budget:
                found["status"] = "out of memory"
        if found["status"] == "ok":
            torch._dynamo.reset()
            try:
                case = build(kernel, provider, length, device, dynamic=False)
                time_once(case, device)
                found["seconds"] = time_once(case, device)["both"]
                with torch.no_grad():
                    found["forward"] = peak_mb(case.forward, device)
                found["both"] = peak_mb(lambda c=case: c.backward(c.forward()), device)
            except (MemoryError, RuntimeError) as error:
                if "memory" not in str(error):
                    raise
                found["status"] = "out of memory"
        print(json.dumps(found), flush=True)
        if found["status"] != "ok":
            return
        if last is not None and last["both"] > 1:
            ratio = math.log(max(1.0, found["both"] / last["both"]), length / last["S"])
            growth = min(2.0, max(1.0, ratio))
        last = found


def run_probe(
    kernel: str, provider: str, options: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """Probe in a process of its own, so that its peak is its own and so is its end."""
    command = [sys.executable, __file__, "--probe", kernel, provider]
    command += ["--device", options.device, "--threads", str(options.threads)]
    command += ["--time-budget", str(options.time_budget)]
    command += ["--memory-share", str(options.memory_share)]
    command += ["--sizes", *map(str, options.sizes)]
    seen = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                seen += 1
                yield json.loads(line)
    if process.returncode < 0:
        yield {"S": options.sizes[seen], "status": "out of memory"}
    elif process.returncode:
        raise RuntimeError(f"the probe of {provider} failed, see above")


def providers_of(kernel: str, options: argparse.Namespace) -> list[str]:
    """The providers asked for that stand beside this kernel."""
    return [name for name in options.providers if kernel in PROVIDERS[name].kernels]


def measure(kernel: str, options: argparse.Namespace) -> tuple[list[dict], dict[int, dict]]:
    """Rows of the CSV, and the samples behind them by size and provider."""
    device = torch.device(options.device)
    common = environment(device)
    rows, samples = [], {}
    probes: dict[str, dict[int, dict]] = {}
    providers = providers_of(kernel, options)
    for provider in providers:
        reason = PROVIDERS[provider].missing()
        if reason is not None:
            print(f"{kernel}: without {provider}, {reason}", file=sys.stderr)
            probes[provider] = {options.sizes[0]: {"status": reason}}
        elif options.quick:
            limit = PROVIDERS[provider].quick_limit
            probes[provider] = {s: {"status": "ok"} for s in options.sizes if s <= limit}
        else:
            print(f"{kernel}: weighing {provider}", file=sys.stderr)
            probes[provider] = {found["S"]: found for found in run_probe(kernel, provider, options)}
    for length in options.sizes:
        print(f"{kernel}: timing S = {length}", file=sys.stderr)
        if not options.quick:
            # One length after another would run into the limit of recompilations.
            torch._dynamo.reset()
        runners = {
            provider: build(kernel, provider, length, device, dynamic=options.quick)
            for provider in providers
            if probes[provider].get(length, {}).get("status") == "ok"
        }
        samples[length] = time_in_turn(runners, device, options.rounds, options.seconds)
        for provider in providers:
            found = probes[provider].get(length)
            for mode in MODES if found else ():
                row = common | {"kernel": kernel, "provider": provider, "mode": mode, "S": length}
                row["status"] = found["status"]
                if provider in samples[length]:
                    row |= metrics(samples[length][provider], mode, kernel, provider, length)
                    peak = found.get("forward" if mode == "forward" else "both")
                    row["peak_mb"] = None if peak is None else round(peak, 2)
                rows.append(row)
    return rows, samples


def metrics(
    samples: Samples, mode: str, kernel: str, provider: str, length: int
) -> dict[str, object]:
    seconds = samples.calls[mode]
    result: dict[str, object] = {
        f"p{percent}_ms": f"{1e3 * percentile(seconds, percent):.5g}" for percent in (20, 50, 80)
    }
    if provider != "transformer":
        result["pairs_per_s"] = f"{pairs(kernel, length) / percentile(seconds, 50):.4g}"
    return result


def print_table(kernel: str, options: argparse.Namespace, samples: dict[int, dict]) -> None:
    """Ours in milliseconds, and how many times faster than each other provider, both ways."""
    others = [provider for provider in providers_of(kernel, options) if provider != "qflux"]
    print(f"\n{kernel}, float32, causal: median ms of qflux; others / qflux, forward + backward")
    titles = ["S", "forward", "backward", "pairs/s", *others]
    print("".join(f"{title:>{max(10, len(title) + 2)}}" for title in titles))
    for length, found in samples.items():
        if "qflux" not in found:
            continue
        ours = found["qflux"]
        forward = percentile(ours.calls["forward"], 50)
        cells = [
            str(length),
            f"{1e3 * forward:.3g}",
            f"{1e3 * percentile(ours.calls['backward'], 50):.3g}",
            f"{pairs(kernel, length) / forward:.3g}",
            *(f"{speed_up(ours, found[p], 'both'):.3g}x" if p in found else "-" for p in others),
        ]
        widths = [max(10, len(title) + 2) for title in titles]
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="small sizes, no file (default)")
    effort.add_argument("--full", action="store_true", help="all sizes, peak memory, a CSV")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="CSV of a full run")
    parser.add_argument("--time-budget", type=float, default=15.0, help="seconds a call may take")
    parser.add_argument("--memory-share", type=float, default=0.6, help="of what is free")
    parser.add_argument("--probe", nargs=2, metavar=("KERNEL", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.quick = not options.full and options.probe is None
    options.sizes = sorted(options.sizes or (QUICK_SIZES if options.quick else FULL_SIZES))
    options.rounds, options.seconds = (3, 0.2) if options.quick else (7, 0.5)
    if options.providers is None:
        options.providers = list(QUICK_PROVIDERS if options.quick else PROVIDERS)
    if options.full and options.output is None:
        name = f"kernels_{torch.device(options.device).type}.csv"
        options.output = Path(__file__).resolve().parent / "results" / name
    return options


def main() -> None:
    options = parse()
    if options.probe:
        probe(*options.probe, options)
        return
    torch.set_num_threads(options.threads)
    start, rows = time.perf_counter(), []
    for kernel in options.kernels:
        found, samples = measure(kernel, options)
        rows += found
        print_table(kernel, options, samples)
    if options.output:
        write_csv(options.output, COLUMNS, rows)
        print(f"\n{len(rows)} rows in {options.output}")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
