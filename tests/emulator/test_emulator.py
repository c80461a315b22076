"""The CUDA kernels, compiled as plain C++ and run thread by thread on the CPU.

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
import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from assertions import assert_interaction_close, assert_relative, count_borderline
from inputs import SWEEP_STATES

from qflux_kernels import Interaction, InverseGate, Radius, Threshold, reference
from qflux_kernels.thresholds import threshold_vjp

ROOT = Path(__file__).resolve().parents[2]
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
        """An array full of NaN; "planes" has its last dimension outermost, "strided" has gaps."""
        order = list(range(len(shape)))
        gap = 1
        if layout == "planes":
            order = order[-1:] + order[:-1]
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
        if values is None:
            return None
        array = self.array(values.shape, values.dtype, layout)
        array[...] = values
        return array

    def check(self) -> None:
        for base, outside in self.zones:
            bytes_outside = base.view(np.uint8).reshape(len(base), -1)[outside]
            assert (bytes_outside == 0xFF).all(), "a write outside an array"


@dataclass(frozen=True)
class Case:
    """One call of `interact`; `keys` and `depth` None: the states, the keys."""

    rows: int
    keys: int | None = None
    depth: int | None = None
    batch: int = 2
    gate: bool = False
    soft: bool = False
    causal: bool = True
    mean: bool = False
    row_window: bool = False
    lengths: tuple[int, ...] | None = None
    eps: float | None = None
    layout: str = "plain"
    base: int = 0  # of a sweep; 0: every pair

    def __str__(self) -> str:
        parts = [f"{self.rows}"]
        if self.keys is not None:
            parts.append(f"k{self.keys}")
        if self.depth is not None:
            parts.append(f"d{self.depth}")
        parts += [
            name
            for name in ("gate", "soft", "mean", "row_window", "lengths")
            if getattr(self, name) not in (False, None)
        ]
        parts += [] if self.causal else ["full"]
        parts += [] if self.layout == "plain" else [self.layout]
        parts += [f"base{self.base}"] if self.base else []
        return "-".join(parts)

    @property
    def num_keys(self) -> int:
        return self.rows if self.keys is None else self.keys


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

        batch, rows, columns = case.batch, case.rows, 2 if case.depth is None else case.depth
        return cls(
            case,
            states=normal(batch, rows, 2),
            keys=None if case.keys is None else normal(batch, case.keys, 2),
            values=None if case.depth is None else normal(batch, case.num_keys, case.depth),
            coefficient=np.float32(rng.uniform(0.2, 0.8, batch)).astype(np.float64),
            min_gate=np.float32(rng.uniform(0.3, 2.0, batch)).astype(np.float64),
            lengths=None if case.lengths is None else np.array(case.lengths, np.int64),
            grad_context=normal(batch, rows, columns),
            grad_strength=normal(batch, rows),
        )

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
            "batch": case.batch,
            "rows": case.rows,
            "key_count": case.num_keys,
            "depth": 2 if case.depth is None else case.depth,
            "score": 2 if case.soft else int(case.gate),
            "eps": self.eps,
            "row_window": case.row_window,
            "causal": case.causal,
            "mean": case.mean,
            "coefficient": memory.copy(self.coefficient.astype(dtype)),
            "min_gate": memory.copy(self.min_gate.astype(dtype)),
            "lengths": memory.copy(self.lengths),
            "sweep_base": case.base,
        }

    def options(self, alpha: torch.Tensor | None = None) -> dict:
        """The same as keyword arguments of the reference."""
        coefficient = torch.from_numpy(self.coefficient) if alpha is None else alpha
        window = "row" if self.case.row_window else "prefix"
        shrinkage = "soft" if self.case.soft else "hard"
        return {
            "causal": self.case.causal,
            "score": InverseGate(coefficient, self.eps, torch.from_numpy(self.min_gate))
            if self.case.gate
            else Threshold(coefficient, window, self.eps, shrinkage),
            "reduction": "mean" if self.case.mean else "sum",
            "lengths": None if self.lengths is None else torch.from_numpy(self.lengths),
        }


def interact(
    emulator, inputs: Inputs, dtype: type = np.float64, omit: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The launcher on guarded memory; results named in `omit` are not asked for."""
    case, memory = inputs.case, Memory()
    call = inputs.pair(dtype, memory)
    shape = (case.batch, case.rows)
    out = {
        "context": memory.array((*shape, call["depth"]), dtype, case.layout),
        "strength": memory.array(shape, dtype, case.layout),
        "degree": memory.array(shape, np.int32, case.layout),
        "threshold": memory.array(shape, dtype, case.layout),
    } | dict.fromkeys(omit)
    emulator.interact(call | out)
    memory.check()
    return out


