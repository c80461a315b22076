"""Wide values on tensor cores, which the emulator has with the fewest bits that any is known to
have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from assertions import count_borderline
from emulator.harness import (
    ALL_BLOCKS,
    REVERSED,
    SHUFFLED,
    Case,
    Inputs,
    check_interaction,
    close,
    expected,
    interact,
    interact_backward,
)
from inputs import STATES

CASES = [
    Case(150, value_dim=16),
    Case(150, value_dim=17, causal=False, layout="planes"),
    Case(70, keys=300, value_dim=33, soft=True, layout="strided"),
    Case(130, value_dim=64, mass=True, batch=1),
    Case(1, keys=1, value_dim=16),
    Case(300, keys=5, value_dim=16, mean=True),
    Case(7, keys=0, value_dim=16),
    Case(0, keys=7, value_dim=16, mass=True),
    Case(5, keys=300, value_dim=24, gate=True, eps=0.1, mean=True),
    Case(140, keys=131, value_dim=20, gate=True, eps=0.1, causal=False),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, value_dim=16, soft=True),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, causal=False, value_dim=18, mass=True),
    Case(90, keys=200, value_dim=16, whole_window=True),
    Case(40, batch=(2, 3), value_dim=33, soft=True, layout="heads"),
    Case(33, keys=70, batch=(2, 3), value_dim=16, mass=True, layout="expanded"),
    # Parts of the keys.
    Case(5, keys=1100, value_dim=16, batch=1),
    Case(260, keys=700, value_dim=33, batch=1, mass=True),
]


def float32(case: Case, seed: int = 0) -> Inputs:
    return Inputs.random(case, seed, np.float32)


@pytest.mark.parametrize("divides", [True, False], ids=["parts", "whole"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_wide_values_stay_in_the_error_budget(emulator, case, divides):
    inputs = float32(case)
    emulator.count_products()
    out = interact(emulator, inputs, np.float32, divides=divides)
    assert (emulator.count_products() > 0) == (case.rows > 0 and case.num_keys > 0)
    check_interaction(inputs, out)
    if case.keeps_moments:
        np.testing.assert_array_equal(out["moments"][..., 0], out["degree"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decisions_and_row_sums_are_those_of_the_other_loops(emulator, case):
    inputs = float32(case)
    wide = interact(emulator, inputs, np.float32)
    emulator.set_tensor_cores(False)
    emulator.count_products()
    other = interact(emulator, inputs, np.float32)
    assert emulator.count_products() == 0
    np.testing.assert_array_equal(wide["threshold"], other["threshold"])
    np.testing.assert_array_equal(wide["degree"], other["degree"])
    for name in ("strength", "moments", "context"):
        if name in wide:
            close(name, wide[name], other[name].astype(np.float64), 5e-7)


@pytest.mark.parametrize(
    ("value_dim", "dtype", "products"),
    [(15, np.float32, 0), (16, np.float32, 1), (64, np.float32, 4), (64, np.float64, 0)],
)
def test_which_values_are_wide(emulator, value_dim, dtype, products):
    """One step of 16 keys, 32 rows of a warp; the other warps have none."""
    emulator.count_products()
    interact(emulator, Inputs.random(Case(32, keys=16, value_dim=value_dim, batch=1)), dtype)
    fragments, of_parts, lanes = 2 * 2, 6, 32
    assert emulator.count_products() == products * fragments * of_parts * lanes


def test_values_of_bfloat16_need_half_of_the_products(emulator):
    inputs = float32(Case(40, keys=150, value_dim=32, batch=1))

    def products(inputs: Inputs) -> int:
        emulator.count_products()
        check_interaction(inputs, interact(emulator, inputs, np.float32))
        return emulator.count_products()

    bits = inputs.values.astype(np.float32).view(np.uint32) & 0xFFFF0000
    rounded = replace(inputs, values=bits.view(np.float32).astype(np.float64))
    assert 2 * products(rounded) == products(inputs)


@pytest.mark.parametrize("soft", [False, True])
def test_no_product_of_parts_is_left_out(emulator, soft):
    """The context of a single pair is one product, whose weight is the strength."""
    inputs = float32(Case(200, keys=1, value_dim=40, causal=False, soft=soft))
    inputs.coefficient[:] = -0.7  # keeps it
    out = interact(emulator, inputs, np.float32)
    assert out["degree"].all()
    truth = out["strength"].astype(np.float64)[..., None] * inputs.values
    error = np.abs(out["context"] - truth) / np.abs(truth)
    assert error.max() < 2**-21
    # Neither too large nor too small on average.
    assert np.abs(((out["context"] - truth) / truth).mean()) < 2**-23


def test_errors_do_not_grow_with_the_number_of_keys(emulator):
    def error(keys: int) -> float:
        inputs = float32(Case(2, keys=keys, batch=1, causal=False, value_dim=16))
        inputs.coefficient[:] = -10  # keeps every pair
        inputs.keys += 2
        inputs.states = np.abs(inputs.states)
        inputs.values = np.abs(inputs.values)
        out = interact(emulator, inputs, np.float32, divides=False)
        x, k = (array[0].astype(np.float32) for array in (inputs.states, inputs.keys))
        half = np.float32(0.5)
        weights = (x[:, None, :].astype(np.float64) / 2 * k).sum(-1) + half
        truth = weights @ inputs.values[0]
        return (np.abs(out["context"][0] - truth) / truth).max()

    assert error(1000) < 5e-7
    assert error(60_000) < 5e-7


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("options", [{}, {"soft": True}, {"mass": True}], ids=str)
def test_ties_and_unlike_states(emulator, kind, options):
    inputs = float32(Case(70, batch=1, value_dim=17, causal=False, **options))
    inputs.states[0] = STATES[kind](70).numpy().astype(np.float32)
    wide = interact(emulator, inputs, np.float32)
    check_interaction(inputs, wide)
    emulator.set_tensor_cores(False)
    other = interact(emulator, inputs, np.float32)
    np.testing.assert_array_equal(wide["degree"], other["degree"])


@pytest.mark.parametrize(
    "case",
    [
        Case(150, value_dim=16),
        Case(150, value_dim=33, soft=True),
        Case(150, value_dim=17, mass=True),
        Case(150, value_dim=16, gate=True),
        Case(70, keys=300, value_dim=33),
        Case(150, value_dim=16, lengths=(100, 149)),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_infinity_reach_the_rows_that_see_them_and_no_other(emulator, case, value):
    clean = float32(case)
    before = interact(emulator, clean, np.float32)
    late_row = 6 * case.rows // 10
    for name, at in [("states", (0, late_row, 1)), ("keys", (1, 60, 0)), ("values", (0, 85, 9))]:
        array = getattr(clean, name)
        if array is None:
            continue
        dirty = array.copy()
        dirty[at] = value
        inputs = replace(clean, **{name: dirty})
        after = interact(emulator, inputs, np.float32)
        if not (np.isinf(value) and case.gate and name != "values"):
            # An infinite score has gate 0 and is dropped, which the budget does not know.
            check_interaction(inputs, after)
        touched = ~np.isfinite(after["context"])
        assert touched[at[0]].any() and not touched[1 - at[0]].any()
        if name == "values":
            assert not np.delete(touched, at[-1], -1).any()
        rows = touched.any(-1) if name != "values" else touched[..., at[-1]]
        same = before["context"] == after["context"]
        assert same[~rows].all()
        if name == "values":
            assert np.delete(same, at[-1], -1).all()


SIZES = [3.4028234e38, -3.4e38, 3.39e38, 1e-30, 1e-36, 1e-40, -3e-45]


@pytest.mark.parametrize("size", SIZES)
def test_huge_and_tiny_values(emulator, size):
    """One of them in each tile beside common ones, of which it changes no bit."""
    inputs = float32(Case(20, keys=140, value_dim=18, batch=1))
    inputs.coefficient[:] = -10  # keeps every pair
    inputs.states *= 0.1
    inputs.keys *= 0.1
    before = interact(emulator, inputs, np.float32)
    inputs.values[0, 3:140:128] = 0
    inputs.values[0, 3:140:128, 5] = size
    inputs.values[0, :, 6] = 0
    inputs.values[0, 20, 6] = size
    out = interact(emulator, inputs, np.float32)
    check_interaction(inputs, out)
    check_interaction(inputs, interact(emulator, inputs, np.float32, divides=False))
    weight = (inputs.states[0] / 2) @ inputs.keys[0, 20] + 0.5
    truth = weight * np.float64(np.float32(size))
    error = np.abs(out["context"][0, :, 6] - truth)
    assert (error <= np.abs(truth) * 4e-7 + 2e-45).all()
    others = [*range(5), *range(7, 18)]
    inputs.values[0, 3:140:128] = 0
    inputs.values[0, :, 6] = 1
    again = interact(emulator, inputs, np.float32)
    np.testing.assert_array_equal(again["context"][..., others], out["context"][..., others])
    np.testing.assert_array_equal(before["degree"], out["degree"])


def test_huge_and_tiny_weights(emulator):
    for scale in (1e-12, 1e16):
        inputs = float32(Case(40, keys=90, value_dim=16, gate=False, batch=1, causal=False))
        inputs.coefficient[:] = -10
        inputs.states *= scale
        inputs.keys *= scale
        check_interaction(inputs, interact(emulator, inputs, np.float32))


@pytest.mark.parametrize(
    "case",
    [
        Case(300, batch=2, value_dim=33, soft=True),
        Case(150, keys=600, value_dim=16, batch=1, layout="strided"),
        Case(60, batch=(2, 3), value_dim=17, mass=True, layout="heads"),
        Case(5, keys=1100, value_dim=16, batch=1),
    ],
    ids=str,
)
def test_the_order_of_threads_and_blocks_changes_no_bit(emulator, case):
    inputs = float32(case)

    def everything() -> list[bytes]:
        results = [interact(emulator, inputs, np.float32, divides=n) for n in (True, False)]
        return [array.tobytes() for result in results for array in result.values()]

    first = everything()
    for order, blocks in [(REVERSED, ALL_BLOCKS), (SHUFFLED, 2)]:
        emulator.configure(order, blocks)
        assert everything() == first


@pytest.mark.parametrize("divided", [Case(5, keys=1100, value_dim=16, batch=1), CASES[-1]], ids=str)
def test_parts_are_added_up_by_a_second_kernel(emulator, divided):
    def launches(case: Case) -> int:
        emulator.count_launches()
        interact(emulator, float32(case), np.float32)
        return emulator.count_launches()

    assert launches(divided) == launches(replace(divided, keys=100)) + 1


def test_padding_is_never_read(emulator):
    case = Case(150, value_dim=17, batch=3, lengths=(0, 149, 70), mean=True)
    clean, dirty = float32(case), float32(case)
    padding = np.arange(case.rows) >= np.array(case.lengths)[:, None]
    for name in ("states", "values"):
        getattr(dirty, name)[padding] = np.nan
    wanted = interact(emulator, clean, np.float32)
    for name, got in interact(emulator, dirty, np.float32).items():
        np.testing.assert_array_equal(got, wanted[name], err_msg=name)
        assert not got[padding].any(), name


def test_results_that_are_not_wanted(emulator):
    inputs = float32(Case(60, value_dim=16))
    full = interact(emulator, inputs, np.float32)
    for omit in [("degree",), ("strength",), ("strength", "degree")]:
        part = interact(emulator, inputs, np.float32, omit=omit)
        for name in set(full) - set(omit):
            np.testing.assert_array_equal(part[name], full[name])


def without_borderline_pairs(case: Case) -> Inputs:
    def borderline(inputs: Inputs) -> int:
        options = inputs.options()
        del options["reduction"]
        states, keys = (
            None if array is None else torch.from_numpy(array)
            for array in (inputs.states, inputs.keys)
        )
        return count_borderline(states, keys, delta=1e-5, **options)

    candidates = (float32(case, seed) for seed in range(100))
    return next(inputs for inputs in candidates if borderline(inputs) == 0)


@pytest.mark.parametrize("divides", [True, False], ids=["parts", "whole"])
@pytest.mark.parametrize(
    "case",
    [
        Case(150, value_dim=16, batch=1),
        Case(130, value_dim=17, batch=1, causal=False, mean=True, layout="planes"),
        Case(70, keys=300, value_dim=33, batch=1, soft=True, layout="strided"),
        Case(100, value_dim=64, mass=True, batch=1),
        Case(5, keys=300, value_dim=24, batch=1, gate=True, eps=0.1),
        Case(40, lengths=(0, 1, 40), batch=3, value_dim=16, soft=True),
        Case(33, keys=70, batch=(1, 2), value_dim=40, mass=True, layout="heads"),
    ],
    ids=str,
)
def test_gradients(emulator, case, divides):
    inputs = without_borderline_pairs(case)
    truth = expected(inputs)
    out = interact(emulator, inputs, np.float32)
    emulator.count_products()
    grads = interact_backward(emulator, inputs, out, np.float32, divides=divides)
    assert emulator.count_products() > 0
    if case.has_coefficient_vjp:
        grads["grad_coefficient"] = grads["grad_coefficient"].sum(-1)
    if inputs.keys is None:
        del grads["grad_keys"]
    for name, grad in grads.items():
        close(name, grad, truth[name], 4e-6)


@pytest.mark.parametrize("size", [1.2345678, 3.4028234e38, 1e-40])
@pytest.mark.parametrize("of", ["values", "grad_context"])
def test_no_product_of_a_gradient_is_left_out(emulator, of, size):
    """The gradient of one weight is a sum of a few products, each of numbers of any size."""
    inputs = float32(Case(100, keys=1, value_dim=16, causal=False, batch=1))
    inputs.coefficient[:] = -0.7  # keeps it
    inputs.keys[...] = 1
    inputs.grad_strength[...] = 0
    inputs.grad_context[..., 1:] = 0
    rounded = np.clip(inputs.values * 0.1, -0.9, 0.9) if size > 2 else inputs.values
    inputs.values[...] = rounded
    if of == "values":
        inputs.values[0, 0, 0] = size
        inputs.grad_context *= 1e-3
    else:
        inputs.grad_context[..., 0] = size
    inputs = replace(
        inputs,
        values=inputs.values.astype(np.float32).astype(np.float64),
        grad_context=inputs.grad_context.astype(np.float32).astype(np.float64),
    )
    out = interact(emulator, inputs, np.float32)
    with np.errstate(over="ignore"):
        grads = interact_backward(emulator, inputs, out, np.float32, omit=("grad_values",))
    truth = inputs.grad_context[0, :, 0] * inputs.values[0, 0, 0] / 2
    error = np.abs(grads["grad_states"][0, :, 0] - truth)
    assert (error <= 2**-21 * np.abs(truth) + 3e-45).all()


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_gradients_of_rows_that_drop_a_value_stay_finite(emulator, value):
    inputs = float32(Case(150, value_dim=33, batch=1))
    out = interact(emulator, inputs, np.float32)
    dirty = inputs.values.copy()
    dirty[0, 85, 9] = value
    grads = interact_backward(emulator, replace(inputs, values=dirty), out, np.float32)
    score = (inputs.states[0] @ inputs.states[0, 85] + 1) / 2
    keeps = (score >= out["threshold"][0]) & (np.arange(150) >= 85)
    lost = ~np.isfinite(grads["grad_states"][0]).all(-1)
    # Key 85 has all that its rows pass to it.
    lost[85] = keeps[85]
    np.testing.assert_array_equal(lost, keeps)
