"""Decoding against a cache gives what the whole sequence gives, however it came."""

import re
import sys
from pathlib import Path

import pytest
import torch

from qflux_kernels import (
    EvolutionCache,
    InteractionCache,
    InverseGate,
    Radius,
    Sparsemax,
    Threshold,
    evolve,
    interact,
    reference,
)
from tests.assertions import assert_interaction_close

BATCH, WIDTH, LENGTH = (2, 3), 5, 150
PER_CYLINDER = torch.tensor([0.1, 0.7, 1.4])
SCORES = {
    "hard": Threshold(PER_CYLINDER),
    "soft": Threshold(PER_CYLINDER.expand(2, 3), shrinkage="soft"),
    "gate": InverseGate(PER_CYLINDER, min_gate=0.6),
    "sparsemax": Sparsemax(torch.tensor([[0.1, 1.0, 9.0], [3.0, 0.0, 0.5]])),
    "float": Threshold(0.5),
}


@pytest.fixture(params=SCORES)
def score(request):
    return SCORES[request.param]


def points(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def inputs(dtype=torch.float64, length=LENGTH):
    return (points(*BATCH, length, width, dtype=dtype) for width in (2, 2, WIDTH))


def make(score, dtype=torch.float64, **options):
    options = {"batch_shape": BATCH, "value_dim": WIDTH} | options
    return InteractionCache(score=score, dtype=dtype, **options)


def past_bytes(score, capacity, wide=8):
    """What thresholds have beside the tokens, on a CPU and in float64: an index of each 512 of
    them and, if by statistics, six numbers, else 208 of `wide` bytes for all."""
    kind = score.kind
    if not kind.thresholded:
        return 0
    tiles, unit = capacity // 512, torch.ops.qflux_kernels.cache_index_unit(True, WIDTH, 512)
    return 6 * (tiles * unit + (208 * wide if kind.mass else 48 * (tiles + 2)))


def draw(low, high):
    return int(torch.randint(low, high, ()))


def close(found, expected, first=0, last=None):
    rows = slice(first, last)
    assert torch.equal(found.degree, expected.degree[..., rows])
    options = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.context, expected.context[..., rows, :], **options)
    torch.testing.assert_close(found.strength, expected.strength[..., rows], **options)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_any_pieces_truncations_and_beams_give_the_whole(score, reduction):
    if isinstance(score, Sparsemax) and reduction == "mean":
        pytest.skip("refused: its weights are a mean already")
    states, keys, values = inputs()
    full = interact(states, keys, values, score=score, reduction=reduction)
    cache = make(score, reduction=reduction)
    for trial in range(40):
        start = len(cache)
        if trial % 7 == 6:
            cache.truncate(draw(0, start + 1))
            continue
        if trial % 5 == 4:
            index = torch.tensor([1, 0])
            cache.reorder(index)
            states, keys, values = (t[index] for t in (states, keys, values))
            full = type(full)(*(t[index] for t in full))
        end = min(LENGTH, start + draw(0, 20))
        cache.append(keys[..., start:end, :], values[..., start:end, :])
        assert len(cache) == end
        # The last positions, not only the new ones.
        first = draw(0, end + 1)
        close(cache.attend(states[..., first:end, :]), full, first, end)


def test_the_first_dimension_may_grow_and_shrink(score):
    states, keys, values = inputs()
    cache = make(score)
    cache.append(keys[..., :9, :], values[..., :9, :])
    index = torch.tensor([1, 1, 0, 1])
    cache.reorder(index)
    assert cache.batch_shape == (4, 3)
    full = interact(states, keys, values, score=score)
    found = cache.attend(states[index, :, 4:9])
    close(found, type(full)(*(t[index] for t in full)), 4, 9)
    cache.reorder(index[:0])
    assert cache.attend(points(0, 3, 2, 2)).context.shape == (0, 3, 2, WIDTH)


def test_adversarial_points_keep_the_degrees():
    """Equal, collinear and huge states, and lengths around tiles."""
    for score in (Threshold(0.0), Threshold(1.0, shrinkage="soft"), Sparsemax(2.0)):
        for kind in ("equal", "line", "huge"):
            keys = points(2, 260, 2)
            if kind == "equal":
                keys = keys[:, :1].expand(2, 260, 2)
            elif kind == "line":
                keys = keys * torch.tensor([1.0, 0.0])
            else:
                keys = keys * 1e6
            full = interact(keys, score=score)
            cache = InteractionCache(score=score, batch_shape=(2,), dtype=torch.float64)
            for start, end in ((0, 127), (127, 128), (128, 129), (129, 256), (256, 260)):
                cache.append(keys[:, start:end])
                found = cache.attend(keys[:, start:end])
                assert torch.equal(found.degree, full.degree[:, start:end])
                scale = full.context.abs().amax().item()
                expected = full.context[:, start:end]
                torch.testing.assert_close(found.context, expected, rtol=0, atol=1e-10 * scale)


