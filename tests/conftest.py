"""Fixtures: devices, seeds, memory that starts as NaN, and the C++ formulas as a module."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib import util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Two processes with a thread for each core would spend their time waiting for one another. Programs
# that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """Every device of this machine that kernels run on."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fill every `empty` that PyTorch allocates, in C++ too, with NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def math_module(tmp_path_factory):
    """The formulas of csrc/math, compiled for Python."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 compiles the formulas for Python")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = tmp_path_factory.mktemp("math") / f"math_module{suffix}"
    subprocess.run(
        [
            "g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
            f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
            str(ROOT / "tests" / "cpp" / "math_module.cpp"), "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    spec = util.spec_from_file_location("math_module", target)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_python(tmp_path):
    """Run a program in a fresh interpreter, outside the source tree, and return what it printed."""

    def run(program: str, *, path: Path = ROOT, check: bool = True, **environment: str):
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(path)} | environment,
            capture_output=True,
            text=True,
        )
        if check:
            assert result.returncode == 0, result.stderr
        return result

    return run
