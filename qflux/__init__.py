"""The Quantum Flux language models on top of `qflux_kernels`.

Importing the package imports nothing else: each public name is loaded when it is first used, so
that a command line can answer before PyTorch is there.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.generate import generate as generate
    from .models.config import PublishedConfig as CylinderConfig
    from .models.config import PublishedConfig as PublishedConfig
    from .models.config import QuantumFluxConfig as QuantumFluxConfig
    from .models.embedding import phase_coherence as phase_coherence
    from .models.lm import QuantumFluxLM as QuantumFluxLM
    from .models.memory import ConnectionMemory as ConnectionMemory
    from .models.output import LanguageModelOutput as CylinderOutput
    from .models.output import LanguageModelOutput as LanguageModelOutput
    from .models.output import LayerRecord as LayerRecord
    from .models.presets import PRESETS as PRESETS
    from .models.presets import make_config as make_config
    from .models.presets import make_model as make_model
    from .models.published import PublishedLM as CylinderLM
    from .models.published import PublishedLM as PublishedLM
    from .text.data import TextSplit as TextSplit
    from .text.data import load_dataset_text as load_dataset_text
    from .text.data import load_text as load_text
    from .text.ngrams import ngram_losses as ngram_losses
    from .text.vocabulary import BpeVocabulary as BpeVocabulary
    from .text.vocabulary import ByteVocabulary as ByteVocabulary
    from .text.vocabulary import CharacterVocabulary as CharacterVocabulary
    from .text.vocabulary import make_vocabulary as make_vocabulary
    from .train.checkpoint import load_model as load_model
    from .train.checkpoint import save_model as save_model
    from .train.evaluation import evaluate as evaluate
    from .train.hebbian import apply_update as apply_update
    from .train.hebbian import delta_rule as delta_rule
    from .train.loop import TrainingOptions as TrainingOptions
    from .train.loop import TrainingResult as TrainingResult
    from .train.loop import train as train

__all__ = [
    "PRESETS",
    "BpeVocabulary",
    "ByteVocabulary",
    "CharacterVocabulary",
    "ConnectionMemory",
    "CylinderConfig",
    "CylinderLM",
    "CylinderOutput",
    "LanguageModelOutput",
    "LayerRecord",
    "PublishedConfig",
    "PublishedLM",
    "QuantumFluxConfig",
    "QuantumFluxLM",
    "TextSplit",
    "TrainingOptions",
    "TrainingResult",
    "apply_update",
    "delta_rule",
    "evaluate",
    "generate",
    "load_dataset_text",
    "load_model",
    "load_text",
    "make_config",
    "make_model",
    "make_vocabulary",
    "ngram_losses",
    "phase_coherence",
    "save_model",
    "train",
]

_HOMES = {
    ".inference.generate": ("generate",),
    ".models.config": ("PublishedConfig", "QuantumFluxConfig"),
    ".models.embedding": ("phase_coherence",),
    ".models.lm": ("QuantumFluxLM",),
    ".models.memory": ("ConnectionMemory",),
    ".models.output": ("LanguageModelOutput", "LayerRecord"),
    ".models.presets": ("PRESETS", "make_config", "make_model"),
    ".models.published": ("PublishedLM",),
    ".text.data": ("TextSplit", "load_dataset_text", "load_text"),
    ".text.ngrams": ("ngram_losses",),
    ".text.vocabulary": (
        "BpeVocabulary",
        "ByteVocabulary",
        "CharacterVocabulary",
        "make_vocabulary",
    ),
    ".train.checkpoint": ("load_model", "save_model"),
    ".train.hebbian": ("apply_update", "delta_rule"),
    ".train.evaluation": ("evaluate",),
    ".train.loop": ("TrainingOptions", "TrainingResult", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# The names that the published family had before it was called so.
_ALIASES = {
    "CylinderConfig": "PublishedConfig",
    "CylinderLM": "PublishedLM",
    "CylinderOutput": "LanguageModelOutput",
}


def __getattr__(name: str) -> Any:
    original = _ALIASES.get(name, name)
    if original not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[original], __name__), original)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A package whose public names are not replaced by subpackages of the same name.

    Importing `qflux.train.loop` binds the subpackage `train` here, in the place of the function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
