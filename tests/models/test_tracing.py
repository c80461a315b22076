"""Models under the transforms and tracers of PyTorch, and with other modules in their places."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qflux import make_config, make_model

SMALL = {"num_layers": 1, "hidden_dim": 12}
MODELS = {
    "lm": ("lm", {**SMALL, "num_cylinders": 3, "value_dim": 4, "evolution": True}),
    "threshold": ("lm", {**SMALL, "num_cylinders": 3, "value_dim": 4, "score": "threshold"}),
    "flux": ("flux", {**SMALL, "num_cylinders": 2, "context_length": 32}),
    "qfnn": ("qfnn", {**SMALL, "radius_bounds": "context"}),
}
IDS = torch.arange(2 * 9).view(2, 9) % 11


def build(name, **changes):
    preset, options = MODELS[name]
    torch.manual_seed(0)
    return make_model(make_config(preset, 11, **{**options, **changes})).eval()


@pytest.mark.parametrize("name", MODELS)
def test_mapped_over_sequences(name):
    model = build(name)
    got = torch.func.vmap(lambda ids: model(ids[None]).logits[0])(IDS)
    torch.testing.assert_close(got, model(IDS).logits)


@pytest.mark.parametrize("name", MODELS)
def test_without_numbers(name):
    with FakeTensorMode():
        logits = build(name)(torch.zeros(2, 9, dtype=torch.int64)).logits
    assert logits.shape == (2, 9, 11)


@pytest.mark.parametrize("name", ["lm", "flux"])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_traced(name, mode):
    model = build(name)
    traced = make_fx(lambda ids: model(ids).logits, tracing_mode=mode, _allow_non_fake_inputs=True)(
        IDS
    )
    ids = torch.arange(3 * 14).view(3, 14) % 11 if mode == "symbolic" else IDS
    torch.testing.assert_close(traced(ids), model(ids).logits)


@pytest.mark.parametrize("name", ["lm", "flux"])
def test_exported_with_any_batch_and_length_and_saved(name):
    """A batch may be of as many sequences as there are cylinders."""
    model, file = build(name), io.BytesIO()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=32)}
    program = torch.export.export(model, (IDS,), dynamic_shapes={"input_ids": sizes})
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((3, 14), (1, 9), (5, 30)):
        ids = torch.arange(shape[0] * shape[1]).view(shape) % 11
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def linear_parts(model):
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm))
    ]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", MODELS)
def test_every_module_is_called_that_something_hangs_on(name):
    model = build(name)
    seen = []

    def note(what):
        return lambda *_: seen.append(what)

    def patched(original):
        return lambda *given: seen.append("patched") or original(*given)

    for place, module in linear_parts(model):
        # The hooks go one by one, so that each is alone once.
        hooks = [
            module.register_forward_pre_hook(note("before")),
            module.register_forward_hook(note("after")),
            module.register_full_backward_pre_hook(note("backward, before")),
            module.register_full_backward_hook(note("backward")),
        ]
        for hook in list(hooks):
            seen.clear()
            model(IDS).logits.sum().backward()
            assert len(set(seen)) == len(hooks), (place, seen)
            hook.remove()
            hooks.remove(hook)
        module.forward = patched(module.forward)
        model(IDS)
        assert "patched" in seen, place
        del module.forward
    kinds = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: kinds.append(type(m)))
    model(IDS)
    handle.remove()
    assert nn.LayerNorm in kinds or not any(isinstance(m, nn.LayerNorm) for m in model.modules())


class Doubled(torch.Tensor):
    """Numbers with a scale of their own, as quantised weights are."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half):
        self.half_of_it = half

    def __tensor_flatten__(self):
        return ["half_of_it"], None

    @staticmethod
    def __tensor_unflatten__(inner, _context, _size, _stride):
        return Doubled(inner["half_of_it"])

    @classmethod
    def __torch_dispatch__(cls, function, types, given=(), options=None):
        if function is torch.ops.aten.detach.default:
            return Doubled(given[0].half_of_it.detach())
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: 2 * t.half_of_it, given)
        return function(*plain, **(options or {}))


def test_what_takes_the_place_of_a_part_is_used():
    """Adapters, quantised layers, tensors with more than numbers: what a fused call would skip."""
    model = build("flux")
    wanted = model(IDS).logits

    def changed(change):
        other = copy.deepcopy(model)
        change(other.readouts[0])
        return other(IDS).logits

    def identity(part):
        part.norm = nn.Identity()

    assert not torch.allclose(changed(identity), wanted)

    def rms(part):
        part.norm = nn.RMSNorm(12)

    assert changed(rms).shape == wanted.shape

    def doubled(part):
        half = Doubled(part.projection.weight.detach() / 2)
        part.projection.weight = nn.Parameter(half, requires_grad=False)

    torch.testing.assert_close(changed(doubled), wanted)

    def normed(part):
        torch.nn.utils.parametrizations.weight_norm(part.projection)
        part.projection.parametrizations.weight.original0.data *= 3

    assert not torch.allclose(changed(normed), wanted, atol=1e-4)

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x).abs()

    def adapted(part):
        part.projection.__class__ = Adapted

    assert not torch.allclose(changed(adapted), wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["lm", "flux", "qfnn"])
def test_the_reference_differentiates_a_model_twice(name):
    model = build(name, backend="reference").double()
    used = [p for p in model.parameters() if p.requires_grad]

    def gradient_size():
        loss = model(IDS, labels=IDS).loss
        grads = torch.autograd.grad(loss, used, create_graph=True, allow_unused=True)
        return sum(g.square().sum() for g in grads if g is not None)

    twice = torch.autograd.grad(gradient_size(), model.head.weight)[0]
    step, direction = 1e-6, torch.randn_like(twice)
    with torch.no_grad():
        model.head.weight += step * direction
    above = gradient_size()
    with torch.no_grad():
        model.head.weight -= 2 * step * direction
    slope = (above - gradient_size()) / (2 * step)
    torch.testing.assert_close((twice * direction).sum(), slope, rtol=1e-5, atol=1e-7)
