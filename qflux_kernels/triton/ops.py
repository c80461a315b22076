"""The dispatcher ops `qflux_kernels::triton_*`: schemas, and the way from tensors to kernels.

They take and return what the compiled ops do (`csrc/library.cpp`): one batch dimension, states
`(B, S, 2)`, keys `(B, K, 2)`, values `(B, K, D)`, all float32 or all float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import autograd
from .step import RadiusRule, blend

PREFIX = "triton_"
MAX_LENGTH = 1 << 30
# Columns of the values that one program sums at a time; a float64 fills two registers.
MAX_COLUMNS = {torch.float32: 8, torch.float64: 4}

_PAIR = (
    "Tensor? coefficient, float coefficient_value, Tensor? min_gate, float min_gate_value, "
    "Tensor? lengths, int score, float eps, bool row_window, bool causal, bool mean, "
    "int algorithm"
)
_STEP = (
    "int steps, bool has_radius, float radius_min, float radius_max, float radius_rate, "
    "float radius_reversion, float radius_target"
)
_SCHEMAS = {
    "interact": f"(Tensor states, Tensor? keys, Tensor? values, {_PAIR}) "
    "-> (Tensor context, Tensor strength, Tensor degree, Tensor threshold)",
    "interact_backward": "(Tensor grad_context, Tensor grad_strength, Tensor threshold, "
    f"Tensor states, Tensor? keys, Tensor? values, {_PAIR}, bool need_rows, bool need_keys) "
    "-> (Tensor grad_states, Tensor grad_keys, Tensor grad_values, Tensor grad_coefficient, "
    "Tensor grad_threshold)",
    "evolve": "(Tensor states, Tensor? dt, float dt_value, Tensor? skip, float skip_value, "
    f"{_PAIR}, {_STEP}, bool save) "
    "-> (Tensor result, Tensor strength, Tensor degree, Tensor tape)",
    "evolve_backward": "(Tensor grad_states, Tensor grad_strength, Tensor tape, Tensor? dt, "
    f"float dt_value, Tensor? skip, float skip_value, {_PAIR}, {_STEP}) "
    "-> (Tensor grad_input, Tensor grad_dt, Tensor grad_skip, Tensor grad_coefficient)",
}


def _launch(kernel: str, blocks: int, device: torch.device, *arguments, **constants) -> None:
    # Imported late: Triton takes a while to load, and those who do not use it need not wait.
    from . import kernels

    with torch.accelerator.device_index(device.index):
        getattr(kernels, kernel)[(blocks,)](*arguments, **constants)


def _blocks(owners: int, size: int) -> int:
    return (owners + size - 1) // size


class _Pairs:
    """The pairs of one call: what `interact` and `evolve` share in their schemas.

    Scores are functions of the inner product of a key with a query made from the row's state:
    x / 2 for the threshold, x + alpha (y, -x) for the gate.
    """

    def __init__(
        self, like, coefficient, coefficient_value, min_gate, min_gate_value,
        lengths, score, eps, row_window, causal, mean, _algorithm,
    ):  # fmt: skip
        def per_sequence(tensor, value):
            tensor = like.new_full((), value) if tensor is None else tensor
            return tensor.expand(len(like)).contiguous()

        self.coefficient = per_sequence(coefficient, coefficient_value)
        self.min_gate = per_sequence(min_gate, min_gate_value)
        self.lengths = lengths
        self.gate = autograd.SCORES[score] == "inverse_gate"
        self.excess = autograd.SCORES[score] == "soft_threshold"
        self.eps = eps
        self.row_window = row_window
        self.causal = causal
        self.mean = mean

    def query(self, states: torch.Tensor) -> torch.Tensor:
        if not self.gate:
            return states / 2
        return states + self.coefficient[:, None, None] * _turned(states)

    def query_vjp(self, grad: torch.Tensor) -> torch.Tensor:
        if not self.gate:
            return grad / 2
        return grad - self.coefficient[:, None, None] * _turned(grad)

    def limit(self, threshold: torch.Tensor) -> torch.Tensor:
        """What decides each row's pairs."""
        if not self.gate:
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
        return {
            "eps": self.eps, "GATE": self.gate, "EXCESS": self.excess, "CAUSAL": self.causal,
        }  # fmt: skip


def _turned(points: torch.Tensor) -> torch.Tensor:
    x, y = points.unbind(-1)
    return torch.stack((y, -x), -1)


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


