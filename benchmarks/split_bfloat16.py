"""What a tensor core would compute of a pair, emulated: float32 in bfloat16 parts, on a CPU.

python benchmarks/split_bfloat16.py
"""

from __future__ import annotations

import torch

TOKENS, TILE = 2000, 128
# Which parts of a query and of a key are multiplied, the smallest products first.
PRODUCTS = {1: [(0, 0)], 2: [(1, 0), (0, 1), (0, 0)]}
PRODUCTS[3] = [(1, 1), (2, 0), (0, 2), *PRODUCTS[2]]


def split(x: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Numbers of bfloat16 whose sum is x, as nearly as so many can."""
    found = []
    for _ in range(parts):
        found.append(x.bfloat16().float())
        x = x - found[-1]
    return found


def by_tiles(mask: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """mask @ columns, float32 inside a tile of keys and float64 across."""
    tiles = zip(mask.float().split(TILE, 1), columns.split(TILE), strict=True)
    return sum((part @ values).double() for part, values in tiles)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, 2)
    q = x / 2
    truth = q.double() @ x.double().mT + 0.5
    size = q.double().norm(dim=1)[:, None] * x.double().norm(dim=1) + 0.5
    tau = truth.mean(1, keepdim=True) + 0.5 * truth.std(1, keepdim=True, correction=0)
    kept = truth >= tau
    weight = torch.where(kept, truth, 0.0)
    context, bound = weight @ x.double(), weight.abs() @ x.double().abs()

    def report(name: str, score: torch.Tensor, sums: torch.Tensor) -> None:
        error = ((score.double() - truth) / size).abs().max()
        flips = ((score.double() >= tau) != kept).sum()
        of_sums = ((sums - context).abs() / bound).max()
        print(f"{name:8} score {error:.1e}  decisions {flips:5d}  context {of_sums:.1e}")

    ones = torch.ones(TOKENS)
    px, py = x.unbind(1)
    moments = torch.stack((ones, px, py, px * px, px * py, py * py), 1)
    plain = q @ x.mT + 0.5
    masked = torch.where(kept, plain, 0.0).split(TILE, 1)
    tiles = zip(masked, x.split(TILE), strict=True)
    report("float32", plain, sum((w[..., None] * v).sum(1).double() for w, v in tiles))
    for parts, products in PRODUCTS.items():
        score = torch.full_like(plain, 0.5)
        for c in range(2):
            of_query, of_key = split(q[:, c], parts), split(x[:, c], parts)
            for i, j in products:
                score = score + of_query[i][:, None] * of_key[j]
        total = sum(by_tiles(kept, part) for part in split(moments, parts))
        _, sx, sy, xx, xy, yy = total.unbind(1)
        qx, qy = q.double().unbind(1)
        sums = torch.stack((qx * xx + qy * xy + sx / 2, qx * xy + qy * yy + sy / 2), 1)
        report(f"{parts} parts", score, sums)


if __name__ == "__main__":
    main()
