"""The multiply-adds that a GPU can issue: the ceiling of the kernels, which do little else.

Needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

# Each thread has BLOCK / (32 WARPS) chains of its own, more than the pipe is deep.
BLOCK, WARPS, UNROLLED, BLOCKS_PER_SM = 2048, 8, 32, 8


@triton.jit
def chains(
    target, a, b, rounds, BLOCK: tl.constexpr, UNROLLED: tl.constexpr
):  # pragma: no cover (compiled for the device)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(target + place)
    for _ in range(rounds):
        for _ in tl.static_range(UNROLLED):
            x = x * a + b
    tl.store(target + place, x)


def programs(device: torch.device) -> int:
    """Enough to fill every multiprocessor."""
    return BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def count(device: torch.device, rounds: int) -> float:
    """The multiply-adds of a call of `multiply_adds`."""
    return float(programs(device) * BLOCK * UNROLLED * rounds)


def multiply_adds(device: torch.device, rounds: int) -> Callable[[], object]:
    """A call that does nothing but multiply and add, on every multiprocessor."""
    target = torch.ones(programs(device) * BLOCK, device=device)
    grid = (programs(device),)
    # The fixed point is 1, so that numbers stay what they are and no product is denormal.
    return lambda: chains[grid](target, 0.5, 0.5, rounds, BLOCK, UNROLLED, num_warps=WARPS)
