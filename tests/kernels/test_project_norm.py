"""`project_norm` and its reference against LayerNorm of a linear map, as PyTorch has them."""

import math

import pytest
import torch
from inputs import layouts
from torch.nn.functional import layer_norm, linear

from qflux_kernels import project_norm, reference
from qflux_kernels.schema import MAX_FEATURES

F64 = torch.float64
NAMES = ("output", "features", "weight", "bias", "norm_weight", "norm_bias")


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


COUNTS = [1, 2, 3, 5, 8, 9]  # of features; 9 are not the kernels' any more


def results(function, tensors, pull):
    """The output and the gradients of all tensors that ask for one."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, pull)]


def test_what_the_kernels_serve(device):
    """So that no test below takes the reference for a kernel."""
    for count in COUNTS:
        features = torch.randn(3, count, device=device, requires_grad=True)
        weight = torch.randn(4, count, device=device)
        by_kernel = "_ProjectNorm" in features_graph(project_norm(features, weight))
        assert by_kernel == (count <= MAX_FEATURES)


def features_graph(output):
    """The names of the nodes behind an output."""
    names, nodes = [], [output.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(node.name().removesuffix("Backward"))
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return names


# At the edges of vectors, of groups of 4 tokens, of tiles of 32, 64 and 128, of chunks of 256.
@pytest.mark.parametrize("tokens", [1, 3, 4, 33, 127, 130, 256, 257, 700])
@pytest.mark.parametrize("width", [1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 257])
def test_results_and_gradients(device, tokens, width):
    # A few outputs agree for some token to many digits, which it then divides by.
    tolerance = 1e-9 if width <= 3 else 1e-12
    for count in COUNTS[::2] if tokens % 2 else COUNTS[1::2]:
        tensors = [
            t.to(device) for t in (torch.randn(tokens, count, dtype=F64), *parameters(width, count))
        ]
        pull = torch.randn(tokens, width, dtype=F64, device=device)
        for given in range(2, 6):
            got = results(project_norm, tensors[:given], pull)
            wanted = results(plain, tensors[:given], pull)
            closed = results(reference.project_norm, tensors[:given], pull)
            for a, b, c in zip(got, wanted, closed, strict=True):
                bound = tolerance * (b.abs().max() + 1)
                assert (a - b).abs().max() <= bound and (c - b).abs().max() <= bound


def test_gradients_by_finite_differences(device):
    features = torch.randn(7, 2, dtype=F64, device=device, requires_grad=True)
    tensors = [t.to(device).detach().requires_grad_() for t in parameters(6, 2)]
    assert torch.autograd.gradcheck(project_norm, (features, *tensors))
    assert torch.autograd.gradgradcheck(reference.project_norm, (features, *tensors))


@pytest.mark.parametrize("eps", [1e-12, 0.5, 3])
def test_eps(device, eps):
    tensors = [t.to(device) for t in (torch.randn(30, 2, dtype=F64), *parameters(20, 2))]
    pull = torch.randn(30, 20, dtype=F64, device=device)
    got = results(lambda *tensors: project_norm(*tensors, eps=eps), tensors, pull)
    wanted = results(lambda *tensors: plain(*tensors, eps=eps), tensors, pull)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2, 4)], ids=str)
def test_only_the_gradients_asked_for(device, wanted):
    tensors = [t.to(device) for t in (torch.randn(300, 2, dtype=F64), *parameters(20, 2))]
    pull = torch.randn(300, 20, dtype=F64, device=device)
    every = results(project_norm, tensors, pull)[1:]
    leaves = [t.clone().requires_grad_(n in wanted) for n, t in enumerate(tensors)]
    project_norm(*leaves).backward(pull)
    for n, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, every[n]) if n in wanted else leaf.grad is None


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_float32_is_as_good_as_layer_norm_in_float32(device, offset):
    """An error budget in the maximum: twice that of PyTorch's own, and a rounding floor.

    A bias far from zero almost cancels in the variance.
    """
    for count, width, tokens in [(2, 128, 5000), (5, 33, 700), (8, 64, 300)]:
        tensors = [torch.randn(tokens, count), *parameters(width, count, torch.float32)]
        tensors[2] += offset
        tensors = [t.to(device) for t in tensors]
        pull = torch.randn(tokens, width, device=device)
        truth = results(plain, [t.double() for t in tensors], pull.double())
        own = results(plain, tensors, pull)
        got = results(project_norm, tensors, pull)
        for name, a, b, c in zip(NAMES, got, own, truth, strict=True):
            error, budget = ((x.double() - c).abs().max() for x in (a, b))
            budget = 2 * budget + 1e-6 * c.abs().max()
            assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


def test_long_sums_do_not_lose_digits(device):
    """Each gradient of a parameter sums 300,000 like terms: in float32 that would cost digits."""
    tensors = [t.to(device) for t in (torch.randn(300_000, 2), *parameters(4, 2, torch.float32))]
    pull = torch.rand(300_000, 4, device=device)
    truth = results(plain, [t.double() for t in tensors], pull.double())
    got = results(project_norm, tensors, pull)
    for name, a, b in zip(NAMES[2:], got[2:], truth[2:], strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max(), name


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_bitwise_repeatable(device, dtype):
    tensors = [t.to(device) for t in (torch.randn(5000, 2, dtype=dtype), *parameters(70, 2, dtype))]
    pull = torch.randn(5000, 70, dtype=dtype, device=device)
    first = results(project_norm, tensors, pull)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        again = results(project_norm, tensors, pull)
        assert all(map(torch.equal, again, first)), f"{threads} threads"


@pytest.mark.usefixtures("poisoned_memory")
def test_layouts(device):
    tensors = [t.to(device) for t in (torch.randn(3, 37, 2), *parameters(19, 2, torch.float32))]
    pull = torch.randn(3, 37, 19, device=device)
    wanted = results(project_norm, tensors, pull)
    for view in layouts(tensors[0]).values():
        assert torch.equal(project_norm(view, *tensors[1:]), wanted[0])
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = project_norm(*leaves)
    for view in layouts(pull).values():
        grads = torch.autograd.grad(output, leaves, view, retain_graph=True)
        assert all(map(torch.equal, grads, wanted[1:]))
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    strided[1] = tensors[1].mT.contiguous().mT
    assert all(map(torch.equal, results(project_norm, strided, pull), wanted))
    summed = torch.autograd.grad(output.sum(), leaves)
    ones = results(project_norm, tensors, torch.ones_like(pull))[1:]
    assert all(map(torch.equal, summed, ones))


def test_a_token_stands_alone(device):
    """Its output does not depend on the others, and what is not finite stays with it."""
    tensors = [t.to(device) for t in (torch.randn(50, 2), *parameters(19, 2, torch.float32))]
    whole = project_norm(*tensors)
    for first, last in [(0, 1), (3, 10), (49, 50)]:
        assert torch.equal(project_norm(tensors[0][first:last], *tensors[1:]), whole[first:last])
    for value in (math.nan, math.inf):
        spoilt = tensors[0].clone()
        spoilt[20, 1] = value
        result = project_norm(spoilt, *tensors[1:])
        assert result[20].isnan().all()
        assert torch.equal(result[:20], whole[:20]) and torch.equal(result[21:], whole[21:])


def test_empty(device):
    tensors = [t.to(device) for t in parameters(6, 2, torch.float32)]
    for shape in [(0, 2), (3, 0, 2), (0, 5, 2)]:
        got = results(
            project_norm,
            [torch.randn(shape, device=device), *tensors],
            torch.empty(*shape[:-1], 6, device=device),
        )
        assert got[0].shape == (*shape[:-1], 6)
        assert not any(grad.any() for grad in got[1:])
    no_features = project_norm(torch.randn(3, 0, device=device), tensors[0][:, :0], tensors[1])
    assert no_features.shape == (3, 6)


def test_second_derivatives_are_refused(device):
    features = torch.randn(3, 2, device=device, requires_grad=True)
    weight = torch.randn(4, 2, device=device)
    output = project_norm(features, weight)
    (grad,) = torch.autograd.grad(output.pow(2).sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"reference\.project_norm"):
        grad.sum().backward()


OPS = torch.ops.qflux_kernels


@pytest.mark.parametrize("tokens", [0, 9])
@pytest.mark.parametrize("wanted", [(), (0,), (1, 2, 3, 4), (0, 1)], ids=str)
@pytest.mark.parametrize("given", range(2, 6))
def test_opcheck(device, given, wanted, tokens):
    tensors = [torch.randn(tokens, 3), *parameters(5, 3, torch.float32)]
    tensors = [t.to(device).requires_grad_(n in wanted) for n, t in enumerate(tensors)]
    tensors = [*tensors[:given], *(None,) * (5 - given)]
    torch.library.opcheck(OPS.project_norm.default, (*tensors, 1e-5))
    grad = torch.randn(tokens, 5, device=device)
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(OPS.project_norm_backward.default, (grad, *tensors[:4], 1e-5, *needs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device, backend):
    torch._dynamo.reset()
    tensors = [t.to(device) for t in (torch.randn(2, 9, 2), *parameters(5, 2, torch.float32))]
    pull = torch.randn(2, 9, 5, device=device)
    compiled = torch.compile(project_norm, fullgraph=True, backend=backend, dynamic=True)
    wanted = results(project_norm, tensors, pull)
    for a, b in zip(results(compiled, tensors, pull), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (12, 33):
            longer = [torch.randn(2, length, 2, device=device), *tensors[1:]]
            pull = torch.randn(2, length, 5, device=device)
            got, wanted = results(compiled, longer, pull), results(project_norm, longer, pull)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_vmap(device):
    features = torch.randn(4, 7, 2, device=device)
    stacked = [torch.stack([t] * 4).to(device) for t in parameters(5, 2, torch.float32)]
    stacked = [t + 0.1 * torch.randn_like(t) for t in stacked]
    single = [t[0] for t in stacked]

    def loss(*tensors):
        return project_norm(*tensors).cos().sum()

    grads = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))
    of_features = torch.func.grad(loss)
    for function in (project_norm, grads, of_features):
        for tensors in ([features, *stacked], [features, *single], [features[0], *stacked]):
            dims = tuple(
                0 if t.dim() == (3 if n < 2 else 2) else None for n, t in enumerate(tensors)
            )
            got = torch.func.vmap(function, in_dims=dims)(*tensors)
            each = [
                function(*(t if d is None else t[n] for t, d in zip(tensors, dims, strict=True)))
                for n in range(4)
            ]
            if isinstance(got, torch.Tensor):
                got, each = [got], [[one] for one in each]
            for result, *parts in zip(got, *each, strict=True):
                torch.testing.assert_close(result, torch.stack(parts))


def test_autocast_changes_nothing(device):
    tensors = [t.to(device) for t in (torch.randn(9, 2), *parameters(5, 2, torch.float32))]
    with torch.autocast(device.type, torch.bfloat16):
        inside = project_norm(*tensors)
    assert inside.dtype == torch.float32 and torch.equal(inside, project_norm(*tensors))


def test_meta_tensors():
    for count in COUNTS:
        tensors = [torch.randn(3, 9, count), *parameters(5, count, torch.float32)]
        result = project_norm(*(t.to("meta") for t in tensors))
        assert result.shape == (3, 9, 5) and result.device.type == "meta"


def test_it_saves_its_arguments_only(device):
    tensors = [t.to(device) for t in (torch.randn(500, 2), *parameters(64, 2, torch.float32))]
    leaves = [t.requires_grad_() for t in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        project_norm(*leaves)
    assert 0 < sum(kept) <= sum(t.numel() for t in leaves)


def test_bad_tensors_of_the_ops_are_refused(device):
    good = [t.to(device) for t in (torch.randn(3, 2), *parameters(4, 2, torch.float32))]
    bad = {
        0: torch.randn(3, 2, 2),
        1: torch.randn(4, 3),
        2: torch.randn(5),
        3: torch.randn(4, 1),
        4: torch.randn(4).double(),
    }
    for n, tensor in bad.items():
        with pytest.raises(RuntimeError, match="qflux_kernels"):
            OPS.project_norm(*good[:n], tensor.to(device), *good[n + 1 :], 1e-5)
    with pytest.raises(RuntimeError, match="at most 8 features"):
        OPS.project_norm(
            torch.randn(3, 9).to(device), torch.randn(4, 9).to(device), None, None, None, 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_lose_only_rounding(device, dtype):
    features, (weight, bias, *norm) = torch.randn(50, 4), parameters(64, 4, torch.float32)
    given = [t.to(device, dtype) for t in (features, weight, bias, *norm)]
    result = project_norm(*given)
    truth = plain(*(t.double() for t in given))
    assert result.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


def test_a_variance_that_rounding_makes_negative(device):
    """Two outputs that differ by nothing but rounding, from features of any size."""
    weight = torch.randn(2, 2, dtype=F64, device=device)
    x, y = weight[0] - weight[1]
    sizes = torch.linspace(1e6, 1e8, 200, dtype=F64, device=device)
    features = torch.stack((y, -x)) * sizes[:, None]
    for function in (project_norm, reference.project_norm):
        assert function(features, weight, eps=1e-12).isfinite().all()


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
