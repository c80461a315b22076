"""The differentiable operators over the dispatcher ops, and the fake kernels that trace them.

Points and values may be in half precision, which is how they are saved. The compiled kernels of a
GPU load it and store results in it; the other ops get float32. Each Function here runs one op, on
tensors that have the names of `schema`; the last parameter is the prefix of the family that serves
it.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad

from .arguments import COMPUTE_DTYPES, EvolveArguments, InteractArguments, widen
from .imports import when_imported
from .options import ALGORITHMS, Radius
from .schema import (
    COMPILED,
    EVOLVE,
    EVOLVE_BACKWARD,
    FAMILY_OPS,
    INTERACT,
    INTERACT_BACKWARD,
    KEPT_MOMENTS,
    KEPT_SUMS,
    SCORE_KINDS,
    SCORES,
    TAPE_PLANES,
    THRESHOLD_BACKWARD,
    Op,
    PairOptions,
    StepOptions,
)


class OpFunction(torch.autograd.Function):
    """A Function that runs `op`; its parameters that are tensors have the op's names."""

    op: ClassVar[Op]
    Inputs: ClassVar[Callable[..., Any]]  # the parameters as a named tuple, None where not given

    def __init_subclass__(cls) -> None:
        # `apply` looks at the signature in every call: it is computed once, here.
        signature = inspect.signature(cls.forward)
        cls.forward.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        names = list(signature.parameters)
        cls.Inputs = namedtuple(f"{cls.__name__}Inputs", names, defaults=(None,) * len(names))

    @classmethod
    def run(cls, *arguments):
        """`apply`, in eager mode without what costs more than a kernel on a few tokens."""
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return cls.apply(*arguments)
        if not torch.is_grad_enabled() or not any(
            isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments
        ):
            return cls.forward(*arguments)
        # `Function.apply` would bind the arguments to the signature; it ends here too.
        function: Any = super(torch.autograd.Function, cls)
        return function.apply(*arguments)

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        """One run for all, the mapped dimension in front of the batch dimensions."""
        dims, given = cls.Inputs(*in_dims), cls.Inputs(*inputs)
        moved = {}
        for field in cls.op.arguments:
            tensor = getattr(given, field.name, None)
            if field.batch is not None and tensor is not None:
                mapped = getattr(dims, field.name)
                moved[field.name] = with_mapped(tensor, mapped, info.batch_size, field.batch)
        results = cls.apply(*given._replace(**moved))
        # An op returns an empty vector for the gradient of what it was not given.
        return results, tuple(
            None if result.shape == (0,) else field.batch
            for result, field in zip(results, cls.op.results, strict=True)
        )


class Gradient(OpFunction):
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

    @classmethod
    def run(cls, *arguments):
        """How the backward of another Function runs this one."""
        # Dynamo traces no Function inside a backward, and refuses second derivatives itself.
        return (cls.forward if torch.compiler.is_compiling() else super().run)(*arguments)


def with_mapped(tensor: torch.Tensor, mapped: int | None, size: int, at: int) -> torch.Tensor:
    """The tensor with the mapped dimension of vmap at `at`; what is not mapped is repeated."""
    if mapped is not None:
        return tensor.movedim(mapped, at)
    return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])


class _Call:
    """How an op is called: by position, which the dispatcher reads faster than names.

    Args:
        op: the op.
        names: of the values that a call is given, in their order.
    """

    def __init__(self, op: Op, *names: str) -> None:
        self.name = op.name
        self._places = [names.index(name) for name in op.names]

    def __call__(self, family: str, *values: Any) -> Any:
        return _HANDLES[family + self.name](*[values[place] for place in self._places])


_TENSORS = "states", "keys", "values", "coefficient", "min_gate", "lengths"
_interact_op = _Call(INTERACT, *_TENSORS, "save", *PairOptions._fields)
_interact_backward_op = _Call(
    INTERACT_BACKWARD, "grad_context", "grad_strength", "threshold", "moments", *_TENSORS,
    "need_rows", "need_keys", *PairOptions._fields,
)  # fmt: skip
_evolve_op = _Call(
    EVOLVE, "states", "dt", "skip", "coefficient", "min_gate", "lengths", "save",
    *PairOptions._fields, *StepOptions._fields,
)  # fmt: skip
_evolve_backward_op = _Call(
    EVOLVE_BACKWARD, "grad_states", "grad_strength", "tape", "dt", "skip", "coefficient",
    "min_gate", "lengths", *PairOptions._fields, *StepOptions._fields,
)  # fmt: skip
_threshold_backward_op = _Call(
    THRESHOLD_BACKWARD, "grad_threshold", "states", "keys", "coefficient", "lengths",
    *PairOptions._fields,
)  # fmt: skip


