"""The model type "qflux" of transformers: its configuration and its causal language model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils import logging

from qflux_kernels.arguments import values_are_known

from ..inference.generate import beyond_context
from ..models.base import CausalLM
from ..models.presets import config_from_json, make_model
from ..text.windows import IGNORED_LABEL
from ..train.checkpoint import write_atomically
from .cache import CACHE_NAME, OLD_NAME, QFluxCache, padding_of

logger = logging.get_logger(__name__)

CODE_FILE = "modeling_qflux.py"
CODE = """from qflux.hf import QFluxConfig, QFluxForCausalLM

__all__ = ["QFluxConfig", "QFluxForCausalLM"]
"""
AUTO_MAP = {
    "AutoConfig": f"{Path(CODE_FILE).stem}.QFluxConfig",
    "AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.QFluxForCausalLM",
}
# Arguments of other models whose meaning is lost if they are only swallowed.
UNSUPPORTED = (
    "inputs_embeds",
    "position_ids",
    "output_attentions",
    "output_hidden_states",
)


class QFluxConfig(transformers.PreTrainedConfig):
    """The configuration of a Quantum Flux model among Hugging Face's.

    Args:
        model: the fields of a `qflux.QuantumFluxConfig` or `qflux.PublishedConfig` with its
            `architecture`, as their `to_json` writes them.
        stand_in: what the model reads for ids that it does not have: the id of a line break, as if
            a text began on a new line.
        unknown_cost: nats that a character outside the vocabulary costs. The logits then have two
            columns more than the model has ids, for the end-of-text token and for the unknown
            token, and each has this price. None (default): no such columns.
        kwargs: transformers' own.
    """

    model_type = "qflux"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        stand_in: int = 0,
        unknown_cost: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.model, self.stand_in, self.unknown_cost = model, stand_in, unknown_cost
        if model is not None:
            config = self.record()
            # The names that other libraries look for.
            self.vocab_size = config.vocab_size + (0 if unknown_cost is None else 2)
            self.hidden_size = config.hidden_dim
            self.num_hidden_layers = config.num_layers
            self.max_position_embeddings = config.context_length
            for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
                kwargs.pop(name, None)
            kwargs.pop("max_position_embeddings", None)
        kwargs.setdefault("use_cache", True)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__init__(**kwargs)

    def record(self):
        """The configuration as this library has it.

        Raises:
            ValueError: a bad field, named.
        """
        return config_from_json(json.dumps(self.model))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the configuration, and the code that `trust_remote_code=True` runs."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CODE_FILE, CODE.encode())
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: `save_pretrained` writes the code, and transformers would copy this module."""


class QFluxForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A Quantum Flux language model with Hugging Face's interface; `.model` is the model itself.

    Generation reads every token once, from a `QFluxCache` of those before it, also beyond the
    context; with `use_cache=False`, or if the model is not `cacheable`, it runs the model on the
    last `context_length` tokens.
    """

    config_class = QFluxConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    gradient_checkpointing = False
    _no_split_modules = ["EvolutionLayer", "PublishedLayer"]  # noqa: RUF012 (transformers' type)

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
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits and, with labels, the loss.

        Args:
            input_ids: `(B, S)`. Ids that the model does not have are read as `config.stand_in`.
            attention_mask: `(B, S)`, 1 for tokens and 0 for padding on either side. A padded
                sequence gets the logits it has without padding. None: no padding.
            labels: `(B, S)`, aligned with `input_ids`; -100, padding and ids that are not the
                model's are ignored, but for the unknown token, which costs `config.unknown_cost`.
            num_items_in_batch: what the summed loss is divided by, as transformers' `Trainer`
                gives it: the labels of the whole batch, of which this may be a piece. None
                (default): the labels scored here.
            return_dict: False for a tuple.
            use_cache: True: read the tokens into a `QFluxCache`, without gradients, and return it,
                unless there are labels or the model is training. None (default): only if one is
                given.
            kwargs: `cache` or `past_key_values`, its older name: a `QFluxCache` of the tokens
                before these, which join it; padding is then on the left, and `attention_mask` is of
                all tokens. Those of other models have no effect.

        Raises:
            TypeError: another cache.
            ValueError: padding between tokens (checked on the CPU), a mask of another shape, or
                an argument of other models that this one cannot follow.
        """
        cache = self._cache(kwargs, use_cache, labels)
        if cache is not None:
            if labels is not None:
                raise ValueError("labels cannot be given with a cache")
            logits = self._read_on(input_ids, attention_mask, cache, kwargs)
            if return_dict is False:
                return logits, cache
            return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})  # pyright: ignore
        input_ids, mask, order = self._arranged(input_ids, attention_mask, kwargs)
        if labels is not None and mask is not None and order is not None:
            labels = labels.masked_fill(~mask, IGNORED_LABEL).gather(1, order)
        logits, loss = self._score(input_ids, labels, num_items_in_batch)
        logits = _in_place(logits, order)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        # The class has a type in its docstring only.
        return CausalLMOutputWithPast(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]

    def _cache(
        self, others: dict[str, Any], use_cache: bool | None, labels: Tensor | None
    ) -> QFluxCache | None:
        """The cache that is given, or a new one if it is wanted and the model has one."""
        given = {name: others.pop(name, None) for name in (CACHE_NAME, OLD_NAME)}
        for name, cache in given.items():
            if isinstance(cache, QFluxCache):
                return cache
            if cache is not None:
                raise TypeError(f"{name} must be a QFluxCache, got {type(cache).__name__}")
        wanted = use_cache and labels is None and not self.training and self.model.cacheable
        return QFluxCache() if wanted else None

    def _read_on(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: QFluxCache,
        others: dict[str, Any],
    ) -> Tensor:
        """Logits `(B, S, config.vocab_size)` of tokens behind those in the cache."""
        before, new = cache.get_seq_length(), input_ids.shape[1]
        padding = padding_of(attention_mask, new, before)
        input_ids, _, _ = self._arranged(input_ids, None, others)
        length, context = before + new, self.model.config.context_length
        if length > context >= before:
            logger.warning_once(beyond_context(length, context))
        past = cache.begin(self.model, len(input_ids), padding)
        return self._with_further_columns(self.model(input_ids, cache=past).logits)

    @property
    def base_model(self) -> torch.nn.Module:
        """Token ids to what `get_output_embeddings()` reads, as other libraries call it."""
        return _Backbone(self)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """What the map to logits reads, `(B, S, H)`, with the arguments and errors of `forward`.

        But for a cache, which has to be None.
        """
        for name in (CACHE_NAME, OLD_NAME):
            if kwargs.get(name) is not None:
                raise ValueError(f"features are of whole sequences: {name} must be None")
        input_ids, _, order = self._arranged(input_ids, attention_mask, kwargs)
        return _in_place(self.model.features(input_ids), order)

    def _arranged(
        self, input_ids: Tensor, attention_mask: Tensor | None, others: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Ids `(B, S)` of the model, tokens before padding; the mask and the order they came from.

        Raises:
            ValueError: as `forward`.
        """
        for name in UNSUPPORTED:
            if others.get(name) is not None and others[name] is not False:
                raise ValueError(f"Quantum Flux models have no {name}; it must be None")
        stand_in = self.config.stand_in
        input_ids = input_ids.masked_fill(input_ids >= self.model.config.vocab_size, stand_in)
        if attention_mask is None:
            return input_ids, None, None
        mask = _checked(attention_mask, input_ids)
        order = (~mask).long().argsort(dim=1, stable=True)
        return input_ids.masked_fill(~mask, stand_in).gather(1, order), mask, order

    def _score(
        self, input_ids: Tensor, labels: Tensor | None, num_labels: int | Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `(B, S, config.vocab_size)`, and the loss if there are labels."""
        size, cost = self.model.config.vocab_size, self.config.unknown_cost
        known = unknown = None
        if labels is not None:
            known = labels.masked_fill(labels >= size, IGNORED_LABEL)
            if cost is not None:
                unknown = (labels[:, 1:] == size + 1).sum()
                if num_labels is None:
                    num_labels = (known[:, 1:] != IGNORED_LABEL).sum() + unknown
        output = self.model(input_ids, labels=known, num_labels=num_labels)
        logits, loss = output.logits, output.loss
        if cost is not None and unknown is not None:
            loss = loss + cost * unknown / num_labels
        return self._with_further_columns(logits), loss

    def _with_further_columns(self, logits: Tensor) -> Tensor:
        """The logits with those of the tokens that the model does not have."""
        cost = self.config.unknown_cost
        if cost is None:
            return logits
        further = logits.logsumexp(-1, keepdim=True) - cost  # (B, S, 1)
        return torch.cat((logits, further, further), -1)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        next_sequence_length: int | None = None,
        cache: QFluxCache | None = None,
        past_key_values: QFluxCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that are not in the cache; without one the last `context_length`."""
        cache = past_key_values if cache is None else cache
        if isinstance(cache, QFluxCache):
            new = next_sequence_length
            if attention_mask is not None:
                new = attention_mask.shape[1] - cache.get_seq_length()
            if new is not None:
                input_ids = input_ids[:, input_ids.shape[1] - new :]
            return {"input_ids": input_ids, "attention_mask": attention_mask, CACHE_NAME: cache}
        window = self.config.max_position_embeddings
        if attention_mask is not None:
            attention_mask = attention_mask[:, -window:]
        return {"input_ids": input_ids[:, -window:], "attention_mask": attention_mask}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any
    ) -> Any:
        """Put a cache of this model's own among the arguments where transformers would its."""
        if model_kwargs.get(CACHE_NAME) is not None:
            base: Any = super()
            return base._prepare_cache_for_generation(generation_config, model_kwargs, *others)
        if generation_config.use_cache is not False and self.model.cacheable:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    "cache_implementation must be None: a Quantum Flux model has a cache of its "
                    f"own, got {generation_config.cache_implementation!r}"
                )
            model_kwargs[CACHE_NAME] = QFluxCache()

    def get_input_embeddings(self) -> torch.nn.Module:
        """The module that makes states `(B, C, S, 2)` of token ids."""
        return cast("torch.nn.Module", self.model.embedding)

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the module that makes states of token ids."""
        self.model.embedding = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> torch.nn.Linear:
        """The map from features to logits."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        """Replace the map from features to logits."""
        self.model.head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        """The input embeddings, if they have that many tokens.

        Raises:
            ValueError: another number of tokens; a vocabulary is fixed when a model is made.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"the vocabulary of a Quantum Flux model is fixed: new_num_tokens must be "
                f"{self.config.vocab_size}, got {new_num_tokens!r}"
            )
        return self.get_input_embeddings()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Recompute every n-th layer in the backward pass, or no layer any more."""
        for number, layer in enumerate(self.model.layers):
            layer.__dict__.pop("forward", None)
            if enable and number % every_n_layers == 0:
                layer.forward = partial(gradient_checkpointing_func, layer.forward)
        self.gradient_checkpointing = enable

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: the configuration writes the code, and transformers would copy this module."""


