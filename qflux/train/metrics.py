"""The numbers of a run: what a line of `metrics.jsonl` says, and the file."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import write_atomically
from .step import StepResult

METRICS_FILE = "metrics.jsonl"


class IntervalNumbers(NamedTuple):
    """What `Interval.fetch` brings to the host.

    losses: of each step, in their order. gradient_norm: of the last step. layers: metrics of the
    layers in the last step by name, a number for each layer.
    """

    losses: list[float]
    gradient_norm: float
    layers: dict[str, list[float]]


class Interval:
    """The steps since the last line of metrics; losses stay on the device until `fetch`."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.tokens = 0
        self.start = time.perf_counter()

    def add(self, loss: Tensor, tokens: int) -> None:
        """Count a step with this loss over so many tokens."""
        self.losses.append(loss)
        self.tokens += tokens

    def fetch(self, last: StepResult) -> IntervalNumbers:
        """The numbers of the interval, in the one transfer for which the host waits."""
        table = [layer.metrics() for layer in last.layers]
        names = list(table[0]) if table else []
        values = [metrics[name] for metrics in table for name in names]
        *numbers, norm = torch.stack([*values, *self.losses, last.norm]).tolist()
        count = len(values)
        layers = {name: numbers[i : count : len(names)] for i, name in enumerate(names)}
        return IntervalNumbers(numbers[count:], norm, layers)

    def tokens_per_second(self, now: float) -> float:
        """The speed since the beginning of the interval."""
        return self.tokens / (now - self.start)


def peak_memory(device: torch.device) -> float:
    """Largest memory so far, in bytes: allocated on a GPU, resident of the process on a CPU.

    NaN where the system does not tell.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return math.nan
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def drop_lines_after(folder: Path, step: int) -> None:
    """Forget lines of steps that a resumed run will take again, or of an earlier run."""
    path = folder / METRICS_FILE
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(kept).encode())
