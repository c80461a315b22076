"""Tokens as points on cylinders, and positions as rotations of their phases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import QuantumFluxConfig


def rotate(states: Tensor, angle: Tensor) -> Tensor:
    """Turn states `(..., S, 2)` by `angle` radians, `(..., S)` broadcasting."""
    cos, sin = angle.cos(), angle.sin()
    x, y = states.unbind(-1)
    return torch.stack((x * cos - y * sin, x * sin + y * cos), -1)


class CylinderEmbedding(nn.Module):
    """A learned (radius, phase) for each token on each cylinder.

    The phase starts uniform on the circle. The radius stays inside the bounds of the radius rule,
    because it is a sigmoid between them; it starts at their middle.

    Source: first seed, section 1; second seed, "Cylindrical Token Representation" and
    "Multi-cylinder representation".
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.num_cylinders)
        self.bounds = (config.radius_min, config.radius_max)
        self.radius_logit = nn.Parameter(torch.zeros(shape))
        self.phase = nn.Parameter(torch.rand(shape) * 2 * math.pi)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids `(B, S)` to states `(B, C, S, 2)`."""
        low, high = self.bounds
        radius = low + (high - low) * torch.sigmoid(self.radius_logit)
        table = torch.stack((radius * self.phase.cos(), radius * self.phase.sin()), -1)
        return (
            nn.functional.embedding(input_ids, table.flatten(1))
            .unflatten(-1, table.shape[1:])
            .transpose(1, 2)
        )


class PhaseRotation(nn.Module):
    """Position as a phase: cylinder c turns by omega_c radians a token.

    The frequencies are learned. They start spread geometrically from 1 to 1e-3 radians a token, so
    that some cylinders tell neighbours apart and others count to the end of a long context. Two
    rotated states see only the distance between their positions.

    Source: first seed, section 1 ("position encoded in the state angles").
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        self.log_frequency = nn.Parameter(torch.linspace(0.0, math.log(1e-3), config.num_cylinders))

    def forward(self, length: int) -> Tensor:
        """The angles `(C, S)` of positions 0 to `length - 1`."""
        position = torch.arange(length, device=self.log_frequency.device)
        return self.log_frequency.exp()[:, None] * position
