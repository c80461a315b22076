"""What a step costs each of the processes that share sequences, and what more of them would need.

    python benchmarks/parallel.py --ranks 1 2 4 --tokens 4096 --csv benchmarks/results/parallel.csv
    python benchmarks/parallel.py --wall --tokens 512 2048 8192
    python benchmarks/parallel.py --plan

The first line trains on random tokens with `qflux.parallel.context_parallel` in processes on this
machine and writes a row for each number of them: processor seconds of a process and step, what its
memory grows by, and the bytes that cross the loopback interface, beside the bytes that `traffic`
says. `--wall` compares the time of a step with what its pairs, its bytes and its calls should take,
by the pairs of one process and by bytes and calls that are timed alone. `--plan` prints the table
of docs/scaling.md for the machine that its constants describe.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import commit, machine_name

from qflux import make_config, make_model
from qflux.parallel import collectives, context_parallel, shard
from qflux.parallel.interaction import GROUP_BYTES, GROUPS

COLUMNS = [
    "ranks", "tokens", "cpu_seconds", "memory_mb", "loopback_mb", "model_mb", "machine", "torch",
    "commit",
]  # fmt: skip


WALL_COLUMNS = [
    "ranks", "tokens", "wall_seconds", "predicted_seconds", "pairs_seconds", "bytes_seconds",
    "calls_seconds", "calls", "counted_calls", "call_microseconds", "gb_per_second", "machine",
    "torch", "commit",
]  # fmt: skip
# What the profiler calls collectives and exchanges.
WAITS = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::alltoall_base_")
# What gloo moves for a byte of `traffic`: it sums for everyone in the place of reduce-scatter.
GLOO = 4 / 3


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


def calls(network: Network, tokens: int) -> int:
    """Collectives and exchanges of a step that a rank waits for."""
    size = network.cylinders * (2 + network.value_dim) * tokens * network.number
    groups = max(1, min(GROUPS, network.cylinders, size // GROUP_BYTES))
    return network.layers * (3 * groups + 2 * network.convolutions)


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


def fastest(function: Callable[[], object], times: int) -> float:
    """The least seconds of a call, of so many."""
    seconds = []
    for _ in range(times):
        dist.barrier()
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def time_walls(rank: int, ranks: int, port: int, lengths: list[int], steps: int, out) -> None:
    """For each length the least wall time of a step and its calls; a call and a byte alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    group = mesh.get_group()
    small, large = torch.zeros(16), torch.zeros(2**20)
    call = fastest(lambda: collectives.start_gathering(small, group).wait(), 200)
    rest = fastest(lambda: collectives.start_gathering(large, group).wait(), 20) - call
    a_byte = rest / (large.nbytes * (ranks - 1)) if ranks > 1 else 0.0
    for tokens in lengths:
        torch.manual_seed(0)
        model, ids = make_model(network_config(tokens)), torch.randint(256, (1, tokens))

        def step(model=model, ids=ids, tokens=tokens) -> None:
            with context_parallel(mesh, tokens):
                part = shard(ids, mesh)
                model(part, labels=part).loss.backward()
            model.zero_grad()

        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            step()
        counted = sum(event.count for event in seen.key_averages() if event.key in WAITS)
        out.put((tokens, counted, fastest(step, steps), call, a_byte))
    dist.destroy_process_group()


def compare_walls(ranks: list[int], lengths: list[int], steps: int) -> list[dict[str, object]]:
    """Rows of measured and predicted wall times; of one process they are what is predicted from."""
    alone: dict[int, float] = {}
    rows, cores = [], os.cpu_count() or 1
    for count in sorted({1, *ranks}):
        found: dict[int, tuple[float, ...]] = {}
        for tokens, *numbers in spawned(time_walls, count, lengths, steps):
            # The slowest process is the one that the others wait for.
            found[tokens] = tuple(map(max, found.get(tokens, numbers), numbers))
        for tokens, (counted, wall, call, a_byte) in found.items():
            alone.setdefault(tokens, wall)
            network = described(tokens)
            pairs_seconds = alone[tokens] / count * max(1.0, count / cores)
            bytes_seconds = GLOO * traffic(network, tokens, count) * a_byte
            waits = calls(network, tokens) * (count > 1)
            rows.append({
                "ranks": count, "tokens": tokens, "wall_seconds": round(wall, 4),
                "predicted_seconds": round(pairs_seconds + bytes_seconds + waits * call, 4),
                "pairs_seconds": round(pairs_seconds, 4),
                "bytes_seconds": round(bytes_seconds, 4),
                "calls_seconds": round(waits * call, 4), "calls": waits,
                "counted_calls": int(counted), "call_microseconds": round(call * 1e6, 1),
                "gb_per_second": round(1e-9 / a_byte, 3) if a_byte else "",
                "machine": machine_name(), "torch": torch.__version__, "commit": commit(),
            })  # fmt: skip
    return rows


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


def spawned(function: Callable[..., None], ranks: int, *given: object) -> list[tuple]:
    """What so many processes put out."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    out, results = mp.get_context("spawn").SimpleQueue(), []
    mp.spawn(function, (ranks, port, *given, out), nprocs=ranks)
    while not out.empty():
        results.append(out.get())
    return results


def measure(ranks: int, tokens: int, steps: int) -> dict[str, object]:
    """The row of so many processes; of seconds and memory the largest over them."""
    seconds, memory, received = zip(*spawned(work, ranks, tokens, steps), strict=True)
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
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plan", action="store_true")
    arguments = parser.parse_args()
    if arguments.plan:
        for row in plan():
            print("| " + " | ".join(row) + " |")
        return
    if arguments.wall:
        columns = WALL_COLUMNS
        rows = compare_walls(arguments.ranks, arguments.tokens, arguments.steps)
    else:
        columns = COLUMNS
        rows = [
            measure(ranks, tokens, arguments.steps)
            for tokens in arguments.tokens
            for ranks in arguments.ranks
        ]
    for row in rows:
        print(row, flush=True)
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
