"""Windows of tokens: shuffled batches to train on, and every token once to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Labels with this value have no part in a loss.
IGNORED_LABEL = -100


class TrainingWindows:
    """Batches of windows in shuffled epochs, a pure function of (seed, step).

    In each epoch every work is cut into windows at a fresh random phase, and the windows of all
    works are shuffled; none spans two works. Because a batch depends on the seed and the step
    alone, a resumed run continues with the very batches it would have seen.

    Args:
        works: token ids `(N,)` of each work.
        length: tokens in a window, >= 2.
        batch_size: windows in a batch, >= 1.
        seed: of the shuffling.

    A work shorter than a window is left out. Where an epoch has fewer windows than a batch, they
    repeat.

    Raises:
        ValueError: no work is as long as a window.
    """

    def __init__(self, works: Sequence[Tensor], length: int, batch_size: int, seed: int) -> None:
        self.works = [work for work in works if len(work) >= length]
        self.length, self.batch_size, self.seed = length, batch_size, seed
        if not self.works:
            longest = max((len(work) for work in works), default=0)
            raise ValueError(
                f"the training text is too short for context_length {length}: "
                f"its longest work has {longest} tokens"
            )
        # As many windows as there are at any phase, so that none comes twice in an epoch.
        windows = sum((len(work) - self._slack(work)) // length for work in self.works)
        self.steps_per_epoch = max(1, windows // batch_size)
        self._tokens = torch.cat(self.works)
        self._epoch = -1

    def batch(self, step: int) -> Tensor:
        """The `(batch_size, length)` token ids of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._starts, self._epoch = self._shuffled_starts(epoch), epoch
        at = torch.arange(self.batch_size) + position * self.batch_size
        starts = self._starts[at % len(self._starts)]
        return self._tokens[starts[:, None] + torch.arange(self.length)]

    def _slack(self, work: Tensor) -> int:
        """The largest phase at which the windows of a work may start."""
        return min(self.length - 1, len(work) - self.length)

    def _shuffled_starts(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        starts, offset = [], 0
        for work in self.works:
            phase = int(torch.randint(self._slack(work) + 1, (), generator=generator))
            starts.append(
                torch.arange(offset + phase, offset + len(work) - self.length + 1, self.length)
            )
            offset += len(work)
        starts = torch.cat(starts)
        return starts[torch.randperm(len(starts), generator=generator)]


def evaluation_batches(
    works: Sequence[Tensor], length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows that predict every token of every work but its first exactly once.

    Neighbouring windows share one token, the last label of one and the first input of the next.
    A last window that is too short is padded at the right with id 0 and the label that the loss
    ignores.

    Yields:
        input ids and labels, `(up to batch_size, length)` each.
    """
    rows = [
        work[start : start + length]
        for work in works
        for start in range(0, len(work) - 1, length - 1)
    ]
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        ids = torch.zeros(len(chunk), length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED_LABEL)
        for row, tokens in enumerate(chunk):
            ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
        yield ids, labels
