"""How a batch changes a model: by backpropagation, by the delta rule, or by both."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..models.base import CausalLM
from ..models.output import LayerRecord
from .graph import CudaRecorder, GraphedStep
from .hebbian import apply_update, delta_rule, largest_moment
from .optimizer import choose_kernel, make_autocast, make_optimizer, make_scaler
from .options import TrainingOptions
from .ranks import Ranks
from .replica import Replica
from .schedules import learning_rate_at


class StepResult(NamedTuple):
    """What a step did.

    loss: of the batch before the step, in nats a token; norm: of the gradients before they were
    clipped; both without dimensions, on the device. rate: the learning rate. layers: the records of
    the layers, those of the last part of an accumulated batch, or empty.
    """

    loss: Tensor
    norm: Tensor
    rate: float
    layers: tuple[LayerRecord, ...]


class TrainStep:
    """How a batch changes a model: by backpropagation, by the delta rule, or by both.

    Args:
        model: what learns.
        options: `learning`, its rates and their schedule, `precision`, `accumulation`, and those of
            the optimiser count.
        device: of the model.
        replica: the model as the processes of a run hold it; default: one has it.
    """

    def __init__(
        self,
        model: CausalLM,
        options: TrainingOptions,
        device: torch.device,
        replica: Replica | None = None,
    ) -> None:
        self.model, self.options = model, options
        self.replica = Replica(model, options, Ranks()) if replica is None else replica
        # Where the delta rule learns, steps run the model up to what its output layer reads.
        delta = options.compile and options.learning != "backprop"
        self.features: Any = torch.compile(model.features) if delta else model.features
        own_rule = model.head.parameters() if options.learning == "hybrid" else ()
        self.optimizer = make_optimizer(model, options, exclude=own_rule)
        self.moved = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.autocast = make_autocast(device, options.precision)
        self.scaler = make_scaler(device, options.precision)
        self.graphed: GraphedStep | None = None
        if options.cuda_graph:
            self.graphed = GraphedStep(
                lambda batch: self._backpropagate(batch, False)[:2], CudaRecorder(device)
            )
        self._settle_optimizer()

    def __call__(
        self, batch: Tensor, progress: float, *, return_layers: bool = False
    ) -> StepResult:
        """Learn from a batch.

        Args:
            batch: token ids `(B, S)`.
            progress: how much of the run is behind, in [0, 1].
            return_layers: return the records of the layers too. The delta rule alone has none.
        """
        options = self.options
        rate = learning_rate_at(progress, options.learning_rate, options.warmup)
        self._set_rate(rate)
        if options.learning != "backprop":
            return self._hebbian(batch, rate, progress)
        # The growth of the radii is a number that a graph would keep.
        if self.graphed is None or return_layers or progress < options.radius_warmup:
            loss, norm, layers = self._backpropagate(batch, return_layers)
            return StepResult(loss, norm, rate, layers)
        loss, norm = self.graphed(batch)
        return StepResult(loss, norm, rate, ())

    def _backpropagate(
        self, batch: Tensor, return_layers: bool
    ) -> tuple[Tensor, Tensor, tuple[LayerRecord, ...]]:
        self.optimizer.zero_grad()
        loss, layers = self.replica.backward(batch, self.autocast, self.scaler, return_layers)
        return loss, self._move(), layers

    def _hebbian(self, batch: Tensor, rate: float, progress: float) -> StepResult:
        options, model = self.options, self.model
        hybrid = options.learning == "hybrid"
        self.optimizer.zero_grad()
        updates, moment = [], 0.0
        loss = torch.zeros((), device=batch.device)
        for part in batch.chunk(options.accumulation):
            with torch.set_grad_enabled(hybrid), self.autocast():
                features = self.features(part)[:, :-1].flatten(0, 1)
            inputs = features.detach().float()
            weight = len(part) / len(batch)
            moment = moment + weight * largest_moment(inputs)
            update = delta_rule(
                model.head,
                inputs,
                part[:, 1:].flatten(),
                error=options.hebbian_error,
                features_gradient=hybrid,
            )
            if update.features is not None:
                features.backward(weight * update.features.to(features.dtype))
            updates.append((weight, update))
            loss = loss + weight * update.loss
        norm = self._move() if hybrid else torch.zeros_like(loss)
        hebbian_rate = learning_rate_at(progress, options.hebbian_rate, options.warmup)
        for weight, update in updates:
            apply_update(model.head, update, weight * hebbian_rate / moment)
        return StepResult(loss, norm, rate if hybrid else hebbian_rate, ())

    def _move(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = self.replica.clip(self.moved, self.options.max_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to go on exactly."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._settle_optimizer()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if self.graphed is None:
                group["lr"] = rate
            else:
                group["lr"].fill_(rate)

    def _settle_optimizer(self) -> None:
        """Rates and counts of steps where graphs read them, or where the optimiser is fastest.

        Both are part of a state, which may come from a run of the other kind.
        """
        choose_kernel(self.optimizer)
        device = self.moved[0].device
        on_gpu = self.graphed is not None and device.type == "cuda"
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = rate if self.graphed is None else torch.tensor(rate, device=device)
            group["capturable"] = on_gpu
            for parameter in group["params"]:
                if (own := self.optimizer.state.get(parameter)) and "step" in own:
                    own["step"] = own["step"].to(parameter.device if on_gpu else "cpu")


def checkpoint_layers(model: CausalLM) -> None:
    """Let every layer of `model.layers` be recomputed in the backward pass, random draws included.

    Source: the Flux document, section 7.4.
    """
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
