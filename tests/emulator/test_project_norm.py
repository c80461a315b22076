"""`project_norm` and its gradients in the emulator."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.harness import (
    ALL_BLOCKS,
    FORWARD,
    REVERSED,
    SHUFFLED,
    check_project,
    run_project,
)


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
