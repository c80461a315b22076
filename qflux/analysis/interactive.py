"""Pictures drawn by plotly: a figure for each panel, so that a page can put them where they fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..optional import require
from .picture import COLORS, GREY, Bars, Heat, Line, Panel, Picture, Points, evenly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DASHES = {"solid": "solid", "dash": "dash", "dot": "dot"}
_SYMBOLS = {"full": "circle", "open": "circle-open", "cross": "x"}
_TICKS = 24
_LEGEND = 12
SEQUENTIAL, DIVERGING = "Cividis", "PuOr"


def escape(text: str) -> str:
    """A text for plotly, which reads some HTML in texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(text: str) -> str:
    """A text for three-dimensional panels: tags are read there, too, but no character entities."""
    return text.replace("<", "<\u200b")


def draw(picture: Picture) -> list[Figure]:
    """A plotly figure for each panel; colours of text, paper and grid are left to the page.

    Raises:
        ImportError: plotly is missing; says how to install it.
    """
    objects = require("plotly.graph_objects", "interactive figures", extra="analysis")
    return [objects.Figure(data=traces(panel), layout=layout(panel)) for panel in picture.panels]


def traces(panel: Panel) -> list[dict[str, Any]]:
    """The traces of a panel, as plotly takes them."""
    found = []
    named = sum(bool(getattr(mark, "name", "")) for mark in panel.marks)
    for mark in panel.marks:
        made = {Points: _points, Line: _line, Heat: _heat, Bars: _bars}[type(mark)](mark, panel)
        for trace in made:
            shown = bool(trace.get("name")) and named <= _LEGEND
            if trace["type"] not in ("heatmap",):
                trace["showlegend"] = shown
            found.append(trace)
    return found


def layout(panel: Panel) -> dict[str, Any]:
    """The layout of a panel."""
    title = {"text": escape(panel.title), "font": {"size": 14}}
    made: dict[str, Any] = {
        "title": title,
        "margin": {"l": 50, "r": 20, "t": 40, "b": 45},
        "height": 380,
        "hovermode": "closest",
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": -0.22, "font": {"size": 11}},
        "autosize": True,
    }
    if panel.kind == "polar":
        made["polar"] = {
            "bgcolor": "rgba(0,0,0,0)",
            "angularaxis": {"thetaunit": "radians"},
            "radialaxis": {"angle": 90, "tickangle": 90},
        }
        # The circle's numbers stand between it and the title.
        made |= {"margin": {"l": 40, "r": 20, "t": 70, "b": 30}, "showlegend": False}
        return made
    if panel.kind == "space":
        names = {"xaxis": panel.x_label, "yaxis": panel.y_label, "zaxis": panel.z_label}
        made["scene"] = {
            axis: {"title": {"text": escape(name)}, "showbackground": False}
            for axis, name in names.items()
        }
        made["scene"]["camera"] = {"eye": {"x": 1.6, "y": 1.6, "z": 0.9}}
        made["margin"] = {"l": 0, "r": 0, "t": 40, "b": 0}
        return made
    axes: dict[str, Any] = {
        "xaxis": {"title": {"text": escape(panel.x_label)}, "automargin": True},
        "yaxis": {"title": {"text": escape(panel.y_label)}, "automargin": True},
    }
    if panel.log_y:
        axes["yaxis"] |= {"type": "log", "exponentformat": "power"}
    if panel.equal:
        axes["yaxis"] |= {"scaleanchor": "x", "scaleratio": 1}
    if panel.reach is not None:
        for axis in axes.values():
            axis |= {"range": [-panel.reach, panel.reach]}
    if panel.hide_axes:
        for axis in axes.values():
            axis |= {"visible": False}
    for mark in panel.marks:
        if isinstance(mark, Heat):
            axes["xaxis"] |= _ticks(mark.columns)
            axes["yaxis"] |= _ticks(mark.rows) | {"autorange": "reversed"}
            for axis in axes.values():
                axis |= {"showgrid": False, "zeroline": False}
    if any(isinstance(mark, Line) and mark.arrows for mark in panel.marks):
        made["annotations"] = [
            arrow for mark in panel.marks if isinstance(mark, Line) and mark.arrows
            for arrow in _arrows(mark)
        ]  # fmt: skip
    return made | axes


def _color(number: int | None) -> str:
    return GREY if number is None else COLORS[number % len(COLORS)]


def _numbers(values: Any) -> list[float | None]:
    """Numbers as JSON has them, to seven digits: what is not finite is no number."""
    return [
        float(f"{value:.7g}") if math.isfinite(value) else None
        for value in np.asarray(values, dtype=float).tolist()
    ]


def _places(mark: Points | Line, panel: Panel) -> dict[str, Any]:
    if panel.kind == "polar":
        return {
            "type": "scatterpolar", "theta": _numbers(mark.x), "r": _numbers(mark.y),
            "thetaunit": "radians",
        }  # fmt: skip
    made: dict[str, Any] = {"type": "scatter", "x": _numbers(mark.x), "y": _numbers(mark.y)}
    if panel.kind == "space" and mark.z is not None:
        made |= {"type": "scatter3d", "z": _numbers(mark.z)}
    return made


