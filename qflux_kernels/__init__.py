"""Fused kernels for the Quantum Flux network: see `interact`, `evolve` and `scores`."""

__version__ = "0.1.0"

from . import reference
from .backends import BackendUnavailableError, diagnostics
from .functional import evolve, interact, scores
from .options import Evolution, Interaction, InverseGate, Radius, Threshold
from .projection import project_norm

__all__ = [
    "BackendUnavailableError",
    "Evolution",
    "Interaction",
    "InverseGate",
    "Radius",
    "Threshold",
    "diagnostics",
    "evolve",
    "interact",
    "project_norm",
    "reference",
    "scores",
]
