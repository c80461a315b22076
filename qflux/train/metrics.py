"""The numbers of a run: what a line of `metrics.jsonl` says, and the file."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.embedding import phase_coherence
from ..models.output import LayerRecord
from .checkpoint import write_atomically
from .ranks import Ranks
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

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to finish the interval in another process."""
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        seconds = time.perf_counter() - self.start
        return {"losses": losses, "tokens": self.tokens, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`."""
        self.losses = list(state["losses"].to(device))
        self.tokens = state["tokens"]
        self.start = time.perf_counter() - state["seconds"]

    def add(self, loss: Tensor, tokens: int) -> None:
        """Count a step with this loss over so many tokens."""
        self.losses.append(loss)
        self.tokens += tokens

    def fetch(self, last: StepResult, ranks: Ranks, length: int) -> IntervalNumbers:
        """The numbers of the interval, in the one transfer for which the host waits.

        Args:
            last: the step that ends it.
            ranks: the processes of the run, which all have to call this.
            length: tokens of the windows of the last step.
        """
        losses = self.losses
        if ranks.size == 1:
            table = [layer.metrics() for layer in last.layers]
        else:
            with ranks.sequences(length):
                table = [reduced_metrics(layer, ranks, length) for layer in last.layers]
            # In one precision: a process without the last layers has zeros of its own.
            losses = list(ranks.sum(torch.stack(losses).double()) / ranks.data)
        names = list(table[0]) if table else []
        values = [metrics[name] for metrics in table for name in names]
        *numbers, norm = torch.stack([*values, *losses, last.norm]).tolist()
        count = len(values)
        layers = {name: numbers[i : count : len(names)] for i, name in enumerate(names)}
        return IntervalNumbers(numbers[count:], norm, layers)

    def tokens_per_second(self, now: float) -> float:
        """The speed since the beginning of the interval."""
        return self.tokens / (now - self.start)


@torch.no_grad()
def reduced_metrics(layer: LayerRecord, ranks: Ranks, length: int) -> dict[str, Tensor]:
    """`LayerRecord.metrics` of a record of which every process has the part of its tokens."""
    tokens = ranks.sum(torch.tensor(float(layer.degree.numel()), device=layer.degree.device))
    own = {
        "density": layer.degree.sum() / (tokens * (length + 1) / 2),
        "strength": layer.strength.sum() / tokens,
        "radius_mean": layer.radius.sum() / tokens,
        # The processes that share a sequence have the same number.
        "coherence": phase_coherence(layer.states_after).mean() / ranks.size,
    }
    if layer.skip is not None:
        own["skip"] = layer.skip.mean() / ranks.size
    sums = ranks.sum(torch.stack([value.to(layer.radius.dtype) for value in own.values()]))
    found = dict(zip(own, sums, strict=True))
    square = ranks.sum((layer.radius - found["radius_mean"]).square().sum() / tokens)
    deviation = {"radius_std": square.sqrt()}
    order = ("density", "strength", "radius_mean", "radius_std", "coherence", "skip")
    return {name: (found | deviation)[name] for name in order if name in found | deviation}


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


def append_line(path: Path, line: dict[str, object]) -> None:
    """Add a line to the file at `path`, handed to the system before this returns.

    Raises:
        OSError: it cannot be written; names the file.
    """
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def drop_lines_after(folder: Path, step: int) -> int:
    """Forget lines of steps that a resumed run will take again.

    What is no line of metrics goes too: the end of a line that a crash cut off, blank lines, and
    whatever else got into the file.

    Returns:
        how many whole lines were neither blank nor lines of metrics.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return 0
    kept, bad = [], 0
    content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or not line.strip():
            continue
        at = _step_of(line)
        if at is None:
            bad += 1
        elif at <= step:
            kept.append(line)
    if b"".join(kept) != content:
        write_atomically(path, b"".join(kept))
    return bad


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics, None for another line."""
    try:
        given = json.loads(line)
    except ValueError:
        return None
    step = given.get("step") if isinstance(given, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
