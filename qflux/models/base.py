"""What every causal language model here has: checked ids, the shifted loss, generation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inference.generate import generate
from ..text.data import IGNORED_LABEL
from .record import Record


class LanguageModelOutput(NamedTuple):
    """logits: `(B, S, V)`. loss: the mean in nats a token, or None without labels."""

    logits: Tensor
    loss: Tensor | None


class CausalLM(nn.Module):
    """A model whose logits at a position depend on the tokens up to that position only.

    Subclasses have a `head`, the linear map from features to logits, and `features(input_ids)`,
    `(B, S)` to `(B, S, H)`.
    """

    head: nn.Linear

    def __init__(self, config: Record) -> None:
        super().__init__()
        self.config = config

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


def next_token_loss(logits: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of position i against label i + 1, in nats a token, float32.

    Args:
        logits: `(B, S, V)`.
        input_ids, labels: `(B, S)`, aligned, usually the same tensor. Labels of -100 are ignored.

    Raises:
        ValueError: labels of another shape than the ids.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
    )


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
