"""The networks of the two documents: tokens are points on cylinders, and nothing else.

The presets `flux` (first seed) and `qfnn` (second seed) are configurations of this model.
Every part is optional, so that one can be studied without the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qflux_kernels import InverseGate, Radius, Threshold, evolve, interact, project_norm
from qflux_kernels.options import BACKENDS, REDUCTIONS, STATISTICS

from ..train.hebbian import ConnectionMemory
from .base import CausalLM, check_ids, next_token_loss
from .config import SCORES
from .embedding import CylinderEmbedding, rotate
from .layers import flatten_states
from .record import Record

EMBEDDINGS = ("cardioid", "annulus", "learned")
POSITIONS = ("none", "phase")
TIMESTEPS = ("constant", "beta")
RADIUS_BOUNDS = ("fixed", "learned", "context")
READOUTS = ("last", "layers")


@dataclass(frozen=True)
class CylinderConfig(Record):
    """Hyperparameters of `CylinderLM`. The defaults are the first seed's where it gives one.

    Args:
        vocab_size: number of token ids V, >= 1.
        num_layers: evolution layers, >= 0; 0 leaves embedding and readout only (an ablation).
        num_cylinders: cylinders C per token, >= 1; the documents have one, and name several as a
            future direction.
        hidden_dim: width H that the states are projected to, >= 1.
        context_length: tokens seen at once when generating, the default window for training, and
            the length in the distribution of the time step; the model accepts any length.
        embedding: where tokens start, see `TokenStates`: "cardioid", "annulus" or "learned".
        train_embedding: whether gradients move a "cardioid" or "annulus"; "learned" always moves.
        phase_shift: angle of token 0 on the cardioid, radians.
        position: "phase" turns state i by its position, see `phase_frequencies`; "none".
        score: "threshold" (first seed) or "inverse_gate" (second).
        sigma: selectivity of the threshold in standard deviations.
        statistics: window of the threshold's statistics. "row" is the first seed's code to the
            letter and lets the future move the threshold: losses of such a model are no losses of
            a language model. "prefix" (default) is causal.
        alpha: weight of the orthogonal term of the inverse gate.
        min_gate: pairs whose gate is not above it are dropped.
        epsilon: inside the root of the threshold, or softening of the gate; >= 0.
        reduction: "sum" is the documents'; "mean" divides by the number of visible tokens.
        timestep: "constant" (dt_scale) or "beta", see `TimeStep`.
        dt_scale: > 0.
        dt_max: largest time step that "beta" gives, > 0.
        skip_beta, skip_center: the dynamic skip keeps the share
            sigmoid(skip_beta * (dt - skip_center)) of the old state. The first seed centres it on
            dt_scale (None), the second's code on 1.
        radius_min, radius_max, radius_rate, radius_reversion, radius_target: the radius rule, see
            `qflux_kernels.Radius`; reversion > 0 makes it mean-reverting.
        radius_bounds: "fixed", or adaptive: "learned" or "context", see `AdaptiveBounds`.
        readout: "last" projects the states after the last layer; "layers" adds up a projection of
            its own for every layer.
        readout_norm: LayerNorm after each projection.
        coherence_weight: weight, >= 0, in the training loss of sum over layers of 1 - coherence,
            see `phase_coherence`.
        memory: keep a `ConnectionMemory` over the layers of a forward pass.
        memory_decay, memory_strength, memory_gate, memory_cap, memory_weight: its rule.
        backend: passed to `qflux_kernels`.

    Raises:
        TypeError, ValueError: naming the argument, its value and the allowed values.

    Source: first seed, sections 1, 5, 7 and 9; second seed, "Key Components" and "Future
    Directions".
    """

    architecture: ClassVar[str] = "cylinder"

    vocab_size: int
    num_layers: int = 6
    num_cylinders: int = 1
    hidden_dim: int = 768
    context_length: int = 1024
    embedding: str = "cardioid"
    train_embedding: bool = False
    phase_shift: float = math.pi / 4
    position: str = "phase"
    score: str = "threshold"
    sigma: float = 0.5
    statistics: str = "prefix"
    alpha: float = 0.5
    min_gate: float = 0.0
    epsilon: float = 1e-6
    reduction: str = "sum"
    timestep: str = "beta"
    dt_scale: float = 1e-5
    dt_max: float = 0.05
    skip_beta: float = 5.0
    skip_center: float | None = None
    radius_min: float = 0.1
    radius_max: float = 2.0
    radius_rate: float = 0.01
    radius_reversion: float = 0.0
    radius_target: float = 1.0
    radius_bounds: str = "fixed"
    readout: str = "layers"
    readout_norm: bool = True
    coherence_weight: float = 0.0
    memory: bool = False
    memory_decay: float = 0.99
    memory_strength: float = 0.1
    memory_gate: float = 0.1
    memory_cap: float = 0.5
    memory_weight: float = 0.3
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_cylinders", "hidden_dim"):
            self._check_integer(name, 1)
        self._check_integer("num_layers", 0)
        self._check_integer("context_length", 2)
        for name, choices in (
            ("embedding", EMBEDDINGS),
            ("position", POSITIONS),
            ("score", SCORES),
            ("statistics", STATISTICS),
            ("reduction", REDUCTIONS),
            ("timestep", TIMESTEPS),
            ("radius_bounds", RADIUS_BOUNDS),
            ("readout", READOUTS),
            ("backend", BACKENDS),
        ):
            self._check_choice(name, choices)
        for name in ("train_embedding", "readout_norm", "memory"):
            self._check_flag(name)
        for name in ("phase_shift", "sigma", "alpha", "skip_beta", "radius_rate"):
            self._check_real(name)
        if self.skip_center is not None:
            self._check_real("skip_center")
        for name in ("radius_reversion", "radius_target", "memory_strength", "memory_weight"):
            self._check_real(name)
        for name in ("min_gate", "epsilon", "radius_min", "coherence_weight"):
            self._check_real(name, minimum=0.0)
        for name in ("memory_decay", "memory_gate", "memory_cap"):
            self._check_real(name, minimum=0.0)
        self._check_real("radius_max", minimum=self.radius_min, why=" = radius_min")
        for name in ("dt_scale", "dt_max"):
            self._check_real(name, above=0.0)
        if self.timestep == "beta" and self.hidden_dim < 3:
            raise ValueError(
                f"hidden_dim must be >= 3 for timestep='beta', whose first parameter is "
                f"(hidden_dim - 2) / 2, got {self.hidden_dim!r}"
            )


class TokenStates(nn.Module):
    """The state (radius, phase) that each token starts from, on each cylinder.

    "cardioid": phase 2 pi v (c + 1) / V + phase_shift for token v on cylinder c, radius
    (1 + sin(2 pi v / V + phase_shift)) / 2. "annulus": random phase, radius falling linearly with
    the id from radius_max to radius_min. Both are tables of x and y: buffers, or parameters with
    `train_embedding`. "learned" is `CylinderEmbedding`.

    Source: first seed, sections 1 and 2 (2 V numbers); second seed, "Cylindrical Token
    Representation". The documents leave the start open; cardioid and annulus are those of the
    programs they describe.
    """

    def __init__(self, config: CylinderConfig) -> None:
        super().__init__()
        self.learned = CylinderEmbedding(config) if config.embedding == "learned" else None
        if self.learned is not None:
            return
        tokens, cylinders = config.vocab_size, config.num_cylinders
        share = torch.arange(tokens)[:, None] / tokens
        if config.embedding == "cardioid":
            turns = torch.arange(1, cylinders + 1)
            phase = 2 * math.pi * share * turns + config.phase_shift
            radius = (1 + torch.sin(2 * math.pi * share + config.phase_shift)) / 2
        else:
            phase = 2 * math.pi * torch.rand(tokens, cylinders)
            radius = config.radius_min + (config.radius_max - config.radius_min) * (1 - share)
        table = torch.stack((radius * phase.cos(), radius * phase.sin()), -1)
        if config.train_embedding:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids `(B, S)` to states `(B, C, S, 2)`."""
        if self.learned is not None:
            return self.learned(input_ids)
        rows = nn.functional.embedding(input_ids, self.table.flatten(1))
        return rows.unflatten(-1, self.table.shape[1:]).transpose(1, 2)


