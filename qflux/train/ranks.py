"""The processes of a run: which part each of them has, and what they tell one another.

`torchrun` starts them and says in the environment how many there are; nothing here does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from ..models.config import ModelConfig
from ..parallel import context_parallel, shard
from .checkpoint import first_line
from .options import TrainingOptions

# What errors of gloo, NCCL and the store say when another process is gone or does not answer.
_LOST = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket", "broken pipe")


class LostRankError(RuntimeError):
    """Another process of the run is gone, or has not answered in time."""


class RankError(ValueError):
    """Another process of the run could not begin; says which and why."""


class Ranks:
    """A run of one process; `Group` is one of several.

    rank, size: this process and how many there are. data: the processes that get batches of their
    own, and `data_rank` is which of them this one is. context: those that share each sequence.
    pipeline: those that share the layers, and `stage` is the part that this one has. writers: all
    of them once more, for what they tell one another beside training; None: nothing.
    """

    rank, size = 0, 1
    data, data_rank = 1, 0
    context = 1
    pipeline, stage = 1, 0
    replicas: DeviceMesh | None = None
    writers: dist.ProcessGroup | None = None

    def describe(self, options: TrainingOptions) -> str:
        """How the processes divide the work, in words."""
        return (
            f"{self.size}: {self.data} of data ({options.parallel or 'ddp'}) x "
            f"{self.context} of context x {self.pipeline} of pipeline"
        )

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def ends(self) -> bool:
        """Whether this process has the last layers, and so the loss."""
        return self.stage == self.pipeline - 1

    def rows(self, count: int) -> slice:
        """Those of a batch of `count` windows that are this process's."""
        share = count // self.data
        return slice(self.data_rank * share, (self.data_rank + 1) * share)

    def sequences(self, length: int) -> AbstractContextManager[object]:
        """Meanwhile sequences of so many tokens are split, if processes share them."""
        return nullcontext()

    def part(self, tensor: Tensor) -> Tensor:
        """This process's part of sequences `(B, S)`."""
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over all processes."""
        return list(numbers)

    def all(self, flag: bool) -> bool:
        """Whether it is so in all processes."""
        return self.largest(float(not flag)) == [0.0]

    def gathered(self, value: Any) -> list[Any]:
        """A plain value of every process, in the order of their ranks."""
        return [value]

    def from_first(self, value: Any) -> Any:
        """A plain value of the first process."""
        return value

    @contextmanager
    def first_alone(self, name: str) -> Iterator[None]:
        """The first process does this before the others do."""
        yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process fails in all of them; no collective may happen inside."""
        yield

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise in all processes unless all have the same facts."""


class Group(Ranks):
    """A run of several processes, in the default process group.

    Args:
        options: how they divide the work.
        device: of the model.
    """

    _made = 0  # runs of this process so far

    def __init__(self, options: TrainingOptions, device: torch.device) -> None:
        Group._made += 1
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.context, self.pipeline = options.context_parallel, options.pipeline_parallel
        self.data = self.size // (self.context * self.pipeline)
        shape = (self.pipeline, self.data, self.context)
        names = ("pipeline", "data", "context")
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        # The processes that have the same layers, whose gradients are reduced.
        self.replicas = init_device_mesh(
            device.type, (shape[0], shape[1] * shape[2]), mesh_dim_names=("stage", "replicas")
        )["replicas"]
        self.stage, self.data_rank, _ = self.mesh.get_coordinate() or (0, 0, 0)
        if options.async_save:
            limit = timedelta(seconds=options.rank_timeout)
            self.writers = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=limit))

    def sequences(self, length: int) -> AbstractContextManager[object]:
        if self.context == 1:
            return nullcontext()
        return context_parallel(self.mesh["context"], length)

    def part(self, tensor: Tensor) -> Tensor:
        return tensor if self.context == 1 else shard(tensor, self.mesh["context"])

    def sum(self, tensor: Tensor) -> Tensor:
        result = tensor.detach().clone()
        dist.all_reduce(result)
        return result

    def largest(self, *numbers: float) -> list[float]:
        result = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
        return result.tolist()

    def gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: Any) -> Any:
        found = [value]
        dist.broadcast_object_list(found)
        return found[0]

    @contextmanager
    def first_alone(self, name: str) -> Iterator[None]:
        store = dist.distributed_c10d._get_default_store()
        key = f"qflux/{self._made}/{name}"
        if self.first:
            try:
                yield
            finally:
                store.set(key, "done")
        else:
            # It may take long; what ends the first process has torchrun end this one.
            store.wait([key], timedelta(days=7))
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        error: BaseException | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        said = self.gathered(None if error is None else first_line_of(error))
        if error is not None:
            raise error
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None]
        if failed:
            raise RankError(failed[0])

    def agree(self, facts: Mapping[str, Any]) -> None:
        found = self.gathered(dict(facts))
        for name in facts:
            for rank, theirs in enumerate(found):
                if theirs.get(name) != found[0].get(name):
                    raise ValueError(
                        f"all ranks must have the same {name}: rank 0 has "
                        f"{_short(found[0].get(name))} and rank {rank} has "
                        f"{_short(theirs.get(name))}"
                    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def first_line_of(error: BaseException) -> str:
    """What an error says, on one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def check_ranks(options: TrainingOptions, size: int) -> None:
    """Raise unless so many processes can divide the work as the options say.

    Raises:
        ValueError: in every process, since all know the same.
    """
    context, pipeline = options.context_parallel, options.pipeline_parallel
    if size % (context * pipeline):
        raise ValueError(
            f"context_parallel {context} x pipeline_parallel {pipeline} must divide the number of "
            f"processes, got {size}"
        )
    data = size // (context * pipeline)
    if options.batch_size % data:
        raise ValueError(
            f"batch_size must be a multiple of the {data} processes that get windows of their own, "
            f"got {options.batch_size}"
        )
    share = options.batch_size // data
    if pipeline > 1 and share % options.accumulation:
        raise ValueError(
            f"accumulation must divide the {share} windows of a process, whose parts follow one "
            f"another through the pipeline, got {options.accumulation}"
        )
    if size == 1:
        return
    for name, wanted in (("learning", "backprop"), ("precision", None)):
        value = getattr(options, name)
        if wanted is not None and value != wanted:
            raise ValueError(f"several processes need {name}={wanted!r}, got {value!r}")
    if options.precision == "float16" and (options.parallel == "fsdp" or pipeline > 1):
        raise ValueError(
            "precision must not be 'float16' for parallel='fsdp' or pipeline_parallel, whose "
            "gradients are not scaled: give 'bfloat16' or 'float32'"
        )
    if options.cuda_graph:
        raise ValueError(f"cuda_graph is for one process, got {size}")
    if options.compile and context * pipeline > 1:
        raise ValueError("compile goes with neither context_parallel nor pipeline_parallel")


