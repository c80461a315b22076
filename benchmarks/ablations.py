"""`QuantumFluxLM` with another way to gather than its geometry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qflux import QuantumFluxConfig, QuantumFluxLM
from qflux.models.cache import LayerCache
from qflux.models.layers import GeometricAttention, PairScore
from qflux_kernels import interact
from qflux_kernels.options import Score


class SoftmaxAttention(GeometricAttention):
    """The value path with softmax over the very same states, all pairs of them."""

    def gather(
        self, queries: Tensor, keys: Tensor, values: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        if cache is not None:
            raise ValueError("cache must be None: softmax over all pairs has none")
        scores = self.score().scale[:, None, None] * (queries @ keys.mT)
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        degree = (weights > 0).sum(-1, dtype=torch.int32)
        context = weights @ values
        return context, {"degree": degree, "strength": weights.sum(-1), "gathered": context}


class NoAttention(GeometricAttention):
    """The value path where a token has its own value only, without the time of any pairs."""

    def gather(
        self, queries: Tensor, keys: Tensor, values: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        nothing = torch.zeros_like(values)
        none = torch.zeros_like(values[..., 0])
        return nothing, {"degree": none.int(), "strength": none, "gathered": nothing}


class Mixture(nn.ModuleList):
    """Hard, soft and sparsemax cylinders, a third of each, in turn.

    So each kind has fast and slow ones, and spreads its own selectivities over its cylinders.
    """

    KINDS = (("threshold", "hard"), ("threshold", "soft"), ("sparsemax", "soft"))

    def __init__(self, config: QuantumFluxConfig) -> None:
        own = [
            replace(config, score=score, num_cylinders=len(range(first, config.num_cylinders, 3)))
            for first, (score, _) in enumerate(self.KINDS)
        ]
        kinds = zip(own, self.KINDS, strict=True)
        super().__init__(PairScore(config, shrinkage) for config, (_, shrinkage) in kinds)

    def forward(self) -> tuple[Score, ...]:
        """The scores where they are now, for a layer's record."""
        return tuple(score() for score in self)


class MixtureAttention(GeometricAttention):
    """The value path with a `Mixture` of scores side by side."""

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__(config)
        self.score = Mixture(config)

    def gather(
        self, queries: Tensor, keys: Tensor, values: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        if cache is not None:
            raise ValueError("cache must be None: a mixture has none")
        mean = torch.empty_like(values)
        strength = torch.empty_like(values[..., 0])
        degree = torch.empty_like(strength, dtype=torch.int32)
        for first, score in enumerate(self.score):
            own = slice(first, None, len(self.score))
            context, strength[:, own], degree[:, own] = interact(
                queries[:, own], keys[:, own], values[:, own], score=score(), backend=self.backend
            )
            if not score.averages:
                context = context / degree[:, own].clamp(min=1).unsqueeze(-1)
            mean[:, own] = context
        return mean, {"degree": degree, "strength": strength, "gathered": mean}


class HierarchicalAttention(GeometricAttention):
    """The value path at two scales: near tokens one by one, and far ones by means of blocks.

    A token gathers from its own block of `near` tokens and the one before as from all tokens else.
    To that it adds what it gathers from the blocks of `block` tokens that end before its own
    begins, each with the mean of its keys and of its values.
    """

    near, block = 256, 64

    def gather(
        self, queries: Tensor, keys: Tensor, values: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        if cache is not None:
            raise ValueError("cache must be None: blocks have none")
        near = windows(self._interact, queries, keys, values, self.near)
        far = blocks(self._interact, queries, keys, values, self.block)
        context, strength, degree = (one + other for one, other in zip(near, far, strict=True))
        return context, {"degree": degree, "strength": strength, "gathered": context}

    def _interact(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """`interact` with any dimensions between cylinders and tokens."""
        scale = self.score().scale.view(-1, *(1 for _ in queries.shape[2:-2]))
        score = replace(self.score(), scale=scale)
        return tuple(interact(queries, keys, values, score=score, backend=self.backend))


Gather = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def windows(
    gather: Gather, queries: Tensor, keys: Tensor, values: Tensor, size: int
) -> tuple[Tensor, ...]:
    """`gather` `(B, C, S, ...)` for each token from its own window of `size` and the one before."""
    length = queries.shape[2]
    parts = [gather(*(x[:, :, :size] for x in (queries, keys, values)))]
    whole = length // size
    if whole > 1:
        # (B, C, W, size, ...) rows and (B, C, W, 2 size, ...) keys: the ends are aligned
        rows = queries[:, :, size : whole * size].unflatten(2, (-1, size))
        near = (
            x[:, :, : whole * size].unfold(2, 2 * size, size).movedim(-1, 3) for x in (keys, values)
        )
        parts.append(tuple(x.flatten(2, 3) for x in gather(rows, *near)))
    if whole and length % size:
        start = (whole - 1) * size
        parts.append(
            gather(queries[:, :, whole * size :], keys[:, :, start:], values[:, :, start:])
        )
    return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))


def blocks(
    gather: Gather, queries: Tensor, keys: Tensor, values: Tensor, size: int
) -> tuple[Tensor, ...]:
    """`gather` for each token from the means of the blocks of `size` tokens before its own."""
    length = queries.shape[2]
    count = -(-length // size)
    pad = (0, 0, 0, count * size - length)
    # Rows at the same place in their blocks are a causal sequence of their own, one key behind.
    rows = nn.functional.pad(queries, pad).unflatten(2, (count, size)).transpose(2, 3)
    means = (
        nn.functional.pad(x, pad).unflatten(2, (count, size)).mean(3)[:, :, None, :-1]
        for x in (keys, values)
    )
    found = gather(rows, *(x.expand(-1, -1, size, -1, -1) for x in means))
    return tuple(x.transpose(2, 3).flatten(2, 3)[:, :, :length] for x in found)


def _with(attention: type[GeometricAttention], config: QuantumFluxConfig) -> QuantumFluxLM:
    model = QuantumFluxLM(config)
    for layer in model.layers:
        layer.attention = attention(config)
    return model


def softmax_model(config: QuantumFluxConfig) -> QuantumFluxLM:
    """With `SoftmaxAttention`, scales as those of the sparsemax."""
    return _with(SoftmaxAttention, config)


def no_geometry(config: QuantumFluxConfig) -> QuantumFluxLM:
    """With `NoAttention`."""
    return _with(NoAttention, config)


def mixture_model(config: QuantumFluxConfig) -> QuantumFluxLM:
    """With `MixtureAttention`."""
    return _with(MixtureAttention, config)


def hierarchical_model(config: QuantumFluxConfig) -> QuantumFluxLM:
    """With `HierarchicalAttention`."""
    return _with(HierarchicalAttention, config)
