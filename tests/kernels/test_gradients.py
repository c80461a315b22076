"""Gradients of the kernels against finite differences and the reference's autograd."""

import dataclasses
import itertools
import math

import pytest
import torch
from assertions import assert_no_missing_gradient, assert_relative, count_borderline
from inputs import REDUCED_SCORES, SCORES, layouts, mean_of
from torch.autograd import forward_ad

import qflux_kernels
from qflux_kernels import InverseGate, Radius, Sparsemax, Threshold, evolve, interact, reference

F64 = torch.float64
# With gates smooth enough that float32 gradients near S = 0 are not all rounding.
SMOOTH_SCORES = [
    Threshold(),
    Threshold(1.4, "row"),
    Threshold(0.4, shrinkage="soft"),
    InverseGate(-0.7, 0.05),
    InverseGate(0.5, 0.1, 1.5),
]
RADII = [None, Radius(), Radius(0.0, 1e9, 0.2, 0.3, 1.5), Radius(0.5, 0.9, -0.1)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def calm(score, *shapes, causal=True, dt=None, delta=1e-4, lengths=None):
    """Random points none of whose pairs, in either Heun stage, lies near its threshold."""
    for _ in range(200):
        points = [torch.randn(*shape, dtype=F64) for shape in shapes]
        options = {"causal": causal, "score": score, "lengths": lengths}
        near = count_borderline(*points[:2], delta=delta, **options)
        if not near and dt is not None:
            middle = points[0] + dt * reference.interact(points[0], **options).context
            near = count_borderline(middle, delta=delta, **options)
        if not near:
            return points
    raise AssertionError("no calm points found: fewer tokens or a smaller delta are needed")


def differentiable(score, eps):
    """The coefficient `(2,)` that has a gradient, and the score of one; or None twice.

    A soft threshold keeps its value, around which the points are calm; a gate, of `eps`, keeps
    every pair.
    """
    if isinstance(score, InverseGate):
        return torch.full((2,), 0.3, dtype=F64), lambda alpha: InverseGate(alpha, eps)
    if score.kind.limit_vjp:
        name = score.per_sequence[0]
        value = torch.full((2,), score.coefficient, dtype=F64)
        return value, lambda value: dataclasses.replace(score, **{name: value})
    return None, None


def pulled(outputs, inputs, weights):
    """Gradients of the weighted sum of the outputs."""
    return torch.autograd.grad(outputs, inputs, weights, allow_unused=True)


def leaves(device, dtype, *tensors):
    return [t.to(device=device, dtype=dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows, keys", [(6, 6), (5, 8), (8, 5)])
def test_gradcheck_interact(device, rows, keys, causal, score):
    states, sources = calm(score, (2, rows, 2), (2, keys, 2), causal=causal)
    values = torch.randn(2, keys, 3, dtype=F64)
    coefficient, score_of = differentiable(score, score.eps)

    def run(states, keys=None, values=None, coefficient=None):
        used = score if coefficient is None else score_of(coefficient)
        return interact(states, keys, values, causal=causal, score=used)[:2]

    full = leaves(device, F64, states, sources, values)
    torch.autograd.gradcheck(run, full)
    torch.autograd.gradcheck(run, full[:2])
    if coefficient is not None:
        torch.autograd.gradcheck(run, (*full, *leaves(device, F64, coefficient)))


@pytest.mark.parametrize("score, reduction", REDUCED_SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [4, 7]])
def test_gradcheck_states_alone(device, lengths, reduction, causal, score):
    lengths = None if lengths is None else torch.tensor(lengths)
    (states,) = calm(score, (2, 7, 2), causal=causal, lengths=lengths)
    options = {
        "causal": causal,
        "score": score,
        "reduction": reduction,
        "lengths": None if lengths is None else lengths.to(device),
    }
    (states,) = leaves(device, F64, states)
    torch.autograd.gradcheck(lambda x: interact(x, **options)[:2], (states,))
    values = torch.randn(2, 7, 1, dtype=F64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda x, v: interact(x, values=v, **options)[:2], (states, values))


@pytest.mark.parametrize("radius", RADII, ids=str)
@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [4, 6]])
def test_gradcheck_evolve(device, lengths, causal, score, radius):
    lengths = None if lengths is None else torch.tensor(lengths)
    (states,) = calm(score, (2, 6, 2), causal=causal, dt=0.1, lengths=lengths)
    dt, skip = torch.full((2, 2, 6), 0.1, dtype=F64), torch.rand(6, dtype=F64)
    coefficient, score_of = differentiable(score, 1e-2)

    def run(states, dt, skip, coefficient=None):
        return evolve(
            states,
            dt,
            skip=skip,
            score=score if coefficient is None else score_of(coefficient),
            causal=causal,
            radius=radius,
            steps=2,
            lengths=None if lengths is None else lengths.to(device),
        )[:2]

    tensors = leaves(device, F64, states, dt, skip)
    torch.autograd.gradcheck(run, tensors)
    if coefficient is not None:
        torch.autograd.gradcheck(run, (*tensors, *leaves(device, F64, coefficient)))