def _points(
    family: str, algorithm: int, *tensors: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Points and values as the ops of a family take them."""
    loads_half = family == COMPILED and algorithm != _SWEEP
    return [
        tensor if tensor is None or (loads_half and tensor.is_cuda) else widen(tensor)
        for tensor in tensors
    ]


class _InteractBackward(Gradient):
    op = INTERACT_BACKWARD

    @staticmethod
    def forward(
        grad_context, grad_strength, threshold, moments, states, keys, values, coefficient,
        min_gate, lengths, need_rows, need_keys, pair, family,
    ):  # fmt: skip
        states, keys, values = _points(family, pair.algorithm, states, keys, values)
        return _interact_backward_op(
            family, grad_context, grad_strength, threshold, moments, states, keys, values,
            coefficient, min_gate, lengths, need_rows, need_keys, *pair,
        )  # fmt: skip


class _ThresholdBackward(Gradient):
    op = THRESHOLD_BACKWARD

    @staticmethod
    def forward(grad_threshold, states, keys, coefficient, lengths, pair, family):
        states, keys = _points(family, pair.algorithm, states, keys)
        return _threshold_backward_op(
            family, grad_threshold, states, keys, coefficient, lengths, *pair
        )


class _Interact(OpFunction):
    op = INTERACT

    @staticmethod
    def forward(states, keys, values, coefficient, min_gate, lengths, save, pair, family):
        states, keys, values = _points(family, pair.algorithm, states, keys, values)
        return _interact_op(
            family, states, keys, values, coefficient, min_gate, lengths, save, *pair
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        states, keys, values, coefficient, min_gate, lengths, _, ctx.pair, ctx.family = inputs
        context, _, degree, threshold, moments = output
        ctx.dtype = context.dtype
        ctx.mark_non_differentiable(degree, threshold, moments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            states, keys, values, coefficient, min_gate, lengths, threshold, moments
        )

    @staticmethod
    def backward(ctx, grad_context, grad_strength, _degree, _threshold, _moments):
        states, keys, values, coefficient, min_gate, lengths, threshold, moments = ctx.saved_tensors
        needs = _InteractInputs(*ctx.needs_input_grad)
        if grad_context is None:
            value_dim = 2 if values is None else values.shape[-1]
            grad_context = threshold.new_zeros(*threshold.shape, value_dim, dtype=ctx.dtype)
        if grad_strength is None:
            grad_strength = torch.zeros_like(threshold, dtype=ctx.dtype)
        limit_vjp = SCORE_KINDS[ctx.pair.score].limit_vjp
        # The gradient of the limit comes with the rows and goes to the keys too.
        need_rows = needs.states or needs.coefficient or (limit_vjp and needs.keys)
        need_keys = needs.keys or needs.values or (needs.states and keys is None)
        of_states, of_keys, of_values, of_coefficient, of_threshold = _InteractBackward.run(
            grad_context, grad_strength, threshold, moments if moments.dim() > 1 else None,
            states, keys, values, coefficient, min_gate, lengths, need_rows, need_keys, ctx.pair,
            ctx.family,
        )  # fmt: skip
        if limit_vjp and need_rows:
            by_states, by_keys, by_coefficient = _ThresholdBackward.run(
                of_threshold, states, keys, coefficient, lengths, ctx.pair, ctx.family
            )
            # What was not given has an empty gradient here as there.
            of_states, of_keys = _sum(of_states, by_states), _sum(of_keys, by_keys)
            of_coefficient = _sum(of_coefficient, by_coefficient)
        return tuple(
            _InteractInputs(
                states=_narrowed(of_states, states, needs.states),
                keys=_narrowed(of_keys, keys, needs.keys),
                values=_narrowed(of_values, values, needs.values),
                coefficient=_narrowed(of_coefficient, coefficient, needs.coefficient),
            )
        )


class _EvolveBackward(Gradient):
    op = EVOLVE_BACKWARD

    @staticmethod
    def forward(
        grad_states, grad_strength, tape, dt, skip, coefficient, min_gate, lengths, states, pair,
        step, family,
    ):  # fmt: skip
        # The states are on the tape; they come along so that second derivatives are refused.
        del states
        # A tape that vmap repeats has other strides than the kernels left.
        return _evolve_backward_op(
            family, grad_states, grad_strength, tape.contiguous(), dt, skip, coefficient, min_gate,
            lengths, *pair, *step,
        )  # fmt: skip


class _Evolve(OpFunction):
    op = EVOLVE

    @staticmethod
    def forward(states, dt, skip, coefficient, min_gate, lengths, save, pair, step, family):
        (states,) = _points(family, pair.algorithm, states)
        return _evolve_op(
            family, states, dt, skip, coefficient, min_gate, lengths, save, *pair, *step
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        states, dt, skip, coefficient, min_gate, lengths, _, ctx.pair, ctx.step, ctx.family = inputs
        result, _, degree, tape = output
        ctx.dtype = result.dtype
        ctx.mark_non_differentiable(degree, tape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, dt, skip, coefficient, min_gate, lengths, tape)

    @staticmethod
    def backward(ctx, grad_states, grad_strength, _degree, _tape):
        states, dt, skip, coefficient, min_gate, lengths, tape = ctx.saved_tensors
        needs = _EvolveInputs(*ctx.needs_input_grad)
        if grad_states is None:
            grad_states = tape.new_zeros(states.shape, dtype=ctx.dtype)
        if grad_strength is None:
            grad_strength = tape.new_zeros(states.shape[:-1], dtype=ctx.dtype)
        of_states, of_dt, of_skip, of_coefficient = _EvolveBackward.run(
            grad_states, grad_strength, tape, dt, skip, coefficient, min_gate, lengths, states,
            ctx.pair, ctx.step, ctx.family,
        )  # fmt: skip
        return tuple(
            _EvolveInputs(
                states=_narrowed(of_states, states, needs.states),
                dt=_narrowed(of_dt, dt, needs.dt),
                skip=_narrowed(of_skip, skip, needs.skip),
                coefficient=_narrowed(of_coefficient, coefficient, needs.coefficient),
            )
        )


_SWEEP = ALGORITHMS.index("sweep")
# Dynamo takes neither an attribute of a Function nor a named tuple of gradients.
_InteractInputs, _EvolveInputs = _Interact.Inputs, _Evolve.Inputs


def _sum(grad: torch.Tensor, further: torch.Tensor) -> torch.Tensor:
    """The sum of two gradients, in the memory of the first where nobody records or transforms."""
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if eager and not torch._C._are_functorch_transforms_active():
        return grad.add_(further)
    return grad + further


def _narrowed(grad: torch.Tensor, given: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
    """A gradient in the dtype of its input, if it is needed."""
    return grad.to(given.dtype) if needed and given is not None else None


def _split(
    value: float | torch.Tensor, states: torch.Tensor, *shape: int
) -> tuple[torch.Tensor | None, float]:
    """A number as the ops take it: a tensor, which has this shape, or None and a float.

    A float would be a constant of what Dynamo compiles, and each further value another graph.
    """
    if isinstance(value, torch.Tensor):
        return value, 0.0
    if torch.compiler.is_dynamo_compiling():
        number = states.new_full((), value, dtype=COMPUTE_DTYPES[states.dtype])
        return number.expand(shape), 0.0
    return None, float(value)


def _pair(
    args: InteractArguments | EvolveArguments, algorithm: str
) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
    """Coefficient, minimal gate and the scalars of a call."""
    score, batch = args.score, args.states.shape[:-2]
    coefficient, coefficient_value = _split(score.coefficient, args.states, *batch)
    min_gate, min_gate_value = None, 0.0
    if "min_gate" in score.per_sequence:
        min_gate, min_gate_value = _split(score.min_gate, args.states, *batch)
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
    """Context `(*batch, S, D)`, strength and degree `(*batch, S)`, in the dtype of computation or,
    where the kernels store half precision, that of the states."""
    coefficient, min_gate, pair = _pair(args, algorithm)
    save = torch.is_grad_enabled() and _may_need_grad(args.states)
    context, strength, degree, *_ = _Interact.run(
        args.states, args.keys, args.values, coefficient, min_gate, args.lengths, save, pair, family
    )
    return context, strength, degree


def _may_need_grad(tensor: torch.Tensor | None) -> bool:
    # Under vmap a tensor does not tell whether what it wraps needs a gradient.
    return tensor is not None and (
        tensor.requires_grad or (not torch.compiler.is_compiling() and is_batchedtensor(tensor))
    )


def evolve(
    args: EvolveArguments, algorithm: str, family: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States `(*batch, S, 2)`, strength and degree `(*batch, S)`, in dtypes as of `interact`."""
    coefficient, min_gate, pair = _pair(args, algorithm)
    tokens = 1, *args.states.shape[:-1]
    dt, dt_value = _split(args.dt, args.states, *tokens)
    skip, skip_value = None, 0.0
    if args.skip is not None:
        skip, skip_value = _split(args.skip, args.states, *tokens)
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
    states, strength, degree, _ = _Evolve.run(
        args.states, dt, skip, coefficient, min_gate, args.lengths, save, pair, step, family
    )
    return states, strength, degree


def _gradient_like(
    given: torch.Tensor | None, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return like.new_empty(0 if given is None else given.shape, dtype=dtype)


def _keeps_sums(given, family):
    """Whether a forward that saves for a backward leaves sums over the keys that rows keep."""
    return (
        family == COMPILED
        and given.states.device.type == "cuda"
        and SCORE_KINDS[given.score].kept_sums
        and given.algorithm != _SWEEP
    )


def _interact_fake(given, family):
    batch_rows, wide = given.states.shape[:-1], COMPUTE_DTYPES[given.states.dtype]
    moments = 0
    if given.values is None:
        moments = KEPT_SUMS if given.save and _keeps_sums(given, family) else 0
    elif family == COMPILED and given.states.device.type == "cuda":
        moments = KEPT_MOMENTS if SCORE_KINDS[given.score].mass else 0
    value_dim = 2 if given.values is None else given.values.shape[-1]
    return INTERACT.Results(
        context=given.states.new_empty(*batch_rows, value_dim),
        strength=given.states.new_empty(batch_rows),
        degree=given.states.new_empty(batch_rows, dtype=torch.int32),
        threshold=given.states.new_empty(batch_rows, dtype=wide),
        moments=given.states.new_empty((*batch_rows, moments), dtype=wide)
        if moments
        else given.states.new_empty(0),
    )


def _interact_backward_fake(given, family):
    limit_vjp = SCORE_KINDS[given.score].limit_vjp
    wide = COMPUTE_DTYPES[given.states.dtype]
    # What several kernels add to is not rounded in between.
    of_points = wide if limit_vjp or given.keys is None else given.states.dtype

    def gradient(tensor, dtype):
        return _gradient_like(tensor, given.states, None if tensor is None else dtype)

    return INTERACT_BACKWARD.Results(
        grad_states=gradient(given.states, of_points),
        grad_keys=gradient(given.keys, of_points),
        grad_values=gradient(given.values, given.states.dtype),
        grad_coefficient=gradient(given.coefficient, wide),
        grad_threshold=gradient(given.threshold if limit_vjp else None, wide),
    )


def _threshold_backward_fake(given, family):
    wide = COMPUTE_DTYPES[given.states.dtype]

    def gradient(tensor):
        return _gradient_like(tensor, given.states, None if tensor is None else wide)

    return THRESHOLD_BACKWARD.Results(
        grad_states=gradient(given.states),
        grad_keys=gradient(given.keys),
        grad_coefficient=gradient(given.coefficient),
    )


def _evolve_fake(given, family):
    batch_rows = given.states.shape[:-1]
    keeps_sums = given.save and _keeps_sums(given, family)
    planes = TAPE_PLANES + (2 * KEPT_SUMS if keeps_sums else 0)
    return EVOLVE.Results(
        result=given.states.new_empty(given.states.shape),
        strength=given.states.new_empty(batch_rows),
        degree=given.states.new_empty(batch_rows, dtype=torch.int32),
        tape=given.states.new_empty(
            (given.steps if given.save else 0, planes, *batch_rows),
            dtype=COMPUTE_DTYPES[given.states.dtype],
        ),
    )


def _evolve_backward_fake(given, family):
    return EVOLVE_BACKWARD.Results(
        grad_input=_gradient_like(given.grad_states, given.grad_states),
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


# The ops of the families that are loaded, by name.
_HANDLES: dict[str, torch._ops.OpOverload] = {}


def by_name(op: Op, rule: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of the op, from a rule that takes and returns its records."""
    return lambda *arguments: tuple(rule(op.Arguments(*arguments)))


def register(family: str) -> None:
    """Attach fake kernels and counts of operations to the ops of a family that is loaded."""
    for op in FAMILY_OPS:
        name = family + op.name
        fake = partial(_FAKES[op], family=family)
        torch.library.register_fake(f"qflux_kernels::{name}", by_name(op, fake))
        _HANDLES[name] = getattr(torch.ops.qflux_kernels, name).default
    # The counter imports Triton, which a call of ours should not wait for.
    when_imported("torch.utils.flop_counter", partial(_count, family))


def _count(family: str) -> None:
    from . import flops

    flops.register(family)
