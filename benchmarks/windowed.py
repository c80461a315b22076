"""The baseline transformer with a sliding window: a token attends to the last ones only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformer import Transformer, TransformerConfig, TransformerLayer

from qflux_kernels.checks import check_integer


@dataclass(frozen=True)
class WindowedConfig(TransformerConfig):
    """A `TransformerConfig`, and `window`: tokens that one attends to, itself among them, >= 1."""

    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("window", self.window, 1)


def windowed_attention(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Attention of `(B, heads, S, D)` to the last `window` tokens, in time O(S window).

    Queries meet keys in blocks of `window`: those of their own block and of the one before it.
    """
    length = queries.shape[2]
    first = F.scaled_dot_product_attention(
        queries[:, :, :window], keys[:, :, :window], values[:, :, :window], is_causal=True
    )
    if length <= window:
        return first
    batch, heads, _, width = queries.shape
    padding = (0, 0, 0, -length % window)
    # (B, heads, S, D) -> (B, heads, n, window, D)
    queries, keys, values = (
        F.pad(part, padding).unflatten(2, (-1, window)) for part in (queries, keys, values)
    )
    keys, values = (torch.cat((part[:, :, :-1], part[:, :, 1:]), 3) for part in (keys, values))
    row = torch.arange(window, device=queries.device)[:, None]
    column = torch.arange(2 * window, device=queries.device)
    visible = (row < column) & (column <= row + window)
    # As a batch of blocks, for which PyTorch has a kernel.
    blocks = (part.transpose(1, 2).flatten(0, 1) for part in (queries[:, :, 1:], keys, values))
    rest = F.scaled_dot_product_attention(*blocks, attn_mask=visible)
    rest = rest.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, heads, -1, width)
    return torch.cat((first, rest[:, :, : length - window]), 2)


class WindowedLayer(TransformerLayer):
    """`TransformerLayer` with `windowed_attention`."""

    def __init__(self, config: WindowedConfig) -> None:
        super().__init__(config)
        self.window = config.window

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return windowed_attention(queries, keys, values, self.window)

    def advance(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, start: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`mix` of tokens `(B, n, H)` behind `start` others, for rotary positions.

        Args:
            x: `(B, n, H)`.
            past: keys and values of the last `window - 1` tokens before, or of all if they are
                fewer, `(B, heads, m, H / heads)` each; None: there are none.
            start: tokens before these.

        Returns:
            `(B, n, H)`, and the past of the tokens behind these.
        """
        queries, keys, values = self.project(x)
        queries, keys = self.rotary(queries, start), self.rotary(keys, start)
        if past is not None:
            keys, values = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)
        row = torch.arange(keys.shape[2] - x.shape[1], keys.shape[2], device=x.device)[:, None]
        column = torch.arange(keys.shape[2], device=x.device)
        visible = (column <= row) & (column > row - self.window)
        gathered = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        first = max(0, keys.shape[2] - self.window + 1)
        return gathered.transpose(1, 2).flatten(2), (keys[:, :, first:], values[:, :, first:])


class WindowedTransformer(Transformer):
    """`Transformer` of a `WindowedConfig`."""

    layer = WindowedLayer
