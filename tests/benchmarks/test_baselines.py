"""The baselines for long contexts against the sums that define them, and token by token."""

import pytest
import torch
from ablations import MixtureAttention, blocks, hierarchical_model, mixture_model, windows
from state_space import StateSpaceConfig, StateSpaceModel, state_space
from torch.nn import functional as F
from transformer import GATED, Transformer, TransformerConfig
from windowed import WindowedConfig, WindowedTransformer, windowed_attention

from qflux import QuantumFluxConfig
from qflux_kernels import Sparsemax, interact

SMALL = {"num_layers": 2, "hidden_dim": 16, "num_heads": 2}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same_gradients(ours, theirs, inputs):
    weight = torch.randn_like(theirs)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("length", "window"), [(7, 8), (8, 8), (9, 8), (16, 8), (23, 8), (5, 1)])
def test_a_window_is_a_mask_over_all_pairs(length, window):
    torch.manual_seed(0)
    inputs = [normal(2, 3, length, 4) for _ in range(3)]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < window)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=visible)
    found = windowed_attention(*inputs, window)
    torch.testing.assert_close(found, expected)
    same_gradients(found, expected, inputs)


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (4, 4), (5, 4), (12, 4), (11, 64), (6, 1)])
def test_chunks_of_a_state_space_are_its_recurrence(length, chunk):
    torch.manual_seed(0)
    queries, keys = normal(2, length, 3), normal(2, length, 3)
    values, start = normal(2, length, 4, 5), normal(2, 4, 3, 5)
    log_decay = normal(2, length, 4).abs().neg().detach().requires_grad_()
    state, outputs = start, []
    for t in range(length):
        added = keys[:, t, None, :, None] * values[:, t, :, None]
        state = log_decay[:, t, :, None, None].exp() * state + added
        outputs.append((queries[:, t, None, :, None] * state).sum(2))
    expected = torch.stack(outputs, 1)
    found, last = state_space(queries, keys, values, log_decay, chunk, start)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(last, state)
    same_gradients(found, expected, (queries, keys, values, log_decay, start))
    pair = torch.ones(length, length, dtype=torch.bool).tril()
    between = log_decay.cumsum(1)[:, :, None] - log_decay.cumsum(1)[:, None]
    weights = between.exp() * (queries @ keys.mT)[..., None] * pair[..., None]
    expected = torch.einsum("btsh,bshp->bthp", weights, values)
    found, _ = state_space(queries, keys, values, log_decay, chunk)
    torch.testing.assert_close(found, expected)


def models():
    torch.manual_seed(0)
    return {
        "windowed": WindowedTransformer(WindowedConfig(11, **SMALL, **GATED, window=4)),
        "state-space": StateSpaceModel(StateSpaceConfig(11, **SMALL, **GATED, chunk=4)),
        "transformer": Transformer(TransformerConfig(11, **SMALL, **GATED)),
    }


@pytest.mark.parametrize("name", ["windowed", "state-space"])
def test_baselines_are_causal_and_of_the_transformers_size(name):
    made = models()
    model = made[name].double()
    ids = torch.randint(11, (2, 13))
    whole = model(ids)
    torch.testing.assert_close(model(ids[:, :6]), whole[:, :6])
    assert not torch.allclose(model(ids.flip(1))[:, -1], whole[:, -1])
    ours, theirs = (sum(p.numel() for p in made[key].parameters()) for key in (name, "transformer"))
    assert ours == pytest.approx(theirs, rel=0.03)


def test_a_window_hides_what_lies_before_it():
    """Two layers of a window of 4 reach 6 tokens back, without convolutions."""
    torch.manual_seed(0)
    model = WindowedTransformer(WindowedConfig(11, **SMALL, window=4)).double()
    ids = torch.randint(11, (1, 12))
    for place, seen in ((5, True), (4, False)):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 11
        assert (model(changed)[0, -1] != model(ids)[0, -1]).any() == seen


