"""The kernels of `evolve`: float64 against the reference, float32 stage by stage."""

import math
import os
import random

import pytest
import torch
from assertions import assert_interaction_close, assert_relative
from inputs import REDUCED_SCORES, SCORES, STATES, layouts, mean_of, score_on

from qflux_kernels import (
    Interaction,
    InverseGate,
    Radius,
    Sparsemax,
    Threshold,
    evolve,
    interact,
    reference,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RADII = [None, Radius(), Radius(0.0, 1e9, 0.2, 0.3, 1.5), Radius(0.5, 0.9, -0.1), Radius(0.7, 0.7)]
SWEEP_CASES = 1000 if os.environ.get("QFLUX_LONG") else 60

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def moved(device, options):
    options = {
        name: option.to(device) if isinstance(option, torch.Tensor) else option
        for name, option in options.items()
    }
    if "score" in options:
        options["score"] = score_on(device, options["score"])
    return options


def check(device, states, dt, **options):
    """float64 kernels against the reference, which sees the same borderline-free inputs."""
    assert states.dtype == torch.float64
    dt_moved = dt.to(device) if isinstance(dt, torch.Tensor) else dt
    result = evolve(states.to(device), dt_moved, **moved(device, options))
    truth = reference.evolve(states, dt, **options)
    assert_relative("states", result.states, truth.states, 1e-9)
    assert_relative("strength", result.strength, truth.strength, 1e-9)
    assert torch.equal(result.degree.cpu(), truth.degree)
    assert result.degree.dtype == torch.int32
    return result


def moved_radius(x, strength, radius):
    """The radius rule in float64."""
    norm = x.norm(dim=-1).clamp(min=1e-6)
    free = norm + radius.rate * strength - radius.reversion * (norm - radius.target)
    return x * (free.clamp(radius.min, radius.max) / norm)[..., None]


def check_stages(device, states, dt, *, radius, skip=None, **options):
    """Hold each stage of one step to its own inputs, as the results show them.

    A flipped pair in the first stage moves the second stage's inputs, so the whole step has no
    useful error bound; its parts have, with k1 from `interact` and x' from a step without radius.
    """
    x = states.to(device)
    first = interact(x, **options)
    plain = evolve(x, dt, radius=None, **options)
    shown = Interaction(first.context, plain.strength, plain.degree)
    assert_interaction_close(shown, states, **options)

    rounding = torch.finfo(states.dtype).eps
    k1 = dt * first.context.double()
    middle = (x.double() + k1).to(states.dtype)
    k2 = 2 * (plain.states.double() - x.double()) - k1
    second = interact(middle, **options)
    # x' is rounded, and differences from it are the second context only to that rounding.
    slack = 4 * rounding * (x.abs() + plain.states.abs() + k1.abs()).double() / dt
    error = (k2 / dt - second.context.double()).abs()
    loose = error > slack + 1e-5 * second.context.abs().double()
    context = torch.where(loose, k2 / dt, second.context.double()).to(states.dtype)
    assert_interaction_close(
        Interaction(context, second.strength, second.degree), middle.cpu(), **options
    )

    result = evolve(x, dt, radius=radius, skip=skip, **options)
    expected = plain.states.double()
    if radius is not None:
        expected = moved_radius(expected, plain.strength.double(), radius)
    if skip is not None:
        expected = skip * x.double() + (1 - skip) * expected
    bound = 16 * rounding * (expected.norm(dim=-1, keepdim=True) + x.norm(dim=-1, keepdim=True))
    assert ((result.states - expected).abs() <= bound).all()


@pytest.mark.parametrize("radius", RADII, ids=str)
@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 31, 33, 64, 100, 257])
def test_one_step(device, length, causal, score, radius):
    states = torch.randn(2, length, 2, dtype=torch.float64)
    check(device, states, 0.1, causal=causal, score=score, radius=radius)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_many_tokens(device, causal, score):
    states = torch.randn(1500, 2, dtype=torch.float64)
    options = {"causal": causal, "score": score}
    check(device, states, 0.1, reduction=mean_of(score), steps=2, **options)
    check(device, states, 1e-3, **options)


