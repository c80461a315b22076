"""The Hebbian connection memory of a sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qflux_kernels import scores
from qflux_kernels.options import Score


@dataclass(frozen=True)
class ConnectionMemory:
    """Connections between the tokens of a sequence that fire together, as a sparse state.

    A value, never changed in place: `update` gives the memory after a layer. For the pairs (i, j)
    that the score keeps,

        M <- decay M;   M_ij += strength w_ij where w_ij > gate;   |M_ij| <= cap

    and `context` adds weight * M to the scores of what is gathered. Only pairs that were ever kept
    are stored. A model starts every sequence with an empty memory. Storing pairs costs what the
    kernels avoid, O(kept pairs) memory, so the memory is off by default.

    A row's connections come from that row's pairs alone. So a token that is read from a cache has
    those of its own row, and the rows before it are not needed.

    Source: the Flux document, section 7.2 ("Store only non-zero elements in connection strength
    matrices") and section 10 ("Hebbian learning mechanisms that provide adaptive memory"); the
    numbers are those of the program it describes.

    Args:
        pairs: `(P,)` int64, sorted and unique: (sequence * R + i) * S + j, where sequence counts
            the leading dimensions of the states in order, and i the R rows that it has.
        values: `(P,)`, M_ij.
        length: S.
        decay, strength, gate, cap, weight: the rule.
        past: S - R, tokens in front of the rows, whose states are known. Default 0.
        padding: `(B,)` integers, tokens in front of the sequences of each entry of the first
            dimension that nobody sees. Default None: none.
    """

    pairs: Tensor
    values: Tensor
    length: int
    decay: float
    strength: float
    gate: float
    cap: float
    weight: float
    past: int = 0
    padding: Tensor | None = None

    @classmethod
    def empty(
        cls,
        states: Tensor,
        *,
        decay: float = 0.99,
        strength: float = 0.1,
        gate: float = 0.1,
        cap: float = 0.5,
        weight: float = 0.3,
        past: int = 0,
        padding: Tensor | None = None,
    ) -> ConnectionMemory:
        """The memory of new sequences whose rows are states `(..., R, 2)`, behind `past` others."""
        pairs = torch.zeros(0, dtype=torch.int64, device=states.device)
        values = states.new_zeros(0)
        length = past + states.shape[-2]
        return cls(pairs, values, length, decay, strength, gate, cap, weight, past, padding)

    @torch.no_grad()
    def update(self, states: Tensor, score: Score) -> ConnectionMemory:
        """The memory after the pairs that `score` keeps of states `(..., S, 2)` have fired."""
        pairs, values = [self.pairs], [self.decay * self.values]
        rows, sequences = self.length - self.past, states.detach().flatten(0, -3)
        for sequence, (points, start) in enumerate(
            zip(sequences, self._starts(len(sequences)), strict=True)
        ):
            start = min(start, self.length)
            seen = min(rows, self.length - start)
            kept = scores(points[start:], score=score, layout="csr", rows=seen)
            counts = kept.crow_indices().diff()
            row = torch.arange(rows - seen, rows, device=counts.device).repeat_interleave(counts)
            fired = kept.values() > self.gate
            at = (sequence * rows + row) * self.length + start + kept.col_indices()
            pairs.append(at[fired])
            values.append(self.strength * kept.values()[fired])
        pairs, inverse = torch.cat(pairs).unique(return_inverse=True)
        summed = self.values.new_zeros(len(pairs)).index_add(0, inverse, torch.cat(values))
        return replace(self, pairs=pairs, values=summed.clamp(-self.cap, self.cap))

    def context(self, states: Tensor, reduction: str = "sum") -> tuple[Tensor, Tensor]:
        """What the memory adds to context `(..., R, 2)` and strength `(..., R)`.

        `states` are those of all tokens, `(..., S, 2)`.
        """
        flat, rows = states.reshape(-1, 2), self.length - self.past
        row = self.pairs.div(self.length, rounding_mode="floor")
        sequence = row.div(rows, rounding_mode="floor")
        column = sequence * self.length + self.pairs % self.length
        weights = self.weight * self.values
        if reduction == "mean":
            count = self.past + row % rows + 1
            if self.padding is not None:
                count = (
                    count
                    - torch.tensor(self._starts(len(flat) // self.length), device=count.device)[
                        sequence
                    ]
                )
            weights = weights / count
        shape = (*states.shape[:-2], rows)
        context = flat.new_zeros(math.prod(shape), 2)
        context = context.index_add(0, row, weights[:, None] * flat[column])
        strength = flat.new_zeros(math.prod(shape)).index_add(0, row, weights)
        return context.view(*shape, 2), strength.view(shape)

    def _starts(self, sequences: int) -> list[int]:
        """The first token of each sequence that is no padding."""
        if self.padding is None:
            return [0] * sequences
        each = sequences // max(1, len(self.padding))
        return self.padding.repeat_interleave(each).tolist()
