"""Everything that determines the shape and the dynamics of a model, in one checked record."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from qflux_kernels import InverseGate, Radius, Sparsemax, Threshold
from qflux_kernels.checks import check_choice, check_flag, check_integer, check_real
from qflux_kernels.options import BACKENDS, REDUCTIONS, SHRINKAGES, STATISTICS

if TYPE_CHECKING:
    from typing_extensions import Self

# The pair scores of the kernels by the names that configurations give them.
SCORES: dict[str, type[Threshold] | type[InverseGate] | type[Sparsemax]] = {
    "threshold": Threshold,
    "inverse_gate": InverseGate,
    "sparsemax": Sparsemax,
}
_DOCUMENTS_SCORES = ("threshold", "inverse_gate")
OWN_VALUES = ("projected", "scaled", "shared")
EMBEDDINGS = ("cardioid", "annulus", "learned")
POSITIONS = ("none", "phase")
TIMESTEPS = ("constant", "beta")
RADIUS_BOUNDS = ("fixed", "learned", "context")
READOUTS = ("last", "layers")

# What files written before the families and the shrinkage had their present names say.
_OLD_ARCHITECTURES = {"values": "lm", "cylinder": "published"}
_OLD_WEIGHTS = {"score": "hard", "excess": "soft"}
# A file that has one of these and no score means the one that it is an option of.
_THRESHOLD_FIELDS = ("sigma_min", "sigma_max", "shrinkage", "weight")
_told_of_old_names = False


@dataclass(frozen=True)
class ModelConfig:
    """What the configurations of both families have: sizes, the radius rule, checks and JSON.

    Args:
        vocab_size: number of token ids V, >= 1.
        num_layers: layers, >= 0; 0 leaves embedding and readout only (an ablation).
        num_cylinders: cylinders C per token, >= 1; each carries a state (radius, phase). The preset
            lm has 16 at a `context_length` of at most 128.
        hidden_dim: width H of the features that the output layer reads, >= 1.
        context_length: tokens seen at once when generating, and the default window for training,
            >= 2; the model itself accepts any length.
        score: pair score, "threshold" (the Flux document) or "inverse_gate" (the QFNN document);
            the family lm has "sparsemax" too.
        reduction: of the evolution: "mean" divides by the number of visible tokens and makes it
            independent of the length; "sum" is the documents'.
        radius_min: smallest radius, >= 0.
        radius_max: largest radius, >= radius_min.
        radius_rate: growth of a radius per unit of strength.
        radius_reversion: pull of radii towards radius_target; > 0 makes them mean-reverting.
        radius_target: radius that radius_reversion pulls towards.
        backend: of `qflux_kernels`: "auto", "cpu", "cuda", "triton" or "reference".

    Raises:
        TypeError, ValueError: naming the argument, its value and the allowed values.

    `architecture` tells the files of one family from those of the other. `choices` has the allowed
    values of every field that is a name.
    """

    architecture: ClassVar[str]
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "score": _DOCUMENTS_SCORES,
        "reduction": REDUCTIONS,
        "backend": BACKENDS,
    }

    vocab_size: int
    num_layers: int = 4
    num_cylinders: int = 1
    hidden_dim: int = 128
    context_length: int = 256
    score: str = field(default="threshold", kw_only=True)
    reduction: str = field(default="sum", kw_only=True)
    radius_min: float = field(default=0.1, kw_only=True)
    radius_max: float = field(default=2.0, kw_only=True)
    radius_rate: float = field(default=0.01, kw_only=True)
    radius_reversion: float = field(default=0.0, kw_only=True)
    radius_target: float = field(default=1.0, kw_only=True)
    backend: str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_cylinders", "hidden_dim"):
            check_integer(name, getattr(self, name), 1)
        check_integer("num_layers", self.num_layers, 0)
        check_integer("context_length", self.context_length, 2)
        for name, allowed in self.choices.items():
            check_choice(name, getattr(self, name), allowed)
        check_real("radius_min", self.radius_min, minimum=0.0)
        check_real("radius_max", self.radius_max, minimum=self.radius_min, why=" = radius_min")
        for name in ("radius_rate", "radius_reversion", "radius_target"):
            check_real(name, getattr(self, name))

    def to_json(self) -> str:
        """The configuration as a JSON object, one key a line."""
        return json.dumps({"architecture": self.architecture, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; absent keys take their defaults.

        Files with the old names of architecture and shrinkage are read too, see `read_json`.

        Raises:
            ValueError: not a JSON object, unknown or missing keys (named), or a bad value.
        """
        given = read_json(text)
        architecture = given.pop("architecture", cls.architecture)
        if architecture != cls.architecture:
            raise ValueError(f"architecture must be {cls.architecture!r}, got {architecture!r}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"unknown configuration keys {', '.join(unknown)}; allowed: {', '.join(known)}"
            )
        if "vocab_size" not in given:
            raise ValueError("the configuration lacks vocab_size")
        return cls(**given)


