"""`interact` and its gradients in the emulator, pair by pair and by sweep."""

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
    Case(0, keys=7, value_dim=3),
    Case(7, keys=0),
    Case(7, keys=0, value_dim=2, gate=True, causal=False),
    Case(5, keys=300),
    Case(5, keys=1100, value_dim=3, gate=True),
    Case(300, keys=5),
    Case(300, keys=5, value_dim=2, causal=False),
    Case(140, keys=141, value_dim=1, gate=True, layout="strided"),
    Case(131, keys=530, value_dim=8, layout="planes"),
    Case(530, keys=131, value_dim=3, layout="strided"),
    Case(70, value_dim=33),
    Case(70, value_dim=33, gate=True, mean=True),
    Case(260, value_dim=8, gate=True),
    # Tiles of 1024 keys on the fast path, of 512 on the general one; segments of 1024 rows.
    Case(1027, batch=1),
    Case(1040, value_dim=5, batch=1, causal=False),
    # Blocks enough that warps need not split what they meet, although it is longer than a chunk.
    Case(1, keys=300, batch=264, gate=True),
]
OPTIONS = [
    Case(150, causal=False),
    Case(1, soft=True),
    Case(263, soft=True),
    Case(150, soft=True, value_dim=5, causal=False, layout="planes"),
    Case(140, keys=300, soft=True, whole_window=True, mean=True, layout="strided"),
    Case(300, keys=140, soft=True, value_dim=33),
    Case(150, soft=True, lengths=(0, 1, 77, 150, 149), batch=5, value_dim=3),
    Case(150, causal=False, gate=True, mean=True),
    Case(150, whole_window=True),
    Case(1030, whole_window=True, mean=True, batch=1),
    Case(90, keys=200, value_dim=3, whole_window=True),
    Case(150, mean=True),
    Case(150, mean=True, gate=True),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, gate=True, mean=True),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, causal=False, value_dim=3),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, whole_window=True),
    Case(600, lengths=(600, 300), value_dim=2, gate=True, causal=False),
]


# Weights that sum to one.
MASSES = [
    Case(0, mass=True),
    Case(1, mass=True),
    Case(2, mass=True),
    Case(129, mass=True, layout="strided"),
    Case(263, mass=True),
    Case(150, mass=True, value_dim=5, causal=False, layout="planes"),
    Case(140, keys=300, mass=True, layout="strided"),
    Case(300, keys=140, mass=True, value_dim=33),
    Case(7, keys=0, value_dim=2, mass=True),
    Case(5, keys=1100, value_dim=3, mass=True),
    Case(150, mass=True, lengths=(0, 1, 77, 150, 149), batch=5, value_dim=3),
    Case(600, mass=True, lengths=(600, 300), causal=False),
    # More than a tile of keys, and more rows than a block that is not split has.
    Case(1100, keys=1300, mass=True, batch=1, value_dim=2),
    Case(1, keys=300, batch=264, mass=True),
    Case(40, batch=(2, 3), mass=True, value_dim=5, layout="heads"),
    Case(33, keys=70, batch=(2, 3), value_dim=3, mass=True, layout="expanded"),
]
# Two batch dimensions that no single stride steps through.
BATCHES = [
    Case(40, batch=(2, 3), layout="heads"),
    Case(40, batch=(3, 2), gate=True, mean=True, layout="heads"),
    Case(40, batch=(2, 3), value_dim=5, soft=True, layout="heads"),
    Case(33, keys=70, batch=(2, 3), value_dim=3, layout="expanded"),
    Case(33, keys=70, batch=(2, 3), value_dim=3, soft=True, mean=True, layout="expanded"),
    Case(70, keys=33, batch=(2, 2), gate=True, causal=False, layout="expanded"),
    Case(40, batch=(3, 2), lengths=(7, 40, 0, 1, 39, 20), layout="planes"),
    Case(40, batch=(3, 2), lengths=(7, 40, 0, 1, 39, 20), value_dim=9, soft=True, layout="strided"),
    Case(40, batch=(2, 2), lengths=(40, 40, 11, 11), keys=40, whole_window=True, layout="expanded"),
    Case(1, batch=(11, 13), keys=300, gate=True, layout="heads"),
    Case(100, batch=(2, 3), base=32, layout="heads"),
    Case(60, keys=90, batch=(2, 3), value_dim=3, base=32, layout="expanded"),
]
# By sweep, with base blocks so small that short sequences have several levels.
SWEEPS = [
    Case(1, base=32),
    Case(33, base=32, layout="planes"),
    Case(64, base=64),
    Case(257, base=32),
    Case(300, base=32, lengths=(300, 77)),
    Case(150, base=32, lengths=(0, 1, 77, 150, 149), batch=5, mean=True, whole_window=True),
    Case(150, causal=False, lengths=(0, 1, 77, 150, 149), batch=5, value_dim=3, base=32),
    Case(140, value_dim=11, base=32, batch=1, layout="strided"),
    Case(0, keys=7, value_dim=3, base=32),
    Case(7, keys=0, base=32),
    Case(5, keys=300, base=64),
    Case(300, keys=5, value_dim=2, base=64),
    Case(150, keys=530, value_dim=3, base=64, batch=1),
    Case(530, keys=150, base=64, batch=1, layout="planes"),
    Case(530, keys=150, causal=False, mean=True, batch=1, base=64),
    # Several super-blocks, and more keys than a list holds.
    Case(2300, causal=False, batch=1, base=64),
    Case(1100, keys=1300, causal=False, batch=1, base=64, value_dim=2),
    # Not this score.
    Case(150, soft=True, batch=1, base=32),
]


