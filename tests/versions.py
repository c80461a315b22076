"""One wheel with several versions of torch: `make versions`.

    python tests/versions.py [--wheel WHEEL] [--tests FILE ...] VERSION_OR_FOLDER ...

Builds a wheel with the torch of this interpreter, or takes the one that is given, which another
Python may have built, and runs tests on it with each version, which pip installs into a folder of
its own, or which lies in the folder that is given. Everything else comes from this interpreter. A
copy of the tests runs, away from the sources, so that the wheel is what is imported.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What depends on torch's interfaces: schemas, dispatch, export, compilation, opcheck, caches.
TESTS = [f"tests/kernels/test_{name}.py" for name in ("schema", "dispatch", "cache")]


def wheel_in(folder: Path, wheel: Path | None) -> Path:
    """The wheel's files, in a folder that can be imported from."""
    if wheel is None:
        options = ["--no-build-isolation", "--no-deps", "-q", "-w", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
        (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    return folder / "wheel"


def tests_in(folder: Path) -> Path:
    tree = folder / "tree"
    for name in ("tests", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="+", help="versions of torch, or folders with one")
    parser.add_argument("--wheel", type=Path, help="a wheel of this source, instead of a new one")
    parser.add_argument("--tests", nargs="+", default=TESTS)
    options, pytest_options = parser.parse_known_args()
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel, tree = wheel_in(folder, options.wheel), tests_in(folder)
        for version in options.versions:
            torch = Path(version).resolve() if os.path.isdir(version) else folder / "torch"
            if not os.path.isdir(version):
                install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(torch)]
                subprocess.run([*install, f"torch=={version}"], check=True)
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (torch, wheel)))}
            print(f"torch {version}", flush=True)
            for arguments in (
                # A folder without a torch that works would leave the tests to this interpreter's.
                ("-c", f"import torch; assert torch.__file__.startswith({str(torch)!r}), torch"),
                ("-m", "qflux_kernels"),
                ("-m", "pytest", *pytest_options, *options.tests),
            ):
                command = [sys.executable, *arguments]
                if subprocess.run(command, cwd=tree, env=environment).returncode:
                    failed.append(version)
                    break
            shutil.rmtree(folder / "torch", ignore_errors=True)
    if failed:
        raise SystemExit(f"failed with torch {', '.join(failed)}")


if __name__ == "__main__":
    main()