@pytest.mark.parametrize("score, reduction", REDUCED_SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "rows, keys, depth", [(1, 1, 2), (33, 33, 2), (300, 300, 3), (70, 190, 8), (190, 70, 1)]
)
def test_interact_equals_the_reference(device, rows, keys, depth, reduction, causal, score):
    states, sources = torch.randn(2, rows, 2, dtype=F64), torch.randn(2, keys, 2, dtype=F64)
    values = torch.randn(2, keys, depth, dtype=F64)
    weights = torch.randn(2, rows, depth, dtype=F64), torch.randn(2, rows, dtype=F64)
    options = {"causal": causal, "score": score, "reduction": reduction}
    lengths = torch.tensor([rows, rows // 2])
    cases = [((states, sources, values), {}), ((states, sources), {}), ((states,), {})]
    if rows == keys:
        cases.append(((states, sources, values), {"lengths": lengths}))
        cases.append(((states,), {"lengths": lengths}))
    for tensors, more in cases:
        width = tensors[-1].shape[-1]
        pull = (weights[0][..., :1].expand(2, rows, width), weights[1])
        truth = leaves("cpu", F64, *tensors)
        wanted = pulled(reference.interact(*truth, **options, **more)[:2], truth, pull)
        more = {name: option.to(device) for name, option in more.items()}
        kernel = leaves(device, F64, *tensors)
        pull = [t.to(device) for t in pull]
        got = pulled(interact(*kernel, **options, **more)[:2], kernel, pull)
        # Of a row that keeps one key, nothing is left of a mass's gradient.
        floor = 1.0 if score.kind.mass else 0.0
        for name, a, b in zip(("states", "keys", "values"), got, wanted, strict=False):
            assert_relative(f"gradient of {name}", a, b, 1e-9, floor)
            assert_no_missing_gradient(f"gradient of {name}", a.cpu(), b)


@pytest.mark.parametrize("radius", RADII, ids=str)
@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_evolve_equals_the_reference(device, causal, score, radius):
    for length, steps in [(1, 1), (17, 3), (300, 1)]:
        states = torch.randn(2, length, 2, dtype=F64)
        dt = 0.1 * torch.rand(steps, 2, length, dtype=F64)
        skip = torch.rand(2, length, dtype=F64)
        weights = torch.randn(2, length, 2, dtype=F64), torch.randn(2, length, dtype=F64)
        options = {
            "causal": causal,
            "score": score,
            "radius": radius,
            "steps": steps,
            "reduction": mean_of(score),
        }
        truth = leaves("cpu", F64, states, dt, skip)
        result = reference.evolve(*truth[:2], skip=truth[2], **options)
        wanted = pulled(result[:2], truth, weights)
        kernel = leaves(device, F64, states, dt, skip)
        result = evolve(*kernel[:2], skip=kernel[2], **options)
        got = pulled(result[:2], kernel, [w.to(device) for w in weights])
        for name, a, b in zip(("states", "dt", "skip"), got, wanted, strict=True):
            # A single token moves along its own radius, which the clamp may hold: no gradient.
            assert_relative(f"gradient of {name}", a, b, 1e-9, floor=1e-3)
            if length > 1:
                assert_no_missing_gradient(f"gradient of {name}", a.cpu(), b)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)], ids=str)
