"""Functions that run on several ranks: one group of processes for all the checks of a file."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from datetime import timedelta
from importlib import util
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def load(path: str):
    spec = util.spec_from_file_location(Path(path).stem, path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _work(rank: int, ranks: int, port: int, path: str, names: list[str], out) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    module = load(path)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("context",))
    try:
        for name in names:
            torch.manual_seed(0)
            error = None
            try:
                getattr(module, name)(mesh)
            except Exception:
                error = f"rank {rank}: {traceback.format_exc()}"
                # Where the other ranks wait for this one, the group ends without a report.
                print(error, file=sys.stderr, flush=True)
            errors: list[str | None] = [None] * ranks
            dist.all_gather_object(errors, error)
            if rank == 0:
                out.put((name, "\n".join(filter(None, errors))))
    finally:
        dist.destroy_process_group()


def run(ranks: int, path: str, names: list[str]) -> dict[str, str]:
    """The errors of each function of the file, "" for none, from so many processes.

    A function gets the mesh of all ranks. A failure that not all ranks have ends the group: later
    functions have "not reached".
    """
    out = mp.get_context("spawn").SimpleQueue()
    ended = ""
    try:
        mp.spawn(_work, (ranks, free_port(), path, names, out), nprocs=ranks)
    except Exception as error:
        ended = f": {error}"
    found = {}
    while not out.empty():
        name, text = out.get()
        found[name] = text
    return {name: found.get(name, f"not reached{ended}") for name in names}