def phase_frequencies(config: CylinderConfig) -> Tensor:
    """Radians a token by which each cylinder's phases turn with the position, `(C,)`.

    One cylinder turns once over `context_length`; several are spread geometrically from there up
    to one radian a token.

    Source: first seed, section 1 ("Position encoded directly in quantum state angles").
    """
    slowest = 2 * math.pi / config.context_length
    spread = torch.linspace(0.0, 1.0, config.num_cylinders) if config.num_cylinders > 1 else 0.0
    return torch.as_tensor(slowest ** (1 - spread), dtype=torch.float32).reshape(-1)


class TimeStep(nn.Module):
    """The time step of a layer.

    "constant": dt_scale. "beta": with u from Beta((H - 2) / 2, (context_length - 1) / 2),

        dt = clamp(dt_scale / clamp(u, 1e-3, 0.999), 1e-6, dt_max)

    drawn for every sequence and layer in training; in evaluation u is the mean of the
    distribution, so that two evaluations agree.

    Source: first seed, section 5 (`sample_timestep`).
    """

    def __init__(self, config: CylinderConfig) -> None:
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
        else:
            u = states.new_full(batch, a / (a + b))
        return (self.scale / u.clamp(1e-3, 0.999)).clamp(1e-6, self.limit)


class AdaptiveBounds(nn.Module):
    """Smallest and largest radius as something to learn.

    low = radius_min exp(a) and high = low + (radius_max - radius_min) exp(b). "learned" has one
    pair (a, b) for each cylinder. "context" makes them a linear function of what a token has seen:
    the running means of the states and of their radii. Both start at a = b = 0, the fixed bounds.

    Source: second seed, "Adaptive radius bounds: Context-dependent r_min and r_max values"; first
    seed, section 9, "Quantum Radius Tuning".
    """

    def __init__(self, config: CylinderConfig) -> None:
        super().__init__()
        self.low, self.span = config.radius_min, config.radius_max - config.radius_min
        self.context = config.radius_bounds == "context"
        inputs = 4 if self.context else 1
        self.weight = nn.Parameter(torch.zeros(config.num_cylinders, inputs, 2))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """low and high for states `(B, C, S, 2)`: `(B, C, S)`, or `(C, 1)` if not by context."""
        if self.context:
            radius = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
            seen = torch.cat((states, radius), -1).cumsum(-2)
            count = torch.arange(1, states.shape[-2] + 1, device=states.device)[:, None]
            inputs = torch.cat((torch.ones_like(radius), seen / count), -1)
            # No matrix product, which autocast would take in half precision.
            logits = (inputs[..., None] * self.weight[:, None]).sum(-2)
        else:
            logits = self.weight
        a, b = logits.unbind(-1)
        low = self.low * a.exp()
        return low, low + self.span * b.exp()


