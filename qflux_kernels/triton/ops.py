"""The dispatcher ops `qflux_kernels::triton_*`: from the op table, and from tensors to kernels.

They take and return what the compiled ops do. The kernels know one batch dimension, so tensors come
here with theirs merged: states `(B, S, 2)`, keys `(B, K, 2)`, values `(B, K, D)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import autograd
from ..schema import (
    EVOLVE,
    EVOLVE_BACKWARD,
    FAMILY_OPS,
    INTERACT,
    INTERACT_BACKWARD,
    SCORE_KINDS,
    TAPE,
    TAPE_PLANES,
    THRESHOLD_BACKWARD,
    TRITON,
    Field,
    Op,
)
from ..step import RadiusRule, blend
from .thresholds import threshold_vjp

MAX_LENGTH = 1 << 30
# Columns of the values that one program sums at a time; a float64 fills two registers.
MAX_COLUMNS = {torch.float32: 8, torch.float64: 4}
# Excess of a mass beneath which a step changes tau by no more than rounding does.
MASS_TOLERANCE = {torch.float32: 2.0**-21, torch.float64: 2.0**-50}


def _launch(kernel: str, blocks: int, device: torch.device, *arguments, **constants) -> None:
    # Imported late: Triton takes a while to load, and those who do not use it need not wait.
    from . import kernels

    with torch.accelerator.device_index(device.index):
        getattr(kernels, kernel)[(blocks,)](*arguments, **constants)


def _blocks(owners: int, size: int) -> int:
    return (owners + size - 1) // size


class _Pairs:
    """The pairs of one call: what `interact` and `evolve` share in their schemas."""

    def __init__(self, given: Any, like: torch.Tensor) -> None:
        def per_sequence(tensor: torch.Tensor | None, value: float) -> torch.Tensor:
            tensor = like.new_full((), value) if tensor is None else tensor
            return tensor.expand(len(like)).contiguous()

        self.coefficient = per_sequence(given.coefficient, given.coefficient_value)
        self.min_gate = per_sequence(given.min_gate, given.min_gate_value)
        self.lengths = given.lengths
        self.score = SCORE_KINDS[given.score]
        self.eps = given.eps
        self.whole_window = given.whole_window
        self.causal = given.causal
        self.mean = given.mean

    def limit(self, threshold: torch.Tensor) -> torch.Tensor:
        """What decides each row's pairs."""
        if self.score.thresholded:
            return threshold
        return self.min_gate[:, None].expand_as(threshold).contiguous()

    def ends(self, keys: torch.Tensor) -> torch.Tensor | None:
        """How many tokens each sequence has, as the kernels take it."""
        if self.lengths is None:
            return None
        return self.lengths.clamp(0, keys.shape[1]).to(torch.int32).contiguous()

    def visible(self, states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """How many keys each row sees: `(B, S)`."""
        batch, rows, _ = states.shape
        row = torch.arange(rows, device=states.device)
        count = torch.full_like(row, keys.shape[1])
        if self.causal:
            count = (row + keys.shape[1] - rows + 1).clamp(0, keys.shape[1])
        if self.lengths is None:
            return count.expand(batch, rows)
        length = self.lengths[:, None]
        return torch.where(row < length, torch.minimum(count, length), 0)

    def reduction(self, states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The factor of each row's sums: `(B, S)`."""
        if not self.mean:
            return states.new_ones(states.shape[:2])
        return 1 / self.visible(states, keys).clamp(min=1).to(states.dtype)

    def constants(self) -> dict[str, object]:
        return {"eps": self.eps, "SCORE": self.score.name, "CAUSAL": self.causal}


def _check(name: str, tensor: torch.Tensor, states: torch.Tensor, *shape: int) -> None:
    """Guard raw calls: kernels trust their pointers. A negative size admits any."""
    fits = tensor.dim() == len(shape) and all(
        wanted in (size, -1) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype != states.dtype or tensor.device != states.device:
        raise RuntimeError(
            f"qflux_kernels: {name} must be {states.dtype} on {states.device} with shape {shape}, "
            f"got {tensor.dtype} on {tensor.device} with shape {tuple(tensor.shape)}"
        )


def _check_points(
    states: torch.Tensor, keys: torch.Tensor | None, values: torch.Tensor | None
) -> None:
    if states.dtype not in MAX_COLUMNS:
        raise RuntimeError(f"qflux_kernels: states must be float32 or float64, got {states.dtype}")
    _check("states", states, states, -1, -1, 2)
    batch, count, _ = states.shape
    if keys is not None:
        _check("keys", keys, states, batch, -1, 2)
        count = keys.shape[1]
    value_dim = 2
    if values is not None:
        _check("values", values, states, batch, count, -1)
        value_dim = values.shape[2]
    if max(states.shape[1], count, value_dim) >= MAX_LENGTH:
        raise RuntimeError(
            "the Triton kernels take fewer than 2^30 rows, keys and value columns, got "
            f"{states.shape[1]}, {count} and {value_dim}"
        )


def _forward(
    pairs: _Pairs,
    states: torch.Tensor,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> Any:
    from . import kernels

    batch, rows, _ = states.shape
    points = states if keys is None else keys
    value_dim = 2 if values is None else values.shape[2]
    result = INTERACT.Results(
        context=states.new_zeros(batch, rows, value_dim),
        strength=states.new_zeros(batch, rows),
        degree=states.new_zeros(batch, rows, dtype=torch.int32),
        threshold=states.new_zeros(batch, rows),
        moments=None,
    )
    if not (states.numel() and points.numel()):
        return result
    states, points = states.contiguous(), points.contiguous()
    ends, sizes = pairs.ends(points), (batch, rows, points.shape[1])
    scale = pairs.reduction(states, points)
    query = kernels.query(pairs.score.name, states, pairs.coefficient)
    rest = None
    if pairs.score.mass:
        rest = torch.empty_like(result.threshold)
        _launch(
            "mass_thresholds", batch * _blocks(rows, kernels.TILE), states.device,
            query, points, ends, result.threshold, rest, *sizes,
            tolerance=MASS_TOLERANCE[states.dtype], SCORE=pairs.score.name, CAUSAL=pairs.causal,
            OWNERS=kernels.TILE, SOURCES=kernels.TILE, CHUNK=kernels.CHUNK,
        )  # fmt: skip
    elif pairs.score.thresholded:
        _launch(
            "thresholds", batch * _blocks(rows, kernels.THRESHOLD_ROWS), states.device,
            states, points, pairs.coefficient, ends, result.threshold, *sizes,
            eps=pairs.eps, CAUSAL=pairs.causal and not pairs.whole_window,
            WHOLE=pairs.whole_window or not pairs.causal,
            ROWS=kernels.THRESHOLD_ROWS, KEYS=kernels.TILE,
        )  # fmt: skip
    if pairs.score.thresholded:
        # No comparison with an undefined threshold means anything.
        scale = torch.where(result.threshold.isnan(), result.threshold, scale)
    _gather_values(
        pairs, query, points, result.threshold, rest, values, scale, ends,
        result.context, result.strength, result.degree, by_key=False,
    )  # fmt: skip
    return result


def _gather_values(
    pairs, query, points, threshold, rest, values, scale, ends, out, strength, degree, *, by_key
):
    from . import kernels

    (batch, rows, _), (_, owners, value_dim) = query.shape, out.shape
    columns = min(MAX_COLUMNS[out.dtype], 1 << (value_dim - 1).bit_length())
    tile = kernels.TILE if values is None else kernels.VALUE_TILE
    _launch(
        "gather_values",
        batch * _blocks(owners, tile) * _blocks(value_dim, columns), out.device,
        query, points, pairs.limit(threshold), rest,
        points if values is None else values.contiguous(), scale, ends, out, strength, degree,
        batch, rows, points.shape[1], value_dim,
        BY_KEY=by_key, ALONE=values is None, COLUMNS=columns, OWNERS=tile, SOURCES=tile,
        CHUNK=kernels.CHUNK, **pairs.constants(),
    )  # fmt: skip


class _Gradients(NamedTuple):
    states: torch.Tensor  # of the keys too, where they are the states
    keys: torch.Tensor | None
    values: torch.Tensor | None
    coefficient: torch.Tensor  # (B,)
    threshold: torch.Tensor | None  # (B, S); where the limit has a gradient


def _backward(
    pairs: _Pairs, grad_context, grad_strength, threshold, states, keys=None, values=None,
    need_rows=True, need_keys=True,
) -> _Gradients:  # fmt: skip
    from . import kernels

    batch, rows, _ = states.shape
    points = states if keys is None else keys
    grad_states: Any = states.new_zeros(states.shape)
    grad_coefficient = states.new_zeros(batch)
    grad_threshold = threshold.new_zeros(batch, rows) if pairs.score.limit_vjp else None
    grad_points = points.new_zeros(points.shape)
    grad_values = None if values is None else values.new_zeros(values.shape)
    if states.numel() and points.numel():
        states, points = states.contiguous(), points.contiguous()
        threshold = threshold.contiguous()
        score, ends = pairs.score.name, pairs.ends(points)
        query = kernels.query(score, states, pairs.coefficient)
        if pairs.mean:
            scale = pairs.reduction(states, points)
            grad_context = grad_context * scale[..., None]
            grad_strength = None if grad_strength is None else grad_strength * scale
        grad_context = grad_context.contiguous()
        grad_strength = None if grad_strength is None else grad_strength.contiguous()

        # The key pass of a mass starts from what its row pass found. The strength has no gradient.
        mass = pairs.score.mass
        found = torch.empty_like(threshold) if mass else grad_threshold
        if mass:
            grad_strength = None

        def gather_points(like, by_key):
            out = torch.empty_like(like)
            _launch(
                "gather_points", batch * _blocks(like.shape[1], kernels.TILE), like.device,
                query, points, pairs.limit(threshold),
                points if values is None else values.contiguous(), grad_context,
                found if mass and by_key else grad_strength, ends, out, None if by_key else found,
                batch, rows, points.shape[1], grad_context.shape[2],
                BY_KEY=by_key, ALONE=values is None, OWNERS=kernels.TILE,
                SOURCES=kernels.TILE, CHUNK=kernels.CHUNK, **pairs.constants(),
            )  # fmt: skip
            return out

        if need_rows or mass:
            grad_query = gather_points(states, by_key=False)
        if need_rows:
            grad_states = kernels.query_vjp(score, grad_query, pairs.coefficient)
            share = kernels.coefficient_vjp(score, grad_query, states)
            if share is not None:
                # Padding has no share, whatever it holds.
                share = torch.where(pairs.visible(states, points) > 0, share, 0.0)
                grad_coefficient = share.sum(-1)
        if need_keys:
            grad_points = gather_points(points, by_key=True)
            if values is not None:
                _gather_values(
                    pairs, query, points, threshold, None, grad_context, None, ends,
                    grad_values, None, None, by_key=True,
                )  # fmt: skip
    if keys is None:
        grad_states, grad_points = grad_states + grad_points, None
    return _Gradients(grad_states, grad_points, grad_values, grad_coefficient, grad_threshold)


def _interact(given: Any) -> Any:
    _check_points(given.states, given.keys, given.values)
    return _forward(_Pairs(given, given.states), given.states, given.keys, given.values)


def _interact_backward(given: Any) -> Any:
    states, keys, values = given.states, given.keys, given.values
    _check_points(states, keys, values)
    (batch, rows, _), value_dim = states.shape, 2 if values is None else values.shape[2]
    _check("grad_context", given.grad_context, states, batch, rows, value_dim)
    _check("grad_strength", given.grad_strength, states, batch, rows)
    _check("threshold", given.threshold, states, batch, rows)
    grads = _backward(
        _Pairs(given, states), given.grad_context, given.grad_strength, given.threshold,
        states, keys, values, given.need_rows, given.need_keys,
    )  # fmt: skip
    return INTERACT_BACKWARD.Results(
        grad_states=grads.states,
        grad_keys=grads.keys,
        grad_values=grads.values,
        grad_coefficient=None if given.coefficient is None else grads.coefficient,
        grad_threshold=grads.threshold,
    )


def _threshold_backward(given: Any) -> Any:
    states = given.states
    _check_points(states, given.keys, None)
    _check("grad_threshold", given.grad_threshold, states, *states.shape[:2])
    of_states, of_keys, of_sigma = threshold_vjp(
        given.grad_threshold, states, given.keys,
        given.coefficient_value if given.coefficient is None else given.coefficient,
        given.lengths, given.eps, given.whole_window, given.causal,
    )  # fmt: skip
    return THRESHOLD_BACKWARD.Results(
        grad_states=of_states,
        grad_keys=of_keys,
        grad_coefficient=None if given.coefficient is None else of_sigma,
    )


class _Saved(NamedTuple):
    """What a step leaves on the tape for its backward, O(S) numbers: the planes of `TAPE`."""

    states: torch.Tensor
    middle: torch.Tensor
    context: torch.Tensor
    middle_context: torch.Tensor
    strength: torch.Tensor
    threshold: torch.Tensor
    middle_threshold: torch.Tensor

    def write(self, planes: torch.Tensor) -> None:
        """To `(TAPE_PLANES, B, S)`."""
        at = 0
        for name, size in TAPE.items():
            tensor = getattr(self, name)
            planes[at : at + size] = tensor if size == 1 else tensor.movedim(-1, 0)
            at += size

    @classmethod
    def read(cls, planes: torch.Tensor) -> _Saved:
        parts = planes.split(list(TAPE.values()))
        return cls(
            **{
                name: part[0] if size == 1 else part.movedim(0, -1).contiguous()
                for (name, size), part in zip(TAPE.items(), parts, strict=True)
            }
        )


class _Steps:
    """The step of one call: what `evolve` and its backward share in their schemas."""

    def __init__(self, given: Any, states: torch.Tensor) -> None:
        self.given = given
        self.rule = RadiusRule(
            given.has_radius, given.radius_min, given.radius_max, given.radius_rate,
            given.radius_reversion, given.radius_target,
        )  # fmt: skip
        self.inside = None  # which tokens are no padding: (B, S, 1), or None for all
        if given.lengths is not None:
            token = torch.arange(states.shape[1], device=states.device)
            self.inside = (token < given.lengths[:, None])[..., None]

    def numbers(self, step: int) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """`dt` and `skip`, numbers or `(B, S, 1)`."""
        given = self.given
        return (
            _of_step(given.dt, given.dt_value, step),
            _of_step(given.skip, given.skip_value, step),
        )


def _of_step(tensor: torch.Tensor | None, value: float, step: int) -> float | torch.Tensor:
    return value if tensor is None else tensor[min(step, len(tensor) - 1), ..., None]


def _end_of_heun(saved: _Saved, dt: float | torch.Tensor) -> torch.Tensor:
    return saved.states + dt / 2 * (saved.context + saved.middle_context)


def _evolve(given: Any) -> Any:
    states = given.states
    _check_points(states, None, None)
    pairs, steps = _Pairs(given, states), _Steps(given, states)
    tape = states.new_empty(given.steps if given.save else 0, TAPE_PLANES, *states.shape[:2])
    x, first = states.contiguous(), None
    for step in range(given.steps):
        dt, skip = steps.numbers(step)
        first = _forward(pairs, x)
        middle = x + dt * first.context
        second = _forward(pairs, middle)
        saved = _Saved(
            x, middle, first.context, second.context,
            first.strength, first.threshold, second.threshold,
        )  # fmt: skip
        if given.save:
            saved.write(tape[step])
        evolved = steps.rule.move(_end_of_heun(saved, dt), first.strength)
        result = blend(skip, x, evolved)
        x = result if steps.inside is None else torch.where(steps.inside, result, x)
    if first is None:
        raise RuntimeError(f"qflux_kernels: steps must be at least 1, got {given.steps}")
    return EVOLVE.Results(result=x, strength=first.strength, degree=first.degree, tape=tape)


def _stage_backward(
    pairs: _Pairs, grad_context, grad_strength, threshold, states
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a stage's states and of the coefficient, those by the threshold included."""
    grads = _backward(pairs, grad_context, grad_strength, threshold, states)
    if grads.threshold is None:
        return grads.states, grads.coefficient
    of_states, _, of_sigma = threshold_vjp(
        grads.threshold, states, None, pairs.coefficient, pairs.lengths, pairs.eps,
        pairs.whole_window, pairs.causal,
    )  # fmt: skip
    return grads.states + of_states, grads.coefficient + of_sigma


def _evolve_backward(given: Any) -> Any:
    grad, tape = given.grad_states.contiguous(), given.tape
    _check_points(grad, None, None)
    _check("grad_strength", given.grad_strength, grad, *grad.shape[:2])
    _check("tape", tape, grad, given.steps, TAPE_PLANES, *grad.shape[:2])
    pairs, steps = _Pairs(given, grad), _Steps(given, grad)
    grad_dt = None if given.dt is None else tape.new_zeros(given.dt.shape)
    grad_skip = None if given.skip is None else tape.new_zeros(given.skip.shape)
    grad_coefficient = tape.new_zeros(len(grad))
    inside = steps.inside
    for step in reversed(range(given.steps)):
        saved = _Saved.read(tape[step])
        dt, skip = steps.numbers(step)

        moved = _end_of_heun(saved, dt)
        evolved = steps.rule.move(moved, saved.strength)
        of_skip = (grad * (saved.states - evolved)).sum(-1)
        of_moved, of_strength = steps.rule.move_vjp(moved, saved.strength, (1 - skip) * grad)
        if step + 1 == given.steps:
            of_strength = of_strength + given.grad_strength
        of_states = skip * grad + of_moved
        if inside is not None:
            of_skip = torch.where(inside[..., 0], of_skip, 0.0)
            of_moved = torch.where(inside, of_moved, 0.0)
            of_strength = torch.where(inside[..., 0], of_strength, 0.0)
            of_states = torch.where(inside, of_states, grad)

        # Half of x' is k1 itself; the other half arrives through x + k1.
        half = of_moved / 2
        of_middle, by_middle = _stage_backward(
            pairs, dt * half, None, saved.middle_threshold, saved.middle
        )
        of_k1 = half + of_middle
        of_first, by_first = _stage_backward(
            pairs, dt * of_k1, of_strength, saved.threshold, saved.states
        )
        grad = of_states + of_middle + of_first
        grad_coefficient = grad_coefficient + by_middle + by_first
        if grad_dt is not None:
            of_dt = of_k1 * saved.context + half * saved.middle_context
            grad_dt[min(step, len(grad_dt) - 1)] += of_dt.sum(-1)
        if grad_skip is not None:
            grad_skip[min(step, len(grad_skip) - 1)] += of_skip
    return EVOLVE_BACKWARD.Results(
        grad_input=grad,
        grad_dt=grad_dt,
        grad_skip=grad_skip,
        grad_coefficient=None if given.coefficient is None else grad_coefficient,
    )


_KERNELS = {
    INTERACT: _interact,
    INTERACT_BACKWARD: _interact_backward,
    THRESHOLD_BACKWARD: _threshold_backward,
    EVOLVE: _evolve,
    EVOLVE_BACKWARD: _evolve_backward,
}


def _any_batch(op: Op, rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The rule on tensors with any batch dimensions: merged on the way in, restored behind it."""
    name = "states" if "states" in op.Arguments._fields else "grad_states"

    def run(given: Any) -> Any:
        points = getattr(given, name)
        batch = points.shape[:-2]
        merged = {}
        for field in op.arguments:
            tensor, at = getattr(given, field.name), field.batch
            if at is None or tensor is None:
                continue
            end = at + len(batch)
            if tensor.shape[at:end] != batch:
                raise RuntimeError(
                    f"qflux_kernels: {field.name} must be of the batch shape {tuple(batch)} of "
                    f"{name}, got shape {tuple(tensor.shape)}"
                )
            shape = (*tensor.shape[:at], batch.numel(), *tensor.shape[end:])
            merged[field.name] = tensor.reshape(shape)
        found = rule(given._replace(**merged))

        def restored(result: torch.Tensor | None, field: Field) -> torch.Tensor:
            if result is None:  # the gradient of what was not given
                return points.new_empty(0)
            at = field.batch
            if at is None:
                return result
            return result.reshape((*result.shape[:at], *batch, *result.shape[at + 1 :]))

        return op.Results(*map(restored, found, op.results))

    return run


_LIBRARY = torch.library.Library("qflux_kernels", "FRAGMENT")


def register() -> None:
    """Declare the ops with their kernels and fakes, unless an earlier import of this did."""
    for op in FAMILY_OPS:
        if hasattr(torch.ops.qflux_kernels, TRITON + op.name):
            continue
        _LIBRARY.define(f"{TRITON}{op.name}{op.schema}")
        kernel = autograd.by_name(op, _any_batch(op, _KERNELS[op]))
        # What an op computes with is not recorded: its gradient is the Functions' business.
        _LIBRARY.impl(TRITON + op.name, torch.no_grad()(kernel), "CompositeExplicitAutograd")
    autograd.register(TRITON)
