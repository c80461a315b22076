"""`project_norm` against LayerNorm of a linear map, as PyTorch has them."""

import pytest
import torch
from torch.nn.functional import layer_norm, linear

from qflux_kernels import project_norm

F64 = torch.float64


def plain(features, weight, bias=None, norm_weight=None, norm_bias=None, eps=1e-5):
    return layer_norm(linear(features, weight, bias), weight.shape[:1], norm_weight, norm_bias, eps)


def parameters(width, count, dtype=F64, grad=False):
    shapes = ((width, count), (width,), (width,), (width,))
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


@pytest.mark.parametrize("shape", [(2,), (0, 2), (5, 2), (2, 3, 7), (4, 1)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 33, 256])
def test_equals_layer_norm_of_linear(device, shape, width):
    features = torch.randn(shape, dtype=F64).to(device)
    tensors = [t.to(device) for t in parameters(width, shape[-1])]
    for count in range(1, 5):
        torch.testing.assert_close(
            project_norm(features, *tensors[:count]),
            plain(features, *tensors[:count]),
            rtol=1e-9,
            atol=1e-9,
        )


def test_gradients_of_both_orders(device):
    features = torch.randn(3, 2, dtype=F64, device=device, requires_grad=True)
    tensors = [t.to(device).detach().requires_grad_() for t in parameters(6, 2)]
    assert torch.autograd.gradcheck(project_norm, (features, *tensors))
    assert torch.autograd.gradgradcheck(project_norm, (features, *tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_lose_only_rounding(device, dtype):
    features, (weight, bias, *norm) = torch.randn(50, 4), parameters(64, 4, torch.float32)
    given = [t.to(device, dtype) for t in (features, weight, bias, *norm)]
    result = project_norm(*given)
    truth = plain(*(t.double() for t in given))
    assert result.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


def test_equal_outputs_have_no_variance(device):
    weight = torch.ones(8, 2, device=device)
    assert not project_norm(torch.randn(5, 2, device=device), weight).any()


def test_bad_arguments_are_named():
    features, tensors = torch.randn(3, 2), parameters(4, 2, torch.float32)
    cases = [
        (TypeError, "features", (features.long(), *tensors)),
        (TypeError, "features", ([1.0, 2.0], *tensors)),
        (ValueError, "features", (torch.tensor(1.0), *tensors)),
        (ValueError, "weight", (features, torch.randn(4, 3))),
        (ValueError, "weight", (features, torch.randn(4))),
        (TypeError, "weight", (features, tensors[0].double())),
        (ValueError, "bias", (features, tensors[0], torch.randn(3))),
        (TypeError, "norm_weight", (features, *tensors[:2], 1.0)),
        (ValueError, "norm_bias", (features, *tensors[:3], torch.randn(4, device="meta"))),
        (ValueError, "eps", (features, *tensors, 0.0)),
        (TypeError, "eps", (features, *tensors, "1e-5")),
    ]
    for error, name, arguments in cases:
        with pytest.raises(error, match=name):
            project_norm(*arguments)
