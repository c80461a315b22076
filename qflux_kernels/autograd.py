"""The differentiable operators on canonical tensors, and the fake kernels that trace them.

Everything here sees one batch dimension: states `(B, S, 2)`, keys `(B, K, 2)`, values `(B, K, D)`.
These may be in half precision, which is how they are saved; the ops get them in float32.
The dispatcher ops come in families with the same schemas: `qflux_kernels::*` are declared in
`csrc/library.cpp`, `qflux_kernels::triton_*` in `triton/ops.py`. The last argument of every
Function here is the prefix of the family's names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .arguments import widen
from .thresholds import threshold_vjp

# `Score` of csrc/params.h: what a pair weighs.
SCORES = ("hard_threshold", "inverse_gate", "soft_threshold")
# Planes a token leaves on the tape at each step of `evolve`, in the order of `csrc/params.h`.
TAPE_PLANES = 11


class PairOptions(NamedTuple):
    """What every op needs to know of a pair, in schema order."""

    score: int  # an index into SCORES
    eps: float
    row_window: bool
    causal: bool
    mean: bool
    algorithm: int  # an index into options.ALGORITHMS


class StepOptions(NamedTuple):
    """The scalar options of an evolution step, in schema order."""

    steps: int
    has_radius: bool
    radius_min: float
    radius_max: float
    radius_rate: float
    radius_reversion: float
    radius_target: float


Coefficient = tuple[torch.Tensor | None, float]


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(
        "qflux_kernels has no second derivatives; "
        "backend='reference' computes them in plain PyTorch"
    )


class _Vmapped(NamedTuple):
    """Where the batch dimension of each argument and result of an op is; None: it has none."""

    arguments: tuple[int | None, ...]
    results: tuple[int, ...]


# In schema order; the scalar options that follow have no batch dimension.
_BATCH_DIMENSIONS = {
    "interact": _Vmapped((0, 0, 0, 0, None, 0, None, 0), (0, 0, 0, 0)),
    "interact_backward": _Vmapped((0, 0, 0, 0, 0, 0, 0, None, 0, None, 0), (0, 0, 0, 0)),
    "evolve": _Vmapped((0, 1, None, 1, None, 0, None, 0, None, 0), (0, 0, 0, 2)),
    "evolve_backward": _Vmapped((0, 0, 0, 2, 1, None, 1, None, 0, None, 0, None, 0), (0, 1, 1, 0)),
}


def _fold(tensor: torch.Tensor, mapped: int | None, size: int, at: int) -> torch.Tensor:
    """Merge a vmapped dimension into the batch dimension `at`, repeating what is not mapped."""
    if mapped is None:
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    else:
        tensor = tensor.movedim(mapped, at)
    return tensor.flatten(at, at + 1)


def _vmap(function: type, op: str, size: int, in_dims: tuple, arguments: tuple) -> tuple:
    """Run `function` once with the vmapped dimension folded into the batch."""
    where = _BATCH_DIMENSIONS[op]
    folded = [
        _fold(argument, mapped, size, at) if at is not None and argument is not None else argument
        for argument, mapped, at in zip(arguments, in_dims, where.arguments, strict=False)
    ]
    outputs = function.apply(*folded, *arguments[len(folded) :])
    unfolded = tuple(
        # An op returns an empty vector for a gradient that it was not asked for.
        output.unflatten(at, (size, -1)) if output.dim() > at and output.shape != (0,) else output
        for output, at in zip(outputs, where.results, strict=True)
    )
    dims = tuple(
        at if after.dim() > before.dim() else None
        for before, after, at in zip(outputs, unfolded, where.results, strict=True)
    )
    return unfolded, dims


def _run(family: str, name: str, arguments: Sequence) -> tuple[torch.Tensor, ...]:
    """The results of an op, in the dtype of the computation."""
    op = getattr(torch.ops.qflux_kernels, family + name)
    return op(*(_widened(argument) for argument in arguments))


def _widened(argument: object) -> object:
    if isinstance(argument, torch.Tensor) and argument.is_floating_point():
        return widen(argument)
    return argument


def _narrowed(
    grads: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor | None], needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Each gradient that is needed, in the dtype of its input."""
    return [
        grad.to(given.dtype) if need else None
        for grad, given, need in zip(grads, inputs, needs, strict=True)
    ]


def _call(function: type) -> Callable:
    """How a backward calls its op. Dynamo traces no function inside a backward, and refuses
    second derivatives itself."""
    return function.forward if torch.compiler.is_compiling() else function.apply


