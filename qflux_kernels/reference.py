"""The operators in plain PyTorch, O(S^2) in time and memory: the truth the kernels are held to.

Nothing here is fused or clever. Non-finite inputs need care all the same: multiplying an
invisible key by a zero weight would turn its NaN into everybody's, so pairs are computed on
finite stand-ins and the rows that can see a non-finite input are set to NaN afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from .arguments import (
    COMPUTE_DTYPES,
    EvolveArguments,
    EvolveOptions,
    InteractArguments,
    InteractOptions,
    evolve_arguments,
    interact_arguments,
    widen,
)
from .checks import check_choice, check_integer
from .options import (
    ALGORITHMS,
    Evolution,
    Interaction,
    InverseGate,
    Radius,
    Score,
    Sparsemax,
    Threshold,
)
from .step import MIN_RADIUS, blend, free_radius

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Pairs(NamedTuple):
    """Weights of a block of rows against every key."""

    weight: torch.Tensor  # (*batch, R, K), zero where a pair is dropped or invisible
    kept: torch.Tensor  # (*batch, R, K) bool
    visible: torch.Tensor  # (*batch or 1s, R, K) bool


def _per_pair(value: float | torch.Tensor) -> float | torch.Tensor:
    return value[..., None, None] if isinstance(value, torch.Tensor) else value


def _finite(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor with non-finite points zeroed, and which points those were."""
    finite = tensor.isfinite().all(-1)
    return torch.where(finite[..., None], tensor, torch.zeros_like(tensor)), ~finite


