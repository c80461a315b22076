"""What a step costs each of the processes that share sequences, and what more of them would need.

    python benchmarks/parallel.py --ranks 1 2 4 --tokens 4096 --csv benchmarks/results/parallel.csv
    python benchmarks/parallel.py --plan

The first line trains on random tokens with `qflux.parallel.context_parallel` in processes on this
machine and writes a row for each number of them: processor seconds of a process and step, what its
memory grows by, and the bytes that cross the loopback interface, beside the bytes that `traffic`
says. `--plan` prints the table of docs/scaling.md for the machine that its constants describe.
"""

from __future__ import annotations

import argparse
import csv
import resource
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import commit, machine_name

from qflux import make_config, make_model
from qflux.parallel import context_parallel, shard

COLUMNS = [
    "ranks", "tokens", "cpu_seconds", "memory_mb", "loopback_mb", "model_mb", "machine", "torch",
    "commit",
]  # fmt: skip


@dataclass(frozen=True)
class Network:
    """The sizes of a network that count here: cylinders of values, layers, weights, bytes."""

    layers: int
    cylinders: int
    value_dim: int
    hidden: int
    parameters: int
    conv_width: int = 4
    convolutions: int = 2  # a layer
    number: int = 4  # bytes


def traffic(network: Network, tokens: int, ranks: int) -> float:
    """Bytes that a rank receives in a step for one sequence, gradients of the weights aside.

    Keys and values are gathered in the forward, and again in the backward; their gradients are
    summed and scattered. A convolution needs the tokens before each of its two chunks, and gives
    their gradients back.
    """
    width = network.cylinders * (2 + network.value_dim)
    gathered = 3 * tokens * width * network.number * (ranks - 1) / ranks
    halo = 2 * 2 * (network.conv_width - 1) * network.hidden * network.number
    return network.layers * (gathered + network.convolutions * halo * (ranks > 1))


def pairs(network: Network, tokens: int, ranks: int) -> float:
    """Causal pairs of a rank in the forward of one sequence."""
    return network.layers * network.cylinders * tokens * (tokens + 1) / 2 / ranks


def loopback() -> int:
    """Bytes that the loopback interface has received so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise SystemExit("/proc/net/dev has no loopback interface")


def resident() -> float:
    """Largest memory of this process so far, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def work(rank: int, ranks: int, port: int, tokens: int, steps: int, out) -> None:
    """Some steps of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    model = make_model(network_config(tokens))
    ids = torch.randint(256, (1, tokens))

    def step(length: int) -> None:
        with context_parallel(mesh, length):
            part = shard(ids[:, :length], mesh)
            model(part, labels=part).loss.backward()
        model.zero_grad()

    step(64 * ranks)
    dist.barrier()
    memory, received, seconds = resident(), loopback(), []
    for _ in range(steps):
        begin = time.process_time()
        step(tokens)
        seconds.append(time.process_time() - begin)
    dist.barrier()
    received = (loopback() - received) / steps / ranks / 1e6
    out.put((statistics.median(seconds), resident() - memory, received))
    dist.destroy_process_group()


def network_config(tokens: int):
    """The network that is measured."""
    return make_config(
        "lm", 256, num_layers=4, hidden_dim=128, num_cylinders=16, context_length=tokens
    )


def described(tokens: int) -> Network:
    """Its sizes."""
    config = network_config(tokens)
    return Network(
        config.num_layers, config.num_cylinders, config.value_dim, config.hidden_dim, 0,
        config.conv_width,
    )  # fmt: skip


def measure(ranks: int, tokens: int, steps: int) -> dict[str, object]:
    """The row of so many processes; of seconds and memory the largest over them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    out = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (ranks, port, tokens, steps, out), nprocs=ranks)
    seconds, memory, received = zip(*(out.get() for _ in range(ranks)), strict=True)
    return {
        "ranks": ranks,
        "tokens": tokens,
        "cpu_seconds": round(max(seconds), 3),
        "memory_mb": round(max(memory), 1),
        "loopback_mb": round(max(received), 2),
        "model_mb": round(traffic(described(tokens), tokens, ranks) / 1e6, 2),
        "machine": machine_name(),
        "torch": torch.__version__,
        "commit": commit(),
    }


# The machine of the plan: one H200 of eight in a node, and nodes on 400 Gbit/s a GPU.
PAIRS_A_SECOND = 1e12  # forward and backward together, with values; an assumption
NODE_BYTES, NETWORK_BYTES = 350e9, 40e9  # a second, of what is left of 450 and 50
LATENCY = 10e-6  # seconds a collective and hop
GPU_BYTES = 141e9
PLANNED = Network(
    layers=24, cylinders=64, value_dim=16, hidden=1024, parameters=400_000_000, number=2
)


def plan() -> list[tuple[str, ...]]:
    """For sequences and GPUs: bytes, seconds for pairs and for the network, memory."""
    rows = [("tokens", "GPUs", "GB received", "s pairs", "s network", "s latency", "GB a GPU")]
    for tokens in (10**6, 10**7, 10**8, 10**9):
        for ranks in (8, 64, 1024):
            received = traffic(PLANNED, tokens, ranks)
            speed = NODE_BYTES if ranks <= 8 else NETWORK_BYTES
            calls = PLANNED.layers * (3 * 4 + 4)
            own = tokens / ranks * PLANNED.layers * 30 * PLANNED.hidden * PLANNED.number
            passing = tokens * PLANNED.cylinders * (2 + PLANNED.value_dim) * PLANNED.number / 2
            weights = PLANNED.parameters * 16 / ranks
            rows.append((
                f"{tokens:,}", f"{ranks:,}", f"{received / 1e9:,.1f}",
                f"{pairs(PLANNED, tokens, ranks) / PAIRS_A_SECOND:,.3g}",
                f"{received / speed:,.3g}", f"{calls * LATENCY * (ranks - 1):,.3g}",
                f"{(own + passing + weights) / 1e9:,.1f}",
            ))  # fmt: skip
    return rows


def main() -> None:
    """Measure, or plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plan", action="store_true")
    arguments = parser.parse_args()
    if arguments.plan:
        for row in plan():
            print("| " + " | ".join(row) + " |")
        return
    rows = [measure(ranks, arguments.tokens, arguments.steps) for ranks in arguments.ranks]
    for row in rows:
        print(row, flush=True)
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
