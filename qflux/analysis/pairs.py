"""Which pairs a layer keeps, what they weigh, and the line that separates them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qflux_kernels import InverseGate, Threshold, reference
from qflux_kernels.arguments import interact_arguments
from qflux_kernels.options import Score

from ..models.output import LayerRecord


class Pairs(NamedTuple):
    """The pairs of one sequence of S tokens on one cylinder, in float64.

    Row i keeps the visible keys k with `low[i] <= direction[i] . k <= high[i]`; a bound is infinite
    where there is none.

    queries, keys: `(S, 2)`. direction: `(S, 2)`. low, high: `(S,)`.
    product: `(S, S)`, direction[i] . keys[j]. weight: `(S, S)`, zero where a pair is dropped or
        invisible, NaN where a row sees a point that is not finite.
    kept, visible: `(S, S)` bool.
    """

    queries: Tensor
    keys: Tensor
    direction: Tensor
    low: Tensor
    high: Tensor
    product: Tensor
    weight: Tensor
    kept: Tensor
    visible: Tensor


def cylinder_score(score: Score, batch: tuple[int, ...], index: tuple[int, ...]) -> Score:
    """The score of one sequence of a batch, its tensors in float64.

    Args:
        score: with tensors that broadcast to the batch shape.
        batch: the batch shape, (sequences, cylinders).
        index: the sequence.
    """
    values = {name: getattr(score, name) for name in score.per_sequence}
    return replace(
        score,
        **{
            name: value.detach().expand(batch)[index].double()
            for name, value in values.items()
            if isinstance(value, Tensor)
        },
    )


@torch.no_grad()
def layer_pairs(
    record: LayerRecord, cylinder: int = 0, sequence: int = 0, *, causal: bool = True
) -> Pairs:
    """The pairs of a layer on one cylinder, by the formulas of its score, for any score.

    This forms S x S matrices. Where a pair's margin is smaller than rounding in the dtype of the
    record, it may be kept here and dropped there.

    Args:
        record: of a layer.
        cylinder, sequence: which of them.
        causal: whether a token sees only itself and what is before it, as in every model here.

    Raises:
        IndexError: there is no such cylinder or sequence.
    """
    queries, keys = (
        points[sequence, cylinder].detach().double() for points in (record.queries, record.keys)
    )
    batch = tuple(record.queries.shape[:2])
    score = cylinder_score(record.score, batch, (sequence, cylinder))
    arguments = interact_arguments(queries, keys, causal=causal, score=score)
    weight, kept, visible = reference.weights(arguments)
    visible = visible.expand_as(weight)
    direction = query_direction(queries, score)
    product = direction @ keys.mT
    low, high = row_limits(queries, keys, product, weight, kept, visible, score, causal=causal)
    return Pairs(queries, keys, direction, low, high, product, weight, kept, visible)


def query_direction(queries: Tensor, score: Score) -> Tensor:
    """The vector `(S, 2)` whose inner product with a key decides whether the key is kept."""
    if isinstance(score, InverseGate):
        turned = torch.stack((queries[..., 1], -queries[..., 0]), -1)
        return queries + score.alpha * turned
    return queries


def row_limits(
    queries: Tensor,
    keys: Tensor,
    product: Tensor,
    weight: Tensor,
    kept: Tensor,
    visible: Tensor,
    score: Score,
    *,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """The bounds `low` and `high`, `(S,)` each, of the products that a row keeps.

    They are exact for `Threshold`, for `InverseGate` and for a score that has a `scale`, whose
    weight is `scale` times what exceeds the bound. For another score that keeps a half-plane the
    bound lies halfway between the weakest kept and the strongest dropped key.
    """
    infinite = product.new_full(product.shape[:1], torch.inf)
    if isinstance(score, InverseGate):
        gate = torch.as_tensor(score.min_gate, dtype=product.dtype)
        reach = torch.where(gate > 0, 1 / gate - score.eps, torch.inf).expand_as(infinite)
        return -reach, reach
    if isinstance(score, Threshold):
        window = visible if causal and not score.whole_window else torch.ones_like(visible)
        return threshold_limits(queries, keys, window, score), infinite
    least = torch.where(kept, product, torch.inf).amin(-1)
    scale = getattr(score, "scale", None)
    if scale is not None:
        at = torch.where(kept, product, torch.inf).argmin(-1, keepdim=True)
        return least - weight.gather(-1, at).squeeze(-1) / scale, infinite
    dropped = torch.where(visible & ~kept, product, -torch.inf).amax(-1)
    return torch.where(dropped.isfinite(), (least + dropped) / 2, -infinite), infinite


def threshold_limits(queries: Tensor, keys: Tensor, window: Tensor, score: Threshold) -> Tensor:
    """2 tau - 1 of each row: the product from which a threshold score keeps a key, `(S,)`.

    Args:
        queries, keys: `(S, 2)`.
        window: `(S, S)` bool, the keys of a row's statistics.
        score: the threshold.
    """
    product = queries @ keys.mT
    count = window.sum(-1)
    mean = torch.where(window, product, 0).sum(-1) / count
    deviation = torch.where(window, product - mean[:, None], 0)
    # The score is (product + 1) / 2, so that its variance is a quarter of the product's.
    spread = torch.sqrt(deviation.square().sum(-1) / count + 4 * score.eps)
    return mean + score.sigma * spread


def boundary_ellipse(pairs: Pairs, row: int, sigma: float | Tensor, points: int = 120) -> Tensor:
    """The ellipse that the boundaries of all directions touch, `(points, 2)`.

    It is mean + sigma sqrt(covariance) u over unit vectors u, for the keys that `row` sees: a
    threshold score keeps what lies beyond the tangent at right angles to the query, up to `eps`.
    """
    seen = pairs.keys[pairs.visible[row]]
    centred = seen - seen.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(seen))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    turn = torch.linspace(0, 2 * torch.pi, points, dtype=seen.dtype)
    circle = torch.stack((turn.cos(), turn.sin()), -1)
    return seen.mean(0) + torch.as_tensor(sigma, dtype=seen.dtype) * circle @ root
