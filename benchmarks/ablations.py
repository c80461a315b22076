"""`QuantumFluxLM` with another way to gather than its geometry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qflux import QuantumFluxConfig, QuantumFluxLM
from qflux.models.cache import LayerCache
from qflux.models.layers import GeometricAttention


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
