"""States that try a kernel's corners, the scores to try them with, and a text for pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from qflux_kernels import InverseGate, Sparsemax, Threshold
from qflux_kernels.options import Score

# Signs that HTML, plotly and matplotlib read, and one without a glyph in matplotlib's font.
TEXT = 'To be中 or <b>not</b> to be: "that" & $x_1$ is\n, the question.\n'

SCORES = [
    Threshold(),
    Threshold(1.4, "row"),
    InverseGate(),
    InverseGate(-0.7, 1e-3, 1.5),
    Threshold(0.4, shrinkage="soft"),
    Threshold(-0.3, "row", 1e-3, shrinkage="soft"),
    Sparsemax(),
    Sparsemax(0.05),
]
# The weights of a soft threshold have the rounding of tau, which is that of sums over all keys: no
# budget by pairs holds it where the first key is an outlier, or where float32 overflows.
EXTREME_SCORES = [
    *(score for score in SCORES if score.kernel != "soft_threshold"),
    Threshold(0.0, "prefix", 0.0),
    Threshold(-1.0, "row", 0.0),
    Threshold(3.0),
    Threshold(math.inf),
    Threshold(-math.inf),
    InverseGate(0.0, 0.5),
    InverseGate(5.0, 1e-5, 1e5),
    Sparsemax(0.0),
    Sparsemax(-3.0),
    Sparsemax(5.0),
]


def mean_of(score: Score) -> str:
    """The reduction to a mean, or what a score has whose weights are one."""
    return "sum" if score.kind.mass else "mean"


def with_reductions(scores: list[Score]) -> list[tuple[Score, str]]:
    """Every score with each reduction that it takes."""
    return [(score, kind) for score in scores for kind in dict.fromkeys(("sum", mean_of(score)))]


REDUCED_SCORES = with_reductions(SCORES)


def score_on(device, score: Score) -> Score:
    """The score with its tensors on `device`."""
    tensors = {
        name: value.to(device) for name, value in vars(score).items() if torch.is_tensor(value)
    }
    return dataclasses.replace(score, **tensors)


def _angles(angle: torch.Tensor, radius: float | torch.Tensor = 1.0) -> torch.Tensor:
    return torch.stack((angle.cos(), angle.sin()), -1) * radius


def _equal(length: int) -> torch.Tensor:
    return torch.tensor([0.6, -0.3], dtype=torch.float64).repeat(length, 1)


def _collinear(length: int) -> torch.Tensor:
    return torch.randn(length, 1, dtype=torch.float64) * torch.tensor([0.8, -0.6])


def _clusters(length: int) -> torch.Tensor:
    side = torch.randint(2, (length, 1)) * 2.0 - 1
    return side + 1e-3 * torch.randn(length, 2, dtype=torch.float64)


def _outlier(length: int) -> torch.Tensor:
    states = torch.randn(length, 2, dtype=torch.float64)
    states[length // 2 : length // 2 + 1] *= 1e3
    return states


def _outlier_first(length: int) -> torch.Tensor:
    states = torch.randn(length, 2, dtype=torch.float64)
    states[:1] *= 1e3
    return states


def _clamped(length: int) -> torch.Tensor:
    """Radii at the two ends of the default radius rule."""
    radius = torch.where(torch.arange(length)[:, None] % 2 == 0, 0.1, 2.0)
    return _angles(torch.rand(length, dtype=torch.float64) * 2 * math.pi, radius)


def _sorted(length: int) -> torch.Tensor:
    return _angles(torch.rand(length, dtype=torch.float64).sort().values * 2 * math.pi)


def _ties(length: int) -> torch.Tensor:
    """Four directions: every score is 0, 0.5 or 1, and means of them lie on scores."""
    corners = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    return corners.repeat(length // 4 + 1, 1)[:length]


STATES = {
    "random": lambda length: torch.randn(length, 2, dtype=torch.float64),
    "equal": _equal,
    "zero": lambda length: torch.zeros(length, 2, dtype=torch.float64),
    "collinear": _collinear,
    "clusters": _clusters,
    "outlier": _outlier,
    "outlier first": _outlier_first,
    "huge": lambda length: 1e18 * torch.randn(length, 2, dtype=torch.float64),
    "large": lambda length: 1e9 * torch.randn(length, 2, dtype=torch.float64),
    "tiny": lambda length: 1e-20 * torch.randn(length, 2, dtype=torch.float64),
    "clamped": _clamped,
    "sorted": _sorted,
    "ties": _ties,
}


def _drift(length: int) -> torch.Tensor:
    """Every token a little further than all before it: windows never settle."""
    step = torch.arange(length, dtype=torch.float64)[:, None]
    return 0.1 * torch.randn(length, 2, dtype=torch.float64) + step * torch.tensor([1e-3, 2e-3])


def _with_entry(value: float) -> Callable[[int], torch.Tensor]:
    def states(length: int) -> torch.Tensor:
        points = torch.randn(length, 2, dtype=torch.float64)
        points[length // 2, 1] = value
        return points

    return states


def _zero_rows(every: int) -> Callable[[int], torch.Tensor]:
    def states(length: int) -> torch.Tensor:
        points = torch.randn(length, 2, dtype=torch.float64)
        points[::every] = 0
        return points

    return states


# What a sweep over directions and distances might get wrong, in addition to STATES.
SWEEP_STATES = STATES | {
    "drift": _drift,
    "walk": lambda length: 0.05 * torch.randn(length, 2, dtype=torch.float64).cumsum(0),
    "far from the origin": lambda length: (
        torch.randn(length, 2, dtype=torch.float64) + torch.tensor([30.0, -20.0])
    ),
    "line beside the origin": lambda length: _collinear(length) + torch.tensor([1.0, 2.0]),
    "on an axis": lambda length: torch.randn(length, 2, dtype=torch.float64) * torch.eye(2)[0],
    "two points": lambda length: torch.randn(2, 2, dtype=torch.float64)[
        torch.randint(2, (length,))
    ],
    "very far outlier": _with_entry(1e7),
    "one direction": lambda length: _angles(0.01 * torch.rand(length, dtype=torch.float64)),
    "sorted around the circle": lambda length: _angles(
        torch.linspace(0, 2 * math.pi, length, dtype=torch.float64)
    ),
    "lattice": lambda length: torch.randint(-3, 4, (length, 2)).double(),
    "zero rows": _zero_rows(3),
    "zero rows, evenly among others": _zero_rows(16),
    "radii of all sizes": lambda length: (
        torch.randn(length, 2, dtype=torch.float64)
        * torch.exp(4 * torch.randn(length, 1, dtype=torch.float64))
    ),
    "NaN": _with_entry(math.nan),
    "infinity": _with_entry(math.inf),
}


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers `(B, S, C)` in memory that is not contiguous and not aligned."""
    *_, length, width = tensor.shape
    padded = tensor.new_full((*tensor.shape[:-1], width + 3), math.nan)
    padded[..., 1 : width + 1] = tensor
    doubled = tensor.new_full((tensor.shape[0], 2 * length, width), math.nan)
    doubled[:, ::2] = tensor
    shifted = tensor.new_full((tensor.numel() + 1,), math.nan)
    shifted[1:] = tensor.flatten()
    planes = tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    return {
        "columns of a wider tensor": padded[..., 1 : width + 1],
        "every other row": doubled[:, ::2],
        "one element off": shifted[1:].view(tensor.shape),
        "planes": planes,
        "transposed": tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "flipped and back": tensor.flip(1).contiguous().flip(1),
    }
