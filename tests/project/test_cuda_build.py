"""The CUDA sources compile for a GPU without spilling registers, and stay free of torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.rglob("*.cu"))
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
# Each allocates registers in its own way.
ARCHITECTURES = (80, 90, 100)
GENERATE = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def report_of_the_build(source: Path) -> str | None:
    """What nvcc said of a source when the object was built, if the source is still the same."""
    name = f"cuda_{source.parent.name}_{source.stem}.ptxas"
    report = ROOT / "build" / f"object-{sysconfig.get_platform()}" / name
    if not report.exists():
        return None
    included = [*CUDA.rglob("*"), *(ROOT / "csrc" / "math").iterdir(), *(ROOT / "csrc").glob("*.h")]
    if report.stat().st_mtime < max(path.stat().st_mtime for path in included if path.is_file()):
        return None
    text = report.read_text()
    return text if all(f"'sm_{number}'" in text for number in ARCHITECTURES) else None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kernels_compile_without_spills(source, tmp_path):
    report = report_of_the_build(source)
    if report is None:
        nvcc = find_nvcc()
        if nvcc is None:
            pytest.skip("no nvcc on PATH or in CUDA_HOME")
        built = subprocess.run(
            [nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", *GENERATE,
             '-DQFLUX_CUDA_ARCHITECTURES="listed"', "-Xptxas", "-v", "-c", str(source),
             "-o", str(tmp_path / "object.o")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        report = built.stdout + built.stderr
        assert built.returncode == 0, report
    spills = SPILLS.findall(report)
    assert spills, f"no resource report of a kernel:\n{report}"
    assert all(found == ("0", "0") for found in spills), report


def test_kernels_and_formulas_include_no_torch_header():
    files = [
        path
        for folder in (CUDA, ROOT / "csrc" / "math")
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".cu", ".cuh", ".h")
    ]
    assert len(SOURCES) >= 4 and len(files) > len(SOURCES)
    for path in files:
        for header in INCLUDE.findall(path.read_text()):
            top = header.split("/")[0]
            assert top not in ("torch", "ATen", "c10"), f"{path.name} includes {header}"


def test_launch_header_needs_no_toolkit(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    unit = tmp_path / "unit.cpp"
    unit.write_text(f'#include "{CUDA / "common" / "launch.h"}"\n')
    subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(unit)],
        check=True,
    )
