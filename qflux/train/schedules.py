"""What changes while a model trains: learning rate, window length, growth of the radii."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, cast

from torch import Tensor, nn

from qflux_kernels import Radius

from .options import TrainingOptions


def learning_rate_at(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up to `peak` over the first `warmup` of the run, then a cosine down to 0.

    Args:
        progress: how much of the run is behind, in [0, 1].
        peak: the highest rate.
        warmup: share of the run at which the peak is reached, in [0, 1).
    """
    if progress < warmup:
        # A tenth to start with: the first step must not be empty.
        return peak * (0.1 + 0.9 * progress / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def window_length(progress: float, context_length: int, options: TrainingOptions) -> int:
    """Tokens in a window when `progress` of the run is behind: the curriculum.

    Source: the Flux document, section 7.5 ("curriculum learning based on sequence length").
    """
    first = options.curriculum_length
    if first is None or first >= context_length or progress >= options.curriculum_share:
        return context_length
    doublings = math.ceil(math.log2(context_length / first))
    return min(context_length, first << int(doublings * progress / options.curriculum_share))


def shorten(batch: Tensor, length: int) -> Tensor:
    """Windows `(B, S)` cut into windows of `length`; what is left over at their ends is dropped."""
    whole = batch.shape[1] // length * length
    return batch[:, :whole].reshape(-1, length)


class HasRadius(Protocol):
    """A module with a radius rule."""

    radius: Radius


def radius_rules(model: nn.Module) -> list[tuple[HasRadius, Radius]]:
    """The modules that have a radius rule, each with the one it was configured with."""
    rules = ((module, getattr(module, "radius", None)) for module in model.modules())
    return [(cast("HasRadius", module), rule) for module, rule in rules if isinstance(rule, Radius)]


def radius_factor(progress: float, warmup: float) -> float:
    """The part of the growth rate that radii have when `progress` of the run is behind."""
    return progress / warmup if progress < warmup else 1.0


@contextmanager
def radius_rate(rules: list[tuple[HasRadius, Radius]], factor: float) -> Iterator[None]:
    """Meanwhile radii grow at `factor` times the configured rate.

    Source: the Flux document, section 7.5 ("Schedule radius parameters to focus on important
    tokens").
    """
    for module, rule in rules:
        module.radius = replace(rule, rate=factor * rule.rate)
    try:
        yield
    finally:
        for module, rule in rules:
            module.radius = rule
