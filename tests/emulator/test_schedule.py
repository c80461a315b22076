"""How a pass over pairs is divided among blocks, in the emulator."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from emulator.harness import (
    ALL_BLOCKS,
    SHUFFLED,
    Case,
    Inputs,
    close,
    expected,
    interact,
    interact_backward,
)

ENOUGH_WORKS = 1056  # of traits.h


@pytest.mark.parametrize("batch", [1, 7, 300, 2000])
def test_sources_are_divided_where_works_are_few(emulator, batch):
    for owners, sources, blocks in itertools.product(
        (1, 500, 40_000), (1, 512, 513, 5000, 1_000_000), (1, 8)
    ):
        plan = emulator.schedule(batch, owners, sources, blocks)
        works, parts, size, tile = (
            plan[name] for name in ("works", "parts", "part_sources", "tile")
        )
        if parts == 1:
            assert works >= ENOUGH_WORKS or sources <= tile
            continue
        assert works < ENOUGH_WORKS and size % tile == 0
        assert (parts - 1) * size < sources <= parts * size  # none is empty, none is left over
        # As many as it takes, or as there are tiles.
        assert works * parts >= ENOUGH_WORKS / 2 or size == tile
        assert works * parts <= 2 * ENOUGH_WORKS


# With the launches of forward and backward: one more for each pass that is divided.
DIVIDED = {
    Case(5, keys=3100, value_dim=3, batch=1): 6,
    Case(1, keys=2100, value_dim=9, soft=True): 8,
    Case(3, keys=1100, value_dim=2, mass=True, causal=False): 6,
    Case(1100, value_dim=3, soft=True, lengths=(1100, 30)): 9,
    Case(1100, keys=5, gate=True, value_dim=1, layout="strided"): 4,
    Case(2500, batch=1): 6,
    Case(2500, batch=1, soft=True): 9,
}


@pytest.mark.parametrize("case", DIVIDED, ids=str)
def test_parts_add_up_in_one_order(emulator, case):
    inputs, truth = Inputs.random(case), expected(Inputs.random(case))

    def everything() -> dict[str, np.ndarray]:
        out = interact(emulator, inputs)
        return out | interact_backward(emulator, inputs, out)

    emulator.count_launches()
    found = everything()
    assert emulator.count_launches() == DIVIDED[case]
    for name in ("context", "strength", "grad_states", "grad_values"):
        if name in found:
            close(name, found[name], truth[name])
    for order, blocks in [(SHUFFLED, ALL_BLOCKS), (SHUFFLED, 3)]:
        emulator.configure(order, blocks)
        for name, array in everything().items():
            np.testing.assert_array_equal(array, found[name], err_msg=name)
