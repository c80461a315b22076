"""Sweeps against the kernels that meet every pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator.harness import (
    Case,
    Inputs,
    Memory,
    check_interaction,
    interact,
    interact_backward,
)
from inputs import SWEEP_STATES


def by_pairs(inputs: Inputs) -> Inputs:
    return replace(inputs, case=replace(inputs.case, base=0))


def assert_like_pairs(emulator, inputs: Inputs, dtype: type, rtol: float) -> dict[str, np.ndarray]:
    """A sweep against the kernels that meet every pair: which are kept, what is finite, and how
    much it is. Returns the forward's results."""
    got, wanted = (interact(emulator, i, dtype) for i in (inputs, by_pairs(inputs)))
    np.testing.assert_array_equal(got["threshold"], wanted["threshold"])
    np.testing.assert_array_equal(got["degree"], wanted["degree"])
    gradients = (interact_backward(emulator, i, got, dtype) for i in (inputs, by_pairs(inputs)))
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
        Case(110, value_dim=3, base=64),
        Case(200, whole_window=True, base=32, batch=1),
        Case(40, keys=110, base=64),
        Case(150, causal=False, base=32),
        Case(70, keys=700, value_dim=2, causal=False, base=64),
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
        for value in (np.nan, 1e200) if case.value_dim else (np.nan, np.inf, 1e200):
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
        out = interact(emulator, inputs, np.float32)
        assert 0 < emulator.count_picks() / 32 <= most * blocks
        for omit in (("grad_states",), ("grad_keys",)):
            interact_backward(emulator, inputs, out, np.float32, omit=omit)
            assert 0 < emulator.count_picks() / 32 <= 1.5 * most * blocks


def test_a_sweep_of_drifting_states(emulator):
    """Prefixes whose ellipses move: less is certain, and as much is kept."""
    inputs = Inputs.random(Case(500, batch=1, base=32))
    inputs.states += np.repeat(np.random.default_rng(1).normal(size=(10, 2)), 50, 0)
    assert_like_pairs(emulator, inputs, np.float64, 1e-14)


def test_the_scratch_of_a_sweep_grows_like_its_sequence(emulator):
    for backward in (False, True):
        for value_dim in (None, 8):
            sizes = [
                emulator.sweep_bytes(
                    Inputs.random(Case(1, value_dim=value_dim)).pair(np.float32, Memory())
                    | {"rows": rows, "key_count": rows, "sweep_base": emulator.SWEEP_BASE},
                    backward,
                )
                for rows in (1 << 14, 1 << 15, 1 << 24)
            ]
            assert sizes[1] < 2.1 * sizes[0] and sizes[2] < 1.05 * 1024 * sizes[0]
            columns = value_dim or 2
            assert sizes[2] < (1 << 24) * 2 * (100 + 16 * columns)
