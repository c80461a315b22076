"""The evolution layer: states move under their interaction, and tokens hear each other."""

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

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        self.kind, self.alpha = config.score, config.alpha
        sigma = torch.linspace(config.sigma_min, config.sigma_max, config.num_cylinders)
        order = (torch.arange(config.num_cylinders) * GOLDEN_RATIO % 1).argsort().argsort()
        sigma = sigma[order]
        self.register_buffer("sigma", sigma, persistent=False)

    def forward(self) -> Threshold | InverseGate:
        if self.kind == "threshold":
            return Threshold(sigma=self.sigma)
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


class GeometricAttention(nn.Module):
    """The value path: geometry decides whom a token hears, a vector says what was heard.

    Queries, keys and values are projections of the hidden stream, the keys added to the evolved
    states. What the cylinders gathered is normalised together, so that its scale does not depend
    on how many keys passed the threshold, and each element passes a gate of the listener's own.

    Source: SPEC 5, "Keys and values".
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        hidden, cylinders = config.hidden_dim, config.num_cylinders
        gathered = config.value_dim * cylinders
        self.conv = (
            CausalConvolution(hidden, config.conv_width) if config.conv_width else nn.Identity()
        )
        self.cylinders = cylinders
        self.widths = (2 * cylinders, 2 * cylinders, gathered, gathered)
        self.inputs = nn.Linear(hidden, sum(self.widths))
        self.norm = nn.LayerNorm(gathered)
        self.output = nn.Linear(gathered, hidden)
        self.score = PairScore(config)
        self.reduction, self.backend = config.reduction, config.backend

    def forward(self, hidden: Tensor, states: Tensor, angle: Tensor) -> Tensor:
        """Hidden `(B, S, H)` and states `(B, C, S, 2)` to what was heard, `(B, S, H)`."""
        *points, gate = self.inputs(self.conv(hidden)).split(self.widths, -1)
        queries, keys, values = (
            part.unflatten(-1, (self.cylinders, -1)).transpose(1, 2) for part in points
        )
        context = interact(
            rotate(queries, angle),
            states + rotate(keys, angle),
            values,
            score=self.score(),
            reduction=self.reduction,
            backend=self.backend,
        ).context
        return self.output(self.norm(context.transpose(1, 2).flatten(2)) * F.silu(gate))


class EvolutionLayer(nn.Module):
    """States evolve and are projected into the hidden stream; then the value path and an MLP.

    Without values (`value_dim=0`) the layer is the seeds' own: evolution and projection.

    Source: first seed, section 5 ("Feed-Forward Processing"); SPEC 5.
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        hidden = config.hidden_dim
        self.evolution = StateEvolution(config)
        self.projection = nn.Linear(2 * config.num_cylinders, hidden)
        self.attention = self.mlp = None
        if config.value_dim:
            self.attention = GeometricAttention(config)
            self.attention_norm = nn.LayerNorm(hidden)
        if config.value_dim and config.mlp_ratio:
            inner = max(1, round(config.mlp_ratio * hidden))
            self.mlp_norm = nn.LayerNorm(hidden)
            self.mlp = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, hidden: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """States `(B, C, S, 2)` and hidden `(B, S, H)` after the layer; `angle` is `(C, S)`."""
        states = self.evolution(states)
        hidden = hidden + self.dropout(self.projection(flatten_states(rotate(states, -angle))))
        if self.attention is not None:
            heard = self.attention(self.attention_norm(hidden), states, angle)
            hidden = hidden + self.dropout(heard)
        if self.mlp is not None:
            hidden = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return states, hidden


def flatten_states(states: Tensor) -> Tensor:
    """States `(B, C, S, 2)` as features `(B, S, 2C)`."""
    return states.transpose(1, 2).flatten(2)
