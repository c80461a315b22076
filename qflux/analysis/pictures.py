"""From tables to pictures: those of the states of a text and of its layers.

Every function returns a `Picture` and changes nothing. Tokens come as the texts in `labels`, one
for each position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .picture import Array, Bars, Heat, Line, Panel, Picture, Points, evenly, pick
from .tables import LayerTable, LogitRank, Table, Trajectory, similarity

# Above these, what is drawn is a sample, and the title says so.
HEAT_TOKENS = 48
PANELS = 8
PATHS = 10
LINES = 20
LABELS = 24
POINTS = 400


def _hover(labels: Sequence[str], positions: Array) -> list[str]:
    return [f"{labels[int(i)]} (token {i})" for i in positions]


def _sample(shown: int, total: int, what: str = "tokens") -> str:
    return "" if shown == total else f" {shown} of {total} {what} are shown, evenly spread."


def _circle() -> Line:
    turn = np.linspace(0, 2 * math.pi, 100)
    return Line(turn, np.ones(100), name="radius 1", color=None, dash="dash")


def _labelled(labels: Sequence[str], positions: Array, limit: int = LABELS) -> list[str]:
    """Labels of an evenly spread part of the positions, "" for the rest."""
    chosen = set(evenly(len(positions), limit).tolist())
    return [labels[int(i)] if at in chosen else "" for at, i in enumerate(positions)]


def _polar(places: Trajectory, station: int, cylinder: int, labels: Sequence[str]) -> Panel:
    at = evenly(len(labels), POINTS)
    return Panel(
        places.names[station],
        (
            Points(
                places.phase[station, cylinder, at],
                places.radius[station, cylinder, at],
                labels=_labelled(labels, at),
                hover=_hover(labels, at),
                values=at.astype(float),
                scale="position",
            ),
            _circle(),
        ),
        kind="polar",
    )


def token_states(places: Trajectory, labels: Sequence[str], cylinder: int = 0) -> Picture:
    """Where the tokens of the text are after the last layer: plane, cylinder and space."""
    last, at = len(places.names) - 1, evenly(len(labels), POINTS)
    x, y = places.points[last, cylinder, at].T
    common = {
        "labels": _labelled(labels, at),
        "hover": _hover(labels, at),
        "values": at.astype(float),
        "scale": "position",
    }
    return Picture(
        "token-states",
        f"Tokens of the text on cylinder {cylinder}",
        f"The {places.kind} in {places.names[last]}, coloured by position in the text; the dashed "
        f"circle has radius 1.{_sample(len(at), len(labels))}",
        (
            Panel("plane", (Points(x, y, **common),), "x", "y", equal=True),
            _polar(places, last, cylinder, labels),
            Panel(
                "along the text",
                (Points(x, y, at.astype(float), **common),),
                "x",
                "y",
                "position",
                kind="space",
            ),
        ),
        ("states.safetensors",),
    )


def token_embedding(embedding: Array, names: Sequence[str], cylinder: int = 0) -> Picture:
    """Where the ids of the vocabulary start: `embedding` is `(C, N, 2)`, `names` of the N ids.

    The first ids and those of the largest radius are labelled.
    """
    x, y = embedding[cylinder].T
    radius, phase = np.hypot(x, y), np.arctan2(y, x)
    ids, count = np.arange(len(x)), len(x)
    wanted = {*ids[:10].tolist(), *np.argsort(-radius, kind="stable")[:10].tolist()}
    common = {
        "labels": [names[i] if i in wanted else "" for i in range(count)],
        "hover": [f"{names[i]} (id {i})" for i in range(count)],
        "values": ids.astype(float),
        "scale": "token id",
    }
    return Picture(
        "token-embedding",
        f"The vocabulary on cylinder {cylinder}",
        f"The states that {len(ids)} token ids start from, coloured by id. The first ten and the "
        "ten of largest radius are labelled.",
        (
            Panel("plane", (Points(x, y, **common),), "x", "y", equal=True),
            Panel("cylinder", (Points(phase, radius, **common), _circle()), kind="polar"),
            Panel(
                "by id",
                (Points(x, y, ids.astype(float), **common),),
                "x",
                "y",
                "token id",
                kind="space",
            ),
        ),
        ("embedding.csv",),
    )


def state_evolution(places: Trajectory, labels: Sequence[str], cylinder: int = 0) -> Picture:
    """The tokens on the cylinder before, between and after the layers."""
    stations = evenly(len(places.names), PANELS)
    return Picture(
        "state-evolution",
        f"Layer by layer on cylinder {cylinder}",
        f"The {places.kind} of the tokens, coloured by position; the dashed circle has radius 1."
        f"{_sample(len(stations), len(places.names), 'stations')}",
        tuple(_polar(places, station, cylinder, labels) for station in stations),
        ("states.safetensors",),
    )


def _weights(table: LayerTable, cylinder: int, labels: Sequence[str]) -> tuple[Heat, int, int]:
    """The heat map of a cylinder, how many tokens it shows, and of how many."""
    weight = table.weight[cylinder]
    at = evenly(len(weight), HEAT_TOKENS)
    part = weight[np.ix_(at, at)]
    visible = at[None, :] <= at[:, None]
    names = pick(labels, at)
    sizes = np.sort(np.abs(part[np.isfinite(part)]))
    # The first rows have few keys and so large weights, beside which all others look the same.
    most = sizes[int(0.99 * (len(sizes) - 1))] if len(sizes) else 0.0
    heat = Heat(
        part, names, names, "weight", diverging=bool((part < 0).any()),
        grey=visible & ~np.isfinite(part), most=float(most) if most > 0 else None,
    )  # fmt: skip
    return heat, len(at), len(weight)


def attention(tables: Sequence[LayerTable], labels: Sequence[str], cylinder: int = 0) -> Picture:
    """Which tokens each token hears, layer by layer, as heat maps."""
    panels, shown, total = [], 0, 0
    layers = evenly(len(tables), PANELS)
    for layer in layers:
        heat, shown, total = _weights(tables[layer], cylinder, labels)
        title = f"layer {layer}: keeps {tables[layer].density[cylinder]:.1%}"
        panels.append(Panel(title, (heat,), "heard token", "hearing token"))
    return Picture(
        "attention",
        f"Who hears whom on cylinder {cylinder}",
        "Rows are tokens that hear, columns tokens that are heard. Coloured pairs are kept and "
        "have the weight of the scale (the largest hundredth are of its end), grey pairs are "
        "dropped, blank ones lie in the future."
        f"{_sample(shown, total)}{_sample(len(layers), len(tables), 'layers')}",
        tuple(panels),
        ("weights.safetensors", "rows.csv"),
    )


def thresholds(
    tables: Sequence[LayerTable], labels: Sequence[str], layer: int = 0, cylinder: int = 0
) -> Picture:
    """Every pair's product with the row's threshold: what is kept lies beyond it."""
    table = tables[layer]
    at = evenly(len(labels), HEAT_TOKENS)
    product = table.direction[cylinder] @ table.keys[cylinder].T
    row = np.repeat(at, [i + 1 for i in at])
    key = np.concatenate([np.arange(i + 1) for i in at])
    value = product[row, key]
    low, high = table.low[cylinder], table.high[cylinder]
    kept = (value >= low[row]) & (value <= high[row])
    marks: list[Points | Line] = []
    for chosen, name, color, symbol in (
        (kept, "kept", 0, "full"),
        (~kept, "dropped", None, "open"),
    ):
        which = np.nonzero(chosen)[0]
        which = which[evenly(len(which), 6 * POINTS)]
        ends = zip(row[which].tolist(), key[which].tolist(), strict=True)
        hover = [f"{labels[i]} (token {i}) hears {labels[j]} (token {j})" for i, j in ends]
        marks.append(
            Points(row[which].astype(float), value[which], hover=hover, color=color,
                   symbol=symbol, name=name)
        )  # fmt: skip
    for bound, name in ((low, "threshold"), (high, "upper threshold")):
        if np.isfinite(bound[at]).any():
            finite = np.where(np.isfinite(bound[at]), bound[at], np.nan)
            marks.append(Line(at.astype(float), finite, name=name, color=1))
    return Picture(
        "thresholds",
        f"Thresholds in layer {layer}, cylinder {cylinder}",
        "A point is a pair: the position of the token that hears, and the product of its query "
        "with the key of a token that it may hear. It keeps the pairs beyond its threshold, the "
        f"line.{_sample(len(at), len(labels), 'rows')}",
        (Panel("", tuple(marks), "position of the hearing token", "product"),),
        ("rows.csv", "states.safetensors"),
    )


def degrees(tables: Sequence[LayerTable], cylinder: int = 0) -> Picture:
    """How many pairs each row keeps, and the density of layers and cylinders."""
    visible = tables[0].visible.astype(float)
    position = np.arange(len(visible), dtype=float)
    layers = evenly(len(tables), PANELS)
    lines = [Line(position, visible, name="visible", color=None, dash="dash")]
    lines += [
        Line(position, tables[layer].degree[cylinder].astype(float), name=f"layer {layer}",
             color=number)
        for number, layer in enumerate(layers)
    ]  # fmt: skip
    density = np.stack([table.density for table in tables])
    return Picture(
        "degrees",
        "How many each token hears",
        f"Left: pairs kept by each row on cylinder {cylinder}, beside those it could keep. Right: "
        f"kept pairs over visible pairs.{_sample(len(layers), len(tables), 'layers')}",
        (
            Panel("degree", tuple(lines), "position", "pairs kept"),
            _by_cylinder("density", density, "kept / visible"),
        ),
        ("rows.csv", "layers.csv"),
    )


def _by_cylinder(title: str, values: Array, scale: str, diverging: bool = False) -> Panel:
    """Numbers `(L, C)` as a heat map; bars where there is one cylinder."""
    rows = [f"layer {i}" for i in range(len(values))]
    if values.shape[1] == 1:
        return Panel(title, (Bars(rows, values[:, 0]),), "", scale)
    columns = [str(i) for i in range(values.shape[1])]
    return Panel(title, (Heat(values, rows, columns, scale, diverging),), "cylinder", "")


def sparsity(layers: Table) -> Picture:
    """Density and entropy of the weights by layer, and one against the other."""
    count, cylinders = int(layers["layer"].max()) + 1, int(layers["cylinder"].max()) + 1
    density = layers["density"].reshape(count, cylinders)
    entropy = layers["entropy_bits"].reshape(count, cylinders)
    names = [f"layer {i}" for i in range(count)]
    hover = [f"layer {a}, cylinder {b}" for a, b in
             zip(layers["layer"], layers["cylinder"], strict=True)]  # fmt: skip
    return Picture(
        "sparsity",
        "Sparsity and entropy",
        "Dropped share of the visible pairs and entropy of |weight| in a row, means over the "
        "cylinders; right: every layer and cylinder.",
        (
            Panel("dropped pairs", (Bars(names, 1 - density.mean(1)),), "", "share"),
            Panel("entropy", (Bars(names, _mean(entropy), color=1),), "", "bits"),
            Panel(
                "density and entropy",
                (Points(layers["density"], layers["entropy_bits"], hover=hover,
                        values=layers["layer"].astype(float), scale="layer"),),
                "kept / visible", "bits",
            ),
        ),
        ("layers.csv",),
    )  # fmt: skip


def _mean(values: Array) -> Array:
    """Mean over the last axis of what is finite; NaN for none."""
    count = np.isfinite(values).sum(-1)
    return np.where(count > 0, np.nansum(values, -1) / np.maximum(count, 1), np.nan)


def phases(places: Trajectory, cylinder: int = 0) -> Picture:
    """Phase and radius along the text, coherence by layer, and steps of the phase."""
    stations = evenly(len(places.names), len(PHASE_DASHES))
    position = np.arange(places.points.shape[2], dtype=float)
    edges = np.linspace(-math.pi, math.pi, 37)
    middle = (edges[1:] + edges[:-1]) / 2
    phase, radius, steps = [], [], []
    for number, station in enumerate(stations):
        name, dash = places.names[station], PHASE_DASHES[number]
        common = {"name": name, "color": number, "dash": dash}
        phase.append(Line(position, places.phase[station, cylinder], **common))
        radius.append(Line(position, places.radius[station, cylinder], **common))
        difference = places.phase_differences[station, cylinder]
        counts, _ = np.histogram(difference[np.isfinite(difference)], edges)
        steps.append(Line(middle, counts / max(1, counts.sum()), **common))
    note = _sample(len(stations), len(places.names), "stations")
    return Picture(
        "phases",
        f"Phases on cylinder {cylinder}",
        f"Phase and radius of the {places.kind} along the text, how far all phases agree "
        "(1: they are equal; random ones give 1 / tokens), and how the phase steps from a token "
        f"to the next.{note}",
        (
            Panel("phase", tuple(phase), "position", "radians"),
            Panel("radius", tuple(radius), "position", "radius"),
            _by_cylinder_at(places),
            Panel("steps of the phase", tuple(steps), "radians to the next token", "share"),
        ),
        ("states.safetensors", "layers.csv"),
    )


PHASE_DASHES = ("solid", "dash", "dot", "solid")


def _by_cylinder_at(places: Trajectory) -> Panel:
    """Coherence of every station and cylinder."""
    values = places.coherence
    rows, columns = list(places.names), [str(i) for i in range(values.shape[1])]
    if values.shape[1] == 1:
        return Panel("phase coherence", (Bars(rows, values[:, 0], color=2),), "", "coherence")
    return Panel("phase coherence", (Heat(values, rows, columns, "coherence"),), "cylinder", "")


def paths(places: Trajectory, labels: Sequence[str], cylinder: int = 0) -> Picture:
    """The way of single tokens through the layers, in the plane and in space."""
    tokens = evenly(len(labels), PATHS)
    level = np.arange(len(places.names), dtype=float)
    flat, deep = [], []
    for number, token in enumerate(tokens):
        x, y = places.points[:, cylinder, token].T
        name, dash = f"{labels[token]} ({token})", PHASE_DASHES[number // 6 % 3]
        flat.append(Line(x, y, name=name, color=number, dash=dash, arrows=True))
        deep.append(Line(x, y, level, name=name, color=number, dash=dash, markers=True))
    turn = np.linspace(0, 2 * math.pi, 100)
    flat.append(Line(np.cos(turn), np.sin(turn), name="radius 1", color=None, dash="dash"))
    return Picture(
        "paths",
        f"Paths of tokens on cylinder {cylinder}",
        f"Each arrow leads from one station ({places.names[0]} to {places.names[-1]}) of the "
        f"{places.kind} to the next.{_sample(len(tokens), len(labels))}",
        (
            Panel("plane", tuple(flat), "x", "y", equal=True),
            Panel("layer by layer", tuple(deep), "x", "y", "station", kind="space"),
        ),
        ("states.safetensors",),
    )


def radii(places: Trajectory, labels: Sequence[str], cylinder: int = 0) -> Picture:
    """Radii from layer to layer, and where they change."""
    tokens = evenly(len(labels), LINES)
    level = np.arange(len(places.names), dtype=float)
    radius = places.radius[:, cylinder]
    lines = [
        Line(level, radius[:, token], name=f"{labels[token]} ({token})", color=number,
             dash=PHASE_DASHES[number // 6 % 3], markers=True)
        for number, token in enumerate(tokens)
    ]  # fmt: skip
    panels = [Panel("radius", tuple(lines), "station", "radius")]
    if len(places.names) > 1:
        at = evenly(len(labels), HEAT_TOKENS)
        change = np.diff(radius, axis=0)[:, at]
        names = [f"{a} → {b}" for a, b in zip(places.names, places.names[1:], strict=False)]
        heat = Heat(change, names, pick(labels, at), "change of radius", diverging=True)
        panels.append(Panel("change of the radius", (heat,), "token", ""))
    return Picture(
        "radii",
        f"Radii on cylinder {cylinder}",
        f"The radius of the {places.kind} at every station, and its change from one to the next."
        f"{_sample(len(tokens), len(labels))}",
        tuple(panels),
        ("states.safetensors",),
    )


def similarities(
    table: LayerTable, labels: Sequence[str], layer: int = 0, cylinder: int = 0
) -> Picture:
    """Direct and orthogonal similarity of queries and keys, side by side."""
    at = evenly(len(labels), HEAT_TOKENS)
    names = pick(labels, at)
    direct, orthogonal = similarity(table.queries[cylinder, at], table.keys[cylinder, at])
    return Picture(
        "similarities",
        f"Direct and orthogonal similarity in layer {layer}, cylinder {cylinder}",
        "r r' cos of the phase difference, and r r' sin of it, of the query of the row with the "
        f"key of the column.{_sample(len(at), len(labels))}",
        tuple(
            Panel(
                title, (Heat(values, names, names, "similarity", diverging=True),), "key", "query"
            )
            for title, values in (("direct", direct), ("orthogonal", orthogonal))
        ),
        ("states.safetensors",),
    )


def rank(found: LogitRank) -> Picture:
    """The singular values of the logits: how many numbers they depend on."""
    values = found.singular_values
    share = values / values[0] if len(values) and values[0] > 0 else values
    index = np.arange(1, len(values) + 1, dtype=float)
    shown = np.where(share > 1e-12, share, np.nan)
    limit = np.array([1.0, max(2.0, len(values))])
    return Picture(
        "logit-rank",
        "Rank of the logits",
        f"Singular values of the logits of {found.tokens} tokens around their mean: rank "
        f"{found.rank}, as spread as {found.effective:.1f} equally large ones. A network whose "
        "output reads one point in the plane has rank 2 or 3.",
        (
            Panel(
                "", (Line(index, shown, name="singular value", markers=True),
                     Line(limit, np.full(2, 1e-5), name="counted as zero below", color=1,
                          dash="dash")),
                "number", "share of the largest", log_y=True,
            ),
        ),
        ("singular-values.csv",),
    )  # fmt: skip


def training(curves: Table) -> Picture | None:
    """Losses, radii, sparsity and speed of the run, from `metrics.jsonl`; None for no lines."""
    step = curves.get("step", np.zeros(0))
    groups = (
        ("loss", "nats per token", ("train_loss", "val_loss")),
        ("radius", "radius", ("radius_mean", "radius_std")),
        ("density and coherence", "share", ("density", "coherence", "skip")),
        ("strength", "mean row sum", ("strength",)),
        ("learning rate and gradient", "", ("learning_rate", "gradient_norm")),
        ("speed", "tokens / s", ("tokens_per_second",)),
    )
    panels = []
    for title, unit, names in groups:
        lines = []
        for number, name in enumerate(names):
            values = curves.get(name)
            if values is not None and np.isfinite(values).any():
                there = np.isfinite(values)
                lines.append(
                    Line(step[there], values[there], name=name, color=number,
                         dash=PHASE_DASHES[number], markers=int(there.sum()) < 30)
                )  # fmt: skip
        if lines:
            log = title.startswith("learning rate")
            panels.append(Panel(title, tuple(lines), "step", unit, log_y=log))
    if not panels:
        return None
    return Picture(
        "training",
        "Training",
        "What metrics.jsonl has of the run; numbers that every layer has are means over them.",
        tuple(panels),
        ("metrics.csv",),
    )
