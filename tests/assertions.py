"""How close a kernel must come to the truth, and where a hard step excuses it.

Two correct evaluations may disagree on a pair whose score lies within rounding of its threshold,
so the budget of a row is rounding, plus the whole weight of its borderline pairs, and no more.
The truth is computed here in float64, a block of rows at a time. docs/operators.md has the rule in
words ("Comparing results").
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qflux_kernels import Interaction, Sparsemax, Threshold
from qflux_kernels.options import Score

COMPUTE_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
BORDERLINE_DELTA = {torch.float32: 1e-5, torch.float64: 1e-12}
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
# A score is an inner product of two terms and a bias: a few roundings of its largest term.
SCORE_ROUNDINGS = 4


class Problem(NamedTuple):
    """The arguments of `interact` with one batch dimension, in float64 on the CPU."""

    states: torch.Tensor  # (B, S, 2)
    keys: torch.Tensor  # (B, K, 2)
    values: torch.Tensor  # (B, K, D)
    coefficient: torch.Tensor  # (B, 1, 1) sigma, alpha or scale
    min_gate: torch.Tensor  # (B, 1, 1)
    lengths: torch.Tensor | None  # (B, 1, 1)
    causal: bool
    score: Score
    reduction: str
    compute: torch.dtype
    delta: float


class Pairs(NamedTuple):
    """A block of rows against every key."""

    weight: torch.Tensor  # (B, R, K), before the hard step
    rounding: torch.Tensor  # (B, R, K), what rounding of the score may do to the weight
    kept: torch.Tensor  # (B, R, K) bool
    borderline: torch.Tensor  # (B, R, K) bool
    visible: torch.Tensor  # (B, R, K) bool
    poisoned: torch.Tensor  # (B, R, K) bool: the weight is NaN


class Expected(NamedTuple):
    """What a block of rows should be, and by how much it may differ."""

    context: torch.Tensor  # (B, R, D); NaN where the result must not be finite
    strength: torch.Tensor  # (B, R)
    degree: torch.Tensor  # (B, R)
    context_budget: torch.Tensor
    strength_budget: torch.Tensor
    degree_budget: torch.Tensor


def _problem(states, keys, values, causal, score, reduction, lengths, delta) -> Problem:
    keys = states if keys is None else keys
    values = keys if values is None else values
    compute = COMPUTE_DTYPES.get(states.dtype, states.dtype)
    batch = torch.broadcast_shapes(*(t.shape[:-2] for t in (states, keys, values)))

    def points(tensor):
        tensor = tensor.detach().cpu().to(torch.float64)
        tensor = tensor.expand(batch + tensor.shape[-2:])
        return tensor.reshape(batch.numel(), *tensor.shape[-2:])

    def flat(value):
        return value.expand(batch).reshape(batch.numel(), 1, 1)

    def per_sequence(value):
        # A coefficient is rounded to the dtype of the computation before it is used.
        value = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
        return flat(value.to(compute).to(torch.float64))

    return Problem(
        states=points(states),
        keys=points(keys),
        values=points(values),
        coefficient=per_sequence(score.coefficient),
        min_gate=per_sequence(score.min_gate),
        lengths=None if lengths is None else flat(lengths.cpu()),
        causal=causal,
        score=score,
        reduction=reduction,
        compute=compute,
        delta=BORDERLINE_DELTA[compute] if delta is None else delta,
    )


def _blocks(problem: Problem, pairs: int = 1 << 21):
    batch, rows = problem.states.shape[:2]
    block = max(1, pairs // max(1, batch * problem.keys.shape[1]))
    for first in range(0, rows, block):
        yield first, min(rows, first + block)


def _masks(problem: Problem, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows, _ = problem.states.shape
    num_keys = problem.keys.shape[1]
    row = torch.arange(first, last)[:, None]
    key = torch.arange(num_keys)[None, :]
    sequence = torch.ones(batch, last - first, num_keys, dtype=torch.bool)
    if problem.lengths is not None:
        sequence &= (row < problem.lengths) & (key < problem.lengths)
    visible = sequence & (key <= row + num_keys - rows) if problem.causal else sequence
    return visible, sequence if problem.score.whole_window else visible


def _finite(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    finite = points.isfinite().all(-1)
    return torch.where(finite[..., None], points, 0.0), finite


def _mass_threshold(s: torch.Tensor) -> torch.Tensor:
    """tau `(..., 1)` with sum max(s - tau, 0) = 1, by sorting; 0 of no numbers."""
    if s.shape[-1] == 0:
        return s.new_zeros(*s.shape[:-1], 1)
    ordered = s.sort(-1, descending=True).values
    top = ordered[..., :1].nan_to_num(neginf=0.0)
    below = ordered - top
    rank = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    mean = (below.nan_to_num(neginf=0.0).cumsum(-1) - 1) / rank
    support = (below > mean).sum(-1, keepdim=True).clamp(min=1)
    return top + mean.gather(-1, support - 1)


def _pairs(problem: Problem, first: int, last: int) -> Pairs:
    visible, window = _masks(problem, first, last)
    rows, rows_finite = _finite(problem.states[:, first:last])
    keys, keys_finite = _finite(problem.keys)
    poisoned = ~(rows_finite[:, :, None] & keys_finite[:, None, :])
    size = rows.norm(dim=-1)[:, :, None] * keys.norm(dim=-1)[:, None, :]
    unit = SCORE_ROUNDINGS * torch.finfo(problem.compute).eps / 2
    least = torch.finfo(problem.compute).tiny * torch.finfo(problem.compute).eps
    coefficient, eps, delta = problem.coefficient, problem.score.eps, problem.delta

    if isinstance(problem.score, Threshold):
        s = (rows @ keys.mT + 1) / 2
        count = window.sum(-1, keepdim=True).clamp(min=1)
        mean = (s * window).sum(-1, keepdim=True) / count
        variance = ((s - mean) ** 2 * window).sum(-1, keepdim=True) / count
        tau = mean + coefficient * (variance + eps).sqrt()
        poisoned = (poisoned & window).any(-1, keepdim=True) | tau.isnan() | (s.isnan())
        kept = s >= tau
        borderline = (s - tau).abs() <= delta * (1 + size)
        weight, rounding = s, unit * (1 + size)
        if problem.score.shrinkage == "soft":
            # Of a difference the rounding of both terms remains.
            weight, rounding = s - tau, rounding + unit * tau.abs()
    elif isinstance(problem.score, Sparsemax):
        s, size = coefficient * (rows @ keys.mT), coefficient.abs() * size
        poisoned = poisoned | (s.abs() > torch.finfo(problem.compute).max)
        # Relative to the largest: where that is beyond 1e15, a weight is below its rounding.
        top = torch.nn.functional.pad(s.masked_fill(~visible, -torch.inf), (0, 1), value=-torch.inf)
        top = top.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        s = s - top
        tau = _mass_threshold(s.masked_fill(~visible, -torch.inf))
        poisoned = (poisoned & visible).any(-1, keepdim=True).expand_as(s)
        kept = s > tau
        borderline = (s - tau).abs() <= delta * (1 + size)
        # tau is a mean of kept pairs, and as large as they are.
        close = visible & (kept | borderline)
        largest = torch.nn.functional.pad(size * close, (0, 1)).amax(-1, keepdim=True)
        weight, rounding = s - tau, unit * (size + largest + (top + tau).abs())
        # They sum to one, which float64 reaches by many roundings.
        total = (weight * (visible & kept)).sum(-1, keepdim=True)
        weight = weight / torch.where(total > 0, total, 1.0)
    else:
        alpha, min_gate = coefficient, problem.min_gate
        turned = torch.stack((rows[..., 1], -rows[..., 0]), -1)
        s = rows @ keys.mT + alpha * (turned @ keys.mT)
        size = (1 + alpha.abs()) * size
        kept = 1 / (eps + s.abs()) > min_gate
        # The decision is min_gate * (eps + |S|) < 1, which no positive gate fails at min_gate <= 0.
        borderline = (min_gate > 0) & (
            (min_gate * (eps + s.abs()) - 1).abs() <= delta * (1 + min_gate * (eps + size))
        )

        def gated(score):
            return score / (eps + score.abs())

        weight = gated(s)
        poisoned = poisoned | weight.isnan()
        # A query of subnormal numbers has few digits.
        spread = unit * size + 4 * least * (1 + keys.norm(dim=-1)[:, None, :])
        rounding = torch.maximum(
            (gated(s + spread) - weight).abs(), (gated(s - spread) - weight).abs()
        ).nan_to_num(nan=0.0)
    return Pairs(
        weight=weight.nan_to_num(nan=0.0),
        rounding=rounding,
        kept=visible & (kept | poisoned),
        borderline=visible & borderline & ~poisoned,
        visible=visible,
        poisoned=visible & poisoned,
    )


def _expected(problem: Problem, dtype: torch.dtype, rtol: float, first: int, last: int) -> Expected:
    pairs = _pairs(problem, first, last)
    values = torch.where(problem.values.isfinite(), problem.values, 0.0)
    kept = pairs.weight * pairs.kept
    budget = kept.abs() * rtol + pairs.rounding * pairs.kept
    # A borderline pair that counts is rounded like any other.
    budget += (1 + rtol) * pairs.weight.abs() * pairs.borderline
    if problem.score.kernel in ("soft_threshold", "sparsemax"):
        # Its weight is next to nothing there, and the rounding no longer a small part of it.
        budget += pairs.rounding * (pairs.borderline & ~pairs.kept)
    context, context_budget = kept @ values, budget @ values.abs()
    strength, strength_budget = kept.sum(-1), budget.sum(-1)
    if problem.reduction == "mean":
        count = pairs.visible.sum(-1).clamp(min=1)
        context, context_budget = context / count[..., None], context_budget / count[..., None]
        strength, strength_budget = strength / count, strength_budget / count

    lost_weight = pairs.poisoned.any(-1)
    visible = pairs.visible.to(torch.float64)
    lost_value = visible @ (~problem.values.isfinite()).to(torch.float64) > 0
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    result = torch.finfo(dtype)

    def rounded(truth, budget, lost):
        # Rounding into the result's dtype, of which float16 is the one that overflows early.
        budget = budget + result.eps / 2 * (truth.abs() + budget) + result.tiny
        return torch.where(lost | (truth.abs() > result.max), nan, truth), budget

    context, context_budget = rounded(context, context_budget, lost_value | lost_weight[..., None])
    strength, strength_budget = rounded(strength, strength_budget, lost_weight)
    return Expected(
        context=context,
        strength=strength,
        degree=pairs.kept.sum(-1),
        context_budget=context_budget,
        strength_budget=strength_budget,
        degree_budget=pairs.borderline.sum(-1),
    )


def _check(name: str, got, truth, budget, first: int) -> None:
    got = got.to(torch.float64)
    lost = ~truth.isfinite()
    wrong = (got.isfinite() == lost) | (~lost & ((got - truth).abs() > budget))
    if not wrong.any():
        return
    excess = torch.where(wrong, ((got - truth).abs() / budget).nan_to_num(nan=torch.inf), -1.0)
    worst = torch.unravel_index(excess.argmax(), excess.shape)
    batch, row, *column = (int(index) for index in worst)
    place = f"sequence {batch}, row {first + row}" + (f", column {column[0]}" if column else "")
    raise AssertionError(
        f"{name}: {int(wrong.sum())} of {wrong.numel()} entries are wrong in a block of rows; "
        f"worst at {place}: got {got[worst].item():.17g}, expected {truth[worst].item():.17g} "
        f"within {budget[worst].item():.3g}"
    )


def assert_interaction_close(
    result: Interaction,
    states: torch.Tensor,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    *,
    causal: bool = True,
    score: Score = Threshold(),  # noqa: B008 (frozen)
    reduction: str = "sum",
    lengths: torch.Tensor | None = None,
    rtol: float | None = None,
    delta: float | None = None,
) -> None:
    """Raise unless `result` is `interact` of the arguments, up to rounding and borderline pairs.

    A finite entry may differ from the float64 truth by `rtol` times the sum of its terms' sizes,
    plus what a few roundings of each score do to its weight, plus the terms of borderline pairs.
    A degree may differ by the number of borderline pairs. An entry that a NaN or an infinity can
    reach must not be finite, and every other one must be.
    """
    problem = _problem(states, keys, values, causal, score, reduction, lengths, delta)
    batch, rows, _ = problem.states.shape
    depth = problem.values.shape[-1]
    rtol = RELATIVE_TOLERANCE[problem.compute] if rtol is None else rtol
    batch_shape = result.strength.shape[:-1]
    assert result.context.shape == (*batch_shape, rows, depth), result.context.shape
    assert result.degree.shape == result.strength.shape == (*batch_shape, rows)
    assert batch_shape.numel() == batch, (batch_shape, batch)
    assert result.context.dtype == result.strength.dtype == states.dtype, result.context.dtype
    assert result.degree.dtype == torch.int32, result.degree.dtype
    context = result.context.detach().cpu().reshape(batch, rows, depth)
    strength = result.strength.detach().cpu().reshape(batch, rows)
    degree = result.degree.cpu().reshape(batch, rows)
    for first, last in _blocks(problem):
        expected = _expected(problem, states.dtype, rtol, first, last)
        block = slice(first, last)
        _check("degree", degree[:, block], expected.degree.double(), expected.degree_budget, first)
        _check("strength", strength[:, block], expected.strength, expected.strength_budget, first)
        _check("context", context[:, block], expected.context, expected.context_budget, first)


def count_borderline(
    states: torch.Tensor,
    keys: torch.Tensor | None = None,
    *,
    causal: bool = True,
    score: Score = Threshold(),  # noqa: B008 (frozen)
    lengths: torch.Tensor | None = None,
    delta: float | None = None,
) -> int:
    """How many pairs lie so close to their threshold that rounding may decide them."""
    problem = _problem(states, keys, None, causal, score, "sum", lengths, delta)
    return sum(int(_pairs(problem, *block).borderline.sum()) for block in _blocks(problem))


def assert_relative(
    name: str, got: torch.Tensor, truth: torch.Tensor, rtol: float, floor: float = 0.0
) -> None:
    """Raise unless every entry is within `rtol` of the truth, relative to its largest entry.

    `floor` is the size of the terms where they may cancel to nothing.
    """
    assert got.shape == truth.shape, f"{name}: shape {got.shape}, expected {truth.shape}"
    if not truth.numel():
        return
    got, truth = got.detach().cpu().double(), truth.detach().cpu().double()
    assert truth.isfinite().all(), f"{name}: the truth is not finite, nothing to compare with"
    error = (got - truth).abs().max().item()
    size = max(floor, truth.abs().max().item())
    assert error <= rtol * size, f"{name}: error {error:.3g} is more than {rtol:g} of {size:.3g}"


def assert_no_missing_gradient(name: str, got: torch.Tensor, truth: torch.Tensor) -> None:
    """Raise if an entry is exactly zero where the true gradient is not negligible."""
    missing = (got == 0) & (truth.abs() > 1e-12 * truth.abs().max())
    assert not missing.any(), f"{name}: {int(missing.sum())} of {got.numel()} gradients are missing"
