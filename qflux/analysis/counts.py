"""Parameters and operations of a model, counted; and the counts of the two documents.

A multiplication with an addition counts as two operations, as `torch.utils.flop_counter` has it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..inference.generate import evaluating
from ..models.base import CausalLM
from .tables import Table


def parameter_counts(model: torch.nn.Module) -> Table:
    """Parameters of each part of a model: columns part, parameters and trained."""
    rows: dict[str, list[int]] = {}
    shared: set[int] = set()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) in shared or name not in model.state_dict():
            continue
        shared.add(id(value))
        steps = name.split(".")
        depth = 2 if len(steps) > 1 and steps[1].isdigit() else 1
        part = rows.setdefault(".".join(steps[:depth]), [0, 0])
        part[0] += value.numel()
        part[1] += value.numel() if value.requires_grad else 0
    return {
        "part": np.array(list(rows)),
        "parameters": np.array([all_ for all_, _ in rows.values()], dtype=np.int64),
        "trained": np.array([some for _, some in rows.values()], dtype=np.int64),
    }


def count_forward(model: CausalLM, length: int, batch: int = 1) -> Table:
    """Operations of a forward pass, by operator: columns operator and flops, the largest first.

    Additions and functions of single numbers are not counted, as in `torch.utils.flop_counter`.

    Args:
        model: of any family, on any device.
        length: tokens of a sequence, >= 1.
        batch: sequences, >= 1.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    found = counter.get_flop_counts().get("Global", {})
    order = sorted(found.items(), key=lambda item: (-item[1], str(item[0])))
    return {
        "operator": np.array([str(op) for op, _ in order]),
        "flops": np.array([count for _, count in order], dtype=np.int64),
    }


def document_counts() -> Table:
    """The two documents' counts: what they print, what their formulas give, and what is right.

    Columns document, what, printed, formula, corrected and why. The documents count a
    multiplication with its addition once; so does the column `corrected`, so that the ratios can be
    compared. Layers only: embedding and output matrix dominate whole models.

    Source: the Flux document, section 2 (d = 768, s = 1,024); the QFNN document, "Computational
    Complexity" and "Parameter Efficiency" (d = 768, L = 512).
    """
    d, s = 768, 1024
    pairs = 7 * s * s
    norm, linear = 4 * d * s, 4 * d * d * s
    block = 3 * d * d * s + 2 * d * s * s + 2 * linear + norm
    projection = 2 * d * s
    flux = 2 * pairs + 5 * s + projection + norm
    rows: list[tuple[str, str, float, float, float, str]] = [
        ("flux", "transformer: QKV projections", 1.8e9, 3 * d * d * s, 3 * d * d * s, ""),
        ("flux", "transformer: attention matrix", 803e6, d * s * s, d * s * s, "768 x 1024^2"),
        ("flux", "transformer: context", 803e6, d * s * s, d * s * s, "768 x 1024^2"),
        ("flux", "transformer: output projection", 0, 0, d * d * s, "left out"),
        ("flux", "transformer: first linear map", 2.4e9, linear, linear, ""),
        ("flux", "transformer: second linear map", 2.4e9, linear, linear, ""),
        ("flux", "transformer: layer norm", 3.1e6, norm, norm, ""),
        ("flux", "transformer: total", 8.2e9, block, block + d * d * s, "with the output map"),
        ("flux", "flux: attention score", 7.3e6, pairs, 0, "part of the two stages"),
        ("flux", "flux: integration", 19.7e6, 2 * pairs + 5 * s, 2 * pairs + 5 * s, "wrong sum"),
        ("flux", "flux: projection", 1.6e6, projection, projection, ""),
        ("flux", "flux: layer norm", 3.1e6, norm, norm, ""),
        ("flux", "flux: total", 24.4e6, pairs + flux, flux, "attention counted three times"),
        ("flux", "ratio of the layers", 0.003, (pairs + flux) / block,
         flux / (block + d * d * s), ""),
        ("flux", "parameters of a layer, ratio", 1 / (6 * d), 2 / (12 * d), 5 / (12 * d),
         "a projection with bias and norm has 5 d"),
    ]  # fmt: skip
    length = 512
    attention, gate = 3 * length * d * d + length * length * d, 2 * length * length
    rows += [
        ("qfnn", "transformer: attention", 0, attention, attention + length * d * d,
         "output projection left out"),
        ("qfnn", "qfnn: attention", 0, gate, 2 * gate, "two Heun stages"),
        ("qfnn", "ratio of the operations", 1100, attention / gate,
         (attention + length * d * d) / (2 * gate), "its formulas give another number"),
        ("qfnn", "transformer: parameters of a block", 0, 4 * d * d, 4 * d * d, ""),
        ("qfnn", "qfnn: parameters of a block", 0, 2 * d, 3 * d, "once a model, with a bias"),
        ("qfnn", "ratio of the parameters", 1500, 2 * d, 4 * d / 3, "of one block"),
    ]  # fmt: skip
    names = ("document", "what", "printed", "formula", "corrected", "why")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True),
                                                           strict=True)}  # fmt: skip
