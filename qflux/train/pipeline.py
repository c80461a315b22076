"""The layers of a model divided among processes, as `torch.distributed.pipelining` runs them.

Layers of one batch cannot run at the same time, since each needs the states of the one before. What
runs at the same time are parts of the batch in different layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ..models.base import CausalLM, next_token_loss
from ..models.embedding import flatten_states, rotate
from ..models.lm import QuantumFluxLM
from ..models.output import LayerRecord
from .options import TrainingOptions
from .ranks import Group
from .replica import Replica, in_shards, whole


def check_divisible(model: CausalLM, stages: int) -> QuantumFluxLM:
    """Raise unless the layers of a model can be divided among so many processes."""
    if not isinstance(model, QuantumFluxLM):
        raise ValueError(
            "pipeline_parallel is for the architecture 'lm', got "
            f"{model.config.architecture!r}, whose readouts take states of several layers"
        )
    if len(model.layers) < stages:
        raise ValueError(
            f"pipeline_parallel must be at most num_layers = {len(model.layers)}, got {stages}"
        )
    return model


def keep_stage(model: QuantumFluxLM, stage: int, stages: int) -> None:
    """Take away what other stages have; the names of what stays are those of the whole model."""
    count = len(model.layers)
    first, last = (at * count // stages for at in (stage, stage + 1))
    for number in range(count):
        if not first <= number < last:
            model.layers[number] = nn.Identity()
    nothing = cast("Any", None)
    if stage > 0:
        model.embedding = model.projection = model.rotation = nothing
    if stage < stages - 1:
        model.norm = model.head = nothing


def _with_contiguous_gradient(tensor: Tensor) -> Tensor:
    """The tensor, whose gradient goes back to another process, which takes no other."""
    if not tensor.requires_grad:
        return tensor
    seen = tensor.view_as(tensor)
    seen.register_hook(Tensor.contiguous)
    return seen


class Stage(nn.Module):
    """The part of a model between what comes from the stage before and what goes to the next.

    What travels is the hidden stream, the angles of the positions, whose frequencies are learned in
    the first stage, and the states where layers evolve them.
    """

    def __init__(self, model: QuantumFluxLM) -> None:
        super().__init__()
        self.model = model
        self.evolves = any(getattr(layer, "evolution", None) for layer in model.layers)
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        with self.autocast():
            return self._forward(*map(_with_contiguous_gradient, received))

    def _forward(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        model, states = self.model, None
        if model.embedding is not None:
            (ids,) = received
            states = model.embedding(ids)
            hidden = model.projection(flatten_states(states))
            angle = model.rotation(ids.shape[-1])
            states = rotate(states, angle)
        elif self.evolves:
            hidden, angle, states = received
        else:
            hidden, angle = received
        for layer in model.layers:
            if not isinstance(layer, nn.Identity):
                states, hidden, _ = layer(states, hidden, angle)
        if model.head is not None:
            return model.head(model.norm(hidden))
        return (hidden, angle, cast("Tensor", states)) if self.evolves else (hidden, angle)


class PipelinedReplica(Replica):
    """One stage of a model, whole in each of the processes that have it, or in shards.

    The parts of a batch are the microbatches of the pipeline. Layers have no records.
    """

    def __init__(self, model: CausalLM, options: TrainingOptions, ranks: Group) -> None:
        divided = check_divisible(model, ranks.pipeline)
        keep_stage(divided, ranks.stage, ranks.pipeline)
        assert ranks.replicas is not None
        self.model, self.options, self.ranks = divided, options, ranks
        self.group = ranks.mesh["pipeline"].get_group()
        self.stage = Stage(divided)
        self.called = self.stage
        if options.parallel == "fsdp":
            own = [layer for layer in divided.layers if not isinstance(layer, nn.Identity)]
            in_shards(self.stage, own, ranks.replicas)
        # A schedule is for one shape of its parts.
        self._schedules: dict[tuple[bool, torch.Size], Any] = {}

    def _schedule(self, shape: torch.Size, training: bool) -> Any:
        key = training, shape
        if key not in self._schedules:
            ranks, context = self.ranks, self.ranks.context

            def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
                return next_token_loss(logits, ids, ids)[0] * context

            def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
                return next_token_loss(logits, labels, labels, 1)[0]

            device = next(self.model.parameters()).device
            stage = PipelineStage(
                self.called, ranks.stage, ranks.pipeline, device, group=self.group
            )
            parts = self.options.accumulation if training else 1
            kind = Schedule1F1B if parts >= ranks.pipeline else ScheduleGPipe
            loss = mean_loss if training else summed_loss
            self._schedules[key] = kind(stage, parts, loss_fn=loss)
        return self._schedules[key]

    def backward(
        self,
        batch: Tensor,
        autocast: Callable[[], AbstractContextManager[object]],
        scaler: torch.amp.GradScaler,
        return_layers: bool,
    ) -> tuple[Tensor, tuple[LayerRecord, ...]]:
        ranks, losses = self.ranks, []
        self.stage.autocast = autocast
        with ranks.sequences(batch.shape[1]):
            ids = ranks.part(batch)
            given = (ids,) if ranks.stage == 0 else ()
            target = ids if ranks.ends else None
            schedule = self._schedule(ids.shape, training=True)
            schedule.step(*given, target=target, losses=losses, return_outputs=False)
        self.stage.autocast = nullcontext
        if self.options.parallel != "fsdp":
            self._reduce()
        if not ranks.ends:
            return torch.zeros((), device=batch.device), ()
        return torch.stack([loss.detach() for loss in losses]).mean() / ranks.context, ()

    def _reduce(self) -> None:
        """The mean of the gradients over the processes that have this stage, once a step.

        DistributedDataParallel would count a parameter once for each part that is under way.
        """
        assert self.ranks.replicas is not None
        size = self.ranks.replicas.size()
        if size == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.ranks.replicas.get_group())
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, (flat / size).split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        squares = whole(nn.utils.get_total_norm(gradients)).square()
        dist.all_reduce(squares, group=self.group)
        norm = squares.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    @torch.no_grad()
    def loss_sum(self, ids: Tensor, labels: Tensor) -> Tensor:
        ranks, losses = self.ranks, []
        with ranks.sequences(ids.shape[1]):
            ids, labels = ranks.part(ids), ranks.part(labels)
            given = (ids,) if ranks.stage == 0 else ()
            target = labels if ranks.ends else None
            self._schedule(ids.shape, training=False).eval(*given, target=target, losses=losses)
        return losses[0] if ranks.ends else torch.zeros((), device=ids.device)

    def weights(self) -> dict[str, Tensor]:
        options = StateDictOptions(full_state_dict=True)
        own: dict[str, Any] = get_model_state_dict(self.model, options=options)
        assert self.ranks.replicas is not None
        once = self.ranks.replicas.get_local_rank() == 0
        parts = self.ranks.gathered({name: t.cpu() for name, t in own.items()} if once else {})
        return {name: value for part in parts for name, value in part.items()}
