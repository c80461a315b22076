"""Draws the figures of docs/subquadratic.md: `python benchmarks/sweep_figures.py docs/figures`.

The states are those of 4,096 tokens after two evolution steps; thresholds, ellipse, arcs and bands
are the ones the sweep works with, recomputed here in NumPy from the formulas of csrc/math/sweep.h;
the tree is that of csrc/cpu/tree.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

from qflux_kernels import Radius, evolve

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "qflux"

from matplotlib import pyplot  # noqa: E402 (the backend is chosen first)

SIGMA, EPS = 0.5, 1e-6
KEPT, DROPPED, TESTED, ROW = "#2c7fb8", "#c8c8c8", "#d95f0e", "#222222"


def real_states() -> np.ndarray:
    states = torch.randn(4096, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [0.9, 0.5]
    ) + torch.tensor([0.25, 0.1])
    moved = evolve(states, 0.5, reduction="mean", steps=2, radius=Radius(max=1.5))
    return moved.states.double().numpy()


class Geometry:
    """Keys in front of row `middle`, their ellipse, and the thresholds of the rows behind it."""

    def __init__(self, states: np.ndarray) -> None:
        middle = len(states) // 2
        self.keys, self.rows = states[:middle], states[middle:]
        count = np.arange(1, len(states) + 1)[:, None]
        mean = states.cumsum(0) / count
        outer = (states[:, :, None] * states[:, None]).cumsum(0) / count[..., None]
        covariance = outer - mean[:, :, None] * mean[:, None]
        x = states
        spread = np.einsum("si,sij,sj->s", x, covariance, x)
        self.offset = ((x * mean).sum(-1) + SIGMA * np.sqrt(spread + 4 * EPS))[middle:]
        reference = middle + middle // 2
        self.mean = mean[reference]
        self.root = np.linalg.cholesky(covariance[reference])
        self.whitened = np.linalg.solve(self.root, (self.keys - self.mean).T).T
        direction = self.rows @ self.root
        length = np.hypot(*direction.T)
        self.angle = np.arctan2(direction[:, 1], direction[:, 0])
        self.h = (self.offset - self.rows @ self.mean) / length


def ellipse(g: Geometry, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(5.2, 5), layout="constrained")
    axes.scatter(*g.keys[::4].T, s=3, color=DROPPED, rasterized=True)
    for row, offset in list(zip(g.rows, g.offset, strict=True))[::30]:
        # The line x . k = offset, along the direction at right angles to x.
        foot = row * offset / (row @ row)
        along = np.array([-row[1], row[0]]) / np.hypot(*row)
        axes.plot(*np.stack([foot - 4 * along, foot + 4 * along]).T, color=KEPT, lw=0.4, alpha=0.6)
    turn = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    axes.plot(*(g.mean[:, None] + SIGMA * g.root @ circle), color=TESTED, lw=2)
    limit = np.abs(g.keys).max() * 1.05
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.set_title("every row's boundary touches one ellipse", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def arcs(g: Geometry, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(5.2, 5), layout="constrained")
    axes.scatter(*g.whitened[::4].T, s=3, color=DROPPED, rasterized=True)
    turn = np.linspace(0, 2 * np.pi, 200)
    axes.plot(SIGMA * np.cos(turn), SIGMA * np.sin(turn), color=TESTED, lw=2)
    low, high = np.quantile(g.h, [0.001, 0.999])
    far = [j for j in range(len(g.whitened)) if 0.7 < np.hypot(*g.whitened[j]) < 2][::170]
    for number, j in enumerate(far[:8]):
        z = g.whitened[j]
        at, radius = np.arctan2(z[1], z[0]), 3.0 + 0.14 * number
        width = [np.arccos(np.clip(h / np.hypot(*z), -1, 1)) for h in (low, high)]
        for half, colour, lw in ((width[0], TESTED, 3.5), (width[1], KEPT, 2.5)):
            span = np.linspace(at - half, at + half, 100)
            axes.plot(radius * np.cos(span), radius * np.sin(span), color=colour, lw=lw)
        axes.plot([z[0], radius * np.cos(at)], [z[1], radius * np.sin(at)], color=KEPT, lw=0.6)
        axes.plot(*z, "o", color=KEPT, ms=4)
    axes.set(xlim=(-4.3, 4.3), ylim=(-4.3, 4.3), aspect="equal")
    axes.set_title("a key is kept by the row directions in its arc", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def band(g: Geometry, path: Path) -> None:
    """One block of 64 rows, next to each other in direction."""
    order = np.argsort(g.angle)
    inner = (g.h > np.quantile(g.h, 0.002)) & (g.h < np.quantile(g.h, 0.998))
    block = [i for i in order if inner[i]][640:704]
    low, high = g.h[inner].min(), g.h[inner].max()
    directions = np.stack([np.cos(g.angle[block]), np.sin(g.angle[block])])
    reach = g.whitened @ directions
    kept, dropped = reach.min(1) >= high, reach.max(1) < low
    tested = ~(kept | dropped)
    figure, axes = pyplot.subplots(figsize=(5.2, 5), layout="constrained")
    for chosen, colour, name in (
        (dropped, DROPPED, "dropped by all 64 rows"),
        (kept, KEPT, "kept by all"),
        (tested, TESTED, "tested pair by pair"),
    ):
        label = f"{name}: {chosen.mean():.1%}"
        axes.scatter(*g.whitened[chosen].T, s=5, color=colour, label=label, rasterized=True)
    for u in directions.T[::63]:
        axes.plot([0, 4 * u[0]], [0, 4 * u[1]], color=ROW, lw=0.8)
    axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    axes.legend(loc="lower left", fontsize=8)
    axes.set_title("what a block of rows makes of the keys", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


LEAF, FAN = 32, 4


def hilbert(x: int, y: int, bits: int) -> int:
    place = 0
    for bit in reversed(range(bits)):
        right, top = x >> bit & 1, y >> bit & 1
        place = place << 2 | (3 * right) ^ top
        if not top:
            if right:
                x, y = ~x, ~y
            x, y = y, x
    return place


def rectangle(points: np.ndarray) -> np.ndarray:
    """The corners of a rectangle along the points' main direction or along the axes."""
    best: tuple[float, np.ndarray] = np.inf, points
    for axes in (np.eye(2), np.linalg.eigh(np.cov(points.T))[1]):
        low, high = (points @ axes).min(0), (points @ axes).max(0)
        corners = np.array([low, [high[0], low[1]], high, [low[0], high[1]]]) @ axes.T
        best = min(best, ((high - low).sum(), corners), key=lambda found: found[0])
    return best[1]


