"""Continuing a prompt with any causal language model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

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


class BeyondContextWarning(UserWarning):
    """A text becomes longer than the context that its model was made for."""


@runtime_checkable
class CachedLanguageModel(LanguageModel, Protocol):
    """A language model that goes on from a cache of the tokens before (`qflux.models.base`)."""

    @property
    def cacheable(self) -> bool: ...

    def new_cache(self, batch: int, /, *, padding: Tensor | None = None) -> Any: ...

    def prefill(self, input_ids: Tensor, cache: Any, /) -> Tensor: ...


def next_tokens(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    padding: Tensor | None = None,
) -> Generator[Tensor]:
    """The tokens that continue a prompt, `(B, 1)` each, as soon as each is drawn.

    The model reads every token once: a cache has those before. A model without one (statistics over
    the whole row) reads its last `context_length` tokens in every step. The model is in evaluation
    mode until the last token is taken or the iterator is closed.

    Args:
        model: the language model.
        input_ids: `(B, S)` prompts, S >= 1.
        max_new_tokens: tokens to draw, >= 0.
        temperature, top_k, top_p, generator: as in `qflux.inference.sampling.sample`.
        padding: `(B,)` integers in [0, S): so many tokens in front of each prompt are padding,
            which no token sees, so that prompts of different lengths make a batch. None (default):
            none.

    Raises:
        TypeError, ValueError: a bad prompt, an option outside its range (named), or logits that
            are not finite; when the first token is taken.

    Warns:
        BeyondContextWarning: once, where the text becomes longer than the model's context, and all
            of it is read.
    """
    check_integer("max_new_tokens", max_new_tokens, 0)
    check_sampling(temperature, top_k, top_p)
    if isinstance(model, CachedLanguageModel) and model.cacheable:
        step = _cached(model, input_ids, max_new_tokens, padding)
    elif padding is None:
        step = _windowed(model, input_ids)
    else:
        raise ValueError("padding must be None for a model without a cache")
    with evaluating(model):
        read = input_ids
        for _ in range(max_new_tokens):
            with torch.no_grad():
                token = sample(
                    step(read),
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=generator,
                ).to(input_ids.dtype)
            yield token
            read = token


def _windowed(model: LanguageModel, input_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """From further tokens to the logits behind them, by the last tokens that fit."""
    window, ids = model.config.context_length, input_ids[:, :0]

    def step(read: Tensor) -> Tensor:
        nonlocal ids
        ids = torch.cat((ids, read), 1)[:, -window:]
        return model(ids).logits[:, -1]

    return step


def _cached(
    model: CachedLanguageModel, input_ids: Tensor, max_new_tokens: int, padding: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The same by a cache of all tokens."""
    if padding is not None:
        check_prompts(input_ids, padding)
    # The last token is not read.
    length = input_ids.shape[-1] + max_new_tokens - 1
    if max_new_tokens and length > model.config.context_length:
        told = beyond_context(length, model.config.context_length)
        warnings.warn(told, BeyondContextWarning, stacklevel=4)
    cache = None

    def step(read: Tensor) -> Tensor:
        nonlocal cache
        if cache is None:
            cache = model.new_cache(len(read), padding=padding)
        return model.prefill(read, cache)

    return step


def check_prompts(input_ids: Tensor, padding: Tensor) -> None:
    """Raise where padding leaves nothing of a prompt."""
    if padding.numel() and int(padding.max()) >= input_ids.shape[-1]:
        raise ValueError(
            f"padding must be less than the {input_ids.shape[-1]} tokens of a prompt, got "
            f"{int(padding.max())}"
        )


def beyond_context(length: int, context_length: int) -> str:
    """What to say where `length` tokens are read, more than the model was made for."""
    return (
        f"the text grows to {length} tokens, beyond the model's context of {context_length}: all "
        "of it is read, but the model may not have been trained on so many"
    )


def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Continue a prompt token by token.

    The model reads every token once, as in `next_tokens`, which says the exceptions. It is put into
    evaluation mode meanwhile.

    Args:
        model: the language model.
        input_ids: `(B, S)` prompts, S >= 1.
        max_new_tokens: tokens to add, >= 0.
        temperature, top_k, top_p, generator: as in `qflux.inference.sampling.sample`.
        padding: as in `next_tokens`.

    Returns:
        `(B, S + max_new_tokens)` token ids, the prompts first, with their padding.

    Raises:
        TypeError, ValueError: a bad prompt, an option outside its range (named), or logits that
            are not finite.

    Warns:
        BeyondContextWarning: as `next_tokens`.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    tokens = next_tokens(model, input_ids, max_new_tokens, padding=padding, **options)
    return torch.cat((input_ids, *tokens), 1)
