"""The networks of the two documents: presets, starts, time steps, radii, memory, readout."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from qflux import (
    PRESETS,
    ConnectionMemory,
    CylinderConfig,
    CylinderLM,
    QuantumFluxConfig,
    QuantumFluxLM,
    load_model,
    make_config,
    make_model,
    phase_coherence,
    save_model,
)
from qflux.analysis.record import record_layers
from qflux.models.presets import config_from_json
from qflux.models.published import (
    AdaptiveBounds,
    PublishedLayer,
    Readout,
    TimeStep,
    TokenStates,
    phase_frequencies,
)
from qflux.text.vocabulary import CharacterVocabulary
from qflux_kernels import InverseGate, Radius, Threshold, evolve, interact, reference

SMALL = {"num_layers": 2, "hidden_dim": 12, "context_length": 16}
VARIANTS = {
    "flux": ("flux", {}),
    "qfnn": ("qfnn", {}),
    "cylinders": ("flux", {"num_cylinders": 3, "train_embedding": True}),
    "learned start": ("qfnn", {"embedding": "learned", "position": "phase"}),
    "learned bounds": ("flux", {"radius_bounds": "learned"}),
    "context bounds": ("qfnn", {"radius_bounds": "context"}),
    "memory": ("flux", {"memory": True}),
    "memory, bounds, mean": (
        "qfnn",
        {"memory": True, "radius_bounds": "context", "reduction": "mean"},
    ),
    "no layers": ("flux", {"num_layers": 0}),
}


def config_of(preset, changes=()):
    return make_config(preset, 11, **{**SMALL, **dict(changes)})


def model_of(preset, changes=(), seed=0):
    torch.manual_seed(seed)
    return make_model(config_of(preset, changes))


def states_of(model, ids):
    """The states before the first layer and after each."""
    records = model(ids, return_layers=True).layers
    return [records[0].states_before, *(record.states_after for record in records)]


def make_ids(batch=2, length=16, vocab_size=11):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (batch, length), generator=generator)


# --- presets ---


def test_presets_have_the_documents_values():
    flux, qfnn = make_config("flux", 50257), make_config("qfnn", 30522)
    for config in (flux, qfnn):
        assert (config.num_layers, config.hidden_dim, config.context_length) == (6, 768, 1024)
        assert (config.num_cylinders, config.reduction, config.memory) == (1, "sum", False)
    assert (flux.embedding, flux.train_embedding, flux.position) == ("cardioid", False, "phase")
    assert (flux.score, flux.sigma, flux.epsilon) == ("threshold", 0.5, 1e-6)
    assert (flux.timestep, flux.dt_scale, flux.dt_max) == ("beta", 1e-5, 0.05)
    assert (flux.skip_beta, flux.skip_center, flux.readout) == (5, None, "layers")
    assert (flux.radius_min, flux.radius_max, flux.radius_rate) == (0.1, 2.0, 0.01)
    assert (flux.readout_norm, flux.coherence_weight) == (True, 0.01)
    assert (qfnn.embedding, qfnn.train_embedding, qfnn.position) == ("annulus", True, "none")
    assert (qfnn.score, qfnn.alpha, qfnn.epsilon) == ("inverse_gate", 0.5, 1e-5)
    assert (qfnn.timestep, qfnn.dt_scale, qfnn.skip_beta, qfnn.skip_center) == (
        "constant", 0.1, 10, 1.0,
    )  # fmt: skip
    assert (qfnn.radius_min, qfnn.radius_max, qfnn.radius_rate) == (0.5, 2.0, 0.01)
    assert qfnn.radius_reversion > 0 and (qfnn.readout, qfnn.readout_norm) == ("last", False)
    assert make_config("lm", 65) == QuantumFluxConfig(65)


def test_lm_has_fewer_cylinders_at_short_contexts():
    short = {"num_cylinders": 16, "value_dim": 8, "own_value": "scaled"}
    for context, expected in ((2, short), (128, short), (129, {})):
        found = make_config("lm", 65, context_length=context, hidden_dim=64)
        wanted = QuantumFluxConfig(65, context_length=context, hidden_dim=64, **expected)
        assert found == wanted
    # Whoever chooses one of them chooses all.
    for given in ({"num_cylinders": 4}, {"value_dim": 2}, {"own_value": "projected"}):
        found = make_config("lm", 65, context_length=64, **given)
        assert found == QuantumFluxConfig(65, context_length=64, **given)
    with pytest.raises(ValueError, match=r"context_length must be .* 2, got 1"):
        make_config("lm", 65, context_length=1)


def test_a_network_has_the_documents_parameters():
    """2 V for the tokens; nothing in a layer but its projection and LayerNorm; the output layer."""
    for preset, readouts, norms in (("flux", 2, 2), ("qfnn", 1, 0)):
        model = model_of(preset)
        assert sum(value.numel() for value in model.embedding.state_dict().values()) == 2 * 11
        assert not list(model.layers.parameters())
        found = sum(parameter.numel() for parameter in model.readouts.parameters())
        assert found == readouts * (2 * 12 + 12) + norms * 2 * 12
        assert sum(parameter.numel() for parameter in model.head.parameters()) == 12 * 11 + 11


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_changes_and_make_their_model(preset):
    config = config_of(preset)
    assert config.num_layers == 2 and config_from_json(config.to_json()) == config
    model = make_model(config)
    assert type(model) is (QuantumFluxLM if preset == "lm" else CylinderLM)
    assert model(make_ids()).logits.shape == (2, 16, 11)


def test_preset_errors_name_the_trouble():
    with pytest.raises(ValueError, match=r"preset must be .*'flux', 'qfnn', 'lm'.* got 'bert'"):
        make_config("bert", 5)
    with pytest.raises(ValueError, match=r"'flux' has no value_dim.*num_layers"):
        make_config("flux", 5, value_dim=3)
    with pytest.raises(TypeError, match=r"config must be .*PublishedConfig.* got dict"):
        make_model({})
    with pytest.raises(ValueError, match=r"architecture must be .*'published'.* got 'bert'"):
        config_from_json('{"architecture": "bert", "vocab_size": 5}')
    with pytest.raises(ValueError, match="architecture must be 'published', got 'lm'"):
        CylinderConfig.from_json(QuantumFluxConfig(5).to_json())


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("vocab_size", 0, ValueError),
        ("num_layers", -1, ValueError),
        ("context_length", 1, ValueError),
        ("embedding", "glove", ValueError),
        ("position", "sinusoidal", ValueError),
        ("score", "softmax", ValueError),
        ("statistics", "column", ValueError),
        ("timestep", "gamma", ValueError),
        ("radius_bounds", "free", ValueError),
        ("readout", "first", ValueError),
        ("train_embedding", 1, TypeError),
        ("memory", "yes", TypeError),
        ("sigma", None, TypeError),
        ("skip_center", float("nan"), ValueError),
        ("epsilon", -1e-9, ValueError),
        ("coherence_weight", -0.5, ValueError),
        ("memory_cap", -1.0, ValueError),
        ("radius_max", 0.01, ValueError),
        ("dt_scale", 0.0, ValueError),
        ("dt_max", -1.0, ValueError),
        ("hidden_dim", 2, ValueError),
    ],
)
def test_config_rejects_bad_values_by_name(name, value, error):
    with pytest.raises(error) as caught:
        CylinderConfig(**{"vocab_size": 7, name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value)


# --- where tokens start ---


def test_cardioid_has_the_ids_on_its_curve():
    states = TokenStates(CylinderConfig(8, num_cylinders=2, embedding="cardioid"))
    table = states(torch.arange(8)[None])[0]
    angle = 2 * math.pi * torch.arange(8) / 8 + math.pi / 4
    radius = 0.5 + 0.5 * angle.sin()
    for turns in (1, 2):
        phase = 2 * math.pi * turns * torch.arange(8) / 8 + math.pi / 4
        expected = torch.stack((radius * phase.cos(), radius * phase.sin()), -1)
        torch.testing.assert_close(table[turns - 1], expected)
    torch.testing.assert_close(table[0].mean(0), torch.tensor([0.0, 0.25]))
    assert not list(states.parameters()) and "table" in states.state_dict()


def test_annulus_has_random_phases_and_radii_by_rank():
    config = CylinderConfig(400, embedding="annulus", radius_min=0.5, train_embedding=True)
    table = TokenStates(config)(torch.arange(400)[None])[0, 0]
    radius = table.norm(dim=-1)
    torch.testing.assert_close(radius, 0.5 + 1.5 * (1 - torch.arange(400) / 400))
    quadrant = torch.atan2(table[:, 1], table[:, 0]).div(math.pi / 2).floor()
    assert all(70 < (quadrant == corner).sum() < 130 for corner in (-2, -1, 0, 1))
    assert not torch.equal(table, TokenStates(config)(torch.arange(400)[None])[0, 0])


@pytest.mark.parametrize(
    ("embedding", "train", "moves"),
    [("cardioid", False, False), ("annulus", True, True), ("learned", False, True)],
)
def test_starts_move_when_they_should(embedding, train, moves):
    model = model_of("flux", {"embedding": embedding, "train_embedding": train})
    ids = make_ids()
    model(ids, labels=ids).loss.backward()
    found = [parameter.grad.abs().max() for parameter in model.embedding.parameters()]
    assert bool(found) == moves and all(gradient > 0 for gradient in found)


def test_position_turns_the_phase():
    config = config_of("flux")
    slowest = 2 * math.pi / 16
    assert phase_frequencies(config).tolist() == pytest.approx([slowest])
    spread = phase_frequencies(dataclasses.replace(config, num_cylinders=3))
    assert spread[[0, 2]].tolist() == pytest.approx([slowest, 1.0])
    torch.testing.assert_close(spread[1] / spread[0], spread[2] / spread[1])
    ids = torch.full((1, 16), 3)
    first = states_of(model_of("flux"), ids)[0][0, 0]
    angle = torch.atan2(first[:, 1], first[:, 0])
    turned = (angle - angle[0]) % (2 * math.pi)
    torch.testing.assert_close(turned, 2 * math.pi * torch.arange(16) / 16, atol=1e-5, rtol=0)
    still = states_of(model_of("flux", {"position": "none"}), ids)[0][0, 0]
    assert torch.equal(still, still[:1].expand(16, 2))


# --- the layer ---


def test_time_step_is_drawn_in_training_and_the_mean_in_evaluation():
    config = CylinderConfig(5, hidden_dim=10, context_length=13, dt_scale=0.01, dt_max=1.0)
    step, states = TimeStep(config), torch.zeros(20000, 1, 3, 2, dtype=torch.float64)
    drawn = step(states)
    assert drawn.shape == (20000, 1, 1)
    share = 0.01 / drawn
    assert share.mean().item() == pytest.approx(4 / (4 + 6), abs=0.005)
    assert share.var().item() == pytest.approx(4 * 6 / (10**2 * 11), rel=0.05)
    step.eval()
    assert torch.equal(step(states), step(states))
    torch.testing.assert_close(step(states[:1]).item(), 0.01 / 0.4)
    limited = TimeStep(dataclasses.replace(config, dt_max=0.02))
    assert limited(states).max() == 0.02 and limited.eval()(states[:1]).item() == 0.02
    constant = TimeStep(dataclasses.replace(config, timestep="constant"))
    assert (constant(states) == 0.01).all()


@pytest.mark.parametrize("preset", ["flux", "qfnn"])
@pytest.mark.parametrize("changes", [{}, {"radius_bounds": "learned"}, {"memory": True}])
def test_layer_is_the_documents_step(preset, changes):
    """The evolution step, whether the kernel or PyTorch applies radius and skip."""
    config = config_of(preset, {**changes, "dt_scale": 0.03, "skip_center": 0.05})
    model = make_model(config).double().eval()
    layer, states = model.layers[0], torch.randn(2, 1, 16, 2).double()
    memory = None
    if config.memory:
        memory = ConnectionMemory.empty(states)
    moved, _, record = layer(states, memory, True)
    dt = layer.timestep(states).flatten()[0]
    if preset == "flux":
        assert dt.item() == pytest.approx(min(0.05, 0.03 * (5 + 7.5) / 5))
        score = Threshold(0.5, eps=1e-6)
    else:
        assert dt == 0.03
        score = InverseGate(0.5, eps=1e-5)
    skip = torch.sigmoid(config.skip_beta * (dt - 0.05))
    radius = Radius(
        config.radius_min, config.radius_max, 0.01, config.radius_reversion, config.radius_target
    )
    expected = reference.evolve(states, dt, score=score, radius=radius, skip=skip)
    torch.testing.assert_close(moved, expected.states)
    torch.testing.assert_close(record.metrics()["skip"], skip)
    assert not model.head.bias.any()
    torch.testing.assert_close(record.strength, expected.strength)
    torch.testing.assert_close(record.metrics()["strength"], expected.strength.mean())


def test_skip_of_the_first_document_is_centred_on_dt_scale():
    model = model_of("flux", {"timestep": "constant"})
    assert (model(make_ids(), return_layers=True).layers[0].skip == 0.5).all()


def test_adaptive_bounds_start_at_the_fixed_ones_and_hold():
    states = torch.randn(2, 3, 16, 2)
    for kind, shape in (("learned", (3, 1)), ("context", (2, 3, 16))):
        config = config_of("qfnn", {"radius_bounds": kind, "num_cylinders": 3})
        bounds = AdaptiveBounds(config)
        low, high = bounds(states)
        assert low.shape == high.shape == shape
        assert (low == 0.5).all() and (high == 2.0).all()
        torch.nn.init.normal_(bounds.weight)
        low, high = bounds(states)
        assert (low > 0).all() and (high > low).all()
        layer = PublishedLayer(config)
        layer.bounds.weight = bounds.weight
        radius = layer._move_radius(states, 3 * states, torch.zeros(2, 3, 16)).norm(dim=-1)
        assert (radius > low - 1e-5).all() and (radius < high + 1e-5).all()
        assert torch.isclose(radius, high.expand_as(radius)).any()


def test_bounds_by_context_depend_on_the_past_only():
    bounds = AdaptiveBounds(config_of("flux", {"radius_bounds": "context"}))
    torch.nn.init.normal_(bounds.weight)
    states = torch.randn(1, 1, 16, 2)
    low, high = bounds(states)
    for length in (1, 7):
        before, after = bounds(states[..., :length, :])
        torch.testing.assert_close(before, low[..., :length])
        torch.testing.assert_close(after, high[..., :length])
    assert low.unique().numel() == 16


def test_learned_bounds_get_gradients():
    model = model_of("flux", {"radius_bounds": "learned"})
    ids = make_ids()
    model(ids, labels=ids).loss.backward()
    assert all(layer.bounds.weight.grad.abs().max() > 0 for layer in model.layers)


def test_mean_reversion_pulls_radii_to_the_target():
    states = torch.randn(1, 1, 16, 2)
    spread = {}
    for reversion in (0.0, 0.5):
        changes = {"radius_rate": 0.0, "radius_reversion": reversion, "dt_scale": 1e-6}
        layer = PublishedLayer(config_of("qfnn", {**changes, "skip_center": 9.0}))
        radius = layer(states)[0].norm(dim=-1)
        spread[reversion] = (radius - 1.25).abs().mean()
    assert spread[0.5] < 0.6 * spread[0.0]


def test_metrics_are_device_tensors_that_say_what_happened():
    model = model_of("qfnn", {"min_gate": 0.8}).eval()
    assert model(make_ids()).layers == ()
    records = model(make_ids(), return_layers=True).layers
    assert len(records) == 2
    assert records[1].states_before is records[0].states_after
    for record in records:
        metrics = record.metrics()
        assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
        radius = record.states_after.norm(dim=-1)
        torch.testing.assert_close(record.radius, radius)
        torch.testing.assert_close(metrics["radius_mean"], radius.mean())
        torch.testing.assert_close(metrics["radius_std"], radius.std(correction=0))
        coherence = phase_coherence(record.states_after).mean()
        torch.testing.assert_close(metrics["coherence"], coherence)
    score = model.layers[0].score
    degree = evolve(records[0].states_before, 0.1, score=score).degree
    assert torch.equal(records[0].degree, degree)
    kept = degree.sum() / (2 * 16 * 17 / 2)
    assert 0 < kept < 1
    torch.testing.assert_close(records[0].metrics()["density"], kept)


# --- readout and losses ---


def test_readout_is_projection_and_norm():
    states = torch.randn(2, 3, 5, 2)
    plain = Readout(config_of("qfnn", {"num_cylinders": 3}))
    flat = states.transpose(1, 2).reshape(2, 5, 6)
    torch.testing.assert_close(plain(states), plain.projection(flat))
    normed = Readout(config_of("flux", {"num_cylinders": 3}))
    torch.nn.init.normal_(normed.norm.weight)
    torch.testing.assert_close(normed(states), normed.norm(normed.projection(flat)))


def test_every_layer_is_read_with_its_own_projection():
    model, ids = model_of("flux").eval(), make_ids()
    output = model(ids)
    after = states_of(model, ids)[1:]
    expected = sum(readout(states) for readout, states in zip(model.readouts, after, strict=True))
    torch.testing.assert_close(model.features(ids), expected)
    torch.testing.assert_close(output.logits, model.head(expected))
    last = model_of("qfnn").eval()
    torch.testing.assert_close(last.features(ids), last.readouts[0](states_of(last, ids)[-1]))


@pytest.mark.parametrize(("preset", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_gradients_reach_every_parameter(preset, changes):
    model, ids = model_of(preset, changes), make_ids(length=24)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("preset", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_of_a_prefix_are_the_prefix_of_the_logits(preset, changes):
    model, ids = model_of(preset, changes).double().eval(), make_ids()
    whole = model(ids).logits
    for length in (1, 5, 15):
        torch.testing.assert_close(model(ids[:, :length]).logits, whole[:, :length])


def test_row_statistics_let_the_future_in():
    """Why "prefix" is the default."""
    model, ids = model_of("flux", {"statistics": "row"}).eval(), make_ids()
    assert not torch.allclose(model(ids[:, :9]).logits, model(ids).logits[:, :9])


def test_coherence_is_the_mean_cosine_over_pairs():
    states = torch.randn(2, 3, 9, 2, dtype=torch.float64, requires_grad=True)
    unit = F.normalize(states, dim=-1)
    torch.testing.assert_close(phase_coherence(states), (unit @ unit.mT).mean((-1, -2)))
    assert torch.autograd.gradcheck(phase_coherence, states)
    torch.testing.assert_close(phase_coherence(torch.ones(4, 2)), torch.tensor(1.0))


def test_training_loss_has_the_coherence_term_and_evaluation_has_not():
    model, ids = model_of("qfnn", {"coherence_weight": 0.5}), make_ids()
    output = model(ids, labels=ids, return_layers=True)
    extra = sum(0.5 * (1 - layer.metrics()["coherence"]) for layer in output.layers)
    assert extra > 0.1
    torch.testing.assert_close(output.loss, output.cross_entropy + extra)
    logits = output.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(output.cross_entropy, F.cross_entropy(logits, ids[:, 1:].flatten()))
    [with_term] = torch.autograd.grad(output.loss, model.embedding.table, retain_graph=True)
    [without] = torch.autograd.grad(output.cross_entropy, model.embedding.table)
    assert not torch.allclose(with_term, without)
    evaluated = model.eval()(ids, labels=ids)
    assert torch.equal(evaluated.loss, evaluated.cross_entropy)


def test_gradient_steps_on_the_coherence_term_align_phases():
    model, ids = model_of("qfnn", {"coherence_weight": 10.0}), make_ids()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    values = []
    for _ in range(30):
        output = model(ids, labels=ids, return_layers=True)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        values.append(output.layers[-1].metrics()["coherence"].item())
    assert values[-1] > values[0] + 0.2


# --- memory in the model, files ---


def test_memory_changes_the_evolution_and_is_reset_for_every_sequence():
    plain, remembering = (
        model_of("flux", {"memory": on, "dt_scale": 0.01}) for on in (False, True)
    )
    plain.eval(), remembering.eval()
    ids = make_ids()
    first, without = states_of(remembering, ids), states_of(plain, ids)
    torch.testing.assert_close(first[1], without[1])  # nothing to remember yet
    assert not torch.allclose(first[2], without[2])
    remembering(ids.flip(1))
    assert torch.equal(states_of(remembering, ids)[2], first[2])


def test_memory_is_divided_like_the_interaction():
    layer = PublishedLayer(config_of("flux", {"reduction": "mean", "radius_rate": 0.0}))
    layer = layer.double().eval()
    states = 0.5 * torch.randn(1, 1, 16, 2).double()
    memory = ConnectionMemory.empty(states).update(states, layer.score)
    _, after, record = layer(states, memory, True)
    count = torch.arange(1, 17)
    heard = interact(states, score=layer.score, reduction="mean").strength
    remembered = memory.context(states)[1] / count
    torch.testing.assert_close(record.strength, heard + remembered)
    torch.testing.assert_close(after.values, memory.update(states, layer.score).values)


def test_generation_and_files(tmp_path):
    model, ids = model_of("flux").eval(), make_ids()
    assert model.generate(ids, 3, temperature=0).shape == (2, 19)
    vocabulary = CharacterVocabulary("abcdefghijk")
    for preset in ("flux", "qfnn"):
        model = model_of(preset).eval()
        save_model(tmp_path / preset, model, vocabulary)
        loaded, _ = load_model(tmp_path / preset)
        assert type(loaded) is CylinderLM and loaded.config == model.config
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert json.loads((tmp_path / preset / "config.json").read_text())["architecture"]


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"input_ids.*11"):
        model_of("flux")(torch.tensor([[11]]))
    with pytest.raises(ValueError, match="labels"):
        model_of("flux")(make_ids(), labels=make_ids()[:, 1:])


# --- files of before the families had names ---

OLD = {
    '{"architecture": "values", "vocab_size": 7, "weight": "score"}': ("lm", "hard"),
    '{"architecture": "values", "vocab_size": 7, "weight": "excess"}': ("lm", "soft"),
    '{"architecture": "cylinder", "vocab_size": 7}': ("published", None),
}


@pytest.mark.parametrize("text", OLD)
def test_old_configurations_are_read(text):
    architecture, shrinkage = OLD[text]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        config = config_from_json(text)
    assert config.architecture == architecture
    assert getattr(config, "shrinkage", None) == shrinkage
    assert json.loads(config.to_json())["architecture"] == architecture
    # The own value had no projection before that was a choice.
    assert getattr(config, "own_value", None) == ("shared" if architecture == "lm" else None)
    assert config_from_json(config.to_json()) == config


def test_old_names_are_told_once_a_process(run_python):
    program = (
        "import warnings\nfrom qflux.models.presets import config_from_json as read\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        '        read(\'{"architecture": "values", "vocab_size": 7, "weight": "score"}\')\n'
        "print(len(told), told[0].message)"
    )
    told = run_python(program).stdout
    assert told.startswith("1 ") and "shrinkage" in told and "'lm'" in told


def test_the_package_is_imported_without_torch(run_python):
    assert run_python("import sys, qflux; print('torch' in sys.modules)").stdout == "False\n"
    program = (
        "import qflux.train.loop, qflux\nfrom qflux import train, generate\n"
        "print(callable(train), callable(qflux.train), callable(qflux.generate))"
    )
    assert run_python(program).stdout == "True True True\n"


@pytest.mark.parametrize("preset", ["flux", "lm"])
def test_an_output_is_a_pytree_of_tensors(preset):
    model, ids = make_model(make_config(preset, 11, context_length=16)).eval(), make_ids()
    output = model(ids, labels=ids, return_layers=True)
    leaves, spec = tree_flatten(output)
    assert all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = tree_unflatten(leaves, spec)
    assert type(again.layers[0]) is type(output.layers[0])
    assert type(again.layers[0].score) is type(output.layers[0].score)
    torch.testing.assert_close(model(ids, labels=ids).logits, output.logits)


def test_a_record_of_lm_is_what_the_kernels_say():
    model, ids = make_model(make_config("lm", 11, context_length=16)).eval(), make_ids()
    for record in model(ids, return_layers=True).layers:
        again = interact(record.queries, record.keys, score=record.score)
        assert torch.equal(again.degree, record.degree)
        torch.testing.assert_close(again.strength, record.strength)
        assert record.gathered.shape[:-1] == record.queries.shape[:-1]


def test_layers_are_recorded_in_evaluation_and_the_mode_comes_back():
    model, ids = make_model(make_config("lm", 11, context_length=16, dropout=0.5)), make_ids()
    records = record_layers(model, ids)
    assert model.training
    expected = model.eval()(ids, return_layers=True).layers
    for record, other in zip(records, expected, strict=True):
        assert torch.equal(record.strength, other.strength) and not record.strength.requires_grad
    with pytest.raises(ValueError, match="input_ids must lie in"):
        record_layers(model.train(), ids + 11)
    assert model.training
