"""What every causal language model here has: checked ids, the shifted loss, generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inference.generate import generate
from ..parallel import current_split
from ..text.windows import IGNORED_LABEL
from .config import ModelConfig
from .output import LanguageModelOutput, LayerRecord


class Reading(NamedTuple):
    """What the output layer reads, and what comes with it.

    features: `(B, S, H)`. layers: a record of each layer, or `()` if they were not asked for.
    penalties: terms without dimensions that the training loss has beside the cross entropy.
    """

    features: Tensor
    layers: tuple[LayerRecord, ...] = ()
    penalties: tuple[Tensor, ...] = ()


class CausalLM(nn.Module, ABC):
    """A model whose logits at a position depend on the tokens up to that position only.

    Subclasses have a `head`, the linear map from features to logits, `layers`, and `read`.
    """

    head: nn.Linear
    layers: nn.ModuleList

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def read(self, input_ids: Tensor, return_layers: bool = False) -> Reading:
        """Run embedding and layers on checked token ids `(B, S)`."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        return_layers: bool = False,
        num_labels: int | Tensor | None = None,
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

        Where sequences are split over ranks (`qflux.parallel.context_parallel`), ids, labels and
        logits are this rank's part, and its losses its share: the ranks' add up to the whole.

        Raises:
            TypeError, ValueError: wrong dtype, shape or (checked on the CPU) token ids.
        """
        check_ids("input_ids", input_ids, self.config.vocab_size)
        split = current_split()
        if split is None:
            return self._forward(input_ids, labels, return_layers, num_labels)
        with split.sequences(input_ids.shape[1]):
            return self._forward(input_ids, labels, return_layers, num_labels)

    def _forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        return_layers: bool,
        num_labels: int | Tensor | None,
    ) -> LanguageModelOutput:
        reading = self.read(input_ids, return_layers)
        logits = self.head(reading.features)
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
        return self.read(input_ids).features

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
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
    """Raise unless `ids` is `(B, S >= 1)`, integer and (checked on the CPU) in [0, V)."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got dtype {ids.dtype}")
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"{name} must have shape (batch, length >= 1), got {tuple(ids.shape)}")
    # Reading the ids would synchronise a GPU and break a traced graph.
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} must lie in [0, {vocab_size - 1}], got ids in [{low}, {high}]"
            )
