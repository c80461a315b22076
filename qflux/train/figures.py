"""Pictures of the cylinders while a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from ..analysis import pictures, static, tables
from ..analysis.picture import token_labels
from ..analysis.record import record_layers
from ..models.base import CausalLM
from ..optional import require
from ..text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS = 64


def check_figures() -> None:
    """Raise unless figures can be drawn.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    require("matplotlib", "log_figures", extra="analysis")


def cylinder_figures(
    model: CausalLM, ids: Tensor, vocabulary: Vocabulary
) -> Iterator[tuple[str, Figure]]:
    """Figures of what the model does with a text now, by name; the model stays as it is.

    Args:
        model: in any mode.
        ids: `(S,)` token ids, S >= 1; the first `TOKENS` are used.
        vocabulary: the model's.
    """
    ids = ids[:TOKENS].long()
    device = next(model.parameters()).device
    names = token_labels(vocabulary, range(min(model.config.vocab_size, 1000)))
    drawn = [pictures.token_embedding(tables.embedding_table(model), names)]
    records = record_layers(model, ids[None].to(device))
    if records:
        labels = token_labels(vocabulary, ids.tolist())
        done, places = [tables.layer_table(r, TOKENS) for r in records], tables.trajectory(records)
        drawn += [
            pictures.state_evolution(places, labels),
            pictures.attention(done, labels),
            pictures.degrees(done),
            pictures.phases(places),
            pictures.radii(places, labels),
        ]
    for picture in drawn:
        yield picture.name, static.draw(picture)
