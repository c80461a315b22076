"""The recommended language model: cylinder embedding, layers, LayerNorm and output head."""

from __future__ import annotations

from torch import Tensor, nn

from .base import CausalLM, Reading
from .config import QuantumFluxConfig
from .embedding import CylinderEmbedding, PhaseRotation, flatten_states, rotate
from .layers import EvolutionLayer


class QuantumFluxLM(CausalLM):
    """A causal language model of tokens that move on cylinders.

    A token id becomes a state (radius, phase) on each cylinder, whose projection starts the hidden
    stream. In every layer the stream is projected to states again, a position turns their phases,
    and the geometry of the states decides which tokens' values are gathered into the stream; with
    `evolution` the token's own states move along under their interaction. LayerNorm and one linear
    map read the logits off the stream. The logits at a position depend on the tokens up to that
    position only.

    Args:
        config: a `QuantumFluxConfig`.

    Source: the Flux document, sections 1 and 5; the QFNN document, "Key Components".
    """

    def __init__(self, config: QuantumFluxConfig) -> None:
        super().__init__(config)
        self.embedding = CylinderEmbedding(config)
        self.projection = nn.Linear(2 * config.num_cylinders, config.hidden_dim)
        if config.num_layers:
            self.rotation = PhaseRotation(config)
        self.layers = nn.ModuleList(EvolutionLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size)

    def read(self, input_ids: Tensor, return_layers: bool = False) -> Reading:
        """Run embedding and layers on checked token ids `(B, S)`."""
        states = self.embedding(input_ids)  # (B, C, S, 2)
        hidden = self.projection(flatten_states(states))  # (B, S, H)
        layers = []
        if len(self.layers):
            angle = self.rotation(input_ids.shape[-1])  # (C, S)
            states = rotate(states, angle)
            for layer in self.layers:
                states, hidden, record = layer(states, hidden, angle, return_layers)
                if record is not None:
                    layers.append(record)
        return Reading(self.norm(hidden), tuple(layers))
