"""The language model: cylinder embedding, layers, LayerNorm and output head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import QuantumFluxConfig
from .data import IGNORED_LABEL
from .embedding import CylinderEmbedding, PhaseRotation, rotate
from .generation import generate
from .layers import EvolutionLayer, flatten_states


class LanguageModelOutput(NamedTuple):
    """logits: `(B, S, V)`. loss: the mean in nats a token, or None without labels."""

    logits: Tensor
    loss: Tensor | None


class QuantumFluxLM(nn.Module):
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
        super().__init__()
        self.config = config
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
        self._check("input_ids", input_ids)
        states = self.embedding(input_ids)
        hidden = self.projection(flatten_states(states))
        if self.config.num_layers:
            angle = self.rotation(input_ids.shape[-1])
            states = rotate(states, angle)
            for layer in self.layers:
                states, hidden = layer(states, hidden, angle)
        logits = self.head(self.norm(hidden))
        if labels is None:
            return LanguageModelOutput(logits, None)
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED_LABEL,
        )
        return LanguageModelOutput(logits, loss)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prompt and continuation, `(B, S + max_new_tokens)`; see `qflux.generation.generate`."""
        return generate(
            self,
            input_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )

    def _check(self, name: str, ids: Tensor) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be an int64 or int32 tensor, got dtype {ids.dtype}")
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(f"{name} must have shape (batch, length >= 1), got {tuple(ids.shape)}")
        # Reading the ids would synchronise a GPU and break a traced graph.
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"{name} must lie in [0, {self.config.vocab_size - 1}], "
                    f"got ids in [{low}, {high}]"
                )
