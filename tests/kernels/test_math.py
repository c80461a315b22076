"""The formulas of csrc/math against NumPy, and each derivative against its formula."""

import math

import numpy as np
import pytest
import torch
from inputs import STATES

RULES = [
    (0.1, 2.0, 0.01, 0.0, 1.0),
    (0.0, 1e9, 0.3, 0.4, 1.2),
    (0.5, 0.9, -0.2, 0.1, 1.0),
    (0.7, 0.7, 0.01, 0.0, 1.0),
]


def slope(function, at: float, step: float = 1e-6) -> float:
    return (function(at + step) - function(at - step)) / (2 * step)


def gradient(function, at) -> np.ndarray:
    """Central differences of a number in each entry of `at`."""
    at = np.asarray(at, dtype=float)
    steps = 1e-6 * np.eye(len(at))
    return np.array([(function(at + h) - function(at - h)) / 2e-6 for h in steps])


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def test_threshold_score(math_module, draw):
    for x, k in draw.normal(size=(50, 2, 2)):
        query = math_module.threshold_query(x, 0.0)
        assert math_module.threshold_score(query, k) == pytest.approx((x @ k + 1) / 2, rel=1e-14)
        grad = draw.normal(size=2)
        pulled = gradient(lambda x, g=grad: g @ math_module.threshold_query(x, 0.0), x)
        np.testing.assert_allclose(math_module.threshold_query_vjp(grad, 0.0), pulled, rtol=1e-8)


def test_threshold_decision(math_module):
    limit = 0.75
    for p, kept in [(0.75, True), (np.nextafter(0.75, 0), False), (0.8, True), (-1.0, False)]:
        assert math_module.threshold_kept(limit, p) is kept
        assert math_module.threshold_weight(limit, p) == (p if kept else 0.0)
        assert math_module.threshold_derivative(limit, p, 3.0) == 3.0
    assert math_module.threshold_kept(math.nan, 0.5) and math_module.threshold_kept(0.5, math.nan)
    assert not math_module.threshold_kept(math.inf, 0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.7])
def test_gate_score(math_module, draw, alpha):
    for x, k in draw.normal(size=(50, 2, 2)):
        radii = np.hypot(*x) * np.hypot(*k)
        angle = np.arctan2(x[1], x[0]) - np.arctan2(k[1], k[0])
        similarity = radii * np.cos(angle) + alpha * radii * np.sin(angle)
        query = math_module.gate_query(x, alpha)
        got = math_module.gate_score(query, k)
        assert got == pytest.approx(similarity, rel=1e-12, abs=1e-14)

        grad = draw.normal(size=2)
        pulled = gradient(lambda x, g=grad: g @ math_module.gate_query(x, alpha), x)
        np.testing.assert_allclose(
            math_module.gate_query_vjp(grad, alpha), pulled, rtol=1e-7, atol=1e-9
        )
        in_alpha = slope(lambda a, g=grad, x=x: g @ math_module.gate_query(x, a), alpha)
        assert math_module.gate_alpha_vjp(grad, x) == pytest.approx(in_alpha, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("eps", [1e-5, 0.1, 1.0])
@pytest.mark.parametrize("min_gate", [0.0, 0.8, 1e4])
def test_gate_weight(math_module, draw, eps, min_gate):
    for p in [0.0, 1e-6, -1e-6, *(3 * draw.normal(size=50))]:
        gate = 1 / (eps + abs(p))
        kept = bool(gate > min_gate)
        assert math_module.gate_kept(eps, min_gate, p) is kept
        expected = p * gate if kept else 0.0
        assert math_module.gate_weight(eps, min_gate, p) == pytest.approx(expected, rel=1e-14)
        expected = eps / (eps + abs(p)) ** 2
        assert math_module.gate_derivative(eps, p, -2.0) == pytest.approx(-2 * expected, rel=1e-14)
        if abs(p) > 1e-3:
            measured = slope(lambda p: math_module.gate_weight(eps, 0.0, p), p)
            assert math_module.gate_derivative(eps, p, 1.0) == pytest.approx(
                measured, rel=1e-5, abs=1e-9
            )


def test_gate_decision_at_its_edge(math_module):
    assert not math_module.gate_kept(0.0, 1.0, 1.0)
    assert math_module.gate_kept(0.0, 1.0, np.nextafter(1.0, 0.0))
    assert math_module.gate_kept(1e-5, 0.0, math.nan)
    assert math.isnan(math_module.gate_weight(1e-5, 1.0, math.nan))
    assert math.isnan(math_module.gate_weight(1e-5, 0.0, math.inf))
    assert math.isnan(math_module.gate_weight(1e-5, 1.0, math.inf))
    assert math.isnan(math_module.gate_weight(0.0, 0.0, 0.0))


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5])
def test_mass_score(math_module, draw, scale):
    for x, k, grad in draw.normal(size=(20, 3, 2)):
        query = math_module.mass_query(x, scale)
        assert math_module.mass_score(query, k) == pytest.approx(scale * x @ k, rel=1e-13)
        pulled = gradient(lambda x, g=grad: g @ math_module.mass_query(x, scale), x)
        np.testing.assert_allclose(
            math_module.mass_query_vjp(grad, scale), pulled, rtol=1e-7, atol=1e-9
        )
        in_scale = slope(lambda a, g=grad, x=x: g @ math_module.mass_query(x, a), scale)
        assert math_module.mass_scale_vjp(grad, x) == pytest.approx(in_scale, rel=1e-7, abs=1e-9)


