"""Two processes on two devices beside one: sequences in parts, weights in shards, a state.

    python benchmarks/gpu_parallel.py --device cuda

NCCL runs between GPUs, and gloo where the device is the CPU. Every check runs whatever the ones
before it did; a line for each says how it went.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qflux import QuantumFluxConfig, TextSplit, TrainingOptions, make_model, train
from qflux.parallel import context_parallel, shard
from qflux.text.vocabulary import CharacterVocabulary
from qflux_kernels import Sparsemax, Threshold, interact

RANKS = 2
# Of the norm of the truth, in double precision.
TOLERANCE = 1e-7
TEXT = TextSplit({"a": "abcdefgh hgfedcba " * 40}, {"b": "abcdefgh " * 9})
VOCABULARY = CharacterVocabulary(TEXT.text)
CONFIG = QuantumFluxConfig(
    VOCABULARY.size, num_layers=2, num_cylinders=2, hidden_dim=16, context_length=48
)
STEPS = 3


def run(folder: Path, device: str, **options: object) -> list[float]:
    """The losses of a short run, of one process or of a group."""
    given = {"batch_size": 4, "log_interval": 1, "eval_interval": 2, "precision": "float64"}
    given |= {"max_steps": STEPS, "progress": False, "device": device}
    train(CONFIG, TEXT, VOCABULARY, TrainingOptions(folder, **{**given, **options}))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def close(found: Tensor, expected: Tensor) -> str:
    """How large the error is.

    Raises:
        AssertionError: it is too large.
    """
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    # Not "<=" the other way round: a NaN has to fail.
    assert error <= TOLERANCE, f"error {error:.3g}"
    return f"error {error:.2g}"


def of_an_operator(mesh: DeviceMesh, device: torch.device) -> str:
    """`interact` of parts, forward and backward, with each kind of score."""
    for score in (Threshold(), Threshold(stats="row"), Sparsemax()):
        shapes = ((2, 3, 61, 2), (2, 3, 61, 2), (2, 3, 61, 5))
        torch.manual_seed(0)
        whole = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        whole = [tensor.to(device).requires_grad_() for tensor in whole]
        expected = interact(*whole, score=score).context
        gradients = torch.autograd.grad(expected.square().sum(), whole)
        with context_parallel(mesh, 61):
            context = interact(*(shard(t, mesh, -2) for t in whole), score=score).context
            own = torch.autograd.grad(context.square().sum(), whole)
        close(context, shard(expected, mesh, -2))
        said = close(summed(own), flat(gradients))
    return said


def flat(gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradients as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def summed(gradients: Sequence[Tensor | None]) -> Tensor:
    """The same, added up over the processes."""
    vector = flat(gradients)
    dist.all_reduce(vector)
    return vector


def of_a_model(mesh: DeviceMesh, device: torch.device) -> str:
    """Loss and gradients of the language model over parts of sequences."""
    torch.manual_seed(0)
    model = make_model(CONFIG).to(device).double()
    ids = torch.randint(VOCABULARY.size, (2, 48)).to(device)
    weights = list(model.parameters())
    expected = torch.autograd.grad(model(ids, labels=ids).loss, weights, allow_unused=True)
    with context_parallel(mesh, 48):
        part = shard(ids, mesh)
        own = torch.autograd.grad(model(part, labels=part).loss, weights, allow_unused=True)
    return close(summed(own), flat(expected))


def work(rank: int, device: str, port: int, folder: Path, expected: list[float], out) -> None:
    """All checks of one process; the first puts a line for each."""
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    own = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=RANKS, timeout=timedelta(seconds=40))
    mesh = dist.init_device_mesh(device, (RANKS,))

    def trained(**options: object) -> str:
        losses = run(folder / "-".join(map(str, options)), device, rank_timeout=40, **options)
        both = torch.tensor([losses, expected], dtype=torch.float64)
        return close(both[0], both[1])

    checks: dict[str, Callable[[], str]] = {
        "an operator over parts of sequences": lambda: of_an_operator(mesh, own),
        "a model over parts of sequences": lambda: of_a_model(mesh, own),
        "training, weights in each": lambda: trained(parallel="ddp"),
        "training, weights in shards": lambda: trained(
            parallel="fsdp", context_parallel=RANKS, async_save=True
        ),
        "training, layers in stages": lambda: trained(pipeline_parallel=RANKS, accumulation=2),
    }
    for name, check in checks.items():
        try:
            line = f"ok      {name} {check()}"
        except Exception as error:  # the next one may work
            lines = str(error).strip().splitlines() or [""]
            line = f"FAILED  {name}: rank {rank}: {type(error).__name__}: {lines[0][:300]}"
        said: list[str | None] = [None] * RANKS
        dist.all_gather_object(said, line)
        if rank == 0:
            out.put(next((text for text in said if text and text.startswith("FAILED")), line))
    dist.destroy_process_group()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser.parse_args(words)


def main() -> int:
    device = parse().device
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = run(folder / "one", device)
        out = mp.get_context("spawn").SimpleQueue()
        lines = []
        try:
            mp.spawn(work, (device, port, folder, expected, out), nprocs=RANKS)
        except Exception as error:  # what was said before it is still worth reading
            lines.append(f"FAILED  the processes: {str(error).strip().splitlines()[-1][:300]}")
        while not out.empty():
            lines.append(out.get())
    failed = sum(line.startswith("FAILED") for line in lines)
    print("\n".join(lines))
    print(f"{len(lines) - failed} of {len(lines)} checks passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
