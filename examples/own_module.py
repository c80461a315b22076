"""An nn.Module of your own around `interact`, and a task that it learns.

`python examples/own_module.py` trains it for some seconds on associative recall: pairs of a key and
a value come in, then one of the keys, and the answer is its value. A module that cannot look back
has one chance in eight.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qflux.models.embedding import rotate
from qflux_kernels import Threshold, interact


class CylinderAttention(nn.Module):
    """Tokens gather values from the tokens whose keys stand out for their queries.

    A query and a key are points on each of `cylinders` cylinders, a value is a vector. The
    selectivity of each cylinder is learned, through the soft threshold.

    Args:
        width: of the features that come in and go out.
        cylinders: like heads.
        value_dim: width of a value on a cylinder.
        causal: whether a token sees only what is before it, and itself.
    """

    def __init__(
        self, width: int, cylinders: int = 8, value_dim: int = 8, causal: bool = True
    ) -> None:
        super().__init__()
        self.sizes = (2 * cylinders, 2 * cylinders, value_dim * cylinders)
        self.cylinders, self.causal = cylinders, causal
        self.inputs = nn.Linear(width, sum(self.sizes))
        self.sigma = nn.Parameter(torch.linspace(0.1, 1.4, cylinders))
        self.output = nn.Linear(value_dim * cylinders, width)

    def forward(self, x: Tensor, angle: Tensor | None = None) -> Tensor:
        """`(B, S, width)` to the same; `angle`, `(cylinders, S)` radians, turns tokens' points."""
        queries, keys, values = (
            # (B, S, C D) -> (B, C, S, D)
            part.unflatten(-1, (self.cylinders, -1)).transpose(1, 2)
            for part in self.inputs(x).split(self.sizes, -1)
        )
        if angle is not None:
            queries, keys = rotate(queries, angle), rotate(keys, angle)
        score = Threshold(self.sigma, shrinkage="soft")
        gathered, _, degree = interact(queries, keys, values, score=score, causal=self.causal)
        mean = gathered / degree.clamp(min=1)[..., None]
        return self.output(mean.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a small MLP, each behind a LayerNorm and added to what came in."""

    def __init__(self, width: int, **options) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = CylinderAttention(width, **options)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, angle: Tensor | None = None) -> Tensor:
        """`(B, S, width)` to the same."""
        x = x + self.attention(self.norms[0](x), angle)
        return x + self.mlp(self.norms[1](x))


class Recall(nn.Module):
    """Answers which value came with a key, with attention or without."""

    def __init__(self, symbols: int, width: int = 32, attends: bool = True) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(symbols, width), nn.Embedding(symbols, width)
        self.block = Block(width) if attends else nn.Linear(width, width)
        self.head = nn.Linear(width, symbols)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Logits `(B, symbols)` for keys `(B, N + 1)`, the last one asked, and values `(B, N)`."""
        told = self.keys(keys[:, :-1]) + self.values(values)
        asked = self.keys(keys[:, -1:])
        return self.head(self.block(torch.cat((told, asked), 1))[:, -1])


def questions(batch: int, symbols: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `(batch, pairs + 1)`, values `(batch, pairs)`, and the answers `(batch,)`."""
    keys = torch.rand(batch, symbols).argsort(-1)[:, :pairs]
    values = torch.randint(symbols, (batch, pairs))
    asked = torch.randint(pairs, (batch, 1))
    return torch.cat((keys, keys.gather(1, asked)), 1), values, values.gather(1, asked)[:, 0]


def train(steps: int, symbols: int = 8, pairs: int = 6, seed: int = 0) -> dict[str, float]:
    """Share of right answers to 2,000 new questions, with attention and without."""
    found = {}
    for name, attends in (("attention", True), ("none", False)):
        torch.manual_seed(seed)
        model = Recall(symbols, attends=attends)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            keys, values, answer = questions(64, symbols, pairs)
            loss = F.cross_entropy(model(keys, values), answer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        keys, values, answer = questions(2000, symbols, pairs)
        with torch.no_grad():
            found[name] = (model(keys, values).argmax(-1) == answer).float().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    for name, share in train(parser.parse_args().steps).items():
        print(f"{name:10} {share:.1%} right")


if __name__ == "__main__":
    main()