def test_mass_decision(math_module):
    """Strict: a weight of zero is not kept. What is undefined is."""
    limit = 0.75
    assert not math_module.mass_kept(limit, limit)
    assert math_module.mass_kept(limit, np.nextafter(limit, 1))
    assert math_module.mass_kept(math.nan, 0.0) and math_module.mass_kept(0.0, math.nan)
    assert math_module.mass_weight(limit, 0.125, 1.5) == 0.625
    assert math_module.mass_weight(limit, 0.125, 0.5) == 0.0
    assert math.isnan(math_module.mass_weight(math.nan, 0.0, 0.0))


def sorted_mass(pairs):
    """tau by the definition over sorted numbers."""
    ordered = np.sort(pairs)[::-1]
    means = (np.cumsum(ordered) - 1) / np.arange(1, len(pairs) + 1)
    return means[(ordered > means).sum() - 1]


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3, 5.0, 100.0])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_mass_steps_end_at_the_solution_from_either_side(math_module, draw, spread, count):
    for _ in range(20):
        pairs = spread * draw.normal(size=count) + draw.normal()
        tau = sorted_mass(pairs)
        assert np.maximum(pairs - tau, 0).sum() == pytest.approx(1, rel=1e-12)
        top = pairs.max()
        for start in (top - 1, tau - 0.3, tau, (tau + top) / 2):
            got = math_module.solve_mass(pairs, start)
            assert got == pytest.approx(tau, rel=1e-12, abs=1e-12 * (1 + spread))


def test_mass_gradient(math_module, draw):
    """Of a loss linear in the weights, whose tau moves with the query."""
    for _ in range(20):
        keys, query, worth = draw.normal(size=(9, 2)), draw.normal(size=2), draw.normal(size=9)

        def loss(query, keys=keys, worth=worth):
            pairs = keys @ query
            return worth @ np.maximum(pairs - sorted_mass(pairs), 0)

        kept = keys @ query > sorted_mass(keys @ query)
        *grad, mean = math_module.mass_vjp(keys[kept], worth[kept])
        np.testing.assert_allclose(grad, gradient(loss, query), rtol=1e-6, atol=1e-8)
        assert mean == pytest.approx(worth[kept].mean(), rel=1e-13)
    assert math_module.mass_vjp([], []) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", [kind for kind in STATES if kind != "huge"])
@pytest.mark.parametrize("sigma, eps", [(0.5, 1e-6), (0.0, 0.0), (-1.0, 1e-6), (3.0, 0.1)])
def test_threshold_of_a_window(math_module, kind, sigma, eps):
    """The closed form equals mean and deviation over all pairs."""
    for length in (1, 2, 3, 50):
        keys = STATES[kind](length).numpy()
        for x in (keys[0], keys[-1], np.array([0.3, -2.0])):
            s = (keys @ x + 1) / 2
            tau = s.mean() + sigma * math.sqrt(s.var() + eps)
            for middle in (0, length // 2, length):
                got = math_module.threshold(x, keys, middle, keys[0], sigma, eps)
                tolerance = 1e-12 * (1 + np.abs(x).max() * np.abs(keys).max())
                assert got == pytest.approx(tau, rel=1e-12, abs=tolerance)


def test_equal_keys_have_no_variance(math_module):
    keys = np.tile([[0.1, 0.7]], (1000, 1))
    x = np.array([0.3, 0.4])
    mean = (x @ keys[0] + 1) / 2
    assert math_module.threshold(x, keys, 300, keys[0], 5.0, 0.0) == pytest.approx(mean, rel=1e-15)


def radius_rule(moved, strength, rule):
    low, high, rate, reversion, target = rule
    r = moved.norm().clamp(min=1e-6)
    rho = (r + rate * strength - reversion * (r - target)).clamp(low, high)
    return moved * rho / r


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.3, 1.0, 5.0, 1e6])
def test_move_radius(math_module, rule, scale):
    for _ in range(20):
        moved = (scale * torch.randn(2, dtype=torch.float64)).requires_grad_()
        strength = torch.randn((), dtype=torch.float64, requires_grad=True)
        grad = torch.randn(2, dtype=torch.float64)
        expected = radius_rule(moved, strength, rule)
        got = math_module.move_radius(moved.tolist(), strength.item(), rule)
        np.testing.assert_allclose(got, expected.detach(), rtol=1e-13)

        in_moved, in_strength = torch.autograd.grad(expected, (moved, strength), grad)
        got = math_module.move_radius_vjp(moved.tolist(), strength.item(), rule, grad.tolist())
        np.testing.assert_allclose(got[0], in_moved, rtol=1e-9, atol=1e-12 * in_moved.norm())
        assert got[1] == pytest.approx(in_strength.item(), rel=1e-12)


