"""The attention of a layer of the language model, all of it between its linear maps in one op."""

from __future__ import annotations

import torch

from . import functional
from .arguments import is_plain_call
from .autograd import Gradient, OpFunction
from .backends import LOAD_ERROR
from .options import ALGORITHMS
from .schema import ATTENTION, ATTENTION_BACKWARD

_AUTO = ALGORITHMS.index("auto")


class _AttentionBackward(Gradient):
    op = ATTENTION_BACKWARD

    @staticmethod
    def forward(
        grad, projected, own, turns, scale, norm_weight, norm_bias, eps, value_dim, *left
    ):  # fmt: skip
        return _BACKWARD(
            grad, projected, own, turns, scale, norm_weight, norm_bias, eps, value_dim, _AUTO, *left
        )


class _Attention(OpFunction):
    op = ATTENTION

    @staticmethod
    def forward(projected, own, angle, scale, norm_weight, norm_bias, eps, value_dim):
        turns = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
        results = _FORWARD(
            projected, own, turns, scale, norm_weight, norm_bias, eps, value_dim, _AUTO
        )
        return *results, turns

    @staticmethod
    def setup_context(ctx, inputs, output):
        projected, own, _, scale, norm_weight, norm_bias, ctx.eps, ctx.value_dim = inputs
        _, *left, turns = output
        ctx.mark_non_differentiable(*left, turns)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(projected, own, turns, scale, norm_weight, norm_bias, *left)

    @staticmethod
    def backward(ctx, grad, *_):
        projected, own, turns, scale, norm_weight, norm_bias, *left = ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        # Nobody transforms what `serves` has let through: recording alone needs the Function.
        run = _AttentionBackward.run if torch.is_grad_enabled() else _AttentionBackward.forward
        grads = run(
            grad, projected, own, turns, scale, norm_weight, norm_bias, ctx.eps, ctx.value_dim,
            *left,
        )  # fmt: skip
        needs = ctx.needs_input_grad[:6]
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


def serves(projected: torch.Tensor, angle: torch.Tensor, scale: torch.Tensor, backend: str) -> bool:
    """Whether `attend` takes these: float32 or float64 on a CPU, called eagerly, by nobody else.

    What traces, transforms or serves the calls of `interact` has to see them.
    """
    return (
        LOAD_ERROR is None
        and backend in ("auto", "cpu")
        and angle.dim() == 2
        and is_plain_call(projected, angle, scale)
        and not functional.is_served()
    )


def attend(
    projected: torch.Tensor,
    own: torch.Tensor | None,
    angle: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    value_dim: int,
) -> torch.Tensor:
    """What a layer's attention makes of the projections of its input, for its output map.

    Queries and keys are turned by the angles of their positions; with the weights of
    `Sparsemax(scale)` each of C cylinders gathers the values that came before; a value of the
    token's own is added; LayerNorm follows, and the gates as silu. `GeometricAttention` says the
    same by modules, and is what this is tested against. In place of a dozen passes, each with a
    tensor of its own, there are the pairs and two passes over tokens; the gradients of all
    projections are written where the linear map reads them. Bitwise repeatable.

    Args:
        projected: `(B, S, 4 C + 2 C D)`: queries `(C, 2)`, keys, values `(C, D)` and gates; or
            `(B, S, 4 C + 3 C D)`, with own values behind them.
        own: `(B, S, C D)`, own values that are none of the projections; None: they are, or are
            the values.
        angle: `(C, S)`, radians.
        scale: `(C,)`.
        norm_weight, norm_bias: `(C D,)` of LayerNorm, or None.
        eps: of LayerNorm.
        value_dim: D.

    Returns:
        `(B, S, C D)`.
    """
    return _Attention.run(projected, own, angle, scale, norm_weight, norm_bias, eps, value_dim)[0]


if LOAD_ERROR is None:
    # The overloads themselves, which a call finds faster.
    _FORWARD = torch.ops.qflux_kernels.attention.default
    _BACKWARD = torch.ops.qflux_kernels.attention_backward.default

    @torch.library.register_fake("qflux_kernels::attention")
    def _(projected, own, turns, scale, norm_weight, norm_bias, norm_eps, value_dim, algorithm):
        batch, tokens, _ = projected.shape
        cylinders = scale.shape[0]
        wide = batch, tokens, cylinders * value_dim
        return ATTENTION.Results(
            out=projected.new_empty(wide),
            points=projected.new_empty(2, batch, cylinders, tokens, 2),
            threshold=projected.new_empty(batch, cylinders, tokens),
            gathered=projected.new_empty(wide),
            moments=projected.new_empty(batch, tokens, 2),
        )

    @torch.library.register_fake("qflux_kernels::attention_backward")
    def _(grad, projected, own, turns, scale, norm_weight, norm_bias, norm_eps, value_dim, *_):
        width = scale.shape[0] * value_dim
        return ATTENTION_BACKWARD.Results(
            grad_projected=projected.new_empty(projected.shape),
            grad_own=projected.new_empty(0 if own is None else own.shape),
            grad_angle=projected.new_empty(turns.shape[:2]),
            grad_scale=projected.new_empty(scale.shape),
            grad_norm_weight=projected.new_empty(width),
            grad_norm_bias=projected.new_empty(width),
        )
