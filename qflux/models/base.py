"""What every causal language model here has: checked ids, the shifted loss, generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qflux_kernels.arguments import values_are_known
from qflux_kernels.checks import check_integer

from ..inference.generate import generate
from ..parallel import current_split
from ..text.windows import IGNORED_LABEL
from .cache import ModelCache, checked_padding
from .config import ModelConfig
from .constants import fill_after_loading
from .output import LanguageModelOutput, LayerRecord

# Tokens of a prompt that are read at once.
PREFILL_CHUNK = 4096


class Reading(NamedTuple):
    """What `logits_of` reads, and what comes with it.

    outputs: tensors `(..., S, N)`. layers: a record of each layer, or `()` if they were not asked
    for. penalties: terms without dimensions that the training loss has beside the cross entropy.
    """

    outputs: tuple[Tensor, ...]
    layers: tuple[LayerRecord, ...] = ()
    penalties: tuple[Tensor, ...] = ()


class CausalLM(nn.Module, ABC):
    """A model whose logits at a position depend on the tokens up to that position only.

    Subclasses have a `head`, the linear map from features to logits, `layers`, and `read`, whose
    outputs `features_of` and `logits_of` go on from.
    """

    head: nn.Linear
    layers: nn.ModuleList

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_load_state_dict_post_hook(fill_after_loading)

    @abstractmethod
    def read(
        self,
        input_ids: Tensor,
        return_layers: bool = False,
        cache: ModelCache | None = None,
        position: Tensor | None = None,
    ) -> Reading:
        """Run embedding and layers on checked token ids `(B, S)`.

        With a cache these are the tokens behind those in it, at positions `(S,)` or `(B, S)`.
        """

    def read_token(self, input_ids: Tensor, cache: ModelCache) -> tuple[Tensor, ...] | None:
        """The outputs of `read` for tokens behind those in a cache, by a faster way.

        None, and nothing has happened, where there is none, or where ids are to be refused.
        """
        return None

    def features_of(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """What the head reads, `(B, S, H)`, from the outputs of `read`."""
        return outputs[0]

    def logits_of(self, outputs: tuple[Tensor, ...], cache: ModelCache | None = None) -> Tensor:
        """Logits `(B, S, V)` from the outputs of `read`; `cache` is the one that it was given."""
        return self.head(self.features_of(outputs))

    @property
    def cacheable(self) -> bool:
        """Whether the model has a cache: later tokens leave what earlier ones did as it is."""
        return True

    def receptive_field(self) -> int:
        """How many tokens before it the inputs of a token's convolutions depend on, at most."""
        return 0

    def new_cache(
        self, batch: int, *, capacity: int | None = None, padding: Tensor | None = None
    ) -> ModelCache:
        """An empty cache for `batch` sequences, on the device and in the dtype of the model.

        It takes the scores as they are now: a model whose weights change needs a new cache.

        Args:
            batch: sequences, >= 1.
            capacity: tokens to make room for at once; None (default): a few.
            padding: `(batch,)` integers >= 0: so many tokens in front of each sequence are
                padding, as if it began behind them. None (default): none.

        Raises:
            TypeError, ValueError: a bad argument, named.
        """
        check_integer("batch", batch, 1)
        weight = self.head.weight
        padding = checked_padding(padding, batch, weight.device)
        options = {
            "batch_shape": (batch, self.config.num_cylinders),
            "dtype": weight.dtype,
            "device": weight.device,
            "capacity": capacity,
            "padding": padding,
        }
        modules: Any = self.layers
        layers = [layer.new_cache(**options) for layer in modules]
        return ModelCache(layers, batch, padding, self.receptive_field(), weight.device)

    @torch.no_grad()
    def _read_on(self, input_ids: Tensor, cache: ModelCache) -> Reading:
        """Read the tokens behind those in the cache, which they join."""
        with cache.replay() as again:
            if again is not None:
                self.read(again[0], cache=cache, position=again[1])
        with cache.reading(input_ids) as position:
            return self.read(input_ids, cache=cache, position=position)

    def prefill(self, input_ids: Tensor, cache: ModelCache, chunk: int = PREFILL_CHUNK) -> Tensor:
        """Read prompts into a cache, and give the logits of the token behind them, `(B, V)`.

        Args:
            input_ids: `(B, S)`, S >= 1.
            cache: of the tokens before these, which join it.
            chunk: tokens to read at once, >= 1, which bounds the memory. Default 4,096.

        Raises:
            TypeError, ValueError: as `forward`; the cache is then as it was.
        """
        check_integer("chunk", chunk, 1)
        outputs = self.read_token(input_ids, cache)
        if outputs is None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
            before, outputs = len(cache), ()
            try:
                for part in input_ids.split(chunk, 1):
                    outputs = self._read_on(part, cache).outputs
            except BaseException:
                cache.truncate(before)
                raise
        with torch.no_grad():
            last = tuple(output[..., -1:, :] for output in outputs)
            return self.logits_of(last, cache)[:, 0]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        return_layers: bool = False,
        num_labels: int | Tensor | None = None,
        cache: ModelCache | None = None,
    ) -> LanguageModelOutput:
        """Logits of the next token at every position, and the losses if there are labels.

        Args:
            input_ids: `(B, S)` integer token ids in [0, V), S >= 1.
            labels: `(B, S)`, aligned with `input_ids` and usually the same tensor: the shift by
                one token happens here, so that position i is scored against label i + 1. Labels
                of -100 are ignored. None (default): no losses.
            return_layers: also return a `LayerRecord` of each layer. Default False, which costs
                nothing.
            num_labels: for a batch that comes in pieces, the number of labels that are scored in
                all of it: the losses of the pieces then add up to that of the batch. None
                (default): those of this piece.
            cache: of the tokens before these (`new_cache`), which these join: the logits are those
                of these tokens behind the others. No gradient is recorded then, and there are no
                labels and no records. None (default): there are no tokens before these.

        Where sequences are split over ranks (`qflux.parallel.context_parallel`), ids, labels and
        logits are this rank's part, and its losses its share: the ranks' add up to the whole.

        Raises:
            TypeError, ValueError: wrong dtype, shape or (checked on the CPU) token ids.
        """
        if cache is not None and labels is None and not return_layers:
            outputs = self.read_token(input_ids, cache)
            if outputs is not None:
                return self._told(outputs, cache)
        check_ids("input_ids", input_ids, self.config.vocab_size)
        split = current_split()
        if cache is not None:
            if split is not None:
                raise ValueError("a cache needs whole sequences: it cannot be read over ranks")
            if labels is not None or return_layers:
                raise ValueError("labels and return_layers cannot be given with a cache")
            return self._told(self._read_on(input_ids, cache).outputs, cache)
        if split is None:
            return self._forward(input_ids, labels, return_layers, num_labels)
        with split.sequences(input_ids.shape[1]):
            return self._forward(input_ids, labels, return_layers, num_labels)

    @torch.no_grad()
    def _told(self, outputs: tuple[Tensor, ...], cache: ModelCache) -> LanguageModelOutput:
        return LanguageModelOutput(self.logits_of(outputs, cache), None, None, ())

    def _forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        return_layers: bool,
        num_labels: int | Tensor | None,
    ) -> LanguageModelOutput:
        reading = self.read(input_ids, return_layers)
        logits = self.logits_of(reading.outputs)
        if labels is None:
            return LanguageModelOutput(logits, None, None, reading.layers)
        cross_entropy, share = next_token_loss(logits, input_ids, labels, num_labels)
        loss = cross_entropy
        for penalty in reading.penalties:
            loss = loss + share * penalty
        return LanguageModelOutput(logits, loss, cross_entropy, reading.layers)

    def features(self, input_ids: Tensor) -> Tensor:
        """What the head reads of token ids `(B, S)`: `(B, S, H)`.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        check_ids("input_ids", input_ids, self.config.vocab_size)
        return self.features_of(self.read(input_ids).outputs)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Prompt and continuation, `(B, S + max_new_tokens)`; see `qflux.generate`."""
        return generate(
            self,
            input_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            padding=padding,
        )