def test_move_radius_at_the_origin(math_module):
    for rule in RULES:
        assert math_module.move_radius([0.0, 0.0], 1.0, rule) == [0.0, 0.0]
        in_moved, in_strength = math_module.move_radius_vjp([0.0, 0.0], 1.0, rule, [1.0, 2.0])
        rho = min(max(1e-6 + rule[2] - rule[3] * (1e-6 - rule[4]), rule[0]), rule[1])
        np.testing.assert_allclose(in_moved, np.array([1.0, 2.0]) * rho / 1e-6, rtol=1e-12)
        assert in_strength == 0.0


def test_move_radius_keeps_nan(math_module):
    for rule in RULES:
        for moved in ([math.nan, 1.0], [1.0, math.nan], [math.nan, 0.0], [0.0, math.nan]):
            assert np.isnan(math_module.move_radius(moved, 1.0, rule)).all(), moved
        assert np.isnan(math_module.move_radius([1.0, 1.0], math.nan, rule)).all()


def test_move_radius_of_a_huge_or_tiny_state(math_module):
    """Its square overflows or vanishes; it does not."""
    rule = (0.0, 2.0, 0.0, 0.0, 1.0)
    got = math_module.move_radius([6e199, 8e199], 0.0, rule)
    np.testing.assert_allclose(got, [1.2, 1.6], rtol=1e-14)
    got = math_module.move_radius([6e-200, 8e-200], 0.0, rule)
    np.testing.assert_allclose(got, [6e-200, 8e-200], rtol=1e-14)


def test_advance_and_blend(math_module, draw):
    for x, context in draw.normal(size=(20, 2, 2)):
        dt = draw.random()
        np.testing.assert_allclose(math_module.advance(x, dt, context), x + dt * context)
        np.testing.assert_allclose(math_module.blend(dt, x, context), dt * x + (1 - dt) * context)
        assert math_module.blend(0.0, x, context) == list(context)
        assert math_module.blend(1.0, x, context) == list(x)


NONE, ALL, TEST = 0, 1, 2  # what is certain of a key


def test_direction_of_a_pseudo_angle(math_module, draw):
    corners = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)]
    for x in [*corners, *draw.normal(size=(200, 2))]:
        angle = math_module.pseudo_angle(*x)
        assert 0 <= angle < 4
        found = np.array(math_module.direction_of(angle))
        np.testing.assert_allclose(found / np.hypot(*found), x / np.hypot(*x), atol=1e-15)
    angles = [math_module.pseudo_angle(np.cos(a), np.sin(a)) for a in np.linspace(0, 6.28, 100)]
    assert angles == sorted(angles)


def test_the_ends_of_an_arc(math_module, draw):
    """In the sense of growing angle, however narrow the arc or what it leaves out."""
    edge = np.nextafter(1.0, 0.0)
    axes = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (1.0, -1e-17), (-1e-9, 1.0)]
    for z in [*axes, *draw.normal(size=(300, 2)), *(1e-200 * draw.normal(size=(50, 2)))]:
        for c in (edge, edge**4, 0.5, 1e-9, 0.0, -1e-9, -0.5, -(edge**4), -edge):
            start, end, cosine = math_module.make_arc(z, c * np.hypot(*z))
            if abs(cosine) >= 1:
                continue
            width = (end - start) % 4
            # A pseudo-angle grows by 0.5 to 1 for each radian.
            assert 0.99 * math.acos(cosine) <= width <= 2.01 * math.acos(cosine)


