"""A layer: tokens hear each other by geometry, and their states may move under interaction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qflux_kernels import InverseGate, Radius, Threshold, evolve, interact

from .config import QuantumFluxConfig
from .embedding import rotate

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


class PairScore(nn.Module):
    """The pair score of a layer, with one selectivity for each cylinder.

    The selectivities are spread linearly, but in an order that follows the golden ratio: broad and
    sharp cylinders then occur among the fast and among the slow ones (`PhaseRotation` sorts
    cylinders by frequency), whatever their number.
    """

    def __init__(self, config: QuantumFluxConfig, shrinkage: str = "hard") -> None:
        super().__init__()
        self.kind, self.alpha, self.shrinkage = config.score, config.alpha, shrinkage
        sigma = torch.linspace(config.sigma_min, config.sigma_max, config.num_cylinders)
        order = (torch.arange(config.num_cylinders) * GOLDEN_RATIO % 1).argsort().argsort()
        sigma = sigma[order]
        self.register_buffer("sigma", sigma, persistent=False)

    def forward(self) -> Threshold | InverseGate:
        if self.kind == "threshold":
            return Threshold(sigma=self.sigma, shrinkage=self.shrinkage)
        return InverseGate(alpha=self.alpha)


class StateEvolution(nn.Module):
    """One Heun-Euler step with a learned time step and the dynamic skip, for each cylinder.

    The time step is exp(log_dt), hence positive. The skip keeps the share
    g = sigmoid(skip_beta * (dt - dt_scale)) of the old state.

    Source: first seed, section 5; second seed, "State Evolution"; SPEC 4.
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.full((config.num_cylinders,), math.log(config.dt)))
        self.score = PairScore(config)
        self.skip_beta, self.dt_scale = config.skip_beta, config.dt
        self.reduction, self.backend = config.reduction, config.backend
        self.radius = Radius(
            config.radius_min,
            config.radius_max,
            config.radius_rate,
            config.radius_reversion,
            config.radius_target,
        )

    def forward(self, states: Tensor) -> Tensor:
        """States `(B, C, S, 2)` after the step."""
        dt = self.log_dt.exp()[:, None]
        return evolve(
            states,
            dt,
            score=self.score(),
            radius=self.radius,
            skip=torch.sigmoid(self.skip_beta * (dt - self.dt_scale)),
            reduction=self.reduction,
            backend=self.backend,
        ).states


class CausalConvolution(nn.Conv1d):
    """Depthwise convolution over the present and the `width - 1` tokens before it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, S, H)` to `(B, S, H)`."""
        padded = F.pad(x.transpose(1, 2), (self.kernel_size[0] - 1, 0))
        return super().forward(padded).transpose(1, 2)


def causal_convolution(config: QuantumFluxConfig) -> nn.Module:
    """The convolution in front of a branch, if the configuration has one."""
    if not config.conv_width:
        return nn.Identity()
    return CausalConvolution(config.hidden_dim, config.conv_width)


class GeometricAttention(nn.Module):
    """The value path: geometry decides whom a token hears, a vector says what was heard.

    Queries, keys and values are projections of the hidden stream. Each cylinder's context is
    divided by the number of keys it kept, so that sharp cylinders speak as loud as broad ones, and
    the token's own value is added, since the geometry may or may not let a token keep itself.
    LayerNorm follows, and each element passes a gate of the listener's own.

    Source: SPEC 5, "Keys and values".
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        hidden, cylinders = config.hidden_dim, config.num_cylinders
        gathered = config.value_dim * cylinders
        self.conv = causal_convolution(config)
        self.cylinders = cylinders
        self.widths = (2 * cylinders, 2 * cylinders, gathered, gathered)
        self.inputs = nn.Linear(hidden, sum(self.widths))
        self.norm = nn.LayerNorm(gathered)
        self.output = nn.Linear(gathered, hidden)
        self.score = PairScore(config, config.shrinkage)
        self.backend = config.backend

    def forward(self, hidden: Tensor, states: Tensor | None, angle: Tensor) -> Tensor:
        """What was heard, `(B, S, H)`.

        Args:
            hidden: `(B, S, H)`.
            states: `(B, C, S, 2)` to add to the keys, or None.
            angle: `(C, S)`, the turn of each position.
        """
        *points, gate = self.inputs(self.conv(hidden)).split(self.widths, -1)
        queries, keys, values = (
            part.unflatten(-1, (self.cylinders, -1)).transpose(1, 2) for part in points
        )
        queries, keys = rotate(queries, angle), rotate(keys, angle)
        heard = interact(
            queries,
            keys if states is None else states + keys,
            values,
            score=self.score(),
            backend=self.backend,
        )
        mean = heard.context / heard.degree.clamp(min=1).unsqueeze(-1)
        gathered = (mean + values).transpose(1, 2).flatten(2)
        return self.output(self.norm(gathered) * F.silu(gate))


class GatedMLP(nn.Module):
    """Down(silu(gate) * up) behind a causal convolution of its own.

    It has as many weights as a plain MLP `mlp_ratio` times as wide as the hidden stream, or a few
    fewer: its width is rounded down to whole vectors.
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        inner = max(8, int(config.mlp_ratio * config.hidden_dim * 2 / 3) // 8 * 8)
        self.conv = causal_convolution(config)
        self.input = nn.Linear(config.hidden_dim, 2 * inner)
        self.output = nn.Linear(inner, config.hidden_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(B, S, H)` to `(B, S, H)`."""
        gate, up = self.input(self.conv(hidden)).chunk(2, -1)
        return self.output(F.silu(gate) * up)


class EvolutionLayer(nn.Module):
    """States evolve and are projected into the hidden stream; then the value path and an MLP.

    Without values (`value_dim=0`) the layer is the seeds' own: evolution and projection. With
    values the evolution is optional (`evolution`).

    Source: first seed, section 5 ("Feed-Forward Processing"); SPEC 5.
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        hidden = config.hidden_dim
        self.evolution = self.attention = self.mlp = None
        if config.evolution or not config.value_dim:
            self.evolution = StateEvolution(config)
            self.projection = nn.Linear(2 * config.num_cylinders, hidden)
        if config.value_dim:
            self.attention_norm = nn.LayerNorm(hidden)
            self.attention = GeometricAttention(config)
        if config.value_dim and config.mlp_ratio:
            self.mlp_norm = nn.LayerNorm(hidden)
            self.mlp = GatedMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, hidden: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """States `(B, C, S, 2)` and hidden `(B, S, H)` after the layer; `angle` is `(C, S)`."""
        evolved = None
        if self.evolution is not None:
            states = evolved = self.evolution(states)
            projected = self.projection(flatten_states(rotate(states, -angle)))
            hidden = hidden + self.dropout(projected)
        if self.attention is not None:
            heard = self.attention(self.attention_norm(hidden), evolved, angle)
            hidden = hidden + self.dropout(heard)
        if self.mlp is not None:
            hidden = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return states, hidden


def flatten_states(states: Tensor) -> Tensor:
    """States `(B, C, S, 2)` as features `(B, S, 2C)`."""
    return states.transpose(1, 2).flatten(2)
