"""From the records of layers to tables: what each layer, token and pair did, in float64.

Nothing here draws or writes. Arrays are NumPy's; L layers, C cylinders, S tokens. What is not
finite stays so, and means leave it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.base import CausalLM
from ..models.embedding import phase_coherence
from ..models.output import LayerRecord
from .cover import band_share
from .pairs import Pairs, layer_pairs

Array = np.ndarray
Table = dict[str, Array]


@dataclass(frozen=True, eq=False)
class LayerTable:
    """What a layer did with one sequence.

    queries, keys, direction: `(C, S, 2)`; low, high: `(C, S)`: see `Pairs`.
    degree: `(C, S)`, pairs kept. visible: `(S,)`, pairs that a row may keep.
    strength: `(C, S)`, sum of the weights. entropy: `(C, S)`, of |weight| / sum |weight| in bits;
        NaN for a row that keeps nothing.
    weight: `(C, T, T)`, float32: the weights among the first T tokens, NaN where a pair is not
        kept, so that a kept pair of weight 0 is told from a dropped one.
    band: `(C,)`, see `band_share`.
    mismatch: rows whose number of kept pairs differs from what the layer itself counted, which
        rounding may do to a pair that stands on its threshold.
    """

    queries: Array
    keys: Array
    direction: Array
    low: Array
    high: Array
    degree: Array
    visible: Array
    strength: Array
    entropy: Array
    weight: Array
    band: Array
    mismatch: int

    @property
    def density(self) -> Array:
        """Kept pairs over pairs that may be seen, of each cylinder: `(C,)`."""
        return self.degree.sum(-1) / self.visible.sum()


def layer_table(record: LayerRecord, tokens: int = 64, sequence: int = 0) -> LayerTable:
    """The table of a layer.

    Args:
        record: of the layer.
        tokens: T, for how many tokens the weights themselves are kept, >= 0.
        sequence: which sequence of the batch.
    """
    columns: dict[str, list[Any]] = {name: [] for name in LayerTable.__annotations__}
    visible = np.zeros(0)
    for cylinder in range(record.queries.shape[1]):
        pairs = layer_pairs(record, cylinder, sequence)
        seen = pairs.weight[:tokens, :tokens].float()
        seen = torch.where(pairs.kept[:tokens, :tokens], seen, torch.nan)
        for name, value in (
            ("queries", pairs.queries),
            ("keys", pairs.keys),
            ("direction", pairs.direction),
            ("low", pairs.low),
            ("high", pairs.high),
            ("degree", pairs.kept.sum(-1)),
            ("strength", pairs.weight.sum(-1)),
            ("entropy", row_entropy(pairs)),
            ("weight", seen),
            ("band", torch.tensor(band_share(pairs))),
        ):
            columns[name].append(value.cpu().numpy())
        visible = pairs.visible.sum(-1).cpu().numpy()
    found = {name: np.stack(values) for name, values in columns.items() if values}
    counted = record.degree[sequence].cpu().numpy()
    return LayerTable(**found, visible=visible, mismatch=int((counted != found["degree"]).sum()))


def row_entropy(pairs: Pairs) -> Tensor:
    """Entropy in bits of each row's |weight|, normalised; NaN where all are zero: `(S,)`."""
    size = pairs.weight.abs()
    share = size / size.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1) / math.log(2)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Points through the layers.

    points: `(L', C, S, 2)`. names: of the L' stations. kind: "states", or "keys" for a model whose
    states stay where they are.
    """

    points: Array
    names: tuple[str, ...]
    kind: str

    @property
    def radius(self) -> Array:
        """`(L', C, S)`."""
        return np.hypot(self.points[..., 0], self.points[..., 1])

    @property
    def phase(self) -> Array:
        """`(L', C, S)`, radians in (-pi, pi]."""
        return np.arctan2(self.points[..., 1], self.points[..., 0])

    @property
    def coherence(self) -> Array:
        """`phase_coherence` of each station and cylinder, `(L', C)`."""
        return phase_coherence(torch.from_numpy(self.points)).numpy()

    @property
    def phase_differences(self) -> Array:
        """Phase steps from a token to the next, wrapped to [-pi, pi): `(L', C, S - 1)`."""
        step = np.diff(self.phase, axis=-1)
        return (step + math.pi) % (2 * math.pi) - math.pi


def trajectory(records: Sequence[LayerRecord], sequence: int = 0) -> Trajectory:
    """Where the tokens are before, between and after the layers.

    Args:
        records: of at least one layer.
        sequence: which sequence of the batch.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("records must have length >= 1, got none: the model has no layers")
    moved = any(record.states_after is not record.states_before for record in records)
    if moved:
        points = [records[0].states_before, *(record.states_after for record in records)]
        names = ("input", *(f"layer {i}" for i in range(len(records))))
    else:
        points = [record.keys for record in records]
        names = tuple(f"layer {i}" for i in range(len(records)))
    stacked = torch.stack([p[sequence].detach().double().cpu() for p in points]).numpy()
    return Trajectory(stacked, names, "states" if moved else "keys")