def _check_points(states, keys, values) -> None:
    if states.dtype not in MAX_COLUMNS:
        raise RuntimeError(f"qflux_kernels: states must be float32 or float64, got {states.dtype}")
    _check("states", states, states, -1, -1, 2)
    batch, count, _ = states.shape
    if keys is not None:
        _check("keys", keys, states, batch, -1, 2)
        count = keys.shape[1]
    depth = 2
    if values is not None:
        _check("values", values, states, batch, count, -1)
        depth = values.shape[2]
    if max(states.shape[1], count, depth) >= MAX_LENGTH:
        raise RuntimeError(
            "the Triton kernels take fewer than 2^30 rows, keys and value columns, got "
            f"{states.shape[1]}, {count} and {depth}"
        )


class _Forward(NamedTuple):
    context: torch.Tensor
    strength: torch.Tensor
    degree: torch.Tensor
    threshold: torch.Tensor


def _forward(pairs: _Pairs, states, keys=None, values=None) -> _Forward:
    from . import kernels

    batch, rows, _ = states.shape
    points = states if keys is None else keys
    depth = 2 if values is None else values.shape[2]
    result = _Forward(
        context=states.new_zeros(batch, rows, depth),
        strength=states.new_zeros(batch, rows),
        degree=states.new_zeros(batch, rows, dtype=torch.int32),
        threshold=states.new_zeros(batch, rows),
    )
    if not (states.numel() and points.numel()):
        return result
    states, points = states.contiguous(), points.contiguous()
    ends, sizes = pairs.ends(points), (batch, rows, points.shape[1])
    scale = pairs.reduction(states, points)
    if not pairs.gate:
        _launch(
            "thresholds", batch * _blocks(rows, kernels.THRESHOLD_ROWS), states.device,
            states, points, pairs.coefficient, ends, result.threshold, *sizes,
            eps=pairs.eps, CAUSAL=pairs.causal and not pairs.row_window,
            WHOLE=pairs.row_window or not pairs.causal,
            ROWS=kernels.THRESHOLD_ROWS, KEYS=kernels.TILE,
        )  # fmt: skip
        # No comparison with an undefined threshold means anything.
        scale = torch.where(result.threshold.isnan(), result.threshold, scale)
    _gather_values(
        pairs, pairs.query(states), points, result.threshold, values, scale, ends,
        result.context, result.strength, result.degree, by_key=False,
    )  # fmt: skip
    return result


def _gather_values(
    pairs, query, points, threshold, values, scale, ends, out, strength, degree, *, by_key
):
    from . import kernels

    (batch, rows, _), (_, owners, depth) = query.shape, out.shape
    columns = min(MAX_COLUMNS[out.dtype], 1 << (depth - 1).bit_length())
    tile = kernels.TILE if values is None else kernels.VALUE_TILE
    _launch(
        "gather_values",
        batch * _blocks(owners, tile) * _blocks(depth, columns), out.device,
        query, points, pairs.limit(threshold), points if values is None else values.contiguous(),
        scale, ends, out, strength, degree, batch, rows, points.shape[1], depth,
        BY_KEY=by_key, ALONE=values is None, COLUMNS=columns, OWNERS=tile, OTHERS=tile,
        CHUNK=kernels.CHUNK, **pairs.constants(),
    )  # fmt: skip


class _Backward(NamedTuple):
    states: torch.Tensor  # of the keys too, where they are the states
    keys: torch.Tensor | None
    values: torch.Tensor | None
    alpha: torch.Tensor  # (B,)
    threshold: torch.Tensor | None  # (B, S); of the excess only