@dataclass(frozen=True)
class QuantumFluxConfig(ModelConfig):
    """Hyperparameters of `QuantumFluxLM`, the recommended family: those of `ModelConfig`, and more.

    Args:
        score: pair score, "sparsemax" (a threshold by mass), "threshold" (the Flux document) or
            "inverse_gate" (the QFNN document).
        reduction: of the evolution, as above; the weights of a sparsemax are a mean, and stay.
        value_dim: width of the value that a token hands to the tokens that gather it, on every
            cylinder, >= 0; 0 switches the value path off and leaves the published model, whose
            values are the states themselves. The preset lm has 8 at a `context_length` of at most
            128.
        own_value: what stands beside the values that a token gathers, for it may not keep itself:
            "projected": a projection of its own; "scaled": the input of the projections, each
            number with a learned factor; or "shared": the value that it hands to others. The preset
            lm has "scaled" at a `context_length` of at most 128.
        mlp_ratio: size of the gated MLP after the value path: it has the weights of a plain one
            this many times as wide as `hidden_dim`; 0: no MLP.
        conv_width: taps of the causal depthwise convolutions, one before the value path and one
            before the MLP; 0: none.
        evolution: whether each layer also moves the token's states by a Heun-Euler step, adds them
            to the keys and projects them into the hidden stream. Without values it always does.
        sigma_min: selectivity of the threshold in the broadest cylinder; the cylinders are spread
            linearly from there to sigma_max. At exactly 0, a row whose visible keys all score the
            same stands on its threshold, and rounding decides what it keeps.
        sigma_max: selectivity of the threshold in the sharpest cylinder, >= sigma_min.
        scale_min: scale of the mass threshold in the broadest cylinder, > 0; the cylinders start
            spread geometrically from there to scale_max, broad where they turn fast and sharp where
            they hardly turn, and each layer learns its own.
        scale_max: scale of the mass threshold in the sharpest cylinder, >= scale_min.
        frequency_min: radians that a token's position turns its phase by in the slowest cylinder,
            in (0, 1]; the cylinders start spread geometrically from 1 to there, and the model
            learns its own. A cylinder finds a token by what it is up to a distance of about
            1 / frequency.
        near_start: length of the part that queries and keys of all tokens start with in common, in
            a third of the cylinders, of frequencies from 5e-4 to 0.06, >= 0. These gather from the
            near past at first, some 20 to 150 tokens, and the model learns its own; 0: there is no
            such part.
        shrinkage: what a pair above the threshold weighs in the value path: "hard": its score,
            as in the documents; "soft": what exceeds the threshold, which does not jump there.
        alpha: weight of the orthogonal term of the inverse gate.
        dt: initial time step of the evolution in every layer and cylinder, > 0, and the `dt_scale`
            of the skip.
        skip_beta: steepness of the dynamic skip sigmoid(skip_beta * (dt - dt_scale)).
        dropout: probability of dropping an element of each residual branch in training, [0, 1).

    Raises:
        TypeError, ValueError: naming the argument, its value and the allowed values.

    Source: the Flux document, sections 1 and 5; the QFNN document, "Key Components"; values, MLP
    and convolutions are this project's.
    """

    architecture: ClassVar[str] = "lm"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **ModelConfig.choices,
        "score": tuple(SCORES),
        "shrinkage": SHRINKAGES,
        "own_value": OWN_VALUES,
    }

    num_cylinders: int = 32
    score: str = field(default="sparsemax", kw_only=True)
    value_dim: int = 4
    own_value: str = field(default="projected", kw_only=True)
    mlp_ratio: float = 4.0
    conv_width: int = 4
    evolution: bool = False
    sigma_min: float = 0.1
    sigma_max: float = 1.4
    scale_min: float = 0.005
    scale_max: float = 8.0
    frequency_min: float = 1e-5
    near_start: float = 2.0
    shrinkage: str = "soft"
    alpha: float = 0.5
    reduction: str = field(default="mean", kw_only=True)
    dt: float = 0.1
    skip_beta: float = 5.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("value_dim", "conv_width"):
            check_integer(name, getattr(self, name), 0)
        check_flag("evolution", self.evolution)
        check_real("mlp_ratio", self.mlp_ratio, minimum=0.0)
        for name in ("alpha", "skip_beta", "sigma_min"):
            check_real(name, getattr(self, name))
        check_real("sigma_max", self.sigma_max, minimum=self.sigma_min, why=" = sigma_min")
        check_real("scale_min", self.scale_min, above=0.0)
        check_real("scale_max", self.scale_max, minimum=self.scale_min, why=" = scale_min")
        check_real("frequency_min", self.frequency_min, above=0.0, maximum=1.0)
        check_real("near_start", self.near_start, minimum=0.0)
        if self.score == "sparsemax":
            defaults = {field.name: field.default for field in fields(self)}
            for name in ("sigma_min", "sigma_max", "shrinkage", "alpha"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name} is not an option of score='sparsemax', got {getattr(self, name)!r}"
                        "; give another score with it"
                    )
        check_real("dt", self.dt, above=0.0)
        check_real("dropout", self.dropout, minimum=0.0, below=1.0)


