"""Pictures of graphs and of boundaries: who hears whom, and which line a query draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..optional import require
from .cover import tree_cover
from .picture import Array, Line, Panel, Picture, Points, evenly
from .tables import LayerTable, Table

ARCS = 120
EDGES = 60
BOUNDARIES = 40


def attention_flow(
    found: Table, labels: Sequence[str], layer: int = 0, cylinder: int = 0
) -> Picture:
    """The heaviest pairs of a layer as arcs over the text, from the heard to the hearing token.

    Args:
        found: as `tables.edges` gives them.
        labels: of the positions that the edges are among.
    """
    top = float(np.abs(found["weight"]).max()) if len(found["weight"]) else 1.0
    marks: list[Line | Points] = []
    turn = np.linspace(0, math.pi, 24)
    for source, target, weight in zip(*(found[n] for n in ("source", "target", "weight")),
                                      strict=True):  # fmt: skip
        middle, reach = (source + target) / 2, (target - source) / 2
        # Strong pairs are solid: colour is not the only difference.
        strong = abs(weight) > top / 2
        marks.append(
            Line(middle - reach * np.cos(turn), reach * np.sin(turn), arrows=False,
                 name=f"{labels[source]} ({source}) → {labels[target]} ({target}): {weight:.3g}",
                 color=0 if weight >= 0 else 1, dash="solid" if strong else "dot")
        )  # fmt: skip
    ends: list[int] = sorted({*found["source"].tolist(), *found["target"].tolist()})
    at = np.array(ends, dtype=float)
    few = set(evenly(len(at), 40).tolist())
    marks.append(
        Points(at, np.zeros(len(at)), color=None,
               labels=[labels[i] if n in few else "" for n, i in enumerate(ends)],
               hover=[f"{labels[i]} (token {i})" for i in ends])
    )  # fmt: skip
    return Picture(
        "attention-flow",
        f"The heaviest pairs in layer {layer}, cylinder {cylinder}",
        f"The {len(found['weight'])} largest weights between different tokens; an arc leads from "
        "the heard token on the left to the hearing one on the right. Solid: more than half of "
        "the largest. Orange: negative.",
        (Panel("", tuple(marks), "position", "", hide_axes=False),),
        ("edges.csv",),
    )


def network_layout(found: Table, seed: int = 0) -> dict[int, Array]:
    """Places `(2,)` of the tokens of a network: a spring layout, the same for the same edges."""
    networkx = require("networkx", "the token network", extra="analysis")
    graph = networkx.Graph()
    size = np.abs(found["weight"])
    for source, target, weight in zip(found["source"], found["target"], size, strict=True):
        before = graph.get_edge_data(int(source), int(target), {"weight": 0.0})["weight"]
        graph.add_edge(int(source), int(target), weight=before + float(weight))
    places = networkx.spring_layout(graph, seed=seed, weight="weight")
    return {node: np.asarray(place) for node, place in places.items()}


def token_network(
    found: Table, names: Mapping[int, str], layer: int = 0, cylinder: int = 0
) -> Picture:
    """Tokens of the vocabulary and the mean weights between them, as a directed graph.

    Args:
        found: as `tables.token_network` gives them.
        names: of the token ids.
    """
    places = network_layout(found)
    top = float(np.abs(found["weight"]).max()) if len(found["weight"]) else 1.0
    marks: list[Line | Points] = []
    for source, target, weight in zip(*(found[n] for n in ("source", "target", "weight")),
                                      strict=True):  # fmt: skip
        start, end = places[int(source)], places[int(target)]
        # Two arrows between the same tokens lie beside each other.
        side = np.array([start[1] - end[1], end[0] - start[0]])
        side = side / max(1e-9, float(np.hypot(*side))) * 0.012
        short = end + (start - end) * min(0.4, 0.05 / max(1e-9, float(np.hypot(*(start - end)))))
        marks.append(
            Line(*np.stack([start + side, short + side]).T, arrows=True,
                 name=f"{names[source]} → {names[target]}: {weight:.3g}",
                 color=0 if weight >= 0 else 1,
                 dash="solid" if abs(weight) > top / 2 else "dot")
        )  # fmt: skip
    nodes = sorted(places)
    at = np.stack([places[node] for node in nodes]) if nodes else np.zeros((0, 2))
    marks.append(
        Points(at[:, 0], at[:, 1], labels=[names[n] for n in nodes],
               hover=[f"{names[n]} (id {n})" for n in nodes], color=4)
    )  # fmt: skip
    return Picture(
        "token-network",
        f"Token network of layer {layer}, cylinder {cylinder}",
        f"The {len(found['weight'])} largest mean weights between tokens of the vocabulary. An "
        "arrow leads from the heard token to the hearing one; solid: more than half of the "
        "largest; orange: negative.",
        (Panel("", tuple(marks), hide_axes=True),),
        ("network.csv",),
    )


def _line(direction: Array, limit: float, reach: float) -> tuple[Array, Array] | None:
    """The ends of the line direction . k = limit, `reach` to both sides; None if there is none."""
    size = float(np.hypot(*direction))
    if not (math.isfinite(limit) and math.isfinite(size) and size > 0):
        return None
    foot = direction * limit / size**2
    along = np.array([-direction[1], direction[0]]) / size * reach
    x, y = np.stack([foot - along, foot + along]).T
    return x, y


def boundaries(
    table: LayerTable,
    labels: Sequence[str],
    row: int,
    ellipse: Array | None = None,
    layer: int = 0,
    cylinder: int = 0,
) -> Picture:
    """The line that a query draws through the keys, those of other rows, and the tree's boxes.

    Args:
        table: of the layer.
        labels: of the tokens.
        row: position of the query.
        ellipse: `(N, 2)`, see `pairs.boundary_ellipse`; None for scores without one.
    """
    keys, direction = table.keys[cylinder], table.direction[cylinder]
    low, high = table.low[cylinder], table.high[cylinder]
    seen = keys[: row + 1]
    finite = np.isfinite(seen).all(-1)
    view = 1.2 * float(np.abs(seen[finite]).max()) if finite.any() else 1.0
    reach = 3 * view
    product = seen @ direction[row]
    kept = (product >= low[row]) & (product <= high[row])
    own: list[Line | Points] = [
        Points(*seen[chosen].T, name=name, color=color, symbol=symbol,
               hover=[f"{labels[i]} (token {i})" for i in np.flatnonzero(chosen).tolist()])
        for chosen, name, color, symbol in (
            (kept & finite, "kept", 0, "full"), (~kept & finite, "dropped", None, "open"))
    ]  # fmt: skip
    for bound in (low[row], high[row]):
        ends = _line(direction[row], float(bound), reach)
        if ends is not None:
            own.append(Line(*ends, name="boundary", color=1))
    tip = direction[row] / max(1e-9, float(np.hypot(*direction[row]))) * view / 2
    own.append(
        Line(np.array([0, tip[0]]), np.array([0, tip[1]]), name="query", color=2, arrows=True)
    )
    every: list[Line | Points] = [Points(*seen[finite].T, color=None, name="keys", symbol="open")]
    rows = evenly(row + 1, BOUNDARIES)
    for number, i in enumerate(rows):
        ends = _line(direction[i], float(low[i]), reach)
        if ends is not None:
            every.append(Line(*ends, name="boundaries" if number == len(rows) - 1 else "", color=0,
                              dash="dot"))  # fmt: skip
    if ellipse is not None:
        own.append(Line(*ellipse.T, name="ellipse", color=3, dash="dash"))
        every.append(Line(*ellipse.T, name="ellipse", color=3))
    boxes = _boxes(seen[finite], direction[row], float(low[row]))
    text = f"{labels[row]} (token {row})"
    band = float(table.band[cylinder])
    return Picture(
        "boundaries",
        f"The boundary of {text} in layer {layer}, cylinder {cylinder}",
        "Left: the query keeps the keys beyond its line. Middle: the lines of the rows before it"
        + (", which touch the ellipse of mean and covariance" if ellipse is not None else "")
        + ". Right: the boxes of a tree over the keys at which the query can stop; only the keys "
        f"in crossed boxes have to be looked at. Of all visible pairs, {band:.1%} lie in the band "
        "that blocks of 64 rows with similar directions must test.",
        (
            Panel("one query", tuple(own), "x", "y", equal=True, reach=view),
            Panel("all rows", tuple(every), "x", "y", equal=True, reach=view),
            Panel("nodes of the tree", boxes, "x", "y", equal=True),
        ),
        ("states.safetensors", "rows.csv", "layers.csv"),
    )


def _boxes(keys: Array, direction: Array, limit: float) -> tuple[Line | Points, ...]:
    """The boxes of `tree_cover` with the share of keys in each kind."""
    marks: list[Line | Points] = [Points(*keys.T, color=None, symbol="open", name="keys")]
    if not (np.isfinite(direction).all() and not math.isnan(limit)):
        return tuple(marks)
    nodes = tree_cover(torch.from_numpy(keys), torch.from_numpy(direction), limit)
    named: dict[str, int] = {}
    for node in nodes:
        named[node.kind] = named.get(node.kind, 0) + node.keys
    told: set[str] = set()
    for node in nodes:
        kind = node.kind
        color, dash = {"kept": (0, "solid"), "dropped": (None, "dot"), "crossed": (1, "dash")}[kind]
        (x0, y0), (x1, y1) = node.low.tolist(), node.high.tolist()
        name = "" if kind in told else f"{kind}: {named[kind]} keys"
        told.add(kind)
        marks.append(
            Line(np.array([x0, x1, x1, x0, x0]), np.array([y0, y0, y1, y1, y0]), name=name,
                 color=color, dash=dash)
        )  # fmt: skip
    return tuple(marks)
