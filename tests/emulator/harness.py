"""The CUDA kernels, compiled as plain C++ and run thread by thread on the CPU: calls on guarded
memory, and the same by the reference.

What this shows: the arithmetic, the indexing at every tile edge, which array elements are read and
written, that no result depends on the order in which the threads of a block take turns (so barriers
are where they must be), and that all threads of a block reach the same barriers.

What it cannot show: races in time, the memory model and alignment rules of a GPU, several blocks at
once, launch limits, registers and speed, and the rounding of device functions other than + - * /,
fma and sqrt.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
import torch
from assertions import assert_interaction_close, assert_relative

from qflux_kernels import Interaction, InverseGate, Radius, Sparsemax, Threshold, reference

FORWARD, REVERSED, SHUFFLED = 0, 1, 2
ALL_BLOCKS = 1 << 20
AUTO, MANY, ONE = 0, 1, 2  # launches of a step


class Memory:
    """Arrays between guard zones: reading a zone gives NaN, writing into one is found out.

    With FENCE set, an array ends (or begins) at a page that must not be touched: any access past
    that end, also one whose result is never used, kills the process.
    """

    GUARD = 64
    FENCE: str | None = None

    def __init__(self) -> None:
        self.zones: list[tuple[np.ndarray, np.ndarray]] = []

    def array(self, shape: tuple[int, ...], dtype: type, layout: str = "plain") -> np.ndarray:
        """An array full of NaN.

        "planes" has its last dimension outermost, "strided" has gaps, "heads" has its second batch
        dimension behind the tokens. What is "expanded" is so only where values are given.
        """
        order = list(range(len(shape)))
        gap = 1
        if layout == "planes":
            order = order[-1:] + order[:-1]
        elif layout == "heads" and len(shape) > 2:
            order[1], order[2] = 2, 1
        elif layout == "strided":
            order, gap = order[::-1], 2
        full = [shape[dim] * gap for dim in order]
        size = int(np.prod(full))
        start = 0 if self.FENCE == "before" else self.GUARD
        base = self._allocate(start + size + (0 if self.FENCE == "after" else self.GUARD), dtype)
        outside = np.ones(base.shape, bool)

        def inside(flat: np.ndarray) -> np.ndarray:
            block = flat[start : start + size].reshape(full)
            return block[(slice(None, None, gap),) * len(shape)].transpose(np.argsort(order))

        inside(outside)[...] = False
        self.zones.append((base, outside))
        return inside(base)

    def _allocate(self, size: int, dtype: type) -> np.ndarray:
        item = np.dtype(dtype).itemsize
        if self.FENCE is None:
            return np.full(size * item, 0xFF, np.uint8).view(dtype)
        page = mmap.PAGESIZE
        pages = -(-size * item // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        flat = np.frombuffer(memory, np.uint8)
        flat[:] = 0xFF
        no_access = 0
        for fence in (address, address + (pages + 1) * page):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), page, no_access) == 0
        first = page if self.FENCE == "before" else (pages + 1) * page - size * item
        return flat[first : first + size * item].view(dtype)

    def copy(self, values: np.ndarray | None, layout: str = "plain") -> np.ndarray | None:
        """The values in memory of their own; "expanded": with a stride of zero where all agree."""
        if values is None:
            return None
        kept = values
        if layout == "expanded":
            for dim in range(values.ndim):
                first = kept[(slice(None),) * dim + (slice(1),)]
                kept = first if (kept == first).all() else kept
        array = self.array(kept.shape, kept.dtype, layout)
        array[...] = kept
        return np.broadcast_to(array, values.shape) if layout == "expanded" else array

    def check(self) -> None:
        for base, outside in self.zones:
            bytes_outside = base.view(np.uint8).reshape(len(base), -1)[outside]
            assert (bytes_outside == 0xFF).all(), "a write outside an array"


@dataclass(frozen=True)
class Case:
    """One call of `interact`; `keys` and `value_dim` None: the states, the keys.

    `batch` has one or two dimensions. With layout "expanded" keys and coefficient are the same
    along the first of them, values and min_gate along the second, given gradients along both and
    the rows.
    """

    rows: int
    keys: int | None = None
    value_dim: int | None = None
    batch: int | tuple[int, int] = 2
    gate: bool = False
    soft: bool = False
    mass: bool = False
    causal: bool = True
    mean: bool = False
    whole_window: bool = False
    lengths: tuple[int, ...] | None = None
    eps: float | None = None
    layout: str = "plain"
    base: int = 0  # of a sweep; 0: every pair

    def __str__(self) -> str:
        parts = [f"{self.rows}"]
        if self.keys is not None:
            parts.append(f"k{self.keys}")
        if isinstance(self.batch, tuple):
            parts.append("b{}x{}".format(*self.batch))
        if self.value_dim is not None:
            parts.append(f"d{self.value_dim}")
        parts += [
            name
            for name in ("gate", "soft", "mass", "mean", "whole_window", "lengths")
            if getattr(self, name) not in (False, None)
        ]
        parts += [] if self.causal else ["full"]
        parts += [] if self.layout == "plain" else [self.layout]
        parts += [f"base{self.base}"] if self.base else []
        return "-".join(parts)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.batch if isinstance(self.batch, tuple) else (self.batch,)

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.batch_shape, self.rows)

    @property
    def num_keys(self) -> int:
        return self.rows if self.keys is None else self.keys

    @property
    def has_coefficient_vjp(self) -> bool:
        return self.gate or self.soft or self.mass

    @property
    def keeps_moments(self) -> bool:
        """Whether the forward leaves number and sum of kept keys for the backward."""
        return self.mass and self.value_dim is not None

    @property
    def keeps_sums(self) -> bool:
        """Whether it leaves the sums over kept keys from which the gradients of rows are made."""
        plain = not (self.gate or self.soft or self.mass) and self.value_dim is None
        return plain and not self.base

    @property
    def num_columns(self) -> int:
        return 2 if self.value_dim is None else self.value_dim


@dataclass
class Inputs:
    """Float64 values of a case; what a case does not have is None."""

    case: Case
    states: np.ndarray
    keys: np.ndarray | None
    values: np.ndarray | None
    coefficient: np.ndarray  # (batch,) sigma or alpha
    min_gate: np.ndarray  # (batch,)
    lengths: np.ndarray | None
    grad_context: np.ndarray
    grad_strength: np.ndarray

    @classmethod
    def random(cls, case: Case, seed: int = 0, dtype: type = np.float64) -> Inputs:
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(dtype).astype(np.float64)

        batch, of_keys = case.batch_shape, (*case.batch_shape, case.num_keys)
        lengths = None
        if case.lengths is not None:
            lengths = np.array(case.lengths, np.int64).reshape(batch)
        inputs = cls(
            case,
            states=normal(*case.tokens, 2),
            keys=None if case.keys is None else normal(*of_keys, 2),
            values=None if case.value_dim is None else normal(*of_keys, case.value_dim),
            coefficient=np.float32(rng.uniform(0.2, 0.8, batch)).astype(np.float64),
            min_gate=np.float32(rng.uniform(0.3, 2.0, batch)).astype(np.float64),
            lengths=lengths,
            grad_context=normal(*case.tokens, case.num_columns),
            grad_strength=normal(*case.tokens),
        )
        if case.layout == "expanded":
            for array in (inputs.keys, inputs.coefficient):
                if array is not None:
                    array[...] = array[:1]
            for array in (inputs.values, inputs.min_gate):
                if array is not None:
                    array[...] = array[:, :1]
            inputs.grad_context[...] = inputs.grad_context[0, 0, 0]
            inputs.grad_strength[...] = inputs.grad_strength[0, 0, 0]
        return inputs

    @property
    def eps(self) -> float:
        default = 1e-5 if self.case.gate else 1e-6
        return default if self.case.eps is None else self.case.eps

    def pair(self, dtype: type, memory: Memory) -> dict:
        """The arguments of the emulated launchers that describe the pairs."""
        case = self.case

        def place(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else memory.copy(values.astype(dtype), case.layout)

        states = place(self.states)
        return {
            "states": states,
            "keys": states if self.keys is None else place(self.keys),
            "values": place(self.values),
            "batch": case.batch_shape,
            "rows": case.rows,
            "key_count": case.num_keys,
            "value_dim": case.num_columns,
            "score": 3 if case.mass else 2 if case.soft else int(case.gate),
            "eps": self.eps,
            "whole_window": case.whole_window,
            "causal": case.causal,
            "mean": case.mean,
            "coefficient": place(self.coefficient),
            "min_gate": place(self.min_gate),
            "lengths": memory.copy(self.lengths, case.layout),
            "sweep_base": case.base,
            "row_scratch": memory.array(case.tokens, dtype) if case.mass else None,
        }

    def options(self, coefficient: torch.Tensor | None = None) -> dict:
        """The same as keyword arguments of the reference."""
        if coefficient is None:
            coefficient = torch.from_numpy(self.coefficient)
        window = "row" if self.case.whole_window else "prefix"
        shrinkage = "soft" if self.case.soft else "hard"
        if self.case.mass:
            score = Sparsemax(coefficient)
        elif self.case.gate:
            score = InverseGate(coefficient, self.eps, torch.from_numpy(self.min_gate))
        else:
            score = Threshold(coefficient, window, self.eps, shrinkage)
        return {
            "causal": self.case.causal,
            "score": score,
            "reduction": "mean" if self.case.mean else "sum",
            "lengths": None if self.lengths is None else torch.from_numpy(self.lengths),
        }


def interact(
    emulator,
    inputs: Inputs,
    dtype: type = np.float64,
    omit: tuple[str, ...] = (),
    divides: bool = True,
) -> dict[str, np.ndarray]:
    """The launcher on guarded memory; results named in `omit` are not asked for."""
    case, memory = inputs.case, Memory()
    call = inputs.pair(dtype, memory)
    out = {
        "context": memory.array((*case.tokens, case.num_columns), dtype, case.layout),
        "strength": memory.array(case.tokens, dtype, case.layout),
        "degree": memory.array(case.tokens, np.int32, case.layout),
        "threshold": memory.array(case.tokens, dtype, case.layout),
    } | dict.fromkeys(omit)
    left = 3 if case.keeps_moments else emulator.KEPT_SUMS if case.keeps_sums else 0
    if left and "moments" not in omit:
        out["moments"] = memory.array((*case.tokens, left), dtype, case.layout)
    emulator.interact(call | out | {"divides": divides})
    memory.check()
    return out


def interact_backward(
    emulator,
    inputs: Inputs,
    forward: dict[str, np.ndarray],
    dtype: type = np.float64,
    before: float | None = None,
    omit: tuple[str, ...] = (),
    divides: bool = True,
) -> dict[str, np.ndarray]:
    """The launchers on guarded memory, from the results of the forward; with `before`, adding to
    gradients of that value."""
    case, memory = inputs.case, Memory()
    call = inputs.pair(dtype, memory)
    shared = inputs.keys is None
    of_keys = (*case.batch_shape, case.num_keys)

    def array(*shape: int) -> np.ndarray:
        return memory.array(shape, dtype, case.layout)

    out = {"grad_states": array(*case.tokens, 2)}
    if before is not None:
        out["grad_states"][...] = before
    out["grad_keys"] = out["grad_states"] if shared else array(*of_keys, 2)
    out["grad_values"] = None if inputs.values is None else array(*of_keys, case.value_dim)
    out["grad_coefficient"] = array(*case.tokens) if case.has_coefficient_vjp else None
    if case.has_coefficient_vjp:
        out["grad_coefficient"][...] = before or 0
    given = {
        "grad_context": memory.copy(inputs.grad_context.astype(dtype), case.layout),
        "grad_strength": memory.copy(inputs.grad_strength.astype(dtype), case.layout),
        "threshold": memory.copy(forward["threshold"], case.layout),
        "moments": memory.copy(forward.get("moments"), case.layout),
        "grad_threshold": array(*case.tokens) if case.soft else None,
        "accumulate": before is not None,
        "keys_are_states": shared,
        "divides": divides,
    }
    emulator.interact_backward(call | out | given | dict.fromkeys(omit))
    memory.check()
    if case.soft:
        scratch = {"window_grads": window_grads(emulator, case, memory)}
        emulator.threshold_backward(call | out | given | scratch)
        memory.check()
    return {name: array for name, array in out.items() if array is not None and name not in omit}


def window_grads(emulator, case: Case, memory: Memory) -> np.ndarray:
    """Scratch of the gradient of tau."""
    return memory.array((*case.tokens, emulator.WINDOW_SUMS), np.float64)


def expected(inputs: Inputs) -> dict[str, np.ndarray]:
    """Results and gradients of the float64 reference."""
    case = inputs.case
    leaves = {
        name: None if array is None else torch.from_numpy(array.copy()).requires_grad_()
        for name, array in (
            ("states", inputs.states),
            ("keys", inputs.keys),
            ("values", inputs.values),
            ("coefficient", inputs.coefficient if case.has_coefficient_vjp else None),
        )
    }
    options = inputs.options(leaves["coefficient"])
    result = reference.interact(leaves["states"], leaves["keys"], leaves["values"], **options)
    loss = (result.context * torch.from_numpy(inputs.grad_context)).sum()
    loss = loss + (result.strength * torch.from_numpy(inputs.grad_strength)).sum()
    loss.backward()
    gradients = {
        f"grad_{name}": np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        for name, leaf in leaves.items()
        if leaf is not None
    }
    return {name: array.detach().numpy() for name, array in result._asdict().items()} | gradients


def close(name: str, got: np.ndarray, truth: np.ndarray, rtol: float = 1e-9) -> None:
    assert_relative(name, torch.from_numpy(got.copy()), torch.from_numpy(truth), rtol)


def check_interaction(inputs: Inputs, out: dict[str, np.ndarray]) -> None:
    """The error budget of `assertions`, which knows rounding, borderline pairs and NaN."""
    dtype = out["context"].dtype
    result = Interaction(
        *(torch.from_numpy(out[name].copy()) for name in ("context", "strength", "degree"))
    )
    states, keys, values = (
        None if array is None else torch.from_numpy(array.astype(dtype))
        for array in (inputs.states, inputs.keys, inputs.values)
    )
    assert_interaction_close(result, states, keys, values, **inputs.options())


@dataclass(frozen=True)
class Evolution:
    """One call of `evolve`: `dt` and `skip` are numbers, or how many steps have their own."""

    case: Case
    steps: int = 1
    dt: float | int = 0.1
    skip: float | int = 0.0
    radius: Radius | None = Radius()  # noqa: RUF009 (frozen)

    def __str__(self) -> str:
        rule = "plain" if self.radius is None else "radius"
        return f"{self.case}-steps{self.steps}-dt{self.dt}-skip{self.skip}-{rule}"


def by(launches: int, evolution: Evolution) -> tuple[int, int]:
    """Forward and backward by these; soft thresholds have many launches backward."""
    return launches, MANY if evolution.case.soft else launches


def run_evolve(
    emulator,
    evolution: Evolution,
    dtype: type = np.float64,
    launches: tuple[int, int] = (MANY, MANY),
    spoil: float | None = None,
):
    """Results and gradients of the emulated kernels, the same of the reference, and the tape.

    `launches` are those of the forward and the backward. `spoil` takes the place of one coordinate.
    """
    case, memory, seed = evolution.case, Memory(), 0
    inputs = Inputs.random(case, seed, dtype)
    if spoil is not None:
        inputs.states[0, 7 * case.rows // 10, 1] = spoil
    if case.eps is not None:
        inputs.min_gate[:] = 0
    rng = np.random.default_rng(seed + 1)
    tokens = case.tokens

    def per_token(value: float | int) -> float | np.ndarray:
        if isinstance(value, float):
            return value
        numbers = rng.uniform(0.05, 0.3, (value, *tokens)).astype(dtype).astype(np.float64)
        if case.layout == "expanded":
            numbers[...] = numbers[:, :, :1]
        return numbers

    dt, skip = per_token(evolution.dt), per_token(evolution.skip)
    call = inputs.pair(dtype, memory)
    rule = evolution.radius
    call |= {
        "steps": evolution.steps,
        "radius": None
        if rule is None
        else (rule.min, rule.max, rule.rate, rule.reversion, rule.target),
        "dt": dt if isinstance(dt, float) else memory.copy(dt.astype(dtype), case.layout),
        "skip": skip if isinstance(skip, float) else memory.copy(skip.astype(dtype), case.layout),
    }

    kept = emulator.TAPE_KEPT_PLANES if case.keeps_sums else emulator.TAPE_PLANES

    def forward(save: bool) -> dict[str, np.ndarray]:
        planes = kept if save else emulator.TAPE_PLANES
        out = {
            "tape": memory.array(((evolution.steps if save else 1) * planes, *tokens), dtype),
            "out": memory.array((*tokens, 2), dtype, case.layout),
            "strength": memory.array(tokens, dtype, case.layout),
            "degree": memory.array(tokens, np.int32, case.layout),
        }
        emulator.evolve(call | out | {"save": save, "planes": planes, "launches": launches[0]})
        memory.check()
        return out

    out, unsaved = forward(save=True), forward(save=False)
    for name in ("out", "strength", "degree"):
        np.testing.assert_array_equal(out[name], unsaved[name])
    grads = {
        "grad_states": memory.array((*tokens, 2), dtype, case.layout),
        "grad_dt": None if isinstance(dt, float) else memory.copy(np.zeros(dt.shape, dtype)),
        "grad_skip": None if isinstance(skip, float) else memory.copy(np.zeros(skip.shape, dtype)),
        "grad_coefficient": memory.copy(np.zeros(tokens, dtype))
        if case.has_coefficient_vjp
        else None,
    }
    emulator.evolve_backward(
        call
        | grads
        | {
            "tape": memory.copy(out["tape"]),
            "save": True,
            "planes": kept,
            "launches": launches[1],
            "grad_out": memory.copy(inputs.grad_context.astype(dtype), case.layout),
            "grad_strength": memory.copy(inputs.grad_strength.astype(dtype), case.layout),
            "scratch": memory.array((emulator.SCRATCH_PLANES, *tokens), dtype),
            "window_grads": window_grads(emulator, case, memory) if case.soft else None,
        }
    )
    memory.check()
    if case.has_coefficient_vjp:
        grads["grad_coefficient"] = grads["grad_coefficient"].sum(-1)
    got = {name: out[name] for name in ("out", "strength", "degree")}
    got |= {name: grad for name, grad in grads.items() if grad is not None}

    def leaf(value: float | np.ndarray) -> float | torch.Tensor:
        return value if isinstance(value, float) else torch.from_numpy(value).requires_grad_()

    leaves = {
        "grad_states": leaf(inputs.states),
        "grad_dt": leaf(dt),
        "grad_skip": leaf(skip),
        "grad_coefficient": leaf(inputs.coefficient),
    }
    result = reference.evolve(
        leaves["grad_states"],
        leaves["grad_dt"],
        skip=leaves["grad_skip"],
        radius=rule,
        steps=evolution.steps,
        **inputs.options(leaves["grad_coefficient"] if case.has_coefficient_vjp else None),
    )
    loss = (result.states * torch.from_numpy(inputs.grad_context)).sum()
    (loss + (result.strength * torch.from_numpy(inputs.grad_strength)).sum()).backward()
    truth = {
        "out": result.states.detach().numpy(),
        "strength": result.strength.detach().numpy(),
        "degree": result.degree.numpy(),
    }
    truth |= {name: leaves[name].grad.numpy() for name in grads if grads[name] is not None}
    return got, truth, out["tape"]


EVOLUTIONS = [
    Evolution(Case(1)),
    Evolution(Case(40), dt=1, skip=1),
    Evolution(Case(40), steps=2, dt=2, skip=2),
    Evolution(Case(40, gate=True), steps=2, dt=1, skip=2, radius=Radius(0.3, 1.2, 0.05, 0.2, 0.9)),
    Evolution(Case(40, gate=True, mean=True, layout="strided"), steps=3, skip=0.25, radius=None),
    Evolution(Case(140, lengths=(0, 140, 33), batch=3, mean=True), steps=2, dt=2, skip=1),
    Evolution(Case(33, lengths=(33, 20), gate=True, causal=False), dt=1),
    Evolution(Case(140, whole_window=True, layout="planes"), dt=1),
    Evolution(Case(300, batch=1), steps=2, dt=0.02),
]


PROJECTED = ("grad_features", "grad_weight", "grad_bias", "grad_scale", "grad_shift")


def run_project(
    emulator,
    tokens: int,
    count: int,
    width: int,
    dtype: type = np.float64,
    given: tuple[str, ...] = ("bias", "scale", "shift"),
    need_features: bool = True,
    need_parameters: bool = True,
):
    """Output and gradients of the emulated `project_norm`, and the same of PyTorch in float64."""
    rng, memory = np.random.default_rng(0), Memory()
    shapes = {"states": (tokens, count), "weight": (width, count)}
    shapes |= {name: (width,) for name in ("bias", "scale", "shift")} | {"grad": (tokens, width)}
    numbers = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    call = {
        name: memory.copy(array) if name in ("states", "weight", "grad", *given) else None
        for name, array in numbers.items()
    }
    call |= {"tokens": tokens, "count": count, "width": width, "eps": 1e-5}
    planes, *sizes = emulator.project_sizes(tokens, count, width)
    names = ("gram", "token_scratch", "partial", "totals")
    scratch = {"planes": memory.array((planes,), dtype)}
    scratch |= {
        name: memory.array((size,), np.float64) for name, size in zip(names, sizes, strict=True)
    }
    forward = scratch | dict.fromkeys(names[1:])
    if not need_parameters:
        scratch |= dict.fromkeys(names[2:])
    out = memory.array((tokens, width), dtype)
    emulator.project(call | forward | {"out": out})
    memory.check()

    grads = dict.fromkeys(PROJECTED)
    wanted = [*PROJECTED[: int(need_features)], *(PROJECTED[1:] if need_parameters else ())]
    like = dict(zip(PROJECTED, ("states", "weight", "bias", "scale", "shift"), strict=True))
    grads |= {name: memory.array(shapes[like[name]], dtype) for name in wanted}
    emulator.project_backward(call | scratch | grads)
    memory.check()

    leaves = {
        name: torch.from_numpy(array.astype(np.float64)).requires_grad_()
        for name, array in numbers.items()
    }
    absent = {"bias": torch.zeros, "scale": torch.ones, "shift": torch.zeros}
    for name in absent.keys() - set(given):
        leaves[name] = absent[name](width, dtype=torch.float64, requires_grad=True)
    outputs = torch.nn.functional.linear(leaves["states"], leaves["weight"], leaves["bias"])
    truth = torch.nn.functional.layer_norm(outputs, (width,), leaves["scale"], leaves["shift"])
    truth.backward(leaves["grad"].detach())
    got = {"out": out} | {name: grads[name] for name in wanted}
    return got, {"out": truth.detach().numpy()} | {
        name: leaves[like[name]].grad.numpy() for name in wanted
    }


def check_project(got: dict, truth: dict, rtol: float) -> None:
    for name, array in got.items():
        error, scale = np.abs(array - truth[name]).max(), np.abs(truth[name]).max()
        assert error <= rtol * (scale + 1), f"{name}: {error:.3g} of {scale:.3g}"
