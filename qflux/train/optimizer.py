"""The optimiser of a model, the precision of its matrix products, and the scale of its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from .options import OptimizerOptions, Precision


def make_optimizer(
    model: nn.Module, options: OptimizerOptions, *, exclude: Iterable[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW that decays the weights of linear maps and convolutions only.

    Biases, norms, time steps, frequencies, and the radii and phases of the embedding have no
    reason to be small.

    Args:
        model: whose parameters move.
        options: learning rate, betas, eps and weight decay.
        exclude: parameters to leave out, such as those of a layer with a learning rule of its own.
    """
    excluded = set(map(id, exclude))
    decayed = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d) and id(module.weight) not in excluded
    ]
    chosen = set(map(id, decayed)) | excluded
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    first, second = options.betas
    optimizer = torch.optim.AdamW(
        groups, lr=options.learning_rate, betas=(first, second), eps=options.eps
    )
    choose_kernel(optimizer)
    return optimizer


def choose_kernel(optimizer: torch.optim.Optimizer) -> None:
    """Let a step be one kernel where weights are on a CPU: a quarter of the time there.

    It is part of an optimiser's state, which may come from another device.
    """
    for group in optimizer.param_groups:
        group["fused"] = all(p.device.type == "cpu" for p in group["params"]) or None


def make_autocast(
    device: torch.device, precision: Precision
) -> Callable[[], AbstractContextManager[object]]:
    """What opens a context in which matrix products on `device` have that precision."""
    dtype = getattr(torch, precision)
    enabled = precision in ("bfloat16", "float16")
    # A dtype that autocast does not know is a warning, even where it is not enabled.
    return partial(torch.autocast, device.type, dtype=dtype if enabled else None, enabled=enabled)


def make_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """The scaler of the loss, without which small gradients vanish in float16; else disabled."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
