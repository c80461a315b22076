"""Builds qflux_kernels/_C.abi3.so: one object with CPU and CUDA code for every Python and torch.

Environment: QFLUX_CUDA=1 demands CUDA code, =0 leaves it out, unset follows the toolkit;
TORCH_CUDA_ARCH_LIST overrides the architectures ("8.0;9.0+PTX"); CUDA_HOME names the toolkit;
MAX_JOBS bounds the compile jobs; CXX is a compiler, CXXFLAGS options that come after all others.
ninja and ccache are used where they are found.

Compiled units stay in build/object-PLATFORM, so that with ninja every later build of the same tree,
editable or wheel, for any Python, compiles only what has changed; --force compiles all. Beside each
CUDA unit lies a report of its registers, stack and spills.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECT = "qflux_kernels._C"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
TORCH_TARGET = "0x020a000000000000"  # 2.10
PYTHON_TARGET = "0x030a0000"  # 3.10

DEBUG = os.environ.get("DEBUG", "0") == "1"
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-g1" if DEBUG else "-g0"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Neither flag changes a result: no loop here reads errno, and contraction gives fused multiply-add.
LOOPS = ["-O3", "-fno-math-errno", "-ffp-contract=fast"]
X86_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma",
        "-mprefer-vector-width=512",
    ],
}  # fmt: skip


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def compiler() -> list[str]:
    """CXX: a compiler, or a command with options, in which quotes hold words together."""
    given = os.environ.get("CXX") or "c++"
    return [given] if shutil.which(given) else shlex.split(given)


def max_jobs() -> int | None:
    """MAX_JOBS, or None where it is unset."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1:
        sys.exit(f"MAX_JOBS must be an integer >= 1, or unset, got {given!r}")
    return int(given)


