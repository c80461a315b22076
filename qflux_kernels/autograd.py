"""The differentiable operators over the dispatcher ops, and the fake kernels that trace them.

Points and values may be in half precision, which is how they are saved; the ops get float32. Each
Function here runs one op, on tensors that have the names of `schema`; the last parameter is the
prefix of the family that serves it.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable

import torch

from .arguments import EvolveArguments, InteractArguments, widen
from .options import ALGORITHMS, Radius
from .schema import (
    EVOLVE,
    EVOLVE_BACKWARD,
    FAMILY_OPS,
    INTERACT,
    INTERACT_BACKWARD,
    SCORE_KINDS,
    SCORES,
    TAPE_PLANES,
    THRESHOLD_BACKWARD,
    Op,
    PairOptions,
    StepOptions,
)


class Gradient(torch.autograd.Function):
    """A gradient that a kernel computes, and so one that has no derivative of its own."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the kernels of qflux_kernels have no second derivatives; plain PyTorch computes "
            "them: backend='reference', or reference.project_norm for project_norm"
        )


def inputs_of(function: type[torch.autograd.Function]) -> type:
    """The parameters of a Function as a named tuple, None where not given.

    `Function.apply` looks at the signature in every call: it is computed once, here.
    """
    signature = inspect.signature(function.forward)
    function.forward.__signature__ = signature
    names = list(signature.parameters)
    return namedtuple(f"{function.__name__}Inputs", names, defaults=(None,) * len(names))


def run_gradient(function: type[Gradient], *arguments):
    """How a backward runs the Function of its gradient."""
    # Dynamo traces no Function inside a backward, and refuses second derivatives itself.
    run = function.forward if torch.compiler.is_compiling() else function.apply
    return run(*arguments)


