"""The kernels of `interact` against the float64 truth."""

import math
import os
import random

import pytest
import torch
from assertions import assert_interaction_close
from inputs import (
    EXTREME_SCORES,
    REDUCED_SCORES,
    SCORES,
    STATES,
    layouts,
    mean_of,
    score_on,
)

from qflux_kernels import InverseGate, Sparsemax, Threshold, interact

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 257, 600]
SWEEP_CASES = 2000 if os.environ.get("QFLUX_LONG") else 60

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check(device, states, keys=None, values=None, **options):
    """Run the kernels on `device`, compare with the truth, return the result."""
    on_device = [None if t is None else t.to(device) for t in (states, keys, values)]
    moved = dict(options)
    if "score" in options:
        moved["score"] = score_on(device, options["score"])
    if "lengths" in options:
        moved["lengths"] = options["lengths"].to(device)
    result = interact(*on_device, **moved)
    assert result.context.device.type == torch.device(device).type
    assert_interaction_close(result, states, keys, values, **options)
    return result


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_states_alone(device, length, dtype, causal, score):
    check(device, torch.randn(2, length, 2).to(dtype), causal=causal, score=score)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_tokens(device, dtype, causal, score):
    check(device, torch.randn(1000, 2, dtype=dtype), causal=causal, score=score)


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_more_tokens(device, score):
    check(device, torch.randn(4096, 2), score=score)
    check(device, torch.randn(3001, 2, dtype=torch.float64), score=score)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [None, 1, 2, 3, 4, 8, 17, 64])
@pytest.mark.parametrize(
    "rows, keys", [(40, 40), (17, 90), (90, 17), (8, 5), (1, 33), (33, 1), (5, 0), (0, 5)]
)
def test_keys_and_values(device, rows, keys, depth, dtype, causal, score):
    states, sources = torch.randn(2, rows, 2).to(dtype), torch.randn(2, keys, 2).to(dtype)
    values = None if depth is None else torch.randn(2, keys, depth).to(dtype)
    check(device, states, sources, values, causal=causal, score=score)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows, keys", [(1, 3000), (700, 2500), (2500, 700)])
