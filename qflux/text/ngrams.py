"""Counting models of any order: what a network has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    # Sorted runs of each length with their numbers; of length 1, all tokens.
    tables = [_count(train, length, vocab_size) for length in range(1, order + 1)]
    seen = torch.zeros(vocab_size, dtype=torch.float64)
    seen[tables[0][0]] = tables[0][1].double()
    unigram = (seen + 1) / (seen.sum() + vocab_size)
    levels = [_Level(grams, counts, vocab_size) for grams, counts in tables[1:]]
    total, scored = 0.0, 0
    for work in _cut(validation, order):
        probability = unigram[work.ids[work.known :]]
        for length, level in enumerate(levels, start=2):
            # Tokens that have enough context, in this piece or before it.
            late = max(0, length - 1 - work.known)
            wanted = _runs(work.ids, length, vocab_size)[max(0, work.known - length + 1) :]
            lower = probability[late:]  # a view
            lower.copy_(level.mix(wanted, lower))
        total -= probability.log().sum().item()
        scored += len(probability)
    return total / scored


# Tokens that are worked on at once.
_CHUNK = 2**21
# Below so many possible runs they are counted in a table of all.
_TABLE = 2**22


@dataclass(frozen=True)
class _Piece:
    """Token ids, int64, of which the first `known` are context only."""

    ids: Tensor
    known: int


def _cut(works: Sequence[Tensor], order: int) -> Iterator[_Piece]:
    """The works in pieces; of each work the first token is context, and so are those before."""
    for work in works:
        for start in range(1, len(work), _CHUNK):
            known = min(start, max(1, order - 1))
            yield _Piece(work[start - known : start + _CHUNK].long(), known)


def _count(works: Sequence[Tensor], length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The runs of `length` tokens that occur, sorted, and how often."""
    grams = counts = torch.zeros(0, dtype=torch.int64)
    if vocab_size**length <= _TABLE:
        table = torch.zeros(vocab_size**length, dtype=torch.int64)
        for runs in _all_runs(works, length, vocab_size):
            table += torch.bincount(runs, minlength=len(table))
        grams = table.nonzero().flatten()
        return grams, table[grams]
    for runs in _all_runs(works, length, vocab_size):
        more, times = runs.unique(return_counts=True)
        grams, place = torch.cat([grams, more]).unique(return_inverse=True)
        counts = torch.zeros_like(grams).index_add_(0, place, torch.cat([counts, times]))
    return grams, counts


def _all_runs(works: Sequence[Tensor], length: int, vocab_size: int) -> Iterator[Tensor]:
    """Every run of the works, some at a time; none spans two works."""
    waiting, size = [], 0
    for work in works:
        for start in range(0, max(0, len(work) - length + 1), _CHUNK):
            waiting.append(
                _runs(work[start : start + _CHUNK + length - 1].long(), length, vocab_size)
            )
            size += len(waiting[-1])
            if size >= _CHUNK:
                yield torch.cat(waiting)
                waiting, size = [], 0
    if waiting:
        yield torch.cat(waiting)


class _Level:
    """Counts of runs of one length, mixed with the probabilities of shorter ones."""

    def __init__(self, grams: Tensor, counts: Tensor, vocab_size: int) -> None:
        self.grams, self.counts, self.vocab_size = grams, counts, vocab_size
        self.contexts, place, self.kinds = (grams // vocab_size).unique(
            return_inverse=True, return_counts=True
        )
        self.sums = torch.zeros_like(self.kinds).index_add_(0, place, counts)

    def mix(self, wanted: Tensor, lower: Tensor) -> Tensor:
        """The probabilities of the last tokens of runs, given those of the runs one shorter."""
        pairs = _look_up(wanted, self.grams, self.counts)
        seen = _look_up(wanted // self.vocab_size, self.contexts, self.sums)
        different = _look_up(wanted // self.vocab_size, self.contexts, self.kinds)
        mixed = (pairs + different * lower) / (seen + different).clamp(min=1)
        return torch.where(seen > 0, mixed, lower)


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
