"""Half precision in the emulator: kernels that load and store it give the bits of casts around
them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from emulator.harness import (
    MANY,
    ONE,
    Case,
    Evolution,
    Inputs,
    by,
    interact,
    interact_backward,
    run_evolve,
)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
GIVEN = ("states", "keys", "values", "grad_context", "grad_strength", "grad_out")
RESULTS = ("context", "strength", "out", "grad_values")


class Half:
    """The emulator with points, values and results in half precision: by its kernels, or cast
    around them."""

    def __init__(self, emulator, dtype: torch.dtype, cast: bool) -> None:
        self.emulator, self.dtype, self.cast = emulator, dtype, cast

    def __getattr__(self, name: str):
        found = getattr(self.emulator, name)
        ops = ("interact", "interact_backward", "threshold_backward", "evolve", "evolve_backward")
        return (lambda call: self.run(name, found, call)) if name in ops else found

    def run(self, name: str, op, call: dict) -> None:
        results = RESULTS
        if name == "evolve_backward":
            results = ("grad_states",)
        elif name == "interact_backward":
            # What several kernels add to stays wide.
            alone = not call["keys_are_states"] and call["grad_threshold"] is None
            results += ("grad_states", "grad_keys") if alone else ()
        given = [name for name in GIVEN if isinstance(call.get(name), np.ndarray)]
        written = [n for n in results if isinstance(call.get(n), np.ndarray) and n not in given]
        half = {name: self.narrow(call[name]) for name in (*given, *written)}
        if self.cast:
            half = {name: self.widen(array) for name, array in half.items()}
        op(call | half)
        for name in written:
            found = self.widen(self.narrow(half[name]) if self.cast else half[name])
            call[name][...] = found

    def narrow(self, array: np.ndarray) -> np.ndarray:
        bits = torch.from_numpy(array.copy("K")).to(self.dtype).view(torch.int16).numpy()
        return bits.view(np.float16 if self.dtype == torch.float16 else np.uint16)

    def widen(self, bits: np.ndarray) -> np.ndarray:
        return torch.from_numpy(bits.view(np.int16)).view(self.dtype).float().numpy()


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


CASES = [
    Case(140),
    Case(140, keys=200, value_dim=3, soft=True, layout="planes"),
    Case(70, keys=300, value_dim=3, mass=True, layout="strided"),
    Case(70, value_dim=9, mean=True, lengths=(70, 33)),
    Case(70, keys=90, gate=True, causal=False),
    Case(70, keys=90, value_dim=18, soft=True),
    Case(40, mass=True, batch=(2, 3), layout="heads"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interact_in_half_precision_is_the_cast_way(emulator, case, dtype):
    inputs = Inputs.random(case)
    # Of both signs and many sizes, down to what half precision has no normal numbers for.
    sizes = np.random.default_rng(1).integers(-24, 5, case.tokens)
    inputs.grad_context *= np.exp2(sizes)[..., None]
    if inputs.values is not None:
        inputs.values[..., 0, 0] = 1e6  # infinite in float16
    found, wanted = (Half(emulator, DTYPES[dtype], cast) for cast in (False, True))
    with np.errstate(all="ignore"):
        out, truth = (interact(module, inputs, np.float32) for module in (found, wanted))
        same(out, truth)
        same(
            interact_backward(found, inputs, out, np.float32),
            interact_backward(wanted, inputs, truth, np.float32),
        )


@pytest.mark.parametrize("launches", [MANY, ONE])
@pytest.mark.parametrize("soft", [False, True])
def test_evolve_in_half_precision_is_the_cast_way(emulator, soft, launches):
    evolution = Evolution(Case(40, soft=soft), steps=2, dt=2, skip=1)
    same(
        *(
            run_evolve(Half(emulator, torch.bfloat16, cast), evolution, np.float32,
                       by(launches, evolution))[0]
            for cast in (False, True)
        )
    )  # fmt: skip


def test_half_precision_is_what_kernels_read(emulator):
    """The numbers behind a view of floats would be others."""
    inputs = Inputs.random(Case(33))
    wide = interact(emulator, replace(inputs), np.float32)
    half = interact(Half(emulator, torch.bfloat16, False), inputs, np.float32)
    assert not np.array_equal(half["context"], wide["context"])
    np.testing.assert_allclose(half["context"], wide["context"], rtol=0.5, atol=0.5)
