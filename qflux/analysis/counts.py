"""Parameters and operations of a model, counted; and the counts of the two documents.

A multiplication with an addition counts as two operations, as `torch.utils.flop_counter` has it.
Importing this module teaches that counter the operators of `qflux_kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from qflux_kernels.schema import (
    COMPILED,
    EVOLVE,
    EVOLVE_BACKWARD,
    FAMILY_OPS,
    INTERACT,
    INTERACT_BACKWARD,
    PROJECT_NORM,
    PROJECT_NORM_BACKWARD,
    THRESHOLD_BACKWARD,
    TRITON,
    Op,
)

from ..inference.generate import evaluating
from ..models.base import CausalLM
from .tables import Table

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


FORMULAS: dict[Op, Callable[[Any], int]] = {
    INTERACT: _interact,
    INTERACT_BACKWARD: _interact_backward,
    THRESHOLD_BACKWARD: _threshold_backward,
    EVOLVE: _evolve,
    EVOLVE_BACKWARD: _evolve_backward,
    PROJECT_NORM: _project_norm,
    PROJECT_NORM_BACKWARD: _project_norm_backward,
}


def _formula(op: Op, rule: Callable[[Any], int]) -> Callable[..., int]:
    """A rule of the counter: it gets shapes in the place of tensors."""

    def count(*arguments: Any, out_shape: Any = None, **named: Any) -> int:
        del out_shape
        return rule(op.Arguments(*arguments, **named))

    return count


def register_formulas() -> None:
    """Teach `torch.utils.flop_counter` the ops that this process has; again does nothing."""
    for op, rule in FORMULAS.items():
        for family in (COMPILED, TRITON):
            if family != COMPILED and op not in FAMILY_OPS:
                continue
            target = getattr(torch.ops.qflux_kernels, family + op.name, None)
            if target is not None and target not in flop_registry:
                register_flop_formula(target)(_formula(op, rule))


register_formulas()


def parameter_counts(model: torch.nn.Module) -> Table:
    """Parameters of each part of a model: columns part, parameters and trained."""
    rows: dict[str, list[int]] = {}
    shared: set[int] = set()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) in shared or name not in model.state_dict():
            continue
        shared.add(id(value))
        steps = name.split(".")
        depth = 2 if len(steps) > 1 and steps[1].isdigit() else 1
        part = rows.setdefault(".".join(steps[:depth]), [0, 0])
        part[0] += value.numel()
        part[1] += value.numel() if value.requires_grad else 0
    return {
        "part": np.array(list(rows)),
        "parameters": np.array([all_ for all_, _ in rows.values()], dtype=np.int64),
        "trained": np.array([some for _, some in rows.values()], dtype=np.int64),
    }


def count_forward(model: CausalLM, length: int, batch: int = 1) -> Table:
    """Operations of a forward pass, by operator: columns operator and flops, the largest first.

    Additions and functions of single numbers are not counted, as in `torch.utils.flop_counter`.

    Args:
        model: of any family, on any device.
        length: tokens of a sequence, >= 1.
        batch: sequences, >= 1.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    found = counter.get_flop_counts().get("Global", {})
    order = sorted(found.items(), key=lambda item: (-item[1], str(item[0])))
    return {
        "operator": np.array([str(op) for op, _ in order]),
        "flops": np.array([count for _, count in order], dtype=np.int64),
    }


def document_counts() -> Table:
    """The two documents' counts: what they print, what their formulas give, and what is right.

    Columns document, what, printed, formula, corrected and why. The documents count a
    multiplication with its addition once; so does the column `corrected`, so that the ratios can be
    compared. Layers only: embedding and output matrix dominate whole models.

    Source: the Flux document, section 2 (d = 768, s = 1,024); the QFNN document, "Computational
    Complexity" and "Parameter Efficiency" (d = 768, L = 512).
    """
    d, s = 768, 1024
    pairs = 7 * s * s
    norm, linear = 4 * d * s, 4 * d * d * s
    block = 3 * d * d * s + 2 * d * s * s + 2 * linear + norm
    projection = 2 * d * s
    flux = 2 * pairs + 5 * s + projection + norm
    rows: list[tuple[str, str, float, float, float, str]] = [
        ("flux", "transformer: QKV projections", 1.8e9, 3 * d * d * s, 3 * d * d * s, ""),
        ("flux", "transformer: attention matrix", 803e6, d * s * s, d * s * s, "768 x 1024^2"),
        ("flux", "transformer: context", 803e6, d * s * s, d * s * s, "768 x 1024^2"),
        ("flux", "transformer: output projection", 0, 0, d * d * s, "left out"),
        ("flux", "transformer: first linear map", 2.4e9, linear, linear, ""),
        ("flux", "transformer: second linear map", 2.4e9, linear, linear, ""),
        ("flux", "transformer: layer norm", 3.1e6, norm, norm, ""),
        ("flux", "transformer: total", 8.2e9, block, block + d * d * s, "with the output map"),
        ("flux", "flux: attention score", 7.3e6, pairs, 0, "part of the two stages"),
        ("flux", "flux: integration", 19.7e6, 2 * pairs + 5 * s, 2 * pairs + 5 * s, "wrong sum"),
        ("flux", "flux: projection", 1.6e6, projection, projection, ""),
        ("flux", "flux: layer norm", 3.1e6, norm, norm, ""),
        ("flux", "flux: total", 24.4e6, pairs + flux, flux, "attention counted three times"),
        ("flux", "ratio of the layers", 0.003, (pairs + flux) / block,
         flux / (block + d * d * s), ""),
        ("flux", "parameters of a layer, ratio", 1 / (6 * d), 2 / (12 * d), 5 / (12 * d),
         "a projection with bias and norm has 5 d"),
    ]  # fmt: skip
    length = 512
    attention, gate = 3 * length * d * d + length * length * d, 2 * length * length
    rows += [
        ("qfnn", "transformer: attention", 0, attention, attention + length * d * d,
         "output projection left out"),
        ("qfnn", "qfnn: attention", 0, gate, 2 * gate, "two Heun stages"),
        ("qfnn", "ratio of the operations", 1100, attention / gate,
         (attention + length * d * d) / (2 * gate), "its formulas give another number"),
        ("qfnn", "transformer: parameters of a block", 0, 4 * d * d, 4 * d * d, ""),
        ("qfnn", "qfnn: parameters of a block", 0, 2 * d, 3 * d, "once a model, with a bias"),
        ("qfnn", "ratio of the parameters", 1500, 2 * d, 4 * d / 3, "of one block"),
    ]  # fmt: skip
    names = ("document", "what", "printed", "formula", "corrected", "why")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True),
                                                           strict=True)}  # fmt: skip
