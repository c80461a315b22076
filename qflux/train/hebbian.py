"""Hebbian learning: the delta rule of the output layer, without backpropagation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qflux_kernels.checks import check_choice, check_integer

from ..text.windows import IGNORED_LABEL
from .options import ERRORS, OutputError


class HebbianUpdate(NamedTuple):
    """What `delta_rule` computes.

    weight `(V, H)` and bias `(V,)`: the direction to move the head in, a mean over the tokens.
    features `(T, H)`: gradient of the mean cross entropy with respect to the features, for the
    layers below in hybrid training, or None. loss: that cross entropy in nats a token. error: mean
    absolute error of an output. The last two have no dimensions and stay on the device.
    """

    weight: Tensor
    bias: Tensor
    features: Tensor | None
    loss: Tensor
    error: Tensor


@torch.no_grad()
def delta_rule(
    head: nn.Linear,
    features: Tensor,
    targets: Tensor,
    *,
    error: OutputError = "softmax",
    features_gradient: bool = False,
    chunk: int = 1024,
) -> HebbianUpdate:
    """The Hebbian update of an output layer: what fires together with an error is wired to it.

    With features h_t and the error e_t = onehot(target_t) - output_t,

        weight = mean_t e_t h_t'      bias = mean_t e_t

    where the output is softmax(head(h_t)), or head(h_t) itself with error="logits", the rule of
    the Flux document's program. With "softmax" the update is minus the gradient of the mean cross
    entropy, so the rule is gradient descent on the last layer and needs no backpropagation. With
    "logits" the logits regress to 0 and 1: over V tokens the cross entropy cannot fall below
    ln((e + V - 1) / e).

    Tokens are taken `chunk` at a time and the target is subtracted in place: the largest temporary
    is chunk x V.

    Args:
        head: linear map from H to V, with or without bias.
        features: `(T, H)`.
        targets: `(T,)` integer; tokens with target -100 are left out.
        error: "softmax" (default) or "logits".
        features_gradient: compute `features` of the result as well.
        chunk: tokens at a time, >= 1.

    Raises:
        TypeError, ValueError: naming the argument, its value and the allowed values.

    Source: the Flux document, section 1 ("Linear transformation with Hebbian updates"); the QFNN
    document, "Hebbian Learning".
    """
    check_choice("error", error, ERRORS)
    check_integer("chunk", chunk, 1)
    if features.dim() != 2 or features.shape[1] != head.in_features:
        raise ValueError(
            f"features must have shape (tokens, {head.in_features}), got {tuple(features.shape)}"
        )
    if targets.shape != features.shape[:1]:
        raise ValueError(
            f"targets must have shape {tuple(features.shape[:1])}, got {tuple(targets.shape)}"
        )
    scored = targets != IGNORED_LABEL
    count = scored.sum().clamp(min=1)
    weight = torch.zeros_like(head.weight)
    bias = head.weight.new_zeros(head.out_features)
    gradient = torch.zeros_like(features) if features_gradient else None
    loss = bias.new_zeros(())
    total_error = bias.new_zeros(())
    for first in range(0, len(features), chunk):
        part = slice(first, first + chunk)
        inputs, valid = features[part], scored[part, None]
        target = targets[part].clamp(min=0)[:, None]
        logits = head(inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_normaliser = logits.logsumexp(-1, keepdim=True)
        loss += ((log_normaliser - logits.gather(1, target)) * valid).sum()
        output = (logits - log_normaliser).exp()
        if gradient is not None:
            residual = output.scatter_add(1, target, -torch.ones_like(target, dtype=output.dtype))
            gradient[part] = (residual * valid).to(head.weight.dtype) @ head.weight / count
        if error == "logits":
            output = logits
        output.neg_().scatter_add_(1, target, torch.ones_like(target, dtype=output.dtype))
        output *= valid
        weight += output.T.to(inputs.dtype) @ inputs
        bias += output.sum(0)
        total_error += output.abs().sum()
    return HebbianUpdate(
        weight / count,
        bias / count,
        gradient,
        loss / count,
        total_error / (count * head.out_features),
    )


@torch.no_grad()
def largest_moment(features: Tensor, iterations: int = 8) -> Tensor:
    """The largest eigenvalue of mean_t [h_t, 1] [h_t, 1]', by power iteration; no dimensions.

    A delta rule whose rate is measured in its inverse does not depend on the scale of the features.
    With "softmax" the curvature of the cross entropy is at most half this eigenvalue, so no rate
    below 4 such units raises the loss of the same tokens; early curvature is lower, and more is
    usually faster.

    Args:
        features: `(T, H)`, T >= 1.
        iterations: more of them find it closer, from below.
    """
    direction = features.new_ones(features.shape[1] + 1)
    for _ in range(iterations):
        direction = direction / torch.linalg.vector_norm(direction).clamp(min=1e-30)
        along = features @ direction[:-1] + direction[-1]
        direction = torch.cat((along @ features, along.sum()[None])) / len(features)
    return torch.linalg.vector_norm(direction)


@torch.no_grad()
def apply_update(head: nn.Linear, update: HebbianUpdate, rate: float | Tensor) -> None:
    """Move `head` by `rate` times the update. Call it when no graph needs the old weights."""
    head.weight.add_(rate * update.weight)
    if head.bias is not None:
        head.bias.add_(rate * update.bias)
