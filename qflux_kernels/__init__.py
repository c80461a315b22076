"""Fused kernels for the Quantum Flux network: see `interact`, `evolve` and `scores`."""

from . import reference
from .backends import BackendUnavailableError, diagnostics
from .functional import evolve, interact, scores
from .options import Evolution, Interaction, InverseGate, Radius, Threshold
from .projection import project_norm
from .version import __version__

__all__ = [
    "BackendUnavailableError",
    "Evolution",
    "Interaction",
    "InverseGate",
    "Radius",
    "Threshold",
    "__version__",
    "diagnostics",
    "evolve",
    "interact",
    "project_norm",
    "reference",
    "scores",
]
