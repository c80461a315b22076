"""A picture as data: panels of marks with their numbers and labels, before anybody draws it.

`static.draw` makes it a matplotlib figure and `interactive.draw` figures for a browser, so that
both show the same numbers and tests can read them. Marks are compared by identity: arrays have no
one truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..text.vocabulary import Vocabulary

Array = np.ndarray
# Of Okabe and Ito, who chose them so that colour-blind readers can tell them apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# For what is there but does not count: a dropped pair, a token out of sight.
GREY = "#9a9a9a"


@dataclass(frozen=True, eq=False)
class Points:
    """Points `(N,)` each in x and y (and z), or phase in radians and radius in a polar panel.

    labels: drawn beside them; empty strings for none. hover: a text for each. values: numbers that
    colour them, named `scale`; None: the colour number `color` (None: grey). symbol: "full",
    "open" or "cross", so that colour is never the only difference.
    """

    x: Array
    y: Array
    z: Array | None = None
    labels: Sequence[str] = ()
    hover: Sequence[str] = ()
    values: Array | None = None
    scale: str = ""
    color: int | None = 0
    symbol: str = "full"
    name: str = ""


@dataclass(frozen=True, eq=False)
class Line:
    """A line through points; `arrows` points from each to the next, `closed` fills what is inside.

    dash: "solid", "dash" or "dot". markers: also mark the points.
    """

    x: Array
    y: Array
    z: Array | None = None
    name: str = ""
    color: int | None = 0
    dash: str = "solid"
    arrows: bool = False
    closed: bool = False
    markers: bool = False


@dataclass(frozen=True, eq=False)
class Heat:
    """A matrix `(R, K)` of colours, row 0 at the top; NaN is left blank.

    grey: `(R, K)` bool, cells that are shown grey: a pair that could be kept and was not.
    diverging: colours around 0. rows, columns: labels. scale: what the numbers are. most: where
    the colours end, though larger numbers may be there; None: at the largest.
    """

    values: Array
    rows: Sequence[str]
    columns: Sequence[str]
    scale: str
    diverging: bool = False
    grey: Array | None = None
    most: float | None = None


@dataclass(frozen=True, eq=False)
class Bars:
    """Bars side by side; bars of several marks in a panel stand next to one another."""

    labels: Sequence[str]
    heights: Array
    name: str = ""
    color: int = 0


Mark = Points | Line | Heat | Bars


@dataclass(frozen=True, eq=False)
class Panel:
    """Marks in one pair of axes.

    kind: "plane", "polar" or "space". equal: one unit for x and y. reach: the axes show a square of
    this half width around the origin; None: everything.
    """

    title: str
    marks: tuple[Mark, ...]
    x_label: str = ""
    y_label: str = ""
    z_label: str = ""
    kind: str = "plane"
    equal: bool = False
    log_y: bool = False
    hide_axes: bool = False
    reach: float | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """Panels with a name for files, a title, and a caption that says what one sees.

    data: names of the data files that have its numbers.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    data: tuple[str, ...] = field(default=())


def shown_text(text: str) -> str:
    """A token as it is printed: white space and control characters have signs."""
    signs = {"\n": "↵", " ": "␣", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def evenly(count: int, limit: int) -> Array:
    """At most `limit` of the numbers 0 to `count - 1`, evenly spread, both ends included."""
    if count <= limit:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, limit).round().astype(np.int64))


def pick(texts: Sequence[str], positions: Array) -> list[str]:
    """The texts at these positions."""
    return [texts[int(i)] for i in positions]


def token_labels(vocabulary: Vocabulary, ids: Iterable[int]) -> list[str]:
    """A text for each token id; a token that ends within a character has its number in hex."""
    found = []
    for number in ids:
        text = vocabulary.decode([number])
        found.append(f"[{number:02x}]" if "\ufffd" in text else shown_text(text) or f"[{number}]")
    return found
