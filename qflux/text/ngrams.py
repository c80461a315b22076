"""Counting models of any order: what a network has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qflux_kernels.checks import check_integer


def ngram_losses(
    train: Sequence[Tensor], validation: Sequence[Tensor], vocab_size: int
) -> dict[str, float]:
    """Losses of the counting models of orders 1 and 2, see `ngram_loss`.

    Args:
        train, validation: token ids `(N,)` of each work.
        vocab_size: V.

    Returns:
        {"unigram": loss, "bigram": loss}, in nats a token.
    """
    return {
        name: ngram_loss(train, validation, vocab_size, order)
        for name, order in (("unigram", 1), ("bigram", 2))
    }


def ngram_loss(
    train: Sequence[Tensor], validation: Sequence[Tensor], vocab_size: int, order: int
) -> float:
    """Loss of an interpolated n-gram model on the tokens that `evaluation_batches` scores.

    These are all tokens of the validation works but the first of each. Order 1 is the add-one
    estimate p_1(b) = (n(b) + 1) / (N + V). A higher order interpolates with the one below as
    Witten and Bell do: with T(a) different tokens seen after the context a,

        p_k(b|a) = (n(ab) + T(a) p_{k-1}(b|a')) / (n(a) + T(a))

    where a' is a without its first token. Runs of tokens are counted within works, and only those
    that occur are stored, so that a large vocabulary costs no table of V x V.

    Args:
        train, validation: token ids `(N,)` of each work.
        vocab_size: V, >= 1.
        order: longest run of tokens that is counted, >= 1.

    Returns:
        The mean, in nats a token.

    Raises:
        TypeError, ValueError: a bad size or order, or V ** order beyond int64.
    """
    check_integer("vocab_size", vocab_size, 1)
    check_integer("order", order, 1)
    if vocab_size**order > torch.iinfo(torch.int64).max:
        raise ValueError(
            f"order must keep vocab_size ** order below 2**63, got {order!r} "
            f"for a vocab_size of {vocab_size!r}"
        )
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for work in train:
        counts += torch.bincount(work, minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    probabilities = [unigram[work[1:]] for work in validation]
    for length in range(2, order + 1):
        grams = torch.cat([_runs(work, length, vocab_size) for work in train])
        grams, counts = grams.unique(return_counts=True)
        contexts, place, kinds = (grams // vocab_size).unique(
            return_inverse=True, return_counts=True
        )
        sums = torch.zeros_like(kinds).index_add_(0, place, counts)
        for work, probability in zip(validation, probabilities, strict=True):
            wanted = _runs(work, length, vocab_size)
            pairs = _look_up(wanted, grams, counts)
            seen = _look_up(wanted // vocab_size, contexts, sums)
            different = _look_up(wanted // vocab_size, contexts, kinds)
            lower = probability[length - 2 :]  # a view: tokens with enough context
            mixed = (pairs + different * lower) / (seen + different).clamp(min=1)
            lower.copy_(torch.where(seen > 0, mixed, lower))
    return -torch.cat(probabilities).log().mean().item()


def _runs(work: Tensor, length: int, vocab_size: int) -> Tensor:
    """Every run of `length` neighbouring tokens, as a number in base V."""
    count = max(0, len(work) - length + 1)
    number = torch.zeros(count, dtype=torch.int64)
    for place in range(length):
        number = number * vocab_size + work[place : place + count]
    return number


def _look_up(wanted: Tensor, keys: Tensor, numbers: Tensor) -> Tensor:
    """The numbers of the wanted keys, 0 for those that `keys`, sorted, lacks."""
    if not len(keys):
        return torch.zeros(len(wanted), dtype=torch.float64)
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[at] == wanted, numbers[at], 0).double()
