"""A further token through a model by one call is what the model's modules make of it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qflux.models.fused as fused_module
from qflux import QuantumFluxConfig, make_model
from qflux.models.base import Reading
from qflux.models.embedding import PhaseRotation
from qflux_kernels import schema

VOCABULARY = 11
BASE = {"vocab_size": VOCABULARY, "num_layers": 2, "hidden_dim": 20, "num_cylinders": 3}
CONFIGS = {
    "default": {},
    "own values shared, odd width": {"own_value": "shared", "value_dim": 3},
    "own values scaled, narrower": {"own_value": "scaled"},
    "own values scaled, wider": {"own_value": "scaled", "value_dim": 9, "score": "threshold"},
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
    """Whether each of the calls was served."""
    real, counted = fused_module._STEP, []

    def counting(*arguments):
        out = real(*arguments)
        counted.append(out[2])
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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_one_by_one_give_the_full_logits(steps, name, dtype, batch):
    model = build(dtype, **CONFIGS[name])
    ids = torch.randint(0, VOCABULARY, (batch, 75))  # beyond the room that there is at first
    found, tolerance = go_on(model, ids, 42), TOLERANCE[dtype]
    torch.testing.assert_close(found, model(ids).logits[:, 42:], rtol=tolerance, atol=tolerance)
    assert steps == [True] * 33


def test_a_call_of_the_model_goes_the_same_way(steps):
    model = build()
    ids = torch.randint(0, VOCABULARY, (2, 9))
    caches = [model.new_cache(2) for _ in range(2)]
    for cache in caches:
        model.prefill(ids[:, :8], cache)
    logits = model(ids[:, 8:], cache=caches[0]).logits
    assert torch.equal(logits[:, 0], model.prefill(ids[:, 8:], caches[1]))
    assert steps == [True] * 2 and not logits.requires_grad


def test_behind_an_index(steps):
    model = build(score="sparsemax")
    ids = torch.randint(0, VOCABULARY, (2, 1300))
    found = go_on(model, ids, 1100)
    torch.testing.assert_close(found, model(ids).logits[:, 1100:], rtol=1e-10, atol=1e-10)
    assert len(steps) == 200 and all(steps)


@pytest.mark.parametrize("taps", [0, 4])
def test_whatever_happens_between_tokens(steps, monkeypatch, taps):
    """Each token meets what its cache is then: tokens read together, forgotten, other sequences."""
    model = build(conv_width=taps)
    ids = torch.randint(0, VOCABULARY, (3, 1900))
    events = [
        lambda cache, at: (cache.truncate(at), at)[1],
        lambda cache, at: (model.prefill(ids[:, at : at + 40], cache), at + 40)[1],
        lambda cache, at: (cache.truncate(at - 700), at - 700)[1],
        lambda cache, at: (cache.reorder(torch.tensor([2, 0, 1])), at)[1],
        lambda cache, at: (model.prefill(ids[:, at : at + 600], cache), at + 600)[1],
    ]
    found = []
    for alone in (True, False):
        if not alone:
            monkeypatch.setattr("qflux.models.fused.goes_alone", lambda *_: False)
        cache, logits = model.new_cache(3), []
        model.prefill(ids[:, :1200], cache)
        at = 1200
        for event in events:
            logits += [model.prefill(ids[:, n : n + 1], cache) for n in range(at, at + 9)]
            at = event(cache, at + 9)
        logits += [model.prefill(ids[:, n : n + 1], cache) for n in range(at, at + 9)]
        found.append(torch.stack(logits))
    assert len(steps) >= 40 and all(steps)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


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
        assert all(map(torch.equal, one[:2], two[:2])) and all(map(torch.equal, one[:2], five[:2]))


def test_a_failure_leaves_the_cache_as_it_was(monkeypatch):
    model = build()
    ids = torch.randint(0, VOCABULARY, (1, 12))
    expected = go_on(model, ids, 8)
    cache = model.new_cache(1)
    model.prefill(ids[:, :8], cache)
    real = fused_module._STEP

    def fails(*arguments):
        real(*arguments)
        raise RuntimeError("no")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no"):
        patch.setattr(fused_module, "_STEP", fails)
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
    assert copy.deepcopy(first.step) is None  # it would be of no model
    WEIGHTS[name](model.layers[0].attention)
    found = go_on(model, ids, 6, first)
    monkeypatch.setattr("qflux.models.fused.goes_alone", lambda *_: False)
    torch.testing.assert_close(found, go_on(model, ids, 6, second), rtol=1e-10, atol=1e-10)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(model):
    old = model.layers[0].attention.output
    new = Doubled(old.in_features, old.out_features).double()
    new.load_state_dict(old.state_dict())
    model.layers[0].attention.output = new


def own_read(model):
    real = model.read

    def read(*arguments, **options):
        (hidden,), *rest = real(*arguments, **options)
        return Reading((2 * hidden,), *rest)

    model.read = read


class TwiceAsFar(PhaseRotation):
    def frequency(self):
        return 2 * super().frequency()


CHANGES = {
    "a hook on the embedding": lambda model: model.embedding.register_forward_hook(
        lambda *a: 2 * a[2]
    ),
    "a hook on the last norm": lambda model: model.norm.register_forward_hook(lambda *a: 2 * a[2]),
    "a rotation of another kind": lambda model: setattr(model.rotation, "__class__", TwiceAsFar),
    "a read of its own": own_read,
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
        monkeypatch.setattr("qflux.models.fused.goes_alone", lambda *_: False)
        torch.testing.assert_close(found, go_on(model, ids, 6, second), rtol=1e-10, atol=1e-10)
        return
    steps.clear()
    found = go_on(model, ids, 6)
    torch.testing.assert_close(found, model(ids).logits[:, 6:], rtol=1e-10, atol=1e-10)
    assert not steps


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
    return real, dict(zip(schema.CACHE_TOKEN.names, given[0], strict=True))


ORDER = {
    "weights": (schema.TOKEN_WEIGHTS, schema.TOKEN_ENDS),
    "caches": (schema.TOKEN_CACHES, ()),
}


def place(kind, name):
    """Of a tensor in a list: of the first layer, or of what is around the layers."""
    of_layers, ends = ORDER[kind]
    return of_layers.index(name) if name in of_layers else ends.index(name) - len(ends)


def changed(usual, kind, name, change):
    """The arguments with another tensor in one of the lists."""
    given, at = list(usual[kind]), place(kind, name)
    given[at] = change(given[at])
    return usual | {kind: given}


@pytest.mark.parametrize("row", [0, 2 * 3, 4 * 3], ids=["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e25])
def test_what_is_not_tame_is_not_served(monkeypatch, number, row):
    ids = torch.randint(0, VOCABULARY, (1, 6))
    real, usual = recorded(monkeypatch, build(torch.float32), ids)
    bias = usual["weights"][place("weights", "inputs_bias")].detach().clone()
    bias[row] = number
    assert real(*usual.values())[2]
    assert not real(*changed(usual, "weights", "inputs_bias", lambda _: bias).values())[2]


@pytest.mark.parametrize("number", [-1, VOCABULARY])
def test_an_id_outside_the_vocabulary_is_not_served(steps, monkeypatch, number):
    model = build()
    ids = torch.randint(0, VOCABULARY, (2, 6))
    cache = model.new_cache(2)
    model.prefill(ids, cache)
    with pytest.raises(ValueError, match=rf"input_ids must lie in \[0, {VOCABULARY - 1}\]"):
        model.prefill(torch.tensor([[1], [number]]), cache)
    assert steps == [False] and len(cache) == 6
    assert torch.equal(
        model.prefill(ids[:, :1], cache), go_on(model, ids[:, [*range(6), 0]], 6)[:, 0]
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_tame_goes_by_modules(steps, monkeypatch, number):
    model = build()
    ids = torch.tensor([[1, 2, 4, 5, 3, 1, 2]])
    caches = [model.new_cache(1) for _ in range(2)]
    for cache in caches:
        model.prefill(ids[:, :3], cache)
    with torch.no_grad():
        model.layers[1].attention.inputs.bias[4 * 3] = number  # of a value
    found = go_on(model, ids, 3, caches[0])
    monkeypatch.setattr("qflux.models.fused.goes_alone", lambda *_: False)
    expected = go_on(model, ids, 3, caches[1])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
    assert steps == [False]  # which the cache remembers


def test_operations_are_counted_as_those_of_the_modules(steps, monkeypatch):
    counts = []
    model = build(num_layers=1)
    ids = torch.randint(0, VOCABULARY, (1, 9))
    for alone in (True, False):
        cache = model.new_cache(1)
        model.prefill(ids[:, :7], cache)
        # The counter has hooks on all modules; what a cache knows of its model is from before.
        model.prefill(ids[:, 7:8], cache)
        steps.clear()
        with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
            if not alone:
                patch.setattr("qflux.models.fused.goes_alone", lambda *_: False)
            model.prefill(ids[:, 8:], cache)
        assert steps == [True] * alone
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_op_refuses_what_would_leave_its_memory(monkeypatch):
    ids = torch.randint(0, VOCABULARY, (1, 6))
    real, usual = recorded(monkeypatch, build(torch.float32), ids)
    room = usual["caches"][0].shape[2]
    for changes, message in (
        ({"ids": usual["ids"][None]}, "ids must have shape"),
        ({"ids": usual["ids"].float()}, "ids must be int64"),
        ({"angle": usual["angle"][:2]}, "angle must have shape"),
        ({"angle": usual["angle"].double()}, "angle must be of the dtype"),
        ({"at": room}, "room for a token"),
        ({"at": -1}, "room for a token"),
        ({"indexed": [512, 0]}, "512 indexed tokens"),
        ({"indexed": [0]}, "as many layers"),
        ({"scores": [9, 3]}, "score must be 0 to"),
        ({"scores": [0, 3]}, "moments come with"),
        ({"weights": usual["weights"][1:]}, "as many layers"),
        ({"bounds": [0.0]}, "as many layers"),
        ({"pasts": usual["pasts"][1:]}, "pasts must be one"),
        ({"pasts": [*usual["pasts"], usual["pasts"][0]]}, "pasts must be one"),
        ({"pasts": [past[:, 1:] for past in usual["pasts"]]}, "taps must have shape"),
        ({"pasts": [usual["pasts"][0][:, 1:], *usual["pasts"][1:]]}, "pasts must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            real(*(usual | changes).values())
    for kind, name, change, message in (
        ("caches", "values", lambda values: values[..., :2], "inputs must have"),
        ("caches", "values", lambda values: values[:, :, 1:], "values must have shape"),
        ("caches", "keys", lambda keys: keys[0], "keys must be"),
        ("caches", "keys", lambda keys: keys.contiguous(), "tokens that follow one another"),
        ("caches", "tangents", lambda tangents: tangents[..., 1:], "tangents must have shape"),
        ("weights", "inputs", lambda weight: weight[:-1], "inputs must have"),
        ("weights", "inputs_bias", lambda bias: bias[1:], "inputs_bias must have shape"),
        ("weights", "output", lambda weight: weight.mT, "output must"),
        ("weights", "output", lambda weight: weight.double(), "output must be of the dtype"),
        ("weights", "mlp_output", lambda weight: weight[:0], "must come together"),
        ("weights", "mlp_inputs", lambda weight: weight[2:], "mlp_inputs_bias must have"),
        ("weights", "mlp_inputs", lambda weight: weight[:-1], "mlp_inputs must have shape"),
        ("weights", "norm", lambda weight: weight[1:], "norm must have shape"),
        ("weights", "radius_logit", lambda table: table[:-1], "phase must have shape"),
        ("weights", "radius_logit", lambda table: table.half(), "float32 or float64"),
        ("weights", "projection", lambda weight: weight[:, 1:], "projection must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            real(*changed(usual, kind, name, change).values())
