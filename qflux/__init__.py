"""The Quantum Flux language model on top of `qflux_kernels`."""

from .inference.generate import generate
from .models.base import LanguageModelOutput
from .models.config import QuantumFluxConfig
from .models.lm import QuantumFluxLM
from .models.presets import PRESETS, make_config, make_model
from .models.published import CylinderConfig, CylinderLM, CylinderOutput, phase_coherence
from .text.data import TextSplit, load_dataset_text, load_text, ngram_losses
from .text.vocabulary import BpeVocabulary, ByteVocabulary, CharacterVocabulary, make_vocabulary
from .train.checkpoint import load_model, save_model
from .train.hebbian import ConnectionMemory, apply_update, delta_rule
from .train.loop import TrainingResult, evaluate, train
from .train.options import TrainingOptions

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