def _add_threshold(
    family: str,
    grads: Sequence[torch.Tensor],
    grad_threshold: torch.Tensor,
    arguments: Sequence,
    pair: PairOptions,
) -> list[torch.Tensor]:
    """The gradients of states, keys, values and sigma with what reaches them by the threshold."""
    states, keys, _values, sigma, sigma_value, _, _, lengths = arguments[3:11]
    states, keys = _widened(states), _widened(keys)
    window = (pair.eps, pair.row_window, pair.causal)
    if family == "" and states.device.type == "cpu":
        op = torch.ops.qflux_kernels.threshold_backward
        by_states, by_keys, by_sigma = op(
            grad_threshold, states, keys, sigma, sigma_value, lengths, *window
        )
    else:
        by_states, by_keys, by_sigma = threshold_vjp(
            grad_threshold, states, keys, sigma_value if sigma is None else sigma, lengths, *window
        )
    of_states, of_keys, of_values, of_sigma = grads
    return [
        of_states + by_states,
        of_keys if keys is None else of_keys + by_keys,
        of_values,
        of_sigma if sigma is None else of_sigma + by_sigma,
    ]


class _InteractBackward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        *arguments, family = arguments
        *grads, grad_threshold = _run(family, "interact_backward", arguments)
        pair = PairOptions(*arguments[11:17])
        if SCORES[pair.score] == "soft_threshold" and arguments[17]:
            grads = _add_threshold(family, grads, grad_threshold, arguments, pair)
        return tuple(grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_refuse_second_derivative)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _vmap(_InteractBackward, "interact_backward", info.batch_size, in_dims, arguments)