@torch.no_grad()
def embedding_table(model: CausalLM, limit: int = 1000) -> Array:
    """The states `(C, N, 2)` that the first N = min(V, `limit`) token ids start from."""
    device = next(model.parameters()).device
    ids = torch.arange(min(model.config.vocab_size, limit), device=device)[None]
    embed: Any = model.embedding
    return embed(ids)[0].double().cpu().numpy()


def similarity(queries: Array, keys: Array) -> tuple[Array, Array]:
    """Direct and orthogonal similarity `(S, S)` of points `(S, 2)`.

    direct_ij = r_i r_j cos(th_i - th_j), orthogonal_ij = r_i r_j sin(th_i - th_j).

    Source: the QFNN document, "Quantum Flux Attention".
    """
    turned = np.stack((queries[:, 1], -queries[:, 0]), -1)
    return queries @ keys.T, turned @ keys.T


@dataclass(frozen=True, eq=False)
class LogitRank:
    """How many numbers the logits of a text depend on.

    singular_values: descending, of the logits `(S, V)` less their mean over the tokens.
    rank: those above 1e-5 of the largest. effective: exp of the entropy of their squares' shares,
        the number of equally large ones that spread as much.
    tokens: rows that were used; those that are not finite are left out.
    """

    singular_values: Array
    rank: int
    effective: float
    tokens: int


def logit_rank(logits: Tensor) -> LogitRank:
    """The rank of logits `(S, V)` around their mean."""
    finite = logits.detach().double().cpu()
    finite = finite[finite.isfinite().all(-1)]
    if len(finite) == 0:
        return LogitRank(np.zeros(0), 0, math.nan, 0)
    values = torch.linalg.svdvals(finite - finite.mean(0))
    largest = values.max() if len(values) else values.new_zeros(())
    rank = int((values > 1e-5 * largest).sum())
    share = values.square() / values.square().sum()
    effective = float(torch.special.entr(share).sum().exp()) if largest > 0 else 0.0
    return LogitRank(values.numpy(), rank, effective, len(finite))


def edges(weight: Array, limit: int) -> Table:
    """The heaviest kept pairs of weights `(T, T)`, a token's own pair left out.

    Args:
        weight: NaN where a pair is not kept.
        limit: how many, >= 0.

    Returns:
        Columns source (the key that is heard), target (the row that hears it) and weight, by
        descending |weight|, then by position.
    """
    target, source = np.nonzero(np.isfinite(weight) & ~np.eye(len(weight), dtype=bool))
    values = weight[target, source]
    order = np.lexsort((source, target, -np.abs(values)))[:limit]
    return {"source": source[order], "target": target[order], "weight": values[order]}


