"""A model and a text, studied: the tables and pictures of a report, and what it leaves out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qflux_kernels import Threshold

from ..analysis import networks, pictures, tables
from ..analysis.counts import count_forward, parameter_counts
from ..analysis.pairs import boundary_ellipse, cylinder_score, layer_pairs
from ..analysis.picture import Picture, token_labels
from ..analysis.tables import LayerTable, Table, Trajectory
from ..inference.generate import evaluating
from ..inference.text import fit_prompt
from ..models.base import CausalLM
from ..text.vocabulary import Vocabulary

# The page keeps the weights of so many pairs at most, four bytes each.
PAIR_BUDGET = 400_000
FLOW_TOKENS = 96
FLOW_EDGES = 60


@dataclass(frozen=True)
class Excerpt:
    """The part of a text that is studied.

    ids: `(S,)` int64. labels: a text for each token. first: its place among the tokens of the text.
    notes: what was changed or left out.
    """

    ids: Tensor
    labels: list[str]
    first: int
    notes: list[str]


@dataclass(frozen=True)
class Study:
    """Everything that a report has.

    summary: numbers and names, as JSON. tables: columns by the name of their file. tensors: by the
    name of their file, and in it. explorer: what the page's controls work on. notes: what the
    report leaves out, a sentence each.
    """

    summary: dict[str, Any]
    pictures: list[Picture]
    tables: dict[str, Table]
    tensors: dict[str, dict[str, Tensor]]
    explorer: dict[str, Any]
    notes: list[str]


def take_excerpt(
    text: str,
    vocabulary: Vocabulary,
    length: int,
    first: int = 0,
    unknown: str = "replace",
    more: bool = False,
    name: str = "the text",
) -> Excerpt:
    """The tokens `first` to `first + length - 1` of a text.

    Args:
        text: what is there to read.
        vocabulary: the model's.
        length: tokens at most, >= 1.
        first: the first token, >= 0.
        unknown: as in `fit_prompt`.
        more: whether the text goes on behind what was read.
        name: what messages call the text.

    Raises:
        ValueError: an empty text, one with characters that the vocabulary lacks and `unknown`
            refuses, or one of no more than `first` tokens.
    """
    fitted, told = fit_prompt(text, vocabulary, unknown, name=name)
    ids = vocabulary.encode(fitted).long()
    if first >= len(ids):
        raise ValueError(f"first_token must be below the {len(ids):,} tokens of {name}, "
                         f"got {first}")  # fmt: skip
    part = ids[first : first + length]
    notes = [f"Characters that the model's vocabulary lacks: {told}."] if told else []
    left = len(ids) - len(part)
    if more:
        notes.append(f"Of the text, tokens {first:,} to {first + len(part) - 1:,} are studied; the "
                     "rest was not read. first_token chooses another part.")  # fmt: skip
    elif left:
        notes.append(f"Of the {len(ids):,} tokens of the text, {len(part):,} are studied, from "
                     f"token {first:,} on. first_token chooses another part.")  # fmt: skip
    return Excerpt(part, token_labels(vocabulary, part.tolist()), first, notes)


@torch.no_grad()
def study(
    model: CausalLM,
    vocabulary: Vocabulary,
    excerpt: Excerpt,
    *,
    layer: int | None = None,
    cylinder: int = 0,
    metrics: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Study:
    """Run the model on the excerpt and make everything of a report.

    Args:
        model: in any mode; it is in evaluation meanwhile.
        vocabulary: its vocabulary.
        excerpt: the text.
        layer: of the pictures that show one; None: the last.
        cylinder: of the pictures that show one.
        metrics: `metrics.jsonl` of the run, if there is one.
        progress: is told what comes next.

    Raises:
        ValueError: the model has no such layer or cylinder.
    """
    config, device = model.config, next(model.parameters()).device
    notes = list(excerpt.notes)
    layer = _check_place(config, layer, cylinder)
    progress("the model")
    with evaluating(model):
        output = model(excerpt.ids[None].to(device), return_layers=True)
    records, logits = output.layers, output.logits[0]
    shown = shown_tokens(len(excerpt.ids), config.num_layers, config.num_cylinders)
    done = []
    for number, record in enumerate(records):
        progress(f"layer {number}")
        done.append(tables.layer_table(record, shown))
    places = tables.trajectory(records) if records else None
    notes += _non_finite(done, logits)
    if getattr(config, "memory", False):
        notes.append("Pairs are those that the score keeps; what the connection memory adds to "
                     "them is in the strengths that the model itself counts only.")  # fmt: skip
    if records and shown < len(excerpt.ids):
        notes.append(f"Single weights are kept for the first {shown:,} tokens of "
                     f"{len(excerpt.ids):,}; all other numbers are of all of them.")  # fmt: skip
    mismatch = sum(table.mismatch for table in done)
    if mismatch:
        notes.append(f"{mismatch:,} rows have pairs so close to their threshold that rounding "
                     "decides; the layers themselves counted them otherwise.")  # fmt: skip

    progress("the logits")
    surprise = token_losses(logits, excerpt.ids)
    rank = tables.logit_rank(logits)
    embedding = tables.embedding_table(model)
    names = token_labels(vocabulary, range(embedding.shape[1]))
    if embedding.shape[1] < config.vocab_size:
        notes.append(f"The vocabulary is shown up to id {embedding.shape[1] - 1:,} of "
                     f"{config.vocab_size - 1:,}.")  # fmt: skip
    data: dict[str, Table] = {
        "tokens.csv": {
            "position": np.arange(len(excerpt.ids)),
            "id": excerpt.ids.numpy(),
            "text": np.array(excerpt.labels),
            "surprise_nats": surprise,
        },
        "embedding.csv": _embedding_columns(embedding, names),
        "singular-values.csv": {
            "number": np.arange(1, len(rank.singular_values) + 1),
            "value": rank.singular_values,
        },
    }
    drawn = [pictures.token_embedding(embedding, names, cylinder)]
    if places is not None and layer is not None:
        progress("the pairs")
        drawn += _layer_pictures(records, done, places, excerpt, layer, cylinder, data, vocabulary)
    else:
        notes.append("The model has no layers: there are no pairs and no paths to show.")
    drawn.append(pictures.rank(rank))
    curves = _curves(metrics, notes)
    if curves is not None:
        data["metrics.csv"] = curves
        picture = pictures.training(curves)
        drawn += [picture] if picture is not None else []
    progress("the counts")
    data["parameters.csv"] = parameter_counts(model)
    data["operations.csv"] = count_forward(model, len(excerpt.ids))
    summary = {
        "model": {
            **json.loads(config.to_json()),
            "parameters": int(data["parameters.csv"]["parameters"].sum()),
            "forward_flops": int(data["operations.csv"]["flops"].sum()),
        },
        "text": {
            "first_token": excerpt.first,
            "tokens": len(excerpt.ids),
            "nats_per_token": _finite_mean(surprise),
        },
        "pictures_of": {"layer": layer, "cylinder": cylinder},
        "logits": {"rank": rank.rank, "effective_rank": rank.effective},
        "notes": notes,
    }
    if "layers.csv" in data:
        summary["layers"] = {
            name: _finite_mean(data["layers.csv"][name])
            for name in ("density", "entropy_bits", "coherence", "radius_mean")
        }
    return Study(
        summary,
        drawn,
        data,
        _tensors(done, places),
        _explorer(done, excerpt, surprise, shown, layer, cylinder),
        notes,
    )


def shown_tokens(length: int, layers: int, cylinders: int) -> int:
    """For how many tokens all weights fit the page."""
    pairs = PAIR_BUDGET / max(1, layers * cylinders)
    return max(1, min(length, int((math.sqrt(8 * pairs + 1) - 1) / 2)))


def token_losses(logits: Tensor, ids: Tensor) -> np.ndarray:
    """-log p of each token given those before it, in nats; NaN for the first: `(S,)`."""
    chance = logits.double().cpu().log_softmax(-1)[:-1]
    found = np.full(len(ids), np.nan)
    found[1:] = -chance.gather(-1, ids[1:, None]).squeeze(-1).numpy()
    return found


def _check_place(config: Any, layer: int | None, cylinder: int) -> int | None:
    if cylinder >= config.num_cylinders:
        raise ValueError(f"cylinder must be below the model's {config.num_cylinders}, "
                         f"got {cylinder}")  # fmt: skip
    if layer is None:
        return config.num_layers - 1 if config.num_layers else None
    if layer >= config.num_layers:
        raise ValueError(f"layer must be below the model's {config.num_layers}, got {layer}")
    return layer


def _non_finite(done: Sequence[LayerTable], logits: Tensor) -> list[str]:
    """What has no finite numbers, and so gaps in its pictures."""
    found = []
    for number, table in enumerate(done):
        bad = int((~np.isfinite(table.strength)).any(0).sum())
        if bad:
            found.append(f"Layer {number}: {bad} of {table.strength.shape[-1]} tokens see or have "
                         "states that are not finite; they are left out of pictures.")  # fmt: skip
    bad = int((~logits.isfinite().all(-1)).sum())
    if bad:
        found.append(f"The logits of {bad} of {len(logits)} tokens are not finite; loss and rank "
                     "are of the others.")  # fmt: skip
    return found


def _layer_pictures(
    records: Sequence[Any],
    done: list[LayerTable],
    places: Trajectory,
    excerpt: Excerpt,
    layer: int,
    cylinder: int,
    data: dict[str, Table],
    vocabulary: Vocabulary,
) -> list[Picture]:
    """The pictures that need layers; their tables are added to `data`."""
    labels, table = excerpt.labels, done[layer]
    data["layers.csv"] = tables.layer_columns(done, places)
    data["rows.csv"] = tables.row_columns(done)
    weight = table.weight[cylinder][:FLOW_TOKENS, :FLOW_TOKENS]
    data["edges.csv"] = tables.edges(weight, FLOW_EDGES)
    ids = excerpt.ids.tolist()
    data["network.csv"] = network = tables.token_network(table.weight[cylinder], ids, FLOW_EDGES)
    used = sorted({*network["source"].tolist(), *network["target"].tolist()})
    names = dict(zip(used, token_labels(vocabulary, used), strict=True))
    row = _middle_row(table, cylinder)
    ellipse = None
    score = cylinder_score(records[layer].score, records[layer].queries.shape[:2], (0, cylinder))
    if isinstance(score, Threshold):
        found = boundary_ellipse(layer_pairs(records[layer], cylinder), row, score.sigma)
        ellipse = found.cpu().numpy() if found.isfinite().all() else None
    return [
        pictures.token_states(places, labels, cylinder),
        pictures.state_evolution(places, labels, cylinder),
        pictures.attention(done, labels, cylinder),
        pictures.thresholds(done, labels, layer, cylinder),
        pictures.degrees(done, cylinder),
        pictures.sparsity(data["layers.csv"]),
        pictures.phases(places, cylinder),
        pictures.paths(places, labels, cylinder),
        pictures.radii(places, labels, cylinder),
        pictures.similarities(table, labels, layer, cylinder),
        networks.attention_flow(data["edges.csv"], labels, layer, cylinder),
        networks.token_network(network, names, layer, cylinder),
        networks.boundaries(table, labels, row, ellipse, layer, cylinder),
    ]


def _middle_row(table: LayerTable, cylinder: int) -> int:
    """The row in the middle of those with a finite query; the last one for none."""
    finite = np.nonzero(np.isfinite(table.direction[cylinder]).all(-1))[0]
    return int(finite[len(finite) // 2]) if len(finite) else len(table.visible) - 1


def _curves(metrics: Path | None, notes: list[str]) -> Table | None:
    """The training curves of a run; what is wrong with them goes to the notes."""
    if metrics is None or not metrics.is_file():
        notes.append("The model folder has no metrics.jsonl: there are no training curves.")
        return None
    with open(metrics, encoding="utf-8", errors="replace") as stream:
        curves, bad = tables.training_curves(stream)
    if bad:
        notes.append(f"{bad} lines of {metrics.name} are no lines of metrics.")
    if not curves:
        notes.append(f"{metrics.name} has no lines: there are no training curves.")
        return None
    return curves


def _embedding_columns(embedding: np.ndarray, names: list[str]) -> Table:
    cylinders, count = embedding.shape[:2]
    return {
        "id": np.tile(np.arange(count), cylinders),
        "text": np.tile(np.array(names), cylinders),
        "cylinder": np.repeat(np.arange(cylinders), count),
        "x": embedding[..., 0].reshape(-1),
        "y": embedding[..., 1].reshape(-1),
    }


def _finite_mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _tensors(done: Sequence[LayerTable], places: Trajectory | None) -> dict[str, dict[str, Tensor]]:
    if places is None:
        return {}
    states = {"points": torch.from_numpy(places.points)}
    weights = {}
    for number, table in enumerate(done):
        for name in ("queries", "keys", "direction", "low", "high"):
            states[f"layer{number}.{name}"] = torch.from_numpy(getattr(table, name))
        weights[f"layer{number}"] = torch.from_numpy(table.weight)
    return {"states.safetensors": states, "weights.safetensors": weights}


def _explorer(
    done: Sequence[LayerTable],
    excerpt: Excerpt,
    surprise: np.ndarray,
    shown: int,
    layer: int | None,
    cylinder: int,
) -> dict[str, Any]:
    """Points, bounds and weights of the first `shown` tokens, as arrays of float32."""
    lower = np.tril_indices(shown)
    return {
        "labels": excerpt.labels[:shown],
        "first": excerpt.first,
        "surprise": surprise[:shown],
        "layer": layer,
        "cylinder": cylinder,
        "layers": [
            {
                **{
                    name: getattr(table, name)[:, :shown].astype(np.float32)
                    for name in ("keys", "direction", "low", "high")
                },
                "weight": table.weight[:, lower[0], lower[1]],
            }
            for table in done
        ],
    }