@pytest.mark.parametrize("width", [0.0, 0.01, 0.3, 1.5, 3.1])
def test_what_is_certain_is_sharp(math_module, draw, width):
    """Against the extremes of z . u over finely sampled directions of the range."""
    seen = set()
    for _ in range(300):
        start = draw.uniform(0, 7)
        angles = start + np.linspace(0, width, 2001)
        ends = [[np.cos(a), np.sin(a)] for a in (angles[0], angles[-1])]
        z = draw.normal(size=2)
        reach = np.cos(angles) * z[0] + np.sin(angles) * z[1]
        low, slack = draw.normal(), 0.01 * draw.uniform()
        high = low + draw.uniform(0, 0.3)
        found = math_module.classify_view(*ends, low, high, z, slack)
        seen.add(found)
        edge = 1e-6  # of the sampling
        if reach.min() >= high + slack + edge:
            assert found == ALL
        elif reach.max() < low - slack - edge:
            assert found == NONE
        elif reach.min() < high + slack - edge and reach.max() > low - slack + edge:
            assert found == TEST
    assert seen == {NONE, ALL, TEST}


def test_nothing_is_certain_of_what_is_not_known(math_module):
    here, nan = [1.0, 0.0], math.nan
    assert math_module.classify_view(here, here, 0.5, 0.6, [2.0, 0.0], 0.0) == ALL
    assert math_module.classify_view(here, here, 0.5, 0.6, [0.1, 0.0], 0.0) == NONE
    for low, high, z, slack in [
        (nan, nan, [2.0, 0.0], 0.0),
        (nan, nan, [-2.0, 0.0], 0.0),
        (0.5, 0.6, [2.0, 0.0], nan),
        (0.5, 0.6, [-2.0, 0.0], nan),
        (0.5, 0.6, [nan, 0.0], 0.0),
        (0.5, 0.6, [2.0, 0.0], math.inf),
    ]:
        assert math_module.classify_view(here, here, low, high, z, slack) == TEST
    every = [0.0, 0.0]
    assert math_module.classify_view(every, every, -3.0, -2.5, [2.0, 0.0], 0.0) == ALL
    assert math_module.classify_view(every, every, -3.0, -1.5, [2.0, 0.0], 0.0) == TEST
    assert math_module.classify_view(every, every, 2.1, 3.0, [2.0, 0.0], 0.0) == NONE


@pytest.mark.parametrize("kind", [kind for kind in STATES if kind != "huge"])
@pytest.mark.parametrize("spread", [1e-6, 0.1, 1.0, 6.0])
def test_what_is_certain_is_what_pairs_decide(math_module, kind, spread):
    """Rows that look `spread` apart, against thresholds that put keys exactly on the edge."""
    keys = STATES[kind](60).numpy()
    length = np.hypot(*keys.T).max()
    angle = 1.0 + spread * np.random.default_rng(0).uniform(size=16)
    rows = (length or 1.0) * np.stack([np.cos(angle), np.sin(angle)], -1)
    unit = 32 * np.finfo(np.float64).eps
    s = np.array([[math_module.threshold_score(x / 2, k) for k in keys] for x in rows])
    mean, deviation = s.mean(1), np.sqrt(s.var(1) + 1e-6)
    for tau in [mean + 0.5 * deviation, mean - 1.4 * deviation, s[:, 7], s.max(1), s.min(1)]:
        found = math_module.classify(keys, rows, tau, 1e-6, unit)
        kept = s >= tau[:, None]
        for j, certainty in enumerate(found):
            if certainty != TEST:
                assert (kept[:, j] == (certainty == ALL)).all(), (kind, j)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_converted_as_torch_does(math_module, dtype):
    float16 = dtype == torch.float16
    every = torch.arange(1 << 16, dtype=torch.int32)
    wide = every.to(torch.int16).view(dtype).float()
    assert torch.equal(
        torch.tensor(math_module.widen(every.tolist(), float16)).nan_to_num(7.0),
        wide.nan_to_num(7.0),
    )
    # Half the way between neighbours, and a little to both sides of that.
    middle = ((wide[:-1].double() + wide[1:].double()) / 2).float()
    bits = middle[middle.isfinite()].view(torch.int32)
    sizes = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(
        -150, 100
    ).repeat(40)
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 65519.99, 65520.0, 2.0**-25])
    for numbers in (wide, (bits - 1).view(torch.float32), bits.view(torch.float32),
                    (bits + 1).view(torch.float32), sizes, ends):  # fmt: skip
        numbers = numbers[~numbers.isnan()]
        found = torch.tensor(math_module.narrow(numbers.tolist(), float16), dtype=torch.int32)
        assert torch.equal(found.to(torch.int16), numbers.to(dtype).view(torch.int16))
    (nan,) = math_module.narrow([torch.nan], float16)
    assert torch.tensor([nan], dtype=torch.int32).to(torch.int16).view(dtype).isnan()