@pytest.mark.parametrize("radius", RADII, ids=str)
@pytest.mark.parametrize("score, reduction", REDUCED_SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_float32_by_stages(device, reduction, causal, score, radius):
    for length in (1, 17, 64, 257):
        options = {"causal": causal, "score": score, "reduction": reduction}
        check_stages(device, torch.randn(2, length, 2), 0.05, radius=radius, **options)
        check_stages(device, torch.randn(2, length, 2), 0.05, radius=radius, skip=0.3, **options)


@pytest.mark.parametrize("score", [Threshold(), InverseGate()], ids=str)
def test_float32_by_stages_on_many_tokens(device, score):
    check_stages(device, torch.randn(4096, 2), 1e-3, radius=Radius(), score=score)


@pytest.mark.parametrize("kind", [kind for kind in STATES if kind not in ("huge", "large")])
@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_adversarial_states_by_stages(device, causal, score, kind):
    states = STATES[kind](130).float()
    check_stages(device, states, 0.05, radius=Radius(), causal=causal, score=score)


@pytest.mark.parametrize("kind", ["outlier", "outlier first", "clamped", "sorted", "collinear"])
@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("radius", RADII, ids=str)
def test_adversarial_states(device, radius, score, kind):
    check(device, STATES[kind](90), 0.05, score=score, radius=radius, reduction=mean_of(score))


def test_a_state_at_the_origin(device):
    """The radius rule divides by at least 1e-6, so a still state at the origin stays there."""
    states = torch.zeros(5, 2, dtype=torch.float64)
    states[2:] = torch.randn(3, 2)
    result = check(device, states, 0.0)
    assert not result.states[:2].any()
    tiny = torch.full((3, 2), 1e-9, dtype=torch.float64)
    check(device, tiny, 0.1)


def test_a_large_radius_is_clamped_not_lost(device):
    """|x|^2 overflows float32 here; neither the radius nor the score does."""
    states = torch.tensor([[0.6, 0.8]], device=device) * 2.2e19
    result = evolve(states, 0.1, score=Threshold(math.inf))
    assert result.degree.item() == 0
    torch.testing.assert_close(result.states.cpu(), torch.tensor([[1.2, 1.6]]))


def test_dt_and_skip_of_each_token(device):
    states = torch.randn(2, 3, 40, 2, dtype=torch.float64)
    for shape in [(), (1,), (40,), (3, 1), (3, 40), (2, 3, 1), (2, 3, 40), (1, 2, 1, 40)]:
        dt, skip = torch.rand(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
        check(device, states, dt)
        check(device, states, 0.1, skip=skip)
        check(device, states, dt, skip=skip, reduction="mean")
    for shape in [(4, 1, 1, 1), (4, 2, 3, 40), (4, 1, 3, 1)]:
        dt, skip = torch.rand(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
        check(device, states, dt, skip=skip, steps=4, reduction="mean")
        check(device, states, dt, skip=0.3, steps=4, reduction="mean")
        check(device, states, dt[:1], skip=skip, steps=4, reduction="mean")


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_are_repeated_calls(device, dtype, score):
    states = torch.randn(2, 60, 2, dtype=dtype, device=device)
    dt, skip = torch.rand(3, 2, 60, device=device), torch.rand(3, 2, 60, device=device)
    lengths = torch.tensor([60, 31], device=device)
    options = {"score": score, "reduction": mean_of(score), "lengths": lengths}
    at_once = evolve(states, dt, skip=skip, steps=3, **options)
    for step in range(3):
        one = evolve(states, dt[step], skip=skip[step], **options)
        states = one.states
    assert all(map(bitwise_equal, at_once, one))


def test_a_skip_of_zero_or_one(device):
    states = torch.randn(50, 2, device=device)
    plain = evolve(states, 0.1).states
    assert torch.equal(evolve(states, 0.1, skip=0.0).states, plain)
    assert torch.equal(evolve(states, 0.1, skip=1.0).states, states)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(device, causal, score):
    states = torch.randn(3, 2, 40, 2, dtype=torch.float64)
    lengths = torch.tensor([[0, 1], [40, 39], [17, 2]])
    options = {"causal": causal, "score": score, "steps": 2, "reduction": mean_of(score)}
    for given in (lengths, lengths[:, :1], lengths[2, 0]):
        result = check(device, states, 0.1, lengths=given, skip=0.2, **options)
        padding = torch.arange(40) >= given.expand(3, 2)[..., None]
        assert torch.equal(result.states.cpu()[padding], states[padding])
        assert not result.strength.cpu()[padding].any() and not result.degree.cpu()[padding].any()


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_padding_is_never_seen(device, value, score):
    """Neither padding states nor padding steps; they come back as they came."""
    states, dt = torch.randn(2, 40, 2, device=device), torch.rand(2, 40, device=device) / 10
    lengths = torch.tensor([23, 37], device=device)
    options = {"lengths": lengths, "score": score, "steps": 2}
    clean = evolve(states, dt, skip=dt, **options)
    dirty_states, dirty_dt = states.clone(), dt.clone()
    for b, length in enumerate(lengths.tolist()):
        dirty_states[b, length:], dirty_dt[b, length:] = value, value
    dirty = evolve(dirty_states, dirty_dt, skip=dirty_dt, **options)
    for b, length in enumerate(lengths.tolist()):
        for got, wanted in zip(dirty, clean, strict=True):
            assert bitwise_equal(got[b, :length], wanted[b, :length])
        assert bitwise_equal(dirty.states[b, length:], dirty_states[b, length:])
        short = dt[b, :length]
        alone = evolve(states[b, :length], short, skip=short, score=score, steps=2)
        assert bitwise_equal(alone.states, dirty.states[b, :length])


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_states(device, value, score):
    states = torch.randn(2, 70, 2, device=device)
    without = evolve(states, 0.1, score=score, steps=2)
    states[0, 33, 1] = value
    result = evolve(states, 0.1, score=score, steps=2)
    first = 0 if score.whole_window else 33
    assert not result.states[0, first:].isfinite().any()
    for got, wanted in zip(result, without, strict=True):
        assert bitwise_equal(got[0, :first], wanted[0, :first])
        assert bitwise_equal(got[1], wanted[1])


def test_a_non_finite_step_stays_with_those_who_see_it(device):
    states = torch.randn(50, 2, device=device)
    dt = torch.full((50,), 0.1, device=device)
    without = evolve(states, dt).states
    dt[20] = math.nan
    result = evolve(states, dt).states
    assert bitwise_equal(result[:20], without[:20])
    assert result[20:].isnan().all()


@pytest.mark.parametrize("score", [s for s in SCORES if not s.whole_window], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_evolves_as_in_the_whole(device, dtype, score):
    states = torch.randn(2, 700, 2).to(dtype).to(device)
    whole = evolve(states, 0.1, score=score, reduction=mean_of(score), steps=3)
    for length in (1, 2, 15, 17, 33, 100, 513, 699):
        part = evolve(states[:, :length], 0.1, score=score, reduction=mean_of(score), steps=3)
        for got, wanted in zip(part, whole, strict=True):
            assert bitwise_equal(got, wanted[:, :length]), length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_in_float32(device, dtype):
    states = torch.randn(2, 60, 2).to(dtype).to(device)
    half = evolve(states, 0.1, steps=3, reduction="mean")
    wide = evolve(states.float(), 0.1, steps=3, reduction="mean")
    assert half.states.dtype == half.strength.dtype == dtype
    assert torch.equal(half.states, wide.states.to(dtype))
    assert torch.equal(half.degree, wide.degree)


def test_layouts(device):
    states, dt = torch.randn(3, 37, 2, device=device), torch.rand(3, 37, 1, device=device)
    plain = evolve(states, dt[..., 0], skip=dt[..., 0])
    for name, view in layouts(states).items():
        assert all(map(bitwise_equal, evolve(view, dt[..., 0], skip=dt[..., 0]), plain)), name
    for name, view in layouts(dt).items():
        assert all(map(bitwise_equal, evolve(states, view[..., 0], skip=dt[..., 0]), plain)), name
        assert all(map(bitwise_equal, evolve(states, dt[..., 0], skip=view[..., 0]), plain)), name


@pytest.mark.parametrize("shape", [(0, 5, 2), (3, 0, 5, 2), (2, 0, 2), (0, 2)], ids=str)
def test_empty_inputs(device, shape):
    states = torch.randn(shape, device=device)
    result = evolve(states, torch.rand(shape[:-1], device=device), skip=0.1, steps=2)
    assert result.states.shape == shape
    assert result.strength.shape == result.degree.shape == shape[:-1]


def test_inputs_are_not_changed(device):
    states, dt = torch.randn(2, 33, 2, device=device), torch.rand(2, 33, device=device)
    before = states.clone(), dt.clone()
    result = evolve(states, dt, skip=dt, steps=2)
    assert torch.equal(states, before[0]) and torch.equal(dt, before[1])
    assert result.states.data_ptr() != states.data_ptr()


def random_case(seed: int):
    """Inputs and options of `evolve`, drawn from `seed` alone."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch = draw.choice([(), (1,), (3,), (2, 3), (40,), (0,)])
    length = draw.choice([0, 1, 2, 7, 16, 63, 65, 128, draw.randrange(300)])
    steps = draw.choice([1, 1, 2, 3])
    tokens = (*batch, length)

    def per_token(most=1.0):
        shape = draw.choice([(), (length,), tokens, (steps, *tokens)])
        return draw.choice([most * draw.random(), most * torch.rand(shape, dtype=torch.float64)])

    if draw.random() < 0.6:
        sigma = draw.choice([0.5, -1.0, 1.4, torch.randn(batch, dtype=torch.float64)])
        score = Threshold(
            sigma, draw.choice(["prefix", "row"]), shrinkage=draw.choice(["hard", "hard", "soft"])
        )
    elif draw.random() < 0.5:
        score = Sparsemax(draw.choice([1.0, torch.randn(batch, dtype=torch.float64)]))
    else:
        alpha = draw.choice([0.5, torch.randn(batch, dtype=torch.float64)])
        score = InverseGate(alpha, draw.choice([1e-3, 0.1]), draw.choice([0.0, 1.0]))
    options = {
        "causal": draw.random() < 0.7,
        "score": score,
        "radius": draw.choice(RADII),
        "skip": draw.choice([None, per_token()]),
        "reduction": mean_of(score),
        "steps": steps,
    }
    if draw.random() < 0.4:
        options["lengths"] = torch.randint(0, length + 1, draw.choice([(), batch]))
    # Longer steps drive states so far apart that rounding alone moves pairs over the threshold.
    return torch.randn(*tokens, 2, dtype=torch.float64), per_token(0.1), options


@pytest.mark.parametrize("seed", range(SWEEP_CASES))
def test_random_sweep(device, seed):
    states, dt, options = random_case(seed)
    check(device, states, dt, **options)
