"""Operations and parameters are counted right, and the documents' tables are reproduced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qflux import make_config, make_model
from qflux.analysis import counts
from qflux_kernels import (
    InteractionCache,
    InverseGate,
    Threshold,
    evolve,
    interact,
    project_norm,
    schema,
)
from qflux_kernels import flops as op_flops


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (3, 7), (7, 3), (1, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_visible_pairs(rows, keys, causal):
    mask = torch.ones(rows, keys).bool()
    if causal:
        mask = mask.tril(keys - rows)
    assert op_flops.visible_pairs(rows, keys, causal) == mask.sum()


def test_an_interaction_is_counted_by_its_pairs():
    states, values = torch.randn(2, 3, 10, 2), torch.randn(2, 3, 10, 5)
    found = flops(lambda: interact(states, values=values))
    pairs, rows = 6 * 55, 60
    assert found == pairs * (7 + 2 * 5 + 1) + rows * op_flops.THRESHOLD_FLOPS
    assert flops(lambda: interact(states, causal=False)) == op_flops.interact_flops(
        6, 10, 10, 2, False
    )
    keys = torch.randn(2, 3, 30, 2)
    assert flops(lambda: interact(states, keys)) == op_flops.interact_flops(6, 10, 30, 2)
    assert flops(lambda: interact(states[..., :0, :])) == 0


def test_a_step_has_two_stages():
    states = torch.randn(4, 32, 2)
    one = flops(lambda: evolve(states, 0.1))
    assert one == 2 * op_flops.interact_flops(4, 32, 32, 2) + 4 * 32 * op_flops.STEP_FLOPS
    assert flops(lambda: evolve(states, 0.1, steps=3)) == 3 * one


@pytest.mark.parametrize(
    "score", [Threshold(), Threshold(shrinkage="soft"), InverseGate()], ids=str
)
def test_backward_passes_are_counted(score):
    states = torch.randn(2, 20, 2, requires_grad=True)
    forward = flops(lambda: interact(states, score=score))
    both = flops(lambda: interact(states, score=score).context.sum().backward())
    assert 2.5 * forward < both < 6 * forward
    step = flops(lambda: evolve(states, 0.1, score=score).states.sum().backward())
    assert 2 * both < 1.2 * step


def test_projections_are_counted():
    weight = torch.randn(16, 2, requires_grad=True)
    found = flops(lambda: project_norm(torch.randn(3, 7, 2), weight))
    assert found == 21 * (2 * 16 * 3 + 3 * 9)
    assert flops(lambda: project_norm(torch.randn(3, 7, 2), weight).sum().backward()) > 2 * found


def test_every_op_that_computes_has_a_formula():
    texts = {op.name for op in schema.COMPILED_OPS if not op.arguments}
    # They keep a cache.
    kept = {"cache_append", "cache_moments", "cache_index_unit", "cache_index", "cache_pages"}
    names = {op.name for op in schema.COMPILED_OPS} - texts - kept - {"sweep_work"}
    assert names == {op.name for op in op_flops.FORMULAS}
    op_flops.register(schema.COMPILED)  # twice does nothing


def test_a_model_is_the_sum_of_its_parts():
    model = make_model(
        make_config("lm", 65, num_layers=2, hidden_dim=32, num_cylinders=4, value_dim=4)
    )
    table = counts.count_forward(model, 24, batch=2)
    found = dict(zip(table["operator"].tolist(), table["flops"].tolist(), strict=True))
    (kernel,) = (name for name in found if "interact" in name)
    assert found[kernel] == 2 * op_flops.interact_flops(2 * 4, 24, 24, 4)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    maps = sum(2 * 48 * m.weight.numel() for m in linear)
    assert sum(v for name, v in found.items() if "mm" in name) == maps
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert model.training  # as it was


@pytest.mark.parametrize("preset", ["lm", "flux", "qfnn"])
def test_parameters_are_all_counted_once(preset):
    model = make_model(make_config(preset, 65, num_layers=2, hidden_dim=16))
    table = counts.parameter_counts(model)
    assert table["trained"].sum() == sum(p.numel() for p in model.parameters())
    assert table["parameters"].sum() == sum(v.numel() for v in model.state_dict().values())
    assert {"embedding", "head"} <= set(table["part"].tolist())


def test_the_documents_tables():
    table = counts.document_counts()
    rows = {
        (document, what): numbers
        for document, what, *numbers, _ in zip(*(c.tolist() for c in table.values()), strict=True)
    }
    # Lines that the Flux document adds up wrongly, and what they are.
    printed, formula, corrected = rows["flux", "flux: integration"]
    assert (printed, formula, corrected) == (19.7e6, 14_685_184, 14_685_184)
    printed, formula, corrected = rows["flux", "flux: total"]
    assert printed == 24.4e6 and formula == pytest.approx(26.744e6, rel=1e-3)
    assert corrected == pytest.approx(19.40e6, rel=1e-3)
    printed, formula, corrected = rows["flux", "transformer: total"]
    assert formula == pytest.approx(8.257e9, rel=1e-3) and corrected == pytest.approx(
        8.861e9, rel=1e-3
    )
    assert rows["flux", "ratio of the layers"][1] == pytest.approx(0.0032, rel=0.02)
    assert rows["flux", "ratio of the layers"][2] == pytest.approx(0.0022, rel=0.02)
    parts = sum(n[1] for (d, w), n in rows.items() if d == "flux" and w.startswith("transformer: ")
                and not w.endswith("total"))  # fmt: skip
    assert parts == rows["flux", "transformer: total"][1]
    # The QFNN document: 1,100 times fewer operations, its own formulas give 2,112.
    assert rows["qfnn", "ratio of the operations"][1] == 2112
    assert rows["qfnn", "ratio of the parameters"][:2] == [1500, 1536]
    assert all(np.isfinite(table[name]).all() for name in ("printed", "formula", "corrected"))


def test_the_corrected_layer_is_what_a_layer_costs():
    """The documents' 7 operations a pair and stage are of the order of what the kernels do."""
    model = make_model(make_config("flux", 65, num_layers=1, context_length=1024))
    table = counts.count_forward(model, 1024)
    found = dict(zip(table["operator"].tolist(), table["flops"].tolist(), strict=True))
    (step,) = (v for name, v in found.items() if "evolve" in name)
    # Two stages over half of all pairs, multiplications and additions counted each.
    assert 2 * 7 * 1024**2 / 2 < step < 2 * 14 * 1024**2 / 2


def test_rows_of_a_cache_count_what_they_see():
    cache = InteractionCache(batch_shape=(2, 3), value_dim=4)
    cache.append(torch.randn(2, 3, 40, 2), torch.randn(2, 3, 40, 4))
    with FlopCounterMode(display=False) as counter:
        cache.attend(torch.randn(2, 3, 5, 2))
    assert counter.get_total_flops() == op_flops.interact_flops(6, 5, 40, 4)