@dataclass(frozen=True)
class PublishedConfig(ModelConfig):
    """Hyperparameters of `PublishedLM`: those of `ModelConfig`, and more.

    The defaults are the Flux document's where it gives one.

    Args:
        num_cylinders: cylinders C per token, >= 1; the documents have one, and name several as a
            future direction.
        hidden_dim: width H that the states are projected to, >= 1; it is also in the distribution
            of the time step.
        context_length: tokens seen at once when generating, the default window for training, and
            the length in the distribution of the time step, >= 2; the model accepts any length.
        embedding: where tokens start, see `TokenStates`: "cardioid", "annulus" or "learned".
        train_embedding: whether gradients move a "cardioid" or "annulus"; "learned" always moves.
        phase_shift: angle of token 0 on the cardioid, radians.
        position: "phase" turns state i by its position, see `phase_frequencies`; "none".
        sigma: selectivity of the threshold in standard deviations.
        statistics: window of the threshold's statistics. "row" is the Flux document's code to the
            letter and lets the future move the threshold: losses of such a model are no losses of
            a language model. "prefix" (default) is causal.
        alpha: weight of the orthogonal term of the inverse gate.
        min_gate: pairs whose gate is not above it are dropped, >= 0.
        epsilon: inside the root of the threshold, or softening of the gate; >= 0.
        timestep: "constant" (dt_scale) or "beta", see `TimeStep`.
        dt_scale: > 0.
        dt_max: largest time step that "beta" gives, > 0.
        skip_beta: steepness of the dynamic skip, which keeps the part
            sigmoid(skip_beta * (dt - skip_center)) of the old state.
        skip_center: time step at which half of the old state is kept. The Flux document centres
            the skip on dt_scale (None, the default), the QFNN document's code on 1.
        radius_bounds: "fixed", or adaptive: "learned" or "context", see `AdaptiveBounds`.
        readout: "last" projects the states after the last layer; "layers" adds up a projection of
            its own for every layer.
        readout_norm: LayerNorm after each projection.
        coherence_weight: weight, >= 0, in the training loss of sum over layers of 1 - coherence,
            see `phase_coherence`.
        memory: keep a `ConnectionMemory` over the layers of a forward pass.
        memory_decay: what the memory keeps of a connection from layer to layer, >= 0.
        memory_strength: what a pair that fires adds, per unit of its weight.
        memory_gate: pairs fire whose weight is above it, >= 0.
        memory_cap: largest size of a connection, >= 0.
        memory_weight: factor of the connections in what is gathered.

    Raises:
        TypeError, ValueError: naming the argument, its value and the allowed values.

    Source: the Flux document, sections 1, 5, 7 and 9; the QFNN document, "Key Components" and
    "Future Directions".
    """

    architecture: ClassVar[str] = "published"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **ModelConfig.choices,
        "embedding": EMBEDDINGS,
        "position": POSITIONS,
        "statistics": STATISTICS,
        "timestep": TIMESTEPS,
        "radius_bounds": RADIUS_BOUNDS,
        "readout": READOUTS,
    }

    num_layers: int = 6
    num_cylinders: int = 1
    hidden_dim: int = 768
    context_length: int = 1024
    embedding: str = "cardioid"
    train_embedding: bool = False
    phase_shift: float = math.pi / 4
    position: str = "phase"
    sigma: float = 0.5
    statistics: str = "prefix"
    alpha: float = 0.5
    min_gate: float = 0.0
    epsilon: float = 1e-6
    timestep: str = "beta"
    dt_scale: float = 1e-5
    dt_max: float = 0.05
    skip_beta: float = 5.0
    skip_center: float | None = None
    radius_bounds: str = "fixed"
    readout: str = "layers"
    readout_norm: bool = True
    coherence_weight: float = 0.0
    memory: bool = False
    memory_decay: float = 0.99
    memory_strength: float = 0.1
    memory_gate: float = 0.1
    memory_cap: float = 0.5
    memory_weight: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_embedding", "readout_norm", "memory"):
            check_flag(name, getattr(self, name))
        for name in ("phase_shift", "sigma", "alpha", "skip_beta"):
            check_real(name, getattr(self, name))
        if self.skip_center is not None:
            check_real("skip_center", self.skip_center)
        for name in ("memory_strength", "memory_weight"):
            check_real(name, getattr(self, name))
        for name in ("min_gate", "epsilon", "coherence_weight"):
            check_real(name, getattr(self, name), minimum=0.0)
        for name in ("memory_decay", "memory_gate", "memory_cap"):
            check_real(name, getattr(self, name), minimum=0.0)
        for name in ("dt_scale", "dt_max"):
            check_real(name, getattr(self, name), above=0.0)
        if self.timestep == "beta" and self.hidden_dim < 3:
            raise ValueError(
                f"hidden_dim must be >= 3 for timestep='beta', whose first parameter is "
                f"(hidden_dim - 2) / 2, got {self.hidden_dim!r}"
            )