@pytest.mark.parametrize("case", EDGES + SHAPES + OPTIONS + MASSES + BATCHES + SWEEPS, ids=str)
def test_interact_matches_the_reference(emulator, case):
    inputs = Inputs.random(case)
    truth = expected(inputs)
    out = interact(emulator, inputs)
    close("context", out["context"], truth["context"])
    close("strength", out["strength"], truth["strength"])
    np.testing.assert_array_equal(out["degree"], truth["degree"])
    assert out["threshold"].any() != case.gate or not truth["degree"].any()
    if case.keeps_moments:
        np.testing.assert_array_equal(out["moments"][..., 0], truth["degree"])

    grads = interact_backward(emulator, inputs, out)
    if case.has_coefficient_vjp:
        grads["grad_coefficient"] = grads["grad_coefficient"].sum(-1)
    if inputs.keys is None:
        del grads["grad_keys"]
    for name, grad in grads.items():
        close(name, grad, truth[name])


FLOAT32 = [
    Case(200, batch=1),
    Case(200, batch=1, value_dim=9),
    Case(90, keys=300, batch=1, value_dim=3, whole_window=True, layout="strided"),
    Case(200, batch=1, soft=True),
    Case(90, keys=300, batch=1, value_dim=3, soft=True),
    Case(200, batch=1, gate=True, eps=0.1, mean=True),
    Case(200, batch=1, gate=True, eps=0.1, value_dim=5),
    Case(200, batch=1, mass=True),
    Case(90, keys=300, batch=1, value_dim=3, mass=True),
]


@pytest.mark.parametrize("case", [*FLOAT32, Case(1100, batch=1), Case(530, value_dim=3)], ids=str)
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
    out = interact(emulator, inputs, np.float32)
    grads = interact_backward(emulator, inputs, out, np.float32)
    if case.has_coefficient_vjp:
        grads["grad_coefficient"] = grads["grad_coefficient"].sum(-1)
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", STATES)
def test_masses_of_unlike_states(emulator, kind, dtype):
    torch.manual_seed(0)
    inputs = Inputs.random(Case(70, batch=1, mass=True, causal=False), dtype=dtype)
    inputs.states[0] = STATES[kind](70).numpy().astype(dtype)
    check_interaction(inputs, interact(emulator, inputs, dtype))


def test_masses_of_ordered_keys(emulator):
    """Most chunks of them soon have no pair left, each for other rows of a warp."""
    inputs = Inputs.random(Case(64, keys=6000, batch=1, causal=False, mass=True))
    inputs.keys = np.sort(inputs.keys, 1)
    inputs.states *= np.linspace(0.05, 4, 64)[:, None]
    out, truth = interact(emulator, inputs), expected(inputs)
    close("context", out["context"], truth["context"])
    np.testing.assert_array_equal(out["degree"], truth["degree"])


