"""The networks of the two documents: tokens are points on cylinders, and nothing else.

The presets `flux` (the Flux document) and `qfnn` (the QFNN document) are configurations of it.
Every part is optional, so that one can be studied without the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qflux_kernels import EvolutionCache, InteractionCache, evolve, interact, project_norm
from qflux_kernels.arguments import is_eager
from qflux_kernels.reference import move_radius

from ..parallel import current_split
from .base import CausalLM, Reading
from .cache import LayerCache, ModelCache
from .collapsed import CollapsedHead, columns_of
from .config import SCORES, PublishedConfig, radius_of, score_options
from .constants import WithConstants, initial
from .embedding import (
    CylinderEmbedding,
    angles_at,
    flatten_states,
    look_up,
    phase_coherence,
    position_angles,
    rotate,
    running_sum,
)
from .layers import dynamic_skip
from .memory import ConnectionMemory
from .output import LayerRecord
from .plain import is_plain

# For so many tokens a column of the collapsed head, making it costs less than it saves.
MANY_TOKENS = 4
# A few weights of the output layer, behind a readout that is one linear map, are multiplied before
# a collapsed head is found fit.
FEW_WEIGHTS = 1 << 18


class TokenStates(nn.Module):
    """The state (radius, phase) that each token starts from, on each cylinder.

    "cardioid": phase 2 pi v (c + 1) / V + phase_shift for token v on cylinder c, radius
    (1 + sin(2 pi v / V + phase_shift)) / 2. "annulus": random phase, radius falling linearly with
    the id from radius_max to radius_min. Both are tables of x and y: buffers, or parameters with
    `train_embedding`. "learned" is `CylinderEmbedding`.

    Source: the Flux document, sections 1 and 2 (2 V numbers); the QFNN document, "Cylindrical Token
    Representation". The documents leave the start open; cardioid and annulus are those of the
    programs they describe.
    """

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.learned = CylinderEmbedding(config) if config.embedding == "learned" else None
        if self.learned is not None:
            return
        tokens, cylinders = config.vocab_size, config.num_cylinders
        rank = torch.arange(tokens, dtype=torch.float64)[:, None] / tokens
        if config.embedding == "cardioid":
            turns = torch.arange(1, cylinders + 1)
            phase = 2 * math.pi * rank * turns + config.phase_shift
            radius = (1 + torch.sin(2 * math.pi * rank + config.phase_shift)) / 2
        else:
            phase = 2 * math.pi * torch.rand(tokens, cylinders, dtype=torch.float32)
            radius = config.radius_min + (config.radius_max - config.radius_min) * (1 - rank)
        table = initial(torch.stack((radius * phase.cos(), radius * phase.sin()), -1))
        if config.train_embedding:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids `(B, S)` to states `(B, C, S, 2)`."""
        if self.learned is not None:
            return self.learned(input_ids)
        return look_up(self.table, input_ids)


def phase_frequencies(config: PublishedConfig) -> Tensor:
    """Radians a token by which each cylinder's phases turn with the position, `(C,)` float64.

    One cylinder turns once over `context_length`; several are spread geometrically from there up
    to one radian a token.

    Source: the Flux document, section 1 ("Position encoded directly in quantum state angles").
    """
    slowest = 2 * math.pi / config.context_length
    spread = torch.linspace(0.0, 1.0, config.num_cylinders, dtype=torch.float64, device="cpu")
    return slowest ** (1 - spread)


class TimeStep(nn.Module):
    """The time step of a layer.

    "constant": dt_scale. "beta": with u from Beta((H - 2) / 2, (context_length - 1) / 2),

        dt = clamp(dt_scale / clamp(u, 1e-3, 0.999), 1e-6, dt_max)

    drawn for every sequence and layer in training; in evaluation u is the mean of the
    distribution, so that two evaluations agree.

    Source: the Flux document, section 5 (`sample_timestep`).
    """

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.scale, self.limit = config.dt_scale, config.dt_max
        self.shape = None
        if config.timestep == "beta":
            self.shape = ((config.hidden_dim - 2) / 2, (config.context_length - 1) / 2)

    def forward(self, states: Tensor) -> Tensor:
        """`(B, 1, 1)` for states `(B, C, S, 2)`, in their dtype."""
        batch = (states.shape[0], 1, 1)
        if self.shape is None:
            return states.new_full(batch, self.scale)
        a, b = self.shape
        if self.training:
            # Checked arguments and numbers from the host would make it wait for the device.
            a, b = states.new_full((), a), states.new_full((), b)
            u = torch.distributions.Beta(a, b, validate_args=False).sample(batch)
            split = current_split()
            if split is not None:
                u = split.of_the_first(u)
        else:
            u = states.new_full(batch, a / (a + b))
        return (self.scale / u.clamp(1e-3, 0.999)).clamp(1e-6, self.limit)


