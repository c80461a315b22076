"""The network: configuration, causality, gradients, loss, generation."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch.nn import functional as F

import qflux
from qflux import QuantumFluxConfig, QuantumFluxLM
from qflux.inference.sampling import sample
from qflux.models.embedding import CylinderEmbedding, PhaseRotation, rotate
from qflux.models.layers import EvolutionLayer, GatedMLP, GeometricAttention, StateEvolution, scaled
from qflux_kernels import Evolution, Radius, Threshold, reference

SMALL = {"vocab_size": 11, "num_layers": 2, "num_cylinders": 3, "hidden_dim": 12, "value_dim": 4}
VARIANTS = {
    "default": {},
    "no layers": {"num_layers": 0},
    "one layer": {"num_layers": 1},
    "states alone": {"value_dim": 0},
    "states alone, one cylinder": {"value_dim": 0, "num_cylinders": 1},
    "evolution": {"evolution": True},
    "no mlp": {"mlp_ratio": 0},
    "no convolution": {"conv_width": 0},
    "threshold": {"score": "threshold"},
    "inverse gate": {"score": "inverse_gate"},
    "threshold, evolution": {"score": "threshold", "evolution": True},
    "threshold, states alone": {"score": "threshold", "value_dim": 0},
    "inverse gate, states alone": {"score": "inverse_gate", "value_dim": 0},
    "sum": {"score": "threshold", "evolution": True, "reduction": "sum"},
    "mean reversion": {"evolution": True, "radius_reversion": 0.1},
    "reference": {"backend": "reference"},
}


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return QuantumFluxLM(QuantumFluxConfig(**{**SMALL, **changes}))


def make_ids(batch=2, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL["vocab_size"], (batch, length), generator=generator)


# --- configuration ---


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("vocab_size", 0, ValueError),
        ("vocab_size", 2.0, TypeError),
        ("num_layers", -1, ValueError),
        ("num_layers", True, TypeError),
        ("num_cylinders", 0, ValueError),
        ("hidden_dim", "128", TypeError),
        ("context_length", 1, ValueError),
        ("value_dim", -1, ValueError),
        ("mlp_ratio", -0.5, ValueError),
        ("conv_width", -1, ValueError),
        ("evolution", 1, TypeError),
        ("score", "softmax", ValueError),
        ("sigma_max", -0.1, ValueError),
        ("scale_min", 0.0, ValueError),
        ("scale_max", 0.001, ValueError),
        ("frequency_min", 0.0, ValueError),
        ("frequency_min", 1.5, ValueError),
        ("near_start", -1.0, ValueError),
        ("alpha", float("nan"), ValueError),
        ("reduction", "max", ValueError),
        ("dt", 0.0, ValueError),
        ("dt", None, TypeError),
        ("skip_beta", float("inf"), ValueError),
        ("radius_min", -0.1, ValueError),
        ("radius_max", 0.05, ValueError),
        ("dropout", 1.0, ValueError),
        ("backend", "tpu", ValueError),
    ],
)
def test_config_rejects_bad_values_by_name(name, value, error):
    with pytest.raises(error) as caught:
        QuantumFluxConfig(**{**SMALL, name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def test_config_is_frozen():
    config = QuantumFluxConfig(**SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3


def test_config_json_round_trip():
    config = QuantumFluxConfig(**SMALL, score="inverse_gate", dt=0.25, dropout=0.5)
    assert QuantumFluxConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "changes", [{"sigma_min": 0.2}, {"sigma_max": 2.0}, {"shrinkage": "hard"}, {"alpha": 0.1}]
)
def test_options_of_other_scores_are_refused(changes):
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=rf"{name} is not an option.*sparsemax.*{value!r}"):
        QuantumFluxConfig(**SMALL, score="sparsemax", **changes)


def test_a_file_with_options_of_the_threshold_and_no_score_means_it():
    for option in ('"sigma_max": 1.4', '"shrinkage": "soft"'):
        config = QuantumFluxConfig.from_json(f'{{"vocab_size": 5, {option}}}')
        assert config.score == "threshold"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"vocab_size": 5, "num_heads": 4, "hue": 1}', "hue, num_heads"),
        ('{"num_layers": 5}', "vocab_size"),
        ('{"vocab_size": -5}', "vocab_size"),
        ("[1, 2]", "list"),
        ("{", "JSON"),
    ],
)
def test_config_json_errors_name_the_trouble(text, named):
    with pytest.raises(ValueError, match=named):
        QuantumFluxConfig.from_json(text)


# --- embedding ---


def test_embedding_is_radius_and_phase_of_the_token():
    torch.manual_seed(0)
    embedding = CylinderEmbedding(QuantumFluxConfig(**SMALL))
    torch.nn.init.normal_(embedding.radius_logit)
    ids = make_ids()
    states = embedding(ids)
    assert states.shape == (2, 3, 16, 2)
    radius = 0.1 + 1.9 * torch.sigmoid(embedding.radius_logit)
    x = radius * embedding.phase.cos()
    y = radius * embedding.phase.sin()
    for cylinder in range(3):
        torch.testing.assert_close(states[:, cylinder, :, 0], x[ids, cylinder])
        torch.testing.assert_close(states[:, cylinder, :, 1], y[ids, cylinder])


def layouts():
    """States `(2, 3, 4, 2)` in every layout that a projection or a caller may give."""
    flat = torch.randn(200)
    yield "contiguous", flat[:48].view(2, 3, 4, 2)
    yield "strided", flat[:48].view(2, 4, 3, 2).transpose(1, 2)
    yield "odd offset", flat[1:49].view(2, 3, 4, 2)
    yield "odd strides", flat[:60].view(2, 3, 10)[..., :9].unfold(-1, 2, 2)
    yield "apart", flat[:48].view(2, 2, 3, 4).movedim(1, -1)
    yield "expanded", flat[:8].view(4, 2).expand(2, 3, 4, 2)
    yield "empty", flat[:0].view(0, 3, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_turn_is_that_of_a_rotation_matrix_in_any_layout(dtype):
    torch.manual_seed(0)
    angle = torch.randn(3, 4, requires_grad=True)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    for name, states in layouts():
        states = states.to(dtype).requires_grad_()
        for given in (angle, angle.double()):
            found = rotate(states, given)
            expected = (matrix.double() @ states.double()[..., None]).squeeze(-1)
            assert found.dtype == dtype and found.shape == states.shape, name
            assert found.is_contiguous(), name
            weight = torch.randn(found.shape, dtype=torch.float64)
            torch.testing.assert_close(found, expected.to(dtype), msg=lambda m, n=name: f"{n}: {m}")
            ours = torch.autograd.grad((found * weight).sum(), (states, angle))
            theirs = torch.autograd.grad(
                (expected * weight).sum(), (states, angle), retain_graph=True
            )
            rounding = {"rtol": 2e-2, "atol": 0.1} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(ours, theirs, **rounding)


def test_positions_turn_phases_at_the_frequency_of_the_cylinder():
    rotation = PhaseRotation(QuantumFluxConfig(**SMALL, frequency_min=0.01))
    omega = rotation.log_frequency.exp()
    assert (
        omega[0] == 1
        and omega[-1].item() == pytest.approx(0.01)
        and torch.allclose(omega[1:] / omega[:-1], omega[1] / omega[0])
    )
    states = torch.tensor([0.8, 0.0]).expand(3, 5, 2)
    turned = rotate(states, rotation(5))
    expected = torch.arange(5) * omega[:, None]
    torch.testing.assert_close(turned[..., 0], 0.8 * expected.cos())
    torch.testing.assert_close(turned[..., 1], 0.8 * expected.sin())


def starting_points(length, **changes):
    """Queries and keys of tokens without anything of their own, scales and frequencies."""
    torch.manual_seed(0)
    config = QuantumFluxConfig(
        vocab_size=11, hidden_dim=16, num_cylinders=32, conv_width=0, **changes
    )
    attention, rotation = GeometricAttention(config).double(), PhaseRotation(config).double()
    hidden = torch.zeros(1, length, 16).double()
    _, parts = attention(hidden, None, rotation(length), return_parts=True)
    return parts, attention.score.log_scale.exp(), rotation.frequency()


def test_some_cylinders_start_by_gathering_from_the_near_past():
    length, start = 1500, 3.0
    parts, scale, frequency = starting_points(length, near_start=start)
    near = torch.zeros(32, dtype=torch.bool)
    near[[8, 9, 10, 11, 12, 13, 14, 16, 18, 20]] = True
    for points in (parts["queries"], parts["keys"]):
        radius = torch.linalg.vector_norm(points, dim=-1)[0]
        torch.testing.assert_close(radius[near], torch.full_like(radius[near], start))
        assert radius[~near].max() <= math.sqrt(2 / 16)
    # Their scores fall with the square of the distance, where a turn takes longer than that.
    distance = torch.arange(length, dtype=torch.float64).flip(0)
    context, _, degree = reference.interact(
        parts["queries"][..., -1:, :],
        parts["keys"],
        distance[:, None].expand(1, 32, length, 1),
        causal=False,
        score=parts["score"],
    )
    reach = (3 / (scale * start**2 * frequency**2)) ** (1 / 3)
    slow = near & (frequency * length < 2 * math.pi)
    assert slow.sum() == 3
    torch.testing.assert_close(degree[0, slow, 0].double(), reach[slow], rtol=0.05, atol=1)
    torch.testing.assert_close(context[0, slow, 0, 0], 3 / 8 * reach[slow], rtol=0.05, atol=1)


def test_tokens_need_not_start_with_anything_in_common():
    parts, _, _ = starting_points(5, near_start=0)
    for points in (parts["queries"], parts["keys"]):
        radius = torch.linalg.vector_norm(points, dim=-1)
        assert radius.min() > 0 and radius.max() <= math.sqrt(2 / 16)


def test_evolution_applies_time_step_and_dynamic_skip():
    options = {"score": "threshold", "backend": "reference"}
    config = QuantumFluxConfig(**SMALL, **options, dt=0.3, skip_beta=2.0)
    evolution = StateEvolution(config)
    torch.nn.init.normal_(evolution.log_dt, mean=-1.0)
    states = torch.randn(2, 3, 7, 2)
    dt = evolution.log_dt.detach().exp()
    skip = 1 / (1 + torch.exp(-2.0 * (dt - 0.3)))
    moved = reference.evolve(
        states,
        dt[:, None],
        score=Threshold(sigma=torch.tensor([0.1, 1.4, 0.75])),
        radius=Radius(),
        reduction="mean",
    ).states
    skip = skip[:, None, None]
    torch.testing.assert_close(evolution(states).states, skip * states + (1 - skip) * moved)


LAYERS = [
    {},
    {"score": "threshold", "shrinkage": "hard"},
    {"score": "threshold", "shrinkage": "soft"},
    {"evolution": True},
    {"value_dim": 0},
    {"score": "inverse_gate"},
]


@pytest.mark.parametrize("changes", LAYERS)
def test_a_layer_sees_distances_between_positions_only(changes):
    torch.manual_seed(0)
    config = QuantumFluxConfig(**{**SMALL, **changes})
    layer, rotation = EvolutionLayer(config).double(), PhaseRotation(config).double()
    states, hidden = torch.randn(2, 3, 9, 2).double(), torch.randn(2, 9, 12).double()
    shift = torch.tensor([0.4, 1.0, 2.5])[:, None].double()
    here_states, here_hidden, _ = layer(states, hidden, rotation(9))
    there_states, there_hidden, _ = layer(rotate(states, shift), hidden, rotation(9) + shift)
    torch.testing.assert_close(there_hidden, here_hidden)
    torch.testing.assert_close(there_states, rotate(here_states, shift))


@pytest.mark.parametrize("own_value", ["scaled", "projected", "shared"])
@pytest.mark.parametrize("shrinkage", ["hard", "soft"])
def test_gathered_values_are_averaged_over_what_was_kept(shrinkage, own_value):
    torch.manual_seed(0)
    options = {"score": "threshold", "shrinkage": shrinkage, "own_value": own_value}
    config = QuantumFluxConfig(**SMALL, **options)
    attention = GeometricAttention(config).double()
    torch.nn.init.normal_(attention.norm.weight)
    hidden, angle = torch.randn(2, 9, 12).double(), torch.randn(3, 9).double()
    states = torch.randn(2, 3, 9, 2).double()
    u = attention.conv(hidden)
    projected = attention.inputs(u)
    queries, keys = (projected[..., at : at + 6].unflatten(-1, (3, 2)) for at in (0, 6))
    values, gate = projected[..., 12:24], projected[..., 24:36]
    own = {"shared": values, "projected": projected[..., 36:]}.get(own_value)
    if own is None:
        torch.nn.init.normal_(attention.own_scale)
        own = torch.stack([attention.own_scale[k] * u[..., k] for k in range(12)], -1)
    values, own = (x.unflatten(-1, (3, 4)) for x in (values, own))
    rows = torch.zeros(2, 9, 3, 4).double()
    for batch, cylinder, row in itertools.product(range(2), range(3), range(9)):
        turn = [
            torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]).double()
            for a in angle[cylinder]
        ]
        query = turn[row] @ queries[batch, row, cylinder]
        scores = torch.stack(
            [
                (query @ (turn[j] @ keys[batch, j, cylinder] + states[batch, cylinder, j]) + 1) / 2
                for j in range(row + 1)
            ]
        )
        sigma = attention.score.sigma[cylinder]
        tau = scores.mean() + sigma * (scores.var(correction=0) + 1e-6).sqrt()
        kept = scores >= tau
        weights = (scores - tau if shrinkage == "soft" else scores) * kept
        gathered = weights @ values[batch, : row + 1, cylinder] / max(1, int(kept.sum()))
        rows[batch, row, cylinder] = gathered + own[batch, row, cylinder]
    normal = F.layer_norm(rows.flatten(2), (12,), attention.norm.weight, attention.norm.bias)
    expected = attention.output(normal * gate * gate.sigmoid())
    torch.testing.assert_close(attention(hidden, states, angle)[0], expected)


@pytest.mark.parametrize("value_dim", [2, 9])
def test_scaled_own_values_begin_again_where_the_stream_ends(value_dim):
    torch.manual_seed(0)
    config = QuantumFluxConfig(**SMALL | {"value_dim": value_dim}, own_value="scaled")
    factors, hidden = GeometricAttention(config).own_scale, torch.randn(2, 5, 12)
    torch.nn.init.normal_(factors)
    found = scaled(hidden, factors)
    assert found.shape == (2, 5, 3 * value_dim)
    for k in range(3 * value_dim):
        torch.testing.assert_close(found[..., k], factors[k] * hidden[..., k % 12])


def test_sparsemax_gathers_means_of_its_own():
    torch.manual_seed(0)
    config = QuantumFluxConfig(**SMALL, score="sparsemax", scale_min=0.2, scale_max=5.0)
    attention = GeometricAttention(config).double()
    queries, keys = torch.randn(2, 2, 3, 9, 2).double()
    values = torch.randn(2, 3, 9, 4).double()
    mean, _ = attention.gather(queries, keys, values)
    scales = [0.2, 1.0, 5.0]  # of three cylinders from fast to slow
    torch.testing.assert_close(attention.score().scale, torch.tensor(scales).double())
    for batch, cylinder, row in itertools.product(range(2), range(3), range(9)):
        z = scales[cylinder] * keys[batch, cylinder, : row + 1] @ queries[batch, cylinder, row]
        ranked = z.sort(descending=True).values
        # The weights of the largest n sum to one; n is the largest whose last weight is positive.
        taus = [(ranked[:n].sum() - 1) / n for n in range(1, row + 2)]
        tau = max(tau for n, tau in enumerate(taus) if ranked[n] > tau)
        weights = (z - tau).clamp(min=0)
        expected = weights @ values[batch, cylinder, : row + 1]
        torch.testing.assert_close(mean[batch, cylinder, row], expected)


def test_each_layer_learns_the_scales_of_its_cylinders():
    model, ids = make_model(score="sparsemax"), make_ids()
    model(ids, labels=ids).loss.backward()
    scales = [layer.attention.score.log_scale for layer in model.layers]
    assert scales[0] is not scales[1]
    for scale in scales:
        assert scale.shape == (3,) and bool((scale.grad != 0).all())


def test_mlp_gates_and_weighs_as_much_as_a_plain_one():
    torch.manual_seed(0)
    mlp = GatedMLP(QuantumFluxConfig(**SMALL, mlp_ratio=2.0))
    hidden = torch.randn(2, 5, 12)
    gate, up = mlp.input(mlp.conv(hidden)).split(16, -1)
    torch.testing.assert_close(mlp(hidden), mlp.output(gate * gate.sigmoid() * up))
    assert mlp.input.weight.numel() + mlp.output.weight.numel() == 2 * 2.0 * 12 * 12


def test_convolutions_reach_their_width_and_no_further():
    for branch in (GeometricAttention, GatedMLP):
        conv = branch(QuantumFluxConfig(**SMALL, conv_width=3)).conv
        seen = torch.autograd.functional.jacobian(conv, torch.randn(1, 6, 12)).abs()
        reach = seen.sum((0, 2, 3, 5)) > 0
        assert torch.equal(reach, torch.ones(6, 6).tril().triu(-2).bool())


def test_states_evolve_only_if_asked_or_alone():
    assert make_model().layers[0].evolution is None
    for changes in ({"evolution": True}, {"value_dim": 0}):
        model, still = make_model(**changes), make_model(**changes)
        ids = make_ids()
        for layer in still.layers:
            layer.evolution.forward = lambda states: Evolution(states, None, None)
        assert not torch.allclose(model(ids).logits, still(ids).logits)


# --- causality and gradients ---


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_of_a_prefix_are_the_prefix_of_the_logits(changes):
    model = make_model(**changes).double().eval()
    ids = make_ids()
    whole = model(ids).logits
    assert whole.shape == (2, 16, 11)
    for length in (1, 2, 5, 15):
        torch.testing.assert_close(model(ids[:, :length]).logits, whole[:, :length])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_gradients_reach_every_parameter(changes):
    model = make_model(**changes)
    ids = make_ids(length=24)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_layers_see_the_order_of_the_past():
    ids = make_ids(batch=1)
    swapped = ids.clone()
    swapped[0, 3], swapped[0, 9] = ids[0, 9], ids[0, 3]
    assert ids[0, 3] != ids[0, 9]
    for changes in ({}, {"value_dim": 0}):
        model = make_model(**changes)
        assert not torch.allclose(model(ids).logits[0, -1], model(swapped).logits[0, -1])


def test_dropout_acts_in_training_only():
    model, ids = make_model(dropout=0.5), make_ids()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


# --- loss and arguments ---


def test_loss_shifts_labels_and_ignores_minus_100():
    model, ids = make_model(), make_ids()
    labels = ids.clone()
    labels[0, :9] = -100
    labels[1, 4] = -100
    output = model(ids, labels=labels)
    logits, loss = output.logits, output.loss
    terms = [
        F.cross_entropy(logits[row, position], labels[row, position + 1])
        for row in range(2)
        for position in range(15)
        if labels[row, position + 1] != -100
    ]
    assert len(terms) == 7 + 14
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert model(ids).loss is None


@pytest.mark.parametrize(
    ("ids", "labels", "error", "named"),
    [
        (torch.zeros(2, 3), None, TypeError, "input_ids"),
        (torch.zeros(3, dtype=torch.int64), None, ValueError, "input_ids"),
        (torch.zeros(2, 0, dtype=torch.int64), None, ValueError, "input_ids"),
        (torch.tensor([[0, 11]]), None, ValueError, "11"),
        (torch.tensor([[0, -1]]), None, ValueError, "-1"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2).long(), ValueError, "labels"),
    ],
)
def test_bad_inputs_are_named(ids, labels, error, named):
    with pytest.raises(error, match=named):
        make_model()(ids, labels=labels)


# --- generation ---


def test_the_output_layer_starts_larger_than_other_linear_maps():
    torch.manual_seed(0)
    head = QuantumFluxLM(QuantumFluxConfig(vocab_size=500, hidden_dim=128, num_layers=0)).head
    assert head.weight.abs().max().item() == pytest.approx(2 / math.sqrt(128), rel=1e-3)
    assert head.weight.is_leaf and head.weight.requires_grad
    assert head.bias.abs().max() <= 1 / math.sqrt(128)


def test_greedy_generation_takes_the_most_likely_token_also_beyond_the_context():
    model, ids = make_model(context_length=8), make_ids()
    out = model.generate(ids, 5, temperature=0)
    assert out.shape == (2, 21) and torch.equal(out[:, :16], ids)
    model.eval()
    for position in range(16, 21):
        logits = model(out[:, :position]).logits[:, -1]
        assert torch.equal(out[:, position], logits.argmax(-1))


def test_generation_is_determined_by_the_generator():
    model, ids = make_model(), make_ids()

    def run(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids, 20, generator=generator, **options)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, top_k=1000), run(1))
    assert torch.equal(run(1, top_p=1.0), run(1))
    greedy = model.generate(ids, 20, temperature=0)
    assert torch.equal(run(1, top_k=1), greedy)
    assert torch.equal(run(1, top_p=1e-6), greedy)


def test_generation_restores_the_mode_and_needs_no_gradient():
    model, ids = make_model(dropout=0.5), make_ids()
    recorded = []
    model.head.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    greedy = model.generate(ids, 10, temperature=0)
    assert torch.equal(greedy, model.generate(ids, 10, temperature=0))
    assert model.training and recorded == [False] * 20
    assert torch.equal(model.generate(ids, 0), ids)


def test_sampling_follows_the_truncated_distribution():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probabilities.log().expand(20000, 4)

    def frequencies(**options):
        generator = torch.Generator().manual_seed(0)
        drawn = sample(logits, generator=generator, **options).flatten()
        return torch.bincount(drawn, minlength=4) / len(drawn)

    def close(found, expected):
        torch.testing.assert_close(found, torch.tensor(expected), atol=0.015, rtol=0)
        assert torch.equal(found == 0, torch.tensor(expected) == 0)

    close(frequencies(), [0.1, 0.4, 0.2, 0.3])
    close(frequencies(top_k=2), [0.0, 4 / 7, 0.0, 3 / 7])
    close(frequencies(top_p=0.65), [0.0, 4 / 7, 0.0, 3 / 7])
    close(frequencies(top_p=0.75), [0.0, 4 / 9, 2 / 9, 3 / 9])
    square = probabilities**2 / (probabilities**2).sum()
    close(frequencies(temperature=0.5), square.tolist())


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -1.0, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", None, TypeError),
        ("top_k", 0, ValueError),
        ("top_k", 2.5, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.5, ValueError),
        ("max_new_tokens", -1, ValueError),
        ("max_new_tokens", 1.5, TypeError),
    ],
)
def test_bad_generation_options_are_named(name, value, error):
    options = {"max_new_tokens": 2, name: value}
    with pytest.raises(error, match=name) as caught:
        make_model().generate(make_ids(), **options)
    assert repr(value) in str(caught.value)


# --- files ---


def test_saved_model_computes_the_same_logits(tmp_path):
    model, ids = make_model(score="inverse_gate"), make_ids()
    vocabulary = qflux.CharacterVocabulary("abcdefghijk")
    qflux.save_model(tmp_path / "new", model, vocabulary)
    loaded, found = qflux.load_model(tmp_path / "new")
    assert not loaded.training and loaded.config == model.config
    assert found.characters == vocabulary.characters
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_loading_names_what_is_missing_or_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        qflux.load_model(tmp_path / "nowhere")
    qflux.save_model(tmp_path, make_model(), qflux.CharacterVocabulary("abcdefghijk"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_dim": 16}))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        qflux.load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        qflux.load_model(tmp_path)
