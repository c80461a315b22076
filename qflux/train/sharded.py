"""Training states of several processes: each writes its part, and any number of them reads it.

A state is a folder of `torch.distributed.checkpoint` with what is no weight in `run.pt` beside it.
Its tensors go by the names of the parameters and not by processes.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import first_line
from .ranks import Ranks, first_line_of
from .step import TrainStep

RUN_PART = "run.pt"
# Where a state that several processes wrote says in which folder its tensors are.
SHARDS = "shards"


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, on_cpu: bool = True
) -> dict[str, Any]:
    """Weights and the state of their optimiser, by the names of the parameters."""
    # Here and below, since one process does without what takes half a second to import.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(cpu_offload=on_cpu)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def write_shards(
    path: Path,
    tensors: dict[str, Any],
    plain: dict[str, Any],
    ranks: Ranks,
    complete: Callable[[], None],
) -> Future[None] | None:
    """Write a state: whatever happens meanwhile, the folder at `path` is not there or whole.

    If the processes have a group for it, `ranks.writers`, the tensors are copied and a thread
    writes the copies.

    Args:
        path: where it will be.
        tensors: as `tensors_of` gives them, a part of them in each process.
        plain: the rest, that of the first process counts.
        ranks: all processes, each of which has to call this.
        complete: what the first process does when the state is there.

    Returns:
        where a thread writes, its end, which has the `OSError` if one could not write; else None.

    Raises:
        OSError: a process cannot write its part; in all of them.
    """
    from torch.distributed.checkpoint.state_dict_saver import async_save, save

    temporary = path.with_name(f".{path.name}.tmp")
    with ranks.together():
        if ranks.first and temporary.exists():
            shutil.rmtree(temporary)

    def finish() -> None:
        if ranks.first:
            _make_whole(temporary, path, plain)
            complete()

    if ranks.writers is None:
        with _named(path):
            save(tensors, checkpoint_id=temporary)
        with ranks.together():
            finish()
        return None
    written: Future[None] = Future()

    def follow(saving: Future[Any]) -> None:
        try:
            with _named(path):
                saving.result()
            finish()
        except BaseException as error:
            written.set_exception(error)
        else:
            written.set_result(None)

    saving = async_save(tensors, checkpoint_id=temporary, process_group=ranks.writers)
    cast("Future[Any]", saving).add_done_callback(follow)
    return written


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What a process could not write of a state is an error that names process and state."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(
            f"{str(path)!r} cannot be written: rank {rank}: {type(cause).__name__}: {cause}"
        ) from None


def _make_whole(temporary: Path, path: Path, plain: dict[str, Any]) -> None:
    """Add to the tensors in a folder what is no tensor, and give it its name."""
    with open(temporary / RUN_PART, "wb") as stream:
        torch.save(plain, stream)
        stream.flush()
        os.fsync(stream.fileno())
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


def read_plain(path: Path) -> dict[str, Any]:
    """What a state has beside its tensors.

    Raises:
        ValueError: it is broken; names the folder.
    """
    try:
        return torch.load(path / RUN_PART, map_location="cpu", weights_only=True)
    # A broken archive raises errors of zip, pickle, PyTorch and the system alike.
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read ({first_line(error)})") from None


def read_shards(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the tensors of a state into a model and its optimiser, however these are divided.

    Raises:
        ValueError: the state is broken or of another model; names the folder.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = tensors_of(model, optimizer)
    try:
        with warnings.catch_warnings():
            # One process without a group is not what it has to be warned of.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({first_line_of(error)})") from None
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )


def parameter_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the parameters of a whole model, in the order of its optimiser."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def put_whole(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, order: list[str]
) -> None:
    """Put the state of a run of one process into a model and an optimiser that are divided.

    Args:
        state: weights by name, and the state of the optimiser by the order of its parameters.
        model, optimizer: what this process has of them.
        order: `parameter_order` of the whole.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    own = {name for name, _ in model.named_parameters()}
    moments = state["learner"]["optimizer"]
    groups, at = [], 0
    for group in moments["param_groups"]:
        count = len(group["params"])
        names = [name for name in order[at : at + count] if name in own]
        groups.append({**group, "params": names})
        at += count
    found = {order[number]: value for number, value in moments["state"].items()}
    set_state_dict(
        model,
        optimizer,
        model_state_dict={name: value for name, value in state["model"].items() if name in own},
        optim_state_dict={
            "state": {name: value for name, value in found.items() if name in own},
            "param_groups": groups,
        },
        options=StateDictOptions(full_state_dict=True, strict=False),
    )


def restore(
    state: dict[str, Any], step: TrainStep, ranks: Ranks, order: list[str]
) -> dict[str, Tensor] | None:
    """Put a state, of any number of processes, into what learns in this one.

    `order` is `parameter_order` of the whole model.

    Returns:
        the state of this process's random numbers; None: the run had another number of processes.
    """
    model, shards = step.model, state.get(SHARDS)
    if shards is not None:
        read_shards(Path(shards), model, step.optimizer)
        step.scaler.load_state_dict(state["scaler"])
    elif ranks.size > 1:
        put_whole(state, model, step.optimizer, order)
        step.scaler.load_state_dict(state["learner"]["scaler"])
    else:
        model.load_state_dict(state["model"])
        step.load_state_dict(state["learner"])
    drawn = state.get("random_states", [state["random_state"]])
    return drawn[ranks.rank] if len(drawn) == ranks.size else None
