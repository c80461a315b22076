"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from qflux_kernels.checks import check_integer, check_real


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
        temperature: divides the logits, >= 0; 0 takes the most likely token. Default 1.0.
        top_k: keep the k most likely tokens; None (default) or k >= V keeps all.
        top_p: keep the fewest most likely tokens whose probabilities, after top_k, reach top_p,
            in (0, 1], at least one; None (default) keeps all.
        generator: random numbers, on the device of the logits; None for PyTorch's own.

    Returns:
        `(B, 1)` int64.

    Raises:
        TypeError, ValueError: an option outside its range, named.
    """
    check_sampling(temperature, top_k, top_p)
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


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise unless these are options of `sample`."""
    check_real("temperature", temperature, minimum=0.0)
    if top_k is not None:
        check_integer("top_k", top_k, 1)
    if top_p is not None:
        check_real("top_p", top_p, above=0.0, maximum=1.0)
