"""Tables have the numbers of the records, on cases that can be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qflux import phase_coherence
from qflux.analysis import tables
from qflux.analysis.pairs import layer_pairs
from qflux.analysis.record import record_layers


def test_a_layer_in_numbers(records):
    record = records()[1]
    table = tables.layer_table(record, tokens=16)
    assert table.mismatch == 0
    np.testing.assert_array_equal(table.degree, record.degree[0].numpy())
    np.testing.assert_allclose(table.strength, record.strength[0].numpy(), rtol=1e-4, atol=1e-5)
    assert table.visible.tolist() == list(range(1, 41))
    density = record.metrics()["density"].item()
    assert table.density.mean() == pytest.approx(density, rel=1e-6)
    assert table.weight.shape == (3, 16, 16) and table.weight.dtype == np.float32
    pairs = layer_pairs(record, 2)
    kept = pairs.kept[:16, :16].numpy()
    np.testing.assert_array_equal(np.isfinite(table.weight[2]), kept)
    np.testing.assert_array_equal(table.weight[2][kept], pairs.weight[:16, :16].float()[kept])


def test_entropy_is_that_of_the_weights(records):
    table = tables.layer_table(records("qfnn")[0])
    # The gate weighs all pairs by about 1 or -1: log2 of their number.
    np.testing.assert_allclose(table.entropy[0], np.log2(table.visible), atol=1e-3)
    flux = tables.layer_table(records("flux")[0])
    row = layer_pairs(records("flux")[0]).weight[-1]
    share = row[row > 0] / row.sum()
    assert flux.entropy[0, -1] == pytest.approx(-(share * share.log2()).sum().item())
    # A row that keeps nothing has none.
    assert np.isnan(tables.layer_table(records("flux")[0]).entropy[0, 0])


@pytest.mark.parametrize(
    ("preset", "changes", "kind", "names"),
    [
        ("lm", {}, "keys", ("layer 0", "layer 1")),
        ("lm", {"evolution": True}, "states", ("input", "layer 0", "layer 1")),
        ("flux", {}, "states", ("input", "layer 0", "layer 1")),
    ],
)
def test_where_tokens_go(records, preset, changes, kind, names):
    found = records(preset, **changes)
    places = tables.trajectory(found)
    assert (places.kind, places.names) == (kind, names)
    last = found[-1].keys if kind == "keys" else found[-1].states_after
    np.testing.assert_array_equal(places.points[-1], last[0].double().numpy())
    np.testing.assert_allclose(places.radius[-1], last[0].norm(dim=-1), rtol=1e-5)
    np.testing.assert_allclose(places.coherence[-1], phase_coherence(last)[0], rtol=1e-5)
    turned = places.radius * np.exp(1j * places.phase)
    np.testing.assert_allclose(turned.real, places.points[..., 0], atol=1e-12)


def test_no_layers_have_no_paths():
    with pytest.raises(ValueError, match="no layers"):
        tables.trajectory(())


def test_phase_steps_are_wrapped():
    phase = np.array([3.0, -3.0, -2.5, math.pi])
    points = np.stack((np.cos(phase), np.sin(phase)), -1)[None, None]
    places = tables.Trajectory(points, ("input",), "states")
    # From 3 to -3 it is a short step through pi.
    wanted = [2 * math.pi - 6, 0.5, math.pi + 2.5 - 2 * math.pi]
    np.testing.assert_allclose(places.phase_differences[0, 0], wanted)


def test_similarities_are_products_of_radii_and_phases():
    radius, phase = np.array([0.5, 1.5, 2.0]), np.array([0.1, -2.0, 3.0])
    points = np.stack((radius * np.cos(phase), radius * np.sin(phase)), -1)
    direct, orthogonal = tables.similarity(points, points[::-1])
    difference = phase[:, None] - phase[::-1]
    scale = radius[:, None] * radius[::-1]
    np.testing.assert_allclose(direct, scale * np.cos(difference))
    np.testing.assert_allclose(orthogonal, scale * np.sin(difference), atol=1e-15)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_rank_of_logits(rank):
    logits = torch.randn(30, rank).double() @ torch.randn(rank, 11).double() + torch.randn(11)
    found = tables.logit_rank(logits)
    assert found.rank == rank and found.tokens == 30 and 0 < found.effective <= rank + 1e-9
    logits[3, 2] = math.nan
    assert tables.logit_rank(logits).tokens == 29
    assert tables.logit_rank(logits[3:4]).rank == 0
    assert tables.logit_rank(torch.ones(1, 4)).rank == 0
    # Small ones count until they are rounding.
    spread = torch.diag(torch.tensor([1, 1e-3, 1e-7, 0]).double())
    assert tables.logit_rank(torch.cat((spread, -spread))).rank == 2
    # Two equally large directions count as two.
    square = torch.eye(4).double()[:2].repeat_interleave(2, 0)
    assert tables.logit_rank(torch.cat((square, -square))).effective == pytest.approx(2)


def test_networks_of_a_published_model_have_rank_two(make, ids):
    with torch.no_grad():
        assert tables.logit_rank(make("qfnn")(ids[None]).logits[0]).rank == 2


WEIGHT = np.array(
    [
        [0.9, np.nan, np.nan, np.nan],
        [-0.8, np.nan, np.nan, np.nan],
        [np.nan, 0.3, 0.0, np.nan],
        [0.3, np.nan, 0.2, 0.1],
    ]
)


def test_edges_are_the_heaviest_pairs():
    found = tables.edges(WEIGHT, 3)
    assert list(zip(*(found[n].tolist() for n in ("source", "target", "weight")), strict=True)) == [
        (0, 1, -0.8), (1, 2, 0.3), (0, 3, 0.3),
    ]  # fmt: skip
    assert len(tables.edges(WEIGHT, 100)["weight"]) == 4
    assert len(tables.edges(WEIGHT, 0)["weight"]) == 0


def test_the_network_of_tokens_takes_means():
    # Tokens 7, 5, 7, 5: pairs before themselves (row, key) with 7 hearing 5 and 5 hearing 7.
    found = tables.token_network(WEIGHT, [7, 5, 7, 5], 10)
    rows = {
        (source, target): (weight, pairs)
        for source, target, weight, pairs in zip(*(c.tolist() for c in found.values()), strict=True)
    }
    assert set(rows) == {(7, 5), (5, 7)}
    # 5 hears 7 at (1, 0), (3, 0) and (3, 2).
    assert rows[7, 5] == (pytest.approx((-0.8 + 0.3 + 0.2) / 3), 3)
    assert rows[5, 7] == (pytest.approx(0.3), 1)


def test_rows_and_layers_are_long_tables(records):
    found = records()
    done = [tables.layer_table(record) for record in found]
    rows = tables.row_columns(done)
    assert {len(column) for column in rows.values()} == {2 * 3 * 40}
    at = (rows["layer"] == 1) & (rows["cylinder"] == 2) & (rows["position"] == 17)
    assert rows["degree"][at] == found[1].degree[0, 2, 17].item()
    layers = tables.layer_columns(done, tables.trajectory(found))
    assert {len(column) for column in layers.values()} == {6}
    at = 4  # layer 1, cylinder 1
    assert layers["degree_mean"][at] == pytest.approx(found[1].degree[0, 1].float().mean().item())
    radius = found[1].keys[0, 1].norm(dim=-1)
    assert layers["radius_max"][at] == pytest.approx(radius.max().item())


def test_curves_are_read_and_bad_lines_counted():
    lines = [
        '{"step": 1, "train_loss": 2.5, "density": [0.2, 0.4], "sample": "x", "flag": true}\n',
        "\n", "no json\n", "[1]\n", '{"train_loss": 1}\n',
        '{"step": 5, "train_loss": NaN, "val_loss": 1.5}\n',
    ]  # fmt: skip
    curves, bad = tables.training_curves(lines)
    assert bad == 3
    assert curves["step"].tolist() == [1, 5]
    assert curves["density"][0] == pytest.approx(0.3) and curves["density/1"][0] == 0.4
    assert math.isnan(curves["val_loss"][0]) and curves["val_loss"][1] == 1.5
    assert math.isnan(curves["train_loss"][1]) and "flag" not in curves
    assert tables.training_curves([]) == ({}, 0)


def test_the_embedding_is_the_models(make, ids):
    for preset in ("lm", "flux", "qfnn"):
        model = make(preset)
        table = tables.embedding_table(model, limit=9)
        assert table.shape == (model.config.num_cylinders, 9, 2)
        states = model.embedding(ids[None, 4:5])[0, :, 0].detach()
        whole = tables.embedding_table(model)
        np.testing.assert_allclose(whole[:, ids[4]], states, rtol=1e-6)


def test_one_token_and_states_without_numbers(make, ids):
    model = make("flux")
    table = tables.layer_table(record_layers(model, ids[None, :1])[0])
    assert table.degree.shape == (1, 1) and table.weight.shape == (1, 1, 1)
    model.embedding.table[ids[3]] = math.nan
    places = tables.trajectory(record_layers(model, ids[None]))
    table = tables.layer_table(record_layers(model, ids[None])[0])
    layers = tables.layer_columns([table], places)
    assert np.isfinite(table.strength[0, :3]).all() and np.isnan(table.strength[0, 3:]).all()
    assert np.isfinite(layers["strength_mean"]).all()
