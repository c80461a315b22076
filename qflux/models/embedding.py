"""Tokens as points on cylinders, and positions as rotations of their phases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..parallel import current_split
from .config import ModelConfig, QuantumFluxConfig
from .constants import at_least_float32, initial


def _is_complex(states: Tensor) -> bool:
    """Whether states `(..., 2)` can be viewed as complex numbers where they are."""
    if states.dtype not in (torch.float32, torch.float64):
        return False
    *strides, last = states.stride()
    return last == 1 and not any(step % 2 for step in (states.storage_offset(), *strides))


def rotate(states: Tensor, angle: Tensor) -> Tensor:
    """Turn states `(..., S, 2)` by `angle` radians, `(..., S)` broadcasting, in their dtype.

    The result is contiguous.
    """
    if not torch.compiler.is_compiling() and _is_complex(states) and states.dtype == angle.dtype:
        # One product of complex numbers, where sums of products take seven passes.
        turn = torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real((torch.view_as_complex(states) * turn).contiguous())
    cos, sin = angle.cos(), angle.sin()
    x, y = states.unbind(-1)
    return torch.stack((x * cos - y * sin, x * sin + y * cos), -1).to(states.dtype)


def position_angles(frequency: Tensor, length: int) -> Tensor:
    """The angles `(C, S)` of positions 0 to `length - 1` at frequencies `(C,)`, radians a token.

    Where sequences are split over ranks, those of this rank's tokens.
    """
    split = current_split()
    if split is None:
        return angles_at(frequency, torch.arange(length, device=frequency.device))
    return angles_at(frequency, split.positions(length, frequency.device))


def angles_at(frequency: Tensor, position: Tensor) -> Tensor:
    """The angles `(..., C, S)` of positions `(..., S)` at frequencies `(C,)`, radians a token."""
    return frequency[:, None] * position[..., None, :]


def look_up(table: Tensor, input_ids: Tensor) -> Tensor:
    """The states `(B, C, S, 2)` of token ids `(B, S)` in a table of states `(V, C, 2)`."""
    rows = nn.functional.embedding(input_ids, table.flatten(1))  # (B, S, 2 C)
    return rows.unflatten(-1, table.shape[1:]).transpose(1, 2)  # (B, S, C, 2) -> (B, C, S, 2)


def flatten_states(states: Tensor) -> Tensor:
    """States `(B, C, S, 2)` as features `(B, S, 2 C)`."""
    return states.transpose(1, 2).flatten(2)  # (B, S, C, 2) -> (B, S, 2 C)


def phase_coherence(states: Tensor) -> Tensor:
    """How far the phases of a sequence agree: the mean cosine over all pairs, itself included.

    It equals |mean unit vector|^2, which takes O(S) and has gradients. 1: one phase; 1 / S on
    average for random ones.

    Args:
        states: `(..., S, 2)`.

    Returns:
        `(...)`, in [0, 1].

    Source: the QFNN document, "Phase-coherent regularization".
    """
    radius = torch.linalg.vector_norm(states, dim=-1, keepdim=True).clamp(min=1e-6)
    return mean_over_tokens(states / radius).square().sum(-1)


def mean_over_tokens(tensor: Tensor) -> Tensor:
    """The mean `(..., F)` of `(..., S, F)`, over all ranks that share the sequences."""
    split = current_split()
    return tensor.mean(-2) if split is None else split.mean(tensor)


def running_sum(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums `(..., S, F)` over each token and those before it, and how many these are, `(S, 1)`."""
    length, split = tensor.shape[-2], current_split()
    if split is None:
        count = torch.arange(1, length + 1, device=tensor.device)
        return tensor.cumsum(-2), count[:, None]
    return split.running_sum(tensor), 1 + split.positions(length, tensor.device)[:, None]


class CylinderEmbedding(nn.Module):
    """A learned (radius, phase) for each token on each cylinder.

    The phase starts uniform on the circle. The radius stays inside the bounds of the radius rule,
    because it is a sigmoid between them; it starts at their middle.

    Source: the Flux document, section 1; the QFNN document, "Cylindrical Token Representation" and
    "Multi-cylinder representation".
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.num_cylinders)
        self.bounds = (config.radius_min, config.radius_max)
        self.radius_logit = nn.Parameter(torch.zeros(shape))
        self.phase = nn.Parameter(torch.rand(shape) * 2 * math.pi)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids `(B, S)` to states `(B, C, S, 2)`."""
        # A few tokens, such as the one of a decoding step, do not need the whole table. A program
        # for any number of tokens takes one way for all.
        if not torch.is_grad_enabled() and (
            torch.compiler.is_exporting() or input_ids.numel() < len(self.phase)
        ):
            states = self._states(self.radius_logit[input_ids], self.phase[input_ids])
            return states.transpose(1, 2)  # (B, S, C, 2) -> (B, C, S, 2)
        return look_up(self.table(), input_ids)

    def table(self) -> Tensor:
        """The states `(V, C, 2)` of all tokens."""
        return self._states(self.radius_logit, self.phase)

    def _states(self, radius_logit: Tensor, phase: Tensor) -> Tensor:
        """The states `(..., C, 2)` of parameters `(..., C)`."""
        low, high = self.bounds
        radius = low + (high - low) * torch.sigmoid(radius_logit)
        return torch.stack((radius * phase.cos(), radius * phase.sin()), -1)


def starting_frequencies(config: QuantumFluxConfig) -> list[float]:
    """Where the frequencies of cylinders start, radians a token."""
    last = max(config.num_cylinders - 1, 1)
    return [config.frequency_min ** (c / last) for c in range(config.num_cylinders)]


class PhaseRotation(nn.Module):
    """Position as a phase: cylinder c turns by omega_c radians a token.

    The frequencies are learned. They start spread geometrically from 1 radian a token to
    `frequency_min`, so that some cylinders tell neighbours apart and others hardly turn over a long
    context, and find a token by what it is. Two rotated states see only the distance between their
    positions.

    Source: the Flux document, section 1 ("position encoded in the state angles").
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        frequency = torch.tensor(starting_frequencies(config), dtype=torch.float64, device="cpu")
        self.log_frequency = nn.Parameter(initial(frequency.log()))

    def frequency(self) -> Tensor:
        """Radians a token, `(C,)`, in float32 or float64: a long way multiplies their errors."""
        return at_least_float32(self.log_frequency).exp()

    def forward(self, length: int) -> Tensor:
        """The angles `(C, S)` of positions 0 to `length - 1`."""
        return position_angles(self.frequency(), length)

    def at(self, position: Tensor) -> Tensor:
        """The angles `(..., C, S)` of positions `(..., S)`."""
        return angles_at(self.frequency(), position)