def _masks(
    args: InteractArguments, first: int, last: int, num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys rows first..last-1 may see, and which enter their statistics."""
    device = args.states.device
    row = torch.arange(first, last, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    everything = torch.ones(last - first, num_keys, dtype=torch.bool, device=device)
    if args.lengths is not None:
        length = args.lengths[..., None, None]
        everything = everything & (key < length) & (row < length)
    visible = everything
    if args.causal:
        visible = visible & (key <= row + num_keys - args.states.shape[-2])
    return visible, everything if args.score.whole_window else visible


def weights(args: InteractArguments, first: int = 0, last: int | None = None) -> Pairs:
    """The pair weights of rows `first` to `last - 1` against all keys, by the formulas alone."""
    last = args.states.shape[-2] if last is None else last
    rows, bad_rows = _finite(args.states[..., first:last, :])
    keys, bad_keys = _finite(args.states if args.keys is None else args.keys)
    visible, window = _masks(args, first, last, keys.shape[-2])
    bad = (bad_rows[..., :, None] | bad_keys[..., None, :]) & window
    nan, zero = rows.new_tensor(float("nan")), rows.new_zeros(())

    score = args.score
    if isinstance(score, Threshold):
        s = (rows @ keys.mT + 1) / 2
        mean, deviation = _statistics(s, window, score.eps)
        tau = mean + _per_pair(score.sigma) * deviation
        tau = torch.where(bad.any(-1, keepdim=True), nan, tau)
        limit = tau.detach()
        kept = visible & ~(s < limit)
        weight = torch.where(limit.isnan(), nan, s)
        if score.shrinkage == "soft":
            weight = weight - tau
    elif isinstance(score, InverseGate):
        rotated = torch.stack((rows[..., 1], -rows[..., 0]), -1)
        s = (rows + _per_pair(score.alpha) * rotated) @ keys.mT
        gate = 1 / (score.eps + s.abs())
        kept = visible & (bad | ~(gate.detach() <= _per_pair(score.min_gate)))
        weight = torch.where(bad, nan, s * gate)
    elif isinstance(score, Sparsemax):
        z = _per_pair(score.scale) * (rows @ keys.mT)
        if z.shape[-1] > 0:
            # Relative to the largest, which changes no weight: else its size would round them away.
            top = torch.where(visible, z.detach(), -torch.inf).amax(-1, keepdim=True)
            z = z - torch.where(top == -torch.inf, zero, top)
        tau = _mass_threshold(torch.where(visible, z, -torch.inf))
        tau = torch.where(bad.any(-1, keepdim=True), nan, tau)
        kept = visible & ~(z <= tau.detach())
        weight = z - tau
    else:
        raise NotImplementedError(f"the reference has no formula for {type(score).__name__}")
    return Pairs(torch.where(kept, weight, zero), kept, visible)


def _statistics(
    s: torch.Tensor, window: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sqrt(variance + eps) `(..., 1)` of the scores in the window of each row."""
    zero = s.new_zeros(())
    count = window.sum(-1, keepdim=True).clamp(min=1)
    unit = s.new_ones(())
    if s.shape[-1] > 0:
        # Sums and squares of large scores would overflow: they are taken in units of the largest.
        largest = torch.where(window, s.detach().abs(), zero).amax(-1, keepdim=True)
        unit = torch.where(largest > torch.finfo(s.dtype).max ** 0.4, largest, unit)
    s = s / unit
    mean = torch.where(window, s, zero).sum(-1, keepdim=True) / count
    variance = torch.where(window, (s - mean) ** 2, zero).sum(-1, keepdim=True) / count
    # What is added to a variance of zero must not vanish.
    least = (eps / unit / unit).clamp(min=torch.finfo(s.dtype).tiny if eps > 0 else 0.0)
    return unit * mean, unit * torch.sqrt(variance + least)


def _mass_threshold(z: torch.Tensor) -> torch.Tensor:
    """tau `(..., 1)` with sum max(z - tau, 0) = 1 over the last dimension; 0 of an empty row.

    What is invisible is -inf. The decision is taken on sorted numbers, and the gradient flows
    through those that are kept.
    """
    if z.shape[-1] == 0:
        return z.new_zeros(*z.shape[:-1], 1)
    ranked = z.detach().sort(-1, descending=True).values
    top = ranked[..., :1]
    below = torch.where(ranked.isfinite(), ranked - top, -torch.inf)
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    # The first k are kept if the k-th exceeds the threshold that they would have.
    mass = torch.where(ranked.isfinite(), below, below.new_zeros(())).cumsum(-1)
    count = (rank * below + 1 > mass).sum(-1, keepdim=True)
    last = ranked.gather(-1, (count - 1).clamp(min=0))
    kept = (z.detach() >= last) & z.detach().isfinite()
    excess = torch.where(kept, z - top, z.new_zeros(())).sum(-1, keepdim=True) - 1
    tau = top + excess / kept.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(count > 0, tau, tau.new_zeros(()))


def interact_checked(args: InteractArguments) -> Interaction:
    """`interact` of arguments that have been checked."""
    result = _interact(args.widened())
    dtype = args.result_dtype
    return Interaction(result.context.to(dtype), result.strength.to(dtype), result.degree)


def _interact(args: InteractArguments) -> Interaction:
    with torch.autocast(args.states.device.type, enabled=False):
        pairs = weights(args)
        keys = args.states if args.keys is None else args.keys
        values = keys if args.values is None else args.values
        finite = torch.where(values.isfinite(), values, torch.zeros_like(values))
        context = pairs.weight @ finite
        poisoned = pairs.visible.to(values.dtype) @ (~values.isfinite()).to(values.dtype) > 0
        context = torch.where(poisoned, context.new_tensor(float("nan")), context)
        strength = pairs.weight.sum(-1)
        if args.reduction == "mean":
            count = pairs.visible.sum(-1).clamp(min=1)
            context, strength = context / count[..., None], strength / count
    degree = pairs.kept.sum(-1, dtype=torch.int32)
    return Interaction(context, strength, degree)


def interact(
    states: torch.Tensor,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    *,
    algorithm: str = "auto",
    backend: str = "reference",
    **options: Unpack[InteractOptions],
) -> Interaction:
    """`qflux_kernels.interact` in plain PyTorch; `algorithm` has no effect here."""
    _check_choices(algorithm, backend)
    return interact_checked(interact_arguments(states, keys, values, **options))


def _check_choices(algorithm: str, backend: str) -> None:
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_choice("backend", backend, ("auto", "reference"))


def move_radius(
    moved: torch.Tensor,
    strength: torch.Tensor,
    radius: Radius,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The moved states with their radii set by the radius rule.

    `bounds`, the smallest and the largest radius, broadcast to those of the states and stand in for
    the rule's own; they get gradients.
    """
    norm = torch.linalg.vector_norm(moved, dim=-1).clamp(min=MIN_RADIUS)
    target = free_radius(norm, strength, radius)
    if bounds is None:
        target = target.clamp(radius.min, radius.max)
    else:
        low, high = bounds
        target = torch.minimum(torch.maximum(target, low), high)
    return moved * (target / norm)[..., None]


def evolve(
    states: torch.Tensor,
    dt: float | torch.Tensor,
    *,
    algorithm: str = "auto",
    backend: str = "reference",
    **options: Unpack[EvolveOptions],
) -> Evolution:
    """`qflux_kernels.evolve` in plain PyTorch; `algorithm` has no effect here."""
    _check_choices(algorithm, backend)
    return evolve_checked(evolve_arguments(states, dt, **options))


def evolve_checked(
    args: EvolveArguments,
    interaction: Callable[[InteractArguments], Interaction] | None = None,
    positions: torch.Tensor | None = None,
) -> Evolution:
    """`evolve` of arguments that have been checked.

    Args:
        args: what to evolve.
        interaction: computes a stage's interaction; default the reference's.
        positions: `(S,)`, the places of the tokens in their sequences; default 0 to S - 1.
    """
    interaction = _interact if interaction is None else interaction
    x = given = widen(args.states)
    present = None
    if args.lengths is not None:
        token = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
        present = (token < args.lengths[..., None])[..., None]

    def of_tokens(tensor: torch.Tensor) -> torch.Tensor:
        # Zero for padding: the zero gradient of what is not finite would be NaN.
        return tensor if present is None else torch.where(present, tensor, 0.0)

    x = of_tokens(x)
    pairs = InteractArguments(
        states=x,
        keys=None,
        values=None,
        causal=args.causal,
        score=args.score,
        reduction=args.reduction,
        lengths=args.lengths,
        result_dtype=x.dtype,
    )

    def of_step(value: float | torch.Tensor, step: int) -> float | torch.Tensor:
        if isinstance(value, torch.Tensor):
            return of_tokens(value[min(step, len(value) - 1), ..., None])
        return value

    strength = degree = x  # of the last step, and there is one
    for step in range(args.steps):
        step_dt = of_step(args.dt, step)
        context, strength, degree = interaction(replace(pairs, states=x))
        k1 = step_dt * context
        k2 = step_dt * interaction(replace(pairs, states=x + k1)).context
        moved = x + (k1 + k2) / 2
        if args.radius is not None:
            moved = move_radius(moved, strength, args.radius)
        if args.skip is not None:
            moved = blend(of_step(args.skip, step), x, moved)
        x = of_tokens(moved)
    if present is not None:
        x = torch.where(present, x, given)
    dtype = args.result_dtype
    return Evolution(x.to(dtype), strength.to(dtype), degree)


def scores(
    states: torch.Tensor,
    *,
    causal: bool = True,
    score: Score = Threshold(),  # noqa: B008 (frozen)
    layout: str = "dense",
    rows: int | None = None,
) -> torch.Tensor:
    """The weights w_ij themselves, for analysis.

    Args:
        states: `(..., S, 2)` floating point; for `layout="csr"` one sequence, `(S, 2)`.
        causal, score: as in `interact`.
        layout: "dense" returns `(..., S, S)`, zero where a pair is dropped or invisible. "csr"
            returns a sparse `(S, S)` tensor of the kept pairs without ever forming S x S.
        rows: how many rows there are in place of S, the last ones, in [0, S]; None (default): all.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    check_choice("layout", layout, ("dense", "csr"))
    args = interact_arguments(states, causal=causal, score=score).widened()
    length = args.states.shape[-2]
    start = 0 if rows is None else length - check_integer("rows", rows, 0, length)
    if layout == "csr":
        return _csr_scores(args, start)
    with torch.autocast(args.states.device.type, enabled=False):
        return weights(args, start).weight.to(args.result_dtype)


def _csr_scores(args: InteractArguments, start: int, block_pairs: int = 1 << 20) -> torch.Tensor:
    """Kept pairs of rows from `start` on, in blocks of rows: at most `block_pairs` weights at once.

    A row alone may have more.
    """
    length = args.states.shape[-2]
    if args.states.dim() != 2:
        raise ValueError(
            "layout='csr' takes the states of one sequence, shape (S, 2), "
            f"got {tuple(args.states.shape)}"
        )
    block = max(1, block_pairs // max(1, length))
    columns, entries, counts = [], [], []
    for first in range(start, length, block):
        pairs = weights(args, first, min(length, first + block))
        counts.append(pairs.kept.sum(-1))
        columns.append(pairs.kept.nonzero()[:, 1])
        entries.append(pairs.weight[pairs.kept])
    empty = args.states.new_zeros(0)
    counts = torch.cat([empty.long(), *counts])
    return torch.sparse_csr_tensor(
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        torch.cat([empty.long(), *columns]),
        torch.cat([empty, *entries]).to(args.result_dtype),
        size=(length - start, length),
        device=args.states.device,
    )


def project_norm(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`qflux_kernels.project_norm` for arguments that it has checked: the same closed form.

    Any number of features, any device, derivatives of any order.
    """
    dtype, width = COMPUTE_DTYPES[features.dtype], weight.shape[0]
    inputs = features.to(dtype)
    inputs = torch.cat((inputs, inputs.new_ones(*inputs.shape[:-1], 1)), -1)
    offset = weight.new_zeros(width) if bias is None else bias
    matrix = torch.cat((weight, offset[:, None]), -1).to(dtype)
    matrix = matrix - matrix.mean(0)
    gram = matrix.mT @ matrix / width
    variance = ((inputs @ gram) * inputs).sum(-1, keepdim=True).clamp(min=0)
    inputs = inputs * torch.rsqrt(variance + eps)
    if norm_weight is not None:
        matrix = matrix * norm_weight.to(dtype)[:, None]
    shift = None if norm_bias is None else norm_bias.to(dtype)
    return torch.nn.functional.linear(inputs, matrix, shift).to(features.dtype)
