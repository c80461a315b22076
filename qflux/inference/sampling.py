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
        logits: `(B, V)`. Minus infinity forbids a token.
        temperature: divides the logits, >= 0; 0 takes the most likely token. Default 1.0.
        top_k: keep the k most likely tokens; None (default) or k >= V keeps all.
        top_p: keep the fewest most likely tokens whose probabilities, after top_k, reach top_p,
            in (0, 1], at least one; None (default) keeps all.
        generator: random numbers, on the device of the logits; None for PyTorch's own.

    Returns:
        `(B, 1)` int64.

    Raises:
        TypeError, ValueError: an option outside its range, named; or logits that are no
            distribution, because they hold NaN or infinity or forbid every token.
    """
    check_sampling(temperature, top_k, top_p)
    likeliest = logits.amax(-1, keepdim=True)
    if not torch.compiler.is_compiling() and not bool(likeliest.isfinite().all()):
        raise ValueError(
            "the logits of the next token must have a finite maximum, got "
            f"{likeliest[~likeliest.isfinite()][0].item()}: the model has diverged, or every "
            "token is forbidden"
        )
    if temperature < torch.finfo(torch.float32).tiny:  # float32 would divide by zero
        return logits.argmax(-1, keepdim=True)
    # Differences to the maximum, which no temperature makes infinite, nor NaN.
    below = logits.float() - likeliest.float()
    divisor = min(temperature, torch.finfo(torch.float32).max)
    ordered, ids = (below / divisor).sort(dim=-1, descending=True)
    if top_k is not None:
        ordered, ids = ordered[..., :top_k], ids[..., :top_k]
    probabilities = ordered.softmax(-1)
    if top_p is not None:
        likelier = probabilities.cumsum(-1) - probabilities
        excess = likelier >= top_p
        excess[..., 0] = False  # a top_p that float32 rounds to zero keeps the first as well
        probabilities = probabilities.masked_fill(excess, 0.0)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise unless these are options of `sample`."""
    check_real("temperature", temperature, minimum=0.0)
    if top_k is not None:
        check_integer("top_k", top_k, 1)
    if top_p is not None:
        check_real("top_p", top_p, above=0.0, maximum=1.0)