def _backward(
    pairs: _Pairs, grad_context, grad_strength, threshold, states, keys=None, values=None,
    need_rows=True, need_keys=True,
) -> _Backward:  # fmt: skip
    from . import kernels

    batch, rows, _ = states.shape
    points = states if keys is None else keys
    grad_states, grad_alpha = states.new_zeros(states.shape), states.new_zeros(batch)
    grad_threshold = torch.zeros_like(threshold) if pairs.excess else None
    grad_points = points.new_zeros(points.shape)
    grad_values = None if values is None else values.new_zeros(values.shape)
    if states.numel() and points.numel():
        states, points = states.contiguous(), points.contiguous()
        threshold = threshold.contiguous()
        query, ends = pairs.query(states), pairs.ends(points)
        if pairs.mean:
            scale = pairs.reduction(states, points)
            grad_context = grad_context * scale[..., None]
            grad_strength = None if grad_strength is None else grad_strength * scale
        grad_context = grad_context.contiguous()
        grad_strength = None if grad_strength is None else grad_strength.contiguous()

        def gather_points(like, by_key):
            out = torch.empty_like(like)
            _launch(
                "gather_points", batch * _blocks(like.shape[1], kernels.TILE), like.device,
                query, points, pairs.limit(threshold),
                points if values is None else values.contiguous(), grad_context, grad_strength,
                ends, out, None if by_key else grad_threshold,
                batch, rows, points.shape[1], grad_context.shape[2],
                BY_KEY=by_key, ALONE=values is None, OWNERS=kernels.TILE,
                OTHERS=kernels.TILE, CHUNK=kernels.CHUNK, **pairs.constants(),
            )  # fmt: skip
            return out

        if need_rows:
            grad_query = gather_points(states, by_key=False)
            grad_states = pairs.query_vjp(grad_query)
            if pairs.gate:
                # Padding has no share, whatever it holds.
                share = (grad_query * _turned(states)).sum(-1)
                share = torch.where(pairs.visible(states, points) > 0, share, 0.0)
                grad_alpha = share.sum(-1)
        if need_keys:
            grad_points = gather_points(points, by_key=True)
            if values is not None:
                _gather_values(
                    pairs, query, points, threshold, grad_context, None, ends,
                    grad_values, None, None, by_key=True,
                )  # fmt: skip
    if keys is None:
        return _Backward(grad_states + grad_points, None, grad_values, grad_alpha, grad_threshold)
    return _Backward(grad_states, grad_points, grad_values, grad_alpha, grad_threshold)


def _interact(states, keys, values, *pair):
    _check_points(states, keys, values)
    return tuple(_forward(_Pairs(states, *pair), states, keys, values))


def _interact_backward(
    grad_context, grad_strength, threshold, states, keys, values, coefficient, *rest
):
    *pair, need_rows, need_keys = rest
    _check_points(states, keys, values)
    pairs = _Pairs(states, coefficient, *pair)
    (batch, rows, _), depth = states.shape, 2 if values is None else values.shape[2]
    _check("grad_context", grad_context, states, batch, rows, depth)
    _check("grad_strength", grad_strength, states, batch, rows)
    _check("threshold", threshold, states, batch, rows)
    grads = _backward(
        pairs, grad_context, grad_strength, threshold, states, keys, values, need_rows, need_keys,
    )  # fmt: skip
    return (
        grads.states,
        states.new_empty(0) if keys is None else grads.keys,
        states.new_empty(0) if values is None else grads.values,
        states.new_empty(0) if coefficient is None else grads.alpha,
        grads.threshold if pairs.excess else states.new_empty(0),
    )


class _Saved(NamedTuple):
    """What a step leaves on the tape for its backward, O(S) numbers."""

    states: torch.Tensor
    middle: torch.Tensor
    context: torch.Tensor
    middle_context: torch.Tensor
    strength: torch.Tensor
    threshold: torch.Tensor
    middle_threshold: torch.Tensor

    def write(self, planes: torch.Tensor) -> None:
        """To `(TAPE_PLANES, B, S)`, in the order of `csrc/params.h`."""
        at = 0
        for tensor in self:
            tensor = tensor[..., None] if tensor.dim() == 2 else tensor
            planes[at : at + tensor.shape[-1]] = tensor.movedim(-1, 0)
            at += tensor.shape[-1]

    @classmethod
    def read(cls, planes: torch.Tensor) -> _Saved:
        points = [planes[at : at + 2].movedim(0, -1).contiguous() for at in range(0, 8, 2)]
        return cls(*points, *planes[8:].unbind(0))


def _of_step(tensor: torch.Tensor | None, value: float, step: int) -> float | torch.Tensor:
    """A number, or `(B, S, 1)`."""
    return value if tensor is None else tensor[min(step, len(tensor) - 1), ..., None]


def _inside(pairs: _Pairs, states: torch.Tensor) -> torch.Tensor | None:
    """Which tokens are no padding: `(B, S, 1)`, or None for all."""
    if pairs.lengths is None:
        return None
    token = torch.arange(states.shape[1], device=states.device)
    return (token < pairs.lengths[:, None])[..., None]


