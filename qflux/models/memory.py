"""The Hebbian connection memory of a sequence."""

from __future__ import annotations

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

    Source: the Flux document, section 7.2 ("Store only non-zero elements in connection strength
    matrices") and section 10 ("Hebbian learning mechanisms that provide adaptive memory"); the
    numbers are those of the program it describes.

    Args:
        pairs: `(P,)` int64, sorted and unique: (sequence * S + i) * S + j, where sequence counts
            the leading dimensions of the states in order.
        values: `(P,)`, M_ij.
        length: S.
        decay, strength, gate, cap, weight: the rule.
    """

    pairs: Tensor
    values: Tensor
    length: int
    decay: float
    strength: float
    gate: float
    cap: float
    weight: float

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
    ) -> ConnectionMemory:
        """The memory of new sequences of the shape of states `(..., S, 2)`."""
        pairs = torch.zeros(0, dtype=torch.int64, device=states.device)
        values = states.new_zeros(0)
        return cls(pairs, values, states.shape[-2], decay, strength, gate, cap, weight)

    @torch.no_grad()
    def update(self, states: Tensor, score: Score) -> ConnectionMemory:
        """The memory after the pairs that `score` keeps of states `(..., S, 2)` have fired."""
        pairs, values = [self.pairs], [self.decay * self.values]
        for sequence, points in enumerate(states.detach().flatten(0, -3)):
            kept = scores(points, score=score, layout="csr")
            counts = kept.crow_indices().diff()
            row = torch.repeat_interleave(torch.arange(self.length, device=counts.device), counts)
            fired = kept.values() > self.gate
            at = (sequence * self.length + row) * self.length + kept.col_indices()
            pairs.append(at[fired])
            values.append(self.strength * kept.values()[fired])
        pairs, inverse = torch.cat(pairs).unique(return_inverse=True)
        summed = self.values.new_zeros(len(pairs)).index_add(0, inverse, torch.cat(values))
        return replace(self, pairs=pairs, values=summed.clamp(-self.cap, self.cap))

    def context(self, states: Tensor, reduction: str = "sum") -> tuple[Tensor, Tensor]:
        """What the memory adds to context `(..., S, 2)` and strength `(..., S)`."""
        flat = states.reshape(-1, 2)
        row = self.pairs.div(self.length, rounding_mode="floor")
        column = row.div(self.length, rounding_mode="floor") * self.length
        column = column + self.pairs % self.length
        weights = self.weight * self.values
        if reduction == "mean":
            weights = weights / (row % self.length + 1)
        context = torch.zeros_like(flat).index_add(0, row, weights[:, None] * flat[column])
        strength = flat.new_zeros(len(flat)).index_add(0, row, weights)
        return context.view(states.shape), strength.view(states.shape[:-1])
