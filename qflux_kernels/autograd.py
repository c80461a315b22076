"""The differentiable operators on canonical tensors, and the fake kernels that trace them.

Everything here sees one batch dimension: states `(B, S, 2)`, keys `(B, K, 2)`, values `(B, K, D)`.
The dispatcher ops `qflux_kernels::*` are declared in `csrc/library.cpp`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Planes a token leaves on the tape at each step of `evolve`, in the order of `csrc/params.h`.
TAPE_PLANES = 11
# The tape's last dimension is padded to whole vectors.
TAPE_ALIGNMENT = 16


class PairOptions(NamedTuple):
    """What every op needs to know of a pair, in schema order."""

    score: int  # 0 threshold, 1 inverse gate
    eps: float
    row_window: bool
    causal: bool
    mean: bool


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


def _fold(
    tensor: torch.Tensor | None, bdim: int | None, size: int, at: int = 0
) -> torch.Tensor | None:
    """Merge a vmapped dimension into the batch dimension `at`, repeating what is not batched."""
    if tensor is None:
        return None
    if bdim is None:
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    else:
        tensor = tensor.movedim(bdim, at)
    return tensor.flatten(at, at + 1)


class _InteractFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        states, keys, values, coefficient, coefficient_value, min_gate, min_gate_value, lengths,
        *options,
    ):  # fmt: skip
        return torch.ops.qflux_kernels.interact(
            states, keys, values, coefficient, coefficient_value, min_gate, min_gate_value,
            lengths, *options,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.scalars = inputs[:4] + inputs[5:8:2], (inputs[4], inputs[6], *inputs[8:])
        _, _, degree, threshold = output
        ctx.mark_non_differentiable(degree, threshold)
        ctx.set_materialize_grads(True)
        ctx.save_for_backward(*tensors, threshold)

    @staticmethod
    def backward(ctx, grad_context, grad_strength, _degree, _threshold):
        states, keys, values, coefficient, min_gate, lengths, threshold = ctx.saved_tensors
        coefficient_value, min_gate_value, *options = ctx.scalars
        needs = ctx.needs_input_grad
        need_rows = needs[0] or needs[3]
        need_keys = needs[1] or needs[2] or (needs[0] and keys is None)
        grads = torch.ops.qflux_kernels.interact_backward(
            grad_context, grad_strength, threshold, states, keys, values, coefficient,
            coefficient_value, min_gate, min_gate_value, lengths, *options, need_rows, need_keys,
        )  # fmt: skip
        given = (True, keys is not None, values is not None, coefficient is not None)
        wanted = [
            grad if need and present else None
            for grad, need, present in zip(grads, needs[:4], given, strict=True)
        ]
        return (*wanted, *(None,) * (len(needs) - 4))

    @staticmethod
    def vmap(info, in_dims, states, keys, values, coefficient, coefficient_value, min_gate,
             min_gate_value, lengths, *options):  # fmt: skip
        size = info.batch_size
        batched = (
            _fold(states, in_dims[0], size), _fold(keys, in_dims[1], size),
            _fold(values, in_dims[2], size), _fold(coefficient, in_dims[3], size),
            coefficient_value, _fold(min_gate, in_dims[5], size), min_gate_value,
            _fold(lengths, in_dims[7], size),
        )  # fmt: skip
        outputs = _InteractFunction.apply(*batched, *options)
        return tuple(output.unflatten(0, (size, -1)) for output in outputs), (0,) * len(outputs)


class _EvolveFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        states, dt, dt_value, skip, skip_value, coefficient, coefficient_value, min_gate,
        min_gate_value, lengths, *options,
    ):  # fmt: skip
        return torch.ops.qflux_kernels.evolve(
            states, dt, dt_value, skip, skip_value, coefficient, coefficient_value, min_gate,
            min_gate_value, lengths, *options,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, degree, tape = output
        ctx.mark_non_differentiable(degree, tape)
        ctx.set_materialize_grads(True)
        ctx.scalars = (inputs[2], inputs[4], inputs[6], inputs[8], *inputs[10:-1])
        ctx.save_for_backward(inputs[1], inputs[3], inputs[5], inputs[7], inputs[9], tape)

    @staticmethod
    def backward(ctx, grad_states, grad_strength, _degree, _tape):
        dt, skip, coefficient, min_gate, lengths, tape = ctx.saved_tensors
        dt_value, skip_value, coefficient_value, min_gate_value, *options = ctx.scalars
        needs = ctx.needs_input_grad
        grads = torch.ops.qflux_kernels.evolve_backward(
            grad_states, grad_strength, tape, dt, dt_value, skip, skip_value, coefficient,
            coefficient_value, min_gate, min_gate_value, lengths, *options,
        )  # fmt: skip
        positions = {0: grads[0], 1: grads[1], 3: grads[2], 5: grads[3]}
        return tuple(positions.get(i) if need else None for i, need in enumerate(needs))

    @staticmethod
    def vmap(info, in_dims, states, dt, dt_value, skip, skip_value, coefficient,
             coefficient_value, min_gate, min_gate_value, lengths, *options):  # fmt: skip
        size = info.batch_size
        batched = (
            _fold(states, in_dims[0], size), _fold(dt, in_dims[1], size, at=1), dt_value,
            _fold(skip, in_dims[3], size, at=1), skip_value,
            _fold(coefficient, in_dims[5], size), coefficient_value,
            _fold(min_gate, in_dims[7], size), min_gate_value, _fold(lengths, in_dims[9], size),
        )  # fmt: skip
        *outputs, tape = _EvolveFunction.apply(*batched, *options)
        outputs = [output.unflatten(0, (size, -1)) for output in outputs]
        return (*outputs, tape.unflatten(2, (size, -1))), (0, 0, 0, 2)


def interact(
    states: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    coefficient: Coefficient,
    min_gate: Coefficient,
    lengths: torch.Tensor | None,
    options: PairOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Context `(B, S, D)`, strength `(B, S)` and degree `(B, S)`."""
    context, strength, degree, _ = _InteractFunction.apply(
        states, keys, values, *coefficient, *min_gate, lengths, *options
    )
    return context, strength, degree