def radius_of(config: ModelConfig) -> Radius:
    """The radius rule of a configuration, as the kernels take it."""
    return Radius(
        min=config.radius_min,
        max=config.radius_max,
        rate=config.radius_rate,
        reversion=config.radius_reversion,
        target=config.radius_target,
    )


def score_options(config: ModelConfig, **given: Any) -> dict[str, Any]:
    """Those of the options given that the configuration's score has; the others it ignores."""
    known = {field.name for field in fields(SCORES[config.score])}
    return {name: value for name, value in given.items() if name in known}


def read_json(text: str) -> dict[str, Any]:
    """The keys of a configuration file, by their present names.

    Files with the old names, "values" and "cylinder" of the architectures and `weight` with
    "score" and "excess" of the shrinkage, are translated, with one warning in a process.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the configuration is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"the configuration must be a JSON object, got {type(given).__name__}")
    changes = []
    architecture = given.get("architecture")
    if isinstance(architecture, str) and architecture in _OLD_ARCHITECTURES:
        given["architecture"] = _OLD_ARCHITECTURES[architecture]
        changes.append(f"architecture {architecture!r} is now {given['architecture']!r}")
    if "score" not in given and any(name in given for name in _THRESHOLD_FIELDS):
        given["score"] = "threshold"
    if given.get("architecture", "lm") == "lm" and "own_value" not in given:
        given["own_value"] = "shared"  # what it was before there was a choice
    if "weight" in given and "shrinkage" not in given:
        weight = check_choice("weight", given.pop("weight"), tuple(_OLD_WEIGHTS))
        given["shrinkage"] = _OLD_WEIGHTS[weight]
        changes.append(f"weight {weight!r} is now shrinkage {given['shrinkage']!r}")
    if changes:
        _tell_of_old_names(changes)
    return given


def _tell_of_old_names(changes: list[str]) -> None:
    global _told_of_old_names
    if not _told_of_old_names:
        _told_of_old_names = True
        warnings.warn(
            f"a configuration has old names, which are still read: {'; '.join(changes)}; "
            "saving the model again writes the new names",
            FutureWarning,
            stacklevel=4,
        )