def interact_backward(
    emulator,
    inputs: Inputs,
    threshold: np.ndarray,
    dtype: type = np.float64,
    before: float | None = None,
    omit: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """The launcher on guarded memory; with `before`, adding to gradients of that value."""
    case, memory = inputs.case, Memory()
    call = inputs.pair(dtype, memory)
    shared = inputs.keys is None
    of_keys = (case.batch, case.num_keys)
    out = {"grad_states": memory.array((case.batch, case.rows, 2), dtype, case.layout)}
    if before is not None:
        out["grad_states"][...] = before
    out["grad_keys"] = (
        out["grad_states"] if shared else memory.array((*of_keys, 2), dtype, case.layout)
    )
    out["grad_values"] = (
        None if inputs.values is None else memory.array((*of_keys, case.depth), dtype, case.layout)
    )
    out["grad_alpha"] = None
    if case.gate:
        start = np.full((case.batch, case.rows), before or 0, dtype)
        out["grad_alpha"] = memory.copy(start, case.layout)
    if case.soft:
        out["grad_threshold"] = memory.array((case.batch, case.rows), dtype, case.layout)
    given = {
        "grad_context": memory.copy(inputs.grad_context.astype(dtype), case.layout),
        "grad_strength": memory.copy(inputs.grad_strength.astype(dtype), case.layout),
        "threshold": memory.copy(threshold, case.layout),
        "accumulate": before is not None,
        "keys_are_states": shared,
    }
    emulator.interact_backward(call | out | given | dict.fromkeys(omit))
    memory.check()
    if case.soft:
        add_threshold(inputs, out, dtype)
    return {name: array for name, array in out.items() if array is not None and name not in omit}


def add_threshold(inputs: Inputs, out: dict[str, np.ndarray], dtype: type) -> None:
    """What reaches states and keys by the threshold, which is no launcher's business."""

    def tensor(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array.astype(dtype))

    case = inputs.case
    lengths = None if inputs.lengths is None else torch.from_numpy(inputs.lengths)
    shares = threshold_vjp(
        tensor(out.pop("grad_threshold")), tensor(inputs.states), tensor(inputs.keys),
        tensor(inputs.coefficient), lengths, inputs.eps, case.row_window, case.causal,
    )  # fmt: skip
    for name, share in zip(("grad_states", "grad_keys"), shares, strict=False):
        if share.numel():
            out[name] += share.numpy()


def expected(inputs: Inputs) -> dict[str, np.ndarray]:
    """Results and gradients of the float64 reference."""
    case = inputs.case
    leaves = {
        name: None if array is None else torch.from_numpy(array.copy()).requires_grad_()
        for name, array in (
            ("states", inputs.states),
            ("keys", inputs.keys),
            ("values", inputs.values),
            ("alpha", inputs.coefficient if case.gate else None),
        )
    }
    options = inputs.options(leaves["alpha"])
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


EDGES = [
    Case(rows, gate=gate, layout=layout)
    for rows, gate, layout in [
        (0, False, "plain"),
        (1, False, "plain"),
        (1, True, "strided"),
        (2, True, "plain"),
        (31, False, "planes"),
        (33, True, "planes"),
        (64, False, "strided"),
        (127, True, "plain"),
        (129, False, "plain"),
        (255, False, "plain"),
        (257, False, "planes"),
        (257, True, "plain"),
        (513, True, "plain"),
        (515, False, "strided"),
    ]
]
SHAPES = [
    Case(0, keys=7, depth=3),
    Case(7, keys=0),
    Case(7, keys=0, depth=2, gate=True, causal=False),
    Case(5, keys=300),
    Case(5, keys=1100, depth=3, gate=True),
    Case(300, keys=5),
    Case(300, keys=5, depth=2, causal=False),
    Case(140, keys=141, depth=1, gate=True, layout="strided"),
    Case(131, keys=530, depth=8, layout="planes"),
    Case(530, keys=131, depth=3, layout="strided"),
    Case(70, depth=33),
    Case(70, depth=33, gate=True, mean=True),
    Case(260, depth=8, gate=True),
    # Tiles of 1024 keys on the fast path, of 512 on the general one; segments of 1024 rows.
    Case(1027, batch=1),
    Case(1040, depth=5, batch=1, causal=False),
    # Blocks enough that warps need not split what they meet, although it is longer than a chunk.
    Case(1, keys=300, batch=264, gate=True),
]
OPTIONS = [
    Case(150, causal=False),
    Case(1, soft=True),
    Case(263, soft=True),
    Case(150, soft=True, depth=5, causal=False, layout="planes"),
    Case(140, keys=300, soft=True, row_window=True, mean=True, layout="strided"),
    Case(300, keys=140, soft=True, depth=33),
    Case(150, soft=True, lengths=(0, 1, 77, 150, 149), batch=5, depth=3),
    Case(150, causal=False, gate=True, mean=True),
    Case(150, row_window=True),
    Case(1030, row_window=True, mean=True, batch=1),
    Case(90, keys=200, depth=3, row_window=True),
    Case(150, mean=True),
    Case(150, mean=True, gate=True),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, gate=True, mean=True),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, causal=False, depth=3),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, row_window=True),
    Case(600, lengths=(600, 300), depth=2, gate=True, causal=False),
]


