"""What every language model returns, and what it tells of its layers on request."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from qflux_kernels.options import Score

from .config import SCORES
from .embedding import phase_coherence


class LayerRecord(NamedTuple):
    """What happened in a layer, for B sequences of S tokens on C cylinders.

    The tensors are those that the layer computed with, not copies, and they keep their graph. None
    stands where a layer has no such thing.

    states_before, states_after: `(B, C, S, 2)`, the tokens' states; one tensor where they stay.
    queries, keys: `(B, C, S, 2)`, the points whose geometry decides which tokens a token gathers
        from; `states_before` where the states themselves do.
    degree: `(B, C, S)` int32, pairs that a token kept. strength: `(B, C, S)`, the sum of their
        weights. Of the value path where there is one, else of the first stage of the evolution.
    radius: `(B, C, S)`, of `states_after`.
    gathered: `(B, C, S, D)`, the weighted sum of the values; None where the layer only moves
        states.
    score: the pair score that degree and strength come from, with its tensors.
    skip: the part of the old states that the evolution keeps, broadcasting to `(B, C, S)`; None
        without evolution.
    """

    states_before: Tensor
    states_after: Tensor
    queries: Tensor
    keys: Tensor
    degree: Tensor
    strength: Tensor
    radius: Tensor
    gathered: Tensor | None
    score: Score
    skip: Tensor | None

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """The record in numbers: tensors without dimensions, on the device of the states.

        density: kept pairs over pairs that may be seen. strength: mean row sum of the weights.
        radius_mean, radius_std: of the radii after the layer. coherence: mean of
        `phase_coherence` after it. skip: mean part of the old state that stayed, where the layer
        has a skip.

        Source: the Flux document, section 5 (`metrics`).
        """
        length = self.degree.shape[-1]
        visible = length * (length + 1) / 2 * math.prod(self.degree.shape[:-1])
        found = {
            "density": self.degree.sum() / visible,
            "strength": self.strength.mean(),
            "radius_mean": self.radius.mean(),
            "radius_std": self.radius.std(correction=0),
            "coherence": phase_coherence(self.states_after).mean(),
        }
        return found if self.skip is None else {**found, "skip": self.skip.mean()}


class LanguageModelOutput(NamedTuple):
    """What a model returns; a pytree whose leaves are tensors.

    logits: `(B, S, V)`. loss: what to minimise, in nats a token; in training it may have terms
    beside the cross entropy. cross_entropy: the mean over the labels, in nats a token. Both are
    None without labels. layers: a record of each layer, or `()` if they were not asked for.
    """

    logits: Tensor
    loss: Tensor | None
    cross_entropy: Tensor | None
    layers: tuple[LayerRecord, ...]


def _flatten_score(score: Score) -> tuple[list[Tensor], tuple[Score, tuple[str, ...]]]:
    """Its tensors, and what is needed to put others in their place."""
    tensors = {
        field.name: value
        for field in fields(score)
        if isinstance(value := getattr(score, field.name), Tensor)
    }
    without = replace(score, **dict.fromkeys(tensors, 0.0))
    return list(tensors.values()), (without, tuple(tensors))


def _unflatten_score(children: Any, context: tuple[Score, tuple[str, ...]]) -> Score:
    without, names = context
    rebuilt = object.__new__(type(without))
    # Not by its constructor, which refuses the placeholders that pytree functions put in.
    rebuilt.__dict__.update(without.__dict__, **dict(zip(names, children, strict=True)))
    return rebuilt


for _kind in SCORES.values():
    _pytree.register_pytree_node(
        _kind,
        _flatten_score,
        _unflatten_score,
        serialized_type_name=f"qflux_kernels.{_kind.__name__}",
    )
for _tuple in (LayerRecord, LanguageModelOutput):
    _pytree._register_namedtuple(_tuple, serialized_type_name=f"qflux.{_tuple.__name__}")
