"""Everything that determines the shape and the dynamics of a model, in one checked record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qflux_kernels.options import BACKENDS, REDUCTIONS, SHRINKAGES

from .record import Record

SCORES = ("threshold", "inverse_gate")


@dataclass(frozen=True)
class QuantumFluxConfig(Record):
    """Hyperparameters of `QuantumFluxLM`.

    Args:
        vocab_size: number of token ids V, >= 1.
        num_layers: layers, >= 0; 0 leaves embedding and readout only (an ablation).
        num_cylinders: cylinders C per token, >= 1; each carries a state (radius, phase).
        hidden_dim: width H of the hidden stream that the states are projected to, >= 1.
        context_length: tokens seen at once when generating, and the default window for training;
            the model itself accepts any length.
        value_dim: width of the value that a token hands to its listeners on every cylinder.
            0 switches the value path off and leaves the seeds' system: states alone.
        mlp_ratio: size of the gated MLP after the value path: it has the weights of a plain one
            this many times as wide as `hidden_dim`; 0: no MLP.
        conv_width: taps of the causal depthwise convolutions, one before the value path and one
            before the MLP; 0: none.
        evolution: whether each layer also moves the token's states by a Heun-Euler step, adds them
            to the keys and projects them into the hidden stream. Without values it always does.
        score: pair score of both documents, "threshold" (first) or "inverse_gate" (second).
        sigma_min, sigma_max: selectivity of the threshold, spread linearly over the cylinders. At
            exactly 0, a row whose visible keys all score the same stands on its threshold, and
            rounding decides what it keeps.
        shrinkage: what a pair above the threshold weighs in the value path: "hard": its score,
            as in the documents; "soft": what exceeds the threshold, which does not jump there.
        alpha: weight of the orthogonal term of the inverse gate.
        reduction: of the evolution: "mean" makes it independent of the length; "sum" is the seeds'.
        dt: initial time step of the evolution in every layer and cylinder, > 0, and the `dt_scale`
            of the skip.
        skip_beta: steepness of the dynamic skip sigmoid(skip_beta * (dt - dt_scale)).
        radius_min, radius_max, radius_rate, radius_reversion, radius_target: the radius rule,
            see `qflux_kernels.Radius`.
        dropout: probability of dropping an element of each residual branch in training, [0, 1).
        backend: passed to `qflux_kernels`.

    Raises:
        TypeError, ValueError: naming the argument, its value and the allowed values.

    Source: first seed, sections 1 and 5; second seed, "Key Components"; SPEC 2-5.
    """

    architecture: ClassVar[str] = "values"

    vocab_size: int
    num_layers: int = 4
    num_cylinders: int = 32
    hidden_dim: int = 128
    context_length: int = 256
    value_dim: int = 4
    mlp_ratio: float = 4.0
    conv_width: int = 4
    evolution: bool = False
    score: str = "threshold"
    sigma_min: float = 0.1
    sigma_max: float = 1.4
    shrinkage: str = "soft"
    alpha: float = 0.5
    reduction: str = "mean"
    dt: float = 0.1
    skip_beta: float = 5.0
    radius_min: float = 0.1
    radius_max: float = 2.0
    radius_rate: float = 0.01
    radius_reversion: float = 0.0
    radius_target: float = 1.0
    dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_cylinders", "hidden_dim"):
            self._check_integer(name, 1)
        self._check_integer("context_length", 2)
        for name in ("num_layers", "value_dim", "conv_width"):
            self._check_integer(name, 0)
        for name, choices in (
            ("score", SCORES),
            ("shrinkage", SHRINKAGES),
            ("reduction", REDUCTIONS),
            ("backend", BACKENDS),
        ):
            self._check_choice(name, choices)
        self._check_flag("evolution")
        for name in ("mlp_ratio", "radius_min"):
            self._check_real(name, minimum=0.0)
        for name in ("alpha", "skip_beta", "radius_rate", "radius_reversion", "radius_target"):
            self._check_real(name)
        self._check_real("sigma_min")
        self._check_real("sigma_max", minimum=self.sigma_min, why=" = sigma_min")
        self._check_real("radius_max", minimum=self.radius_min, why=" = radius_min")
        self._check_real("dt", above=0.0)
        self._check_real("dropout", minimum=0.0, below=1.0)
