"""Share of the vector issue bound that the forward reaches: `python benchmarks/issue_bound.py`.

The bound: a pair costs two multiply-adds for the score, a compare and three masked accumulations,
so `lanes` pairs cannot take fewer than six vector instructions. The rate at which this machine
issues vector instructions is measured by `issue_bound.cpp`, compiled for this machine, on as many
threads as the kernel uses and in turn with it, so that both see the same clock and neighbours.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import qflux_kernels

INSTRUCTIONS = 6
REPEATS = 4


def load() -> ctypes.CDLL:
    """Compile and load the measuring loop."""
    folder = tempfile.mkdtemp(prefix="qflux-issue-")
    target = Path(folder) / "issue_bound.so"
    source = Path(__file__).with_name("issue_bound.cpp")
    command = ["c++", "-O2", "-march=native", "-shared", "-fPIC", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.issue_rate.restype = ctypes.c_double
    library.issue_rate.argtypes = [ctypes.c_double]
    return library


def _seconds(states: torch.Tensor) -> float:
    start = time.perf_counter()
    qflux_kernels.interact(states, algorithm="dense")
    return time.perf_counter() - start


def measure(length: int, threads: int, rounds: int) -> dict[str, float]:
    """Medians over `rounds` of the kernel and the issue rate, measured in turn."""
    library = load()
    torch.set_num_threads(threads)
    states = torch.randn(length, 2, generator=torch.Generator().manual_seed(0))
    pairs = length * (length + 1) / 2
    qflux_kernels.interact(states, algorithm="dense")
    bounds, rates, shares = [], [], []
    for _ in range(rounds):
        with ThreadPoolExecutor(threads) as pool:
            issued = sum(pool.map(library.issue_rate, [0.2] * threads))
        # The best of a few runs, as the bound is the best of its stretches.
        rates.append(max(pairs / _seconds(states) for _ in range(REPEATS)))
        bounds.append(issued * library.lanes() / INSTRUCTIONS)
        shares.append(rates[-1] / bounds[-1])
    return {
        "bound_pairs_per_s": statistics.median(bounds),
        "pairs_per_s": statistics.median(rates),
        "share": statistics.median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    result = measure(options.length, options.threads, options.rounds)
    print(f"interact forward, causal, float32, S = {options.length}, {options.threads} threads")
    print(f"instruction set   {qflux_kernels.diagnostics()['instruction_set']}")
    print(f"issue bound       {result['bound_pairs_per_s'] / 1e9:.1f}e9 pairs/s")
    print(f"kernel            {result['pairs_per_s'] / 1e9:.1f}e9 pairs/s")
    print(f"share             {100 * result['share']:.0f} %")


if __name__ == "__main__":
    main()
