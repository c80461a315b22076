"""How well a model predicts a text."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inference.generate import evaluating
from ..models.base import CausalLM
from ..text.windows import IGNORED_LABEL, evaluation_batches


@torch.no_grad()
def evaluate(model: CausalLM, works: list[Tensor], batch_size: int = 12) -> float:
    """Mean loss in nats a token over every token of the works but the first of each.

    A token is predicted from at most `context_length - 1` tokens before it. The model is put into
    evaluation mode meanwhile.
    """
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model):
        for ids, labels in evaluation_batches(works, model.config.context_length, batch_size):
            scored = int((labels[:, 1:] != IGNORED_LABEL).sum())
            total += model(ids.to(device), labels=labels.to(device)).loss * scored
            count += scored
    return total.item() / count