def test_alpha_of_each_cylinder(device, shape):
    states, alpha = torch.randn(2, 3, 40, 2, dtype=F64), torch.randn(shape, dtype=F64)
    keys = torch.randn(2, 3, 40, 2, dtype=F64)
    weights = torch.randn(2, 3, 40, dtype=F64)
    for run in (
        lambda module, x, k, score: module.interact(x, score=score).strength,
        lambda module, x, k, score: module.interact(x, k, score=score).strength,
        lambda module, x, k, score: module.evolve(x, 0.1, score=score, steps=2).states.sum(-1),
    ):
        truth = leaves("cpu", F64, states, keys, alpha)
        output = run(reference, *truth[:2], InverseGate(truth[2], 1e-3))
        wanted = pulled(output, truth[2], weights)[0]
        kernel = leaves(device, F64, states, keys, alpha)
        output = run(qflux_kernels, *kernel[:2], InverseGate(kernel[2], 1e-3))
        got = pulled(output, kernel[2], weights.to(device))[0]
        assert_relative("gradient of alpha", got, wanted, 1e-9)


@pytest.mark.parametrize("score", SMOOTH_SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_float32_is_as_good_as_the_reference_in_float32(device, causal, score):
    """An error budget: twice the error of plain PyTorch in float32, and a rounding floor.

    Root mean squares over several draws: on a single one either side may be lucky.
    """
    largest = []  # of each draw and gradient: the kernel's error, plain PyTorch's, the gradient

    for _ in range(5):
        states, keys = calm(score, (40, 2), (55, 2), causal=causal, delta=1e-5)
        values, weights = torch.randn(55, 3), (torch.randn(40, 3), torch.randn(40))
        tensors = [t.float() for t in (states, keys, values)]

        def gradients(module_interact, where, dtype, tensors=tensors, weights=weights):
            given = leaves(where, dtype, *tensors)
            outputs = module_interact(*given, causal=causal, score=score)[:2]
            pull = [w.to(device=where, dtype=dtype) for w in weights]
            return [g.cpu().double() for g in pulled(outputs, given, pull)]

        truth = gradients(reference.interact, "cpu", F64)
        plain = gradients(reference.interact, "cpu", torch.float32)
        kernel = gradients(interact, device, torch.float32)
        parts = [(a - c, b - c, c) for a, b, c in zip(kernel, plain, truth, strict=True)]
        largest.append([[part.abs().max() for part in triple] for triple in parts])

    rms = torch.tensor(largest).square().mean(0).sqrt()
    for name, (error, of_plain, scale) in zip(("states", "keys", "values"), rms, strict=True):
        budget = 2 * of_plain + 1e-6 * scale
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("stats", ["prefix", "row"])
@pytest.mark.parametrize("rows, keys", [(40, 40), (30, 50), (50, 30)])
def test_sigma_of_a_soft_threshold(device, rows, keys, stats, shape):
    """What is measured from the threshold tells it where to be."""
    states, sources = torch.randn(2, 3, rows, 2, dtype=F64), torch.randn(2, 3, keys, 2, dtype=F64)
    sigma, weights = torch.rand(shape, dtype=F64), torch.randn(2, 3, rows, dtype=F64)
    found = []
    for module, where in ((reference, "cpu"), (qflux_kernels, device)):
        given = leaves(where, F64, states, sources, sigma)
        score = Threshold(given[2], stats, 0.1, shrinkage="soft")
        strength = module.interact(*given[:2], score=score, reduction="mean").strength
        found.append(pulled(strength, given, weights.to(where)))
    for name, wanted, got in zip(("states", "keys", "sigma"), *found, strict=True):
        assert_relative(f"gradient of {name}", got, wanted, 1e-9)
    # Each gradient comes alone as it comes with the others.
    for n in range(3):
        given = [t.to(device) for t in (states, sources, sigma)]
        given[n].requires_grad_()
        score = Threshold(given[2], stats, 0.1, shrinkage="soft")
        strength = interact(*given[:2], score=score, reduction="mean").strength
        assert torch.equal(pulled(strength, given[n], weights.to(device))[0], found[1][n])


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("stats", ["prefix", "row"])
@pytest.mark.parametrize("lengths", [None, [[40, 7, 0], [1, 33, 40]]], ids=str)
def test_sigma_of_a_soft_threshold_in_evolve(device, lengths, stats, shape):
    """Both stages of every step tell it."""
    states = torch.randn(2, 3, 40, 2, dtype=F64)
    dt, skip = 0.1 * torch.rand(2, 2, 3, 40, dtype=F64), torch.rand(40, dtype=F64)
    tensors = states, dt, skip, torch.rand(shape, dtype=F64)
    weights = torch.randn(2, 3, 40, 2, dtype=F64), torch.randn(2, 3, 40, dtype=F64)

    def gradients(module, given, where):
        result = module.evolve(
            *given[:2],
            skip=given[2],
            score=Threshold(given[3], stats, 0.1, shrinkage="soft"),
            reduction="mean",
            steps=2,
            lengths=None if lengths is None else torch.tensor(lengths, device=where),
        )
        wanted = [t for t in given if t.requires_grad]
        return pulled(result[:2], wanted, [w.to(where) for w in weights])

    wanted = gradients(reference, leaves("cpu", F64, *tensors), "cpu")
    got = gradients(qflux_kernels, leaves(device, F64, *tensors), device)
    for name, a, b in zip(("states", "dt", "skip", "sigma"), got, wanted, strict=True):
        assert_relative(f"gradient of {name}", a, b, 1e-9)
    # Each gradient comes alone as it comes with the others.
    for n in range(4):
        given = [t.to(device).detach().requires_grad_(i == n) for i, t in enumerate(tensors)]
        assert torch.equal(gradients(qflux_kernels, given, device)[0], got[n])


def test_equal_keys_have_a_deviation_without_gradient(device):
    """There the root in the threshold has no derivative, however small eps is."""
    states, keys = leaves(device, F64, torch.randn(6, 2), torch.full((6, 2), 0.7))
    for eps in (0.0, 1e-6):
        score = Threshold(-0.5, eps=eps, shrinkage="soft")
        strength = interact(states, keys, score=score).strength
        for grad in pulled(strength, (states, keys), torch.ones_like(strength)):
            # s - tau is 0.5 sqrt(eps) here, whatever the states.
            assert grad.isfinite().all() and grad.abs().max() <= 1e-12


@pytest.mark.parametrize("score", SMOOTH_SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_float32_evolve_is_as_good_as_the_reference_in_float32(device, causal, score):
    (states,) = calm(score, (30, 2), causal=causal, dt=0.05, delta=5e-5)
    tensors = [states.float(), torch.full((30,), 0.05), torch.rand(30)]
    weights = torch.randn(30, 2), torch.randn(30)

    def gradients(module_evolve, where, dtype):
        given = leaves(where, dtype, *tensors)
        outputs = module_evolve(*given[:2], skip=given[2], causal=causal, score=score)[:2]
        pull = [w.to(device=where, dtype=dtype) for w in weights]
        return [g.cpu().double() for g in pulled(outputs, given, pull)]

    truth = gradients(reference.evolve, "cpu", F64)
    plain = gradients(reference.evolve, "cpu", torch.float32)
    kernel = gradients(evolve, device, torch.float32)
    for name, a, b, c in zip(("states", "dt", "skip"), kernel, plain, truth, strict=True):
        error, budget = (a - c).abs().max(), 2 * (b - c).abs().max() + 1e-6 * c.abs().max()
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients(device, dtype):
    """Computed in float32 from the rounded inputs, returned in the inputs' dtype."""
    states, dt = torch.randn(2, 40, 2).to(dtype), (torch.rand(2, 40) / 10).to(dtype)
    half = leaves(device, dtype, states, dt)
    result = evolve(*half, reduction="mean").states
    weights = torch.randn(result.shape, device=device).to(dtype)
    got = pulled(result, half, weights)
    wide = leaves(device, torch.float32, states, dt)
    wanted = pulled(evolve(*wide, reduction="mean").states, wide, weights.float())
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_how_points_and_values_are_saved(device, dtype):
    given = leaves(
        device, dtype, torch.randn(2, 40, 2), torch.randn(2, 50, 2), torch.randn(2, 50, 7)
    )
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = interact(*given)
    shapes = {tensor.shape: tensor.dtype for tensor in saved}
    assert [shapes[tensor.shape] for tensor in given] == [dtype] * 3
    wide = [tensor.detach().float().requires_grad_() for tensor in given]
    expected = interact(*wide)
    weights = torch.randn(result.context.shape, device=device).to(dtype)
    got = torch.autograd.grad(result.context, given, weights)
    wanted = torch.autograd.grad(expected.context, wide, weights.float())
    assert torch.equal(result.context, expected.context.to(dtype))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_expanded_gradients(device, score):
    """`.sum().backward()` hands over a gradient whose strides are all zero."""
    states, keys, values = leaves(
        device, F64, torch.randn(2, 20, 2), torch.randn(2, 30, 2), torch.randn(2, 30, 3)
    )
    tensors = states, keys, values
    result = interact(*tensors, score=score)
    one = torch.ones_like(result.context), torch.ones_like(result.strength)
    wanted = pulled(result[:2], tensors, one)
    result = interact(*tensors, score=score)
    got = torch.autograd.grad(result.context.sum() + result.strength.sum(), tensors)
    assert all(map(torch.equal, got, wanted))

    dt = torch.full((2, 20), 0.1, dtype=F64, device=device, requires_grad=True)
    result = evolve(states, dt, score=score)
    wanted = pulled(result[:1], (states, dt), torch.ones_like(result.states))
    got = torch.autograd.grad(evolve(states, dt, score=score).states.sum(), (states, dt))
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_layouts_of_inputs_and_gradients(device, score):
    states, values = torch.randn(3, 20, 2, device=device), torch.randn(3, 20, 5, device=device)
    states, values = states.requires_grad_(), values.requires_grad_()
    result = interact(states, values=values, score=score)
    context, strength = torch.randn_like(result.context), torch.randn_like(result.strength)
    wanted = pulled(result[:2], (states, values), (context, strength))
    for name, view in layouts(context).items():
        result = interact(states, values=values, score=score)
        got = pulled(result[:2], (states, values), (view, strength))
        assert all(map(torch.equal, got, wanted)), f"gradient: {name}"
    for name, view in layouts(strength[..., None]).items():
        result = interact(states, values=values, score=score)
        got = pulled(result[:2], (states, values), (context, view[..., 0]))
        assert all(map(torch.equal, got, wanted)), f"gradient of strength: {name}"
    for name, view in layouts(states.detach()).items():
        view.requires_grad_()
        result = interact(view, values=values, score=score)
        got = pulled(result[:2], (view, values), (context, strength))
        assert all(map(torch.equal, got, wanted)), f"states: {name}"

    dt = torch.rand(3, 20, 1, device=device).requires_grad_()
    result = evolve(states, dt[..., 0], score=score)
    pull = torch.randn_like(result.states)
    wanted = pulled(result.states, (states, dt), pull)
    for name, view in layouts(pull).items():
        got = pulled(evolve(states, dt[..., 0], score=score).states, (states, dt), view)
        assert all(map(torch.equal, got, wanted)), f"gradient: {name}"


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("outputs", ["context", "strength", "both"])
def test_any_subset_of_inputs_and_outputs(device, outputs, gate):
    """Whatever asks for a gradient gets the one it gets when all ask."""
    given = {
        "states": torch.randn(2, 20, 2, dtype=F64, device=device),
        "keys": torch.randn(2, 30, 2, dtype=F64, device=device),
        "values": torch.randn(2, 30, 3, dtype=F64, device=device),
        "alpha": torch.randn(2, dtype=F64, device=device),
    }
    if not gate:
        del given["alpha"]
    weights = {
        "context": torch.randn(2, 20, 3, dtype=F64, device=device),
        "strength": torch.randn(2, 20, dtype=F64, device=device),
    }

    def gradients(names):
        tensors = {n: t.clone().requires_grad_(n in names) for n, t in given.items()}
        score = InverseGate(tensors["alpha"]) if gate else Threshold()
        result = interact(tensors["states"], tensors["keys"], tensors["values"], score=score)
        used = [n for n in weights if outputs in (n, "both")]
        found = torch.autograd.grad(
            [getattr(result, n) for n in used],
            [tensors[n] for n in names],
            [weights[n] for n in used],
            materialize_grads=True,
        )
        return dict(zip(names, found, strict=True))

    full = gradients(list(given))
    for count in range(1, len(given)):
        for names in itertools.combinations(given, count):
            if outputs == "strength" and names == ("values",):
                continue  # the strength has no use for values
            for name, grad in gradients(names).items():
                assert torch.equal(grad, full[name]), f"{name} of {names}"


def test_any_subset_of_inputs_of_evolve(device):
    given = {
        "states": torch.randn(2, 20, 2, dtype=F64, device=device),
        "dt": torch.rand(2, 2, 20, dtype=F64, device=device) / 10,
        "skip": torch.rand(20, dtype=F64, device=device),
        "alpha": torch.randn(2, dtype=F64, device=device),
    }
    weight = torch.randn(2, 20, 2, dtype=F64, device=device)

    def gradients(names):
        tensors = {n: t.clone().requires_grad_(n in names) for n, t in given.items()}
        score = InverseGate(tensors["alpha"])
        options = {"skip": tensors["skip"], "score": score, "steps": 2}
        result = evolve(tensors["states"], tensors["dt"], **options)
        found = pulled(result.states, [tensors[n] for n in names], weight)
        return dict(zip(names, found, strict=True))

    full = gradients(list(given))
    for count in range(1, len(given)):
        for names in itertools.combinations(given, count):
            for name, grad in gradients(names).items():
                assert torch.equal(grad, full[name]), f"{name} of {names}"


def test_only_the_strength_of_evolve(device):
    states, dt = torch.randn(2, 20, 2, dtype=F64), torch.rand(2, 20, dtype=F64)
    weight = torch.randn(2, 20, dtype=F64)
    for steps in (1, 2):
        truth = leaves("cpu", F64, states, dt)
        wanted = pulled(reference.evolve(*truth, steps=steps).strength, truth, weight)
        kernel = leaves(device, F64, states, dt)
        got = pulled(evolve(*kernel, steps=steps).strength, kernel, weight.to(device))
        assert_relative("states", got[0], wanted[0], 1e-9)
        if steps == 1:
            assert wanted[1] is None and (got[1] is None or not got[1].any())
        else:
            assert_relative("dt", got[1], wanted[1], 1e-9)


def test_one_tensor_in_two_places(device):
    states = torch.randn(25, 2, dtype=F64, device=device, requires_grad=True)
    alone = torch.autograd.grad(interact(states).context.sum(), states)[0]
    for arguments in [(states, states), (states, None, states), (states, states, states)]:
        twice = torch.autograd.grad(interact(*arguments).context.sum(), states)[0]
        assert_relative("states", twice, alone, 1e-12)
    keys = torch.randn(25, 2, dtype=F64, device=device, requires_grad=True)
    implied = torch.autograd.grad(interact(states, keys).context.sum(), keys)[0]
    given = torch.autograd.grad(interact(states, keys, keys).context.sum(), keys)[0]
    assert_relative("keys", given, implied, 1e-12)


def test_expanded_inputs_gather_their_gradients(device):
    states = torch.randn(1, 25, 2, dtype=F64, device=device, requires_grad=True)
    values = torch.randn(3, 25, 2, dtype=F64, device=device)
    together = torch.autograd.grad(interact(states, values=values).context.sum(), states)[0]
    apart = [
        torch.autograd.grad(interact(states[0], values=v).context.sum(), states)[0] for v in values
    ]
    assert_relative("states", together, sum(apart), 1e-12)


@pytest.mark.parametrize("make", [lambda c: Threshold(c), lambda c: InverseGate(0.5, 1e-5, c)])
def test_a_decision_has_no_gradient(device, make):
    """Neither sigma nor min_gate gets one, be it zero or none at all."""
    states = torch.randn(2, 25, 2, device=device, requires_grad=True)
    coefficient = torch.full((2,), 0.5, device=device, requires_grad=True)
    for output in (
        interact(states, score=make(coefficient)).context,
        evolve(states, 0.1, score=make(coefficient)).states,
    ):
        _, grad = pulled(output, (states, coefficient), torch.ones_like(output))
        assert grad is None or not grad.any()


def test_degree_has_no_gradient(device):
    states = torch.randn(25, 2, device=device, requires_grad=True)
    assert not interact(states).degree.requires_grad
    assert not evolve(states, 0.1).degree.requires_grad
    with torch.no_grad():
        assert not interact(states).context.requires_grad
        assert not evolve(states, 0.1).states.requires_grad
    detached = interact(states.detach())
    assert not detached.context.requires_grad


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_padding_has_no_gradient(device, score):
    """Padding gives nothing, takes nothing, and whatever it holds stays there."""
    states, values = torch.randn(2, 20, 2, device=device), torch.randn(2, 20, 3, device=device)
    lengths = torch.tensor([12, 0], device=device)
    weight = torch.randn(2, 20, 3, device=device)
    padding = torch.arange(20, device=device) >= lengths[:, None]

    def gradients(states, values, weight):
        tensors = states.clone().requires_grad_(), values.clone().requires_grad_()
        result = interact(tensors[0], values=tensors[1], lengths=lengths, score=score)
        return pulled((result.context, result.strength), tensors, (weight, weight[..., 0]))

    clean = gradients(states, values, weight)
    assert all(grad.isfinite().all() and not grad[padding].any() for grad in clean)
    for bad in (math.nan, 1e30):
        dirty = gradients(
            *(t.masked_fill(padding[..., None], bad) for t in (states, values, weight))
        )
        assert all(map(torch.equal, dirty, clean)), bad

    pull = torch.randn(2, 20, 2, device=device)
    dt = torch.full((2, 20), 0.1, device=device)

    def evolve_gradients(states, dt):
        tensors = states.clone().requires_grad_(), dt.clone().requires_grad_()
        result = evolve(*tensors, skip=0.3, lengths=lengths, score=score, steps=2)
        return pulled(result.states, tensors, pull)

    clean = evolve_gradients(states, dt)
    assert torch.equal(clean[0][padding], pull[padding]) and not clean[1][padding].any()
    for bad in (math.nan, 1e30):
        dirty = evolve_gradients(
            states.masked_fill(padding[..., None], bad), dt.masked_fill(padding, bad)
        )
        assert all(map(torch.equal, dirty, clean)), bad


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (0, 2)], ids=str)
def test_gradients_of_nothing(device, shape):
    states = torch.randn(shape, device=device, requires_grad=True)
    values = torch.randn(*shape[:-1], 3, device=device, requires_grad=True)
    dt = torch.rand(shape[:-1], device=device, requires_grad=True)
    alpha = torch.tensor(0.5, device=device, requires_grad=True)
    for score in (InverseGate(alpha), Threshold(alpha, shrinkage="soft")):
        result = interact(states, values=values, score=score)
        ones = [torch.ones_like(t) for t in result[:2]]
        grads = pulled(result[:2], (states, values, alpha), ones)
        assert [g.shape for g in grads] == [states.shape, values.shape, ()]
    assert grads[2] == 0
    result = evolve(states, dt, score=InverseGate(alpha))
    grads = pulled(result.states, (states, dt, alpha), torch.ones_like(result.states))
    assert [g.shape for g in grads] == [states.shape, dt.shape, ()]


