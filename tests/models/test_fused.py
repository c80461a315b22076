"""A further token through a layer by one call is what the layer's modules make of it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qflux.models.fused as fused_module
from qflux import QuantumFluxConfig, make_model

VOCABULARY = 11
BASE = {"vocab_size": VOCABULARY, "num_layers": 2, "hidden_dim": 20, "num_cylinders": 3}
CONFIGS = {
    "default": {},
    "own values shared, odd width": {"own_value": "shared", "value_dim": 3},
    "no mlp, no convolution": {"mlp_ratio": 0, "conv_width": 0},
    "two taps": {"conv_width": 2, "value_dim": 1},
    "soft": {"score": "threshold"},
    "hard": {"score": "threshold", "shrinkage": "hard"},
    "gate": {"score": "inverse_gate"},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


def build(dtype=torch.float64, **changes):
    model = make_model(QuantumFluxConfig(**BASE | changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def steps(monkeypatch):
    """Counts the tokens that went through a layer by one call."""
    real, counted = fused_module._STEP, []

    def counting(*arguments):
        out = real(*arguments)
        counted.append(out[3])
        return out

    monkeypatch.setattr(fused_module, "_STEP", counting)
    return counted


def go_on(model, ids, start, cache=None):
    """The logits behind `start` tokens, read one by one."""
    cache = model.new_cache(len(ids)) if cache is None else cache
    if start > len(cache):
        model.prefill(ids[:, len(cache) : start], cache)
    return torch.stack(
        [model.prefill(ids[:, n : n + 1], cache) for n in range(start, ids.shape[1])], 1
    )


def by_modules(model, ids, start, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("qflux.models.lm.goes_alone", lambda *_: False)
        return go_on(model, ids, start)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_one_by_one_give_the_full_logits(steps, name, dtype, batch):
    model = build(dtype, **CONFIGS[name])
    ids = torch.randint(0, VOCABULARY, (batch, 40))
    found, tolerance = go_on(model, ids, 7), TOLERANCE[dtype]
    torch.testing.assert_close(found, model(ids).logits[:, 7:], rtol=tolerance, atol=tolerance)
    assert steps == [True] * (2 * 33)


def test_behind_an_index(steps):
    model = build(score="sparsemax")
    ids = torch.randint(0, VOCABULARY, (2, 1300))
    found = go_on(model, ids, 1100)
    torch.testing.assert_close(found, model(ids).logits[:, 1100:], rtol=1e-10, atol=1e-10)
    assert len(steps) == 400 and all(steps)


def test_threads_give_the_same_bits(monkeypatch):
    model, given = build(torch.float32, num_cylinders=32), []
    ids = torch.randint(0, VOCABULARY, (4, 6000))
    real = fused_module._STEP
    monkeypatch.setattr(fused_module, "_STEP", lambda *a: (given.append(a), real(*a))[1])
    go_on(model, ids, 5998)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append([real(*arguments) for arguments in given])
    finally:
        torch.set_num_threads(threads)
    for one, two, five in zip(*found, strict=True):
        assert all(map(torch.equal, one[:3], two[:3])) and all(map(torch.equal, one[:3], five[:3]))


def test_a_failure_leaves_the_cache_as_it_was(monkeypatch):
    model = build()
    ids = torch.randint(0, VOCABULARY, (1, 12))
    expected = go_on(model, ids, 8)
    cache = model.new_cache(1)
    model.prefill(ids[:, :8], cache)
    real, calls = fused_module._STEP, []

    def second_fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no")
        return real(*arguments)

    monkeypatch.setattr(fused_module, "_STEP", second_fails)
    with pytest.raises(RuntimeError, match="no"):
        model.prefill(ids[:, 8:9], cache)
    assert len(cache) == 8 and all(len(layer.attention) == 8 for layer in cache.layers)
    assert torch.equal(go_on(model, ids, 8, cache), expected)


def caches_of(model, ids, count):
    """Two equal caches, of models that have stepped once already."""
    caches = [model.new_cache(1) for _ in range(2)]
    for cache in caches:
        model.prefill(ids[:, : count - 1], cache)
        model.prefill(ids[:, count - 1 : count], cache)
    return caches


WEIGHTS = {
    "in place": lambda part: part.output.weight.data.mul_(3),
    "another parameter": lambda part: setattr(
        part.output, "weight", nn.Parameter(-part.output.weight.detach())
    ),
    "other data": lambda part: setattr(part.inputs.weight, "data", 2 * part.inputs.weight.data),
    "another module": lambda part: setattr(
        part, "output", nn.Linear(part.output.in_features, 20).double()
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_change_are_seen(steps, monkeypatch, name):
    model = build()
    ids = torch.randint(0, VOCABULARY, (1, 10))
    first, second = caches_of(model, ids, 6)
    assert copy.deepcopy(first.layers[0].step) is None  # it would be of no model
    WEIGHTS[name](model.layers[0].attention)
    found = go_on(model, ids, 6, first)
    monkeypatch.setattr("qflux.models.lm.goes_alone", lambda *_: False)
    torch.testing.assert_close(found, go_on(model, ids, 6, second), rtol=1e-10, atol=1e-10)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(model):
    old = model.layers[0].attention.output
    new = Doubled(old.in_features, old.out_features).double()
    new.load_state_dict(old.state_dict())
    model.layers[0].attention.output = new


CHANGES = {
    "a hook": lambda model: model.layers[0].mlp.register_forward_hook(lambda *a: 2 * a[2]),
    "a hook before": lambda model: model.layers[0].attention.norm.register_forward_pre_hook(
        lambda _, given: (3 * given[0],)
    ),
    "a module of another kind": doubled,
    "a forward of its own": lambda model: setattr(
        model.layers[0].attention.norm, "forward", lambda x: x
    ),
    "evolution": None,
    "one tap": None,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("late", [False, True])
def test_what_does_more_than_its_weights_is_called(steps, monkeypatch, name, late):
    options = {"evolution": {"evolution": True}, "one tap": {"conv_width": 1}}.get(name, {})
    model = build(**options)
    ids = torch.randint(0, VOCABULARY, (1, 12))
    first, second = caches_of(model, ids, 6)
    if CHANGES[name] is not None:
        CHANGES[name](model)
    if late:
        found = go_on(model, ids, 6, first)
        monkeypatch.setattr("qflux.models.lm.goes_alone", lambda *_: False)
        torch.testing.assert_close(found, go_on(model, ids, 6, second), rtol=1e-10, atol=1e-10)
        return
    steps.clear()
    found = go_on(model, ids, 6)
    torch.testing.assert_close(found, model(ids).logits[:, 6:], rtol=1e-10, atol=1e-10)
    # Only the first layer was changed by most.
    assert len(steps) == (0 if options else 6)


def test_padding_many_sequences_training_and_gradients_go_by_modules(steps, monkeypatch):
    model = build()
    ids = torch.randint(0, VOCABULARY, (5, 9))
    go_on(model, ids, 6)
    go_on(model, ids[:2], 6, model.new_cache(2, padding=torch.tensor([0, 2])))
    model.train()
    go_on(model, ids[:1], 6)
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        go_on(model.float(), ids[:1], 6)
    assert not steps
    half = build(torch.bfloat16)
    go_on(half, ids[:1], 6)
    assert not steps


def recorded(monkeypatch, model, ids):
    """The operator, and by name what its first call was given for the last of these tokens."""
    given, real = [], fused_module._STEP
    monkeypatch.setattr(fused_module, "_STEP", lambda *a: (given.append(a), real(*a))[1])
    go_on(model, ids, ids.shape[1] - 1)
    names = torch.ops.qflux_kernels.cache_layer.default._schema.arguments
    return real, dict(zip([argument.name for argument in names], given[0], strict=True))


@pytest.mark.parametrize("row", [0, 2 * 3, 4 * 3], ids=["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e25])
def test_what_is_not_tame_is_not_served(monkeypatch, number, row):
    ids = torch.randint(0, VOCABULARY, (1, 6))
    real, usual = recorded(monkeypatch, build(torch.float32), ids)
    bias = usual["inputs_bias"].detach().clone()
    bias[row] = number
    assert real(*usual.values())[3] and not real(*(usual | {"inputs_bias": bias}).values())[3]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_tame_goes_by_modules(steps, monkeypatch, number):
    model = build()
    ids = torch.tensor([[1, 2, 4, 5, 3, 1, 2]])
    with torch.no_grad():
        model.layers[1].attention.inputs.bias[4 * 3] = number  # of a value
    found = go_on(model, ids, 3)
    expected = by_modules(model, ids, 3, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
    assert steps == [True] * 4  # in the first layer alone


def test_operations_are_counted_as_those_of_the_modules(monkeypatch):
    counts = []
    model = build(num_layers=1)
    ids = torch.randint(0, VOCABULARY, (1, 9))
    for alone in (True, False):
        cache = model.new_cache(1)
        model.prefill(ids[:, :8], cache)
        with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
            if not alone:
                patch.setattr("qflux.models.lm.goes_alone", lambda *_: False)
            model.prefill(ids[:, 8:], cache)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_op_refuses_what_would_leave_its_memory(monkeypatch):
    ids = torch.randint(0, VOCABULARY, (1, 6))
    real, usual = recorded(monkeypatch, build(torch.float32), ids)
    hidden, buffer = usual["hidden"], usual["key_buffer"]
    for changes, message in (
        ({"hidden": hidden[0]}, "hidden must have shape"),
        ({"hidden": hidden.half()}, "hidden must be float32 or float64"),
        ({"angle": usual["angle"][:2]}, "angle must have shape"),
        ({"angle": usual["angle"].double()}, "angle must be of the dtype"),
        ({"at": buffer.shape[2]}, "room for a token"),
        ({"at": -1}, "room for a token"),
        ({"value_buffer": buffer}, "inputs must have"),
        ({"inputs": usual["inputs"][:-1]}, "inputs must have"),
        ({"inputs_bias": usual["inputs_bias"][1:]}, "inputs_bias must have shape"),
        ({"output": usual["output"].mT}, "output must"),
        ({"mlp_output": None}, "must come together"),
        ({"mlp_inputs": usual["mlp_inputs"][1:]}, "mlp_inputs must have shape"),
        ({"past": None}, "must come together"),
        ({"past": usual["past"][:, 1:]}, "past must have shape"),
        ({"indexed": 512}, "512 indexed tokens"),
        ({"score": 9}, "score must be 0 to"),
        ({"score": 0}, "moments come with"),
        ({"norm_weight": usual["norm_weight"][1:]}, "norm_weight must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            real(*(usual | changes).values())
