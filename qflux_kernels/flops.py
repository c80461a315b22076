"""What an op costs, for `torch.utils.flop_counter`: operations, counted by pairs.

A multiplication with an addition counts as two operations, as that counter has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .schema import (
    ATTENTION,
    ATTENTION_BACKWARD,
    CACHE_ATTEND,
    CACHE_TOKEN,
    COMPILED,
    EVOLVE,
    EVOLVE_BACKWARD,
    FAMILY_OPS,
    INTERACT,
    INTERACT_BACKWARD,
    PROJECT_NORM,
    PROJECT_NORM_BACKWARD,
    THRESHOLD_BACKWARD,
    TOKEN_CACHES,
    TOKEN_ENDS,
    Op,
)

# Of a pair: the inner product, and what makes a weight of it (rescaling and comparison).
SCORE_FLOPS = 2 * 2 + 3
# Of a row of a threshold: mean and deviation from running moments.
THRESHOLD_FLOPS = 20
# Of a token's Heun step: two stages added, the radius rule, the skip.
STEP_FLOPS = 25


def visible_pairs(rows: int, keys: int, causal: bool) -> int:
    """Pairs that may be seen; causal rows and keys have their ends aligned."""
    if not causal:
        return rows * keys
    if keys < rows:  # the first rows see nothing
        return keys * (keys + 1) // 2
    return rows * (keys - rows) + rows * (rows + 1) // 2


def interact_flops(batch: int, rows: int, keys: int, value_dim: int, causal: bool = True) -> int:
    """Operations of `interact` if it meets every visible pair and keeps all of them.

    A pair costs its score, and two operations for each column of its value and for the strength.
    """
    pairs = visible_pairs(rows, keys, causal)
    return batch * (pairs * (SCORE_FLOPS + 2 * value_dim + 1) + rows * THRESHOLD_FLOPS)


def _shape(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def _interact(given: Any) -> int:
    states = tuple(given.states)
    keys = _shape(given.keys) or states
    values = _shape(given.values) or keys
    return interact_flops(math.prod(states[:-2]), states[-2], keys[-2], values[-1], given.causal)


def _interact_backward(given: Any) -> int:
    # Two passes over the pairs, by rows and by keys; each computes the score again, the gradient
    # of the weight (as wide as a value), and what it adds to a point.
    states = tuple(given.states)
    keys = _shape(given.keys) or states
    values = _shape(given.values) or keys
    pairs = visible_pairs(states[-2], keys[-2], given.causal) * math.prod(states[:-2])
    by_rows = SCORE_FLOPS + 2 * values[-1] + 4
    by_keys = by_rows + 2 * values[-1]
    return pairs * (by_rows * given.need_rows + by_keys * given.need_keys)


def _threshold_backward(given: Any) -> int:
    return 2 * THRESHOLD_FLOPS * math.prod(tuple(given.states)[:-1])


def _evolve(given: Any) -> int:
    states = tuple(given.states)
    batch, rows = math.prod(states[:-2]), states[-2]
    stage = interact_flops(batch, rows, rows, 2, given.causal)
    return given.steps * (2 * stage + batch * rows * STEP_FLOPS)


def _evolve_backward(given: Any) -> int:
    states = tuple(given.grad_states)
    batch, rows = math.prod(states[:-2]), states[-2]
    pairs = batch * visible_pairs(rows, rows, given.causal)
    stage = pairs * (2 * (SCORE_FLOPS + 8) + 4)
    return given.steps * (2 * stage + 2 * batch * rows * STEP_FLOPS)


def _project_norm(given: Any) -> int:
    (tokens, features), (width, _) = tuple(given.features), tuple(given.weight)
    return tokens * (2 * width * (features + 1) + 3 * (features + 1) ** 2)


def _project_norm_backward(given: Any) -> int:
    return 2 * _project_norm(given)


def _attention(given: Any) -> int:
    # As `interact`: passes over tokens without a matrix product are not counted elsewhere either.
    (batch, tokens, _), (cylinders,) = tuple(given.projected), tuple(given.scale)
    return interact_flops(batch * cylinders, tokens, tokens, given.value_dim)


def _attention_backward(given: Any) -> int:
    (batch, tokens, _), (cylinders,) = tuple(given.projected), tuple(given.scale)
    points = batch, cylinders, tokens, 2
    return _interact_backward(
        SimpleNamespace(
            states=points, keys=points, values=(batch, cylinders, tokens, given.value_dim),
            causal=True, need_rows=True, need_keys=True,
        )
    )  # fmt: skip


def _cache_attend(given: Any) -> int:
    # As if it met every key, like the others; the keys in front of `base` are in the index.
    states = tuple(given.states)
    values = _shape(given.values) or (2,)
    keys = given.base + tuple(given.keys)[-2]
    return interact_flops(math.prod(states[:-2]), states[-2], keys, values[-1])


def _cache_token(given: Any) -> int:
    (batch,) = tuple(given.ids)
    weights = [tuple(shape) for shape in given.weights]
    projection = weights[TOKEN_ENDS.index("projection") - len(TOKEN_ENDS)]
    # All matrices of layers are of products, and nothing else there has two dimensions.
    matrices = [projection, *(w for w in weights[: -len(TOKEN_ENDS)] if len(w) == 2)]
    values = [tuple(s) for s in given.caches[TOKEN_CACHES.index("values") :: len(TOKEN_CACHES)]]
    pairs = (interact_flops(math.prod(shape[:2]), 1, given.at + 1, shape[-1]) for shape in values)
    return 2 * batch * sum(map(math.prod, matrices)) + sum(pairs)


FORMULAS: dict[Op, Callable[[Any], int]] = {
    INTERACT: _interact,
    INTERACT_BACKWARD: _interact_backward,
    THRESHOLD_BACKWARD: _threshold_backward,
    EVOLVE: _evolve,
    EVOLVE_BACKWARD: _evolve_backward,
    PROJECT_NORM: _project_norm,
    PROJECT_NORM_BACKWARD: _project_norm_backward,
    ATTENTION: _attention,
    ATTENTION_BACKWARD: _attention_backward,
    CACHE_ATTEND: _cache_attend,
    CACHE_TOKEN: _cache_token,
}


def _formula(op: Op, rule: Callable[[Any], int]) -> Callable[..., int]:
    """A rule of the counter: it gets shapes in the place of tensors."""

    def count(*arguments: Any, out_shape: Any = None, **named: Any) -> int:
        del out_shape
        return rule(op.Arguments(*arguments, **named))

    return count


def register(family: str) -> None:
    """Teach `torch.utils.flop_counter` the ops of a family that is loaded; again does nothing."""
    for op, rule in FORMULAS.items():
        if family != COMPILED and op not in FAMILY_OPS:
            continue
        target = getattr(torch.ops.qflux_kernels, family + op.name)
        if target not in flop_registry:
            register_flop_formula(target)(_formula(op, rule))
