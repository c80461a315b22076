"""Sequences that are split over ranks: lengths, places, and what tokens need of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from qflux_kernels.checks import check_integer

from .collectives import Pending, gather, neighbours, start_gathering, total
from .layout import Layout


@lru_cache(maxsize=64)
def _layout(length: int, ranks: int) -> Layout:
    return Layout(length, ranks)


@lru_cache(maxsize=64)
def _order(layout: Layout, device: torch.device) -> Tensor:
    return layout.order.to(device)


def check_mesh(mesh: object) -> DeviceMesh:
    """Raise unless `mesh` is a device mesh of one dimension that this rank belongs to."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        example = f", such as mesh[{names[-1]!r}]" if names else ""
        raise ValueError(
            f"mesh must have one dimension, the ranks that share sequences, got "
            f"{tuple(mesh.mesh.shape)}: take one of its dimensions{example}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must have this rank, {dist.get_rank()}, among {mesh.mesh.tolist()}")
    return mesh


class SequenceSplit:
    """How the ranks of a mesh share sequences, and what they tell one another.

    Args:
        mesh: of one dimension.
        length: tokens of every sequence; None: the ranks tell one another in each call.
    """

    def __init__(self, mesh: DeviceMesh, length: int | None = None) -> None:
        if length is not None:
            check_integer("length", length, 0)
        self.mesh = check_mesh(mesh)
        self.group, self.ranks = mesh.get_group(), mesh.size()
        self.rank, self.length = mesh.get_local_rank(), length

    def layout(self, tokens: int) -> Layout:
        """That of the sequences of which this rank has so many tokens.

        Raises:
            ValueError: the shards of the ranks are not those of one sequence; on every rank.
        """
        if self.length is not None:
            layout = _layout(self.length, self.ranks)
            if layout.tokens(self.rank) != tokens:
                raise ValueError(
                    f"a shard of {self.length} tokens over {self.ranks} ranks has "
                    f"{layout.tokens(self.rank)} on rank {self.rank}, got {tokens}; "
                    "qflux.parallel.shard makes it"
                )
            return layout
        device = self.mesh.device_type
        mine = torch.tensor([tokens], device=device)
        found = start_gathering(mine, self.group).wait().flatten().tolist()
        layout = _layout(sum(found), self.ranks)
        expected = [layout.tokens(rank) for rank in range(self.ranks)]
        if found != expected:
            raise ValueError(
                f"the shards of {sum(found)} tokens over {self.ranks} ranks have {expected} "
                f"tokens, got {found}; qflux.parallel.shard makes them"
            )
        return layout

    @contextmanager
    def sequences(self, tokens: int) -> Iterator[None]:
        """Meanwhile every shard has so many tokens, and the ranks need not ask again."""
        before, self.length = self.length, self.layout(tokens).length
        try:
            yield
        finally:
            self.length = before

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """The places `(tokens,)` of this rank's tokens in their sequences."""
        return self.layout(tokens).positions(self.rank, device)

    def start(self, local: Tensor, layout: Layout) -> tuple[Tensor, Pending]:
        """Begin to gather the tokens of `(..., tokens, F)`; for `whole`."""
        padded = F.pad(local, (0, 0, 0, layout.largest - local.shape[-2]))
        return padded, start_gathering(padded, self.group)

    def whole(self, started: tuple[Tensor, Pending], layout: Layout) -> Tensor:
        """The tokens `(..., length, F)` of all ranks; gradients are summed over the ranks."""
        padded, pending = started
        found = gather(padded, self.group, pending)  # (ranks, ..., largest, F)
        # (..., ranks * largest, F)
        found = found.movedim(0, -3).flatten(-3, -2)
        return found.index_select(-2, _order(layout, found.device))

    def total(self, local: Tensor) -> Tensor:
        """The sum over the ranks."""
        return total(local, self.group)

    def mean(self, local: Tensor) -> Tensor:
        """The mean `(..., F)` over the tokens of `(..., tokens, F)` of all ranks."""
        return self.total(local.sum(-2)) / self.layout(local.shape[-2]).length

    def running_sum(self, local: Tensor) -> Tensor:
        """For each token of `(..., tokens, F)` the sum over it and those before it."""
        layout = self.layout(local.shape[-2])
        parts = local.split(layout.sizes(self.rank), -2)
        sums = gather(torch.stack([part.sum(-2) for part in parts]), self.group)
        # (ranks, 2, ..., F): the chunks in their order are down the first column, up the second.
        sums = torch.cat((sums[:, 0], sums[:, 1].flip(0)))
        before = torch.cat((torch.zeros_like(sums[:1]), sums[:-1].cumsum(0)))
        chunks = (self.rank, 2 * self.ranks - 1 - self.rank)
        return torch.cat(
            [
                part.cumsum(-2) + before[chunk].unsqueeze(-2)
                for part, chunk in zip(parts, chunks, strict=True)
            ],
            -2,
        )

    def chunks_with_past(self, local: Tensor, width: int) -> list[Tensor]:
        """The two chunks of `(B, tokens, H)`, each behind the `width` tokens before it.

        Before the first token of a sequence there are zeros.

        Raises:
            ValueError: a chunk has fewer tokens than that; on every rank.
        """
        layout = self.layout(local.shape[1])
        if layout.shortest < width:
            raise ValueError(
                f"{layout.length} tokens over {self.ranks} ranks make chunks of "
                f"{layout.shortest}, and a convolution needs the {width} tokens before each: give "
                f"sequences of at least {2 * self.ranks * width} tokens, or fewer ranks"
            )
        first, last = local.split(layout.sizes(self.rank), 1)
        ends = [part[:, part.shape[1] - width :] for part in (first, last)]
        before_first, before_last = neighbours(ends[1], ends[0], self.group)
        if self.rank == self.ranks - 1:
            before_last = ends[0]
        return [torch.cat((before_first, first), 1), torch.cat((before_last, last), 1)]

    def following(self, labels: Tensor, none: int) -> Tensor:
        """The label after each of `(B, tokens)`, `none` after the last of a sequence."""
        layout = self.layout(labels.shape[1])
        first, last = labels.split(layout.sizes(self.rank), 1)
        beyond = labels.new_full((len(labels), 1), none)
        heads = [part[:, :1] if part.shape[1] else beyond for part in (first, last)]
        after_last, after_first = neighbours(heads[0], heads[1], self.group)
        if self.rank == 0:
            after_last = beyond
        if self.rank == self.ranks - 1:
            after_first = heads[1]
        parts = [torch.cat((part, after), 1)[:, 1:] for part, after in
                 ((first, after_first), (last, after_last))]  # fmt: skip
        return torch.cat(parts, 1)

    def of_the_first(self, local: Tensor) -> Tensor:
        """The tensor of the first rank, on each of them; it has no gradient."""
        result = local.detach().clone()
        dist.broadcast(result, group=self.group, group_src=0)
        return result


