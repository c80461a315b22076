"""The Quantum Flux language model on top of `qflux_kernels`."""

from .checkpoint import load_model, save_model
from .config import QuantumFluxConfig
from .data import (
    ByteVocabulary,
    CharacterVocabulary,
    TextSplit,
    load_text,
    make_vocabulary,
    ngram_losses,
)
from .generation import generate
from .model import LanguageModelOutput, QuantumFluxLM
from .training import TrainingOptions, TrainingResult, evaluate, train

__all__ = [
    "ByteVocabulary",
    "CharacterVocabulary",
    "LanguageModelOutput",
    "QuantumFluxConfig",
    "QuantumFluxLM",
    "TextSplit",
    "TrainingOptions",
    "TrainingResult",
    "evaluate",
    "generate",
    "load_model",
    "load_text",
    "make_vocabulary",
    "ngram_losses",
    "save_model",
    "train",
]
