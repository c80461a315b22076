"""The language model: cylinder embedding, layers, LayerNorm and output head."""

from __future__ import annotations

from torch import Tensor, nn

from .base import CausalLM, LanguageModelOutput, check_ids, next_token_loss
from .config import QuantumFluxConfig
from .embedding import CylinderEmbedding, PhaseRotation, rotate
from .layers import EvolutionLayer, flatten_states


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

    Source: first seed, sections 1 and 5; second seed, "Key Components".
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

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> LanguageModelOutput:
        """Logits of the next token at every position, and the loss if there are labels.

        Args:
            input_ids: `(B, S)` integer token ids in [0, V), S >= 1.
            labels: `(B, S)`, aligned with `input_ids` and usually the same tensor: the shift by
                one token happens here, so that position i is scored against label i + 1. Labels
                of -100 are ignored.

        Raises:
            TypeError, ValueError: wrong dtype, shape or (checked on the CPU) token ids.
        """
        logits = self.head(self.features(input_ids))
        loss = None if labels is None else next_token_loss(logits, input_ids, labels)
        return LanguageModelOutput(logits, loss)

    def features(self, input_ids: Tensor) -> Tensor:
        """What the head reads, `(B, S, H)`."""
        check_ids("input_ids", input_ids, self.config.vocab_size)
        states = self.embedding(input_ids)
        hidden = self.projection(flatten_states(states))
        if self.config.num_layers:
            angle = self.rotation(input_ids.shape[-1])
            states = rotate(states, angle)
            for layer in self.layers:
                states, hidden = layer(states, hidden, angle)
        return self.norm(hidden)