def _with_radius(states: Tensor) -> Tensor:
    """States `(..., 2)` and their radii, `(..., 3)`."""
    return torch.cat((states, torch.linalg.vector_norm(states, dim=-1, keepdim=True)), -1)


class AdaptiveBounds(nn.Module):
    """Smallest and largest radius as something to learn.

    low = radius_min exp(a) and high = low + (radius_max - radius_min) exp(b). "learned" has one
    pair (a, b) for each cylinder. "context" makes them a linear function of what a token has seen:
    the running means of the states and of their radii. Both start at a = b = 0, the fixed bounds.

    Source: the QFNN document, "Adaptive radius bounds: Context-dependent r_min and r_max values";
    the Flux document, section 9, "Quantum Radius Tuning".
    """

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.low, self.span = config.radius_min, config.radius_max - config.radius_min
        self.context = config.radius_bounds == "context"
        inputs = 4 if self.context else 1
        self.weight = nn.Parameter(torch.zeros(config.num_cylinders, inputs, 2))

    def forward(self, states: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """low and high for states `(B, C, S, 2)`: `(B, C, S)`, or `(C, 1)` if not by context.

        `seen` has the means that each token reads, `(B, C, S, 3)`; None: of these states alone.
        """
        if self.context:
            if seen is None:
                total, count = running_sum(_with_radius(states))
                seen = total / count
            inputs = torch.cat((torch.ones_like(seen[..., :1]), seen), -1)
            # No matrix product, which autocast would take in half precision.
            logits = (inputs[..., None] * self.weight[:, None]).sum(-2)
        else:
            logits = self.weight
        a, b = logits.unbind(-1)
        low = self.low * a.exp()
        return low, low + self.span * b.exp()

    def seen_by(self, states: Tensor, past: Tensor, cache: LayerCache) -> Tensor | None:
        """The means `(B, C, n, 3)` that new tokens read, behind states `(B, C, S, 2)` of others.

        None if not by context.
        """
        if not self.context or cache.positions is None:
            return None
        sums = cache.running_sums(states, past, _with_radius)
        count = (cache.positions + 1).clamp(min=1)  # (n,) or (B, n)
        return sums / (count if count.dim() == 1 else count[:, None])[..., None]


class PublishedLayer(nn.Module):
    """One Heun-Euler step, the radius rule and the dynamic skip; no parameters by default.

    Fixed bounds and no memory are one fused call. Otherwise the rule around the interaction is
    PyTorch's; the pairs stay in the kernels.

    Source: the Flux document, sections 5 and 7; the QFNN document, "State Evolution".
    """

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.timestep = TimeStep(config)
        options = score_options(
            config,
            sigma=config.sigma,
            stats=config.statistics,
            alpha=config.alpha,
            min_gate=config.min_gate,
            eps=config.epsilon,
        )
        self.score = SCORES[config.score](**options)
        self.radius = radius_of(config)
        self.bounds = AdaptiveBounds(config) if config.radius_bounds != "fixed" else None
        center = config.dt_scale if config.skip_center is None else config.skip_center
        self.skip_beta, self.skip_center = config.skip_beta, center
        self.options: dict[str, Any] = {"reduction": config.reduction, "backend": config.backend}

    def forward(
        self,
        states: Tensor,
        memory: ConnectionMemory | None = None,
        return_record: bool = False,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, ConnectionMemory | None, LayerRecord | None]:
        """The states after the layer, the memory after it, and its record if asked.

        Args:
            states: `(B, C, S, 2)`.
            memory: of the layers before, or None for none.
            return_record: whether to return a `LayerRecord`, else None.
            cache: of the tokens before these, which join it; None: there are none.
        """
        dt = self.timestep(states)  # (B, 1, 1)
        skip = dynamic_skip(dt, self.skip_beta, self.skip_center)
        if cache is not None:
            return *self._advance(states, dt, skip, cache, memory), None
        if self.bounds is None and memory is None:
            moved, strength, degree = evolve(
                states, dt, score=self.score, radius=self.radius, skip=skip, **self.options
            )
        else:
            moved, strength, degree = self._heun(states, dt, memory)
            moved = self._move_radius(states, moved, strength)
            moved = skip[..., None] * states + (1 - skip[..., None]) * moved
            if memory is not None:
                memory = memory.update(states, self.score)
        if not return_record:
            return moved, memory, None
        record = LayerRecord(
            states_before=states,
            states_after=moved,
            queries=states,
            keys=states,
            degree=degree,
            strength=strength,
            radius=torch.linalg.vector_norm(moved, dim=-1),
            gathered=None,
            score=self.score,
            skip=skip,
        )
        return moved, memory, record

    def new_cache(self, **options: Any) -> LayerCache:
        """An empty cache; `options` are those of `InteractionCache` that all layers share."""
        radius = self.radius if self.bounds is None else None
        return LayerCache(
            evolution=EvolutionCache(score=self.score, radius=radius, **self.options, **options),
            sums=self.bounds is not None and self.bounds.context,
        )

    def _advance(
        self,
        states: Tensor,
        dt: Tensor,
        skip: Tensor,
        cache: LayerCache,
        memory: ConnectionMemory | None,
    ) -> tuple[Tensor, ConnectionMemory | None]:
        """The new tokens' states after the layer, and the memory of their rows."""
        evolution = cache.evolution
        assert evolution is not None
        states = states.to(evolution.dtype)
        if self.bounds is None and memory is None:
            return evolution.advance(states, dt, skip).states, None
        past = evolution.caches[0].keys
        if memory is None:
            moved, strength, _ = evolution.advance(states, dt)
        else:
            first, second = evolution.caches
            moved, strength, _ = self._heun_with(memory, states, dt, first, second)
            memory = memory.update(first.keys, self.score)
        bounds = None
        if self.bounds is not None:
            bounds = self.bounds(states, self.bounds.seen_by(states, past, cache))
        moved = move_radius(moved, strength, self.radius, bounds)
        return skip[..., None] * states + (1 - skip[..., None]) * moved, memory

    def _heun(
        self, states: Tensor, dt: Tensor, memory: ConnectionMemory | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if memory is None:
            return evolve(states, dt, score=self.score, radius=None, **self.options)
        return self._heun_with(memory, states, dt)

    def _heun_with(
        self,
        memory: ConnectionMemory,
        states: Tensor,
        dt: Tensor,
        *caches: InteractionCache,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step with what the memory adds; `caches` have the past of its two stages, if any."""

        def gather(points: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor]:
            if caches:
                caches[stage].append(points)
                seen, keys = caches[stage].attend(points), caches[stage].keys
            else:
                seen, keys = interact(points, score=self.score, **self.options), points
            remembered, strength = memory.context(keys, self.options["reduction"])
            return seen.context + remembered, seen.strength + strength, seen.degree

        dt = dt[..., None]  # (B, 1, 1, 1)
        first, strength, degree = gather(states, 0)
        second, _, _ = gather((states + dt * first).to(states.dtype), 1)
        return states + dt * (first + second) / 2, strength, degree

    def _move_radius(self, states: Tensor, moved: Tensor, strength: Tensor) -> Tensor:
        """The radius rule of `qflux_kernels.Radius`, with bounds that have gradients."""
        bounds = None if self.bounds is None else self.bounds(states)
        return move_radius(moved, strength, self.radius, bounds)


class Readout(nn.Module):
    """States projected to the hidden width, normalised if asked.

    Source: the Flux document, sections 1, 2 (2 H numbers) and 7.1; the QFNN document, "Parameter
    Efficiency".
    """

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * config.num_cylinders, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim) if config.readout_norm else None
        # What differentiates twice, or traces to operations of PyTorch, asks for the reference.
        self.fuses = config.backend != "reference"

    def forward(self, states: Tensor) -> Tensor:
        """States `(B, C, S, 2)` to `(B, S, H)`."""
        features = flatten_states(states)
        if self.norm is None:
            return self.projection(features)
        plain = is_plain(self.projection, nn.Linear) and is_plain(self.norm, nn.LayerNorm)
        if not (self.fuses and plain):
            return self.norm(self.projection(features))
        return project_norm(
            features,
            self.projection.weight,
            self.projection.bias,
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
        )


class PublishedLM(CausalLM, WithConstants):
    """The causal language model of the two documents.

    Args:
        config: a `PublishedConfig`; `qflux.models.presets` has the documents' own.

    Source: the Flux document, sections 1 and 5; the QFNN document, "Key Components".
    """

    config: PublishedConfig
    frequency: Tensor

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__(config)
        self.embedding = TokenStates(config)
        self.register_constants()
        self.layers = nn.ModuleList(PublishedLayer(config) for _ in range(config.num_layers))
        readouts = max(1, config.num_layers) if config.readout == "layers" else 1
        self.readouts = nn.ModuleList(Readout(config) for _ in range(readouts))
        self.head = nn.Linear(config.hidden_dim, config.vocab_size)
        nn.init.zeros_(self.head.bias)

    def constants(self) -> dict[str, Tensor]:
        turns = self.config.position == "phase"
        return {"frequency": phase_frequencies(self.config)} if turns else {}

    @property
    def cacheable(self) -> bool:
        """Not with statistics over the whole row."""
        layers: Any = self.layers
        return not any(layer.score.whole_window for layer in layers)

    def read(
        self,
        input_ids: Tensor,
        return_layers: bool = False,
        cache: ModelCache | None = None,
        position: Tensor | None = None,
    ) -> Reading:
        """Run embedding and layers on checked token ids `(B, S)`; see `CausalLM.read`.

        In training the reading has a penalty for each layer, if the configuration has a
        `coherence_weight`.
        """
        config = self.config
        states = self.embedding(input_ids)  # (B, C, S, 2)
        if config.position == "phase":
            if position is None:
                angle = position_angles(self.frequency, input_ids.shape[-1])
            else:
                angle = angles_at(self.frequency, position)
            states = rotate(states, angle)
        memory = None
        if config.memory:
            if current_split() is not None:
                raise ValueError("a connection memory needs whole sequences: memory must be False")
            memory = ConnectionMemory.empty(
                states,
                decay=config.memory_decay,
                strength=config.memory_strength,
                gate=config.memory_gate,
                cap=config.memory_cap,
                weight=config.memory_weight,
                past=0 if cache is None else len(cache),
                padding=None if cache is None else cache.padding,
            )
        weight = config.coherence_weight if self.training else 0.0
        last, layers, penalties = [states], [], []
        pasts = [None] * len(self.layers) if cache is None else cache.layers
        for layer, past in zip(self.layers, pasts, strict=True):
            states, memory, record = layer(states, memory, return_layers, past)
            # Only what will be read is kept.
            last = [*last, states][-len(self.readouts) :]
            if record is not None:
                layers.append(record)
            if weight:
                penalties.append(weight * (1 - phase_coherence(states).mean()))
        return Reading(tuple(last), tuple(layers), tuple(penalties))

    def features_of(self, outputs: tuple[Tensor, ...]) -> Tensor:
        parts = [readout(state) for readout, state in zip(self.readouts, outputs, strict=True)]
        return torch.stack(parts).sum(0)

    def logits_of(self, outputs: tuple[Tensor, ...], cache: ModelCache | None = None) -> Tensor:
        """As `CausalLM.logits_of`, by a `CollapsedHead` in evaluation where that saves time.

        In a cache it stays from token to token, and is made again where weights have changed.
        """
        if self.training or torch.is_grad_enabled() or not self._only_multiplies(outputs[0]):
            return super().logits_of(outputs, cache)
        modules: Any = self.readouts
        readouts = [(readout.projection, readout.norm) for readout in modules]
        head = self.head
        if cache is not None and cache.head is not None and cache.head.follows(readouts, head):
            return cache.head(outputs)
        columns, tokens = columns_of(readouts), outputs[0].shape[0] * outputs[0].shape[2]
        goes_on = cache is not None and cache.goes_on
        if 2 * columns > head.in_features or not (goes_on or tokens >= MANY_TOKENS * columns):
            return super().logits_of(outputs, cache)
        collapsed = CollapsedHead(readouts, head)
        if cache is not None:
            cache.head = collapsed
        return collapsed(outputs)

    def _only_multiplies(self, states: Tensor) -> bool:
        """Whether head and readouts are plain modules on tensors of one dtype, called eagerly.

        And enough of them that it is worth asking.
        """
        if not is_eager(states) or torch.is_autocast_enabled(states.device.type):
            return False
        if states.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # making one waits for the device
        readouts: Any = self.readouts
        if not is_plain(self.head, nn.Linear):
            return False
        weights = self.head.in_features * self.head.out_features
        if len(readouts) == 1 and readouts[0].norm is None and weights < FEW_WEIGHTS:
            return False
        linear, norms = [self.head], []
        for readout in readouts:
            if not (readout.fuses and is_plain(readout, Readout)):
                return False
            linear.append(readout.projection)
            norms += [] if readout.norm is None else [readout.norm]
        return (
            len(norms) in (0, len(readouts))
            and all(is_plain(module, nn.LayerNorm) for module in norms)
            and all(
                is_plain(module, nn.Linear)
                and module.weight.dtype == states.dtype
                and is_eager(module.weight.detach())
                for module in linear
            )
        )
