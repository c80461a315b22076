"""The baseline transformer with a state-space layer, Mamba-2's, in place of attention.

Source: Dao and Gu, "Transformers are SSMs", 2024, sections 6 and 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformer import Transformer, TransformerConfig, TransformerLayer

from qflux_kernels.checks import check_integer


@dataclass(frozen=True)
class StateSpaceConfig(TransformerConfig):
    """A `TransformerConfig`; there are no positions, since the recurrence has an order.

    Args:
        chunk: tokens whose pairs are computed at once, >= 1; for the time, not for the result.
    """

    chunk: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("chunk", self.chunk, 1)


def state_space(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    chunk: int,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q_t . h_t of the recurrence h_t = exp(log_decay_t) h_{t-1} + k_t v_t, in time O(S chunk).

    That is the sum over s <= t of exp(log_decay_{s+1} + ... + log_decay_t) (q_t . k_s) v_s: by all
    pairs within a chunk, and by the state before it.

    Args:
        queries, keys: `(B, S, N)`, the same for all heads.
        values: `(B, S, heads, P)`.
        log_decay: `(B, S, heads)`, <= 0.
        chunk: tokens of a chunk, >= 1.
        state: h before the first token, `(B, heads, N, P)`; None: zeros.

    Returns:
        The outputs `(B, S, heads, P)`, and the state behind the last token.
    """
    length = queries.shape[1]
    chunk = min(chunk, length)
    # Tokens of zeros behind the end change nothing before it.
    queries, keys, values, log_decay = (
        F.pad(part, (0, 0) * (part.ndim - 2) + (0, -length % chunk)).unflatten(1, (-1, chunk))
        for part in (queries, keys, values, log_decay)
    )
    queries, keys = queries[:, None], keys[:, None]  # (B, 1, n, chunk, N)
    values = values.movedim(3, 1)  # (B, heads, n, chunk, P)
    decayed = log_decay.movedim(3, 1).cumsum(-1)  # (B, heads, n, chunk)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=values.device).triu(1)
    between = (decayed[..., :, None] - decayed[..., None, :]).masked_fill(future, -math.inf)
    inside = (queries @ keys.mT * between.exp()) @ values

    end = decayed[..., -1:]
    added = (keys * (end - decayed).exp()[..., None]).mT @ values  # (B, heads, n, N, P)
    state, states = torch.zeros_like(added[:, :, 0]) if state is None else state, []
    for new, kept in zip(added.unbind(2), end.exp()[..., None].unbind(2), strict=True):
        states.append(state)
        state = kept * state + new
    before = decayed.exp()[..., None] * (queries @ torch.stack(states, 2))
    return (inside + before).movedim(1, 3).flatten(1, 2)[:, :length], state


class StateSpaceLayer(TransformerLayer):
    """`TransformerLayer` whose tokens tell one another what a state keeps.

    The maps have as many weights as an attention's: values and gates of the width H, and keys and
    queries of H / 2, the size of a state, that the heads share.
    """

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_dim
        self.chunk, self.widths = config.chunk, (hidden, hidden, hidden // 2, hidden // 2)
        self.step = nn.Linear(hidden, self.heads, bias=False)
        step = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + (-(-step).expm1()).log())  # of the softplus
        self.log_rate = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(self.heads, 1))
        self.norm = nn.RMSNorm(hidden)

    def mix(self, x: Tensor) -> Tensor:
        return self.advance(x)[0]

    def advance(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`mix` of tokens behind those of `state`, and the state behind them."""
        values, gate, keys, queries = self.inputs(x).split(self.widths, -1)
        values, keys, queries = F.silu(values), F.silu(keys), F.silu(queries)
        values = values.unflatten(-1, (self.heads, -1))
        step = F.softplus(self.step(x) + self.step_bias)  # (B, S, heads)
        log_decay = -step * self.log_rate.exp()
        told, state = state_space(
            queries, keys, step[..., None] * values, log_decay, self.chunk, state
        )
        return self.norm((told + self.skip * values).flatten(2) * F.silu(gate)), state


class StateSpaceModel(Transformer):
    """`Transformer` of a `StateSpaceConfig`."""

    layer = StateSpaceLayer