def test_more_than_one_tile_of_keys_and_values(device, rows, keys, dtype, score):
    states, sources = torch.randn(rows, 2, dtype=dtype), torch.randn(keys, 2, dtype=dtype)
    check(device, states, sources, torch.randn(keys, 5, dtype=dtype), score=score)
    check(device, states, sources, score=score)


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_values_for_the_states_themselves(device, score):
    states = torch.randn(3, 77, 2)
    check(device, states, values=torch.randn(3, 77, 6), score=score)
    same = check(device, states, keys=states, score=score)
    alone = check(device, states, score=score)
    assert torch.equal(same.degree, alone.degree)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean(device, dtype, causal, score):
    options = {"causal": causal, "score": score, "reduction": mean_of(score)}
    states = torch.randn(2, 50, 2).to(dtype)
    check(device, states, **options)
    keys, values = torch.randn(2, 20, 2).to(dtype), torch.randn(2, 20, 3).to(dtype)
    check(device, states, keys, values, **options)
    check(device, states, lengths=torch.tensor([13, 0]), **options)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_lengths(device, integer, dtype, causal, score):
    states = torch.randn(3, 2, 40, 2).to(dtype)
    values = torch.randn(3, 2, 40, 3).to(dtype)
    lengths = torch.tensor([[0, 1], [40, 39], [17, 2]], dtype=integer)
    for given in (lengths, lengths[:, :1], lengths[2, 0]):
        for used in (None, values):
            result = check(device, states, None, used, lengths=given, causal=causal, score=score)
            padding = torch.arange(40) >= given.expand(3, 2)[..., None]
            for output in result:
                assert not output.cpu()[padding].any(), "padding rows must be zero"


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_padding_is_never_seen(device, score, value):
    states, values = torch.randn(2, 40, 2), torch.randn(2, 40, 3)
    lengths = torch.tensor([23, 37])
    clean = check(device, states, None, values, lengths=lengths, score=score)
    for b, length in enumerate(lengths.tolist()):
        states[b, length:], values[b, length:] = value, value
    dirty = check(device, states, None, values, lengths=lengths, score=score)
    assert all(bitwise_equal(a, b) for a, b in zip(clean, dirty, strict=True))
    short = interact(states[1, :37].to(device), values=values[1, :37].to(device), score=score)
    for padded, alone in zip(dirty, short, strict=True):
        assert bitwise_equal(padded[1, :37], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_of_each_cylinder(device, dtype):
    states = torch.randn(2, 3, 60, 2).to(dtype)
    sigma = torch.tensor([0.0, 0.5, 1.4])
    check(device, states, score=Threshold(sigma))
    check(device, states, score=Threshold(sigma.double(), "row"))
    alpha, min_gate = torch.randn(2, 1), torch.tensor([0.0, 1.0, 2.5])
    check(device, states, score=InverseGate(alpha, 1e-3, min_gate))
    check(device, states, score=InverseGate(0.2, 1e-3, min_gate))
    check(device, states, score=InverseGate(alpha, 1e-3, 0.5))


@pytest.mark.parametrize("score", EXTREME_SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", STATES)
def test_adversarial_states(device, kind, dtype, causal, score):
    for length in (2, 67, 300):
        check(device, STATES[kind](length).to(dtype), causal=causal, score=score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gate_without_softening(device, dtype):
    """eps = 0 makes the weight the sign of S, and S = 0 has none."""
    states = torch.randn(50, 2, dtype=dtype)
    check(device, states, score=InverseGate(0.5, 0.0))
    states[20] = 0.0
    result = check(device, states, score=InverseGate(0.5, 0.0))
    assert result.context[20:].isnan().all() and result.context[:20].isfinite().all()


def test_equal_states_have_no_variance(device):
    """With eps = 0 the threshold is the mean itself, and every pair is at it and kept."""
    for dtype in (torch.float32, torch.float64):
        states = torch.full((100, 2), 0.5, dtype=dtype, device=device)
        degree = interact(states, score=Threshold(0.5, eps=0.0)).degree
        assert torch.equal(degree.cpu(), torch.arange(1, 101, dtype=torch.int32))


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, dtype, score):
    states, keys = torch.randn(3, 37, 2).to(dtype), torch.randn(3, 37, 2).to(dtype)
    values = torch.randn(3, 37, 5).to(dtype)
    given = tuple(t.to(device) for t in (states, keys, values))
    plain, alone = interact(*given, score=score), interact(given[0], score=score)
    for position in range(3):
        for name, view in layouts(given[position]).items():
            strided = list(given)
            strided[position] = view
            result = interact(*strided, score=score)
            assert all(map(bitwise_equal, result, plain)), f"argument {position}: {name}"
            if position == 0:
                result = interact(view, score=score)
                assert all(map(bitwise_equal, result, alone)), name


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_expanded_inputs(device, score):
    states = torch.randn(1, 37, 2).expand(4, 37, 2)
    check(device, states, score=score)
    keys, values = torch.randn(2, 1, 20, 2).expand(2, 3, 20, 2), torch.randn(3, 1, 4)
    check(device, states[0], keys, values.expand(3, 20, 4), score=score)
    check(device, torch.randn(1, 2).expand(37, 2), score=score)
    check(device, torch.randn(37, 1).expand(37, 2), score=score)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 2), (3, 0, 5, 2), (2, 0, 2), (0, 0, 2)], ids=str)
def test_empty_inputs(device, shape, score):
    states = torch.randn(shape)
    result = check(device, states, score=score)
    assert result.context.shape == shape
    check(device, states, values=torch.randn(*shape[:-1], 7), score=score)


def test_batch_shapes(device):
    check(device, torch.randn(7, 2))
    check(device, torch.randn(2, 3, 2, 7, 2))
    check(device, torch.randn(2, 1, 7, 2), torch.randn(3, 9, 2), torch.randn(2, 3, 9, 4))
    check(device, torch.randn(300, 3, 2))


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_states(device, dtype, value, score):
    """They reach the rows that can see them; rows before them do not change by a bit."""
    length = 70
    clean = torch.randn(2, length, 2).to(dtype)
    values = torch.randn(2, length, 3).to(dtype)
    for place in (0, 1, 33, 69):
        states = clean.clone()
        states[0, place, place % 2] = value
        for used in (None, values):
            without = check(device, clean, None, used, score=score)
            result = check(device, states, None, used, score=score)
            assert bitwise_equal(result.context[1], without.context[1]), "another sequence changed"
            if not score.whole_window:
                for got, wanted in zip(result, without, strict=True):
                    assert bitwise_equal(got[0, :place], wanted[0, :place]), f"before {place}"
            check(device, states, None, used, score=score, causal=False)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_rows_and_keys(device, value, score):
    states, keys, values = torch.randn(40, 2), torch.randn(50, 2), torch.randn(50, 5)
    without = check(device, states, keys, values, score=score)
    row = states.clone()
    row[7, 0] = value
    result = check(device, row, keys, values, score=score)
    others = torch.arange(40) != 7
    assert bitwise_equal(result.context[others], without.context[others])
    column = values.clone()
    column[30, 2] = value
    result = check(device, states, keys, column, score=score)
    others = torch.arange(5) != 2
    assert bitwise_equal(result.context[:, others], without.context[:, others])
    assert bitwise_equal(result.context[:20], without.context[:20])
    assert bitwise_equal(result.strength, without.strength)
    source = keys.clone()
    source[30] = value
    check(device, states, source, values, score=score)


