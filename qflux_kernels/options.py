"""The options and results of the operators: what a pair scores, how radii move, what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils import _pytree

from .checks import check_choice, check_real
from .schema import SCORE_KINDS, SCORES, ScoreKind

# What `qflux_kernels` exports from here.
__all__ = ["Evolution", "Interaction", "InverseGate", "Radius", "Sparsemax", "Threshold"]

REDUCTIONS = ("sum", "mean")
STATISTICS = ("prefix", "row")
SHRINKAGES = ("hard", "soft")
ALGORITHMS = ("auto", "dense", "sweep")
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")


def check_real_or_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a real number or a real floating-point tensor."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got dtype {value.dtype}")
    else:
        check_real(name, value, finite=False)


class Score:
    """What a pair weighs. A score is a frozen dataclass; this is what every kernel asks of it.

    Each score says `kernel`, its name in `schema.SCORES`, and `coefficient`, the number of each
    sequence that the kernels differentiate. `per_sequence` names the fields that may be tensors
    which broadcast to the batch shape, and `whole_window` says that a row's statistics are over the
    whole sequence.
    """

    per_sequence: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]
    kernel: str
    coefficient: float | torch.Tensor
    eps: float = 0.0
    min_gate: float | torch.Tensor = 0.0
    whole_window: bool = False

    @property
    def kind(self) -> ScoreKind:
        """Its row in `schema.SCORE_KINDS`."""
        return SCORE_KINDS[SCORES.index(self.kernel)]


@dataclass(frozen=True)
class Threshold(Score):
    """Adaptive threshold score: keep a pair whose rescaled inner product stands out in its row.

    For row i and a visible key j (the Flux document, section 5)::

        s_ij  = (x_i . x_j + 1) / 2
        tau_i = mean_i + sigma * sqrt(var_i + eps)
        w_ij  = s_ij if s_ij >= tau_i else 0              shrinkage="hard"
        w_ij  = s_ij - tau_i if s_ij >= tau_i else 0      shrinkage="soft"

    Hard and soft thresholding are Donoho and Johnstone's terms. A hard threshold jumps: no gradient
    flows through the decision, and none reaches `sigma`. A soft one does not, and its gradient
    flows through the threshold too.

    Args:
        sigma: selectivity in standard deviations, a float or a tensor that broadcasts to the
            batch shape of the states (one value per cylinder, say). Default 0.5.
        stats: window of mean and variance. "prefix" (default): the keys the row may see.
            "row": every key of the sequence, future ones too; the document's code to the letter,
            and the same thing when `causal=False`.
        eps: added to the variance inside the root, >= 0. Default 1e-6.
        shrinkage: "hard" (default): a kept pair has its score. "soft": it has what exceeds the
            threshold.
    """

    per_sequence: ClassVar[tuple[str, ...]] = ("sigma",)
    sigma: float | torch.Tensor = 0.5
    stats: str = "prefix"
    eps: float = 1e-6
    shrinkage: str = "hard"

    def __post_init__(self) -> None:
        check_real_or_tensor("sigma", self.sigma)
        check_choice("stats", self.stats, STATISTICS)
        check_real("eps", self.eps, minimum=0.0, finite=False)
        check_choice("shrinkage", self.shrinkage, SHRINKAGES)

    @property
    def kernel(self) -> str:
        return f"{self.shrinkage}_threshold"

    @property
    def coefficient(self) -> float | torch.Tensor:
        return self.sigma

    @property
    def whole_window(self) -> bool:
        return self.stats == "row"


@dataclass(frozen=True)
class InverseGate(Score):
    """Direct plus orthogonal similarity under inverse perturbation gating.

    For row i and a visible key j::

        S_ij = r_i r_j cos(th_i - th_j) + alpha * r_i r_j sin(th_i - th_j)
        G_ij = 1 / (eps + |S_ij|)
        w_ij = S_ij * G_ij if G_ij > min_gate else 0

    No gradient flows through the decision; `alpha` given as a tensor gets its gradient.

    Args:
        alpha: weight of the orthogonal term, a float or a tensor that broadcasts to the batch
            shape of the states. Default 0.5.
        eps: softening of the gate, >= 0. Default 1e-5.
        min_gate: pairs whose gate is not above it are dropped, float or tensor like `alpha`.
            Default 0.0, which keeps every pair.
    """

    per_sequence: ClassVar[tuple[str, ...]] = ("alpha", "min_gate")
    alpha: float | torch.Tensor = 0.5
    eps: float = 1e-5
    min_gate: float | torch.Tensor = 0.0

    def __post_init__(self) -> None:
        check_real_or_tensor("alpha", self.alpha)
        check_real("eps", self.eps, minimum=0.0, finite=False)
        check_real_or_tensor("min_gate", self.min_gate)

    @property
    def kernel(self) -> str:
        return "inverse_gate"

    @property
    def coefficient(self) -> float | torch.Tensor:
        return self.alpha


@dataclass(frozen=True)
class Sparsemax(Score):
    """Threshold by mass: what a row keeps is what it takes for the weights to sum to one.

    For row i over the keys j it may see::

        z_ij  = scale * x_i . x_j
        tau_i : sum_j max(z_ij - tau_i, 0) = 1
        w_ij  = max(z_ij - tau_i, 0)

    An adaptive threshold whose selectivity is the length of the query: a long one keeps few keys, a
    short one many, where that of `Threshold` depends on the direction alone. The strength of a row
    is 1, or 0 if it sees nothing, and its degree counts w_ij > 0. The gradient is the whole one,
    with tau moving: d/dz_ij = u_ij minus the mean of the kept u, with u_ij what a unit of w_ij is
    worth. `reduction="mean"` is refused, since the weights are a mean already.

    Args:
        scale: a float or a tensor that broadcasts to the batch shape of the states (one value per
            cylinder, say) and gets a gradient. Default 1.0.

    Source: Martins and Astudillo, "From softmax to sparsemax", 2016.
    """

    per_sequence: ClassVar[tuple[str, ...]] = ("scale",)
    kernel = "sparsemax"
    scale: float | torch.Tensor = 1.0

    def __post_init__(self) -> None:
        check_real_or_tensor("scale", self.scale)

    @property
    def coefficient(self) -> float | torch.Tensor:
        return self.scale


@dataclass(frozen=True)
class Radius:
    """How one evolution step moves radii::

        r'  = max(|x'|, 1e-6)
        rho = clamp(r' + rate * strength - reversion * (r' - target), min, max)

    Args:
        min: smallest radius, >= 0. Default 0.1 (the Flux document).
        max: largest radius, >= min. Default 2.0.
        rate: growth per unit of strength. Default 0.01.
        reversion: pull towards `target` (the QFNN document's mean reversion). Default 0.0.
        target: radius that `reversion` pulls towards. Default 1.0.
    """

    min: float = 0.1
    max: float = 2.0
    rate: float = 0.01
    reversion: float = 0.0
    target: float = 1.0

    def __post_init__(self) -> None:
        check_real("min", self.min, minimum=0.0, finite=False)
        check_real("max", self.max, minimum=0.0, finite=False)
        for name in ("rate", "reversion", "target"):
            check_real(name, getattr(self, name), finite=False)
        if self.max < self.min:
            raise ValueError(f"max must be at least min = {self.min}, got {self.max!r}")


class Interaction(NamedTuple):
    """What `interact` returns, for states `(..., S, 2)` and values `(..., K, D)`.

    context: `(..., S, D)`, the weighted sum of the visible values.
    strength: `(..., S)`, the sum of the weights.
    degree: `(..., S)` int32, how many pairs were kept; no gradient.
    """

    context: torch.Tensor
    strength: torch.Tensor
    degree: torch.Tensor


class Evolution(NamedTuple):
    """What `evolve` returns, for states `(..., S, 2)`.

    states: `(..., S, 2)` after the last step.
    strength, degree: `(..., S)`, those of the first Heun stage of the last step.
    """

    states: torch.Tensor
    strength: torch.Tensor
    degree: torch.Tensor


# So that exported programs which return them can be saved.
for _kind in (Interaction, Evolution):
    _pytree._register_namedtuple(_kind, serialized_type_name=f"qflux_kernels.{_kind.__name__}")
