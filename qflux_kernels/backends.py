"""What is there, why not, and which to take."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .checks import check_choice
from .options import ALGORITHMS, BACKENDS, Score
from .schema import COMPILED, FAMILIES, TRITON
from .version import __version__


class BackendUnavailableError(RuntimeError):
    """The backend or algorithm asked for is not in this build or on this machine."""


HERE = Path(__file__).resolve().parent


def _other_copy() -> str | None:
    """What is wrong if another copy of this package has its ops in this process; None if none has.

    An object that registers ops which are there already ends the process.
    """
    ops = torch.ops.qflux_kernels
    owner = vars(ops).get("loaded_from")
    if owner == str(HERE) or not any(hasattr(ops, family + "interact") for family in FAMILIES):
        return None
    return (
        f"the ops of qflux_kernels in this process are those of another copy, in "
        f"{owner or 'a place that is not known'}, and torch has them once: the copy in {HERE} "
        "needs a process that has imported no other, or backend='reference'"
    )


def _load() -> str | None:
    """Load the compiled object and attach the ops' fakes; the reason if that fails."""
    if OTHER_COPY is not None:
        return OTHER_COPY
    try:
        importlib.import_module("._C", __package__)
        from . import autograd

        autograd.register(COMPILED)
    except Exception as error:  # a broken object can fail in any way, and importing must not
        found = sorted(path.name for path in HERE.glob("_C*"))
        what = f"{found[0]} does not load" if found else "_C.abi3.so is missing"
        return (
            f"the compiled kernels of qflux_kernels are not usable: {what} in {HERE} "
            f"({type(error).__name__}: {error}). {_installed_elsewhere()}Build them with "
            "'pip install . --no-build-isolation' (needs a C++17 compiler; nvcc only for CUDA), "
            "or pass backend='reference', which is plain PyTorch and O(S^2) in memory."
        )
    return None


def _installed_elsewhere() -> str:
    """Where the object is if this package, a source tree say, hides an installation that has it."""
    for entry in sys.path:
        other = (Path(entry) / HERE.name).resolve()
        if other != HERE and any(other.glob("_C*.so")):
            return (
                f"An installation that has them, in {other}, is hidden by this folder: start "
                f"Python outside of {HERE.parent}, or install with 'pip install -e'. "
            )
    return ""


def _load_triton() -> str | None:
    """Register the Triton ops; the reason if Triton is not there. It is not imported yet."""
    if OTHER_COPY is not None:
        return OTHER_COPY
    if importlib.util.find_spec("triton") is None:
        return (
            "backend='triton' needs Triton, which is not installed: "
            "'pip install qflux[triton]', or use 'auto' or 'reference'"
        )
    importlib.import_module(".triton", __package__)
    return None


def _text(name: str) -> str:
    """An op that returns a text as a uint8 tensor: strings leak in the stable ABI before 2.14."""
    # Importing may happen under a mode that makes tensors without numbers. Leaving modes imports
    # half of the compiler, so it is done only if there is one.
    traced = torch._C._len_torch_dispatch_stack() > 0
    with _disable_current_modes() if traced else nullcontext():
        return bytes(getattr(torch.ops.qflux_kernels, name)().tolist()).decode()


OTHER_COPY = _other_copy()
LOAD_ERROR = _load()
TRITON_ERROR = _load_triton()
if OTHER_COPY is None:
    vars(torch.ops.qflux_kernels)["loaded_from"] = str(HERE)
# The CUDA architectures compiled into the object, such as `("sm_90", "compute_100")`. They are read
# once, because no call that is traced could read them.
CUDA_ARCHITECTURES = () if LOAD_ERROR else tuple(_text("cuda_architectures").split())
# Triton reads this when kernels are defined; changes after the import would come too late.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in (
    "1", "true", "on", "y", "yes",
)  # fmt: skip
# What `choose_backend` returns, and the prefix of the ops that serve it.
OP_FAMILIES = {"compiled": COMPILED, "triton": TRITON}


