"""The Quantum Flux language model on top of `qflux_kernels`."""

from .causal_lm import LanguageModelOutput
from .checkpoint import load_model, save_model
from .config import QuantumFluxConfig
from .cylinder import CylinderConfig, CylinderLM, CylinderOutput, phase_coherence
from .data import TextSplit, load_dataset_text, load_text, ngram_losses
from .generation import generate
from .hebbian import ConnectionMemory, apply_update, delta_rule
from .model import QuantumFluxLM
from .presets import PRESETS, make_config, make_model
from .training import TrainingOptions, TrainingResult, evaluate, train
from .vocabulary import BpeVocabulary, ByteVocabulary, CharacterVocabulary, make_vocabulary

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
