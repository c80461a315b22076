"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..inference.generate import evaluating
from ..models.base import CausalLM
from ..text.windows import IGNORED_LABEL, evaluation_batches, evaluation_windows


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a text.

    Args:
        nats: mean loss of a token.
        tokens: that were predicted: all but the first of each work.
        bytes: of UTF-8 that these tokens stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The loss of a byte in bits, the same unit for every vocabulary."""
        return self.nats * self.tokens / self.bytes / math.log(2)

    @property
    def perplexity(self) -> float:
        """The number of equally likely tokens that are as hard to predict."""
        return _exp(self.nats)

    @property
    def byte_perplexity(self) -> float:
        """The number of equally likely bytes that are as hard to predict."""
        return _exp(self.bits_per_byte * math.log(2))


def evaluate(model: CausalLM, works: Sequence[Tensor], batch_size: int = 12) -> float:
    """Mean loss in nats a token over every token of the works but the first of each.

    A token is predicted from at most `context_length - 1` tokens before it. The model is put into
    evaluation mode meanwhile.

    Args:
        model: of any family.
        works: token ids `(N,)` of each work, at least one of 2 tokens or more.
        batch_size: windows that are computed together, >= 1.
    """
    return score(model, works, batch_size=batch_size).nats


@torch.no_grad()
def score(
    model: CausalLM,
    works: Sequence[Tensor],
    token_bytes: Tensor | None = None,
    *,
    batch_size: int = 12,
    progress: bool = False,
) -> Evaluation:
    """The loss that `evaluate` gives, with what it is a mean of.

    Args:
        model, works, batch_size: as for `evaluate`.
        token_bytes: bytes of each token, `(V,)`, as vocabularies give them; None: 1 each.
        progress: show a progress bar, if standard error is a terminal.

    Raises:
        ValueError: no work of at least 2 tokens.
    """
    device, length = next(model.parameters()).device, model.config.context_length
    total, tokens, size = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    if max(map(len, works), default=0) < 2:
        raise ValueError("the text to evaluate on must have a work of at least 2 tokens")
    windows = sum(evaluation_windows(work, length) for work in works)
    bar = tqdm(total=windows, unit="window", delay=1, disable=None if progress else True)
    with evaluating(model), bar:
        for ids, labels in evaluation_batches(works, length, batch_size):
            wanted = labels[:, 1:]
            wanted = wanted[wanted != IGNORED_LABEL]
            total += model(ids.to(device), labels=labels.to(device)).loss * len(wanted)
            tokens += len(wanted)
            size += len(wanted) if token_bytes is None else int(token_bytes[wanted].sum())
            bar.update(len(ids))
    return Evaluation(total.item() / tokens, tokens, size)


def _exp(value: float) -> float:
    """The exponential, infinite where a float ends."""
    return math.exp(value) if value < 700 else math.inf
