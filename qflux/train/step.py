"""How a batch changes a model: by backpropagation, by the delta rule, or by both."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.base import CausalLM
from .hebbian import apply_update, delta_rule, largest_moment
from .schedules import learning_rate_at

if TYPE_CHECKING:
    from .loop import TrainingOptions

LEARNING = ("backprop", "hebbian", "hybrid")
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Taken(NamedTuple):
    """What a step did: loss and gradient norm on the device, the rate, the layers' metrics."""

    loss: Tensor
    norm: Tensor
    rate: float
    layers: tuple[NamedTuple, ...]


class Learner:
    """How a batch changes a model: by backpropagation, by the delta rule, or by both.

    Args:
        model: what learns.
        options: `learning`, its rates, `precision`, `accumulation` and `max_gradient_norm` count.
        device: of the model.
    """

    def __init__(self, model: CausalLM, options: TrainingOptions, device: torch.device) -> None:
        self.model, self.options = model, options
        self.optimizer = make_optimizer(model, options)
        self.moved = [p for group in self.optimizer.param_groups for p in group["params"]]
        dtype = PRECISIONS[options.precision]
        self.autocast = partial(
            torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(self, batch: Tensor, share: float) -> Taken:
        """Learn from token ids `(B, S)` when `share` of the run is behind."""
        options = self.options
        rate = learning_rate_at(share, options.learning_rate, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if options.learning == "backprop":
            return self._backpropagate(batch, rate)
        return self._hebbian(batch, rate, share)

    def _backpropagate(self, batch: Tensor, rate: float) -> Taken:
        self.optimizer.zero_grad()
        loss = 0.0
        for part in batch.chunk(self.options.accumulation):
            with self.autocast():
                output = self.model(part, labels=part)
            mean = output.loss * (len(part) / len(batch))
            self.scaler.scale(mean).backward()
            loss = loss + mean.detach()
        return Taken(loss, self._move(), rate, getattr(output, "layers", ()))

    def _hebbian(self, batch: Tensor, rate: float, share: float) -> Taken:
        options, model = self.options, self.model
        hybrid = options.learning == "hybrid"
        self.optimizer.zero_grad()
        updates, moment = [], 0.0
        for part in batch.chunk(options.accumulation):
            with torch.set_grad_enabled(hybrid), self.autocast():
                features = model.features(part)[:, :-1].flatten(0, 1)
            heard = features.detach().float()
            weight = len(part) / len(batch)
            moment = moment + weight * largest_moment(heard)
            update = delta_rule(
                model.head,
                heard,
                part[:, 1:].flatten(),
                error=options.hebbian_error,
                features_gradient=hybrid,
            )
            if hybrid:
                features.backward(weight * update.features.to(features.dtype))
            updates.append((weight, update))
        loss = sum(weight * update.loss for weight, update in updates)
        norm = self._move() if hybrid else torch.zeros_like(loss)
        step = learning_rate_at(share, options.hebbian_rate, options.warmup)
        for weight, update in updates:
            apply_update(model.head, update, weight * step / moment)
        return Taken(loss, norm, rate if hybrid else step, ())

    def _move(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.moved, self.options.max_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def state_dict(self) -> dict[str, object]:
        """What has to be kept to go on exactly."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def checkpoint_layers(model: nn.Module) -> None:
    """Let every layer of `model.layers` be recomputed in the backward pass, random draws included.

    Source: first seed, section 7.4.
    """
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW that decays the weights of linear maps and convolutions only.

    Biases, norms, time steps, frequencies, and the radii and phases of the embedding have no
    reason to be small. An output layer that learns by the delta rule is left out.
    """
    own_rule = set(map(id, model.head.parameters())) if options.learning == "hybrid" else set()
    decayed = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d) and id(module.weight) not in own_rule
    ]
    chosen = set(map(id, decayed)) | own_rule
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99))
