"""Quantum Flux models as Hugging Face models; needs the package transformers.

Importing this module registers the model type "qflux" with `AutoConfig` and
`AutoModelForCausalLM`. `export` writes a folder that transformers reads with its tokenizer; with
`trust_remote_code=True` that works where this module was not imported, so that

    lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks ...

needs no further code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models.base import CausalLM
from .models.presets import config_from_json, make_model
from .optional import require
from .text.vocabulary import Vocabulary, to_tokenizer
from .text.windows import IGNORED_LABEL
from .train.checkpoint import load_model, write_atomically

transformers = require("transformers", "qflux.hf", extra="hf")
from transformers import PreTrainedTokenizerFast  # noqa: E402 (after the check above)
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
CODE_FILE = "modeling_qflux.py"
CODE = """from qflux.hf import QFluxConfig, QFluxForCausalLM

__all__ = ["QFluxConfig", "QFluxForCausalLM"]
"""


class QFluxConfig(transformers.PreTrainedConfig):
    """The configuration of a Quantum Flux model among Hugging Face's.

    Args:
        model: the fields of a `qflux.QuantumFluxConfig` or `qflux.CylinderConfig` with its
            `architecture`, as their `to_json` writes them.
        stand_in: what the model reads in place of the tokenizer's end-of-text token where the
            vocabulary has none: the id of a line break, as if the text began on a new line.
        kwargs: transformers' own.
    """

    model_type = "qflux"

    def __init__(
        self, model: dict[str, Any] | None = None, stand_in: int = 0, **kwargs: Any
    ) -> None:
        self.model, self.stand_in = model, stand_in
        if model is not None:
            config = self.record()
            # The names that other libraries look for.
            self.vocab_size = config.vocab_size
            self.hidden_size = config.hidden_dim
            self.num_hidden_layers = config.num_layers
            self.max_position_embeddings = config.context_length
        kwargs.setdefault("use_cache", False)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    def record(self):
        """The configuration as this library has it.

        Raises:
            ValueError: a bad field, named.
        """
        return config_from_json(json.dumps(self.model))


class QFluxForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A Quantum Flux language model with Hugging Face's interface; `.model` is the model itself.

    There is no key-value cache: generation runs the model on the last `context_length` tokens.
    """

    config_class = QFluxConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_cache_class = False

    def __init__(self, config: QFluxConfig) -> None:
        super().__init__(config)
        # On a real device even where transformers asks for "meta": it would lose the constants.
        with torch.device("cpu"):
            self.model: CausalLM = make_model(config.record())
        saved = self.state_dict()
        self._constants = {
            name: value.clone() for name, value in self.named_buffers() if name not in saved
        }
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Modules initialise themselves; constants that transformers emptied are filled again."""
        names = {id(buffer): name for name, buffer in self.named_buffers()}
        for buffer in module.buffers(recurse=False):
            if names[id(buffer)] in self._constants:
                buffer.copy_(self._constants[names[id(buffer)]])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits and, with labels, the loss.

        Args:
            input_ids: `(B, S)`. Ids from the vocabulary's size on are read as `config.stand_in`.
            attention_mask: `(B, S)`, 1 for tokens and 0 for padding on either side. A padded
                sequence gets the logits it has without padding. None: no padding.
            labels: `(B, S)`, aligned with `input_ids`; -100, padding and ids that are not the
                model's are ignored.
            return_dict: False for a tuple.

        Raises:
            ValueError: padding between tokens.
        """
        vocab_size = self.config.vocab_size
        input_ids = input_ids.masked_fill(input_ids >= vocab_size, self.config.stand_in)
        order = back = None
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -input_ids.shape[1] :].bool()
            order, back = _tokens_first(mask)
            input_ids = input_ids.masked_fill(~mask, self.config.stand_in).gather(1, order)
            if labels is not None:
                labels = labels.masked_fill(~mask, IGNORED_LABEL).gather(1, order)
        if labels is not None:
            labels = labels.masked_fill(labels >= vocab_size, IGNORED_LABEL)
        output = self.model(input_ids, labels=labels)
        logits = output.logits
        if back is not None:
            logits = logits.gather(1, back[..., None].expand_as(logits))
        if return_dict is False:
            return (logits,) if labels is None else (output.loss, logits)
        return CausalLMOutput(loss=output.loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The last `context_length` tokens, since nothing is cached."""
        window = self.config.max_position_embeddings
        return {"input_ids": input_ids[:, -window:], "attention_mask": attention_mask}

    def get_output_embeddings(self) -> torch.nn.Linear:
        """The map from features to logits."""
        return self.model.head

    def set_output_embeddings(self, head: torch.nn.Linear) -> None:
        """Replace the map from features to logits."""
        self.model.head = head


def _tokens_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `(B, S)` that turn each row so that its tokens come before its padding, and back."""
    edges = (mask[:, :-1] < mask[:, 1:]).sum(1) + mask[:, 0]
    if bool((edges > 1).any()):
        raise ValueError("attention_mask must have its ones in one piece, got zeros between them")
    position = torch.arange(mask.shape[1], device=mask.device)
    first = mask.int().argmax(1, keepdim=True)
    return (position + first) % mask.shape[1], (position - first) % mask.shape[1]


transformers.AutoConfig.register("qflux", QFluxConfig)
transformers.AutoModelForCausalLM.register(QFluxConfig, QFluxForCausalLM)


def from_model(model: CausalLM, stand_in: int = 0) -> QFluxForCausalLM:
    """A Hugging Face model with the weights of `model`, which it shares."""
    config = QFluxConfig(model=json.loads(model.config.to_json()), stand_in=stand_in)
    wrapped = QFluxForCausalLM(config)
    wrapped.model = model
    return wrapped.train(model.training)


def make_tokenizer(vocabulary: Vocabulary, context_length: int) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer with the ids of `vocabulary`.

    Its end-of-text token, which also pads, is GPT-2's where the vocabulary has it. Otherwise it is
    one id more than the model has, and `QFluxConfig.stand_in` says what the model reads for it.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=to_tokenizer(vocabulary),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def export(model_path: str | Path, output_dir: str | Path) -> None:
    """Write the model that `qflux train` left in `model_path` as a Hugging Face folder.

    Raises:
        FileNotFoundError, ValueError: as `qflux.load_model`.
    """
    model, vocabulary = load_model(model_path)
    output_dir = Path(output_dir)
    line_break = make_tokenizer(vocabulary, model.config.context_length)("\n").input_ids
    wrapped = from_model(model, stand_in=line_break[0] if line_break else 0)
    wrapped.config.auto_map = {
        "AutoConfig": f"{Path(CODE_FILE).stem}.QFluxConfig",
        "AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.QFluxForCausalLM",
    }
    wrapped.save_pretrained(output_dir)
    make_tokenizer(vocabulary, model.config.context_length).save_pretrained(output_dir)
    write_atomically(output_dir / CODE_FILE, CODE.encode())
