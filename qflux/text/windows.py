"""Windows of tokens: shuffled batches to train on, and every token once to evaluate."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

# Labels with this value have no part in a loss.
IGNORED_LABEL = -100


class TrainingWindows:
    """Batches of windows in shuffled epochs, a pure function of (seed, step).

    In each epoch every work is cut into windows at a fresh random phase, and the windows of all
    works are shuffled; none spans two works that are as long as a window. Because a batch depends
    on the seed and the step alone, a resumed run continues with the very batches it would have
    seen.

    Args:
        works: token ids `(N,)` of each work, of any integer type. They are not copied.
        length: tokens in a window, >= 2.
        batch_size: windows in a batch, >= 1.
        seed: of the shuffling.
        separator: token ids `(n,)` between works that are joined: those shorter than a window are
            made one, in their order, and where all of them are too short for a window, one with the
            last of the others. None: works shorter than a window are left out.

    Where an epoch has fewer windows than a batch, they repeat.

    Raises:
        ValueError: the works are too short for a window.
    """

    def __init__(
        self,
        works: Sequence[Tensor],
        length: int,
        batch_size: int,
        seed: int,
        separator: Tensor | None = None,
    ) -> None:
        self.works: list[Tensor | JoinedWorks] = [work for work in works if len(work) >= length]
        self.length, self.batch_size, self.seed = length, batch_size, seed
        short = [work for work in works if 0 < len(work) < length]
        together = ""
        if separator is not None and short:
            joined = JoinedWorks(short, separator)
            if len(joined) < length and self.works:
                joined = JoinedWorks([self.works.pop(), *short], separator)
            if len(joined) >= length:
                self.works.append(joined)
            elif len(short) > 1:
                together = f" and all {len(short)} together {len(joined)}"
        if not self.works:
            longest = max((len(work) for work in works), default=0)
            raise ValueError(
                f"the training text is too short for context_length {length}: "
                f"its longest work has {longest} tokens{together}; "
                "give more text or a smaller context_length"
            )
        # As many windows as there are at any phase, so that none comes twice in an epoch.
        windows = sum((len(work) - self._slack(work)) // length for work in self.works)
        self.steps_per_epoch = max(1, windows // batch_size)
        self._epoch = -1

    def batch(self, step: int, own: slice | None = None) -> Tensor:
        """The `(batch_size, length)` token ids of a step, counted from 0; int64.

        With `own`, those windows alone.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
            self._epoch = epoch
        at = torch.arange(self.batch_size)[own or slice(None)] + position * self.batch_size
        chosen = self._order[at % len(self._order)].long()
        owners = torch.searchsorted(self._ends, chosen, right=True)
        rows = []
        for window, owner in zip(chosen.tolist(), owners.tolist(), strict=True):
            first = int(self._ends[owner - 1]) if owner else 0
            start = self._phases[owner] + (window - first) * self.length
            rows.append(self.works[owner][start : start + self.length].long())
        return torch.stack(rows)

    def _slack(self, work: Tensor | JoinedWorks) -> int:
        """The largest phase at which the windows of a work may start."""
        return min(self.length - 1, len(work) - self.length)

    def _shuffle(self, epoch: int) -> None:
        """Choose the phases of an epoch and the order of its windows.

        A window is a number, so that an epoch of many is a short list: `_ends` says up to which
        number the windows of each work go.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self._phases = [
            int(torch.randint(self._slack(work) + 1, (), generator=generator))
            for work in self.works
        ]
        counts = [
            (len(work) - phase) // self.length
            for work, phase in zip(self.works, self._phases, strict=True)
        ]
        self._ends = torch.tensor(counts).cumsum(0)
        total = int(self._ends[-1])
        # The same order as in int64, in half the memory.
        kind = torch.int32 if total < 2**31 else torch.int64
        self._order = torch.randperm(total, generator=generator, dtype=kind)


class JoinedWorks:
    """Works one after another with a separator between them, without a copy of their tokens.

    Args:
        works: token ids `(N,)` of each work or works joined before.
        separator: token ids `(n,)`.
    """

    def __init__(self, works: Sequence[Tensor | JoinedWorks], separator: Tensor) -> None:
        self._parts: list[Tensor | JoinedWorks] = []
        for work in works:
            self._parts += [separator, work] if self._parts else [work]
        self._ends = list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, places: slice) -> Tensor:
        """The token ids from one place to another, int64."""
        start, stop, _ = places.indices(len(self))
        found = [torch.zeros(0, dtype=torch.int64)]
        at = bisect_right(self._ends, start)
        while start < stop:
            part, end = self._parts[at], self._ends[at]
            offset = end - len(part)
            found.append(part[start - offset : min(stop, end) - offset].long())
            start, at = end, at + 1
        return torch.cat(found)


def predicted_tokens(works: Sequence[Tensor]) -> int:
    """How many tokens of the works have one before them in theirs."""
    return sum(max(0, len(work) - 1) for work in works)


def evaluation_windows(work: Tensor, length: int) -> int:
    """How many windows `evaluation_batches` makes of a work."""
    return -(-max(0, len(work) - 1) // (length - 1))


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
    rows = (
        work[start : start + length]
        for work in works
        for start in range(0, len(work) - 1, length - 1)
    )
    while chunk := list(islice(rows, batch_size)):
        ids = torch.zeros(len(chunk), length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED_LABEL)
        for row, tokens in enumerate(chunk):
            ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens.long()
        yield ids, labels