def tree(g: Geometry, path: Path) -> None:
    """What one sparsemax row asks of the tree over the keys."""
    ranks = g.keys.argsort(0).argsort(0)
    keys = g.keys[np.argsort([hilbert(int(x), int(y), 11) for x, y in ranks])]
    q = 0.01 * np.array([0.8, 0.6])
    ordered = np.sort(keys @ q)[::-1]
    kept = ordered * np.arange(1, len(keys) + 1) > ordered.cumsum() - 1
    tau = (ordered[kept].sum() - 1) / kept.sum()
    figure, axes = pyplot.subplots(figsize=(5.2, 5), layout="constrained")
    axes.scatter(*keys.T, s=3, color=DROPPED, rasterized=True)
    count = {KEPT: 0, TESTED: 0}

    def visit(first: int, size: int) -> None:
        corners = rectangle(keys[first : first + size])
        reach = corners @ q
        if reach.max() < tau:
            return
        whole = reach.min() > tau
        if not whole and size > LEAF:
            for child in range(first, first + size, size // FAN):
                visit(child, size // FAN)
            return
        colour = KEPT if whole else TESTED
        count[colour] += 1
        axes.fill(*corners.T, facecolor=colour, edgecolor=colour, alpha=0.3, lw=0.8)

    root = LEAF
    while root * FAN <= len(keys):
        root *= FAN
    for first in range(0, len(keys), root):
        visit(first, root)
    foot, along = q * tau / (q @ q), np.array([-q[1], q[0]]) / np.hypot(*q)
    axes.plot(*np.stack([foot - 4 * along, foot + 4 * along]).T, color=ROW, lw=1)
    for colour, name in ((KEPT, "nodes kept whole"), (TESTED, "leaves met pair by pair")):
        axes.fill([], [], facecolor=colour, alpha=0.4, label=f"{name}: {count[colour]}")
    limit = np.abs(keys).max() * 1.05
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.legend(loc="lower left", fontsize=8)
    axes.set_title(f"one row keeps {kept.sum()} of {len(keys):,} keys", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    geometry = Geometry(real_states())
    for draw in (ellipse, arcs, band):
        draw(geometry, folder / f"sweep-{draw.__name__}.svg")
    tree(geometry, folder / "tree-walk.svg")


if __name__ == "__main__":
    main()
