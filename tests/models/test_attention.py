"""The attention of a layer by one op is what its modules make of the same projections."""

import copy
import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from qflux import QuantumFluxConfig, make_model
from qflux.models import layers
from qflux.models.layers import GeometricAttention
from qflux_kernels import attention, functional, schema

OPS = torch.ops.qflux_kernels
F64 = torch.float64
BASE = {"vocab_size": 11, "num_layers": 2, "hidden_dim": 20, "num_cylinders": 3, "value_dim": 4}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
OWN = "projected", "shared", "scaled"
CALLED = ("projected", "own", "angle", "scale", "norm_weight", "norm_bias")


@pytest.fixture
def served(monkeypatch):
    """The calls that went by the op."""
    real, calls = layers.attend, []

    def counting(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(layers, "attend", counting)
    return calls


def by_modules(call):
    """What `call` gives when no attention goes by the op."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "serves", lambda *_: False)
        return call()


def build(dtype=F64, **changes):
    model = make_model(QuantumFluxConfig(**BASE | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_attention(cylinders=3, value_dim=4, own="projected", dtype=F64, norm=None):
    config = QuantumFluxConfig(
        **BASE | {"num_cylinders": cylinders, "value_dim": value_dim, "own_value": own}
    )
    module = GeometricAttention(config).to(dtype)
    if norm is not None:
        module.norm = nn.LayerNorm(cylinders * value_dim, **norm).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module.inputs = module.output = nn.Identity()  # both are for the caller
    module.conv = nn.Identity()
    return module


def given(module, batch, tokens, spread=1.0):
    dtype = module.norm.weight.dtype if module.norm.weight is not None else F64
    projected = spread * torch.randn(batch, tokens, sum(module.widths), dtype=dtype)
    angle = 3 * torch.randn(module.cylinders, tokens, dtype=dtype)
    return projected.requires_grad_(), angle.requires_grad_()


def results(module, projected, angle, pull):
    """The output, and the gradients of all that has one."""
    leaves = [projected, angle, *module.parameters()]
    out, _ = module(projected, None, angle)
    return [out, *torch.autograd.grad(out, leaves, pull)]


def assert_agree(module, projected, angle, served, pull=None):
    if pull is None:
        pull = torch.randn(*projected.shape[:2], module.widths[1], dtype=projected.dtype)
    found = results(module, projected, angle, pull)
    assert len(served) == 1
    wanted = by_modules(lambda: results(module, projected, angle, pull))
    assert len(served) == 1
    tolerance = TOLERANCE[projected.dtype]
    for got, truth in zip(found, wanted, strict=True):
        bound = tolerance * (1 + truth.abs().max())
        assert got.shape == truth.shape and ((got - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 64, 129])
def test_results_and_gradients(served, dtype, own, tokens):
    module = make_attention(own=own, dtype=dtype)
    assert_agree(module, *given(module, 2, tokens), served)


# At the edges of vectors of 2, 4, 8 and 16 numbers, and of chunks of 64 rows.
@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize(
    ("cylinders", "value_dim"), [(1, 1), (1, 2), (1, 3), (5, 1), (8, 1), (3, 3), (4, 4), (33, 2)]
)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 63), (1, 64), (2, 65), (5, 130)])
def test_shapes(served, own, cylinders, value_dim, batch, tokens):
    module = make_attention(cylinders, value_dim, own)
    assert_agree(module, *given(module, batch, tokens), served)


@pytest.mark.parametrize("norm", [{"elementwise_affine": False}, {"bias": False}, {"eps": 0.5}])
def test_layer_norm_without_parameters(served, norm):
    module = make_attention(norm=norm)
    assert_agree(module, *given(module, 2, 20), served)


def test_layouts(served):
    module = make_attention()
    projected, angle = given(module, 3, 20)
    pull = torch.randn(3, 20, 12, dtype=F64)
    strided = projected.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    turned = angle.detach().T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous() and not turned.is_contiguous()
    assert_agree(module, strided, turned, served, pull.mT.contiguous().mT)
    served.clear()
    assert_agree(module, projected, angle, served, torch.ones((), dtype=F64).expand(3, 20, 12))


@pytest.mark.parametrize("own", OWN)
def test_gradients_by_finite_differences(own):
    module = make_attention(2, 2, own)
    projected, angle = given(module, 2, 5)
    scale = torch.tensor([0.3, 0.8], dtype=F64, requires_grad=True)
    norm = [torch.randn(4, dtype=F64, requires_grad=True) for _ in range(2)]

    apart = torch.randn(2, 5, 4, dtype=F64, requires_grad=True) if own == "scaled" else None

    def call(*tensors):
        return attention.attend(*tensors, 1e-5, 2)

    assert torch.autograd.gradcheck(call, (projected, apart, angle, scale, *norm))


def test_only_the_gradients_asked_for():
    module = make_attention(own="scaled")
    projected, angle = (tensor.detach() for tensor in given(module, 2, 20))
    own, scale = torch.randn(2, 20, 12, dtype=F64), torch.rand(3, dtype=F64)
    leaves = [projected, own, angle, scale, *torch.randn(2, 12, dtype=F64)]

    def gradients(wanted):
        tensors = [t.clone().requires_grad_(n in wanted) for n, t in enumerate(leaves)]
        attention.attend(*tensors, 1e-5, 4).square().sum().backward()
        return [t.grad for t in tensors]

    every = gradients(range(6))
    for n, name in enumerate(CALLED):
        alone = gradients((n,))
        assert torch.equal(alone[n], every[n]), name
        assert sum(grad is not None for grad in alone) == 1
    with torch.no_grad():
        assert not attention.attend(*leaves, 1e-5, 4).requires_grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gates(dtype):
    """silu and its derivative wherever a gate may stand, through a LayerNorm that gives one."""
    far = torch.logspace(-30, 30, 601, dtype=dtype)
    near = torch.linspace(-120, 120, 4801, dtype=dtype)
    ends = torch.tensor([0.0, -0.0, 700.0, -700.0, 709.0, 1e38, -1e38], dtype=dtype)
    gates = torch.cat((near, far, -far, ends))
    projected = torch.zeros(1, len(gates), 4 + 3, dtype=dtype)
    projected[0, :, 5] = gates
    projected.requires_grad_()
    ones = torch.ones(1, dtype=dtype)
    angle = torch.zeros(1, len(gates), dtype=dtype)
    out = attention.attend(projected, None, angle, ones, ones, ones, 1e-5, 1)
    out.sum().backward()
    wide = gates.double().requires_grad_()
    wanted = nn.functional.silu(wide)
    wanted.sum().backward()
    unit = torch.finfo(dtype).eps
    assert ((out[0, :, 0].double() - wanted).abs() <= 8 * unit * wanted.abs() + 1e-30).all()
    grad = projected.grad[0, :, 5].double()
    # x sigmoid (1 - sigmoid) is as exact as the distance of sigmoid from one.
    assert ((grad - wide.grad).abs() <= 4 * unit * (1 + wanted.abs().clamp(max=120))).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("column", [0, 6, 12, 24, 36])  # query, key, value, gate, own value
def test_numbers_that_are_not_tame_stay_with_the_tokens_they_reach(served, column, value):
    module = make_attention(dtype=torch.float32)
    projected, angle = given(module, 2, 20)
    with torch.no_grad():
        projected[1, 9, column] = value
    found, wanted = (
        call() for call in (lambda: module(projected, None, angle)[0],
                            lambda: by_modules(lambda: module(projected, None, angle)[0]))
    )  # fmt: skip
    assert len(served) == 1
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert found[0].isfinite().all() and found[1, :9].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_nothing(shape):
    module = make_attention()
    projected, angle = given(module, *shape)
    out, _ = module(projected, None, angle)
    out.sum().backward()
    assert out.shape == (*shape, 12) and projected.grad.shape == projected.shape
    assert not angle.grad.any() and not module.norm.weight.grad.any()


def test_results_are_the_same_on_any_number_of_threads():
    module = make_attention(dtype=torch.float32)
    projected, angle = given(module, 9, 130)
    pull = torch.randn(9, 130, 12)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(results(module, projected, angle, pull))
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.pairwise(found):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("own", ["projected", "scaled"])
def test_opcheck(norm, own):
    module = make_attention(own=own, dtype=torch.float32)
    projected, angle = (t.detach() for t in given(module, 2, 5))
    turns = torch.stack((angle.cos(), angle.sin()), -1)
    weights = (torch.randn(12), torch.randn(12)) if norm else (None, None)
    apart = torch.randn(2, 5, 12) if own == "scaled" else None
    call = (projected, apart, turns, torch.rand(3), *weights, 1e-5, 4, 0)
    torch.library.opcheck(OPS.attention.default, call)
    _, *left = OPS.attention(*call)
    torch.library.opcheck(OPS.attention_backward.default, (torch.randn(2, 5, 12), *call, *left))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"projected": torch.zeros(2, 5, 35)}, "36 columns, or without own values apart 48"),
        ({"own": torch.zeros(2, 5, 12)}, "must have 36 columns"),
        ({"own": torch.zeros(2, 5, 11), "projected": torch.zeros(2, 5, 36)}, "own must have shape"),
        ({"projected": torch.zeros(5, 48)}, r"projected must have shape \(\*, \*, \*\)"),
        ({"projected": torch.zeros(2, 5, 48, dtype=torch.bfloat16)}, "float32 or float64"),
        ({"turns": torch.zeros(3, 4, 2)}, r"turns must have shape \(3, 5, 2\)"),
        ({"scale": torch.zeros(3, dtype=F64)}, "scale must be of the dtype"),
        ({"scale": torch.zeros(2)}, "turns must have shape"),
        ({"norm_weight": torch.zeros(11)}, "norm_weight must have shape"),
        ({"value_dim": 0}, "there must be cylinders and values"),
        ({"algorithm": 3}, "algorithm must be 0 to 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_the_op_checks_what_it_is_given(changed, said):
    arguments = {
        "projected": torch.zeros(2, 5, 48), "own": None, "turns": torch.zeros(3, 5, 2),
        "scale": torch.ones(3), "norm_weight": None, "norm_bias": None, "norm_eps": 1e-5,
        "value_dim": 4, "algorithm": 0,
    }  # fmt: skip
    assert list(arguments) == list(schema.ATTENTION.names)
    OPS.attention(**arguments)
    with pytest.raises(RuntimeError, match=said):
        OPS.attention(**arguments | changed)


@pytest.mark.parametrize("own_value", OWN)
def test_training_goes_by_the_op(served, own_value):
    model, ids = build(own_value=own_value), torch.randint(11, (2, 30))

    def gradients():
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return output.logits.detach(), [p.grad.clone() for p in model.parameters()]

    logits, grads = gradients()
    assert len(served) == 2
    wanted, wanted_grads = by_modules(gradients)
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    for grad, truth in zip(grads, wanted_grads, strict=True):
        assert (grad - truth).abs().max() <= 1e-9 * (1 + truth.abs().max())


class Doubled(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class Otherwise(GeometricAttention):
    def gather(self, *arguments):
        mean, parts = super().gather(*arguments)
        return 2 * mean, parts


def _hook(model):
    model.layers[0].attention.norm.register_forward_hook(lambda module, given, out: 2 * out)


def _norm(model):
    model.layers[0].attention.norm.__class__ = Doubled


def _forward(model):
    norm = model.layers[0].attention.norm
    norm.forward = lambda x: 2 * nn.LayerNorm.forward(norm, x)


def _class(model):
    model.layers[0].attention.__class__ = Otherwise


def _score(model):
    score = model.layers[0].attention.score
    score.register_forward_hook(lambda module, given, out: replace(out, scale=2 * out.scale))


@pytest.mark.parametrize("change", [_hook, _norm, _forward, _class, _score])
def test_changed_modules_are_called(served, change):
    model = build().eval()
    change(model)
    ids = torch.randint(11, (2, 9))
    plain = copy.deepcopy(model)
    found = model(ids).logits
    assert len(served) == 1  # of the layer that is as it was
    torch.testing.assert_close(found, by_modules(lambda: plain(ids).logits))


@pytest.mark.parametrize(
    "changes", [{"score": "threshold"}, {"backend": "reference"}, {"evolution": True}], ids=str
)
def test_other_models_go_by_modules(served, changes):
    model = build(**changes)
    model(torch.randint(11, (2, 9)))
    assert not served


def test_what_has_to_see_the_pairs_does(served):
    model, ids = build(torch.float32), torch.randint(11, (2, 9))
    model(ids, return_layers=True)
    model.prefill(ids, model.new_cache(2))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    parameters = dict(model.named_parameters())
    wanted = by_modules(lambda: model(ids).logits)

    def logits(parameters):
        return torch.func.functional_call(model, parameters, (ids,)).logits

    tangents = {name: torch.zeros_like(p) for name, p in parameters.items()}
    plain = {name: p.detach() for name, p in parameters.items()}
    with pytest.raises(RuntimeError):  # as `interact` says
        torch.func.jvp(logits, (plain,), (tangents,))
    torch.func.grad(lambda p: logits(p).sum())(plain)

    class Server:
        def interact(self, *arguments, **options):
            return functional.interact_checked(
                functional.interact_arguments(
                    *arguments, lengths=None, reduction="sum",
                    causal=True, score=options["score"],
                ),
                "auto", "auto",
            )  # fmt: skip

    with functional.served_by(Server()):
        torch.testing.assert_close(model(ids).logits, wanted)
    assert not served
    model(ids)
    assert len(served) == 2


def test_second_derivatives_are_refused():
    module = make_attention()
    projected, angle = given(module, 1, 5)
    out, _ = module(projected, None, angle)
    (grad,) = torch.autograd.grad(out.square().sum(), projected, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


def test_the_op_is_counted_as_the_pairs_it_meets():
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = build(torch.float32), torch.randint(11, (2, 9))

    def count():
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids).loss.backward()
        return counter.get_total_flops()

    assert count() == by_modules(count)


def test_positional_names():
    assert tuple(inspect.signature(attention.attend).parameters)[:6] == CALLED


def test_a_vocabulary_smaller_than_the_text_is_projected_before_it_is_looked_up(monkeypatch):
    model = build()
    many = torch.randint(11, (2, 30))
    shapes = []
    model.projection.forward = lambda x: (
        shapes.append(x.shape) or nn.Linear.forward(model.projection, x)
    )
    model(many)  # of a module that is not plain
    del model.projection.forward
    assert shapes == [(2, 30, 6)]
    wanted = model(many, return_layers=True)
    looked_up = []
    real = layers.EvolutionLayer.forward
    monkeypatch.setattr(
        layers.EvolutionLayer, "forward",
        lambda self, states, *rest: looked_up.append(states) or real(self, states, *rest),
    )  # fmt: skip
    found = model(many)
    assert looked_up == [None, None]
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(output.logits.square().sum(), list(model.embedding.parameters()))
        for output in (found, wanted)
    ]
    for got, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)
    layer = model.layers[0]
    with pytest.raises(ValueError, match="states must be given"):
        layer(None, torch.zeros(1, 3, 20, dtype=F64), torch.zeros(3, 3, dtype=F64), True)
