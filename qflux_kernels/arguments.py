"""Every check of user arguments, once: kernels and reference start from the same canonical form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .checks import check_choice, check_flag, check_integer, check_real
from .options import REDUCTIONS, Radius, Score, Threshold

COMPUTE_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def _check_points(name: str, tensor: object, width: int | None) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got dtype {tensor.dtype}"
        )
    last = "D" if width is None else str(width)
    if tensor.dim() < 2 or (width is not None and tensor.shape[-1] != width):
        raise ValueError(f"{name} must have shape (..., length, {last}), got {tuple(tensor.shape)}")
    if width is None and tensor.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(tensor.shape)}")


def _check_device(name: str, tensor: torch.Tensor, states: torch.Tensor) -> None:
    if tensor.device != states.device:
        raise ValueError(f"{name} is on {tensor.device}, but states are on {states.device}")


def _same(shape: torch.Size, other: torch.Size) -> bool:
    # Tuples compare their entries before their lengths: a traced size that is compared for nothing
    # stays a condition on it.
    return len(shape) == len(other) and shape == other


def _expand(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Broadcast `tensor` to exactly `shape`, or raise naming it."""
    if _same(tensor.shape, shape):
        return tensor
    excess = tensor.dim() - len(shape)
    if excess > 0 and all(size == 1 for size in tensor.shape[:excess]):
        tensor = tensor.reshape(tensor.shape[excess:])
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to {tuple(shape)}, got shape {tuple(tensor.shape)}"
        ) from None


def _per_sequence(
    name: str, value: float | torch.Tensor, states: torch.Tensor, batch: torch.Size
) -> float | torch.Tensor:
    """A float as it came, or a tensor of the batch shape in the dtype of the computation."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    _check_device(name, value, states)
    return _expand(name, value.to(COMPUTE_DTYPES[states.dtype]), batch)


def check_reduction(reduction: object, score: object) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction != "sum" and isinstance(score, Score) and score.kind.mass:
        raise ValueError(
            f"reduction must be 'sum' for {type(score).__name__}, whose weights are a mean "
            f"already, got {reduction!r}"
        )


def canonical_score(score: object, states: torch.Tensor, batch: torch.Size) -> Score:
    if not isinstance(score, Score):
        known = " or ".join(kind.__name__ for kind in Score.__subclasses__())
        raise TypeError(f"score must be a {known}, got {type(score).__name__}")
    changed = {}
    for name in score.per_sequence:
        value = getattr(score, name)
        canonical = _per_sequence(name, value, states, batch)
        if canonical is not value:
            changed[name] = canonical
    return replace(score, **changed) if changed else score


_TRACING = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def values_are_known(tensor: torch.Tensor) -> bool:
    """Whether reading the tensor is free of device synchronisation, tracing and transforms."""
    return tensor.device.type == "cpu" and is_eager(tensor)


def is_eager(tensor: torch.Tensor) -> bool:
    """Whether the tensor is one of numbers, outside tracing and transforms."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is torch.Tensor
        and not is_functorch_wrapped_tensor(tensor)
        and not tensor.is_meta
        and all(torch._C._get_dispatch_mode(key) is None for key in _TRACING)
    )


def is_plain_call(*tensors: torch.Tensor) -> bool:
    """Whether an op of the CPU may take the place of modules that are called with these tensors.

    They are float32 or float64, of one dtype, on a CPU, and nobody traces or transforms the call,
    differentiates it forwards or casts it. Parameters are tensors too.
    """
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in tensors)
        and all(is_eager(tensor.detach()) for tensor in tensors)
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def _canonical_lengths(
    lengths: object, states: torch.Tensor, batch: torch.Size
) -> torch.Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor):
        raise TypeError(f"lengths must be an integer tensor or None, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be an integer tensor, got dtype {lengths.dtype}")
    _check_device("lengths", lengths, states)
    length = states.shape[-2]
    lengths = lengths.to(torch.int64)  # unsigned ones have no minimum
    if values_are_known(lengths) and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > length:
            raise ValueError(f"lengths must lie in [0, {length}], got values in [{low}, {high}]")
    return _expand("lengths", lengths, batch)


def _common_dtype(tensors: dict[str, torch.Tensor], device_type: str) -> torch.dtype:
    """The dtype the results come back in; autocast may hand over mixed ones, users may not."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1:
        return dtypes.pop()
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.float64 if torch.float64 in dtypes else torch.float32
    found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
    raise TypeError(f"states, keys and values must share one dtype outside autocast, got {found}")


@dataclass(frozen=True)
class InteractArguments:
    """Checked arguments of `interact`, of one batch shape.

    Points and values are in one dtype, their storage's, and may be half precision; the tensors of
    the score are in that of the computation.
    """

    states: torch.Tensor  # (*batch, S, 2)
    keys: torch.Tensor | None  # (*batch, K, 2); None: the states
    values: torch.Tensor | None  # (*batch, K, D); None: the keys
    causal: bool
    score: Score  # floats, or tensors of the batch shape
    reduction: str
    lengths: torch.Tensor | None  # (*batch,) int64
    result_dtype: torch.dtype

    def widened(self) -> InteractArguments:
        """The same with points and values in the dtype of the computation."""
        points = {"states": self.states, "keys": self.keys, "values": self.values}
        return replace(
            self,
            **{name: None if given is None else widen(given) for name, given in points.items()},
        )


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of the computation: half precision is for storage only."""
    dtype = COMPUTE_DTYPES[tensor.dtype]
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class InteractOptions(TypedDict, total=False):
    """The keywords of `interact`, less those that choose who serves it."""

    causal: bool
    score: Score
    reduction: str
    lengths: torch.Tensor | None


