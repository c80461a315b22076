"""Which tokens of a sequence a rank has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A sequence of `length` tokens, cut into two chunks for each of `ranks`.

    Rank r has the chunks r and 2 ranks - 1 - r: the rows of one see few keys of a causal sequence
    and those of the other many, so that every rank has about the same number of pairs. The sizes of
    chunks differ by at most one token.
    """

    length: int
    ranks: int

    def start(self, chunk: int) -> int:
        """The first token of a chunk, or the length for the chunk after the last."""
        size, longer = divmod(self.length, 2 * self.ranks)
        return chunk * size + min(chunk, longer)

    def chunks(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two ranges of tokens of a rank, in their order."""
        first, last = rank, 2 * self.ranks - 1 - rank
        return (
            (self.start(first), self.start(first + 1)),
            (self.start(last), self.start(last + 1)),
        )

    def sizes(self, rank: int) -> tuple[int, int]:
        """How many tokens the chunks of a rank have."""
        first, last = (stop - start for start, stop in self.chunks(rank))
        return first, last

    def tokens(self, rank: int) -> int:
        """How many tokens a rank has."""
        return sum(self.sizes(rank))

    @property
    def shortest(self) -> int:
        """Tokens of the smallest chunk."""
        return self.length // (2 * self.ranks)

    @cached_property
    def largest(self) -> int:
        """Tokens of the largest shard."""
        return max(map(self.tokens, range(self.ranks)))

    def positions(self, rank: int, device: torch.device | None = None) -> Tensor:
        """The places `(tokens(rank),)` of a rank's tokens in the sequence."""
        return torch.cat([torch.arange(*chunk, device=device) for chunk in self.chunks(rank)])

    @cached_property
    def order(self) -> Tensor:
        """Where each token `(length,)` lies among shards that are padded to `largest`."""
        at = torch.empty(self.length, dtype=torch.int64)
        for rank in range(self.ranks):
            at[self.positions(rank)] = rank * self.largest + torch.arange(self.tokens(rank))
        return at