def test_float32_is_judged_as_the_operator_is(score):
    states, keys, values = inputs(torch.float32)
    cache = make(score, torch.float32)
    cache.append(keys[..., :-7, :], values[..., :-7, :])
    cache.append(keys[..., -7:, :], values[..., -7:, :])
    found = cache.attend(states)
    assert_interaction_close(found, states, keys=keys, values=values, score=score)


def test_not_a_number_reaches_later_rows_only():
    keys = points(1, 12, 2)
    keys[0, 5, 0] = float("nan")
    cache = InteractionCache(batch_shape=(1,), dtype=torch.float64)
    for i in range(12):
        cache.append(keys[:, i : i + 1])
        found = cache.attend(keys[:, i : i + 1].nan_to_num())
        assert bool(found.context.isnan().all()) == (i >= 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_how_a_cache_stores(score, dtype):
    states, keys, values = inputs(dtype, 40)
    cache = make(score, dtype)
    full = interact(states, keys, values, score=score)
    for i in range(0, 40, 8):
        cache.append(keys[..., i : i + 8, :], values[..., i : i + 8, :])
        found = cache.attend(states[..., i : i + 8, :])
        assert found.context.dtype == found.strength.dtype == dtype
        assert torch.equal(found.degree, full.degree[..., i : i + 8])
        torch.testing.assert_close(found.context, full.context[..., i : i + 8, :])
    assert cache.nbytes == 64 * 6 * (2 + WIDTH) * 2 + past_bytes(score, 64, wide=4)


def test_padding_is_seen_by_nobody(score):
    padding = torch.tensor([6, 2])
    states, keys, values = inputs(length=30)
    cache = make(score, padding=padding)
    found = []
    for start, end in ((0, 4), (4, 9), (9, 30)):
        cache.append(keys[..., start:end, :], values[..., start:end, :])
        found.append(cache.attend(states[..., start:end, :]))
    cache.truncate(20)
    cache.reorder(torch.tensor([1, 0]))
    edited = cache.attend(states[[1, 0], :, 1:20])
    context = torch.cat([part.context for part in found], -2)
    degree = torch.cat([part.degree for part in found], -1)
    for b, first in enumerate(padding.tolist()):
        one = {name: getattr(score, name) for name in score.per_sequence}
        one = {n: v[b] if torch.is_tensor(v) and v.dim() == 2 else v for n, v in one.items()}
        own = type(score)(**(vars(score) | one))
        alone = interact(states[b, :, first:], keys[b, :, first:], values[b, :, first:], score=own)
        torch.testing.assert_close(context[b, :, first:], alone.context, rtol=1e-10, atol=1e-10)
        assert torch.equal(degree[b, :, first:], alone.degree)
        assert not context[b, :, :first].any() and not degree[b, :, :first].any()
        expected = degree[b, :, 1:20]
        assert torch.equal(edited.degree[1 - b], expected)


def test_buffers_double_and_are_read_where_they_lie(score):
    cache = make(score)
    keys, values = points(*BATCH, 1, 2), points(*BATCH, 1, WIDTH)
    grown, capacity = 0, cache.capacity
    for _ in range(1000):
        cache.append(keys, values)
        grown += cache.capacity != capacity
        capacity = cache.capacity
    assert grown == 5 and capacity == 1024
    assert cache.nbytes == 6 * 1024 * (2 + WIDTH) * 8 + past_bytes(score, 1024)
    assert cache.keys.data_ptr() == cache.keys[..., :5, :].data_ptr()
    roomy = make(score, capacity=1000)
    before = roomy.nbytes
    roomy.append(keys.expand(*BATCH, 1000, 2), values.expand(*BATCH, 1000, WIDTH))
    assert roomy.nbytes == before == 6 * 1000 * (2 + WIDTH) * 8 + past_bytes(score, 1000)


def advised(tensor):
    """Whether the system was asked for large pages for the middle of a tensor's memory."""
    at, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) <= at < int(head[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the memory is not mapped")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the advice is one of Linux")
def test_a_long_cache_asks_for_large_pages(monkeypatch):
    ops, asked = torch.ops.qflux_kernels, []
    ask = ops.cache_pages
    monkeypatch.setattr(ops, "cache_pages", lambda memory: (asked.append(memory), ask(memory)))
    # Not whether memory of a short one was advised: it may be what a long one had before.
    InteractionCache(score=Sparsemax(), value_dim=4, capacity=1 << 10)
    assert not asked
    large = InteractionCache(score=Sparsemax(), value_dim=4, capacity=1 << 20)
    assert asked and advised(large.values._base)
    large.append(torch.ones(3, 2), torch.ones(3, 4))
    assert torch.equal(large.values, torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="memory must be contiguous"):
        torch.ops.qflux_kernels.cache_pages(torch.ones(4, 4).mT[1:])


def test_no_gradient_is_recorded(score):
    states, keys, values = (t.requires_grad_() for t in inputs(length=4))
    cache = make(score)
    cache.append(keys, values)
    assert not any(part.requires_grad for part in cache.attend(states)[:2])
    assert not cache.keys.requires_grad


def test_empty_pieces_and_batches(score):
    cache = make(score)
    states, keys, values = inputs(length=0)
    cache.append(keys, values)
    assert len(cache) == 0
    found = cache.attend(states)
    assert found.context.shape == (*BATCH, 0, WIDTH) and found.degree.shape == (*BATCH, 0)


def test_bad_input_is_named_and_leaves_the_cache_as_it_was(score):
    cache = make(score)
    states, keys, values = inputs(length=8)
    cache.append(keys, values)
    full, before = cache.attend(states), cache.nbytes
    wide = torch.zeros((), dtype=torch.float64)
    bad = [
        (lambda: cache.append(keys.float(), values), TypeError, "keys must be torch.float64"),
        (lambda: cache.append(keys, values.float()), TypeError, "values must be torch.float64"),
        (lambda: cache.append(keys, values[..., 1:]), ValueError, "values must have shape"),
        (lambda: cache.append(keys[..., :1], values), ValueError, "keys must have shape"),
        (lambda: cache.append(keys[0], values[0]), ValueError, "keys must have shape"),
        (lambda: cache.append(keys, values[..., 1:, :]), ValueError, "one row for each"),
        (lambda: cache.append(keys, None), TypeError, "values must be a tensor"),
        (lambda: cache.append(keys.to("meta"), values), ValueError, "keys must be on cpu"),
        (lambda: cache.append(wide.expand(*BATCH, 2**44, 2), wide.expand(*BATCH, 2**44, WIDTH)),
         ValueError, "the cache cannot grow to 17592186044424 tokens"),
        (lambda: cache.attend(states[:1]), ValueError, "states must have shape"),
        (lambda: cache.attend(points(*BATCH, 9, 2)), ValueError, "at most as many as the 8"),
        (lambda: cache.truncate(9), ValueError, "length must be an integer in"),
        (lambda: cache.truncate(-1), ValueError, "length must be an integer in"),
        (lambda: cache.reorder(torch.tensor([0, 2])), ValueError, "index must lie in"),
        (lambda: cache.reorder(torch.tensor([0.0])), TypeError, "index must be an integer"),
        (lambda: cache.reorder(torch.tensor([[0]])), ValueError, "index must have one dim"),
    ]  # fmt: skip
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
        assert len(cache) == 8 and cache.nbytes == before
    close(cache.attend(states), full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": Threshold(stats="row")}, "stats='row'"),
        ({"score": 0.5}, "score must be a Threshold"),
        ({"score": Threshold(torch.ones(4))}, "must broadcast to"),
        ({"score": Sparsemax(), "reduction": "mean"}, "reduction must be 'sum'"),
        ({"batch_shape": 3}, "batch_shape must be a tuple"),
        ({"batch_shape": (2, -1)}, "batch_shape must be an integer >= 0"),
        ({"value_dim": 0}, "value_dim must be an integer >= 1"),
        ({"dtype": torch.int64}, "dtype must be float16"),
        ({"capacity": -1}, "capacity must be an integer >= 0"),
        ({"padding": torch.tensor([0, 1, 2])}, "padding must have shape"),
        ({"padding": torch.tensor([-1, 0])}, "padding must be >= 0"),
        ({"padding": [0, 1]}, "padding must be an integer tensor"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        InteractionCache(**({"batch_shape": (2, 3), "value_dim": 4} | options))
    if "value_dim" not in options:
        with pytest.raises((TypeError, ValueError), match=message):
            EvolutionCache(**({"batch_shape": (2, 3)} | options))


@pytest.mark.parametrize("radius", [None, Radius(rate=0.05, reversion=0.1)])
@pytest.mark.parametrize("steps", [1, 3])
def test_evolving_tokens_one_after_another_is_evolving_all(score, steps, radius):
    states = points(*BATCH, LENGTH, 2)
    dt = 0.01 * torch.rand(steps, *BATCH, LENGTH, dtype=torch.float64)
    skip = torch.rand(3, 1, dtype=torch.float64)
    for reduction in ("sum",) if isinstance(score, Sparsemax) else ("sum", "mean"):
        options = {"score": score, "radius": radius, "steps": steps, "reduction": reduction}
        full = evolve(states, dt, skip=skip, **options)
        true = reference.evolve(states, dt, skip=skip, **options)
        torch.testing.assert_close(full.states, true.states, rtol=1e-9, atol=1e-9)
        cache = EvolutionCache(batch_shape=BATCH, dtype=torch.float64, **options)
        for trial in range(20):
            start = len(cache)
            if trial % 6 == 5:
                cache.truncate(draw(0, start + 1))
                continue
            end = min(LENGTH, start + draw(0, 25))
            found = cache.advance(states[..., start:end, :], dt[..., start:end], skip)
            close = {"rtol": 1e-10, "atol": 1e-10}
            torch.testing.assert_close(found.states, full.states[..., start:end, :], **close)
            torch.testing.assert_close(found.strength, full.strength[..., start:end], **close)
            assert torch.equal(found.degree, full.degree[..., start:end])
        index = torch.tensor([1, 0])
        cache.reorder(index)
        start = len(cache)
        if start < LENGTH:
            found = cache.advance(states[index, :, start:], dt[:, index, :, start:], skip)
            torch.testing.assert_close(
                found.states, full.states[index, :, start:], rtol=1e-10, atol=1e-10
            )


def test_evolving_costs_sixteen_bytes_and_padding_stays():
    cache = EvolutionCache(batch_shape=BATCH, capacity=100, padding=torch.tensor([3, 0]))
    assert cache.nbytes == 6 * 100 * 16 + 2 * past_bytes(Threshold(), 100)
    states = points(*BATCH, 10, 2, dtype=torch.float32)
    found = torch.cat(
        [cache.advance(states[..., i : i + 2, :], 0.1).states for i in range(0, 10, 2)], -2
    )
    assert torch.equal(found[0, :, :3], states[0, :, :3])
    torch.testing.assert_close(found[0, :, 3:], evolve(states[0, :, 3:], 0.1).states)
    torch.testing.assert_close(found[1], evolve(states[1], 0.1).states)


def test_a_bad_step_leaves_an_evolution_as_it_was():
    cache = EvolutionCache(batch_shape=(2,), dtype=torch.float64, steps=2)
    states = points(2, 9, 2)
    cache.advance(states[:, :5], 0.1)
    for call, message in (
        (lambda: cache.advance(states[:1], 0.1), "states must have shape"),
        (lambda: cache.advance(states.float(), 0.1), "states must be torch.float64"),
        (lambda: cache.advance(states[:, 5:], torch.ones(7, dtype=torch.float64)), "dt must"),
        (lambda: cache.advance(states[:, 5:], 0.1, "x"), "skip must"),
        (lambda: cache.reorder(torch.tensor([2])), "index must lie in"),
        (lambda: cache.truncate(6), "length must be"),
        (lambda: EvolutionCache(radius=1.0), "radius must be a Radius"),
        (lambda: EvolutionCache(steps=0), "steps must be"),
        (lambda: EvolutionCache(value_dim=2), "value_dim must be None"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
        assert len(cache) == 5 and all(len(part) == 5 for part in cache.caches)
    found = cache.advance(states[:, 5:], 0.1)
    full = evolve(states, 0.1, steps=2)
    torch.testing.assert_close(found.states, full.states[:, 5:], rtol=1e-10, atol=1e-10)


def test_a_step_that_fails_half_way_leaves_an_evolution_as_it_was(monkeypatch):
    cache = EvolutionCache(batch_shape=(2,), dtype=torch.float64, steps=2)
    states = points(2, 9, 2)
    cache.advance(states[:, :5], 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(cache.caches[3], "append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.advance(states[:, 5:], 0.1)
    assert all(len(part) == 5 for part in cache.caches)
