"""How little has to be looked at: the band of the sweep, and the nodes of a tree over the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pairs import Pairs


class Node(NamedTuple):
    """A box of a tree that a query meets.

    low, high: `(2,)`, its corners. keys: how many keys it holds. kind: "kept" if all of them lie
    beyond the line, "dropped" if none does, "crossed" if they have to be looked at one by one.
    """

    low: Tensor
    high: Tensor
    keys: int
    kind: str


def tree_cover(keys: Tensor, direction: Tensor, limit: float, leaf: int = 8) -> list[Node]:
    """The nodes of a k-d tree at which a half-plane query stops.

    Args:
        keys: `(K, 2)` finite points.
        direction: `(2,)`.
        limit: keys with direction . key >= limit are wanted.
        leaf: most keys of a leaf, >= 1.

    Returns:
        Nodes that hold each key once; empty for no keys.
    """
    found: list[Node] = []
    waiting = [keys] if len(keys) else []
    while waiting:
        inside = waiting.pop()
        low, high = inside.amin(0), inside.amax(0)
        least = torch.where(direction >= 0, low, high) @ direction
        most = torch.where(direction >= 0, high, low) @ direction
        if least >= limit or most < limit or len(inside) <= leaf:
            kind = "kept" if least >= limit else "dropped" if most < limit else "crossed"
            found.append(Node(low, high, len(inside), kind))
            continue
        order = inside[:, int((high - low).argmax())].argsort(stable=True)
        middle = len(inside) // 2
        waiting += [inside[order[middle:]], inside[order[:middle]]]
    return found


def band_share(pairs: Pairs, block: int = 64) -> float:
    """Share of visible pairs that blocks of rows with neighbouring directions must test.

    Rows are sorted by the direction of their query and cut into blocks, as the sweep does it; a
    key is certain for a block if every row that sees it decides alike. 1 where nothing is certain.

    Args:
        pairs: of a cylinder.
        block: rows of a block, >= 1.
    """
    order = torch.atan2(pairs.direction[:, 1], pairs.direction[:, 0]).argsort(stable=True)
    tested = 0
    for rows in order.split(block):
        kept, visible = pairs.kept[rows], pairs.visible[rows]
        mixed = kept.any(0) & (~kept & visible).any(0)
        tested += int((visible & mixed).sum())
    return tested / max(1, int(pairs.visible.sum()))
