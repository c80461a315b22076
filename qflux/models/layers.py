"""A layer: tokens gather values by geometry, and their states may move under interaction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qflux_kernels import (
    Evolution,
    EvolutionCache,
    InteractionCache,
    Sparsemax,
    evolve,
    interact,
)
from qflux_kernels.attention import attend, serves
from qflux_kernels.options import Score

from ..parallel import current_split
from .cache import LayerCache
from .config import SCORES, QuantumFluxConfig, radius_of, score_options
from .constants import WithConstants, initial
from .convolution import CausalConvolution
from .embedding import flatten_states, rotate, starting_frequencies
from .output import LayerRecord
from .plain import is_plain

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
# Radians a token: cylinders from the fastest to the middle start by favouring near tokens, and
# every other one from there to the slowest.
NEAR_FASTEST, NEAR_MIDDLE, NEAR_SLOWEST = 0.06, 4e-3, 5e-4


def dynamic_skip(dt: Tensor, beta: float, center: float) -> Tensor:
    """The part of the old state that a layer keeps: sigmoid(beta (dt - center)).

    Source: the Flux document, section 5; the QFNN document, "State Evolution".
    """
    return torch.sigmoid(beta * (dt - center))


class PairScore(WithConstants):
    """The pair score of a layer, with one selectivity for each cylinder.

    The selectivities are spread. Those of `Threshold` are spread linearly and stay, in an order
    that follows the golden ratio: broad and sharp cylinders then occur among the fast and among the
    slow ones (`PhaseRotation` sorts cylinders by frequency), whatever their number. Those of
    `Sparsemax`, its scales, start spread geometrically and are learned. The sharpest are those of
    the slowest cylinders, which find a token by what it is; fast ones see where it is.
    """

    def __init__(self, config: QuantumFluxConfig, shrinkage: str = "hard") -> None:
        super().__init__()
        self.count = config.num_cylinders
        self.kind = SCORES[config.score]
        self.options = score_options(config, sigma=0.0, shrinkage=shrinkage, alpha=config.alpha)
        if self.kind is Sparsemax:
            ends = math.log(config.scale_min), math.log(config.scale_max)
            spread = torch.linspace(*ends, self.count, dtype=torch.float64, device="cpu")
            self.log_scale = nn.Parameter(initial(spread))
        else:
            self.sigma_ends = config.sigma_min, config.sigma_max
            self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        if self.kind is Sparsemax:
            return {}
        number = torch.arange(self.count, dtype=torch.float64, device="cpu")
        order = (number * GOLDEN_RATIO % 1).argsort().argsort()
        spread = torch.linspace(*self.sigma_ends, self.count, dtype=torch.float64, device="cpu")
        return {"sigma": spread[order]}

    @property
    def averages(self) -> bool:
        """Whether the weights of a row sum to one as they are."""
        return self.kind is Sparsemax

    def forward(self) -> Score:
        """The score with the selectivities `(C,)` where they are now."""
        options: dict[str, Any] = dict(self.options)
        if "sigma" in options:
            options["sigma"] = self.sigma
        if self.kind is Sparsemax:
            options["scale"] = self.log_scale.exp()
        return self.kind(**options)


class StateEvolution(nn.Module):
    """One Heun-Euler step with a learned time step and the dynamic skip, for each cylinder.

    The time step is exp(log_dt), hence positive. The skip keeps the part
    g = sigmoid(skip_beta * (dt - dt_scale)) of the old state.

    Source: the Flux document, section 5; the QFNN document, "State Evolution".
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.full((config.num_cylinders,), math.log(config.dt)))
        self.score = PairScore(config)
        self.skip_beta, self.dt_scale = config.skip_beta, config.dt
        self.reduction = "sum" if self.score.averages else config.reduction
        self.backend = config.backend
        self.radius = radius_of(config)

    def time_step(self) -> tuple[Tensor, Tensor]:
        """The time step and the skip of each cylinder, `(C, 1)` each."""
        dt = self.log_dt.exp()[:, None]  # (C,) -> (C, 1)
        return dt, dynamic_skip(dt, self.skip_beta, self.dt_scale)

    def forward(self, states: Tensor, cache: LayerCache | None = None) -> Evolution:
        """States `(B, C, S, 2)` after the step, with strength and degree `(B, C, S)`.

        `cache` as in `GeometricAttention`.
        """
        dt, skip = self.time_step()
        if cache is not None and cache.evolution is not None:
            return cache.evolution.advance(states.to(cache.evolution.dtype), dt, skip)
        return evolve(
            states,
            dt,
            score=self.score(),
            radius=self.radius,
            skip=skip,
            reduction=self.reduction,
            backend=self.backend,
        )


def causal_convolution(config: QuantumFluxConfig) -> nn.Module:
    """The convolution in front of a branch, if the configuration has one."""
    if not config.conv_width:
        return nn.Identity()
    return CausalConvolution(config.hidden_dim, config.conv_width)


