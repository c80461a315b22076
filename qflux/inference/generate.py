"""Sampling text from a language model."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..models.base import CausalLM


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id from each row of logits.

    Args:
        logits: `(B, V)`.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None or k >= V keeps all.
        top_p: keep the fewest most likely tokens whose probabilities, after top_k, reach top_p,
            at least one; None keeps all.
        generator: random numbers, on the device of the logits; None for PyTorch's own.

    Returns:
        `(B, 1)` int64.

    Raises:
        TypeError, ValueError: an option outside its range.
    """
    _check_options(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    ordered, ids = (logits.float() / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        ordered, ids = ordered[..., :top_k], ids[..., :top_k]
    probabilities = ordered.softmax(-1)
    if top_p is not None:
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(
    model: CausalLM,
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
        temperature, top_k, top_p, generator: as in `sample`.

    Returns:
        `(B, S + max_new_tokens)` token ids, the prompts first.

    Raises:
        TypeError, ValueError: a bad prompt or an option outside its range.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise TypeError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens!r}")
    _check_options(temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    try:
        ids = input_ids
        for _ in range(max_new_tokens):
            logits = model(ids[:, -model.config.context_length :]).logits[:, -1]
            token = sample(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            ids = torch.cat((ids, token.to(ids.dtype)), 1)
    finally:
        model.train(was_training)
    return ids


def _check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value is None and name == "top_p":
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a real number, got {value!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and >= 0, got {temperature!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1] or be None, got {top_p!r}")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k must be an integer >= 1 or None, got {top_k!r}")
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1 or None, got {top_k!r}")
