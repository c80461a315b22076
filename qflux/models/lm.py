"""The recommended language model: cylinder embedding, layers, LayerNorm and output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qflux_kernels.arguments import is_eager

from .base import CausalLM, Reading
from .cache import ModelCache
from .config import QuantumFluxConfig
from .convolution import CausalConvolution
from .embedding import CylinderEmbedding, PhaseRotation, flatten_states, rotate
from .fused import step
from .layers import EvolutionLayer
from .plain import is_plain

# The output layer starts as much larger than PyTorch's linear maps do: larger logits send larger
# gradients to the layers, which then learn sooner (benchmarks/decisions.md).
HEAD_START = 2.0


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
        # Whether layers use the token's own states, which are else for their records alone.
        self.moves = config.evolution or not config.value_dim
        self.layers = nn.ModuleList(EvolutionLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size)
        with torch.no_grad():
            self.head.weight.mul_(HEAD_START)

    def read(
        self,
        input_ids: Tensor,
        return_layers: bool = False,
        cache: ModelCache | None = None,
        position: Tensor | None = None,
    ) -> Reading:
        """Run embedding and layers on checked token ids `(B, S)`; see `CausalLM.read`."""
        states, hidden = self._start(input_ids, return_layers or self.moves)
        layers = []
        if len(self.layers):
            if position is None:
                angle = self.rotation(input_ids.shape[-1])  # (C, S)
            else:
                angle = self.rotation.at(position)
            if states is not None:
                states = rotate(states, angle)
            pasts = [None] * len(self.layers) if cache is None else cache.layers
            for layer, past in zip(self.layers, pasts, strict=True):
                states, hidden, record = layer(states, hidden, angle, return_layers, past)
                if record is not None:
                    layers.append(record)
        return Reading((self.norm(hidden),), tuple(layers))

    def _start(self, input_ids: Tensor, with_states: bool) -> tuple[Tensor | None, Tensor]:
        """The states `(B, C, S, 2)`, None unless wanted, and the stream `(B, S, H)`."""
        if not with_states and (
            is_eager(input_ids)  # a program is for any number of tokens
            and input_ids.numel() > self.config.vocab_size
            and is_plain(self.embedding, CylinderEmbedding)
            and is_plain(self.projection, nn.Linear)
        ):
            # There are fewer states to project before they are looked up.
            table = self.projection(self.embedding.table().flatten(1))  # (V, H)
            return None, nn.functional.embedding(input_ids, table)
        states = self.embedding(input_ids)
        hidden = self.projection(flatten_states(states))
        return states if with_states else None, hidden

    def read_token(self, input_ids: Tensor, cache: ModelCache) -> tuple[Tensor, ...] | None:
        if type(self).read is not QuantumFluxLM.read:
            return None
        normed = step(self, input_ids, cache)
        return None if normed is None else (normed,)

    def receptive_field(self) -> int:
        convolutions = [m for m in self.modules() if isinstance(m, CausalConvolution)]
        return sum(convolution.width - 1 for convolution in convolutions)