def scaled(hidden: Tensor, factors: Tensor) -> Tensor:
    """`(B, S, H)` times factors `(n,)`, `(B, S, n)`; from the start again where H is below n."""
    times = -(-factors.shape[0] // hidden.shape[-1])
    whole = hidden if times == 1 else hidden.repeat(1, 1, times)
    return whole[..., : factors.shape[0]] * factors


@torch.no_grad()
def start_near(bias: Tensor, config: QuantumFluxConfig) -> None:
    """Let queries and keys that are projected with this bias `(4 C, ...)` favour near tokens.

    Where all tokens share a part b of query and key, positions turn it, and a score has the
    distance d in it as b^2 cos(frequency d). Of that a sparsemax keeps the last
    (3 / (scale b^2 frequency^2))^(1/3) tokens. Faster cylinders would meet the same again at each
    turn; slower ones are to find tokens by what they are, and recall takes many of them.
    """
    if config.near_start == 0:
        return
    near = [
        c
        for c, frequency in enumerate(starting_frequencies(config))
        if NEAR_MIDDLE <= frequency <= NEAR_FASTEST
        or (NEAR_SLOWEST <= frequency < NEAR_MIDDLE and c % 2 == 0)
    ]
    points = bias[: 4 * config.num_cylinders].view(2, config.num_cylinders, 2)
    points[:, near, 0], points[:, near, 1] = config.near_start, 0.0


class GeometricAttention(nn.Module):
    """The value path: geometry decides which tokens a token gathers from, a vector what it gets.

    Queries, keys and values are projections of the hidden stream. Each cylinder's context is a mean
    over the keys it kept, so that sharp cylinders weigh as much as broad ones: the weights of a
    sparsemax are one already, other sums are divided by the number of keys. A value of the token's
    own is added, since the geometry may or may not let a token keep itself: a projection, or the
    hidden stream itself, each number with a factor, again from the start where it is narrower.
    LayerNorm follows, and each element passes a gate of the token's own.

    Source: this project; `docs/claims.md` has what it was measured to change.
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__()
        hidden, cylinders = config.hidden_dim, config.num_cylinders
        width = config.value_dim * cylinders
        self.conv = causal_convolution(config)
        self.cylinders = cylinders
        self.value_dim = config.value_dim
        # Of queries and keys, of values, of gates, and of own values if they are projected.
        self.widths = (4 * cylinders, width, width)
        if config.own_value == "projected":
            self.widths += (width,)
        self.inputs = nn.Linear(hidden, sum(self.widths))
        start_near(self.inputs.bias, config)
        self.own_scale: nn.Parameter | None = None
        if config.own_value == "scaled":
            self.own_scale = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, hidden)
        self.score = PairScore(config, config.shrinkage)
        self.backend = config.backend

    def forward(
        self,
        hidden: Tensor,
        states: Tensor | None,
        angle: Tensor,
        return_parts: bool = False,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """What each token makes of the values it gathered, `(B, S, H)`.

        Args:
            hidden: `(B, S, H)`.
            states: `(B, C, S, 2)` to add to the keys, or None.
            angle: `(C, S)` or `(B, C, S)`, the turn of each position.
            return_parts: also return the fields that this module has of a `LayerRecord`.
            cache: of the tokens before these, which join it; None: there are none.
        """
        if cache is None:
            hidden = self.conv(hidden)
        else:
            hidden = cache.convolve(self.conv, "attention", hidden)
        projected = self.inputs(hidden)
        apart = None if self.own_scale is None else scaled(hidden, self.own_scale)
        if cache is None and states is None and not return_parts:
            gated = self._by_one_op(projected, apart, angle)
            if gated is not None:
                return self.output(gated), None
        points, values, gate, *own = projected.split(self.widths, -1)
        if apart is not None:
            own.append(apart)
        # (B, S, 2 C 2) -> (B, S, 2, C, 2) -> (2, B, C, S, 2), turned together
        points = points.unflatten(-1, (2, self.cylinders, 2)).permute(2, 0, 3, 1, 4)
        queries, keys = rotate(points, angle)
        # (B, S, C D) -> (B, S, C, D), views
        values = values.unflatten(-1, (self.cylinders, -1))
        own_value = own[0].unflatten(-1, (self.cylinders, -1)) if own else values
        values = values.transpose(1, 2)  # (B, C, S, D)
        if states is not None:
            keys = states + keys
        mean, parts = self.gather(queries, keys, values, cache)
        # (B, C, S, D) -> (B, S, C, D) -> (B, S, C D)
        gathered = (mean.transpose(1, 2) + own_value).flatten(2)
        output = self.output(self.norm(gathered) * F.silu(gate))
        if not return_parts:
            return output, None
        return output, {"queries": queries, "keys": keys, "score": self.score(), **parts}

    def _by_one_op(self, projected: Tensor, own: Tensor | None, angle: Tensor) -> Tensor | None:
        """What the output map is given, where one op does what the modules in between would."""
        norm, score = self.norm, self.score
        if not (
            type(self) is GeometricAttention
            and score.averages
            and current_split() is None
            and is_plain(norm, nn.LayerNorm)
            and is_plain(score, PairScore)
        ):
            return None
        scale = score.log_scale.exp()
        if not serves(projected, angle, scale, self.backend):
            return None
        return attend(
            projected, own, angle, scale, norm.weight, norm.bias, norm.eps, self.value_dim
        )

    def gather(
        self, queries: Tensor, keys: Tensor, values: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The mean of the values that each query keeps, `(B, C, S, D)`.

        Args:
            queries, keys: `(B, C, S, 2)`.
            values: `(B, C, S, D)`.
            cache: as in `forward`.

        Returns:
            The mean, and the fields "degree", "strength" and "gathered" of a `LayerRecord`.
        """
        if cache is None:
            context, strength, degree = interact(
                queries, keys, values, score=self.score(), backend=self.backend
            )
        else:
            context, strength, degree = cache.gather(queries, keys, values)
        mean = context
        if not self.score.averages:
            mean = context / degree.clamp(min=1).unsqueeze(-1)
        return mean, {"degree": degree, "strength": strength, "gathered": context}


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

    def forward(self, hidden: Tensor, cache: LayerCache | None = None) -> Tensor:
        """`(B, S, H)` to `(B, S, H)`; `cache` as in `GeometricAttention`."""
        conv = self.conv
        hidden = conv(hidden) if cache is None else cache.convolve(conv, "mlp", hidden)
        gate, up = self.input(hidden).chunk(2, -1)
        return self.output(F.silu(gate) * up)


def _reach(branch: nn.Module | None) -> int:
    """How many tokens before it the convolution of a branch reads."""
    return getattr(getattr(branch, "conv", None), "width", 1) - 1


class EvolutionLayer(nn.Module):
    """States evolve and are projected into the hidden stream; then the value path and an MLP.

    Without values (`value_dim=0`) the layer is the documents' own: evolution and projection. With
    values the evolution is optional (`evolution`).

    Source: the Flux document, section 5 ("Feed-Forward Processing"); the value path and the MLP
    are this project's.
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

    def forward(
        self,
        states: Tensor | None,
        hidden: Tensor,
        angle: Tensor,
        return_record: bool = False,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor | None, Tensor, LayerRecord | None]:
        """States `(B, C, S, 2)` and hidden `(B, S, H)` after the layer, and its record if asked.

        Args:
            states: `(B, C, S, 2)`; None where they neither evolve nor are recorded.
            hidden: `(B, S, H)`.
            angle: `(C, S)` or `(B, C, S)`, the turn of each position.
            return_record: whether to return a `LayerRecord`, else None.
            cache: of the tokens before these, which join it; None: there are none.
        """
        if states is None:
            if self.evolution is not None or return_record:
                raise ValueError("states must be given where they evolve or are recorded, got None")
            return None, self._branches(hidden, None, angle, False, cache)[0], None
        after, evolved, parts = states, None, {}
        if self.evolution is not None:
            further = () if cache is None else (cache,)
            evolution = self.evolution(states, *further)
            after = evolved = evolution.states
            if return_record:
                parts = {
                    "queries": states,
                    "keys": states,
                    "degree": evolution.degree,
                    "strength": evolution.strength,
                    "gathered": None,
                    "score": self.evolution.score(),
                    "skip": self.evolution.time_step()[1],
                }
            projected = self.projection(flatten_states(rotate(after, -angle)))
            hidden = hidden + self._drop(projected)
        hidden, own = self._branches(hidden, evolved, angle, return_record, cache)
        if not return_record:
            return after, hidden, None
        if own is not None:
            parts = {"skip": None, **parts, **own}
        radius = torch.linalg.vector_norm(after, dim=-1)
        return after, hidden, LayerRecord(states, after, radius=radius, **parts)

    def _branches(
        self,
        hidden: Tensor,
        evolved: Tensor | None,
        angle: Tensor,
        return_record: bool,
        cache: LayerCache | None,
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Hidden after the value path and the MLP, and what the value path has of a record."""
        own = None
        if self.attention is not None:
            gathered, own = self.attention(
                self.attention_norm(hidden), evolved, angle, return_record, cache
            )
            hidden = hidden + self._drop(gathered)
        if self.mlp is not None:
            hidden = hidden + self._drop(self.mlp(self.mlp_norm(hidden), cache))
        return hidden, own

    def _drop(self, branch: Tensor) -> Tensor:
        return self.dropout(branch) if self.training else branch

    def new_cache(self, **options: Any) -> LayerCache:
        """An empty cache; `options` are those of `InteractionCache` that all layers share."""
        branches = {"attention": self.attention, "mlp": self.mlp}
        convolved = (name for name, part in branches.items() if _reach(part) > 0)
        cache = LayerCache(convolutions=tuple(convolved))
        if self.evolution is not None:
            own = self.evolution
            cache.evolution = EvolutionCache(
                score=own.score(),
                radius=own.radius,
                reduction=own.reduction,
                backend=own.backend,
                **options,
            )
        if self.attention is not None:
            cache.attention = InteractionCache(
                score=self.attention.score(),
                value_dim=self.attention.value_dim,
                backend=self.attention.backend,
                **options,
            )
        return cache
