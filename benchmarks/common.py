"""How the benchmarks time and weigh: one CSV schema, paired ratios, peak memory."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import qflux_kernels

COLUMNS = [
    "kernel", "provider", "mode", "S", "status", "p20_ms", "p50_ms", "p80_ms", "peak_mb",
    "pairs_per_s", "dtype", "device", "threads", "machine", "instruction_set", "torch", "python",
    "commit", "date",
]  # fmt: skip
MODES = ("forward", "backward", "both")


@dataclass
class Runner:
    """One provider at one size: `forward()` returns what `backward` takes."""

    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor], object]


@dataclass
class Samples:
    """Seconds of every call, and the medians of each round."""

    calls: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    rounds: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})


def machine_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit measured, marked if the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:  # a machine without git
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def environment(device: torch.device) -> dict[str, object]:
    """The columns that one run has in common."""
    return {
        "dtype": "float32",
        "device": device.type,
        "threads": torch.get_num_threads(),
        "machine": machine_name(),
        "instruction_set": qflux_kernels.diagnostics()["instruction_set"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def nothing_missing() -> str | None:
    """The `missing` of a provider that runs everywhere."""
    return None


def missing_module(name: str) -> Callable[[], str | None]:
    """A provider's `missing`: it needs the module of that name."""
    return lambda: None if importlib.util.find_spec(name) else f"not installed: {name}"


def percentile(samples: list[float], percent: float) -> float:
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[round(percent) - 1]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(runner: Runner, device: torch.device) -> dict[str, float]:
    """Seconds of a forward alone, then of one that keeps its graph with the backward after it."""

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    start = now()
    with torch.no_grad():
        runner.forward()
    alone = now()
    output = runner.forward()
    middle = now()
    runner.backward(output)
    end = now()
    return {"forward": alone - start, "backward": end - middle, "both": end - alone}


def time_in_turn(
    runners: dict[str, Runner], device: torch.device, rounds: int, seconds: float
) -> dict[str, Samples]:
    """Time every runner in every round, so that ratios compare the same moments of the machine.

    A round runs each as often as fits in `seconds`, at least once and at most 20 times. The first
    call warms up and decides how often that is.
    """
    repeats = {}
    for name, runner in runners.items():
        time_once(runner, device)
        once = time_once(runner, device)
        repeats[name] = min(20, max(1, int(seconds / (once["forward"] + once["both"]))))
    samples = {name: Samples() for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            calls = [time_once(runner, device) for _ in range(repeats[name])]
            for mode in MODES:
                measured = [call[mode] for call in calls]
                samples[name].calls[mode] += measured
                samples[name].rounds[mode].append(statistics.median(measured))
    return samples


def speed_up(ours: Samples, other: Samples, mode: str) -> float:
    """How many times faster ours is: the median of the rounds' ratios."""
    pairs = zip(other.rounds[mode], ours.rounds[mode], strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def _resident_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return float("nan")


def return_freed_memory() -> None:
    """Make glibc give every freed block of 64 KiB or more back to the system from now on.

    Otherwise a call can live on what an earlier one freed, and its peak would not show.
    """
    if platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16)


def peak_mb(call: Callable[[], object], device: torch.device) -> float:
    """Megabytes a call needs at its worst beyond what stood before it; NaN where unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # Linux resets the peak of the resident set when 5 is written here.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    before = _resident_mb("VmRSS")
    call()
    return max(0.0, _resident_mb("VmHWM") - before)


def available_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