# By sweep, with base blocks so small that short sequences have several levels.
SWEEPS = [
    Case(1, base=32),
    Case(33, base=32, layout="planes"),
    Case(64, base=64),
    Case(257, base=32),
    Case(300, base=32, lengths=(300, 77)),
    Case(150, base=32, lengths=(0, 1, 77, 150, 149), batch=5, mean=True, row_window=True),
    Case(150, causal=False, lengths=(0, 1, 77, 150, 149), batch=5, depth=3, base=32),
    Case(140, depth=11, base=32, batch=1, layout="strided"),
    Case(0, keys=7, depth=3, base=32),
    Case(7, keys=0, base=32),
    Case(5, keys=300, base=64),
    Case(300, keys=5, depth=2, base=64),
    Case(150, keys=530, depth=3, base=64, batch=1),
    Case(530, keys=150, base=64, batch=1, layout="planes"),
    Case(530, keys=150, causal=False, mean=True, batch=1, base=64),
    # Several super-blocks, and more keys than a list holds.
    Case(2300, causal=False, batch=1, base=64),
    Case(1100, keys=1300, causal=False, batch=1, base=64, depth=2),
]


@pytest.fixture(autouse=True)
def plain_order(emulator):
    emulator.configure(FORWARD, ALL_BLOCKS)


@pytest.mark.parametrize("case", EDGES + SHAPES + OPTIONS + SWEEPS, ids=str)
def test_interact_matches_the_reference(emulator, case):
    inputs = Inputs.random(case)
    truth = expected(inputs)
    out = interact(emulator, inputs)
    close("context", out["context"], truth["context"])
    close("strength", out["strength"], truth["strength"])
    np.testing.assert_array_equal(out["degree"], truth["degree"])
    assert out["threshold"].any() != case.gate or not truth["degree"].any()

    grads = interact_backward(emulator, inputs, out["threshold"])
    if case.gate:
        grads["grad_alpha"] = grads["grad_alpha"].sum(1)
    if inputs.keys is None:
        del grads["grad_keys"]
    for name, grad in grads.items():
        close(name, grad, truth[name])


FLOAT32 = [
    Case(200, batch=1),
    Case(200, batch=1, depth=9),
    Case(90, keys=300, batch=1, depth=3, row_window=True, layout="strided"),
    Case(200, batch=1, soft=True),
    Case(90, keys=300, batch=1, depth=3, soft=True),
    Case(200, batch=1, gate=True, eps=0.1, mean=True),
    Case(200, batch=1, gate=True, eps=0.1, depth=5),
]


@pytest.mark.parametrize("case", [*FLOAT32, Case(1100, batch=1), Case(530, depth=3)], ids=str)
def test_float32_stays_in_the_error_budget(emulator, case):
    inputs = Inputs.random(case, dtype=np.float32)
    check_interaction(inputs, interact(emulator, inputs, np.float32))


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_float32_gradients(emulator, case):
    def borderline(inputs: Inputs) -> int:
        options = inputs.options()
        del options["reduction"]
        states, keys = (
            None if array is None else torch.from_numpy(array)
            for array in (inputs.states, inputs.keys)
        )
        return count_borderline(states, keys, delta=1e-5, **options)

    candidates = (Inputs.random(case, seed, np.float32) for seed in range(100))
    inputs = next(inputs for inputs in candidates if borderline(inputs) == 0)
    truth = expected(inputs)
    threshold = interact(emulator, inputs, np.float32)["threshold"]
    grads = interact_backward(emulator, inputs, threshold, np.float32)
    if case.gate:
        grads["grad_alpha"] = grads["grad_alpha"].sum(1)
    if inputs.keys is None:
        del grads["grad_keys"]
    for name, grad in grads.items():
        close(name, grad, truth[name], 4e-6)


def test_float32_error_does_not_grow_with_the_number_of_keys(emulator):
    inputs = Inputs.random(Case(2, keys=160_000, batch=1, causal=False), dtype=np.float32)
    inputs.coefficient[:] = -10  # keeps every pair
    inputs.keys += 2
    truth = expected(inputs)
    out = interact(emulator, inputs, np.float32)
    close("context", out["context"], truth["context"], 5e-8)
    close("strength", out["strength"], truth["strength"], 5e-8)


def test_thresholds_of_states_far_from_the_origin(emulator):
    inputs = Inputs.random(Case(1100, batch=1))
    inputs.states = 1e3 + 1e-3 * inputs.states
    tau = interact(emulator, inputs)["threshold"][0]
    x = inputs.states[0].astype(np.longdouble)
    for row in (0, 1, 2, 500, 1023, 1024, 1025, 1099):
        s = (x[: row + 1] @ x[row] + 1) / 2
        variance = ((s - s.mean()) ** 2).mean()
        truth = s.mean() + inputs.coefficient[0] * np.sqrt(variance + 1e-6)
        assert abs(tau[row] - truth) <= 1e-14 * abs(truth)


