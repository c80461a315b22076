"""The loops of one instruction set stay apart from those of the others, and who chooses the set.

The linker keeps one of several functions with the same name. Were that one compiled for AVX-512, a
machine without it would run into an illegal instruction, in code that never asked for the set.
"""

import ast
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import qflux_kernels

ROOT = Path(__file__).resolve().parents[2]
TABLES = {"baseline": "kBaseline", "avx2": "kAvx2", "avx512": "kAvx512"}
# A pointer to the compiler's own run time, for exceptions.
HARMLESS = {"DW.ref.__gxx_personality_v0"}
X86 = platform.machine().lower() in ("x86_64", "amd64")


def flags() -> dict[str, list[str]]:
    """The sets of this processor's family with the compiler's options, as setup.py states them."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "X86_SETS":
            sets = ast.literal_eval(node.value)
            return sets if X86 else {"baseline": sets["baseline"]}
    raise AssertionError("setup.py has no X86_SETS")


FLAGS = flags()


def symbols(csrc: Path, name: str, out: Path) -> tuple[set[str], set[str]]:
    """The symbols of the loops that a linker sees, and all that they define.

    Compiled without optimisation, so that whatever a compiler need not inline is there.
    """
    compiler = os.environ.get("CXX", "c++").split()
    tools = [compiler[0], "nm"]
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"{missing} is not here")
    command = [*compiler, "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", *FLAGS[name]]
    command += ["-DQFLUX_X86"] if X86 else []
    loops = csrc / "cpu" / "isa" / "loops.cpp"
    subprocess.run([*command, "-c", str(loops), "-o", str(out)], check=True)

    def listed(*options: str) -> set[str]:
        lines = subprocess.run(
            ["nm", "-C", "--defined-only", *options, str(out)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        return {line.split(maxsplit=2)[2] for line in lines.splitlines()}

    return listed("--extern-only") - HARMLESS, listed()


@pytest.mark.parametrize("name", FLAGS)
def test_nothing_but_its_table_leaves_an_instruction_set(name, tmp_path):
    visible, defined = symbols(ROOT / "csrc", name, tmp_path / "loops.o")
    assert visible == {f"qflux::cpu::{TABLES[name]}"}
    assert not [symbol for symbol in defined if "GLOBAL__sub_I" in symbol], (
        "code that runs when the object is loaded, on machines without the set too"
    )


def test_a_function_that_leaves_is_found(tmp_path):
    """The test above, on loops that somebody moved out of their anonymous namespace."""
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    sweep = csrc / "cpu" / "isa" / "sweep-inl.h"
    text = sweep.read_text()
    for there, then in (
        ("namespace {\nnamespace sweep {", "namespace sweep {"),
        ("}  // namespace sweep\n}  // namespace\n", "}  // namespace sweep\n"),
    ):
        assert text.count(there) == 1
        text = text.replace(there, then)
    sweep.write_text(text)
    visible, _ = symbols(csrc, "baseline", tmp_path / "loops.o")
    assert any("qflux::cpu::sweep::" in symbol for symbol in visible), visible


CALLS = """
import torch
import qflux_kernels

states = torch.randn(40, 300, 2)
ops = torch.ops.qflux_kernels
calls = {
    "diagnostics": lambda: ops.instruction_set(),
    "hard": lambda: qflux_kernels.interact(states, backend="cpu"),
    "gate": lambda: qflux_kernels.interact(
        states, score=qflux_kernels.InverseGate(), backend="cpu"
    ),
    "evolve": lambda: qflux_kernels.evolve(states, 0.1, backend="cpu"),
    "project": lambda: ops.project_norm(
        states.flatten(0, 1), torch.randn(100, 2), None, None, None, 1e-5
    ),
}
for name, call in calls.items():
    for attempt in range(2):
        try:
            call()
        except RuntimeError as error:
            print(name, "refused:", error)
        else:
            print(name, "ran")
"""


@pytest.mark.parametrize("asked", ["SSE9", "avx2"])
def test_an_unknown_set_is_refused(run_python, asked):
    """By every op, in every thread, with the value and what is allowed; the process lives on."""
    printed = run_python(CALLS, QFLUX_INSTRUCTION_SET=asked).stdout.splitlines()
    assert len(printed) == 10
    for line in printed:
        assert "refused:" in line, line
        assert "QFLUX_INSTRUCTION_SET" in line and f"'{asked}'" in line, line
        assert "baseline" in line, line


def test_the_set_that_is_asked_for_runs(run_python):
    """An empty value asks for nothing."""
    program = "import qflux_kernels; print(qflux_kernels.diagnostics()['instruction_set'])"
    best = qflux_kernels.diagnostics()["instruction_set"]
    for asked, runs in {"baseline": "baseline", best: best}.items():
        assert run_python(program, QFLUX_INSTRUCTION_SET=asked).stdout.strip() == runs
    if "QFLUX_INSTRUCTION_SET" not in os.environ:
        assert run_python(program, QFLUX_INSTRUCTION_SET="").stdout.strip() == best
