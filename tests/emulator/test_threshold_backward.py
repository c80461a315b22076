"""What the gradient of tau gives to states, keys and sigma, in the emulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from emulator.harness import (
    ALL_BLOCKS,
    REVERSED,
    SHUFFLED,
    Case,
    Inputs,
    Memory,
    close,
    window_grads,
)


def run(
    emulator,
    inputs: Inputs,
    dtype: type = np.float64,
    before: float = 0.0,
    omit: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """The launcher on guarded memory, adding to gradients of the value `before`; the gradient of
    tau is `grad_strength`."""
    case, memory = inputs.case, Memory()
    call = inputs.pair(dtype, memory)

    def gradient(*shape: int) -> np.ndarray:
        array = memory.array((*case.batch_shape, *shape), dtype, case.layout)
        array[...] = before
        return array

    out = {"grad_states": gradient(case.rows, 2), "grad_coefficient": gradient(case.rows)}
    out["grad_keys"] = out["grad_states"] if case.keys is None else gradient(case.num_keys, 2)
    given = {
        "grad_threshold": memory.copy(inputs.grad_strength.astype(dtype), case.layout),
        "window_grads": window_grads(emulator, case, memory),
    }
    emulator.threshold_backward(call | out | given | dict.fromkeys(omit))
    memory.check()
    if case.keys is None:
        del out["grad_keys"]
    return {name: array for name, array in out.items() if name not in omit}


def expected(inputs: Inputs) -> dict[str, np.ndarray]:
    """The same by autograd, from scores of every pair in float64."""
    case = inputs.case
    states, keys, sigma = (
        None if array is None else torch.from_numpy(array.copy()).requires_grad_()
        for array in (inputs.states, inputs.keys, inputs.coefficient[..., None])
    )
    sigma = sigma.detach().repeat_interleave(case.rows, -1).requires_grad_()  # one for each row
    points = states if keys is None else keys
    row, key = torch.arange(case.rows)[:, None], torch.arange(case.num_keys)
    valid = torch.ones(*case.batch_shape, case.rows, case.num_keys, dtype=torch.bool)
    if inputs.lengths is not None:
        length = torch.from_numpy(inputs.lengths)[..., None, None]
        valid = (row < length) & (key < length)
    visible = valid
    if case.causal:
        visible = valid & (key <= row + case.num_keys - case.rows)
    window = (valid if case.whole_window else visible).double()
    count = window.sum(-1).clamp(min=1)
    scores = (states @ points.mT + 1) / 2
    mean = (scores * window).sum(-1) / count
    variance = ((scores - mean[..., None]) ** 2 * window).sum(-1) / count
    tau = mean + sigma * torch.sqrt(variance + inputs.eps)
    (tau * torch.from_numpy(inputs.grad_strength) * visible.any(-1)).sum().backward()
    leaves = {"grad_states": states, "grad_keys": keys, "grad_coefficient": sigma}
    return {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf is not None}


def check(got: dict[str, np.ndarray], truth: dict[str, np.ndarray], rtol: float) -> None:
    for name, array in got.items():
        close(name, array, truth[name], rtol)


# A block has a segment of 1024 rows or keys.
CASES = [
    Case(1),
    Case(2),
    Case(33, layout="planes"),
    Case(300, layout="strided"),
    Case(300, causal=False),
    Case(300, whole_window=True),
    Case(1024, batch=1),
    Case(1025, batch=1, whole_window=True),
    Case(2100, batch=1),
    Case(0, keys=7),
    Case(7, keys=0),
    Case(7, keys=40),
    Case(40, keys=7),
    Case(40, keys=7, whole_window=True),
    Case(3, keys=1100, causal=False),
    Case(1100, keys=3, batch=1),
    Case(1500, keys=2100, batch=1),
    Case(2100, keys=1500, batch=1),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5),
    Case(150, keys=150, lengths=(0, 1, 77, 150, 149), batch=5, causal=False),
    Case(150, lengths=(0, 1, 77, 150, 149), batch=5, whole_window=True),
    Case(2100, lengths=(2100, 1030)),
    Case(40, batch=(2, 3), layout="heads"),
    Case(40, keys=70, batch=(2, 3), layout="expanded"),
    Case(40, batch=(3, 2), lengths=(7, 40, 0, 1, 39, 20), layout="strided"),
]
CASES = [replace(case, soft=True) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threshold_backward_matches_autograd(emulator, case):
    inputs = Inputs.random(case)
    check(run(emulator, inputs), expected(inputs), 1e-12)


@pytest.mark.parametrize(
    "case", [Case(1, soft=True), Case(300, soft=True), Case(40, keys=1500, soft=True)], ids=str
)
def test_float32_rounds_only_results(emulator, case):
    inputs = Inputs.random(case, dtype=np.float32)
    check(run(emulator, inputs, np.float32), expected(inputs), 2e-7)


@pytest.mark.parametrize("case", [Case(40, soft=True), Case(40, keys=70, soft=True)], ids=str)
def test_it_adds_to_what_is_there(emulator, case):
    inputs = Inputs.random(case)
    for name, added in run(emulator, inputs, before=3.0).items():
        close(name, added, run(emulator, inputs)[name] + 3.0, 1e-14)


def test_a_gradient_of_sigma_that_is_not_wanted(emulator):
    inputs = Inputs.random(Case(40, keys=70, soft=True))
    full = run(emulator, inputs)
    part = run(emulator, inputs, omit=("grad_coefficient",))
    assert set(part) == {"grad_states", "grad_keys"}
    for name, array in part.items():
        np.testing.assert_array_equal(array, full[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "case",
    [
        Case(1100, soft=True),
        Case(1100, soft=True, whole_window=True),
        Case(1200, soft=True, lengths=(1200, 500)),
    ],
    ids=str,
)
def test_sums_have_one_order(emulator, case, dtype):
    inputs = Inputs.random(case)
    first = run(emulator, inputs, dtype)
    assert all(np.isfinite(array).all() for array in first.values())
    for order, blocks in [(REVERSED, ALL_BLOCKS), (SHUFFLED, ALL_BLOCKS), (REVERSED, 2)]:
        emulator.configure(order, blocks)
        for name, array in run(emulator, inputs, dtype).items():
            np.testing.assert_array_equal(array, first[name], err_msg=name)


def test_a_sequence_sums_alike_in_any_batch(emulator):
    inputs = Inputs.random(Case(1100, keys=1200, soft=True))
    together = run(emulator, inputs)
    for n in range(2):
        alone = {
            name: array[n : n + 1]
            for name, array in vars(inputs).items()
            if isinstance(array, np.ndarray)
        }
        case = replace(inputs.case, batch=1)
        for name, array in run(emulator, replace(inputs, case=case, **alone)).items():
            np.testing.assert_array_equal(array[0], together[name][n], err_msg=name)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("rows", [140, 1100])
def test_what_is_not_finite_reaches_what_has_to_do_with_it(emulator, rows, value):
    clean = Inputs.random(Case(rows, keys=rows, soft=True))
    before = run(emulator, clean)
    assert all(np.isfinite(array).all() for array in before.values())
    late = 7 * rows // 10

    dirty = replace(clean, keys=clean.keys.copy())
    dirty.keys[0, late, 1] = value
    after = run(emulator, dirty)
    assert not np.isfinite(after["grad_states"][0, late:]).all(-1).any()
    for name in ("grad_states", "grad_coefficient"):  # of rows that do not see the key
        np.testing.assert_array_equal(after[name][0, :late], before[name][0, :late])

    dirty = replace(clean, grad_strength=clean.grad_strength.copy())
    dirty.grad_strength[0, late] = value
    after = run(emulator, dirty)
    assert not np.isfinite(after["grad_states"][0, late]).any()
    assert not np.isfinite(after["grad_keys"][0, : late + 1]).any()  # the keys of its window
    np.testing.assert_array_equal(
        after["grad_keys"][0, late + 1 :], before["grad_keys"][0, late + 1 :]
    )
    for name in before:
        np.testing.assert_array_equal(after[name][1], before[name][1])
