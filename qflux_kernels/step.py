"""One token's share of a Heun-Euler step, each rule beside its vector-Jacobian product.

The rules of `csrc/math/step.h` on whole tensors: points `(*batch, S, 2)`, strength `(*batch, S)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .options import Radius

MIN_RADIUS = 1e-6


def free_radius(
    radius: torch.Tensor, strength: torch.Tensor, rule: Radius | RadiusRule
) -> torch.Tensor:
    """r' + rate * strength - reversion * (r' - target), before the clamp."""
    return radius + rule.rate * strength - rule.reversion * (radius - rule.target)


class RadiusRule(NamedTuple):
    """`Radius` in schema order; not active: radii are left alone."""

    active: bool
    min: float
    max: float
    rate: float
    reversion: float
    target: float

    def move(self, moved: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        """x' * rho / r'."""
        if not self.active:
            return moved
        radius = torch.hypot(*moved.unbind(-1)).clamp(min=MIN_RADIUS)
        rho = free_radius(radius, strength, self).clamp(self.min, self.max)
        return moved * (rho / radius)[..., None]

    def move_vjp(
        self, moved: torch.Tensor, strength: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of x' and of the strength from that of the result."""
        if not self.active:
            return grad, torch.zeros_like(strength)
        length = torch.hypot(*moved.unbind(-1))
        radius = length.clamp(min=MIN_RADIUS)
        free = free_radius(radius, strength, self)
        scale = free.clamp(self.min, self.max) / radius
        grad_scale = (grad * moved).sum(-1)
        clamped = (free < self.min) | (free > self.max)
        grad_free = torch.where(clamped, 0.0, grad_scale / radius)
        grad_radius = grad_free * (1 - self.reversion) - grad_scale * scale / radius
        radial = torch.where(length < MIN_RADIUS, 0.0, grad_radius / length)
        return (
            grad * scale[..., None] + radial[..., None] * moved,
            grad_free * self.rate,
        )


def blend(skip: float | torch.Tensor, states: torch.Tensor, evolved: torch.Tensor) -> torch.Tensor:
    """skip * x + (1 - skip) * evolved, for `skip` a number or `(*batch, S, 1)`."""
    return skip * states + (1 - skip) * evolved