class _Backbone(torch.nn.Module):
    """All of a model but its map to logits, with the output that transformers' backbones have."""

    def __init__(self, whole: QFluxForCausalLM) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Features `(B, S, H)` of token ids `(B, S)`, as `last_hidden_state`."""
        features = self.whole.features(input_ids, **kwargs)
        return BaseModelOutput(last_hidden_state=features)  # pyright: ignore[reportArgumentType]


def _in_place(values: Tensor, order: Tensor | None) -> Tensor:
    """Values `(B, S, N)` of rearranged tokens, where the tokens were."""
    if order is None:
        return values
    return values.gather(1, order.argsort(dim=1)[..., None].expand_as(values))


def _checked(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """The mask `(B, S)` as bool; it may be that of a longer sequence that ends in these tokens."""
    mask = attention_mask
    if mask.dim() == 2:
        mask = mask[:, -input_ids.shape[1] :]
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = mask.bool()
    if values_are_known(mask):
        pieces = (mask[:, :-1] < mask[:, 1:]).sum(1) + mask[:, 0]
        if bool((pieces > 1).any()):
            raise ValueError(
                "attention_mask must have its ones in one piece, got zeros between them"
            )
    return mask


transformers.AutoConfig.register("qflux", QFluxConfig)
transformers.AutoModelForCausalLM.register(QFluxConfig, QFluxForCausalLM)
