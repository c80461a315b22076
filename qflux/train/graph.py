"""Training steps as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Steps of a shape that run as they are: they allocate, and choose algorithms.
WARMUP_STEPS = 3
Results = tuple[Tensor, ...]


class Recorded(NamedTuple):
    """A step on one shape: its batch, which each replay reads, and what each replay writes."""

    batch: Tensor
    replay: Callable[[], object]
    results: Results


def check_recordable(device: torch.device) -> None:
    """Raise unless steps on the device can be recorded."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a GPU, got device {device}")


class CudaRecorder:
    """Runs and records steps on a stream of their own, as recording wants them.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, step: Callable[[], Results]) -> Results:
        """The step's results, in order with what the current stream does."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = step()
        current.wait_stream(self.stream)
        return results

    def record(self, step: Callable[[], Results]) -> tuple[Callable[[], object], Results]:
        """The step without running it: what replays it, and where its results will be."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                results = step()
        except RuntimeError as error:
            raise RuntimeError(
                f"this step cannot be recorded as a CUDA graph ({error}): leave out cuda_graph"
            ) from error
        return graph.replay, results


class GraphedStep:
    """A step that is recorded once for each shape of a batch and replayed from then on.

    What the step does may depend on the contents of tensors, which it reads where they are, and on
    nothing else that changes.

    Args:
        step: from a batch to results, all on a GPU, without waiting for it.
        recorder: runs and records the step.
    """

    def __init__(self, step: Callable[[Tensor], Results], recorder: CudaRecorder) -> None:
        self._step, self._recorder = step, recorder
        self._run: Counter[torch.Size] = Counter()
        self._recorded: dict[torch.Size, Recorded] = {}

    def __call__(self, batch: Tensor) -> Results:
        shape = batch.shape
        if shape not in self._recorded:
            self._run[shape] += 1
            if self._run[shape] <= WARMUP_STEPS:
                return self._recorder.run(lambda: self._step(batch))
            own = batch.clone()
            self._recorded[shape] = Recorded(own, *self._recorder.record(lambda: self._step(own)))
        recorded = self._recorded[shape]
        recorded.batch.copy_(batch)
        recorded.replay()
        # The next replay overwrites them.
        return tuple(result.clone() for result in recorded.results)