ORDERS = [
    Case(300, batch=3),
    Case(300, batch=3, gate=True, layout="planes"),
    Case(300, batch=3, soft=True, depth=3),
    Case(1100, batch=1, row_window=True),
    Case(150, keys=600, depth=11, layout="strided"),
    Case(150, keys=300, depth=3, gate=True, causal=False),
    Case(200, base=32, batch=3),
    Case(100, keys=140, depth=11, batch=1, base=32, layout="strided"),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(emulator, case, dtype):
    inputs = Inputs.random(case)

    def everything() -> list[bytes]:
        out = interact(emulator, inputs, dtype)
        grads = interact_backward(emulator, inputs, out["threshold"], dtype)
        return [array.tobytes() for array in [*out.values(), *grads.values()]]

    first = everything()
    assert everything() == first
    for order, blocks in [(REVERSED, ALL_BLOCKS), (SHUFFLED, ALL_BLOCKS), (REVERSED, 2)]:
        emulator.configure(order, blocks)
        assert everything() == first


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(140),
        Case(140, row_window=True),
        Case(140, gate=True),
        Case(140, depth=3),
        Case(140, depth=3, gate=True),
        Case(70, keys=300, depth=3),
        Case(300, keys=140),
        Case(140, causal=False),
        Case(140, depth=3, lengths=(100, 139)),
    ],
    ids=str,
)
def test_nan_and_infinity_reach_the_rows_that_see_them_and_no_other(emulator, case, value):
    clean = Inputs.random(case)
    before = interact(emulator, clean)
    late_row = 7 * case.rows // 10
    for name, at in [("states", (0, late_row, 1)), ("keys", (1, 60, 0)), ("values", (0, 99, 1))]:
        array = getattr(clean, name)
        if array is None:
            continue
        dirty = array.copy()
        dirty[at] = value
        inputs = replace(clean, **{name: dirty})
        after = interact(emulator, inputs)
        if not (np.isinf(value) and case.gate and name != "values"):
            # An infinite score has gate 0 and is dropped, which the budget does not know.
            check_interaction(inputs, after)
        touched = ~np.isfinite(after["context"]).all(-1)
        assert touched[at[0]].any() and not touched[1 - at[0]].any()
        same = before["context"] == after["context"]
        assert same[~touched].all()


@pytest.mark.parametrize(
    "case",
    [
        Case(150),
        Case(150, gate=True),
        Case(150, depth=3),
        Case(150, depth=3, gate=True, causal=False),
        Case(150, row_window=True),
        Case(150, causal=False),
        Case(150, base=32),
        Case(150, depth=3, causal=False, base=32),
    ],
    ids=str,
)
def test_padding_is_never_read(emulator, case):
    case = replace(case, batch=3, lengths=(0, 149, 70), mean=True)
    clean = Inputs.random(case)
    dirty = Inputs.random(case)
    padding = np.arange(case.rows) >= np.array(case.lengths)[:, None]
    for name in ("states", "values", "grad_context", "grad_strength"):
        if getattr(dirty, name) is not None:
            getattr(dirty, name)[padding] = np.nan

    def everything(inputs: Inputs) -> dict[str, np.ndarray]:
        out = interact(emulator, inputs)
        return out | interact_backward(emulator, inputs, out["threshold"])

    for (name, wanted), got in zip(
        everything(clean).items(), everything(dirty).values(), strict=True
    ):
        np.testing.assert_array_equal(got, wanted, err_msg=name)
        assert not got[padding].any(), name


@pytest.mark.parametrize("fence", ["before", "after"])
def test_nothing_past_an_array_is_touched(emulator, fence):
    """In a process of its own, because an access past a fence ends it."""

    def run() -> None:
        torch.set_num_threads(1)  # those of a parent do not survive a fork
        Memory.FENCE = fence
        for case in [
            Case(1),
            Case(129, batch=1),
            Case(129, depth=9, gate=True),
            Case(33, lengths=(33, 0)),
            Case(40, lengths=(40, 7), gate=True, row_window=True),
            Case(5, keys=301, depth=3),
            Case(301, keys=5, depth=2),
            Case(3, keys=0),
            Case(0, keys=3, depth=1),
            Case(70, lengths=(70, 0), depth=9, base=32),
            Case(40, keys=101, depth=3, base=32),
            Case(65, base=32, causal=False, batch=1),
        ]:
            inputs = Inputs.random(case)
            for dtype in (np.float32, np.float64):
                out = interact(emulator, inputs, dtype)
                interact_backward(emulator, inputs, out["threshold"], dtype)
        for evolution in EVOLUTIONS[:4]:
            for launches in (MANY, ONE):
                run_evolve(emulator, evolution, launches=(launches, launches))
        for sizes in [(1, 1, 1), (33, 2, 17), (300, 8, 130)]:
            for dtype in (np.float32, np.float64):
                run_project(emulator, *sizes, dtype)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_lengths_beyond_the_tensor_are_clamped(emulator):
    clamped = Inputs.random(Case(40, depth=3, lengths=(0, 40), causal=False))
    beyond = replace(clamped, lengths=np.array([-3, 1000]))
    for got, wanted in zip(
        interact(emulator, beyond).values(), interact(emulator, clamped).values(), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "case", [Case(200), Case(200, gate=True), Case(60, depth=3), Case(150, base=32)], ids=str
)
def test_results_that_are_not_wanted(emulator, case):
    inputs = Inputs.random(case)
    full = interact(emulator, inputs)
    for omit in [("degree",), ("strength",), ("strength", "degree")]:
        part = interact(emulator, inputs, omit=omit)
        for name in set(full) - set(omit):
            np.testing.assert_array_equal(part[name], full[name])