@pytest.mark.parametrize("keys", [0, 3])
def test_rows_that_see_nothing(device, keys):
    states = torch.randn(5, 2, device=device, requires_grad=True)
    sources = torch.randn(keys, 2, device=device, requires_grad=True)
    for reduction in ("sum", "mean"):
        result = interact(states, sources, reduction=reduction)
        rows, columns = pulled(result.context, (states, sources), torch.ones_like(result.context))
        assert not rows[: 5 - keys].any() and rows.isfinite().all()
        assert columns.shape == sources.shape and columns.isfinite().all()


def test_accumulation_and_retained_graphs(device):
    states = torch.randn(25, 2, device=device, requires_grad=True)
    result = evolve(states, 0.1, steps=2)
    result.states.sum().backward(retain_graph=True)
    once = states.grad.clone()
    result.states.sum().backward()
    assert torch.equal(states.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        result.states.sum().backward()


def test_changed_inputs_are_noticed(device):
    states = torch.randn(25, 2, device=device, requires_grad=True)
    doubled = states * 2
    context = interact(doubled).context
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        context.sum().backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "make",
    [lambda a: InverseGate(a), lambda a: Threshold(a, shrinkage="soft"), lambda a: Sparsemax(a)],
    ids=["alpha", "sigma", "scale"],
)
def test_what_sees_and_shows_nothing_gives_no_gradient(device, make, backend, bad):
    """Padding, and rows that see no key, may hold anything, and the gradients are the others'."""
    lengths = torch.tensor(4, device=device)

    def gradients(fill, run):
        torch.manual_seed(0)
        states = torch.randn(6, 2, device=device)
        dt, skip = torch.rand(2, 6, device=device)
        values = torch.randn(6, 3, device=device)
        for tensor in (states, dt, skip, values):
            tensor[4:] = fill
        coefficient = torch.tensor(0.5, device=device)
        given = [t.requires_grad_() for t in (coefficient, states, dt, skip, values)]
        run(make(coefficient), *given[1:]).backward()
        return [t.grad for t in given if t.grad is not None]

    def interaction(score, states, _dt, _skip, values):
        found = interact(states, values=values, score=score, lengths=lengths, backend=backend)
        return found.context.square().sum() + found.strength.sum()

    def evolution(score, states, dt, skip, _values):
        options = {"skip": skip, "score": score, "lengths": lengths, "backend": backend}
        found = evolve(states, dt, steps=2, **options)
        return found.states[:4].square().sum() + found.strength.sum()

    def unseeing(score, states, _dt, _skip, values):
        # The last two states come first, where two keys of four rows' leave them without one.
        rows = states.flip(0)
        found = interact(rows, values[:4, :2], score=score, backend=backend)
        return found.context.square().sum() + found.strength.sum()

    for run in (interaction, evolution, unseeing):
        got, wanted = gradients(bad, run), gradients(0.25, run)
        assert len(got) == len(wanted) >= 3
        for a, b in zip(got, wanted, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused(device):
    states = torch.randn(8, 2, dtype=F64, device=device, requires_grad=True)
    dt = torch.full((8,), 0.1, dtype=F64, device=device, requires_grad=True)

    def interacts(x):
        return interact(x).context.pow(2).sum()

    def evolves(x):
        return evolve(x, dt).states.pow(2).sum()

    for function in (interacts, evolves):
        (grad,) = torch.autograd.grad(function(states), states, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            grad.pow(2).sum().backward()
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.functional.hessian(function, states.detach())
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.func.grad(lambda x, f=function: torch.func.grad(f)(x).sum())(states.detach())
        with pytest.raises(RuntimeError):
            torch.func.hessian(function)(states.detach())
        with pytest.raises(RuntimeError):
            torch.func.jvp(function, (states.detach(),), (states.detach(),))
    (grad,) = torch.autograd.grad(evolves(states), dt, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "function", [interact, lambda x: evolve(x, 0.1)], ids=["interact", "evolve"]
)
def test_a_dual_number_is_refused(function):
    """The kernels have no forward mode; a tangent must not be lost on the way."""
    states = torch.randn(5, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(states, torch.ones_like(states))
        with pytest.raises(NotImplementedError, match="jvp"):
            function(dual)
    assert torch.equal(function(states)[0], function(states)[0])


def test_nothing_is_recorded_where_nothing_needs_a_gradient():
    states, values = torch.randn(7, 2), torch.randn(7, 3)
    learned = states.clone().requires_grad_()
    wanted = interact(learned, values=values)
    assert wanted.context.grad_fn is not None and wanted.strength.requires_grad
    with torch.no_grad():
        unrecorded = interact(learned, values=values)
    for result in (interact(states, values=values), unrecorded):
        assert result.context.grad_fn is None and not result.strength.requires_grad
        assert all(map(torch.equal, result, wanted))
    with torch.inference_mode():
        assert all(map(torch.equal, interact(learned, values=values), wanted))


def test_the_reference_has_second_derivatives():
    """As the refusal tells its reader."""
    states = torch.randn(8, 2, dtype=F64, requires_grad=True)
    result = interact(states, score=InverseGate(0.5, 0.1), backend="reference")
    (grad,) = torch.autograd.grad(result.context.pow(2).sum(), states, create_graph=True)
    grad.pow(2).sum().backward()
    assert states.grad.isfinite().all() and states.grad.any()


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("batch, length", [(1, 1500), (40, 33), (3, 257)])
def test_bitwise_repeatable(device, restore_threads, batch, length, score):
    """Over runs and over thread counts, more sequences than threads and fewer."""
    states = torch.randn(batch, length, 2, device=device, requires_grad=True)
    keys = torch.randn(batch, length, 2, device=device, requires_grad=True)
    values = torch.randn(batch, length, 3, device=device, requires_grad=True)
    dt = torch.rand(batch, length, device=device, requires_grad=True)
    alpha = torch.randn(batch, device=device, requires_grad=True)
    gate = InverseGate(alpha, 1e-3)

    def run():
        found = []
        for result, inputs in [
            (interact(states, keys, values, score=score), (states, keys, values)),
            (interact(states, score=score), (states,)),
            (interact(states, score=gate), (states, alpha)),
            (evolve(states, dt, score=score, reduction=mean_of(score), steps=2), (states, dt)),
            (evolve(states, dt, score=gate, reduction="mean"), (states, dt, alpha)),
        ]:
            weights = [torch.cos(torch.arange(t.numel(), device=device)).view_as(t) for t in result]
            found += [*result, *pulled(result[:2], inputs, weights[:2])]
        return found

    first = run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for again, before in zip(run(), first, strict=True):
            assert torch.equal(again, before), f"{threads} threads"