def next_token_loss(
    logits: Tensor, input_ids: Tensor, labels: Tensor, num_labels: int | Tensor | None = None
) -> tuple[Tensor, Tensor | float]:
    """Mean cross entropy of position i against label i + 1, in nats a token, and this share of it.

    In float32, or the precision of the logits where that is higher.

    Args:
        logits: `(B, S, V)`.
        input_ids, labels: `(B, S)`, aligned, usually the same tensor. Labels of -100 are ignored.
        num_labels: what the sum is divided by. None (default): the number of labels scored here,
            or by all ranks that share the sequences.

    Returns:
        the loss, and the part of the `num_labels` that is scored here, in [0, 1].

    Raises:
        ValueError: labels of another shape than the ids.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    split = current_split()
    if split is None:
        logits, wanted = logits[:, :-1], labels[:, 1:]
    else:
        wanted = split.following(labels, IGNORED_LABEL)
    alone = split is None and num_labels is None
    scored = None if alone else (wanted != IGNORED_LABEL).sum()
    if split is not None and num_labels is None and scored is not None:
        num_labels = split.total(scored)
    loss = F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        wanted.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="mean" if num_labels is None else "sum",
    )
    if num_labels is None or scored is None:
        return loss, 1.0
    return loss / num_labels, scored.to(loss.dtype) / num_labels


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise unless `ids` is `(B, S >= 1)`, integer and, where they can be read, in [0, V)."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got dtype {ids.dtype}")
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"{name} must have shape (batch, length >= 1), got {tuple(ids.shape)}")
    if values_are_known(ids) and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} must lie in [0, {vocab_size - 1}], got ids in [{low}, {high}]"
            )
