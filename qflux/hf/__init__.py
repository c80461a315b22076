"""Quantum Flux models as Hugging Face models; needs the package transformers.

Importing this package registers the model type "qflux" with `AutoConfig` and
`AutoModelForCausalLM`. `export` writes a folder that transformers reads with its tokenizer; with
`trust_remote_code=True` that works where this package was not imported, so that

    lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks ...

needs no further code.
"""

from __future__ import annotations

from ..optional import require

# First, so that the message is that of a missing package and not of a missing name.
require("transformers", "qflux.hf", extra="hf")

from .cache import QFluxCache  # noqa: E402
from .export import export, from_model  # noqa: E402 (after the check above)
from .modeling import QFluxConfig, QFluxForCausalLM  # noqa: E402
from .tokenizer import END_OF_TEXT, UNKNOWN, make_tokenizer  # noqa: E402

__all__ = [
    "END_OF_TEXT",
    "UNKNOWN",
    "QFluxCache",
    "QFluxConfig",
    "QFluxForCausalLM",
    "export",
    "from_model",
    "make_tokenizer",
]
