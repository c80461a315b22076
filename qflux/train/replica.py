"""A model as the processes of a run hold it: whole, whole in each, or in shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ..models.base import CausalLM
from ..models.output import LayerRecord
from ..text.windows import IGNORED_LABEL, evaluation_batches
from .options import TrainingOptions
from .ranks import Ranks

# PyTorch 2.13 renames it and warns of the old name. Buffers never change.
_KEPT_BUFFERS: dict[str, Any] = {
    name: False
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
}
if len(_KEPT_BUFFERS) > 1:
    del _KEPT_BUFFERS["broadcast_buffers"]


def replicated(module: nn.Module, replicas: DeviceMesh) -> nn.Module:
    """The module whole in each process, with gradients that are reduced."""
    return DistributedDataParallel(module, process_group=replicas.get_group(), **_KEPT_BUFFERS)


def in_shards(module: nn.Module, layers: Iterable[nn.Module], replicas: DeviceMesh) -> None:
    """Give each process a shard of the module's weights; those of a layer come together."""
    # Here and below, since one process does without what takes half a second to import.
    from torch.distributed.fsdp import fully_shard

    # Nothing changes what a layer returns in place, which is what it warns of.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
    for layer in layers:
        fully_shard(layer, mesh=replicas)
    fully_shard(module, mesh=replicas)


class Replica:
    """A model and how its gradients come about.

    With one process it is the model. With several, `parallel="ddp"` keeps it whole in each and
    `"fsdp"` in shards; either way gradients are reduced once a step, by the last part of a batch.

    Args:
        model: of this process; its weights are the same in all processes.
        options: `parallel`, `accumulation` and `compile` count.
        ranks: the processes of the run.
    """

    def __init__(self, model: CausalLM, options: TrainingOptions, ranks: Ranks) -> None:
        self.model, self.options, self.ranks = model, options, ranks
        called: nn.Module = model
        if ranks.replicas is not None and options.parallel == "fsdp":
            in_shards(model, model.layers, ranks.replicas)
        elif ranks.replicas is not None and ranks.replicas.size() > 1:
            called = replicated(model, ranks.replicas)
        self.called = called
        # Evaluation and sampling stay with the model itself: their shapes would compile it anew.
        self.forward: Any = torch.compile(called) if options.compile else called

    def backward(
        self,
        batch: Tensor,
        autocast: Callable[[], AbstractContextManager[object]],
        scaler: torch.amp.GradScaler,
        return_layers: bool,
    ) -> tuple[Tensor, tuple[LayerRecord, ...]]:
        """Add the gradients of a batch `(B, S)`, this process's rows.

        Returns:
            this process's share of the loss, which add up to `data` times that of the whole batch,
            and the records of the layers.
        """
        loss, layers = torch.zeros((), device=batch.device), ()
        parts = batch.chunk(self.options.accumulation)
        with self.ranks.sequences(batch.shape[1]):
            for at, part in enumerate(parts):
                ids = self.ranks.part(part)
                with self.reducing(at == len(parts) - 1):
                    with autocast():
                        output = self.forward(ids, labels=ids, return_layers=return_layers)
                    mean = output.loss * (len(part) / len(batch))
                    # Reducing takes the mean over processes, and shares of a sequence add up.
                    scaler.scale(mean * self.ranks.context).backward()
                loss, layers = loss + mean.detach(), output.layers
        return loss, layers

    @contextmanager
    def reducing(self, now: bool) -> Iterator[None]:
        """Meanwhile a backward reduces gradients, or leaves that to a later one."""
        if self.options.parallel == "fsdp":
            cast("Any", self.called).set_requires_gradient_sync(now)
            yield
        elif isinstance(self.called, DistributedDataParallel) and not now:
            with self.called.no_sync():
                yield
        else:
            yield

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradients down to a norm; returns the norm they had."""
        return whole(nn.utils.clip_grad_norm_(parameters, largest))

    @torch.no_grad()
    def loss_sum(self, ids: Tensor, labels: Tensor) -> Tensor:
        """This process's share of the summed loss of windows `(B, S)` in evaluation."""
        with self.ranks.sequences(ids.shape[1]):
            ids, labels = self.ranks.part(ids), self.ranks.part(labels)
            return self.model(ids, labels=labels, num_labels=1).cross_entropy

    def evaluate(self, works: Sequence[Tensor], batch_size: int) -> float:
        """`qflux.evaluate` by all processes together, in equal rounds."""
        ranks, device = self.ranks, next(self.model.parameters()).device
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        rows = -(-batch_size // ranks.data)
        for ids, labels in evaluation_batches(works, self.model.config.context_length, batch_size):
            tokens += int((labels[:, 1:] != IGNORED_LABEL).sum())
            own = slice(ranks.data_rank, None, ranks.data)
            # Windows that count for nothing: whoever shares weights needs this process.
            missing = rows - len(ids[own])
            ids = torch.cat((ids[own], ids[:1].expand(missing, -1)))
            nothing = torch.full_like(labels[:1], IGNORED_LABEL).expand(missing, -1)
            labels = torch.cat((labels[own], nothing))
            total += self.loss_sum(ids.to(device), labels.to(device)).cpu()
        return ranks.sum(total).item() / tokens

    def finite_loss(self, batch: Tensor) -> bool:
        """Whether batches `(B, S)`, one in each process, all have a finite loss."""
        return self.ranks.all(bool(self.loss_sum(batch, batch).isfinite()))

    def weights(self) -> dict[str, Tensor]:
        """All weights by name, on the CPU of the first process; others may get none of them."""
        if self.ranks.size == 1:
            return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast("dict[str, Tensor]", get_model_state_dict(self.model, options=options))


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may have a shard."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