def shard(tensor: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """This rank's part of the sequences in `tensor`, which every rank has whole.

    Rank r of n gets the chunks r and 2n - 1 - r of 2n, whose sizes differ by at most one token: so
    every rank has about the same number of pairs of a causal sequence.

    Args:
        tensor: of any dtype, with tokens along `dim`.
        mesh: of one dimension, the ranks that share sequences.
        dim: of the tokens. Default 1, that of ids `(B, S)`.

    Returns:
        a tensor that has fewer tokens along `dim`; gradients reach those.

    Raises:
        TypeError, ValueError: no such mesh or dimension.
    """
    check_mesh(mesh)
    _check_dim(tensor, dim)
    layout = _layout(tensor.shape[dim], mesh.size())
    return torch.cat(
        [
            tensor.narrow(dim, start, stop - start)
            for start, stop in layout.chunks(mesh.get_local_rank())
        ],
        dim,
    )


def unshard(part: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """The whole sequences of which every rank has a part; the inverse of `shard`.

    Every rank of the mesh has to call it. What the ranks do with the whole adds up: the gradient of
    a part is the sum of those on all ranks.

    Args:
        part: this rank's part, with its tokens along `dim`.
        mesh, dim: as for `shard`.

    Raises:
        TypeError, ValueError: no such mesh or dimension, or the parts are not those of `shard`.
    """
    split = SequenceSplit(mesh)
    _check_dim(part, dim)
    layout = split.layout(part.shape[dim])
    moved = part.movedim(dim, -1).unsqueeze(-1)  # (..., tokens, 1)
    flag = part.dtype == torch.bool
    moved = moved.to(torch.uint8) if flag else moved
    found = split.whole(split.start(moved, layout), layout).squeeze(-1).movedim(-1, dim)
    return found.to(torch.bool) if flag else found


def _check_dim(tensor: object, dim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"what is split must be a tensor, got {type(tensor).__name__}")
    check_integer("dim", dim, -tensor.dim(), tensor.dim() - 1)