@pytest.mark.parametrize(
    "case",
    [Case(90, keys=140, depth=9, gate=True), Case(90, keys=140, depth=9, base=32)],
    ids=str,
)
def test_gradients_that_are_not_wanted(emulator, case):
    inputs = Inputs.random(case)
    threshold = interact(emulator, inputs)["threshold"]
    full = interact_backward(emulator, inputs, threshold)
    for omit in [
        ("grad_states",),
        ("grad_states", "grad_alpha"),
        ("grad_keys",),
        ("grad_values",),
        ("grad_keys", "grad_values"),
    ]:
        part = interact_backward(emulator, inputs, threshold, omit=omit)
        for name in set(full) - set(omit):
            np.testing.assert_array_equal(part[name], full[name], err_msg=name)
    silent = replace(inputs, grad_strength=np.zeros_like(inputs.grad_strength))
    wanted = interact_backward(emulator, silent, threshold)
    got = interact_backward(emulator, inputs, threshold, omit=("grad_strength",))
    for name, grad in wanted.items():
        np.testing.assert_array_equal(got[name], grad, err_msg=name)


@pytest.mark.parametrize(
    "case",
    [
        Case(150),
        Case(150, gate=True),
        Case(60, keys=90, depth=3, gate=True),
        Case(150, base=32),
    ],
    ids=str,
)
def test_accumulate_adds_to_the_gradients_of_states(emulator, case):
    inputs = Inputs.random(case)
    threshold = interact(emulator, inputs)["threshold"]
    written = interact_backward(emulator, inputs, threshold)
    added = interact_backward(emulator, inputs, threshold, before=3.0)
    for name, grad in written.items():
        start = 3.0 if name in ("grad_states", "grad_alpha") else 0.0
        if name == "grad_keys" and inputs.keys is None:
            start = 3.0
        close(name, added[name], grad + start, 1e-13)


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
    tokens = (case.batch, case.rows)

    def per_token(value: float | int) -> float | np.ndarray:
        if isinstance(value, float):
            return value
        return rng.uniform(0.05, 0.3, (value, *tokens)).astype(dtype).astype(np.float64)

    dt, skip = per_token(evolution.dt), per_token(evolution.skip)
    call = inputs.pair(dtype, memory)
    rule = evolution.radius
    call |= {
        "steps": evolution.steps,
        "radius": None
        if rule is None
        else (rule.min, rule.max, rule.rate, rule.reversion, rule.target),
        "dt": dt if isinstance(dt, float) else memory.copy(dt.astype(dtype)),
        "skip": skip if isinstance(skip, float) else memory.copy(skip.astype(dtype)),
    }

    def forward(save: bool) -> dict[str, np.ndarray]:
        planes = (evolution.steps if save else 1) * emulator.TAPE_PLANES
        out = {
            "tape": memory.array((planes * case.batch, case.rows), dtype),
            "out": memory.array((*tokens, 2), dtype, case.layout),
            "strength": memory.array(tokens, dtype, case.layout),
            "degree": memory.array(tokens, np.int32, case.layout),
        }
        emulator.evolve(call | out | {"save": save, "launches": launches[0]})
        memory.check()
        return out

    out, unsaved = forward(save=True), forward(save=False)
    for name in ("out", "strength", "degree"):
        np.testing.assert_array_equal(out[name], unsaved[name])
    grads = {
        "grad_states": memory.array((*tokens, 2), dtype, case.layout),
        "grad_dt": None if isinstance(dt, float) else memory.copy(np.zeros(dt.shape, dtype)),
        "grad_skip": None if isinstance(skip, float) else memory.copy(np.zeros(skip.shape, dtype)),
        "grad_alpha": memory.copy(np.zeros(tokens, dtype)) if case.gate else None,
    }
    emulator.evolve_backward(
        call
        | grads
        | {
            "tape": memory.copy(out["tape"]),
            "save": True,
            "launches": launches[1],
            "grad_out": memory.copy(inputs.grad_context.astype(dtype), case.layout),
            "grad_strength": memory.copy(inputs.grad_strength.astype(dtype), case.layout),
            "scratch": memory.array((emulator.SCRATCH_PLANES * case.batch, case.rows), dtype),
        }
    )
    memory.check()
    if case.gate:
        grads["grad_alpha"] = grads["grad_alpha"].sum(1)
    got = {name: out[name] for name in ("out", "strength", "degree")}
    got |= {name: grad for name, grad in grads.items() if grad is not None}

    def leaf(value: float | np.ndarray) -> float | torch.Tensor:
        return value if isinstance(value, float) else torch.from_numpy(value).requires_grad_()

    leaves = {
        "grad_states": leaf(inputs.states),
        "grad_dt": leaf(dt),
        "grad_skip": leaf(skip),
        "grad_alpha": leaf(inputs.coefficient),
    }
    result = reference.evolve(
        leaves["grad_states"],
        leaves["grad_dt"],
        skip=leaves["grad_skip"],
        radius=rule,
        steps=evolution.steps,
        **inputs.options(leaves["grad_alpha"] if case.gate else None),
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
    Evolution(Case(140, row_window=True, layout="planes"), dt=1),
    Evolution(Case(300, batch=1), steps=2, dt=0.02),
]
EVOLUTIONS_BY_SWEEP = [
    Evolution(Case(140, lengths=(0, 140, 33), batch=3, mean=True, base=32), steps=2, dt=2, skip=1),
    Evolution(Case(200, batch=1, base=32, layout="planes"), dt=0.02),
]