@pytest.mark.parametrize("value_dim", [None, 1])
def test_rounding_of_a_mass_does_not_add_up(emulator, value_dim):
    """Many equal weights share what tau loses; their sum is one all the same."""
    case = Case(3, keys=20_000, value_dim=value_dim, batch=1, causal=False, mass=True)
    inputs = Inputs.random(case, dtype=np.float32)
    inputs.keys[...] = inputs.keys[:, :1]
    inputs.states += 4
    if value_dim:
        inputs.values[...] = 1
    out = interact(emulator, inputs, np.float32)
    np.testing.assert_allclose(out["context" if value_dim else "strength"], 1, rtol=1e-5)
    np.testing.assert_array_equal(out["degree"], 20_000)


ORDERS = [
    Case(300, batch=3),
    Case(300, batch=3, gate=True, layout="planes"),
    Case(300, batch=3, soft=True, value_dim=3),
    Case(1100, batch=1, soft=True),
    Case(60, batch=(2, 3), soft=True, layout="heads"),
    Case(300, batch=3, mass=True, value_dim=3),
    Case(1100, batch=1, mass=True),
    Case(1100, batch=1, whole_window=True),
    Case(150, keys=600, value_dim=11, layout="strided"),
    Case(150, keys=300, value_dim=3, gate=True, causal=False),
    Case(200, base=32, batch=3),
    Case(100, keys=140, value_dim=11, batch=1, base=32, layout="strided"),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(emulator, case, dtype):
    inputs = Inputs.random(case)

    def everything() -> list[bytes]:
        out = interact(emulator, inputs, dtype)
        grads = interact_backward(emulator, inputs, out, dtype)
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
        Case(140, whole_window=True),
        Case(140, gate=True),
        Case(140, value_dim=3),
        Case(140, value_dim=3, gate=True),
        Case(70, keys=300, value_dim=3),
        Case(300, keys=140),
        Case(140, causal=False),
        Case(140, value_dim=3, lengths=(100, 139)),
        Case(140, mass=True),
        Case(70, keys=300, value_dim=3, mass=True),
        Case(140, mass=True, causal=False, lengths=(100, 139)),
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
        Case(150, soft=True),
        Case(150, value_dim=3),
        Case(150, value_dim=3, gate=True, causal=False),
        Case(150, whole_window=True),
        Case(150, causal=False),
        Case(150, base=32),
        Case(150, value_dim=3, causal=False, base=32),
        Case(150, mass=True),
        Case(150, value_dim=3, causal=False, mass=True),
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
        return out | interact_backward(emulator, inputs, out)

    for (name, wanted), got in zip(
        everything(clean).items(), everything(dirty).values(), strict=True
    ):
        np.testing.assert_array_equal(got, wanted, err_msg=name)
        assert not got[padding].any(), name


def test_lengths_beyond_the_tensor_are_clamped(emulator):
    clamped = Inputs.random(Case(40, value_dim=3, lengths=(0, 40), causal=False))
    beyond = replace(clamped, lengths=np.array([-3, 1000]))
    for got, wanted in zip(
        interact(emulator, beyond).values(), interact(emulator, clamped).values(), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "case",
    [
        Case(200),
        Case(200, gate=True),
        Case(60, value_dim=3),
        Case(150, base=32),
        Case(200, mass=True),
    ],
    ids=str,
)
def test_results_that_are_not_wanted(emulator, case):
    inputs = Inputs.random(case)
    full = interact(emulator, inputs)
    for omit in [("degree",), ("strength",), ("strength", "degree")]:
        part = interact(emulator, inputs, omit=omit)
        for name in set(full) - set(omit):
            np.testing.assert_array_equal(part[name], full[name])


def kept_sums(inputs: Inputs, threshold: np.ndarray) -> np.ndarray:
    """Of x, y, xx, xy and yy over the keys that each row keeps."""
    case, keys = inputs.case, inputs.states if inputs.keys is None else inputs.keys
    row, key = np.arange(case.rows)[:, None], np.arange(case.num_keys)
    visible = (key <= row + case.num_keys - case.rows) | (not case.causal)
    if inputs.lengths is not None:
        length = inputs.lengths[..., None, None]
        visible = visible & (row < length) & (key < length)
    score = (inputs.states @ keys.swapaxes(-1, -2) + 1) / 2
    x, y = keys[..., 0], keys[..., 1]
    powers = np.stack([x, y, x * x, x * y, y * y], -1)
    return (visible & (score >= threshold[..., None])) @ powers


@pytest.mark.parametrize(
    "case",
    [
        Case(0),
        Case(1),
        Case(150),
        Case(150, lengths=(150, 33), mean=True, whole_window=True),
        Case(60, keys=90, causal=False, layout="strided"),
        Case(90, keys=60, batch=(2, 3), layout="heads"),
        Case(40, batch=(2, 3), layout="expanded"),
        Case(2500, batch=1),
    ],
    ids=str,
)
def test_rows_that_keep_sums_need_no_pairs_backward(emulator, case):
    inputs = Inputs.random(case)
    out, plain = interact(emulator, inputs), interact(emulator, inputs, omit=("moments",))
    for name in ("context", "strength", "degree", "threshold"):
        np.testing.assert_array_equal(out[name], plain[name], err_msg=name)
    close("moments", out["moments"], kept_sums(inputs, out["threshold"]))
    grads, by_pairs = (interact_backward(emulator, inputs, of) for of in (out, plain))
    for name, grad in grads.items():
        close(name, grad, by_pairs[name], 1e-12)
    # All that rows have comes from there; keys that are the states add their own.
    out["moments"][...] = 0
    without = interact_backward(emulator, inputs, out)
    if inputs.keys is not None:
        assert not without["grad_states"].any()
        np.testing.assert_array_equal(without["grad_keys"], grads["grad_keys"])
    elif case.rows > 1:
        assert (without["grad_states"] != grads["grad_states"]).any()


def test_float32_gradients_from_sums_are_those_from_pairs(emulator):
    """Where upstream gradients cancel over keys far from the origin, to the size of their terms."""
    case = Case(40, keys=3000, batch=1, causal=False)
    inputs = Inputs.random(case, dtype=np.float32)
    inputs.keys = (inputs.keys + np.array([60.0, -40.0])).astype(np.float32).astype(np.float64)
    toward = inputs.grad_context
    inputs.grad_strength = -(toward @ np.array([60.0, -40.0])).astype(np.float32).astype(np.float64)
    out = interact(emulator, inputs, np.float32)
    by_sums = interact_backward(emulator, inputs, out, np.float32)["grad_states"]
    by_pairs = interact_backward(emulator, inputs, out | {"moments": None}, np.float32)
    terms = np.abs(inputs.grad_strength) * np.linalg.norm(inputs.keys, axis=-1).sum(-1)
    error = np.abs(by_sums.astype(np.float64) - by_pairs["grad_states"])
    assert (error <= 1e-6 * terms[..., None]).all()


@pytest.mark.parametrize(
    "case",
    [
        Case(90, keys=140, value_dim=9, gate=True),
        Case(90, keys=140, value_dim=9, base=32),
        Case(90, keys=140, value_dim=9, mass=True),
    ],
    ids=str,
)
def test_gradients_that_are_not_wanted(emulator, case):
    inputs = Inputs.random(case)
    out = interact(emulator, inputs)
    full = interact_backward(emulator, inputs, out)
    for omit in [
        ("grad_states",),
        ("grad_states", "grad_coefficient"),
        ("grad_keys",),
        ("grad_values",),
        ("grad_keys", "grad_values"),
    ]:
        part = interact_backward(emulator, inputs, out, omit=omit)
        for name in set(full) - set(omit):
            np.testing.assert_array_equal(part[name], full[name], err_msg=name)
    silent = replace(inputs, grad_strength=np.zeros_like(inputs.grad_strength))
    wanted = interact_backward(emulator, silent, out)
    got = interact_backward(emulator, inputs, out, omit=("grad_strength",))
    for name, grad in wanted.items():
        np.testing.assert_array_equal(got[name], grad, err_msg=name)


@pytest.mark.parametrize(
    "case",
    [
        Case(150),
        Case(150, gate=True),
        Case(150, soft=True),
        Case(60, keys=90, value_dim=3, gate=True),
        Case(150, base=32),
        Case(150, mass=True),
        Case(60, keys=90, value_dim=3, mass=True),
    ],
    ids=str,
)
def test_accumulate_adds_to_the_gradients_of_states(emulator, case):
    inputs = Inputs.random(case)
    out = interact(emulator, inputs)
    written = interact_backward(emulator, inputs, out)
    added = interact_backward(emulator, inputs, out, before=3.0)
    for name, grad in written.items():
        start = 3.0 if name in ("grad_states", "grad_coefficient") else 0.0
        if name == "grad_keys" and inputs.keys is None:
            start = 3.0
        close(name, added[name], grad + start, 1e-13)