def evolve(
    states: torch.Tensor,
    dt: Coefficient,
    skip: Coefficient,
    coefficient: Coefficient,
    min_gate: Coefficient,
    lengths: torch.Tensor | None,
    options: PairOptions,
    step: StepOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States `(B, S, 2)`, strength `(B, S)` and degree `(B, S)` after `step.steps` steps."""
    differentiable = (states, dt[0], skip[0], coefficient[0])
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    out, strength, degree, _ = _EvolveFunction.apply(
        states, *dt, *skip, *coefficient, *min_gate, lengths, *options, *step, save
    )
    return out, strength, degree


def _padded(length: int) -> int:
    return (length + TAPE_ALIGNMENT - 1) // TAPE_ALIGNMENT * TAPE_ALIGNMENT


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
    grad_context, grad_strength, threshold, states, keys, values, coefficient, *_
):
    def like(tensor):
        return states.new_empty(0 if tensor is None else tensor.shape)

    return like(states), like(keys), like(values), like(coefficient)


def _evolve_fake(states, *arguments):
    steps, save = arguments[14], arguments[-1]
    batch, length, _ = states.shape
    saved = steps if save else 0
    return (
        states.new_empty(states.shape),
        states.new_empty(batch, length),
        states.new_empty(batch, length, dtype=torch.int32),
        states.new_empty(saved, TAPE_PLANES, batch, _padded(length)),
    )


def _evolve_backward_fake(
    grad_states, grad_strength, tape, dt, dt_value, skip, skip_value, coefficient, *_
):
    def like(tensor):
        return tape.new_empty(0 if tensor is None else tensor.shape)

    return tape.new_empty(grad_states.shape), like(dt), like(skip), like(coefficient)


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(
        "qflux_kernels has no second derivatives; backend='reference' computes them in plain PyTorch"
    )


def register() -> None:
    """Attach fake kernels and the refusal of second derivatives to the loaded ops."""
    fakes = {
        "interact": _interact_fake,
        "interact_backward": _interact_backward_fake,
        "evolve": _evolve_fake,
        "evolve_backward": _evolve_backward_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"qflux_kernels::{name}", fake)
    for name in ("interact_backward", "evolve_backward"):
        torch.library.register_autograd(f"qflux_kernels::{name}", _refuse_second_derivative)
