"""Named configurations, and the model that belongs to a configuration."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from qflux_kernels.checks import check_choice

from .base import CausalLM
from .config import ModelConfig, PublishedConfig, QuantumFluxConfig, read_json
from .lm import QuantumFluxLM
from .published import PublishedLM

MODELS: dict[type[ModelConfig], type[CausalLM]] = {
    QuantumFluxConfig: QuantumFluxLM,
    PublishedConfig: PublishedLM,
}

PRESETS: dict[str, tuple[type[ModelConfig], dict[str, Any]]] = {
    # The Flux document, sections 1, 2 and 5; dt_scale, dt_max, radius and skip are its program's.
    "flux": (
        PublishedConfig,
        {
            "embedding": "cardioid",
            "position": "phase",
            "score": "threshold",
            "sigma": 0.5,
            "epsilon": 1e-6,
            "timestep": "beta",
            "dt_scale": 1e-5,
            "dt_max": 0.05,
            "skip_beta": 5.0,
            "skip_center": None,
            "radius_min": 0.1,
            "radius_max": 2.0,
            "radius_rate": 0.01,
            "readout": "layers",
            "readout_norm": True,
            "coherence_weight": 0.01,
        },
    ),
    # The QFNN document, "Key Components". The text asks for mean reversion and gives no numbers: a
    # tenth of the way a layer, to the middle of the bounds.
    "qfnn": (
        PublishedConfig,
        {
            "embedding": "annulus",
            "train_embedding": True,
            "position": "none",
            "score": "inverse_gate",
            "alpha": 0.5,
            "epsilon": 1e-5,
            "timestep": "constant",
            "dt_scale": 0.1,
            "skip_beta": 10.0,
            "skip_center": 1.0,
            "radius_min": 0.5,
            "radius_max": 2.0,
            "radius_rate": 0.01,
            "radius_reversion": 0.1,
            "radius_target": 1.25,
            "readout": "last",
            "readout_norm": False,
        },
    ),
    # Recommended: many cylinders, and values beside the states.
    "lm": (QuantumFluxConfig, {}),
}
# What "lm" has up to this context, where there is less to look for.
SHORT_CONTEXT = 128
SHORT: dict[str, Any] = {"num_cylinders": 16, "value_dim": 8, "own_value": "scaled"}


def make_config(preset: str, vocab_size: int, **changes: Any) -> ModelConfig:
    """The configuration of a preset.

    "flux" is the network of the Flux document and "qfnn" that of the QFNN document, both as their
    texts say and causal, six layers of width 768 at a context of 1,024; "lm" is the one to use.
    With a `context_length` of at most 128, and unless one of them is given, its 32 cylinders with
    values of width 4 and projected own values become 16 of width 8 and scaled ones
    (`benchmarks/decisions.md`).

    Args:
        preset: "flux", "qfnn" or "lm".
        vocab_size: number of token ids, >= 1.
        changes: fields of the configuration that replace the preset's.

    Raises:
        TypeError, ValueError: no such preset, one that has no such field, or a bad value; named.
    """
    check_choice("preset", preset, tuple(PRESETS))
    kind, values = PRESETS[preset]
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ValueError(
            f"preset {preset!r} has no {', '.join(unknown)}; allowed: {', '.join(known)}"
        )
    config = kind(vocab_size=vocab_size, **{**values, **changes})
    if preset == "lm" and config.context_length <= SHORT_CONTEXT and not SHORT.keys() & changes:
        config = replace(config, **SHORT)
    return config


def make_model(config: ModelConfig) -> CausalLM:
    """A new model of that configuration.

    Raises:
        TypeError: not a configuration.
    """
    if type(config) not in MODELS:
        names = ", ".join(kind.__name__ for kind in MODELS)
        raise TypeError(f"config must be one of {names}, got {type(config).__name__}")
    return MODELS[type(config)](config)


def config_from_json(text: str) -> ModelConfig:
    """The inverse of `to_json` of any configuration; files with old names are read too.

    Raises:
        TypeError, ValueError: as `ModelConfig.from_json`, or an unknown architecture.
    """
    kinds = {kind.architecture: kind for kind in MODELS}
    name = read_json(text).get("architecture", QuantumFluxConfig.architecture)
    return kinds[check_choice("architecture", name, tuple(kinds))].from_json(text)