@pytest.mark.parametrize(
    "score, reduction", [s for s in REDUCED_SCORES if not s[0].whole_window], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_gives_the_prefix(device, dtype, reduction, score):
    """A causal row depends on nothing after it, to the last bit."""
    states = torch.randn(2, 700, 2).to(dtype).to(device)
    values = torch.randn(2, 700, 3).to(dtype).to(device)
    for used in (None, values):
        whole = interact(states, values=used, score=score, reduction=reduction)
        for length in (1, 2, 15, 16, 17, 33, 100, 511, 513, 699):
            some = None if used is None else used[:, :length]
            part = interact(states[:, :length], values=some, score=score, reduction=reduction)
            for got, wanted in zip(part, whole, strict=True):
                assert bitwise_equal(got, wanted[:, :length]), length


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_a_sequence_does_not_depend_on_its_batch(device, score):
    states = torch.randn(37, 50, 2, device=device)
    together = interact(states, score=score)
    for b in (0, 17, 36):
        alone = interact(states[b], score=score)
        for got, wanted in zip(together, alone, strict=True):
            assert bitwise_equal(got[b], wanted)


def random_case(seed: int):
    """Inputs and options of `interact`, drawn from `seed` alone."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice(DTYPES)
    batch = draw.choice([(), (1,), (3,), (2, 3), (40,), (0,)])
    rows = draw.choice([0, 1, 2, 7, 8, 9, 16, 63, 65, 128, 200, draw.randrange(300)])
    keys = draw.choice([None, rows, 1, 12, 70, draw.randrange(300)])
    depth = draw.choice([None, 1, 2, 3, 4, 6, 8, 16, 20])
    scale = draw.choice([0.1, 1.0, 1.0, 3.0])

    def points(length, width):
        return (scale * torch.randn(*batch, length, width)).to(dtype)

    def coefficient(*choices):
        kind = draw.randrange(4)
        if kind == 0 and batch:
            return torch.randn(batch)
        if kind == 1 and batch:
            return torch.randn(batch[-1])
        return draw.choice(choices)

    if draw.random() < 0.6:
        score = Threshold(
            coefficient(0.5, 0.0, 1.4, -1.0),
            draw.choice(["prefix", "row"]),
            draw.choice([1e-6, 1e-3, 0.1]),
        )
    elif draw.random() < 0.5:
        score = Sparsemax(coefficient(1.0, 0.02, 20.0))
    else:
        score = InverseGate(
            coefficient(0.5, 0.0, -2.0), draw.choice([1e-5, 0.1]), coefficient(0.0, 1.0, 5.0)
        )
    options = {
        "causal": draw.random() < 0.7,
        "score": score,
        "reduction": draw.choice(["sum", mean_of(score)]),
    }
    if keys in (None, rows) and draw.random() < 0.4:
        options["lengths"] = torch.randint(0, rows + 1, draw.choice([(), batch]))
    sources = None if keys is None else points(keys, 2)
    values = None if depth is None else points(rows if keys is None else keys, depth)
    return points(rows, 2), sources, values, options


@pytest.mark.parametrize("seed", range(SWEEP_CASES))
def test_random_sweep(device, seed):
    states, keys, values, options = random_case(seed)
    check(device, states, keys, values, **options)


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("exponent", [11, 14, 20])
def test_products_coarser_than_a_weight_keep_the_largest_key(exponent, length):
    """A bound or a threshold that is rounded up to the largest pair must not drop it."""
    for seed in range(4):
        torch.manual_seed(seed)
        states = torch.randn(length, 2) * 2.0**exponent
        found = interact(states, score=Sparsemax(1.0), algorithm="dense")
        assert (found.degree > 0).all()
        torch.testing.assert_close(found.strength, torch.ones(length), rtol=0.1, atol=0.0)
        products = (states.double() @ states.double().mT).tril()
        products = products.masked_fill(torch.ones_like(products).triu(1).bool(), -torch.inf)
        first, second = products.topk(2).values.unbind(-1)
        clear = (first - second) > 64 * torch.finfo(torch.float32).eps * first.abs() + 2
        largest = states[products.argmax(-1)]
        apart = (found.context - largest)[clear].norm(dim=-1)
        assert (apart <= 0.1 * largest[clear].norm(dim=-1)).all()
