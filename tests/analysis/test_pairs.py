"""Pairs and their boundaries agree with the operators, for every score and awkward states."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from inputs import SCORES

from qflux.analysis.cover import band_share, tree_cover
from qflux.analysis.pairs import (
    boundary_ellipse,
    cylinder_score,
    layer_pairs,
    query_direction,
    row_limits,
)
from qflux.models.output import LayerRecord
from qflux_kernels import InverseGate, Threshold, interact


def record_of(queries, keys, score):
    """A record with the pairs that the kernels see: `(C, S, 2)` points in float64."""
    queries, keys = queries[None], keys[None]
    found = interact(queries, keys, score=score)
    return LayerRecord(
        states_before=queries, states_after=queries, queries=queries, keys=keys,
        degree=found.degree, strength=found.strength, radius=queries.norm(dim=-1),
        gathered=found.context, score=score, skip=None,
    )  # fmt: skip


def points(kind, length=50, cylinders=2):
    if kind == "equal":
        return torch.tensor([0.6, -0.3]).double().expand(cylinders, length, 2)
    if kind == "collinear":
        return torch.randn(cylinders, length, 1).double() * torch.tensor([0.8, -0.6]).double()
    if kind == "huge":
        return 1e6 * torch.randn(cylinders, length, 2).double()
    return torch.randn(cylinders, length, 2).double()


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("kind", ["random", "collinear", "huge"])
def test_pairs_are_those_of_the_kernels(score, kind):
    queries, keys = points(kind), points(kind)
    record = record_of(queries, keys, score)
    everything = torch.eye(50).double().expand(1, 2, 50, 50)
    weights = interact(record.queries, record.keys, everything, score=score).context[0]
    for cylinder in range(2):
        pairs = layer_pairs(record, cylinder)
        torch.testing.assert_close(pairs.weight, weights[cylinder])
        assert torch.equal(pairs.kept.sum(-1).int(), record.degree[0, cylinder])


@pytest.mark.parametrize("score", [*SCORES, Threshold(3.0), InverseGate(0.2, 0.1, 4.0)], ids=str)
def test_what_is_kept_lies_within_the_limits(score):
    record = record_of(points("random"), points("random"), score)
    pairs = layer_pairs(record, 1)
    # A margin for rounding: nothing else decides.
    reach = 1e-9 * pairs.product.abs().max()
    inside = (pairs.product >= pairs.low[:, None]) & (pairs.product <= pairs.high[:, None])
    far = ((pairs.product - pairs.low[:, None]).abs() > reach) & (
        (pairs.product - pairs.high[:, None]).abs() > reach
    )
    assert far.float().mean() > 0.9
    assert torch.equal((inside & pairs.visible)[far], pairs.kept[far])
    # Each bound is one: some key falls on either side, or there is no bound.
    dropped = pairs.visible & ~pairs.kept
    assert bool(dropped.any()) == bool(pairs.low.isfinite().any() or pairs.high.isfinite().any())


def test_each_cylinder_has_its_own_score():
    sigma = torch.tensor([-0.5, 1.5], dtype=torch.float32, requires_grad=True)
    record = record_of(points("random"), points("random"), Threshold(sigma.double()))
    one, two = (layer_pairs(record, cylinder).kept.sum() for cylinder in (0, 1))
    assert one > 2 * two
    score = cylinder_score(Threshold(sigma), (3, 2), (2, 1))
    assert score.sigma.item() == 1.5 and score.sigma.dtype == torch.float64
    assert not score.sigma.requires_grad
    with pytest.raises(IndexError):
        layer_pairs(record, 2)


@dataclasses.dataclass(frozen=True)
class Mass:
    """A score whose weight is `scale` times what exceeds the bound, by its fields alone."""

    scale: float


def test_limits_of_scores_that_are_not_known_here():
    """Weights by mass: z = 3 product, sum of max(z - tau, 0) = 1, from the sorted solution."""
    queries, keys = points("random", 30)[0], points("random", 30)[1]
    product, visible = queries @ keys.mT, torch.ones(30, 30).tril().bool()
    z = torch.where(visible, 3 * product, -torch.inf)
    top = z.sort(-1, descending=True).values
    count = torch.arange(1, 31)
    tau = (top.cumsum(-1) - 1) / count
    size = ((top > tau) & top.isfinite()).sum(-1, keepdim=True)
    tau = tau.gather(-1, size - 1)
    weight = (z - tau).clamp(min=0)
    kept = weight > 0
    torch.testing.assert_close(weight.sum(-1), torch.ones(30).double())
    score = Mass(3.0)
    low, high = row_limits(queries, keys, product, weight, kept, visible, score)
    torch.testing.assert_close(low, tau[:, 0] / 3)
    assert high.isinf().all()
    # Of an unknown score the bound separates what it keeps from what it drops.
    low, _ = row_limits(queries, keys, product, weight, kept, visible, SimpleNamespace())
    assert torch.equal(kept, visible & (product >= low[:, None]))
    assert query_direction(queries, score) is queries


def test_what_is_not_finite_stays_so():
    states = points("random", 6).clone()
    states[0, 3, 0] = math.nan
    pairs = layer_pairs(record_of(states, states, Threshold()), 0)
    assert pairs.weight[:3].isfinite().all() and pairs.weight[3:, 0].isnan().all()
    assert pairs.low[:3].isfinite().all() and pairs.low[3:].isnan().all()


def test_all_boundaries_touch_the_ellipse():
    keys = points("random", 80)[0] * torch.tensor([0.9, 0.4]) + torch.tensor([0.3, -0.2])
    record = record_of(keys[None], keys[None], Threshold(0.7, eps=0.0))
    pairs = layer_pairs(record, 0)
    for row in (1, 20, 79):
        ellipse = boundary_ellipse(pairs, row, 0.7, points=4001)
        reach = (ellipse @ pairs.direction[row]).max()
        torch.testing.assert_close(reach, pairs.low[row], rtol=1e-5, atol=1e-7)
    assert boundary_ellipse(pairs, 0, 0.7).std(0).max() < 1e-12  # one key: a point


@pytest.mark.parametrize("limit", [-math.inf, -0.4, 0.0, 0.7, 50.0])
def test_a_tree_decides_every_key_once(limit):
    keys, direction = points("random", 203)[0], torch.tensor([-0.3, 1.1]).double()
    nodes = tree_cover(keys, direction, limit, leaf=4)
    assert sum(node.keys for node in nodes) == 203
    wanted = keys @ direction >= limit
    whole = sum(node.keys for node in nodes if node.kind == "kept")
    gone = sum(node.keys for node in nodes if node.kind == "dropped")
    assert whole <= wanted.sum() and gone <= (~wanted).sum()
    crossed = [node for node in nodes if node.kind == "crossed"]
    assert all(node.keys <= 4 for node in crossed)
    # A line crosses few boxes.
    assert sum(node.keys for node in crossed) < 80
    assert bool(crossed) == bool(-3 < limit < 3 and wanted.any() and (~wanted).any())


def test_a_tree_over_equal_keys_and_none():
    same = torch.ones(20, 2).double()
    assert [node.kind for node in tree_cover(same, same[0], 2.0)] == ["kept"]
    assert [node.kind for node in tree_cover(same, same[0], 2.1)] == ["dropped"]
    assert tree_cover(same[:0], same[0], 0.0) == []
    # A key on the line is kept, so that its box is not dropped.
    two = torch.tensor([[0.0, 0], [1, 0]]).double()
    assert [node.kind for node in tree_cover(two, two[1], 1.0)] == ["crossed"]


def test_rows_that_decide_alike_leave_nothing_to_test():
    keys = points("random", 40)[0]
    queries = torch.tensor([0.5, 0.1]).double().expand(40, 2)
    record = record_of(queries[None], keys[None], Threshold(0.5, "row"))
    assert band_share(layer_pairs(record, 0)) == 0
    mixed = layer_pairs(record_of(points("random", 40), points("random", 40), Threshold()), 0)
    assert 0.5 < band_share(mixed, 40) <= 1
    assert band_share(mixed, 1) == 0  # a row alone is certain
