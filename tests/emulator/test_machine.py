"""What the kernels touch: nothing outside arrays, and nothing of what is empty."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from emulator.harness import (
    EVOLUTIONS,
    MANY,
    ONE,
    Case,
    Evolution,
    Inputs,
    Memory,
    by,
    interact,
    interact_backward,
    run_evolve,
    run_project,
)


@pytest.mark.parametrize("fence", ["before", "after"])
def test_nothing_past_an_array_is_touched(emulator, fence):
    """In a process of its own, because an access past a fence ends it."""

    def run() -> None:
        torch.set_num_threads(1)  # those of a parent do not survive a fork
        Memory.FENCE = fence
        for case in [
            Case(1),
            Case(129, batch=1),
            Case(129, value_dim=9, gate=True),
            Case(33, lengths=(33, 0)),
            Case(40, lengths=(40, 7), gate=True, whole_window=True),
            Case(5, keys=301, value_dim=3),
            Case(129, value_dim=17, batch=1),
            Case(5, keys=131, value_dim=33, layout="planes"),
            Case(301, keys=5, value_dim=2),
            Case(3, keys=0),
            Case(0, keys=3, value_dim=1),
            Case(70, lengths=(70, 0), value_dim=9, base=32),
            Case(40, keys=101, value_dim=3, base=32),
            Case(65, base=32, causal=False, batch=1),
            Case(40, lengths=(40, 7), soft=True),
            Case(5, keys=101, soft=True),
            Case(9, batch=(2, 3), keys=30, value_dim=3, soft=True, layout="expanded"),
        ]:
            inputs = Inputs.random(case)
            for dtype in (np.float32, np.float64):
                out = interact(emulator, inputs, dtype)
                interact_backward(emulator, inputs, out, dtype)
        for evolution in [*EVOLUTIONS[:4], Evolution(Case(40, soft=True), dt=1)]:
            for launches in (MANY, ONE):
                run_evolve(emulator, evolution, launches=by(launches, evolution))
        for sizes in [(1, 1, 1), (33, 2, 17), (300, 8, 130)]:
            for dtype in (np.float32, np.float64):
                run_project(emulator, *sizes, dtype)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_empty_batches(emulator):
    for launches in (MANY, ONE):
        run_evolve(emulator, Evolution(Case(5, batch=0)), launches=(launches, launches))
    for case in (Case(5, batch=0), Case(5, keys=3, value_dim=2, batch=0)):
        inputs = Inputs.random(case)
        out = interact(emulator, inputs)
        interact_backward(emulator, inputs, out)


def test_architectures_are_those_of_the_build(emulator):
    assert emulator.architectures() == "emulated"
