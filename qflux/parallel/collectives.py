"""Collectives that autograd knows: what is gathered forward is reduced backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# PyTorch 2.13 renames them and warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Pending:
    """A gathering on its way."""

    sent: Tensor  # kept until it has arrived
    received: Tensor  # (ranks, *sent)
    work: Any

    def wait(self) -> Tensor:
        """What has come, `(ranks, *sent)`."""
        if self.work is not None:
            self.work.wait()
        return self.received


def start_gathering(local: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin to gather a tensor of one or more dimensions, of the same shape from every rank."""
    sent = local.detach().contiguous()
    received = sent.new_empty(group.size(), *sent.shape)
    work = None
    if sent.numel():
        work = _all_gather(received.flatten(0, 1), sent, group=group, async_op=True)
    return Pending(sent, received, work)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, group, pending):
        ctx.group, ctx.shape = group, local.shape
        return pending.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mine = grad.new_empty(ctx.shape)
        if mine.numel():
            _reduce_scatter(mine, grad.contiguous().flatten(0, 1), group=ctx.group)
        return mine, None, None


def gather(local: Tensor, group: dist.ProcessGroup, pending: Pending | None = None) -> Tensor:
    """The tensors of all ranks, `(ranks, *local)`; their gradients are summed over the ranks.

    Args:
        local: of the same shape on every rank.
        group: the ranks.
        pending: the gathering of this tensor, if it has begun.
    """
    return _Gather.apply(local, group, pending or start_gathering(local, group))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, group):
        ctx.group = group
        return _summed(local, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _summed(grad, ctx.group), None


def _summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def total(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, on each of them; so are gradients."""
    return _Total.apply(local, group)


class _Neighbours(torch.autograd.Function):
    @staticmethod
    def forward(ctx, to_previous, to_next, group):
        ctx.group = group
        return _exchanged(to_previous, to_next, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, from_previous, from_next):
        return *_exchanged(from_previous, from_next, ctx.group), None


def _exchanged(
    to_previous: Tensor, to_next: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    rank, last = group.rank(), group.size() - 1
    counts = [int(abs(other - rank) == 1) for other in range(last + 1)]
    ends = [tensor for tensor, there in ((to_previous, rank > 0), (to_next, rank < last)) if there]
    sent = torch.stack(ends) if ends else to_previous.new_empty(0, *to_previous.shape)
    received = torch.empty_like(sent)
    if to_previous.numel():
        dist.all_to_all_single(received, sent.contiguous(), counts, counts, group=group)
    found = list(received)
    zero = torch.zeros_like(to_previous)
    return found.pop(0) if rank > 0 else zero, found.pop() if rank < last else zero.clone()


def neighbours(
    to_previous: Tensor, to_next: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """What the rank before and the rank after send this one; zeros where there is none.

    Args:
        to_previous, to_next: what they get, all of one shape.
        group: the ranks, in their order.
    """
    return _Neighbours.apply(to_previous, to_next, group)