def token_network(weight: Array, ids: Sequence[int], limit: int) -> Table:
    """Edges between different tokens of the vocabulary: mean weights over where they meet.

    Args:
        weight: `(T, T)`, NaN where a pair is not kept.
        ids: token id of each position, length >= T.
        limit: how many edges, the heaviest first, >= 0.

    Returns:
        Columns source and target (token ids), weight (the mean over visible pairs, a dropped pair
        counting as 0) and pairs (how many were visible).
    """
    size = len(weight)
    names, at = np.unique(np.asarray(ids[:size], dtype=np.int64), return_inverse=True)
    row, column = np.tril_indices(size, -1)
    value = weight[row, column]
    value = np.where(np.isfinite(value), value, 0.0)
    total, count = np.zeros((2, len(names), len(names)))
    np.add.at(total, (at[row], at[column]), value)
    np.add.at(count, (at[row], at[column]), 1)
    mean = total / np.maximum(count, 1)
    target, source = np.nonzero((mean != 0) & ~np.eye(len(names), dtype=bool))
    order = np.lexsort((source, target, -np.abs(mean[target, source])))[:limit]
    target, source = target[order], source[order]
    return {
        "source": names[source],
        "target": names[target],
        "weight": mean[target, source],
        "pairs": count[target, source].astype(np.int64),
    }


def layer_columns(tables: Sequence[LayerTable], places: Trajectory) -> Table:
    """A row for each layer and cylinder: `layers.csv`."""
    after = places.points[-len(tables) :]
    radius = np.hypot(after[..., 0], after[..., 1])
    coherence = places.coherence[-len(tables) :]
    count, cylinders = len(tables), tables[0].degree.shape[0]
    with np.errstate(invalid="ignore"):
        return {
            "layer": np.repeat(np.arange(count), cylinders),
            "cylinder": np.tile(np.arange(cylinders), count),
            "density": np.concatenate([table.density for table in tables]),
            "degree_mean": np.concatenate([table.degree.mean(-1) for table in tables]),
            "entropy_bits": np.concatenate([_mean(table.entropy) for table in tables]),
            "strength_mean": np.concatenate([_mean(table.strength) for table in tables]),
            "band_share": np.concatenate([table.band for table in tables]),
            "coherence": coherence.reshape(-1),
            "radius_mean": _mean(radius).reshape(-1),
            "radius_min": radius.min(-1).reshape(-1),
            "radius_max": radius.max(-1).reshape(-1),
        }


def row_columns(tables: Sequence[LayerTable]) -> Table:
    """A row for each layer, cylinder and token: `rows.csv`."""
    cylinders, length = tables[0].degree.shape
    shape = (len(tables), cylinders, length)
    layer, cylinder, position = (axis.reshape(-1) for axis in np.indices(shape))
    columns = {"layer": layer, "cylinder": cylinder, "position": position}
    for name in ("degree", "strength", "entropy", "low", "high"):
        columns[name] = np.concatenate([getattr(table, name).reshape(-1) for table in tables])
    columns["visible"] = np.tile(tables[0].visible, len(tables) * cylinders)
    return columns


def training_curves(lines: Iterable[str]) -> tuple[Table, int]:
    """The numbers of `metrics.jsonl` by name, and how many lines were not read.

    A list, which has a number for each layer, becomes its mean, and columns "name/0", "name/1" and
    so on. NaN stands where a line has no such number.
    """
    rows, bad = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except ValueError:
            given = None
        if not isinstance(given, dict) or not _is_number(given.get("step")):
            bad += 1
            continue
        row = {}
        for name, value in given.items():
            if _is_number(value):
                row[name] = float(value)
            elif isinstance(value, list) and value and all(map(_is_number, value)):
                row[name] = float(np.mean(value))
                row |= {f"{name}/{i}": float(v) for i, v in enumerate(value)}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {n: np.array([row.get(n, math.nan) for row in rows], dtype=float) for n in names}
    return columns, bad


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(values: Array) -> Array:
    """Mean over the last axis of what is finite; NaN for none."""
    finite = np.isfinite(values)
    total = np.where(finite, values, 0).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / finite.sum(-1)
