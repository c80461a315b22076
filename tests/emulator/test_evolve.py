"""`evolve` and its gradients in the emulator, by a launch for each pass and by one for all."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.harness import (
    ALL_BLOCKS,
    AUTO,
    EVOLUTIONS,
    FORWARD,
    MANY,
    ONE,
    REVERSED,
    SHUFFLED,
    Case,
    Evolution,
    Inputs,
    by,
    check_interaction,
    close,
    run_evolve,
)

EVOLUTIONS_BY_SWEEP = [
    Evolution(Case(140, lengths=(0, 140, 33), batch=3, mean=True, base=32), steps=2, dt=2, skip=1),
    Evolution(Case(200, batch=1, base=32, layout="planes"), dt=0.02),
    Evolution(Case(100, batch=1, base=32, soft=True), dt=0.02),
]
SOFT = [
    Evolution(Case(1, soft=True)),
    Evolution(Case(40, soft=True), steps=2, dt=2, skip=2),
    Evolution(Case(140, soft=True, lengths=(0, 140, 33), batch=3, mean=True), steps=2, dt=1),
    Evolution(Case(65, soft=True, causal=False), dt=1, skip=1, radius=None),
    Evolution(Case(70, soft=True, whole_window=True, layout="planes"), dt=1),
    # More than one segment of rows for the scan.
    Evolution(Case(1100, soft=True, mean=True, batch=1), dt=1),
]
# Not in one launch.
MASSES = [
    Evolution(Case(1, mass=True)),
    Evolution(Case(40, mass=True), steps=2, dt=2, skip=2),
    Evolution(Case(140, mass=True, lengths=(0, 140, 33), batch=3), steps=2, dt=1),
    Evolution(Case(65, mass=True, causal=False), dt=1, skip=1, radius=None),
    Evolution(Case(33, batch=(3, 2), mass=True, layout="expanded"), dt=1, skip=1),
]
BATCHES = [
    Evolution(Case(40, batch=(2, 3), layout="heads"), steps=2, dt=2, skip=1),
    Evolution(Case(40, batch=(2, 3), soft=True, layout="heads"), steps=2, dt=1, skip=2),
    Evolution(Case(33, batch=(3, 2), gate=True, layout="expanded"), steps=2, dt=2, skip=2),
    Evolution(Case(33, batch=(3, 2), soft=True, layout="expanded"), dt=1, skip=1),
    Evolution(Case(33, batch=(2, 2), lengths=(33, 0, 7, 32), layout="strided"), dt=1),
]


# Lengths at the edges of warps, of groups of 64, of chunks and of rounds over the warps of a block.
SEQUENCES = [
    Evolution(Case(2, gate=True)),
    Evolution(Case(31, batch=1), dt=1),
    Evolution(Case(32, gate=True, batch=1), dt=1),
    Evolution(Case(33, causal=False), dt=1),
    Evolution(Case(63, whole_window=True), dt=1),
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


@pytest.mark.parametrize(
    "evolution", EVOLUTIONS + EVOLUTIONS_BY_SWEEP + SOFT + MASSES + BATCHES, ids=str
)
def test_evolve_matches_the_reference(emulator, evolution):
    got, truth, _ = run_evolve(emulator, evolution)
    np.testing.assert_array_equal(got.pop("degree"), truth.pop("degree"))
    for name, array in got.items():
        close(name, array, truth[name])


@pytest.mark.parametrize("evolution", EVOLUTIONS + SEQUENCES + SOFT + BATCHES, ids=str)
def test_one_launch_matches_the_reference(emulator, evolution):
    got, truth, _ = run_evolve(emulator, evolution, launches=by(ONE, evolution))
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
    context = np.stack([tape[x], tape[y]], -1)
    check_interaction(Inputs.random(case, dtype=np.float32), got | {"context": context})


@pytest.mark.parametrize("launches", [MANY, ONE])
@pytest.mark.parametrize(
    "case",
    [
        Case(150),
        Case(150, gate=True, lengths=(150, 70)),
        Case(515, batch=1, causal=False),
        Case(150, soft=True, lengths=(150, 70)),
    ],
    ids=str,
)
def test_evolve_repeats_in_any_order(emulator, case, launches):
    evolution = Evolution(case, steps=2, dt=2, skip=1)
    for dtype in (np.float32, np.float64):
        emulator.configure(FORWARD, ALL_BLOCKS)
        first, _, tape = run_evolve(emulator, evolution, dtype, by(launches, evolution))
        for order, blocks in [(REVERSED, 1), (SHUFFLED, ALL_BLOCKS)]:
            emulator.configure(order, blocks)
            again, _, tape_again = run_evolve(emulator, evolution, dtype, by(launches, evolution))
            np.testing.assert_array_equal(tape_again, tape)
            for name, array in first.items():
                np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize("spoil", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(150), Case(150, gate=True), Case(150, lengths=(140, 100)), Case(150, soft=True)],
    ids=str,
)
def test_one_launch_spreads_what_is_not_finite_alike(emulator, case, spoil):
    evolution = Evolution(case, dt=1)
    wanted, _, _ = run_evolve(emulator, evolution, spoil=spoil)
    got, _, _ = run_evolve(emulator, evolution, launches=by(ONE, evolution), spoil=spoil)
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
    assert count(Case(3, batch=128, soft=True)) == 2 + (1 + 2 * 10)
    assert count(Case(3, batch=127, gate=True)) == many_gate
    assert count(Case(3, batch=128, mass=True)) == many
    emulator.configure(FORWARD, ALL_BLOCKS, 1)
    assert count(Case(3, batch=128, gate=True)) == many_gate
    with pytest.raises(RuntimeError, match="does not fit"):
        count(Case(3), ONE)
    emulator.configure(FORWARD, ALL_BLOCKS)
    with pytest.raises(RuntimeError, match="does not fit"):
        count(Case(3, soft=True), ONE)
    with pytest.raises(RuntimeError, match="does not fit"):
        count(Case(3, mass=True), ONE)
