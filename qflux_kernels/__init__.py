"""Fused kernels for the Quantum Flux network: see `interact`, `evolve` and `scores`."""

from . import options, reference
from .backends import BackendUnavailableError, diagnostics
from .cache import EvolutionCache, InteractionCache
from .functional import evolve, interact, scores
from .options import *  # noqa: F403 (what its __all__ names)
from .projection import project_norm
from .version import __version__

__all__ = [
    "BackendUnavailableError",
    "EvolutionCache",
    "InteractionCache",
    "__version__",
    "diagnostics",
    "evolve",
    "interact",
    "project_norm",
    "reference",
    "scores",
]
__all__ += options.__all__