def _points(mark: Points, panel: Panel) -> list[dict[str, Any]]:
    made = _places(mark, panel)
    made |= {"mode": "markers", "name": escape(mark.name)}
    marker: dict[str, Any] = {"symbol": _SYMBOLS[mark.symbol], "size": 6}
    if panel.kind == "space":
        marker["size"] = 4
    if mark.values is not None:
        bar = {"title": {"text": escape(mark.scale), "side": "right"}, "thickness": 10}
        marker |= {
            "color": _numbers(mark.values), "colorscale": SEQUENTIAL, "showscale": True,
            "colorbar": bar,
        }  # fmt: skip
    else:
        marker["color"] = _color(mark.color)
    made["marker"] = marker
    if mark.hover:
        made |= {"hovertext": [escape(text) for text in mark.hover]}
    if any(mark.labels):
        made |= {
            "mode": "markers+text",
            "text": [(_plain if panel.kind == "space" else escape)(text) for text in mark.labels],
            "textposition": "top right", "textfont": {"size": 11},
        }  # fmt: skip
    return [made]


def _line(mark: Line, panel: Panel) -> list[dict[str, Any]]:
    made = _places(mark, panel)
    line = {"color": _color(mark.color), "width": 2 if panel.kind != "space" else 4}
    made |= {
        "mode": "lines+markers" if mark.markers else "lines",
        "name": escape(mark.name),
        "line": line | {"dash": _DASHES[mark.dash]},
    }
    if mark.markers:
        made["marker"] = {"size": 4, "color": line["color"]}
    if mark.closed:
        made["fill"] = "toself"
    if not mark.name:
        made["hoverinfo"] = "skip"
    return [made]


def _arrows(mark: Line) -> list[dict[str, Any]]:
    """A head for each step; plotly draws arrows as annotations."""
    x, y = _numbers(mark.x), _numbers(mark.y)
    return [
        {
            "x": x[i + 1], "y": y[i + 1], "ax": x[i], "ay": y[i], "xref": "x", "yref": "y",
            "axref": "x", "ayref": "y", "showarrow": True, "arrowhead": 2, "arrowsize": 1,
            "arrowwidth": 1.2, "arrowcolor": _color(mark.color), "text": "",
        }
        for i in range(len(x) - 1)
        if None not in (x[i], y[i], x[i + 1], y[i + 1])
    ]  # fmt: skip


def _heat(mark: Heat, panel: Panel) -> list[dict[str, Any]]:
    del panel
    made = []
    rows, columns = ([escape(text) for text in part] for part in (mark.rows, mark.columns))
    if mark.grey is not None:
        made.append(
            {
                "type": "heatmap", "z": [[0.0 if cell else None for cell in row]
                                         for row in mark.grey.tolist()],
                "colorscale": [[0, "rgba(140,140,140,0.45)"], [1, "rgba(140,140,140,0.45)"]],
                "showscale": False, "hoverinfo": "skip",
            }
        )  # fmt: skip
    values = [_numbers(row) for row in mark.values]
    scale = escape(mark.scale)
    trace: dict[str, Any] = {
        "type": "heatmap", "z": values, "colorscale": SEQUENTIAL, "hoverongaps": False,
        "colorbar": {"title": {"text": scale, "side": "right"}, "thickness": 10},
        "text": [[f"{row} · {column}" for column in columns] for row in rows]
        if len(rows) * len(columns) <= 1024 else None,
        "hovertemplate": "%{text}<br>%{z:.4g}<extra></extra>"
        if len(rows) * len(columns) <= 1024 else "row %{y}, column %{x}<br>%{z:.4g}<extra></extra>",
    }  # fmt: skip
    if mark.diverging:
        trace |= {"colorscale": DIVERGING, "zmid": 0}
    if mark.most is not None:
        trace |= {"zmin": -mark.most if mark.diverging else 0.0, "zmax": mark.most}
    made.append({name: value for name, value in trace.items() if value is not None})
    return made


def _ticks(labels: Any) -> dict[str, Any]:
    at = evenly(len(labels), _TICKS)
    turn = {"tickangle": 0} if max(map(len, labels), default=0) <= 2 else {}
    return turn | {
        "tickmode": "array", "tickvals": at.tolist(), "tickfont": {"size": 10},
        "ticktext": [escape(labels[i]) for i in at],
    }  # fmt: skip


def _bars(mark: Bars, panel: Panel) -> list[dict[str, Any]]:
    del panel
    labels = [escape(label) for label in mark.labels]
    return [
        {
            "type": "bar", "x": labels, "y": _numbers(mark.heights),
            "name": escape(mark.name), "marker": {"color": _color(mark.color)},
        }
    ]  # fmt: skip