# Lengths at the edges of warps, of groups of 64, of chunks and of rounds over the warps of a block.
SEQUENCES = [
    Evolution(Case(2, gate=True)),
    Evolution(Case(31, batch=1), dt=1),
    Evolution(Case(32, gate=True, batch=1), dt=1),
    Evolution(Case(33, causal=False), dt=1),
    Evolution(Case(63, row_window=True), dt=1),
    Evolution(Case(64, mean=True), steps=3, dt=3, skip=3),
    Evolution(Case(65, gate=True, lengths=(65, 64)), steps=3, dt=1),
    Evolution(Case(127, layout="strided", batch=1), dt=1),
    Evolution(Case(129, gate=True, mean=True, batch=1), dt=1),
    Evolution(Case(257, batch=1), dt=0.02),
    Evolution(Case(321, gate=True, causal=False, mean=True, batch=1), dt=1),
    Evolution(Case(515, mean=True, batch=1), steps=2, dt=2, skip=2),
    # Sixteen warps, two rounds and a bit; two segments of rows for the scan.
    Evolution(Case(2100, mean=True, batch=1, gate=True), dt=1),
    Evolution(Case(2100, mean=True, batch=1), dt=1),
]


@pytest.mark.parametrize("evolution", EVOLUTIONS + EVOLUTIONS_BY_SWEEP, ids=str)
def test_evolve_matches_the_reference(emulator, evolution):
    got, truth, _ = run_evolve(emulator, evolution)
    np.testing.assert_array_equal(got.pop("degree"), truth.pop("degree"))
    for name, array in got.items():
        close(name, array, truth[name])


@pytest.mark.parametrize("evolution", EVOLUTIONS + SEQUENCES, ids=str)
def test_one_launch_matches_the_reference(emulator, evolution):
    got, truth, _ = run_evolve(emulator, evolution, launches=(ONE, ONE))
    np.testing.assert_array_equal(got.pop("degree"), truth.pop("degree"))
    for name, array in got.items():
        close(name, array, truth[name])


@pytest.mark.parametrize("evolution", EVOLUTIONS + SEQUENCES[:-2], ids=str)
def test_either_backward_follows_either_forward(emulator, evolution):
    results, _, tape = run_evolve(emulator, evolution)
    for launches in [(ONE, MANY), (MANY, ONE)]:
        got, _, got_tape = run_evolve(emulator, evolution, launches=launches)
        np.testing.assert_allclose(got_tape, tape, rtol=1e-11, atol=1e-13)
        np.testing.assert_array_equal(got.pop("degree"), results["degree"])
        for name, array in got.items():
            close(name, array, results[name], 1e-11)


@pytest.mark.parametrize("launches", [MANY, ONE])
@pytest.mark.parametrize("rows", [60, 515])
def test_evolve_in_float32(emulator, rows, launches):
    """Without hard steps, so that every pair counts in both precisions."""
    evolution = Evolution(Case(rows, gate=True, mean=True, eps=0.5), steps=2, dt=2, skip=1)
    got, truth, _ = run_evolve(emulator, evolution, np.float32, (launches, launches))
    np.testing.assert_array_equal(got.pop("degree"), truth.pop("degree"))
    for name, array in got.items():
        close(name, array, truth[name], 2e-6)


@pytest.mark.parametrize("rows", [140, 515])
def test_one_launch_stays_in_the_error_budget(emulator, rows):
    """The first stage of a step, pair by pair, with thresholds in float32."""
    case = Case(rows, batch=1)
    evolution = Evolution(case, radius=None)
    got, _, tape = run_evolve(emulator, evolution, np.float32, (ONE, ONE))
    x, y = emulator.TAPE_CONTEXT, emulator.TAPE_CONTEXT + 1
    context = np.stack([tape[x, :rows], tape[y, :rows]], -1)[None]
    check_interaction(Inputs.random(case, dtype=np.float32), got | {"context": context})


