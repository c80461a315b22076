"""Continuing a prompt with any causal language model."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from qflux_kernels.checks import check_integer

from .sampling import check_sampling, sample


class _HasLogits(Protocol):
    @property
    def logits(self) -> Tensor: ...


class _HasContext(Protocol):
    @property
    def context_length(self) -> int: ...


class HasMode(Protocol):
    """What is in training or in evaluation mode, as a module is."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...


class LanguageModel(HasMode, Protocol):
    """What generation needs of a model: logits `(B, S, V)` of ids `(B, S)`, a context, a mode."""

    @property
    def config(self) -> _HasContext: ...

    def __call__(self, input_ids: Tensor, /) -> _HasLogits: ...


@contextmanager
def evaluating(model: HasMode) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


def next_tokens(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Generator[Tensor]:
    """The tokens that continue a prompt, `(B, 1)` each, as soon as each is drawn.

    Every step runs the model on the last `context_length` tokens. The model is in evaluation mode
    until the last token is taken or the iterator is closed.

    Args:
        model: the language model.
        input_ids: `(B, S)` prompts, S >= 1.
        max_new_tokens: tokens to draw, >= 0.
        temperature, top_k, top_p, generator: as in `qflux.inference.sampling.sample`.

    Raises:
        TypeError, ValueError: a bad prompt, an option outside its range (named), or logits that
            are not finite; when the first token is taken.
    """
    check_integer("max_new_tokens", max_new_tokens, 0)
    check_sampling(temperature, top_k, top_p)
    ids = input_ids[:, -model.config.context_length :]
    with evaluating(model):
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits = model(ids).logits[:, -1]
                token = sample(
                    logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
                ).to(ids.dtype)
                ids = torch.cat((ids, token), 1)[:, -model.config.context_length :]
            yield token


def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a prompt token by token.

    Every step runs the model on the last `context_length` tokens. The model is put into
    evaluation mode meanwhile.

    Args:
        model: the language model.
        input_ids: `(B, S)` prompts, S >= 1.
        max_new_tokens: tokens to add, >= 0.
        temperature, top_k, top_p, generator: as in `qflux.inference.sampling.sample`.

    Returns:
        `(B, S + max_new_tokens)` token ids, the prompts first.

    Raises:
        TypeError, ValueError: a bad prompt, an option outside its range (named), or logits that
            are not finite.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    tokens = next_tokens(model, input_ids, max_new_tokens, **options)
    return torch.cat((input_ids, *tokens), 1)