def _run(op: Op, family: str, *records: tuple, **arguments) -> tuple[torch.Tensor, ...]:
    """The results of an op, from arguments by name and records of them."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = widen(value)
    for record in records:
        for name, value in zip(record._fields, record, strict=True):
            arguments[name] = value
    return getattr(torch.ops.qflux_kernels, family + op.name).default(**arguments)


def _vmap(function: type, inputs_type: type, op: Op, info, in_dims: tuple, inputs: tuple) -> tuple:
    """Run `function` once, with the mapped dimension in front of the batch dimensions."""
    dims, given = inputs_type(*in_dims), inputs_type(*inputs)
    moved = {}
    for field in op.arguments:
        tensor = getattr(given, field.name, None)
        if isinstance(tensor, torch.Tensor):
            at, mapped = field.batch, getattr(dims, field.name)
            if mapped is None:
                shape = (*tensor.shape[:at], info.batch_size, *tensor.shape[at:])
                moved[field.name] = tensor.unsqueeze(at).expand(shape)
            else:
                moved[field.name] = tensor.movedim(mapped, at)
    results = function.apply(*given._replace(**moved))
    # An op returns an empty vector for the gradient of what it was not given.
    return results, tuple(
        None if result.shape == (0,) else field.batch
        for result, field in zip(results, op.results, strict=True)
    )


class _InteractBackward(Gradient):
    @staticmethod
    def forward(
        grad_context, grad_strength, threshold, states, keys, values, coefficient, min_gate,
        lengths, need_rows, need_keys, pair, family,
    ):  # fmt: skip
        return _run(
            INTERACT_BACKWARD, family, pair, grad_context=grad_context,
            grad_strength=grad_strength, threshold=threshold, states=states, keys=keys,
            values=values, coefficient=coefficient, min_gate=min_gate, lengths=lengths,
            need_rows=need_rows, need_keys=need_keys,
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(
            _InteractBackward, _InteractBackwardInputs, INTERACT_BACKWARD, info, in_dims, inputs
        )


class _ThresholdBackward(Gradient):
    @staticmethod
    def forward(grad_threshold, states, keys, coefficient, lengths, pair, family):
        return _run(
            THRESHOLD_BACKWARD, family, grad_threshold=grad_threshold, states=states, keys=keys,
            coefficient=coefficient, coefficient_value=pair.coefficient_value, lengths=lengths,
            eps=pair.eps, whole_window=pair.whole_window, causal=pair.causal,
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(
            _ThresholdBackward, _ThresholdBackwardInputs, THRESHOLD_BACKWARD, info, in_dims, inputs
        )


class _Interact(torch.autograd.Function):
    @staticmethod
    def forward(states, keys, values, coefficient, min_gate, lengths, pair, family):
        return _run(
            INTERACT, family, pair, states=states, keys=keys, values=values,
            coefficient=coefficient, min_gate=min_gate, lengths=lengths,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        given, found = _InteractInputs(*inputs), _InteractResults(*output)
        ctx.mark_non_differentiable(found.degree, found.threshold)
        ctx.save_for_backward(
            given.states, given.keys, given.values, given.coefficient, given.min_gate,
            given.lengths, found.threshold,
        )  # fmt: skip
        ctx.pair, ctx.family = given.pair, given.family

    @staticmethod
    def backward(ctx, grad_context, grad_strength, _degree, _threshold):
        states, keys, values, coefficient, min_gate, lengths, threshold = ctx.saved_tensors
        needs = _InteractInputs(*ctx.needs_input_grad)
        limit_vjp = SCORE_KINDS[ctx.pair.score].limit_vjp
        # The gradient of the limit comes with the rows and goes to the keys too.
        need_rows = needs.states or needs.coefficient or (limit_vjp and needs.keys)
        need_keys = needs.keys or needs.values or (needs.states and keys is None)
        grads = _InteractGrads(
            *run_gradient(
                _InteractBackward, grad_context, grad_strength, threshold, states, keys, values,
                coefficient, min_gate, lengths, need_rows, need_keys, ctx.pair, ctx.family,
            )
        )  # fmt: skip
        of_states, of_keys, of_coefficient = (
            grads.grad_states, grads.grad_keys, grads.grad_coefficient,
        )  # fmt: skip
        if limit_vjp and need_rows:
            by_limit = _ThresholdGrads(
                *run_gradient(
                    _ThresholdBackward, grads.grad_threshold, states, keys, coefficient, lengths,
                    ctx.pair, ctx.family,
                )
            )  # fmt: skip
            of_states = of_states + by_limit.grad_states
            if keys is not None:
                of_keys = of_keys + by_limit.grad_keys
            if coefficient is not None:
                of_coefficient = of_coefficient + by_limit.grad_coefficient
        return tuple(
            _InteractInputs(
                states=_narrowed(of_states, states, needs.states),
                keys=_narrowed(of_keys, keys, needs.keys),
                values=_narrowed(grads.grad_values, values, needs.values),
                coefficient=_narrowed(of_coefficient, coefficient, needs.coefficient),
            )
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(_Interact, _InteractInputs, INTERACT, info, in_dims, inputs)


class _EvolveBackward(Gradient):
    @staticmethod
    def forward(
        grad_states, grad_strength, tape, dt, skip, coefficient, min_gate, lengths, _states, pair,
        step, family,
    ):  # fmt: skip
        # The states are on the tape; they come along so that second derivatives are refused.
        return _run(
            EVOLVE_BACKWARD, family, pair, step, grad_states=grad_states,
            grad_strength=grad_strength, tape=tape, dt=dt, skip=skip, coefficient=coefficient,
            min_gate=min_gate, lengths=lengths,
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(_EvolveBackward, _EvolveBackwardInputs, EVOLVE_BACKWARD, info, in_dims, inputs)


class _Evolve(torch.autograd.Function):
    @staticmethod
    def forward(states, dt, skip, coefficient, min_gate, lengths, save, pair, step, family):
        return _run(
            EVOLVE, family, pair, step, states=states, dt=dt, skip=skip, coefficient=coefficient,
            min_gate=min_gate, lengths=lengths, save=save,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        given, found = _EvolveInputs(*inputs), _EvolveResults(*output)
        ctx.mark_non_differentiable(found.degree, found.tape)
        ctx.save_for_backward(
            given.states, given.dt, given.skip, given.coefficient, given.min_gate, given.lengths,
            found.tape,
        )  # fmt: skip
        ctx.pair, ctx.step, ctx.family = given.pair, given.step, given.family

    @staticmethod
    def backward(ctx, grad_states, grad_strength, _degree, _tape):
        states, dt, skip, coefficient, min_gate, lengths, tape = ctx.saved_tensors
        needs = _EvolveInputs(*ctx.needs_input_grad)
        grads = _EvolveGrads(
            *run_gradient(
                _EvolveBackward, grad_states, grad_strength, tape, dt, skip, coefficient, min_gate,
                lengths, states, ctx.pair, ctx.step, ctx.family,
            )
        )  # fmt: skip
        return tuple(
            _EvolveInputs(
                states=_narrowed(grads.grad_input, states, needs.states),
                dt=_narrowed(grads.grad_dt, dt, needs.dt),
                skip=_narrowed(grads.grad_skip, skip, needs.skip),
                coefficient=_narrowed(grads.grad_coefficient, coefficient, needs.coefficient),
            )
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(_Evolve, _EvolveInputs, EVOLVE, info, in_dims, inputs)


def _narrowed(
    grad: torch.Tensor, given: torch.Tensor | None, needed: bool
) -> torch.Tensor | None:
    """A gradient in the dtype of its input, if it is needed."""
    return grad.to(given.dtype) if needed else None


_InteractInputs, _InteractResults = inputs_of(_Interact), INTERACT.Results
_InteractBackwardInputs, _InteractGrads = inputs_of(_InteractBackward), INTERACT_BACKWARD.Results
_ThresholdBackwardInputs = inputs_of(_ThresholdBackward)
_ThresholdGrads = THRESHOLD_BACKWARD.Results
_EvolveInputs, _EvolveResults = inputs_of(_Evolve), EVOLVE.Results
_EvolveBackwardInputs, _EvolveGrads = inputs_of(_EvolveBackward), EVOLVE_BACKWARD.Results


def _split(value: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """A number as the ops take it: a tensor, or None and a float."""
    return (value, 0.0) if isinstance(value, torch.Tensor) else (None, float(value))


def _pair(
    args: InteractArguments | EvolveArguments, algorithm: str
) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple]:
    """Coefficient, minimal gate and the scalars of a call."""
    score = args.score
    coefficient, coefficient_value = _split(score.coefficient)
    min_gate, min_gate_value = _split(score.min_gate)
    options = PairOptions(
        coefficient_value=coefficient_value,
        min_gate_value=min_gate_value,
        score=SCORES.index(score.kernel),
        eps=float(score.eps),
        whole_window=score.whole_window,
        causal=args.causal,
        mean=args.reduction == "mean",
        algorithm=ALGORITHMS.index(algorithm),
    )
    return coefficient, min_gate, options


def interact(
    args: InteractArguments, algorithm: str, family: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Context `(*batch, S, D)`, strength and degree `(*batch, S)` in the dtype of computation."""
    coefficient, min_gate, pair = _pair(args, algorithm)
    context, strength, degree, _ = _Interact.apply(
        args.states, args.keys, args.values, coefficient, min_gate, args.lengths, pair, family
    )
    return context, strength, degree