class LayerMetrics(NamedTuple):
    """What a layer did, as tensors without dimensions on the device of the states.

    density: kept pairs over pairs that may be seen. strength: mean row sum of the scores.
    radius_mean, radius_std: of the radii after the layer. coherence: mean of `phase_coherence`.
    skip: mean share of the old state that stayed.

    Source: first seed, section 5 (`metrics`).
    """

    density: Tensor
    strength: Tensor
    radius_mean: Tensor
    radius_std: Tensor
    coherence: Tensor
    skip: Tensor


class CylinderLayer(nn.Module):
    """One Heun-Euler step, the radius rule and the dynamic skip; no parameters by default.

    Fixed bounds and no memory are one fused call. Otherwise the rule around the interaction is
    PyTorch's; the pairs stay in the kernels.

    Source: first seed, sections 5 and 7; second seed, "State Evolution".
    """

    def __init__(self, config: CylinderConfig) -> None:
        super().__init__()
        self.timestep = TimeStep(config)
        if config.score == "threshold":
            self.score = Threshold(config.sigma, config.statistics, config.epsilon)
        else:
            self.score = InverseGate(config.alpha, config.epsilon, config.min_gate)
        self.radius = Radius(
            config.radius_min,
            config.radius_max,
            config.radius_rate,
            config.radius_reversion,
            config.radius_target,
        )
        self.bounds = AdaptiveBounds(config) if config.radius_bounds != "fixed" else None
        center = config.dt_scale if config.skip_center is None else config.skip_center
        self.skip_beta, self.skip_center = config.skip_beta, center
        self.options = {"reduction": config.reduction, "backend": config.backend}

    def forward(
        self, states: Tensor, memory: ConnectionMemory | None = None
    ) -> tuple[Tensor, LayerMetrics, ConnectionMemory | None]:
        """States `(B, C, S, 2)` after the layer, what it did, and the memory after it."""
        dt = self.timestep(states)
        skip = torch.sigmoid(self.skip_beta * (dt - self.skip_center))
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
        return moved, _metrics(moved, strength, degree, skip), memory

    def _heun(
        self, states: Tensor, dt: Tensor, memory: ConnectionMemory | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if memory is None:
            return evolve(states, dt, score=self.score, radius=None, **self.options)

        def context(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            heard = interact(points, score=self.score, **self.options)
            remembered, strength = memory.context(points, self.options["reduction"])
            return heard.context + remembered, heard.strength + strength, heard.degree

        dt = dt[..., None]
        first, strength, degree = context(states)
        second, _, _ = context(states + dt * first)
        return states + dt * (first + second) / 2, strength, degree

    def _move_radius(self, states: Tensor, moved: Tensor, strength: Tensor) -> Tensor:
        """The radius rule of `qflux_kernels.Radius`, with bounds that have gradients."""
        rule = self.radius
        radius = torch.linalg.vector_norm(moved, dim=-1).clamp(min=1e-6)
        target = radius + rule.rate * strength - rule.reversion * (radius - rule.target)
        if self.bounds is None:
            target = target.clamp(rule.min, rule.max)
        else:
            low, high = self.bounds(states)
            target = torch.minimum(torch.maximum(target, low), high)
        return moved * (target / radius)[..., None]


class Readout(nn.Module):
    """States projected to the hidden width, normalised if asked.

    Source: first seed, sections 1, 2 (2 H numbers) and 7.1; second seed, "Parameter Efficiency".
    """

    def __init__(self, config: CylinderConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * config.num_cylinders, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim) if config.readout_norm else None

    def forward(self, states: Tensor) -> Tensor:
        """States `(B, C, S, 2)` to `(B, S, H)`."""
        features = flatten_states(states)
        if self.norm is None:
            return self.projection(features)
        return project_norm(
            features,
            self.projection.weight,
            self.projection.bias,
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
        )


class CylinderOutput(NamedTuple):
    """What `CylinderLM` returns.

    logits: `(B, S, V)`. loss: what to minimise, None without labels; in training it has the
    coherence term, in evaluation it is `cross_entropy`. cross_entropy: nats a token. states: the
    embedding and the states after each layer, L + 1 times `(B, C, S, 2)`. layers: what each layer
    did.
    """

    logits: Tensor
    loss: Tensor | None
    cross_entropy: Tensor | None
    states: tuple[Tensor, ...]
    layers: tuple[LayerMetrics, ...]


class CylinderLM(CausalLM):
    """The causal language model of the two documents.

    Args:
        config: a `CylinderConfig`; `qflux.models.presets` has the documents' own.

    Source: first seed, sections 1 and 5; second seed, "Key Components".
    """

    def __init__(self, config: CylinderConfig) -> None:
        super().__init__(config)
        self.embedding = TokenStates(config)
        frequency = phase_frequencies(config) if config.position == "phase" else None
        self.register_buffer("frequency", frequency, persistent=False)
        self.layers = nn.ModuleList(CylinderLayer(config) for _ in range(config.num_layers))
        readouts = max(1, config.num_layers) if config.readout == "layers" else 1
        self.readouts = nn.ModuleList(Readout(config) for _ in range(readouts))
        self.head = nn.Linear(config.hidden_dim, config.vocab_size)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CylinderOutput:
        """Logits of the next token at every position, and the losses if there are labels.

        Args:
            input_ids: `(B, S)` integer token ids in [0, V), S >= 1.
            labels: `(B, S)`, aligned with `input_ids`; position i is scored against label i + 1,
                and labels of -100 are ignored.

        Raises:
            TypeError, ValueError: wrong dtype, shape or (checked on the CPU) token ids.
        """
        states, layers = self.evolve(input_ids)
        logits = self.head(self._read(states))
        if labels is None:
            return CylinderOutput(logits, None, None, states, layers)
        cross_entropy = loss = next_token_loss(logits, input_ids, labels)
        if self.training and self.config.coherence_weight:
            for layer in layers:
                loss = loss + self.config.coherence_weight * (1 - layer.coherence)
        return CylinderOutput(logits, loss, cross_entropy, states, layers)

    def features(self, input_ids: Tensor) -> Tensor:
        """What the head reads, `(B, S, H)`."""
        return self._read(self.evolve(input_ids)[0])

    def evolve(self, input_ids: Tensor) -> tuple[tuple[Tensor, ...], tuple[LayerMetrics, ...]]:
        """The states before and after every layer, and what each layer did."""
        check_ids("input_ids", input_ids, self.config.vocab_size)
        states = self.embedding(input_ids)
        if self.frequency is not None:
            position = torch.arange(input_ids.shape[-1], device=input_ids.device)
            states = rotate(states, self.frequency[:, None] * position)
        memory = None
        if self.config.memory:
            memory = ConnectionMemory.empty(
                states,
                decay=self.config.memory_decay,
                strength=self.config.memory_strength,
                gate=self.config.memory_gate,
                cap=self.config.memory_cap,
                weight=self.config.memory_weight,
            )
        history, layers = [states], []
        for layer in self.layers:
            states, metrics, memory = layer(states, memory)
            history.append(states)
            layers.append(metrics)
        return tuple(history), tuple(layers)

    def _read(self, states: tuple[Tensor, ...]) -> Tensor:
        last = states[-len(self.readouts) :]
        return torch.stack(
            [readout(state) for readout, state in zip(self.readouts, last, strict=True)]
        ).sum(0)


def phase_coherence(states: Tensor) -> Tensor:
    """How far the phases of a sequence agree: the mean cosine over all pairs, itself included.

    It equals |mean unit vector|^2, which takes O(S) and has gradients. 1: one phase; 1 / S on
    average for random ones.

    Args:
        states: `(..., S, 2)`.

    Returns:
        `(...)`, in [0, 1].

    Source: second seed, "Phase-coherent regularization".
    """
    radius = torch.linalg.vector_norm(states, dim=-1, keepdim=True).clamp(min=1e-6)
    return (states / radius).mean(-2).square().sum(-1)


def _metrics(states: Tensor, strength: Tensor, degree: Tensor, skip: Tensor) -> LayerMetrics:
    length = states.shape[-2]
    visible = length * (length + 1) / 2 * math.prod(states.shape[:-2])
    radius = torch.linalg.vector_norm(states.detach(), dim=-1)
    return LayerMetrics(
        density=degree.sum() / visible,
        strength=strength.detach().mean(),
        radius_mean=radius.mean(),
        radius_std=radius.std(correction=0),
        coherence=phase_coherence(states).mean(),
        skip=skip.detach().mean(),
    )
