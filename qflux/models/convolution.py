"""The causal convolution in front of the branches of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qflux_kernels.arguments import is_plain_call

from ..parallel import current_split


class CausalConvolution(nn.Conv1d):
    """Depthwise convolution over the present and the `width - 1` tokens before it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels)
        self.width = width

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """`(B, S, H)` to `(B, S, H)`, behind `past` `(B, width - 1, H)`; None: behind zeros."""
        if past is not None:
            return self.behind(torch.cat((past, x), 1))
        split = current_split()
        if split is None:
            return self._inside(F.pad(x, (0, 0, self.width - 1, 0)))
        chunks = split.chunks_with_past(x, self.width - 1)
        return torch.cat([self._inside(chunk) for chunk in chunks], 1)

    def behind(self, whole: Tensor) -> Tensor:
        """`(B, width - 1 + S, H)`, tokens with those before them, to `(B, S, H)`."""
        if whole.shape[1] == self.width and self.bias is not None:
            # The general convolution costs more to call than all else in a layer.
            return (whole * self.weight[:, 0].T).sum(1, keepdim=True) + self.bias
        return self._inside(whole)

    def _inside(self, x: Tensor) -> Tensor:
        """`(B, width - 1 + S, H)` to `(B, S, H)`."""
        return depthwise(x, self.weight, self.bias)


def depthwise(whole: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A depthwise convolution over tokens: each channel by itself.

    On a CPU torch's own copies what it is given to a layout of its own, and back. There the sum is
    taken tap by tap instead, in a third of the time (`benchmarks/README.md`), unless someone traces
    or transforms the call, or casts it.

    Args:
        whole: `(B, W - 1 + S, H)`.
        weight: `(H, 1, W)`, the last of a present token.
        bias: `(H,)` or None.

    Returns:
        `(B, S, H)`.
    """
    if bias is not None and is_plain_call(whole, weight, bias):
        return _Depthwise.apply(whole, weight, bias)
    return _general(whole, weight, bias)


def _general(whole: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = F.conv1d(whole.transpose(1, 2), weight, bias, groups=weight.shape[0])
    return out.transpose(1, 2)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(whole: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight[:, 0].T.contiguous()
        length = whole.shape[1] - len(taps) + 1
        out = torch.addcmul(bias, whole[:, :length], taps[0])
        for at, tap in enumerate(taps[1:], 1):
            out.addcmul_(whole[:, at : at + length], tap)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        whole, weight, _ = inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # these gradients are to have gradients
            wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
            out = _general(*inputs)
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return tuple(next(found) if need else None for need in needs)
        taps, length = weight[:, 0].T.contiguous(), grad.shape[1]
        of_whole = torch.zeros_like(whole) if needs[0] else None
        of_weight = torch.empty_like(weight) if needs[1] else None
        for at, tap in enumerate(taps):
            if of_whole is not None:
                of_whole[:, at : at + length].addcmul_(grad, tap)
            if of_weight is not None:
                of_weight[:, 0, at] = (whole[:, at : at + length] * grad).sum((0, 1))
        return of_whole, of_weight, grad.sum((0, 1)) if needs[2] else None
