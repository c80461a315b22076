"""A model's cache as transformers handles one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from qflux_kernels.arguments import values_are_known

from ..models.base import CausalLM
from ..models.cache import ModelCache

# The name that this transformers has for a cache.
OLD_NAME = "past_key_values"
CACHE_NAME = next(
    field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", OLD_NAME)
)
FILLED_BY_MODEL = "a Quantum Flux model fills its cache itself"


class WholePast(CacheLayerMixin):
    """The past of all layers, which transformers takes for that of one."""

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.past: ModelCache | None = None

    def get_seq_length(self, *_: Any) -> int:
        """Tokens so far."""
        return 0 if self.past is None else len(self.past)

    def get_max_length(self) -> int:
        """None, which is -1 here."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.past = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many tokens at the end, given as a number <= 0."""
        if self.past is not None:
            self.past.truncate(len(self.past) - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence `beam_idx[b]` was."""
        if self.past is not None:
            self.past.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at these places, given by numbers or as a mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """So many copies of each sequence."""
        if self.past is not None:
            self.reorder_cache(torch.arange(self.past.batch).repeat_interleave(repeats))

    # Layers of other models are filled by these; this one by the model.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError(FILLED_BY_MODEL)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(FILLED_BY_MODEL)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError(FILLED_BY_MODEL)


class QFluxCache(Cache):
    """What a Quantum Flux model keeps of the tokens so far.

    `model(input_ids, use_cache=True)` gives one, and `generate` makes one. `.past` is the
    `qflux.models.cache.ModelCache`, or None before the first token.
    """

    layers: list[WholePast]

    def __init__(self) -> None:
        super().__init__(layers=[WholePast()])

    @property
    def past(self) -> ModelCache | None:
        return self.layers[0].past

    def begin(self, model: CausalLM, batch: int, padding: Tensor | None) -> ModelCache:
        """The cache of a model, empty if it is the first time."""
        layer = self.layers[0]
        if layer.past is None:
            layer.past = model.new_cache(batch, padding=padding)
        return layer.past


def padding_of(mask: Tensor | None, new: int, past: int) -> Tensor | None:
    """Padding tokens in front of each sequence, `(B,)`, by an attention mask `(B, past + new)`.

    Raises:
        ValueError: a mask of another length, or zeros elsewhere.
    """
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != past + new:
        raise ValueError(
            "with a cache, attention_mask must have one column for each of the "
            f"{past} tokens in it and the {new} new ones, got shape {tuple(mask.shape)}"
        )
    mask = mask.bool()
    padding = (mask.cumsum(1) == 0).sum(1)
    if values_are_known(mask):
        if not bool((padding + mask.sum(1) == mask.shape[1]).all()):
            raise ValueError("with a cache, attention_mask must have its zeros on the left")
        if bool((padding == mask.shape[1]).any()):
            raise ValueError(
                "with a cache, each sequence must have a token among the first that are read: "
                "prefill_chunk_size must be larger than the padding"
            )
    return padding
