"""The baseline: a pre-norm transformer with the choices that `lm.py` compares with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qflux.models.convolution import CausalConvolution
from qflux_kernels.checks import check_choice

# What QFlux has beside its geometry, for baselines that are to differ in that alone.
GATED = {"mlp": "swiglu", "conv_width": 4, "mlp_conv": True}


@dataclass(frozen=True)
class TransformerConfig:
    """A pre-norm transformer: 4 layers, width 128 and 4 heads are nanoGPT's CPU model.

    Args:
        vocab_size: number of token ids.
        num_layers, hidden_dim, num_heads, mlp_ratio: the shape.
        context_length: only learned positions are limited to it.
        positions: "rotary" or "learned".
        tied: the head shares the embedding's weights.
        bias: biases in linear maps and norms.
        conv_width: taps of a causal depthwise convolution before the projections; 0: none.
        mlp_conv: one before the MLP too, of the same width.
        mlp: "gelu" or "swiglu" (at two thirds of the width: equal parameters).
        init: "torch" (its defaults) or "gpt2" (0.02, residual outputs by 1/sqrt(2 L)).
        theta: base of the rotary frequencies.
        dropout: on the residual branches.

    Raises:
        ValueError: an unknown `positions`, `mlp` or `init`, naming it and the allowed values.
    """

    vocab_size: int
    num_layers: int = 4
    hidden_dim: int = 128
    num_heads: int = 4
    mlp_ratio: float = 4.0
    context_length: int = 64
    positions: str = "rotary"
    tied: bool = False
    bias: bool = True
    conv_width: int = 0
    mlp_conv: bool = False
    mlp: str = "gelu"
    init: str = "torch"
    theta: float = 10000.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, ("rotary", "learned"))
        check_choice("mlp", self.mlp, ("gelu", "swiglu"))
        check_choice("init", self.init, ("torch", "gpt2"))


class Rotary(nn.Module):
    """Rotary positions of a head of even width (Su et al. 2021)."""

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        frequency = theta ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Heads `(..., S, width)`, turned by their place behind `start` tokens."""
        place = torch.arange(start, start + x.shape[-2], device=x.device)
        angle = place[:, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos - right * sin, left * sin + right * cos), -1)


class TransformerLayer(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm and added to the stream.

    `Rotary` turns queries and keys unless the model has learned positions.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_dim, config.bias
        self.heads, self.swiglu = config.num_heads, config.mlp == "swiglu"
        self.attention_norm = nn.LayerNorm(hidden, bias=bias)
        self.conv = self.mlp_conv = nn.Identity()
        if config.conv_width:
            self.conv = CausalConvolution(hidden, config.conv_width)
        if config.conv_width and config.mlp_conv:
            self.mlp_conv = CausalConvolution(hidden, config.conv_width)
        self.inputs = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.output = nn.Linear(hidden, hidden, bias=bias)
        self.rotary = nn.Identity()
        if config.positions == "rotary":
            self.rotary = Rotary(hidden // self.heads, config.theta)
        self.mlp_norm = nn.LayerNorm(hidden, bias=bias)
        inner = round(config.mlp_ratio * hidden * (2 / 3 if self.swiglu else 1))
        self.up = nn.Linear(hidden, inner * (2 if self.swiglu else 1), bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, S, H)` to `(B, S, H)`."""
        x = x + self.dropout(self.output(self.mix(self.conv(self.attention_norm(x)))))
        inner = self.up(self.mlp_conv(self.mlp_norm(x)))
        if self.swiglu:
            gate, inner = inner.chunk(2, -1)
            inner = F.silu(gate) * inner
        else:
            inner = F.gelu(inner)
        return x + self.dropout(self.down(inner))

    def mix(self, x: Tensor) -> Tensor:
        """What tokens tell one another, `(B, S, H)` to `(B, S, H)`, before the output map."""
        queries, keys, values = self.project(x)
        gathered = self.attend(self.rotary(queries), self.rotary(keys), values)
        return gathered.transpose(1, 2).flatten(2)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values `(B, heads, S, H / heads)`, without positions."""
        return self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention of heads `(B, heads, S, H / heads)`."""
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


class Transformer(nn.Module):
    """GPT-2's form: embedding, layers, LayerNorm and a linear head."""

    layer: ClassVar[type[TransformerLayer]] = TransformerLayer

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.position = None
        if config.positions == "learned":
            self.position = nn.Parameter(
                0.02 * torch.randn(config.context_length, config.hidden_dim)
            )
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim, bias=config.bias)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        if config.init == "gpt2":
            self.initialise_like_gpt2()
        if config.tied:
            self.head.weight = self.embedding.weight

    def initialise_like_gpt2(self) -> None:
        """Normal weights of deviation 0.02, the last map of a residual branch scaled by depth."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            for last in (layer.output, layer.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * len(self.layers)))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `(B, S, V)` of token ids `(B, S)`."""
        x = self.embedding(ids)
        if self.position is not None:
            x = x + self.position[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