@pytest.mark.parametrize("name", ["windowed", "state-space"])
def test_layers_go_on_where_they_stopped(name):
    torch.manual_seed(0)
    kind, config = {
        "windowed": (WindowedTransformer, WindowedConfig(11, **SMALL, window=4)),
        "state-space": (StateSpaceModel, StateSpaceConfig(11, **SMALL, chunk=4)),
    }[name]
    layer = kind(config).double().layers[0]
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    whole, past, parts = layer.mix(x), None, []
    for start, end in ((0, 2), (2, 3), (3, 9), (9, 10), (10, 15)):
        further = (start,) if name == "windowed" else ()
        part, past = layer.advance(x[:, start:end], past, *further)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    if name == "windowed":
        assert past[0].shape == (2, 2, 3, 8)


@pytest.mark.parametrize(
    ("kind", "name"), [(WindowedConfig, "window"), (StateSpaceConfig, "chunk")]
)
def test_sizes_are_checked(kind, name):
    with pytest.raises(ValueError, match=rf"{name} must be an integer >= 1, got 0"):
        kind(11, **{name: 0})


def sparsemax(queries, keys, values):
    return tuple(interact(queries, keys, values, score=Sparsemax(2.0)))


@pytest.mark.parametrize("length", [5, 8, 9, 24, 29])
def test_two_scales_are_near_tokens_and_means_of_blocks(length):
    torch.manual_seed(0)
    queries, keys, values = (normal(2, 3, length, size) for size in (2, 2, 4))
    near = windows(sparsemax, queries, keys, values, 8)
    far = blocks(sparsemax, queries, keys, values, 4)
    for row in range(length):
        own = queries[:, :, row : row + 1]
        seen = slice(max(0, row // 8 - 1) * 8, row + 1)
        for found, expected in zip(
            near, sparsemax(own, keys[:, :, seen], values[:, :, seen]), strict=True
        ):
            torch.testing.assert_close(found[:, :, row], expected[:, :, 0])
        whole = row // 4
        means = (x[:, :, : 4 * whole].unflatten(2, (whole, 4)).mean(3) for x in (keys, values))
        for found, expected in zip(far, sparsemax(own, *means), strict=True):
            torch.testing.assert_close(found[:, :, row], expected[:, :, 0])


def test_a_mixture_has_three_kinds_of_cylinders():
    torch.manual_seed(0)
    config = QuantumFluxConfig(11, num_layers=1, hidden_dim=16, num_cylinders=7)
    mixture = MixtureAttention(config)
    queries, keys, values = (torch.randn(2, 7, 20, size) for size in (2, 2, 4))
    mean, parts = mixture.gather(queries, keys, values)
    kinds = [(score.kind.__name__, score.options.get("shrinkage")) for score in mixture.score]
    assert kinds == [("Threshold", "hard"), ("Threshold", "soft"), ("Sparsemax", None)]
    assert [score.count for score in mixture.score] == [3, 2, 2]
    for cylinder in range(7):
        own = slice(cylinder, cylinder + 1)
        score = mixture.score[cylinder % 3]
        name, numbers = ("scale", score().scale) if cylinder % 3 == 2 else ("sigma", score().sigma)
        alone = type(score())(**{**score.options, name: numbers[cylinder // 3]})
        found = interact(queries[:, own], keys[:, own], values[:, own], score=alone)
        torch.testing.assert_close(parts["degree"][:, own], found.degree)
        count = 1 if cylinder % 3 == 2 else found.degree.clamp(min=1)[..., None]
        torch.testing.assert_close(mean[:, own], found.context / count)


@pytest.mark.parametrize("make", [mixture_model, hierarchical_model])
def test_other_ways_to_gather_are_causal_and_learn(make):
    torch.manual_seed(0)
    model = make(QuantumFluxConfig(11, num_layers=2, hidden_dim=16, num_cylinders=6)).double()
    ids = torch.randint(11, (1, 600))
    whole = model(ids, labels=ids)
    torch.testing.assert_close(model(ids[:, :300]).logits, whole.logits[:, :300])
    whole.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    record = model(ids, return_layers=True).layers[1]
    with pytest.raises(ValueError, match="cache must be None"):
        model.layers[1].attention.gather(record.queries, record.keys, record.gathered, object())