def _may_need_grad(tensor: torch.Tensor | None) -> bool:
    # Under vmap a tensor does not tell whether what it wraps needs a gradient.
    return tensor is not None and (
        tensor.requires_grad
        or (not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(tensor))
    )


def evolve(
    args: EvolveArguments, algorithm: str, family: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States `(*batch, S, 2)`, strength and degree `(*batch, S)` in the dtype of computation."""
    coefficient, min_gate, pair = _pair(args, algorithm)
    dt, dt_value = _split(args.dt)
    skip, skip_value = _split(args.skip)
    radius = Radius() if args.radius is None else args.radius
    step = StepOptions(
        dt_value=dt_value,
        skip_value=skip_value,
        steps=args.steps,
        has_radius=args.radius is not None,
        radius_min=float(radius.min),
        radius_max=float(radius.max),
        radius_rate=float(radius.rate),
        radius_reversion=float(radius.reversion),
        radius_target=float(radius.target),
    )
    save = torch.is_grad_enabled() and any(
        map(_may_need_grad, (args.states, dt, skip, coefficient))
    )
    states, strength, degree, _ = _Evolve.apply(
        args.states, dt, skip, coefficient, min_gate, args.lengths, save, pair, step, family
    )
    return states, strength, degree


def _interact_fake(given):
    batch_rows = given.states.shape[:-1]
    width = 2 if given.values is None else given.values.shape[-1]
    return INTERACT.Results(
        context=given.states.new_empty(*batch_rows, width),
        strength=given.states.new_empty(batch_rows),
        degree=given.states.new_empty(batch_rows, dtype=torch.int32),
        threshold=given.states.new_empty(batch_rows),
    )


def _gradient_like(given: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0 if given is None else given.shape)


def _interact_backward_fake(given):
    limit_vjp = SCORE_KINDS[given.score].limit_vjp
    return INTERACT_BACKWARD.Results(
        grad_states=_gradient_like(given.states, given.states),
        grad_keys=_gradient_like(given.keys, given.states),
        grad_values=_gradient_like(given.values, given.states),
        grad_coefficient=_gradient_like(given.coefficient, given.states),
        grad_threshold=_gradient_like(given.threshold if limit_vjp else None, given.states),
    )


def _threshold_backward_fake(given):
    return THRESHOLD_BACKWARD.Results(
        grad_states=_gradient_like(given.states, given.states),
        grad_keys=_gradient_like(given.keys, given.states),
        grad_coefficient=_gradient_like(given.coefficient, given.states),
    )


def _evolve_fake(given):
    batch_rows = given.states.shape[:-1]
    return EVOLVE.Results(
        result=given.states.new_empty(given.states.shape),
        strength=given.states.new_empty(batch_rows),
        degree=given.states.new_empty(batch_rows, dtype=torch.int32),
        tape=given.states.new_empty(given.steps if given.save else 0, TAPE_PLANES, *batch_rows),
    )


def _evolve_backward_fake(given):
    return EVOLVE_BACKWARD.Results(
        grad_input=_gradient_like(given.grad_states, given.tape),
        grad_dt=_gradient_like(given.dt, given.tape),
        grad_skip=_gradient_like(given.skip, given.tape),
        grad_coefficient=_gradient_like(given.coefficient, given.tape),
    )


_FAKES = {
    INTERACT: _interact_fake,
    INTERACT_BACKWARD: _interact_backward_fake,
    THRESHOLD_BACKWARD: _threshold_backward_fake,
    EVOLVE: _evolve_fake,
    EVOLVE_BACKWARD: _evolve_backward_fake,
}


def by_name(op: Op, rule: Callable) -> Callable:
    """A kernel of the op, from a rule that takes and returns its records."""
    return lambda *arguments: tuple(rule(op.Arguments(*arguments)))


def register(family: str) -> None:
    """Attach the fake kernels to the ops of a family that is loaded."""
    for op in FAMILY_OPS:
        torch.library.register_fake(f"qflux_kernels::{family}{op.name}", by_name(op, _FAKES[op]))
