"""A convolution tap by tap is what its definition says, and torch's own is called where it must."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from qflux.models import convolution
from qflux.models.convolution import CausalConvolution, depthwise

F64 = torch.float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture
def by_taps(monkeypatch):
    """Of each call, whether it went tap by tap."""
    real, calls = convolution.is_plain_call, []

    def telling(*tensors):
        calls.append(real(*tensors))
        return calls[-1]

    monkeypatch.setattr(convolution, "is_plain_call", telling)
    return calls


def definition(whole, weight, bias):
    width = weight.shape[-1]
    rows = [
        (whole[:, at : at + width] * weight[:, 0].T).sum(1) + bias
        for at in range(whole.shape[1] - width + 1)
    ]
    return torch.stack(rows, 1)


def given(tokens, width, dtype=F64):
    """Three sequences of five channels, and a weight and a bias."""
    shapes = (3, width - 1 + tokens, 5), (5, 1, width), (5,)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_agree(inputs, pull):
    found, wanted = depthwise(*inputs), definition(*inputs)
    results = found, *torch.autograd.grad(found, inputs, pull)
    expected = wanted, *torch.autograd.grad(wanted, inputs, pull)
    for got, truth in zip(results, expected, strict=True):
        assert got.shape == truth.shape and got.dtype == truth.dtype
        assert (got - truth).abs().max() <= TOLERANCE[got.dtype] * (1 + truth.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (1, 4), (2, 3), (9, 4), (70, 2)])
def test_results_and_gradients(by_taps, dtype, tokens, width):
    assert_agree(given(tokens, width, dtype), torch.randn(3, tokens, 5, dtype=dtype))
    assert by_taps == [True]


def test_no_tokens():
    inputs = given(0, 4)
    found = depthwise(*inputs)
    assert found.shape == (3, 0, 5)
    found.sum().backward()
    assert not any(tensor.grad.any() for tensor in inputs)


def test_layouts(by_taps):
    whole, weight, bias = given(9, 4)
    by_token = whole.detach().transpose(0, 1).contiguous().transpose(0, 1)
    every = torch.randn(3, 12, 10, dtype=F64)[..., ::2]
    one = torch.randn(12, 5, dtype=F64).expand(3, 12, 5)
    for strided in (by_token, every, one):
        assert not strided.is_contiguous()
        inputs = strided.requires_grad_(), weight, bias
        assert_agree(inputs, torch.randn(3, 5, 9, dtype=F64).mT)
        assert_agree(inputs, torch.ones((), dtype=F64).expand(3, 9, 5))
    assert all(by_taps)


def test_gradients_by_finite_differences_twice(by_taps):
    inputs = given(3, 2)
    assert torch.autograd.gradcheck(depthwise, inputs)
    assert torch.autograd.gradgradcheck(depthwise, inputs)
    assert all(by_taps)


@pytest.mark.parametrize("again", [False, True])
def test_only_the_gradients_asked_for(by_taps, again):
    inputs, pull = given(9, 4), torch.randn(3, 9, 5, dtype=F64)
    every = torch.autograd.grad(depthwise(*inputs), inputs, pull)
    for n in range(3):
        alone = [tensor.detach().requires_grad_(n == k) for k, tensor in enumerate(inputs)]
        (grad,) = torch.autograd.grad(depthwise(*alone), alone[n], pull, create_graph=again)
        torch.testing.assert_close(grad, every[n])
        assert grad.requires_grad == (again and n < 2)
    with torch.no_grad():
        assert not depthwise(*inputs).requires_grad
    assert all(by_taps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_tame_stay_with_the_tokens_they_reach(by_taps, value):
    whole, weight, bias = (tensor.detach() for tensor in given(9, 3, torch.float32))
    whole[1, 4, 3] = value
    found, wanted = depthwise(whole, weight, bias), definition(whole, weight, bias)
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert found[:, :2].isfinite().all() and found[:, 5:].isfinite().all()
    assert by_taps == [True]


def test_where_torchs_own_is_called(by_taps):
    inputs = given(9, 4, torch.float32)
    whole, weight, bias = plain = [tensor.detach() for tensor in inputs]
    wanted = definition(*plain)
    for half in (torch.bfloat16, torch.float16):
        assert depthwise(*(tensor.to(half) for tensor in plain)).dtype == half
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise(*inputs).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="type"):
        depthwise(whole, weight.double(), bias)
    torch.func.grad(lambda w: depthwise(w, weight, bias).sum())(whole)
    torch.func.grad(lambda k: depthwise(whole, k, bias).sum())(weight)
    tangents = tuple(map(torch.ones_like, plain))
    found, _ = torch.func.jvp(depthwise, tuple(plain), tangents)
    torch.testing.assert_close(found, wanted)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(whole, tangents[0])
        found = forward_ad.unpack_dual(depthwise(dual, weight, bias))
    torch.testing.assert_close(found.tangent, definition(tangents[0], weight, torch.zeros(5)))
    mapped = torch.vmap(lambda w: depthwise(w[None], weight, bias)[0])(whole)
    torch.testing.assert_close(mapped, wanted)
    assert depthwise(*(tensor.to("meta") for tensor in plain)).shape == wanted.shape
    assert not any(by_taps)
    assert depthwise(whole, weight, None).shape == wanted.shape
    compiled = torch.compile(depthwise, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*plain), wanted)


def test_a_module_without_a_bias():
    module = CausalConvolution(5, 4).double()
    module.bias = None
    whole = torch.randn(3, 12, 5, dtype=F64)
    wanted = definition(nn.functional.pad(whole, (0, 0, 3, 0)), module.weight, 0.0)
    torch.testing.assert_close(module(whole), wanted)