@pytest.mark.parametrize("launches", [MANY, ONE])
@pytest.mark.parametrize(
    "case",
    [Case(150), Case(150, gate=True, lengths=(150, 70)), Case(515, batch=1, causal=False)],
    ids=str,
)
def test_evolve_repeats_in_any_order(emulator, case, launches):
    evolution = Evolution(case, steps=2, dt=2, skip=1)
    for dtype in (np.float32, np.float64):
        emulator.configure(FORWARD, ALL_BLOCKS)
        first, _, tape = run_evolve(emulator, evolution, dtype, (launches, launches))
        for order, blocks in [(REVERSED, 1), (SHUFFLED, ALL_BLOCKS)]:
            emulator.configure(order, blocks)
            again, _, tape_again = run_evolve(emulator, evolution, dtype, (launches, launches))
            np.testing.assert_array_equal(tape_again, tape)
            for name, array in first.items():
                np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize("spoil", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize(
    "case", [Case(150), Case(150, gate=True), Case(150, lengths=(140, 100))], ids=str
)
def test_one_launch_spreads_what_is_not_finite_alike(emulator, case, spoil):
    evolution = Evolution(case, dt=1)
    wanted, _, _ = run_evolve(emulator, evolution, spoil=spoil)
    got, _, _ = run_evolve(emulator, evolution, launches=(ONE, ONE), spoil=spoil)
    first_row = 7 * case.rows // 10
    assert np.isnan(got["out"][0, first_row]).any()
    assert np.isfinite(got["out"][0, :first_row]).all() and np.isfinite(got["out"][1]).all()
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-11, atol=1e-13, err_msg=name)


def test_many_short_sequences_take_one_launch(emulator):
    def count(case: Case, launches: int = AUTO) -> int:
        emulator.count_launches()
        run_evolve(emulator, Evolution(case, steps=2), launches=(launches, launches))
        return emulator.count_launches()

    # With and without a tape, and once backward; a threshold has a launch of its own.
    one, many, many_gate = 3, 2 * (1 + 2 * 6) + (1 + 2 * 6), 2 * (1 + 2 * 4) + (1 + 2 * 6)
    assert count(Case(3), ONE) == one
    assert count(Case(3), MANY) == many
    assert count(Case(3, batch=128, gate=True)) == one
    assert count(Case(3, batch=127, gate=True)) == many_gate
    emulator.configure(FORWARD, ALL_BLOCKS, 1)
    assert count(Case(3, batch=128, gate=True)) == many_gate
    with pytest.raises(RuntimeError, match="does not fit"):
        count(Case(3), ONE)


def test_empty_batches(emulator):
    for launches in (MANY, ONE):
        run_evolve(emulator, Evolution(Case(5, batch=0)), launches=(launches, launches))
    for case in (Case(5, batch=0), Case(5, keys=3, depth=2, batch=0)):
        inputs = Inputs.random(case)
        out = interact(emulator, inputs)
        interact_backward(emulator, inputs, out["threshold"])


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


# At the edges of groups of 8 tokens, tiles of 32 and 64, chunks of 256; of 128 and 256 threads.
@pytest.mark.parametrize("tokens", [1, 7, 8, 33, 64, 65, 257, 600])
@pytest.mark.parametrize("width", [1, 2, 31, 128, 129, 300])
def test_project_norm(emulator, tokens, width):
    for count in (1, 2, 3, 8) if tokens < 100 else (2, 4):
        # A few outputs agree for some token to many digits, which it then divides by.
        check_project(*run_project(emulator, tokens, count, width), 1e-9 if width <= 3 else 1e-12)


@pytest.mark.parametrize("given", [(), ("bias",), ("scale",), ("shift",)], ids=str)
def test_project_norm_without_some_parameters(emulator, given):
    check_project(*run_project(emulator, 40, 2, 33, given=given), 1e-12)


def test_project_norm_in_float32(emulator):
    for tokens, count, width in [(300, 2, 128), (1000, 2, 33), (70, 8, 64)]:
        check_project(*run_project(emulator, tokens, count, width, np.float32), 2e-5)


