"""The collapsed head of the published models against their modules."""

import copy
import pickle

import pytest
import torch

from qflux import make_config, make_model
from qflux.models import published

IDS = torch.arange(2 * 40).view(2, 40) % 19
VARIANTS = {
    "flux": ("flux", {}),
    "flux, last": ("flux", {"readout": "last", "num_cylinders": 3}),
    "qfnn": ("qfnn", {"num_cylinders": 2}),
    "qfnn, layers": ("qfnn", {"readout": "layers"}),
}


def build(name="flux", **changes):
    preset, options = VARIANTS[name]
    options = {"num_layers": 2, "hidden_dim": 32, "context_length": 64, **options, **changes}
    torch.manual_seed(0)
    model = make_model(make_config(preset, 19, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def made(monkeypatch):
    """The collapsed heads that are made meanwhile."""
    heads, make = [], published.CollapsedHead

    def noted(*given):
        heads.append(make(*given))
        return heads[-1]

    monkeypatch.setattr(published, "CollapsedHead", noted)
    monkeypatch.setattr(published, "FEW_WEIGHTS", 0)
    return heads


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_modules(name, made):
    model = build(name).double()
    plain = model(IDS).logits.detach()
    assert not made
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-12, atol=1e-12)
    assert len(made) == 1
    assert not any("collapsed" in key for key in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_its_rounding_is_that_of_the_modules(name, dtype, made):
    """Also where LayerNorm reads a small difference of large numbers."""
    model = build(name)
    with torch.no_grad():
        for readout in model.readouts if model.config.readout_norm else ():
            linear = readout.projection
            linear.bias.copy_(-linear.weight @ torch.full((linear.in_features,), 0.99))
        model = model.to(dtype)
        exact = copy.deepcopy(model).double()
        shape = (2, model.config.num_cylinders, 40, 2)
        outputs = tuple((1 + 0.02 * torch.randn(shape)).to(dtype) for _ in model.readouts)
        wanted = exact.head(exact.features_of(tuple(output.double() for output in outputs)))
        errors = [
            (logits.double() - wanted).square().mean().sqrt()
            for logits in (model.logits_of(outputs), model.head(model.features_of(outputs)))
        ]
    assert len(made) == 1 and errors[0] <= 1.5 * errors[1]


def test_where_it_is_not_used(made):
    model = build()
    with torch.no_grad():
        few = model(IDS[:1, :8]).logits
        model.train()(IDS)
        model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(IDS)
        for module in (model.head, model.readouts[1], model.readouts[1].norm):
            handle = module.register_forward_hook(lambda *_: None)
            model(IDS)
            handle.remove()
        build(num_cylinders=8)(IDS)  # 34 columns for 32 features
        build(backend="reference")(IDS)
        torch.func.vmap(lambda ids: model(ids[None]).logits)(IDS)
        heads = torch.stack((model.head.weight, 2 * model.head.weight))
        both = torch.func.vmap(
            lambda weight: torch.func.functional_call(model, {"head.weight": weight}, IDS).logits
        )(heads)
        assert not made
        torch.testing.assert_close(model(IDS).logits, both[0])
        torch.testing.assert_close(model(IDS).logits[:1, :8], few)
    assert len(made) == 2


def steps(optimizer):
    def change(model):
        chosen = optimizer(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        chosen.step()

    return change


def larger(model):
    state = model.state_dict()
    return {name: 1.5 * value if "table" not in name else value for name, value in state.items()}


def loaded(model):
    model.load_state_dict(larger(model))


def assigned(model):
    model.load_state_dict(larger(model), assign=True)


def in_place(model):
    model.readouts[0].norm.weight.mul_(2)


def replaced_twice(model):
    """The second may be where the first was."""
    weight = model.head.weight
    weight.data = weight.data.clone()
    weight.data = 2 * weight.data


def other_module(model):
    model.head = torch.nn.Linear(32, 19, bias=False, dtype=torch.float64)


COUNTED = [
    steps(lambda parameters: torch.optim.AdamW(parameters, lr=0.1)),
    loaded,
    assigned,
    in_place,
    replaced_twice,
    other_module,
]
# What writes to weights and is not counted by PyTorch.
UNCOUNTED = [
    steps(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True)),
    lambda model: model.head.weight.data.mul_(2),
    lambda model: model.half().double(),
]


@torch.no_grad()
@pytest.mark.parametrize("change", [*COUNTED, *UNCOUNTED])
def test_it_is_never_of_other_weights(change, made):
    model = build().double()
    model(IDS)
    change(model)
    found = model(IDS).logits
    with torch.enable_grad():
        torch.testing.assert_close(found, model(IDS).logits.detach(), rtol=1e-12, atol=1e-12)
    assert len(made) == 2


@torch.no_grad()
@pytest.mark.parametrize("change", COUNTED)
def test_in_a_cache_it_follows_the_weights_that_are_counted(change, made):
    """Layers without parameters: the past is what it was."""
    model = build().double()
    cache = model.new_cache(2)
    model.prefill(IDS[:, :2], cache)
    assert not made  # who wants one token more has nothing of it
    model(IDS[:, 2:3], cache=cache)
    assert len(made) == 1 and cache.head is made[0]
    change(model)
    found = model(IDS[:, 3:4], cache=cache).logits[:, 0]
    with torch.enable_grad():
        wanted = model(IDS[:, :4]).logits[:, 3].detach()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert len(made) == 2


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_cache_are_apart(copied, made):
    model = build().double()
    cache = model.new_cache(2)
    model.prefill(IDS[:, :3], cache, chunk=1)
    assert cache.nbytes > cache.head.nbytes > 0
    twin, twin_cache = copied((model, cache))
    assert twin_cache.head is None
    twin.head.weight.mul_(2)
    for one, past in ((twin, twin_cache), (model, cache)):
        found = one(IDS[:, 3:4], cache=past).logits[:, 0]
        with torch.enable_grad():
            wanted = one(IDS[:, :4]).logits[:, 3].detach()
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
