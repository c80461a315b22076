"""The compiled object for this device: what is there if it serves, else one built in place.

    python benchmarks/gpu_object.py --facts machine.json [--device cpu]

Writes what the machine and the object are as JSON. Exits with 0 if the object computes on the
device, 1 if there is none that does, and NOTHING_HERE without a CUDA GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from files import write_atomically
from gpu_schedule import NOTHING_HERE

ROOT = Path(__file__).resolve().parents[1]
MOST_JOBS = 16


def serves(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these runs on a GPU: machine code of its major version that is not newer
    ("sm_80" on 8.6), or PTX that is not newer ("compute_80" on 9.0).

    Code for "sm_90a" runs on 9.0 alone.
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if match[4]:
            fits = built == capability and match[1] == "sm"
        elif match[1] == "sm":
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return True
    return False


def from_elsewhere(path: object, root: Path) -> str | None:
    """Why an object is not of this tree: another tree that is installed may lend its own."""
    if path is None or Path(str(path)).resolve().is_relative_to(root):
        return None
    return f"{path} is not of this tree, {root}"


def inspect(name: str) -> dict[str, object]:
    """What this machine and the object are, and why the object does not serve, if so. Loads it."""
    import torch
    from common import commit, machine_name

    import qflux_kernels

    device = torch.device(name)
    found: dict[str, object] = {"name": machine_name(), "device": name}
    object_ = qflux_kernels.diagnostics()
    reason = object_["load_error"] or from_elsewhere(object_["object"], ROOT)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability()
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = list(capability)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory in GiB"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = driver()
        built = object_["cuda_architectures"]
        if reason is None and not serves(built, capability):
            reason = f"it has code for {built or 'no GPU'}, and this one is {capability}"
    if reason is None:
        try:
            states = torch.randn(3, 40, 2, device=device)
            context = qflux_kernels.interact(states, backend=name).context
            reason = None if bool(context.isfinite().all()) else "interact gave NaN"
        except Exception as error:  # whatever it is, a new build may not have it
            reason = f"interact failed: {type(error).__name__}: {error}"
    modules = ("triton", "pytest", "xdist", "ninja", "pynvml")
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return {
        **found,
        "commit": commit(),
        "digest of the sources": sources(ROOT),
        "modules that are missing": ", ".join(missing) or "none",
        "nvcc": shutil.which("nvcc") or "not on PATH",
        "why_not": reason,
        **object_,
    }


def inspect_afresh(name: str) -> dict[str, object] | None:
    """`inspect` in a process of its own, which a bad object may end; None without the device.

    An object that is loaded could not be replaced either, so this process loads none.
    """
    command = [sys.executable, __file__, "--inspect", "--device", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == NOTHING_HERE:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"why_not": f"a process that loaded it ended with status {done.returncode}"}
    return json.loads(lines[-1])


def build(root: Path, capability: Sequence[int] | None) -> bool:
    """Build the object in place, for one GPU or for the CPU alone; whether that worked."""
    environment = {**os.environ, "MAX_JOBS": str(min(MOST_JOBS, os.cpu_count() or 1))}
    environment["QFLUX_CUDA"] = "0" if capability is None else "1"
    if capability is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*capability)
        # What the sanitizer says then names lines; the code is the same.
        environment["NVCC_APPEND_FLAGS"] = "-lineinfo"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=root, env=environment).returncode == 0


def sources(root: Path) -> str:
    """A digest of what is measured, for a tree that is no clone."""
    digest = hashlib.sha256()
    names = ("csrc", "qflux", "qflux_kernels", "benchmarks")
    kinds = (".py", ".h", ".cpp", ".cu", ".cuh")
    for path in sorted(p for name in names for p in (root / name).rglob("*") if p.suffix in kinds):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def driver() -> str:
    """The driver's version; unknown without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--facts", type=Path, help="JSON file to write")
    parser.add_argument("--inspect", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def inspected(name: str) -> int:
    """Print what `inspect` finds; the exit status."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        return NOTHING_HERE
    print(json.dumps(inspect(name)))
    return 0


def capability_of(name: str) -> list[int] | None:
    """Of the GPU, from torch alone, whatever an object did to its process; None for the CPU."""
    if name == "cpu":
        return None
    program = "import torch; print(list(torch.cuda.get_device_capability()))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    options = parse()
    if options.inspect:
        return inspected(options.device)
    found = inspect_afresh(options.device)
    if found is None:
        print("no CUDA GPU is available to torch here, nothing was checked")
        return NOTHING_HERE
    how = "carried"
    if found["why_not"]:
        print(f"the object here does not serve: {found['why_not']}", flush=True)
        capability = found.get("capability") or capability_of(options.device)
        how = "built in place" if build(ROOT, capability) else "not built"
        found = inspect_afresh(options.device) or found
    found["the object was"] = how
    print(json.dumps(found), flush=True)
    if options.facts:
        write_atomically(options.facts, json.dumps(found))
    print(f"the object was {how}; {found['why_not'] or 'it serves'}")
    return 1 if found["why_not"] else 0


if __name__ == "__main__":
    sys.exit(main())