def choose_backend(backend: str, device: torch.device) -> str:
    """What serves a call, "reference", "compiled" or "triton", or raise saying why nothing does."""
    check_choice("backend", backend, BACKENDS)
    if backend == "reference":
        return "reference"
    if backend == "triton":
        if TRITON_ERROR is not None:
            raise BackendUnavailableError(TRITON_ERROR)
        if device.type == "cpu" and not TRITON_INTERPRETED:
            raise BackendUnavailableError(
                "backend='triton' needs states on a GPU, got cpu: Triton has no CPU compiler. "
                "Use 'auto', 'cpu' or 'reference'; for tests only, TRITON_INTERPRET=1 set before "
                "qflux_kernels is imported runs the kernels in Triton's interpreter"
            )
        return "triton"
    if backend in ("cpu", "cuda") and device.type != backend:
        raise ValueError(
            f"backend={backend!r} needs states on a {backend} device, got {device}; "
            "backend='auto' follows the states"
        )
    if backend == "auto" and device.type not in ("cpu", "cuda", "meta"):
        return "reference"
    missing = LOAD_ERROR
    if missing is None and device.type == "cuda":
        missing = _missing_on_gpu(device.index)
    if missing is None:
        return "compiled"
    if backend == "auto" and device.type == "cuda" and TRITON_ERROR is None:
        return "triton"
    raise BackendUnavailableError(missing)


def serves(architectures: Sequence[str], major: int, minor: int) -> bool:
    """Whether code for these architectures runs on a GPU of that compute capability.

    Machine code (sm_90) runs on its major version from its minor version on, and what is compiled
    when it is loaded (compute_90) on every later one; with a letter (sm_90a) on that version alone.
    """

    def runs(architecture: str) -> bool:
        kind, _, number = architecture.rpartition("_")
        own = divmod(int(number.rstrip("af")), 10)
        if not number.isdigit():
            return own == (major, minor)
        return own <= (major, minor) and (kind == "compute" or own[0] == major)

    return any(map(runs, architectures))


def _missing_on_gpu(index: int | None) -> str | None:
    """Why the object has nothing for a GPU; None if it has. Without a GPU, for tensors of one."""
    if not CUDA_ARCHITECTURES:
        return (
            "this build of qflux_kernels has no CUDA code: rebuild it where nvcc is found, "
            "'pip install qflux[triton]' for kernels that need no compiler, "
            "or pass backend='reference'"
        )
    if torch.version.hip is not None:
        return (
            "the compiled kernels of qflux_kernels are for CUDA, and this torch is for ROCm: "
            "'pip install qflux[triton]', or pass backend='reference'"
        )
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if serves(CUDA_ARCHITECTURES, major, minor):
        return None
    return (
        f"this build of qflux_kernels has CUDA code for {', '.join(CUDA_ARCHITECTURES)}, which "
        f"does not run on a GPU of compute capability {major}.{minor}: rebuild it with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor}, 'pip install qflux[triton]', or pass "
        "backend='reference'"
    )


# What `torch.compiler.assume_constant_result` does, which imports the whole compiler.
_missing_on_gpu._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def check_algorithm(algorithm: str, score: Score, backend: str, device: torch.device) -> None:
    """Raise unless `algorithm` serves this score on the backend that was chosen."""
    check_choice("algorithm", algorithm, ALGORITHMS)
    if algorithm != "sweep":
        return
    kind = score.kind
    if not kind.swept_on:
        raise BackendUnavailableError(
            f"algorithm='sweep' does not serve score={type(score).__name__}(...): its weights are "
            "no polynomial of the inner product. Use 'auto' or 'dense'"
        )
    if backend != "compiled":
        raise BackendUnavailableError(
            "algorithm='sweep' is there for backend='cpu' and backend='cuda' only, and "
            f"backend={backend!r} would serve states on {device}. Use 'auto' or 'dense'"
        )
    if device.type == "cuda" and "cuda" not in kind.swept_on:
        raise BackendUnavailableError(
            f"algorithm='sweep' does not serve a {kind.name.replace('_', ' ')} on {device}, only "
            f"on {' and '.join(kind.swept_on)}. Use 'auto' or 'dense'"
        )


def diagnostics() -> dict[str, object]:
    """Which backends were built and run here: plain values, for printing and bug reports."""
    loaded = LOAD_ERROR is None
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    triton_error = TRITON_ERROR
    if triton_error is None and not (gpus or TRITON_INTERPRETED):
        triton_error = "backend='triton' needs a GPU, and there is none"

    spec = importlib.util.find_spec("._C", __package__)
    return {
        "qflux_kernels": __version__,
        "object": spec.origin if loaded and spec else None,
        "load_error": LOAD_ERROR,
        "backends": [
            "reference",
            *(["cpu"] if loaded else []),
            *(["cuda"] if CUDA_ARCHITECTURES else []),
            *(["triton"] if triton_error is None else []),
        ],
        "triton_error": triton_error,
        "algorithms": ["dense", *(["sweep"] if loaded else [])],
        "cuda_architectures": list(CUDA_ARCHITECTURES),
        "instruction_set": _text("instruction_set") if loaded else None,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
    }
