"""The split that sequences have now, for the models that live inside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.device_mesh import DeviceMesh

from qflux_kernels.functional import served_by

from .interaction import SplitOperators
from .split import SequenceSplit

# Not a context variable: a backward that recomputes a layer may run in another thread.
_current: SequenceSplit | None = None


def current_split() -> SequenceSplit | None:
    """How sequences are split over ranks now; None: they are whole."""
    return _current


@contextmanager
def context_parallel(mesh: DeviceMesh, length: int | None = None) -> Iterator[SequenceSplit]:
    """Meanwhile every sequence is split over the ranks of a mesh, as `shard` does it.

    A model, `interact` or `evolve` that gets this rank's part of every sequence returns its part of
    what one process computes from the whole, forward and backward: every score, statistics over
    prefix or row, convolutions, positions. Rows stay where they are; keys and values come from all
    ranks a few cylinders at a time, while pairs of others are computed, and again in the backward,
    so that between them a rank keeps its part alone. `lengths` are those of whole sequences.

    The losses of a model are this rank's share: over the ranks they add up to that of the whole,
    and so do the gradients of its parameters. Forward and backward belong inside. What a rank draws
    for dropout is its own. Every rank of the mesh has to make the same calls in the same order.

    Args:
        mesh: of one dimension, the ranks that share sequences.
        length: tokens of every whole sequence, which spares the ranks to ask one another in each
            call. Default None: they ask.

    Raises:
        TypeError, ValueError: no such mesh; parts of another length than those of `shard`; chunks
            shorter than a convolution needs. On every rank of the mesh.
    """
    global _current
    split = SequenceSplit(mesh, length)
    before, _current = _current, split
    try:
        with served_by(SplitOperators(split)):
            yield split
    finally:
        _current = before