class _Interact(torch.autograd.Function):
    # Dynamo leaves out ctx, where nothing needs a gradient, by the number of parameters.
    @staticmethod
    def forward(
        states, keys, values, coefficient, coefficient_value, min_gate, min_gate_value, lengths,
        score, eps, row_window, causal, mean, algorithm, family,
    ):  # fmt: skip
        options = (score, eps, row_window, causal, mean, algorithm)
        return _run(
            family,
            "interact",
            (
                states, keys, values, coefficient, coefficient_value, min_gate, min_gate_value,
                lengths, *options,
            ),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        states, keys, values, coefficient, coefficient_value, min_gate, min_gate_value, lengths = (
            inputs[:8]
        )
        _, _, degree, threshold = output
        ctx.mark_non_differentiable(degree, threshold)
        ctx.save_for_backward(states, keys, values, coefficient, min_gate, lengths, threshold)
        ctx.scalars = (coefficient_value, min_gate_value, *inputs[8:])

    @staticmethod
    def backward(ctx, grad_context, grad_strength, _degree, _threshold):
        states, keys, values, coefficient, min_gate, lengths, threshold = ctx.saved_tensors
        coefficient_value, min_gate_value, *options, family = ctx.scalars
        needs = ctx.needs_input_grad
        excess = SCORES[PairOptions(*options).score] == "soft_threshold"
        # The threshold's gradient comes with the rows and goes to the keys too.
        need_rows = needs[0] or needs[3] or (excess and needs[1])
        need_keys = needs[1] or needs[2] or (needs[0] and keys is None)
        grads = _call(_InteractBackward)(
            grad_context, grad_strength, threshold, states, keys, values, coefficient,
            coefficient_value, min_gate, min_gate_value, lengths, *options, need_rows, need_keys,
            family,
        )  # fmt: skip
        wanted = _narrowed(grads, (states, keys, values, coefficient), needs[:4])
        return (*wanted, *(None,) * (len(needs) - 4))

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _vmap(_Interact, "interact", info.batch_size, in_dims, arguments)


class _EvolveBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad_states, grad_strength, states, *arguments):
        *arguments, family = arguments
        return _run(family, "evolve_backward", (grad_states, grad_strength, *arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_refuse_second_derivative)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _vmap(_EvolveBackward, "evolve_backward", info.batch_size, in_dims, arguments)


class _Evolve(torch.autograd.Function):
    @staticmethod
    def forward(
        states, dt, dt_value, skip, skip_value, coefficient, coefficient_value, min_gate,
        min_gate_value, lengths, score, eps, row_window, causal, mean, algorithm, steps, has_radius,
        radius_min, radius_max, radius_rate, radius_reversion, radius_target, save, family,
    ):  # fmt: skip
        return _run(
            family,
            "evolve",
            (
                states, dt, dt_value, skip, skip_value, coefficient, coefficient_value, min_gate,
                min_gate_value, lengths, score, eps, row_window, causal, mean, algorithm, steps,
                has_radius, radius_min, radius_max, radius_rate, radius_reversion, radius_target,
                save,
            ),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        states, dt, dt_value, skip, skip_value, coefficient, coefficient_value = inputs[:7]
        min_gate, min_gate_value, lengths, *options, _save, family = inputs[7:]
        _, _, degree, tape = output
        ctx.mark_non_differentiable(degree, tape)
        ctx.save_for_backward(states, dt, skip, coefficient, min_gate, lengths, tape)
        ctx.scalars = (dt_value, skip_value, coefficient_value, min_gate_value, *options, family)

    @staticmethod
    def backward(ctx, grad_states, grad_strength, _degree, _tape):
        states, dt, skip, coefficient, min_gate, lengths, tape = ctx.saved_tensors
        dt_value, skip_value, coefficient_value, min_gate_value, *options = ctx.scalars
        needs = ctx.needs_input_grad
        # The states are on the tape; they come along so that second derivatives are refused.
        grads = _call(_EvolveBackward)(
            grad_states, grad_strength, states, tape, dt, dt_value, skip, skip_value, coefficient,
            coefficient_value, min_gate, min_gate_value, lengths, *options,
        )  # fmt: skip
        places = (0, 1, 3, 5)
        wanted = _narrowed(grads, (states, dt, skip, coefficient), [needs[i] for i in places])
        of_input = dict(zip(places, wanted, strict=True))
        return tuple(of_input.get(i) for i in range(len(needs)))

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _vmap(_Evolve, "evolve", info.batch_size, in_dims, arguments)


def interact(
    states: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    coefficient: Coefficient,
    min_gate: Coefficient,
    lengths: torch.Tensor | None,
    options: PairOptions,
    family: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Context `(B, S, D)`, strength `(B, S)` and degree `(B, S)`."""
    context, strength, degree, _ = _Interact.apply(
        states, keys, values, *coefficient, *min_gate, lengths, *options, family
    )
    return context, strength, degree


def _may_need_grad(tensor: torch.Tensor | None) -> bool:
    # Under vmap a tensor does not tell whether what it wraps needs a gradient.
    return tensor is not None and (
        tensor.requires_grad
        or (not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(tensor))
    )


def evolve(
    states: torch.Tensor,
    dt: Coefficient,
    skip: Coefficient,
    coefficient: Coefficient,
    min_gate: Coefficient,
    lengths: torch.Tensor | None,
    options: PairOptions,
    step: StepOptions,
    family: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States `(B, S, 2)`, strength `(B, S)` and degree `(B, S)` after `step.steps` steps."""
    differentiable = (states, dt[0], skip[0], coefficient[0])
    save = torch.is_grad_enabled() and any(map(_may_need_grad, differentiable))
    out, strength, degree, _ = _Evolve.apply(
        states, *dt, *skip, *coefficient, *min_gate, lengths, *options, *step, save, family
    )
    return out, strength, degree


def _interact_fake(states, keys, values, *_):
    batch, rows, _ = states.shape
    depth = 2 if values is None else values.shape[-1]
    per_row = states.new_empty(batch, rows)
    return (
        states.new_empty(batch, rows, depth),
        per_row,
        states.new_empty(batch, rows, dtype=torch.int32),
        torch.empty_like(per_row),
    )


def _interact_backward_fake(
    grad_context, grad_strength, threshold, states, keys, values, coefficient, *options
):
    def like(tensor):
        return states.new_empty(0 if tensor is None else tensor.shape)

    excess = SCORES[PairOptions(*options[4:10]).score] == "soft_threshold"
    return (
        like(states),
        like(keys),
        like(values),
        like(coefficient),
        like(threshold if excess else None),
    )


def _threshold_backward_fake(grad_threshold, states, keys, *_):
    return (
        states.new_empty(states.shape),
        states.new_empty(0 if keys is None else keys.shape),
        states.new_empty(states.shape[:1]),
    )


def _evolve_fake(states, *arguments):
    steps, save = arguments[15], arguments[-1]
    batch, length, _ = states.shape
    saved = steps if save else 0
    return (
        states.new_empty(states.shape),
        states.new_empty(batch, length),
        states.new_empty(batch, length, dtype=torch.int32),
        states.new_empty(saved, TAPE_PLANES, batch, length),
    )


def _evolve_backward_fake(
    grad_states, grad_strength, tape, dt, dt_value, skip, skip_value, coefficient, *_
):
    def like(tensor):
        return tape.new_empty(0 if tensor is None else tensor.shape)

    return tape.new_empty(grad_states.shape), like(dt), like(skip), like(coefficient)


def register(family: str) -> None:
    """Attach the fake kernels to the ops of a family that is loaded."""
    fakes = {
        "interact": _interact_fake,
        "interact_backward": _interact_backward_fake,
        "evolve": _evolve_fake,
        "evolve_backward": _evolve_backward_fake,
    }
    if not family:
        fakes["threshold_backward"] = _threshold_backward_fake
    for name, fake in fakes.items():
        torch.library.register_fake(f"qflux_kernels::{family}{name}", fake)