def check_windows(config: ModelConfig, options: TrainingOptions) -> None:
    """Raise unless windows can be split over the processes that share sequences."""
    chunks = 2 * options.context_parallel
    shortest = min(options.curriculum_length or config.context_length, config.context_length)
    needed = chunks * max(1, getattr(config, "conv_width", 0) - 1)
    if chunks > 2 and shortest < needed:
        raise ValueError(
            f"context_parallel {options.context_parallel} needs windows of at least {needed} "
            f"tokens, since a convolution looks back from each of {chunks} chunks, got {shortest}"
        )


def same_division(options: TrainingOptions) -> None:
    """Raise in all processes unless they would divide the work in the same way."""
    names = ("parallel", "context_parallel", "pipeline_parallel", "batch_size", "async_save")
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [getattr(options, name) for name in names])
    for rank, theirs in enumerate(found):
        for name, first, other in zip(names, found[0], theirs, strict=True):
            if first != other:
                raise ValueError(
                    f"all ranks must have the same {name}: rank 0 has {first!r} and rank {rank} "
                    f"has {other!r}"
                )


def own_device(name: str) -> str:
    """The device of this process, where several of one machine would take the same GPU."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "cuda" and local is not None else name


@contextmanager
def joined(options: TrainingOptions, device: torch.device) -> Iterator[Ranks]:
    """The processes of this run, which are in one group meanwhile.

    Raises:
        ValueError: the number of processes does not fit the options.
        LostRankError: a process is missing, or was lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    divided = options.context_parallel * options.pipeline_parallel > 1 or options.parallel
    divided = divided or options.async_save
    if size == 1 and not dist.is_initialized():
        if divided:
            raise ValueError(
                "parallel, context_parallel, pipeline_parallel and async_save need several "
                "processes: torchrun --nproc-per-node N -m qflux train ..."
            )
        yield Ranks()
        return
    there = dist.is_initialized()
    check_ranks(options, dist.get_world_size() if there else size)
    if not there:
        limit = timedelta(seconds=options.rank_timeout)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store, rank, size = next(rendezvous("env://", timeout=limit))
            # Where torchrun starts processes again, the addresses of those before are still there.
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group(
                backend,
                timeout=limit,
                store=PrefixStore(f"restart {again}", store),
                rank=rank,
                world_size=size,
            )
        except (RuntimeError, OSError) as error:
            raise LostRankError(
                f"not all of the {size} processes came within rank_timeout "
                f"{options.rank_timeout:g} s: {first_line(error)}"
            ) from None
    try:
        # Groups within groups are made by all alike, or never.
        same_division(options)
        yield Group(options, device)
    except RuntimeError as error:
        text = first_line(error).lower()
        if isinstance(error, LostRankError) or not any(word in text for word in _LOST):
            raise
        raise LostRankError(
            f"rank {dist.get_rank()} has lost another of the {dist.get_world_size()} processes "
            f"({first_line(error)}); torchrun ... --resume goes on from the last saved state"
        ) from error
    # Only where all went well: the others of a broken group do not answer.
    if not there:
        dist.destroy_process_group()