def _end_of_heun(saved: _Saved, dt: float | torch.Tensor) -> torch.Tensor:
    return saved.states + dt / 2 * (saved.context + saved.middle_context)


def _evolve(states, dt, dt_value, skip, skip_value, *rest):
    *pair, steps, active, low, high, rate, reversion, target, save = rest
    pairs, rule = _Pairs(states, *pair), RadiusRule(active, low, high, rate, reversion, target)
    _check_points(states, None, None)
    batch, length, _ = states.shape
    inside = _inside(pairs, states)
    tape = states.new_empty(steps if save else 0, autograd.TAPE_PLANES, batch, length)
    x = states.contiguous()
    for step in range(steps):
        step_dt, step_skip = _of_step(dt, dt_value, step), _of_step(skip, skip_value, step)
        first = _forward(pairs, x)
        middle = x + step_dt * first.context
        second = _forward(pairs, middle)
        saved = _Saved(
            x, middle, first.context, second.context,
            first.strength, first.threshold, second.threshold,
        )  # fmt: skip
        if save:
            saved.write(tape[step])
        evolved = rule.move(_end_of_heun(saved, step_dt), first.strength)
        result = blend(step_skip, x, evolved)
        x = result if inside is None else torch.where(inside, result, x)
    return x, first.strength, first.degree, tape


def _evolve_backward(grad_states, grad_strength, tape, dt, dt_value, skip, skip_value, *rest):
    coefficient = rest[0]
    *pair, steps, active, low, high, rate, reversion, target = rest
    pairs, rule = _Pairs(grad_states, *pair), RadiusRule(active, low, high, rate, reversion, target)
    grad_dt = tape.new_zeros(0 if dt is None else dt.shape)
    grad_skip = tape.new_zeros(0 if skip is None else skip.shape)
    inside = _inside(pairs, grad_states)
    grad_alpha = tape.new_zeros(len(grad_states))
    grad = grad_states.contiguous()
    for step in reversed(range(steps)):
        saved = _Saved.read(tape[step])
        step_dt, step_skip = _of_step(dt, dt_value, step), _of_step(skip, skip_value, step)

        moved = _end_of_heun(saved, step_dt)
        evolved = rule.move(moved, saved.strength)
        of_skip = (grad * (saved.states - evolved)).sum(-1)
        of_moved, of_strength = rule.move_vjp(moved, saved.strength, (1 - step_skip) * grad)
        if step + 1 == steps:
            of_strength = of_strength + grad_strength
        of_states = step_skip * grad + of_moved
        if inside is not None:
            of_skip = torch.where(inside[..., 0], of_skip, 0.0)
            of_moved = torch.where(inside, of_moved, 0.0)
            of_strength = torch.where(inside[..., 0], of_strength, 0.0)
            of_states = torch.where(inside, of_states, grad)

        # Half of x' is k1 itself; the other half arrives through x + k1.
        half = of_moved / 2
        middle = _backward(pairs, step_dt * half, None, saved.middle_threshold, saved.middle)
        of_k1 = half + middle.states
        first = _backward(pairs, step_dt * of_k1, of_strength, saved.threshold, saved.states)
        grad = of_states + middle.states + first.states
        grad_alpha = grad_alpha + middle.alpha + first.alpha
        if dt is not None:
            of_dt = of_k1 * saved.context + half * saved.middle_context
            grad_dt[min(step, len(dt) - 1)] += of_dt.sum(-1)
        if skip is not None:
            grad_skip[min(step, len(skip) - 1)] += of_skip
    return grad, grad_dt, grad_skip, grad_alpha if coefficient is not None else tape.new_empty(0)


_LIBRARY = torch.library.Library("qflux_kernels", "FRAGMENT")


def register() -> None:
    """Declare the ops with their kernels and fakes."""
    kernels = {
        "interact": _interact,
        "interact_backward": _interact_backward,
        "evolve": _evolve,
        "evolve_backward": _evolve_backward,
    }
    for name, schema in _SCHEMAS.items():
        _LIBRARY.define(f"{PREFIX}{name}{schema}")
        # What an op computes with is not recorded: its gradient is the Functions' business.
        _LIBRARY.impl(
            f"{PREFIX}{name}", torch.no_grad()(kernels[name]), "CompositeExplicitAutograd"
        )
    autograd.register(PREFIX)
