"""What the emulator's tests start from."""

from __future__ import annotations

import pytest
from emulator.harness import ALL_BLOCKS, FORWARD


@pytest.fixture(autouse=True)
def plain_order(emulator):
    emulator.configure(FORWARD, ALL_BLOCKS)
    emulator.set_tensor_cores(True)
