"""What is there, why not, and which to take."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from pathlib import Path

import torch

from .checks import check_choice
from .options import ALGORITHMS, BACKENDS, Score
from .schema import COMPILED, TRITON
from .version import __version__


class BackendUnavailableError(RuntimeError):
    """The backend or algorithm asked for is not in this build or on this machine."""


def _load() -> str | None:
    """Load the compiled object and attach the ops' fakes; the reason if that fails."""
    try:
        importlib.import_module("._C", __package__)
        from . import autograd

        autograd.register(COMPILED)
    except Exception as error:  # a broken object can fail in any way, and importing must not
        here = Path(__file__).resolve().parent
        found = sorted(path.name for path in here.glob("_C*"))
        what = f"{found[0]} does not load" if found else "_C.abi3.so is missing"
        return (
            f"the compiled kernels of qflux_kernels are not usable: {what} in {here} "
            f"({type(error).__name__}: {error}). Build them with "
            "'pip install . --no-build-isolation' (needs a C++17 compiler; nvcc only for CUDA), "
            "or pass backend='reference', which is plain PyTorch and O(S^2) in memory."
        )
    return None


def _load_triton() -> str | None:
    """Register the Triton ops; the reason if Triton is not there. It is not imported yet."""
    if importlib.util.find_spec("triton") is None:
        return (
            "backend='triton' needs Triton, which is not installed: "
            "'pip install qflux[triton]', or use 'auto' or 'reference'"
        )
    importlib.import_module(".triton", __package__)
    return None


LOAD_ERROR = _load()
TRITON_ERROR = _load_triton()
# Triton reads this when kernels are defined; changes after the import would come too late.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in (
    "1", "true", "on", "y", "yes",
)  # fmt: skip
# What `choose_backend` returns, and the prefix of the ops that serve it.
OP_FAMILIES = {"compiled": COMPILED, "triton": TRITON}


def cuda_architectures() -> list[str]:
    """The CUDA architectures compiled into the object, such as `["sm_90", "compute_100"]`."""
    if LOAD_ERROR is not None:
        return []
    return _text("cuda_architectures").split()


def _text(name: str) -> str:
    """An op that returns a text as a uint8 tensor: strings leak in the stable ABI before 2.14."""
    return bytes(getattr(torch.ops.qflux_kernels, name)().tolist()).decode()


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
    compiled = LOAD_ERROR is None and (device.type != "cuda" or bool(cuda_architectures()))
    if not compiled and backend == "auto" and device.type == "cuda" and TRITON_ERROR is None:
        return "triton"
    if LOAD_ERROR is not None:
        raise BackendUnavailableError(LOAD_ERROR)
    if not compiled:
        raise BackendUnavailableError(
            "this build of qflux_kernels has no CUDA code: rebuild it where nvcc is found, "
            "'pip install qflux[triton]' for kernels that need no compiler, "
            "or pass backend='reference'"
        )
    return "compiled"


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
            *(["cuda"] if cuda_architectures() else []),
            *(["triton"] if triton_error is None else []),
        ],
        "triton_error": triton_error,
        "algorithms": ["dense", *(["sweep"] if loaded else [])],
        "cuda_architectures": cuda_architectures(),
        "instruction_set": _text("instruction_set") if loaded else None,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
    }
