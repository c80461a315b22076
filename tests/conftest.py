"""Fixtures: devices, seeds, memory that starts as NaN, and C++ as modules."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
# Two processes with a thread for each core would spend their time waiting for one another. Programs
# that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# A shell that runs tests in the background has them ignore what some of them send.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

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
def compile_module(tmp_path_factory):
    """Compile C++ sources into a Python module, once for all the processes of a test run.

    CXX chooses the compiler and may hold options, as in a build; ccache is used where it is found.
    """
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 makes Python modules of C++")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"the C++ compiler {compiler[0]} is not here")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def build(target: Path, sources: list[Path], options: tuple[str, ...]) -> None:
        ccache = [found] if (found := shutil.which("ccache")) else []
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        command = [
            *compiler, "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", *options,
            *(f"-I{path}" for path in includes),
        ]  # fmt: skip
        folder = target.with_suffix(".objects")
        folder.mkdir(exist_ok=True)
        objects = [folder / f"{number}.o" for number in range(len(sources))]

        def unit(source: Path, obj: Path) -> None:
            subprocess.run(
                [*ccache, *command, "-x", "c++", "-c", str(source), "-o", str(obj)], check=True
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(unit, sources, objects))
        fresh = target.with_suffix(".new")
        subprocess.run([*compiler, "-shared", *map(str, objects), "-o", str(fresh)], check=True)
        os.replace(fresh, target)

    def load(name: str, sources: list[Path], *options: str):
        target = shared / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        with FileLock(f"{target}.lock"):
            if not target.exists():
                build(target, sources, options)
        spec = util.spec_from_file_location(name, target)
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def math_module(compile_module):
    """The formulas of csrc/math, compiled for Python."""
    return compile_module("math_module", [ROOT / "tests" / "cpp" / "math_module.cpp"])


@pytest.fixture(scope="session")
def emulator(compile_module):
    """The CUDA kernels and launchers, compiled as plain C++."""
    # What takes longest comes first: no processor waits for it at the end.
    return compile_module(
        "qflux_emulator",
        [ROOT / "tests/cpp/emulator_module.cpp", *sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))],
        "-Wno-unknown-pragmas",
        '-DQFLUX_CUDA_ARCHITECTURES="emulated"',
    )


@pytest.fixture
def call(capsys):
    """Run the command line in this process: status, standard output, standard error."""
    from qflux.cli import main

    def run(*arguments):
        status = main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_python(tmp_path):
    """Run a program in a fresh interpreter, outside the source tree, and return what it printed.

    It imports from `path` first, or from the source tree and then from where this one does.
    """
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = os.pathsep.join(filter(None, (str(ROOT), *inherited)))

    def run(program: str, *, path: Path | str = folders, check: bool = True, **environment: str):
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
