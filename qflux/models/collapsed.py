"""From states to logits by one small matrix, where readouts and output layer only multiply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .constants import at_least_float32

# Linear maps of states, each with the LayerNorm behind it or None.
Readouts = Sequence[tuple[nn.Linear, "nn.LayerNorm | None"]]
# Rows of the output layer that are in a higher precision at once.
BLOCK = 4096


class CollapsedHead:
    """Logits of the states behind the layers, without the features in between.

    The features are H numbers that depend on the F = 2 C coordinates of a readout's states alone.
    With x = (coordinates, 1), centred outputs P [W, b] x = sqrt(H) Q R x and LayerNorm's weight g,

        head(norm(W x)) = sqrt(H) head.weight diag(g) Q . (R x / sqrt(|R x|^2 + eps)) + constant

    where Q has F + 1 orthonormal columns, so that nothing cancels but what does in LayerNorm. The
    matrix in front, `(V, F + 1)` for each readout, is computed once. Without a norm it is
    head.weight W, `(V, F)`. Results are those of the modules up to rounding.

    It has no gradients, and it is of the weights as they are now. `follows` tells whether they have
    been replaced or written to since, as far as PyTorch counts that: not through `.data`, by
    replayed CUDA graphs or by a fused optimizer. Whoever keeps one has to know better.

    Args:
        readouts: pairs of a linear map and the LayerNorm behind it; None in all for none.
        head: the output layer, of their sum.
    """

    @torch.no_grad()
    def __init__(self, readouts: Readouts, head: nn.Linear) -> None:
        parts, factors, eps = [], [], []
        shift = torch.zeros_like(readouts[0][0].weight[:, 0], dtype=torch.float64)
        for linear, norm in readouts:
            weight = linear.weight.double()
            offset = torch.zeros_like(shift) if linear.bias is None else linear.bias.double()
            if norm is None:
                parts.append(weight)
                shift = shift + offset
                continue
            width = len(weight)
            centred = torch.cat((weight, offset[:, None]), 1)
            orthonormal, factor = torch.linalg.qr(centred - centred.mean(0))
            if norm.weight is not None:
                orthonormal = norm.weight.double()[:, None] * orthonormal
            if norm.bias is not None:
                shift = shift + norm.bias.double()
            parts.append(width**0.5 * orthonormal)
            factors.append(factor / width**0.5)
            eps.append(norm.eps)
        self.matrix = _product(head.weight, torch.cat(parts, 1))  # (V, columns)
        self.offset = _product(head.weight, shift[:, None])[:, 0]  # (V,)
        if head.bias is not None:
            self.offset += head.bias
        self.factors = self.eps = None
        if factors:
            wide = torch.promote_types(head.weight.dtype, torch.float32)
            self.factors = torch.stack(factors).to(wide)  # (R, F + 1, F + 1)
            self.eps = self.factors.new_tensor(eps)[:, None]  # (R, 1)
        # Their memory is held, so that no other weights come to stand in it.
        self._given = [(t.detach(), _version(t)) for t in _weights(readouts, head)]

    def __reduce__(self) -> Any:
        """A copy is None: it would be of the weights of another model."""
        return type(None), ()

    def __call__(self, states: Sequence[Tensor]) -> Tensor:
        """The states `(B, C, S, 2)` that each readout reads, to logits `(B, S, V)`."""
        columns = torch.stack([state.transpose(1, 2).flatten(2) for state in states], 2)
        if self.factors is not None and self.eps is not None:
            columns = at_least_float32(columns)
            columns = torch.cat((columns, torch.ones_like(columns[..., :1])), -1)
            columns = (self.factors @ columns[..., None])[..., 0]  # (B, S, R, F + 1)
            square = columns.square().sum(-1, keepdim=True)
            columns = columns * torch.rsqrt(square + self.eps)
        return F.linear(columns.flatten(2).to(self.matrix.dtype), self.matrix, self.offset)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and what belongs to it."""
        factors = 0 if self.factors is None else self.factors.nbytes
        return self.matrix.nbytes + self.offset.nbytes + factors

    def follows(self, readouts: Readouts, head: nn.Linear) -> bool:
        """Whether the weights of these modules are the numbers that it was made of."""
        now = _weights(readouts, head)
        return len(now) == len(self._given) and all(
            tensor.data_ptr() == given.data_ptr()
            and tensor.dtype == given.dtype
            and _version(tensor) == version
            for tensor, (given, version) in zip(now, self._given, strict=True)
        )


def columns_of(readouts: Readouts) -> int:
    """How many columns the matrix has."""
    return sum(linear.in_features + (norm is not None) for linear, norm in readouts)


def _weights(readouts: Readouts, head: nn.Linear) -> list[Tensor]:
    modules = [*(module for pair in readouts for module in pair if module is not None), head]
    return [t for m in modules for t in (m.weight, m.bias) if t is not None]


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def _product(weight: Tensor, matrix: Tensor) -> Tensor:
    """weight matrix, in float32 or more and the dtype of the weight."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    matrix = matrix.to(wide)
    if weight.dtype == wide:
        return weight @ matrix
    blocks = [(block.to(wide) @ matrix).to(weight.dtype) for block in weight.split(BLOCK)]
    return torch.cat(blocks)