class EvolveOptions(InteractOptions, total=False):
    """The same of `evolve`."""

    radius: Radius | None
    skip: float | torch.Tensor | None
    steps: int


def interact_arguments(
    states: Any,
    keys: Any = None,
    values: Any = None,
    *,
    causal: Any = True,
    score: Any = Threshold(),  # noqa: B008 (frozen)
    reduction: Any = "sum",
    lengths: Any = None,
) -> InteractArguments:
    """Check the arguments of `interact` and bring them to one batch shape."""
    _check_points("states", states, 2)
    given = {"states": states}
    for name, tensor, width in (("keys", keys, 2), ("values", values, None)):
        if tensor is not None:
            _check_points(name, tensor, width)
            _check_device(name, tensor, states)
            given[name] = tensor
    source = states if keys is None else keys
    if values is not None and values.shape[-2] != source.shape[-2]:
        raise ValueError(
            f"values must have one row for each of the {source.shape[-2]} keys, "
            f"got shape {tuple(values.shape)}"
        )
    if lengths is not None and source.shape[-2] != states.shape[-2]:
        raise ValueError(
            f"lengths needs as many keys as states ({states.shape[-2]}), got {source.shape[-2]}"
        )
    check_flag("causal", causal)
    check_reduction(reduction, score)

    result_dtype, batch = states.dtype, states.shape[:-2]
    # What changes nothing costs as much as a kernel on a few tokens.
    if any(t.dtype != result_dtype or not _same(t.shape[:-2], batch) for t in given.values()):
        result_dtype = _common_dtype(given, states.device.type)
        try:
            batch = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in given.values()))
        except RuntimeError:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
            raise ValueError(f"batch dimensions must broadcast together, got {shapes}") from None
        # Half precision is cast before a batch shares it.
        given = {
            name: _expand(name, tensor.to(result_dtype), batch + tensor.shape[-2:])
            for name, tensor in given.items()
        }
        states = given["states"]
    return InteractArguments(
        states=states,
        keys=given.get("keys"),
        values=given.get("values"),
        causal=causal,
        score=canonical_score(score, states, batch),
        reduction=reduction,
        lengths=_canonical_lengths(lengths, states, batch),
        result_dtype=result_dtype,
    )


@dataclass(frozen=True)
class EvolveArguments:
    """Checked arguments of `evolve`, dtypes as in `InteractArguments`.

    `dt` and `skip` are floats or `(steps or 1, *batch, S)`.
    """

    states: torch.Tensor  # (*batch, S, 2)
    dt: float | torch.Tensor
    skip: float | torch.Tensor | None
    causal: bool
    score: Score
    radius: Radius | None
    reduction: str
    steps: int
    lengths: torch.Tensor | None
    result_dtype: torch.dtype


def per_step(name: str, value: Any, states: torch.Tensor, steps: int) -> float | torch.Tensor:
    """A float, or a tensor `(steps or 1, *batch, S)`.

    A tensor with one dimension more than the batch and the tokens has its steps first. A smaller
    one broadcasts to the tokens if it can, and is otherwise tried with its steps first.
    """
    if not isinstance(value, torch.Tensor):
        check_real(name, value, finite=False)
        return float(value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {value.dtype}")
    _check_device(name, value, states)
    target = states.shape[:-1]
    value = value.to(COMPUTE_DTYPES[states.dtype])
    if _same(value.shape, target):
        return value.unsqueeze(0)

    def broadcasts(shape: torch.Size) -> bool:
        return len(shape) <= len(target) and all(
            size == 1 or size == wanted
            for size, wanted in zip(reversed(shape), reversed(target), strict=False)
        )

    if broadcasts(value.shape):
        return value.expand(target).unsqueeze(0)
    if value.dim() > 0 and value.shape[0] in (1, steps) and broadcasts(value.shape[1:]):
        middle = (1,) * (len(target) - value.dim() + 1)
        value = value.reshape(value.shape[:1] + middle + value.shape[1:])
        return value.expand(value.shape[:1] + target)
    raise ValueError(
        f"{name} must broadcast to {tuple(target)}, with a leading dimension of steps = {steps} "
        f"if it differs between steps, got shape {tuple(value.shape)}"
    )


def evolve_arguments(
    states: Any,
    dt: Any,
    *,
    radius: Any = Radius(),  # noqa: B008 (frozen)
    skip: Any = None,
    steps: Any = 1,
    **options: Any,
) -> EvolveArguments:
    """Check the arguments of `evolve` and bring them to one shape."""
    if radius is not None and not isinstance(radius, Radius):
        raise TypeError(f"radius must be a Radius or None, got {type(radius).__name__}")
    check_integer("steps", steps, 1)
    base = interact_arguments(states, **options)
    return EvolveArguments(
        states=base.states,
        dt=per_step("dt", dt, base.states, steps),
        skip=None if skip is None else per_step("skip", skip, base.states, steps),
        causal=base.causal,
        score=base.score,
        radius=radius,
        reduction=base.reduction,
        steps=steps,
        lengths=base.lengths,
        result_dtype=base.result_dtype,
    )
