"""Pictures show the numbers of the tables, and both ways of drawing show those of the pictures."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from inputs import TEXT

from qflux.analysis import interactive, networks, pictures, static, tables
from qflux.analysis.pairs import boundary_ellipse, layer_pairs
from qflux.analysis.picture import (
    Bars,
    Heat,
    Line,
    Panel,
    Picture,
    Points,
    evenly,
    shown_text,
)

pytest.importorskip("matplotlib", reason='pip install "qflux[analysis]" for figures')
pytest.importorskip("plotly", reason='pip install "qflux[analysis]" for interactive figures')

LABELS = [shown_text(c) for c in TEXT[:40]]


@pytest.fixture(scope="module")
def done(records):
    return [tables.layer_table(record) for record in records()]


@pytest.fixture(scope="module")
def places(records):
    return tables.trajectory(records("flux"))


def marks(picture, kind):
    return [mark for panel in picture.panels for mark in panel.marks if isinstance(mark, kind)]


def test_white_space_and_control_characters_are_shown():
    assert shown_text(" a\n\t\r\x07é") == "␣a↵⇥␍\\u0007é"


def test_samples_are_even_and_have_both_ends():
    assert evenly(3, 5).tolist() == [0, 1, 2]
    assert evenly(100, 4).tolist() == [0, 33, 66, 99]
    assert evenly(0, 4).tolist() == [] and evenly(9, 1).tolist() == [0]


def test_states_stand_where_they_are(places):
    picture = pictures.token_states(places, LABELS)
    plane, polar, space = picture.panels
    x = places.points[-1, 0, :, 0]
    np.testing.assert_array_equal(plane.marks[0].x, x)
    np.testing.assert_array_equal(polar.marks[0].y, places.radius[-1, 0])
    np.testing.assert_array_equal(polar.marks[0].x, places.phase[-1, 0])
    np.testing.assert_array_equal(space.marks[0].z, np.arange(40))
    assert plane.equal and polar.kind == "polar" and space.kind == "space"
    assert plane.marks[0].hover[3] == f"{LABELS[3]} (token 3)"
    assert sum(map(bool, plane.marks[0].labels)) == pictures.LABELS
    assert np.all(polar.marks[1].y == 1)


def test_the_vocabulary_has_its_names(make):
    table = tables.embedding_table(make("flux"))
    names = [shown_text(c) for c in sorted(set(TEXT))]
    mark = pictures.token_embedding(table, names).panels[0].marks[0]
    np.testing.assert_array_equal(mark.x, table[0, :, 0])
    largest = int(np.hypot(*table[0].T).argmax())
    assert mark.labels[largest] == names[largest] and mark.labels[9] == names[9]


def test_every_layer_has_a_panel(places, done):
    assert [p.title for p in pictures.state_evolution(places, LABELS).panels] == [
        "input", "layer 0", "layer 1",
    ]  # fmt: skip
    many = [done[0]] * 20
    picture = pictures.attention(many, LABELS)
    assert len(picture.panels) == pictures.PANELS
    assert "8 of 20 layers are shown" in picture.caption


def test_heat_maps_tell_kept_dropped_and_future(done):
    picture = pictures.attention(done, LABELS, cylinder=2)
    heat = picture.panels[1].marks[0]
    np.testing.assert_array_equal(heat.values, done[1].weight[2])
    assert heat.rows == heat.columns == LABELS
    lower = np.tri(40, dtype=bool)
    np.testing.assert_array_equal(heat.grey, lower & np.isnan(done[1].weight[2]))
    assert f"{done[1].density[2]:.1%}" in picture.panels[1].title
    assert not heat.diverging
    long = dataclasses.replace(done[0], weight=np.zeros((3, 200, 200), np.float32))
    sampled = pictures.attention([long], [str(i) for i in range(200)])
    assert sampled.panels[0].marks[0].values.shape == (48, 48)
    assert sampled.panels[0].marks[0].rows[-1] == "199" and "48 of 200 tokens" in sampled.caption


def test_colours_end_where_a_hundredth_of_the_weights_begin(done):
    """In both ways of drawing; a first row that hears itself alone has a weight of 1."""
    for sign in (1, -1):
        weight = np.where(np.tri(40), sign * 0.1, np.nan)[None].astype(np.float32)
        weight[0, 0, 0] = 1
        picture = pictures.attention([dataclasses.replace(done[0], weight=weight)], LABELS)
        heat = picture.panels[0].marks[0]
        assert heat.most == pytest.approx(0.1)
        low = 0 if sign > 0 else -heat.most
        _, cells = interactive.draw(picture)[0].to_dict()["data"]
        assert (cells["zmin"], cells["zmax"]) == (low, heat.most)
        drawn = static.draw(picture)
        assert drawn.axes[0].images[1].get_clim() == (low, heat.most)


def test_thresholds_lie_between_kept_and_dropped(done):
    table = done[1]
    kept, dropped, line = pictures.thresholds(done, LABELS, 1, 2).panels[0].marks
    assert (kept.name, dropped.name, line.name) == ("kept", "dropped", "threshold")
    assert len(kept.x) == table.degree[2].sum()
    assert len(kept.x) + len(dropped.x) == table.visible.sum()
    limit = table.low[2]
    np.testing.assert_array_equal(line.y, limit)
    assert np.all(kept.y >= limit[kept.x.astype(int)])
    assert np.all(dropped.y < limit[dropped.x.astype(int)])
    assert kept.symbol != dropped.symbol


def test_degrees_and_density(done):
    picture = pictures.degrees(done, cylinder=1)
    visible, *layers = picture.panels[0].marks
    np.testing.assert_array_equal(visible.y, np.arange(1, 41))
    np.testing.assert_array_equal(layers[1].y, done[1].degree[1])
    np.testing.assert_array_equal(
        picture.panels[1].marks[0].values, np.stack([table.density for table in done])
    )


def test_bars_of_sparsity(done, records):
    layers = tables.layer_columns(done, tables.trajectory(records()))
    dropped, entropy = marks(pictures.sparsity(layers), Bars)
    assert dropped.labels == ["layer 0", "layer 1"]
    assert dropped.heights[1] == pytest.approx(1 - done[1].density.mean())
    assert entropy.heights[0] == pytest.approx(np.nanmean(layers["entropy_bits"][:3]))


def test_phases_and_their_steps(places):
    phase, radius, coherence, steps = pictures.phases(places).panels
    np.testing.assert_array_equal(phase.marks[2].y, places.phase[2, 0])
    np.testing.assert_array_equal(radius.marks[1].y, places.radius[1, 0])
    np.testing.assert_array_equal(coherence.marks[0].heights, places.coherence[:, 0])
    assert all(mark.y.sum() == pytest.approx(1) for mark in steps.marks)
    first = places.phase_differences[0, 0]
    at = np.argmax(steps.marks[0].y)
    width = 2 * math.pi / 36
    share = (np.abs(first - steps.marks[0].x[at]) <= width / 2).mean()
    assert steps.marks[0].y[at] == pytest.approx(share)


def test_paths_go_through_every_station(places):
    flat, deep = pictures.paths(places, LABELS).panels
    *ways, circle = flat.marks
    assert len(ways) == len(deep.marks) == pictures.PATHS and circle.name == "radius 1"
    token = evenly(40, pictures.PATHS)[3]
    np.testing.assert_array_equal(ways[3].x, places.points[:, 0, token, 0])
    assert ways[3].arrows and ways[3].name == f"{LABELS[token]} ({token})"
    np.testing.assert_array_equal(deep.marks[3].z, [0, 1, 2])


def test_radii_and_their_changes(places):
    radius, change = pictures.radii(places, LABELS).panels
    np.testing.assert_array_equal(radius.marks[0].y, places.radius[:, 0, 0])
    heat = change.marks[0]
    np.testing.assert_array_equal(heat.values, np.diff(places.radius[:, 0], axis=0))
    assert heat.diverging and heat.rows == ["input → layer 0", "layer 0 → layer 1"]
    # One station has nothing that changes.
    still = dataclasses.replace(places, points=places.points[:1], names=("layer 0",))
    assert len(pictures.radii(still, LABELS).panels) == 1


def test_similarities_stand_side_by_side(done):
    direct, orthogonal = marks(pictures.similarities(done[0], LABELS, 0, 1), Heat)
    queries, keys = done[0].queries[1], done[0].keys[1]
    np.testing.assert_allclose(direct.values, queries @ keys.T)
    cross = queries[:, None, 1] * keys[None, :, 0] - queries[:, None, 0] * keys[None, :, 1]
    np.testing.assert_allclose(orthogonal.values, cross)


def test_singular_values(make, ids):
    with torch.no_grad():
        found = tables.logit_rank(make("qfnn")(ids[None]).logits[0])
    picture = pictures.rank(found)
    line = picture.panels[0].marks[0]
    np.testing.assert_allclose(line.y[:2], found.singular_values[:2] / found.singular_values[0])
    assert "rank 2" in picture.caption and picture.panels[0].log_y


def test_training_curves_leave_gaps_out():
    curves, _ = tables.training_curves(
        ['{"step": 1, "train_loss": 3, "density": [0.1, 0.3]}', '{"step": 2, "train_loss": 2}',
         '{"step": 3, "val_loss": 2.5}']
    )  # fmt: skip
    loss, density = pictures.training(curves).panels
    assert [mark.name for mark in loss.marks] == ["train_loss", "val_loss"]
    assert loss.marks[0].x.tolist() == [1, 2] and loss.marks[0].y.tolist() == [3, 2]
    assert loss.marks[1].x.tolist() == [3]
    assert density.marks[0].y.tolist() == [0.2]
    assert pictures.training({}) is None


def test_arcs_lead_from_heard_to_hearing():
    found = {"source": np.array([1, 0]), "target": np.array([4, 2]), "weight": np.array([-2, 0.5])}
    picture = networks.attention_flow(found, LABELS)
    first, second, points = picture.panels[0].marks
    assert (first.x[0], first.x[-1]) == pytest.approx((1, 4))
    assert (first.color, first.dash, second.color, second.dash) == (1, "solid", 0, "dot")
    assert first.name == f"{LABELS[1]} (1) → {LABELS[4]} (4): -2"
    assert points.x.tolist() == [0, 1, 2, 4]
    nothing = {name: column[:0] for name, column in found.items()}
    assert len(networks.attention_flow(nothing, LABELS).panels[0].marks) == 1


def test_a_network_has_an_arrow_for_each_edge():
    found = {
        "source": np.array([3, 5]), "target": np.array([5, 3]), "weight": np.array([1.0, -0.4]),
        "pairs": np.array([2, 1]),
    }  # fmt: skip
    picture = networks.token_network(found, {3: "a", 5: "b"})
    *arrows, nodes = picture.panels[0].marks
    assert [a.name for a in arrows] == ["a → b: 1", "b → a: -0.4"] and all(a.arrows for a in arrows)
    places = networks.network_layout(found)
    np.testing.assert_array_equal(np.stack((nodes.x, nodes.y), -1), [places[3], places[5]])
    # An arrow begins at its source and stops short of its target.
    start, end = (np.array([arrows[0].x[i], arrows[0].y[i]]) for i in (0, 1))
    assert np.hypot(*(start - places[3])) < 0.02 < np.hypot(*(end - places[5]))
    nothing = {name: column[:0] for name, column in found.items()}
    assert len(networks.token_network(nothing, {}).panels[0].marks) == 1


def test_the_line_of_a_query_parts_kept_from_dropped(records, done):
    row = 30
    ellipse = boundary_ellipse(layer_pairs(records()[1], 2), row, 0.5).numpy()
    picture = networks.boundaries(done[1], LABELS, row, ellipse, 1, 2)
    one, every, boxes = picture.panels
    kept, dropped, line, query, oval = one.marks
    assert len(kept.x) == done[1].degree[2, row] and len(kept.x) + len(dropped.x) == row + 1
    direction, limit = done[1].direction[2, row], done[1].low[2, row]
    np.testing.assert_allclose(np.stack((line.x, line.y), -1) @ direction, limit, atol=1e-12)
    assert (direction @ [query.x[1], query.y[1]]) > 0 and len(oval.x) == 120
    assert sum(isinstance(m, Line) and m.dash == "dot" for m in every.marks) == row + 1
    counted = sum(
        int(m.name.split()[1]) for m in boxes.marks if m.name.endswith("keys") and ":" in m.name
    )
    assert counted == row + 1
    assert f"{done[1].band[2]:.1%}" in picture.caption
    # The gate keeps everything: there is no line.
    gate = tables.layer_table(records("qfnn")[0])
    names = [m.name for m in networks.boundaries(gate, LABELS, row).panels[0].marks]
    assert "boundary" not in names and "ellipse" not in names


SIGNS = ["$x_1$", "<b>", "&amp;", "↵"]
SAMPLE = Picture(
    "sample", "Title & $more$", "caption",
    (
        Panel(
            "points",
            (
                Points(np.array([0.0, 1, np.nan, 3]), np.array([1.0, 2, 3, 4]), labels=SIGNS,
                       hover=SIGNS, values=np.arange(4.0), scale="count"),
                Line(np.array([0.0, 2, np.nan]), np.array([1.0, 1, 2]), name="way", arrows=True,
                     dash="dot"),
                Points(np.array([5.0]), np.array([5.0]), color=None, symbol="open", name="grey"),
            ),
            "across", "up", equal=True, reach=6.0,
        ),
        Panel(
            "heat",
            (Heat(np.array([[1.0, np.nan], [-2, 0.5]]), ["r0", "r1"], SIGNS[:2], "unit",
                  diverging=True, grey=np.array([[False, True], [False, False]])),),
        ),
        Panel("bars", (Bars(["a", "b"], np.array([1.0, np.nan]), "one"),
                       Bars(["a", "b"], np.array([3.0, 4]), "two", 1)), log_y=True),
        Panel("circle", (Points(np.array([0.5]), np.array([2.0])),), kind="polar"),
        Panel("space", (Points(*np.eye(3), labels=SIGNS[:3]),
                        Line(*np.eye(3), name="deep", markers=True)), "x", "y", "z", kind="space"),
    ),
)  # fmt: skip


def test_matplotlib_draws_the_numbers():
    figure = static.draw(SAMPLE)
    axes = {a.get_title(): a for a in figure.axes if a.get_title()}
    drawn = axes["points"].collections[0].get_offsets()
    np.testing.assert_array_equal(np.ma.filled(drawn[[0, 1, 3]], np.nan), [[0, 1], [1, 2], [3, 4]])
    np.testing.assert_array_equal(axes["points"].lines[0].get_xdata(), [0, 2, np.nan])
    texts = [t.get_text() for t in axes["points"].texts]
    # The label of a point without a place is left out; an arrow has an empty text.
    assert texts == ["$x_1$", "<b>", "↵", ""]
    assert axes["points"].get_xlabel() == "across"
    grey, heat = (image.get_array() for image in axes["heat"].images)
    np.testing.assert_array_equal(np.ma.filled(heat, np.nan), [[1, np.nan], [-2, 0.5]])
    assert not grey.mask[0, 1] and grey.mask[0, 0]
    assert axes["heat"].images[1].get_clim() == (-2, 2)
    assert [t.get_text() for t in axes["heat"].get_xticklabels()] == SIGNS[:2]
    assert [bar.get_height() for bar in axes["bars"].patches][2:] == [3, 4]
    assert axes["bars"].get_yscale() == "log"
    assert axes["circle"].name == "polar" and axes["space"].name == "3d"
    content, whole = static.save(figure, "svg")
    assert whole and b"<text" not in content  # paths look the same everywhere
    assert static.save(figure, "png")[0].startswith(b"\x89PNG")
    assert static.save(static.draw(SAMPLE), "svg")[0] == content


def test_characters_without_a_glyph_are_told():
    picture = dataclasses.replace(SAMPLE, title="中", panels=SAMPLE.panels[2:3])
    assert static.save(static.draw(picture), "png")[1] is False


def test_plotly_draws_the_numbers():
    plane, heat, bars, circle, space = (f.to_dict() for f in interactive.draw(SAMPLE))
    dots, way, grey = plane["data"]
    assert dots["x"] == [0, 1, None, 3] and dots["marker"]["color"] == [0, 1, 2, 3]
    assert dots["text"] == ["$x_1$", "&lt;b&gt;", "&amp;amp;", "↵"] == dots["hovertext"]
    assert way["name"] == "way" and way["line"]["dash"] == "dot" and grey["marker"]["color"]
    (arrow,) = plane["layout"]["annotations"]
    assert (arrow["ax"], arrow["ay"], arrow["x"], arrow["y"]) == (0, 1, 2, 1)
    assert plane["layout"]["xaxis"]["range"] == [-6, 6]
    mask, cells = heat["data"]
    assert mask["z"] == [[None, 0], [None, None]] and cells["z"] == [[1, None], [-2, 0.5]]
    assert cells["zmid"] == 0 and cells["text"][1][1] == "r1 · &lt;b&gt;"
    assert heat["layout"]["yaxis"]["autorange"] == "reversed"
    assert [b["y"] for b in bars["data"]] == [[1, None], [3, 4]]
    assert circle["data"][0]["theta"] == [0.5] and circle["data"][0]["thetaunit"] == "radians"
    assert space["data"][0]["text"][1] == "<\u200bb>"  # no tag, and entities are not read there
    assert space["layout"]["scene"]["zaxis"]["title"]["text"] == "z"


def test_drawing_has_no_side_effects():
    import matplotlib
    from matplotlib import pyplot

    before, open_figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    static.draw(SAMPLE)
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == open_figures
