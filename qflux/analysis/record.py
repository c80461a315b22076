"""Recording what the layers of a model do with a text."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inference.generate import evaluating
from ..models.base import CausalLM
from ..models.output import LayerRecord

__all__ = ["LayerRecord", "record_layers"]


@torch.no_grad()
def record_layers(model: CausalLM, input_ids: Tensor) -> tuple[LayerRecord, ...]:
    """What every layer does with these tokens in evaluation, without a graph.

    The model is put into evaluation mode meanwhile.

    Args:
        model: the language model.
        input_ids: `(B, S)` integer token ids in [0, V), S >= 1.

    Returns:
        A `LayerRecord` for each layer.

    Raises:
        TypeError, ValueError: as the model's `forward`.
    """
    with evaluating(model):
        return model(input_ids, return_layers=True).layers
