"""What a cache on a CPU has beside its keys, so that a new token need not meet them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .arguments import COMPUTE_DTYPES
from .backends import LOAD_ERROR
from .options import Interaction, Score
from .schema import SCORES

# Tokens that become a tree, or part of one: `chunk` of the ops.
CHUNK = 512
# How many runs of one size become one: kRunFactor in csrc/cpu/decode/index.h.
RUN_FACTOR = 2
# Tokens whose moments are one record: kMomentsTile in csrc/cpu/isa/statistics.h.
MOMENTS_TILE = 512
# What thresholds of a mass leave for the search of later ones: kTangentNumbers in
# csrc/cpu/isa/decode.h.
TANGENT_NUMBERS = 208
# Tokens in front of a row among which the search for its threshold starts.
WINDOW = 512
# So many rows are worth their own loops. More share those of `interact`, unless an index has most
# of so many keys that it is faster by measurement: with statistics, and for a mass.
FEW_ROWS = 16
MANY_ROWS_FROM, MANY_MASSES_FROM = 32768, 16384
# Tokens in front of the end that are not indexed, so that calls with a few rows more go by the
# index too.
KEPT_BACK = 64
# Beyond this squares may overflow: `kLargestTame` in csrc/math/sweep.h.
LARGEST_TAME = 1e18

# In a list, which has no None: a tensor that is not there.
NOTHING = torch.empty(0)
Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
# Of a layer, for `cache_token`: `TOKEN_CACHES`, the tokens of a chunk, how many are indexed, the
# kernel of the score, and `TOKEN_NUMBERS`.
Prepared = tuple[tuple[torch.Tensor, ...], int, int, int, tuple[float, float, float]]


class Past:
    """An index of the keys of a cache, and running moments for thresholds by statistics.

    Both follow from the tokens: they are brought up to date when rows want them. The tokens are
    indexed in runs of `CHUNK`, `RUN_FACTOR * CHUNK` and so on, as the digits of their number say,
    so that each is built into a tree O(log length) times.

    Args:
        score: with tensors of the batch shape.
        mean: whether results are divided by the number of keys.
        starts: `(*batch)` int64, how many tokens in front of each sequence are padding; or None.
        value_dim: columns of the values, 2 if they are the keys.
        dtype: of the keys.
    """

    def __init__(
        self,
        score: Score,
        mean: bool,
        starts: torch.Tensor | None,
        batch: torch.Size,
        value_dim: int,
        dtype: torch.dtype,
    ) -> None:
        kind = score.kind
        self._wide = COMPUTE_DTYPES[dtype]
        self._half = dtype != self._wide
        self._chunk = CHUNK
        self._kernel = SCORES.index(score.kernel)
        self._indexes = kind.thresholded
        self._mass = kind.mass
        self._sums = kind.thresholded and not kind.mass
        self._many_from = MANY_MASSES_FROM if kind.mass else MANY_ROWS_FROM
        self._unit = torch.ops.qflux_kernels.cache_index_unit(
            self._wide == torch.float64, value_dim, CHUNK
        )
        self._starts = starts
        self.index: torch.Tensor | None = None  # (*batch, bytes)
        self.moments: torch.Tensor | None = None  # (*batch, records, 6)
        # (*batch, TANGENT_NUMBERS), zeros at first
        self.tangents: torch.Tensor | None = None
        self._batch = tuple(batch)
        # Tokens in the index, and tokens in the moments.
        self._indexed = self._summed = 0
        # What was prepared, for tokens behind fewer than so many.
        self._prepared: Prepared | None = None
        self._prepared_to = 0
        # The first token that is not finite or very large, which only plain loops treat right.
        self._wild: int | None = None
        self._mean = mean
        self._arguments = _score_arguments(score, mean)

    @property
    def nbytes(self) -> int:
        """Bytes of index, moments and tangents, with the room that is still free."""
        parts = self.index, self.moments, self.tangents
        return sum(part.nbytes for part in parts if part is not None)

    def grow(self, capacity: int, allocate: Allocate) -> None:
        """Make room for so many tokens, or raise and leave all as it was."""
        self._prepared_to = 0
        index, moments, tangents = self.index, self.moments, self.tangents
        if self._mass and tangents is None:
            tangents = allocate((*self._batch, TANGENT_NUMBERS), self._wide).zero_()
        if self._indexes:
            index = allocate((*self._batch, capacity // self._chunk * self._unit), torch.uint8)
            used = self._indexed // self._chunk * self._unit
            if self.index is not None:
                index[..., :used] = self.index[..., :used]
        if self._sums:
            moments = allocate((*self._batch, capacity // MOMENTS_TILE + 2, 6), torch.float64)
            if self.moments is not None:
                used = self._summed // MOMENTS_TILE + 2
                moments[..., :used, :] = self.moments[..., :used, :]
        self.index, self.moments, self.tangents = index, moments, tangents

    def append(self, buffers: list[torch.Tensor], given: list[torch.Tensor], length: int) -> None:
        """Put tokens into the buffers behind `length` others."""
        self._prepared_to = 0
        plain = torch.compiler.is_compiling()
        if self._half or plain:
            tame = not plain
            for buffer, tensor in zip(buffers, given, strict=True):
                buffer.narrow(-2, length, tensor.shape[-2]).copy_(tensor)
                tame = tame and bool((tensor.abs() <= LARGEST_TAME).all())
        else:
            values = len(buffers) == 2
            tame = _OPS.cache_append(
                buffers[0],
                buffers[1] if values else None,
                given[0],
                given[1] if values else None,
                length,
            )
        if not tame and self._wild is None:
            self._wild = length

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self._prepared_to = 0
        self._summed = min(self._summed, length)
        self._indexed = self._fitting(length)
        if self.tangents is not None:
            self.tangents.zero_()
        if self._wild is not None and self._wild >= length:
            self._wild = None

    def reordered(self, index: torch.Tensor, score: Score) -> Past:
        """That of a cache whose sequence b is sequence `index[b]` of this one."""
        new = object.__new__(Past)
        new.__dict__.update(self.__dict__)
        new._prepared_to = 0
        for name in ("index", "moments", "tangents", "_starts"):
            tensor = getattr(self, name)
            setattr(new, name, None if tensor is None else tensor.index_select(0, index))
        new._batch = (len(index), *self._batch[1:])
        new._arguments = _score_arguments(score, self._mean)
        return new

    def attend(
        self, states: torch.Tensor, buffers: list[torch.Tensor], length: int
    ) -> Interaction | None:
        """What states of the last positions gather; None where `interact` has to say it."""
        rows = states.shape[-2]
        if self._wild is not None or not states.numel() or torch.compiler.is_compiling():
            return None
        indexed = 0
        if self._indexes:
            # All rows see what is in front of the first of them.
            wanted = self._wanted(length, rows)
            if rows >= FEW_ROWS:
                most = 2 * max(wanted, self._fitting(length - rows)) >= length
                if length < self._many_from or not most:
                    return None
            if wanted > self._indexed:
                self._extend_index(buffers, wanted)
            indexed = self._indexed
            if indexed > length - rows + 1:
                indexed = self._fitting(length - rows + 1)
        elif rows >= FEW_ROWS:
            return None
        if self._sums:
            self._extend_moments(buffers, length)
        base = 0
        keys = buffers[0].narrow(-2, 0, length)
        values = buffers[1].narrow(-2, 0, length) if len(buffers) == 2 else None
        if self._half:
            if self._indexes:
                base = max(0, min(indexed - MOMENTS_TILE, length - rows - WINDOW))
            states = states.to(self._wide)
            keys = self._part(buffers[0], base, length)
            values = self._part(buffers[1], base, length) if len(buffers) == 2 else None
        context, strength, degree, served = _ATTEND(
            states, keys, values, self.index, self.moments, self.tangents, self._starts, base,
            self._chunk, indexed, *self._arguments,
        )  # fmt: skip
        if not served:
            return None
        if self._half:
            dtype = buffers[0].dtype
            context, strength = context.to(dtype), strength.to(dtype)
        return Interaction(context, strength, degree)

    def prepare(self, buffers: list[torch.Tensor], length: int) -> Prepared | None:
        """What `cache_token` is given for a token behind `length` others, or None."""
        if length < self._prepared_to:
            return self._prepared
        if self._wild is not None or self._half or self._mean or len(buffers) != 2:
            return None
        # It stays for as many tokens as neither wants more.
        end = length + self._chunk
        if self._indexes:
            wanted = self._wanted(length + 1, 1)
            if wanted > self._indexed:
                self._extend_index(buffers, wanted)
            end = min(end, self._indexed + self._chunk + KEPT_BACK - 1)
        if self._sums:
            self._extend_moments(buffers, length)
            end = min(end, (length // MOMENTS_TILE + 1) * MOMENTS_TILE)
        self._prepared_to = end
        coefficient, value, min_gate, min_gate_value, kernel, eps, _ = self._arguments
        beside = self.index, self.moments, self.tangents, coefficient, min_gate
        tensors = *buffers, *(NOTHING if part is None else part for part in beside)
        numbers = value, min_gate_value, eps
        self._prepared = tensors, self._chunk, self._indexed, kernel, numbers
        return self._prepared

    def _extend_index(self, buffers: list[torch.Tensor], end: int) -> None:
        # Of the runs that are there, those stay which the new number has too.
        there = self._runs(self._indexed)
        stay = sum(size for size, new in zip(there, self._runs(end), strict=False) if size == new)
        base = stay if self._half else 0
        parts = [self._part(buffer, base, end) for buffer in buffers]
        values = parts[1] if len(parts) == 2 else None
        _OPS.cache_index(
            self.index, parts[0], values, self._starts, base, self._kernel, self._chunk,
            self._indexed,
        )  # fmt: skip
        self._indexed = end

    def _extend_moments(self, buffers: list[torch.Tensor], length: int) -> None:
        there = self._summed
        if self._starts is None and there and there // MOMENTS_TILE == length // MOMENTS_TILE:
            return
        base = max(0, there - MOMENTS_TILE + 1) if self._half else 0
        keys = self._part(buffers[0], base, length)
        _OPS.cache_moments(self.moments, keys, self._starts, base, there)
        self._summed = length

    def _part(self, buffer: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Some tokens of a buffer as planes in the dtype of the computation."""
        part = buffer.narrow(-2, first, last - first)
        if not self._half:
            return part
        return part.mT.to(self._wide, memory_format=torch.contiguous_format).mT

    def _runs(self, tokens: int) -> list[int]:
        """The sizes of the runs of so many tokens."""
        sizes, size = [], self._chunk
        while size * RUN_FACTOR <= tokens:
            size *= RUN_FACTOR
        while tokens >= self._chunk:
            count, tokens = divmod(tokens, size)
            sizes += [size] * count
            size //= RUN_FACTOR
        return sizes

    def _wanted(self, length: int, rows: int) -> int:
        """How many of so many tokens the index has for the last rows: what all of these see."""
        return max(length - max(rows, KEPT_BACK), 0) // self._chunk * self._chunk

    def _fitting(self, length: int) -> int:
        """How many tokens the runs have that end there or in front of it."""
        if self._indexed <= length:
            return self._indexed
        end = 0
        for size in self._runs(self._indexed):
            if end + size > length:
                break
            end += size
        return end


def _score_arguments(score: Score, mean: bool) -> tuple[Any, ...]:
    """The last arguments of `cache_attend`."""
    numbers: list[Any] = []
    for value in (score.coefficient, score.min_gate):
        given = isinstance(value, torch.Tensor)
        numbers += [value if given else None, 0.0 if given else float(value)]
    return (*numbers, SCORES.index(score.kernel), float(score.eps), mean)


_OPS = torch.ops.qflux_kernels
# The overload itself, which a call finds faster.
_ATTEND: Any = None if LOAD_ERROR is not None else _OPS.cache_attend.default
