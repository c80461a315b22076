"""Pictures drawn by matplotlib, for files and for services that show a run."""

from __future__ import annotations

import io
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from ..optional import require
from .picture import COLORS, GREY, Bars, Heat, Line, Panel, Picture, Points, evenly

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Both are readable without colours and by colour-blind readers.
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
_DASHES = {"solid": "-", "dash": "--", "dot": ":"}
_SYMBOLS = {"full": "o", "open": "o", "cross": "x"}
_LEGEND = 12
_TICKS = 24
# Tokens are text, dollar signs too; names in SVG files do not depend on the process.
_SETTINGS = {"text.parse_math": False, "svg.hashsalt": "qflux", "svg.fonttype": "path"}


def draw(picture: Picture) -> Figure:
    """The picture as a figure that belongs to no window and to no global state.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    matplotlib = require("matplotlib", "drawing figures", extra="analysis")
    figures = require("matplotlib.figure", "drawing figures", extra="analysis")
    columns = min(len(picture.panels), 4)
    rows = math.ceil(len(picture.panels) / max(1, columns))
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # `save` tells of characters without a glyph.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = figures.Figure(
            figsize=(4.3 * columns + 0.6, 4.1 * rows + 0.5), layout="constrained"
        )
        figure.suptitle(picture.title)
        for number, panel in enumerate(picture.panels):
            projection = {"plane": None, "polar": "polar", "space": "3d"}[panel.kind]
            axes = figure.add_subplot(rows, columns, number + 1, projection=projection)
            _draw_panel(axes, panel)
        # Once here, and not again for every file.
        engine = figure.get_layout_engine()
        assert engine is not None, "it was asked for above"
        engine.execute(figure)
        figure.set_layout_engine("none")
    return figure


def save(figure: Figure, kind: str) -> tuple[bytes, bool]:
    """The file of a figure, and whether every character had a glyph in the font.

    Args:
        figure: as `draw` makes it.
        kind: "png" or "svg".
    """
    matplotlib = require("matplotlib", "drawing figures", extra="analysis")
    stream = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure.savefig(stream, format=kind, dpi=110, metadata=metadata)
    lacking = [w for w in told if "missing from font" in str(w.message)]
    for other in told:
        if other not in lacking:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return stream.getvalue(), not lacking


def _color(number: int | None) -> str:
    return GREY if number is None else COLORS[number % len(COLORS)]


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10)
    named = 0
    bars = [mark for mark in panel.marks if isinstance(mark, Bars)]
    for mark in panel.marks:
        if isinstance(mark, Points):
            _draw_points(axes, mark)
            named += bool(mark.name)
        elif isinstance(mark, Line):
            _draw_line(axes, mark, panel)
            named += bool(mark.name)
        elif isinstance(mark, Heat):
            _draw_heat(axes, mark)
        else:
            _draw_bars(axes, mark, bars.index(mark), len(bars))
            named += bool(mark.name)
    if panel.kind == "plane":
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        if panel.equal:
            axes.set_aspect("equal", adjustable="datalim" if panel.reach is None else "box")
        if panel.log_y:
            axes.set_yscale("log")
            # The usual labels of powers are formulas, which are switched off.
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda *_: "")
        if panel.reach is not None:
            axes.set(xlim=(-panel.reach, panel.reach), ylim=(-panel.reach, panel.reach))
    elif panel.kind == "space":
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label, zlabel=panel.z_label)
    if panel.hide_axes:
        axes.set_axis_off()
    if 0 < named <= _LEGEND:
        axes.legend(fontsize=7, loc="best" if panel.kind == "plane" else "upper left")


def _draw_points(axes: Any, mark: Points) -> None:
    places = (mark.x, mark.y) if mark.z is None else (mark.x, mark.y, mark.z)
    style: dict[str, Any] = {"s": 14, "marker": _SYMBOLS[mark.symbol]}
    if mark.name:
        style["label"] = mark.name
    if mark.values is not None:
        drawn = axes.scatter(*places, c=mark.values, cmap=SEQUENTIAL, **style)
        axes.figure.colorbar(drawn, ax=axes, label=mark.scale, shrink=0.7)
    elif mark.symbol == "open":
        axes.scatter(*places, facecolors="none", edgecolors=_color(mark.color), **style)
    else:
        axes.scatter(*places, color=_color(mark.color), **style)
    for number, text in enumerate(mark.labels):
        place = [float(axis[number]) for axis in places]
        if text and all(map(math.isfinite, place)):
            if len(place) == 3:
                axes.text(*place, text, fontsize=7)
            else:
                axes.annotate(text, place, fontsize=7, xytext=(2, 2), textcoords="offset points")


def _draw_line(axes: Any, mark: Line, panel: Panel) -> None:
    color = _color(mark.color)
    style: dict[str, Any] = {"color": color, "linestyle": _DASHES[mark.dash], "linewidth": 1.2}
    if mark.name:
        style["label"] = mark.name
    if mark.markers:
        style |= {"marker": "o", "markersize": 3}
    if mark.z is not None:
        axes.plot(mark.x, mark.y, mark.z, **style)
        return
    axes.plot(mark.x, mark.y, **style)
    if mark.closed:
        axes.fill(mark.x, mark.y, color=color, alpha=0.15)
    if mark.arrows and panel.kind == "plane":
        for start in range(len(mark.x) - 1):
            ends = [(float(mark.x[i]), float(mark.y[i])) for i in (start, start + 1)]
            if all(math.isfinite(v) for end in ends for v in end):
                axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "color": color})


def _limits(mark: Heat) -> tuple[float, float]:
    finite = mark.values[np.isfinite(mark.values)]
    if not len(finite):
        return 0.0, 1.0
    if mark.most is not None:
        return -mark.most if mark.diverging else 0.0, mark.most
    if mark.diverging:
        reach = float(np.abs(finite).max()) or 1.0
        return -reach, reach
    low = min(0.0, float(finite.min()))
    return low, max(float(finite.max()), low + 1e-12)


def _draw_heat(axes: Any, mark: Heat) -> None:
    low, high = _limits(mark)
    if mark.grey is not None:
        axes.imshow(
            np.where(mark.grey, 0.75, np.nan), cmap="gray", vmin=0, vmax=1, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
    drawn = axes.imshow(
        mark.values, cmap=DIVERGING if mark.diverging else SEQUENTIAL, vmin=low, vmax=high,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.figure.colorbar(drawn, ax=axes, label=mark.scale, shrink=0.7)
    for labels, set_ticks in ((mark.columns, axes.set_xticks), (mark.rows, axes.set_yticks)):
        at = evenly(len(labels), _TICKS)
        set_ticks(at, [labels[i] for i in at], fontsize=7)


def _draw_bars(axes: Any, mark: Bars, number: int, count: int) -> None:
    width = 0.8 / count
    places = np.arange(len(mark.labels)) + (number - (count - 1) / 2) * width
    style = {"label": mark.name} if mark.name else {}
    axes.bar(places, mark.heights, width, color=_color(mark.color), **style)
    axes.set_xticks(np.arange(len(mark.labels)), mark.labels, fontsize=7)