def test_project_norm_computes_what_is_wanted(emulator):
    every, _ = run_project(emulator, 300, 3, 20)
    for features, parameters in [(True, False), (False, True)]:
        some, _ = run_project(
            emulator, 300, 3, 20, need_features=features, need_parameters=parameters
        )
        assert len(some) == 1 + features + 4 * parameters
        for name, array in some.items():
            np.testing.assert_array_equal(array, every[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_project_norm_repeats_in_any_order(emulator, dtype):
    for count, width in [(2, 128), (5, 300)]:
        first, _ = run_project(emulator, 600, count, width, dtype)
        for order, blocks in [(REVERSED, 1), (SHUFFLED, 3), (SHUFFLED, ALL_BLOCKS)]:
            emulator.configure(order, blocks)
            again, _ = run_project(emulator, 600, count, width, dtype)
            for name, array in first.items():
                np.testing.assert_array_equal(again[name], array, err_msg=name)
        emulator.configure(FORWARD, ALL_BLOCKS)


def by_pairs(inputs: Inputs) -> Inputs:
    return replace(inputs, case=replace(inputs.case, base=0))


def assert_like_pairs(emulator, inputs: Inputs, dtype: type, rtol: float) -> dict[str, np.ndarray]:
    """A sweep against the kernels that meet every pair: which are kept, what is finite, and how
    much it is. Returns the forward's results."""
    got, wanted = (interact(emulator, i, dtype) for i in (inputs, by_pairs(inputs)))
    np.testing.assert_array_equal(got["threshold"], wanted["threshold"])
    np.testing.assert_array_equal(got["degree"], wanted["degree"])
    gradients = (
        interact_backward(emulator, i, got["threshold"], dtype) for i in (inputs, by_pairs(inputs))
    )
    results = [got, wanted]
    for both in (results, list(gradients)):
        for name in both[0]:
            left, right = (array[name].astype(np.float64) for array in both)
            finite = np.isfinite(right)
            np.testing.assert_array_equal(np.isfinite(left), finite, err_msg=name)
            size = np.abs(right[finite]).max(initial=0)
            error = np.abs(left[finite] - right[finite]).max(initial=0)
            assert error <= rtol * size, f"{name}: error {error:.3g} of {size:.3g}"
    return got


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", SWEEP_STATES)
def test_a_sweep_keeps_what_pairs_keep(emulator, kind, dtype):
    """Whatever the geometry is like, and where scores lie on thresholds."""
    inputs = Inputs.random(Case(260, batch=1, base=32))
    inputs.states[0] = SWEEP_STATES[kind](260).numpy().astype(dtype)
    got = assert_like_pairs(emulator, inputs, dtype, 2e-6 if dtype is np.float32 else 1e-14)
    if kind != "huge" or dtype is np.float64:
        inputs.states = inputs.states.astype(dtype).astype(np.float64)
        check_interaction(inputs, got)


@pytest.mark.parametrize("sigma", [-np.inf, -40.0, 0.0, 40.0, np.inf])
def test_a_sweep_with_thresholds_beyond_every_score(emulator, sigma):
    inputs = Inputs.random(Case(150, batch=1, base=32))
    inputs.coefficient[:] = sigma
    assert_like_pairs(emulator, inputs, np.float64, 1e-14)


@pytest.mark.parametrize(
    "case",
    [
        Case(200, base=32),
        Case(110, depth=3, base=64),
        Case(200, row_window=True, base=32, batch=1),
        Case(40, keys=110, base=64),
        Case(150, causal=False, base=32),
        Case(70, keys=700, depth=2, causal=False, base=64),
    ],
    ids=str,
)
def test_a_sweep_spreads_what_is_not_finite_as_pairs_do(emulator, case):
    clean = Inputs.random(case)
    places = [("states", (0, 0, 0)), ("states", (0, 7 * case.rows // 10, 1)), ("keys", (-1, 60, 0)),
              ("values", (-1, 99, 1)), ("values", (-1, -20, 0)),
              ("grad_context", (0, case.rows - 1, 1)),
              ("grad_strength", (0, case.rows - 1))]  # fmt: skip
    for name, at in places:
        for value in (np.nan, 1e200) if case.depth else (np.nan, np.inf, 1e200):
            array = getattr(clean, name)
            if array is None:
                continue
            dirty = array.copy()
            dirty[at] = value
            assert_like_pairs(emulator, replace(clean, **{name: dirty}), np.float64, 1e-13)


def test_a_sweep_meets_few_pairs(emulator):
    """Blocks of 64 rows that look at single keys, forward and then backward for rows and keys."""
    for case, most in [
        (Case(1024, keys=2048, causal=False, batch=1, base=64), 0.12),
        (Case(1024, batch=1, base=512), 0.4),
    ]:
        inputs = Inputs.random(case)
        rectangles = case.rows * case.num_keys
        if case.causal:
            rectangles = sum(case.rows // 2 * size for size in (512,))
        blocks = rectangles / 64
        emulator.count_picks()
        threshold = interact(emulator, inputs, np.float32)["threshold"]
        assert 0 < emulator.count_picks() / 32 <= most * blocks
        for omit in (("grad_states",), ("grad_keys",)):
            interact_backward(emulator, inputs, threshold, np.float32, omit=omit)
            assert 0 < emulator.count_picks() / 32 <= 1.5 * most * blocks


def test_a_sweep_of_drifting_states(emulator):
    """Prefixes whose ellipses move: less is certain, and as much is kept."""
    inputs = Inputs.random(Case(500, batch=1, base=32))
    inputs.states += np.repeat(np.random.default_rng(1).normal(size=(10, 2)), 50, 0)
    assert_like_pairs(emulator, inputs, np.float64, 1e-14)


def test_the_scratch_of_a_sweep_grows_like_its_sequence(emulator):
    for backward in (False, True):
        for depth in (None, 8):
            sizes = [
                emulator.sweep_bytes(
                    Inputs.random(Case(1, depth=depth)).pair(np.float32, Memory())
                    | {"rows": rows, "key_count": rows, "sweep_base": emulator.SWEEP_BASE},
                    backward,
                )
                for rows in (1 << 14, 1 << 15, 1 << 24)
            ]
            assert sizes[1] < 2.1 * sizes[0] and sizes[2] < 1.05 * 1024 * sizes[0]
            columns = depth or 2
            assert sizes[2] < (1 << 24) * 2 * (100 + 16 * columns)


def test_architectures_are_those_of_the_build(emulator):
    assert emulator.architectures() == "emulated"