def find_nvcc() -> str | None:
    """The nvcc to use, or None for a build without CUDA; one line says which and why."""
    wanted = os.environ.get("QFLUX_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"QFLUX_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        print("qflux_kernels: CPU only, as QFLUX_CUDA=0 asks")
        return None
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc")
    if found is None and wanted == "1":
        sys.exit("QFLUX_CUDA=1, but no nvcc is on PATH or in CUDA_HOME")
    if found is None:
        print("qflux_kernels: CPU only, no CUDA toolkit found (nvcc on PATH or CUDA_HOME)")
    return found


def cuda_architectures() -> list[tuple[str, str]]:
    """(-gencode value, name) for each architecture of TORCH_CUDA_ARCH_LIST."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    found = []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", entry)
        if match is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST entries look like 8.0 or 9.0+PTX, got {entry!r}")
        number = match[1] + match[2] + match[3]
        found.append((f"arch=compute_{number},code=sm_{number}", f"sm_{number}"))
        if match[4]:
            found.append((f"arch=compute_{number},code=compute_{number}", f"compute_{number}"))
    return found


def report_of(obj: Path) -> Path | None:
    """Where nvcc's report of the registers of a unit goes; units of the host have none."""
    return obj.with_suffix(".ptxas") if obj.name.startswith("cuda_") else None


def united(unit: Path, sources: list[Path]) -> Path:
    """A unit of several sources: the headers of torch take longer than any of them by itself."""
    text = "".join(f'#include "{os.path.relpath(path, unit.parent)}"\n' for path in sources)
    if not unit.exists() or unit.read_text() != text:
        unit.write_text(text)
    return unit


class BuildObject(build_ext):
    """Compiles each source with its own compiler and flags, then links one object.

    torch's own CUDAExtension refuses a toolkit beside a CPU-only torch, which is what this needs.
    """

    def build_extension(self, extension: Extension) -> None:
        import torch

        nvcc = find_nvcc()
        # Not under build_temp, which an editable installation deletes.
        build = ROOT / "build" / f"object-{sysconfig.get_platform()}"
        if self.force and build.exists():
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        rules = self._rules(Path(torch.__file__).parent, build, nvcc)
        self._compile(build, rules)
        self._link(Path(torch.__file__).parent, [rule[1] for rule in rules], target, nvcc)

    def _rules(
        self, torch_root: Path, build: Path, nvcc: str | None
    ) -> list[tuple[list[str], Path, Path]]:
        """(command, object, source) for every translation unit."""
        ccache = [found] if (found := shutil.which("ccache")) else []
        if not DEBUG:  # what one clone or worktree has compiled serves the others
            os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
            os.environ.setdefault("CCACHE_NOHASHDIR", "1")
        cxx = [*ccache, *compiler(), *COMMON, *WARNINGS]
        last = shlex.split(os.environ.get("CXXFLAGS", ""))
        if is_x86():
            cxx.append("-DQFLUX_X86")
        binding = [
            *cxx, "-O2", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            f"-DPy_LIMITED_API={PYTHON_TARGET}", f"-isystem{torch_root / 'include'}",
            f"-isystem{torch_root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
            f"-isystem{sysconfig.get_paths()['include']}",
        ]  # fmt: skip
        if nvcc:
            binding += ["-DQFLUX_CUDA", "-DUSE_CUDA"]
        csrc = ROOT / "csrc"
        loops = csrc / "cpu" / "isa" / "loops.cpp"
        # What takes longest comes first: no processor waits for it at the end.
        sets = X86_SETS if is_x86() else {"baseline": []}
        units = [
            ([*cxx, *LOOPS, *flags, *last], loops, f"loops_{name}") for name, flags in sets.items()
        ]
        units = units[::-1]
        ops = [csrc / "library.cpp", *sorted((csrc / "ops").glob("*.cpp"))]
        units.append(([*binding, *last], united(build / "ops.cpp", ops), "ops"))
        units += [
            ([*binding, "-O3", *last], path, f"{path.parent.name}_{path.stem}")
            for path in sorted((csrc / "cpu").rglob("*.cpp"))
            if path != loops
        ]
        if nvcc:
            architectures = cuda_architectures()
            names = " ".join(name for _, name in architectures)
            device = [
                *ccache, nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden",
                f'-DQFLUX_CUDA_ARCHITECTURES="{names}"', "-DNDEBUG", "-Xptxas", "-v",
            ]  # fmt: skip
            for gencode, _ in architectures:
                device += ["-gencode", gencode]
            units += [
                (device, path, f"cuda_{path.parent.name}_{path.stem}")
                for path in sorted((csrc / "cuda").rglob("*.cu"))
            ]
        return [
            (
                [*command, "-c", str(source), "-o", str(build / f"{name}.o")],
                build / f"{name}.o",
                source,
            )
            for command, source, name in units
        ]

    def _compile(self, build: Path, rules: list[tuple[list[str], Path, Path]]) -> None:
        jobs = max_jobs()
        # That of this Python first: two versions of ninja discard each other's logs.
        ninja = shutil.which("ninja", path=os.path.dirname(sys.executable)) or shutil.which("ninja")
        if ninja:
            self._write_ninja(build, rules)
            limit = [] if jobs is None else ["-j", str(jobs)]
            self._run([ninja, "-C", str(build), *limit])
            return
        with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            list(pool.map(lambda rule: self._run(rule[0], report=report_of(rule[1])), rules))

    @staticmethod
    def _write_ninja(build: Path, rules: list[tuple[list[str], Path, Path]]) -> None:
        # Files by their names as seen from the build folder, which have no letter that ninja, the
        # shell or a list of dependencies would read as more than a letter, wherever the tree lies.
        def local(path: Path) -> str:
            return os.path.relpath(path, build)

        lines = ["ninja_required_version = 1.5"]
        for number, (command, obj, source) in enumerate(rules):
            named = {str(path): local(path) for path in (obj, source)}
            depfile = f"{obj.name}.d"
            report = report_of(obj)
            words = [named.get(word, word) for word in command]
            line = shlex.join([*words, "-MD" if report else "-MMD", "-MF", depfile])
            line = line.replace("$", "$$")
            if report:
                line += f" > {report.name} 2>&1 || (cat {report.name}; exit 1)"
            lines += [
                f"rule unit{number}",
                f"  command = {line}",
                f"  depfile = {depfile}",
                "  deps = gcc",
                f"build {obj.name}: unit{number} {local(source)}",
            ]
        (build / "build.ninja").write_text("\n".join(lines) + "\n")

    def _link(self, torch_root: Path, objects: list[Path], target: Path, nvcc: str | None) -> None:
        # A process that has the old object mapped keeps it: the new one only takes its name.
        fresh = target.with_suffix(".new")
        command = [
            *compiler(), "-shared", *map(str, objects), "-o", str(fresh),
            f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10",
            "-Wl,--as-needed", "-Wl,-s" if not DEBUG else "-g",
        ]  # fmt: skip
        if nvcc:
            lib = Path(nvcc).resolve().parents[1]
            for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
                command.append(f"-L{lib / folder}")
            command += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self._run(command)
        os.replace(fresh, target)

    @staticmethod
    def _run(command: list[str], report: Path | None = None) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if report and done.returncode == 0:
            report.write_text(done.stdout + done.stderr)
            return
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        if done.returncode:
            sys.exit(f"qflux_kernels: this command failed:\n{shlex.join(command)}")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(OBJECT, sources=[], py_limited_api=True)],
        cmdclass={"build_ext": BuildObject},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
