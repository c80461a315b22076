"""The index of a cache: what few rows keep of many keys, by trees, is what the pairs say."""

import itertools
import math

import pytest
import torch
from inputs import SWEEP_STATES

import qflux_kernels.cache as cache_module
import qflux_kernels.past as past_module
from qflux_kernels import (
    EvolutionCache,
    InteractionCache,
    InverseGate,
    Sparsemax,
    Threshold,
    evolve,
    interact,
)
from tests.assertions import assert_interaction_close

F64 = torch.float64
BATCH, WIDTH, LENGTH = (2, 3), 3, 5200
SELECTIVE = torch.tensor([0.1, 0.7, 1.4])
SCORES = {
    "hard": Threshold(SELECTIVE),
    "soft": Threshold(SELECTIVE.expand(2, 3), shrinkage="soft"),
    "sparsemax": Sparsemax(torch.tensor([[0.01, 1.0, 20.0], [3.0, -0.5, 0.1]])),
}
# Around the ends of runs, and of what is kept back from them.
ENDS = (512, 513, 576, 577, 2112, 2623, 4224, 5200)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_chunks")


@pytest.fixture
def small_chunks(monkeypatch):
    """Runs of 512 tokens, 1,024 and so on, so that a few thousand have all there is to have."""
    monkeypatch.setattr(past_module, "CHUNK", 512)
    for name in ("MANY_ROWS_FROM", "MANY_MASSES_FROM"):
        monkeypatch.setattr(past_module, name, 0)


@pytest.fixture
def by_index(monkeypatch):
    """Meanwhile no call of a cache may leave its rows to `interact`."""
    monkeypatch.setattr(cache_module, "interact", None)


@pytest.fixture(params=SCORES)
def score(request):
    return SCORES[request.param]


def draw(low, high):
    return int(torch.randint(low, high, ()))


def tokens(length=LENGTH, dtype=F64):
    return tuple(torch.randn(*BATCH, length, width).to(dtype) for width in (2, 2, WIDTH))


def make(score, **options):
    options = {"batch_shape": BATCH, "value_dim": WIDTH, "dtype": F64} | options
    return InteractionCache(score=score, **options)


def rows_of(states, keys, values, score, start, end):
    """Rows start .. end - 1 of a sequence, by every pair."""
    values = None if values is None else values[..., :end, :]
    return interact(
        states[..., start:end, :], keys[..., :end, :], values, score=score, algorithm="dense"
    )


def close(found, expected):
    assert torch.equal(found.degree, expected.degree)
    options = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.context, expected.context, **options)
    torch.testing.assert_close(found.strength, expected.strength, **options)


def test_any_pieces_truncations_and_beams_give_the_whole(by_index, score):
    states, keys, values = tokens()
    cache, most = make(score), 0
    for trial in range(24):
        start = len(cache)
        if trial % 6 == 5:
            cache.truncate(draw(max(0, start - 2500), start + 1))
            continue
        if trial % 10 == 8:
            cache.reorder(torch.tensor([1, 0]))
            states, keys, values = (t.flip(0) for t in (states, keys, values))
            score = type(score)(**{
                name: value.flip(0) if torch.is_tensor(value) and value.dim() == 2 else value
                for name, value in vars(score).items()
            })  # fmt: skip
        end = min(LENGTH, start + (draw(1, 1200) if trial % 3 else draw(1, 4)))
        cache.append(keys[..., start:end, :], values[..., start:end, :])
        rows = min(draw(1, 9), end)
        close(
            cache.attend(states[..., end - rows : end, :]),
            rows_of(states, keys, values, score, end - rows, end),
        )
        most = max(most, cache._past._indexed)
    assert most >= 2048


def test_one_token_after_another_past_the_ends_of_runs(by_index, score):
    states, keys, values = tokens()
    cache = make(score)
    for end in ENDS:
        before = len(cache)
        cache.append(keys[..., before : end - 3, :], values[..., before : end - 3, :])
        for at in range(max(len(cache), end - 3), end):
            cache.append(keys[..., at : at + 1, :], values[..., at : at + 1, :])
            found = cache.attend(states[..., at : at + 1, :])
            if at == end - 1:
                close(found, rows_of(states, keys, values, score, at, end))
    assert cache._past._runs(cache._past._indexed) == [4096, 1024]


def test_many_rows_behind_a_long_past(by_index, score):
    """A piece of a prompt: most of what its rows see is indexed, the rest are its own tokens."""
    states, keys, values = tokens(3400)
    cache = make(score, reduction="sum" if isinstance(score, Sparsemax) else "mean")
    cache.append(keys[..., :3000, :], values[..., :3000, :])
    cache.attend(states[..., 2990:3000, :])
    cache.append(keys[..., 3000:, :], values[..., 3000:, :])
    found = cache.attend(states[..., 3000:, :])
    expected = interact(
        states[..., 3000:, :], keys, values, score=score, algorithm="dense",
        reduction=cache._options["reduction"],
    )  # fmt: skip
    close(found, expected)
    # More rows than were kept back: of the index, what all of them see.
    again = cache.attend(states[..., 3300:, :])
    close(again, type(again)(*(part[:, :, 300:] for part in expected)))


def test_padding_is_seen_by_nobody(by_index, score):
    padding = torch.tensor([700, 33])
    states, keys, values = tokens(3000)
    cache = make(score, padding=padding)
    keys[0, :, :700] = 1e3  # what it is does not matter
    for start, end in itertools.pairwise((0, 600, 705, 1300, 2500, 2990, 3000)):
        cache.append(keys[..., start:end, :], values[..., start:end, :])
        found = cache.attend(states[..., end - 6 : end, :])
        for b, first in enumerate(padding.tolist()):
            own = {n: v[b] if torch.is_tensor(v) and v.dim() == 2 else v
                   for n, v in vars(score).items()}  # fmt: skip
            seen = min(6, max(0, end - first))
            alone = rows_of(
                states[b, :, first:], keys[b, :, first:], values[b, :, first:],
                type(score)(**own), max(end - first, 0) - seen, max(end - first, 0),
            )  # fmt: skip
            close(type(found)(*(part[b, :, 6 - seen :] for part in found)), alone)
            assert not found.context[b, :, : 6 - seen].any()
            assert not found.degree[b, :, : 6 - seen].any()


@pytest.mark.parametrize("name", SWEEP_STATES)
def test_adversarial_points_keep_the_degrees(name):
    """Ties at the threshold, equal and collinear states, outliers, NaN: as the pairs decide."""
    states = SWEEP_STATES[name](1400)
    for score in (
        Threshold(0.0, eps=0.0),
        Threshold(1.0),
        Threshold(0.3, shrinkage="soft"),
        Threshold(math.inf),
        Sparsemax(0.5),
    ):
        cache = InteractionCache(score=score, dtype=F64)
        for start, end in ((0, 700), (700, 1390), (1390, 1400)):
            cache.append(states[start:end])
            found = cache.attend(states[end - 3 : end])
            expected = rows_of(states, states, None, score, end - 3, end)
            finite = expected.context.isfinite()
            assert torch.equal(found.context.isfinite(), finite)
            size = states[:end].nan_to_num(0, 0, 0).norm(dim=-1).max().item()
            largest = max(size, 1e-300)
            if not isinstance(score, Sparsemax):
                assert torch.equal(found.degree, expected.degree)
                largest *= len(states) * max(1.0, size**2)
            elif size > 1e3:  # the rounding of q . k alone may be more than all weights
                continue
            apart = (found.context - expected.context).where(finite, 0).abs().max().item()
            assert apart <= 1e-10 * largest


@pytest.mark.parametrize("scale", [0.001, 1.0, 300.0, -2.0])
@pytest.mark.parametrize("case", ["one point last", "one point first", "far last", "far first"])
def test_a_threshold_is_found_where_the_last_keys_tell_nothing_of_it(by_index, case, scale):
    keys = torch.randn(3, 3000, 2, dtype=F64)
    part = slice(2300, None) if case.endswith("last") else slice(0, 2300)
    keys[:, part] = 0.3 if case.startswith("one") else keys[:, part] + 20
    states = torch.randn(3, 3000, 2, dtype=F64)
    score = Sparsemax(scale)
    cache = InteractionCache(score=score, batch_shape=(3,), dtype=F64)
    cache.append(keys)
    found = cache.attend(states[:, 2998:])
    whole = interact(states[:, 2998:], keys, causal=True, score=score, backend="reference")
    close(found, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float32_is_judged_as_the_operator_is(by_index, score, dtype):
    states, keys, values = tokens(2700, dtype)
    cache = make(score, dtype=dtype)
    cache.append(keys[..., :2690, :], values[..., :2690, :])
    cache.attend(states[..., 2688:2690, :])
    cache.append(keys[..., 2690:, :], values[..., 2690:, :])
    assert cache._past._indexed == 2560
    found = cache.attend(states[..., -4:, :])
    states, keys, values = (t.float() for t in (states[..., -4:, :], keys, values))
    if dtype == torch.float32:
        assert_interaction_close(found, states, keys=keys, values=values, score=score)
        return
    expected = interact(states, keys, values, score=score)
    assert torch.equal(found.degree, expected.degree)
    torch.testing.assert_close(found.context, expected.context.to(dtype))


def test_wide_values_and_keys_as_values(by_index, score):
    for width in (None, 1, 2, 7, 25):
        states, keys, _ = tokens(1400)
        values = None if width is None else torch.randn(*BATCH, 1400, width, dtype=F64)
        cache = make(score, value_dim=width)
        cache.append(keys, values)
        close(cache.attend(states[..., -2:, :]), rows_of(states, keys, values, score, 1398, 1400))


def test_a_gate_meets_every_key(by_index):
    score = InverseGate(SELECTIVE, min_gate=0.6)
    states, keys, values = tokens(2100)
    cache = make(score)
    for start, end in ((0, 7), (7, 2099), (2099, 2100)):
        cache.append(keys[..., start:end, :], values[..., start:end, :])
        first = max(0, end - 5)
        found = cache.attend(states[..., first:end, :])
        close(found, rows_of(states, keys, values, score, first, end))
    assert cache._past.index is None


def test_what_is_not_finite_is_left_to_the_pairs(score):
    states, keys, values = tokens(1500)
    cache = make(score)
    cache.append(keys[..., :1400, :], values[..., :1400, :])
    wild = keys[..., 1400:1410, :].clone()
    wild[0, 1, 3, 0] = math.nan
    cache.append(wild, values[..., 1400:1410, :])
    all_keys = torch.cat((keys[..., :1400, :], wild), -2)
    expected = rows_of(states, all_keys, values, score, 1408, 1410)
    found = cache.attend(states[..., 1408:1410, :])
    assert found.context[0, 1].isnan().all() and found.context[1].isfinite().all()
    assert torch.equal(found.degree, expected.degree)
    cache.truncate(1403)
    close(
        cache.attend(states[..., 1400:1403, :]),
        rows_of(states, all_keys, values, score, 1400, 1403),
    )
    # A state is left to them too, and for its own call alone.
    states[1, 2, 1402] = 1e300
    found = cache.attend(states[..., 1400:1403, :])
    expected = rows_of(states, all_keys, values, score, 1400, 1403)
    assert torch.equal(found.degree, expected.degree)
    assert torch.equal(found.context.isfinite(), expected.context.isfinite())


def test_threads_give_the_same_bits(score):
    states, keys, values = tokens(3000, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            cache = make(score, dtype=torch.float32)
            cache.append(keys, values)
            found.append(cache.attend(states[..., -3:, :]))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_evolving_goes_by_the_index(monkeypatch):
    states = torch.randn(2, 1300, 2, dtype=F64)
    for score in (Threshold(0.7), Sparsemax(2.0)):
        full = evolve(states, 0.01, score=score, algorithm="dense")
        cache = EvolutionCache(score=score, batch_shape=(2,), dtype=F64)
        cache.advance(states[:, :1290], 0.01)
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "interact", None)
            for at in range(1290, 1293):
                found = cache.advance(states[:, at : at + 1], 0.01)
                torch.testing.assert_close(
                    found.states, full.states[:, at : at + 1], rtol=1e-10, atol=1e-10
                )


def test_memory_that_cannot_grow_leaves_the_cache_as_it_was(monkeypatch, score):
    states, keys, values = tokens(1200)
    cache = make(score, capacity=1100)
    cache.append(keys[..., :1100, :], values[..., :1100, :])
    before, expected = cache.nbytes, cache.attend(states[..., 1097:1100, :])
    empty = torch.empty

    def small(*arguments, **options):
        if options.get("dtype") in (torch.uint8,):
            raise RuntimeError("no memory")
        return empty(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", small)
        with pytest.raises(ValueError, match="the cache cannot grow to 2200 tokens"):
            cache.append(keys[..., 1100:, :], values[..., 1100:, :])
    assert len(cache) == 1100 and cache.nbytes == before and cache.capacity == 1100
    again = cache.attend(states[..., 1097:1100, :])
    assert all(map(torch.equal, again, expected))


def fed(score, length=3000, further=120):
    """A cache with an index after so many tokens one by one, the tokens, and its last results."""
    states, keys, values = tokens(length + further)
    cache, found = make(score), None
    cache.append(keys[..., :length, :], values[..., :length, :])
    for at in range(length, length + further):
        cache.append(keys[..., at : at + 1, :], values[..., at : at + 1, :])
        found = cache.attend(states[..., at : at + 1, :])
    return cache, (states, keys, values), found


def threshold_of(score, query, keys):
    """The threshold (*batch, 1) of q . k among all keys, of scores that sum to one above it."""
    scale = score.scale.to(F64)[..., None]
    ordered = (scale * (query @ keys.mT).squeeze(-2)).sort(-1, descending=True).values
    count = torch.arange(1, ordered.shape[-1] + 1)
    levels = (ordered.cumsum(-1) - 1) / count
    return levels.amax(-1, keepdim=True)


def test_thresholds_leave_tangents_that_bound_later_ones(by_index):
    score = SCORES["sparsemax"]
    cache, (states, keys, values), found = fed(score)
    length = len(cache)
    close(found, rows_of(states, keys, values, score, length - 1, length))
    x, y, inverse, rest = cache._past.tangents.split([64, 64, 64, 16], -1)
    assert (inverse > 0).sum(-1).min() > 16
    scale = score.scale.to(F64)[..., None]
    for query in (states[..., -1:, :], torch.randn(*BATCH, 1, 2, dtype=F64)):
        qx, qy = (scale * query.squeeze(-2)).unbind(-1)
        of_sets = qx[..., None] * x + qy[..., None] * y - inverse
        highest = of_sets.where(inverse > 0, -math.inf).amax(-1, keepdim=True)
        tau = threshold_of(score, query, keys)
        assert (highest <= tau + 1e-9).all()
        # In units of 1 / n, n keys kept: the part of the whole weight that the bound is off by.
        kept = 1 / (scale * (query @ keys.mT).squeeze(-2) > tau).sum(-1, keepdim=True)
        assert ((tau - highest) / kept).median() < 0.5
    # What the next rows expect of them.
    assert rest[..., 1].median() < 0.5


@pytest.mark.parametrize("number", [math.nan, math.inf, -1e30, 1e30, 70.0, 0.5])
def test_tangents_say_where_to_look_and_not_what_is_there(by_index, number):
    score = SCORES["sparsemax"]
    cache, (states, keys, values), _ = fed(score, further=20)
    for part in (slice(0, 192), slice(128, 192), slice(192, 208), slice(0, 208)):
        cache._past.tangents[..., part] = number
        for _ in range(3):
            length = len(cache)
            found = cache.attend(states[..., length - 2 : length, :])
            close(found, rows_of(states, keys, values, score, length - 2, length))


def test_calls_at_one_length_have_the_same_bits(by_index):
    cache, (states, keys, values), _ = fed(SCORES["sparsemax"], further=40)
    length = len(cache)
    query = states[..., length - 1 :, :]
    found = cache.attend(query)
    cache.attend(states[..., length - 3 :, :])
    cache.attend(torch.randn(*BATCH, 1, 2, dtype=F64))
    assert all(map(torch.equal, cache.attend(query), found))
    # What was found counts when a token has come.
    before = cache._past.tangents[..., :192].clone()
    cache.append(keys[..., :1, :], values[..., :1, :])
    cache.attend(query)
    assert (cache._past.tangents[..., :192] != before).any()


def test_tangents_go_with_their_sequence_and_end_with_their_keys(by_index):
    cache, *_ = fed(SCORES["sparsemax"], further=20)
    tangents = cache._past.tangents.clone()
    cache.reorder(torch.tensor([1, 1]))
    assert torch.equal(cache._past.tangents, tangents[[1, 1]]) and tangents.any()
    cache.truncate(2000)
    assert not cache._past.tangents.any()
    # Many rows of a sequence are several threads': they leave none.
    cache.attend(torch.randn(*BATCH, 12, 2, dtype=F64))
    assert not cache._past.tangents.any()
    cache.attend(torch.randn(*BATCH, 1, 2, dtype=F64))
    assert cache._past.tangents.any()


def test_other_backends_have_no_index():
    assert InteractionCache(backend="reference")._past is None
    assert InteractionCache(backend="cpu")._past is not None


def test_the_ops_refuse_what_would_leave_their_memory():
    ops = torch.ops.qflux_kernels
    keys = torch.randn(1, 2, 1024).mT
    buffer = torch.zeros(1, 2, 8).mT
    index = torch.zeros(1, ops.cache_index_unit(False, 2, 512), dtype=torch.uint8)
    moments = torch.zeros(1, 3, 6, dtype=F64)
    rest = (None, 0.5, None, 0.0, 0, 1e-6, False)
    states = torch.randn(1, 1, 2)

    def attend(**given):
        usual = {"states": states, "keys": keys, "values": None, "index": index,
                 "moments": moments, "tangents": None, "starts": None, "base": 0, "chunk": 512,
                 "indexed": 0}  # fmt: skip
        return ops.cache_attend(*(usual | given).values(), *rest)

    for call, message in (
        (lambda: ops.cache_append(buffer, None, keys, None, 0), "room for 8 tokens, and 1024"),
        (lambda: ops.cache_append(buffer, None, keys[:, :4], None, 5), "room for 8 tokens, and 4"),
        (lambda: ops.cache_append(buffer, buffer, keys[:, :4], None, 0), "must come together"),
        (lambda: ops.cache_moments(moments, keys, None, 0, 0), "too few for 1024 tokens"),
        (lambda: ops.cache_index(index, keys, None, None, 0, 0, 512, 0), "no room for 1024"),
        (lambda: ops.cache_index(index, keys[:, :100], None, None, 0, 0, 512, 0), "no room for"),
        (lambda: ops.cache_index(index, keys, None, None, 0, 0, 500, 0), "chunk must be a mult"),
        (lambda: ops.cache_index(index, keys, None, None, 0, 9, 512, 1024), "no room for|score"),
        (lambda: attend(states=torch.randn(1, 1025, 2)), "1025 rows for 1024"),
        (lambda: attend(keys=keys.contiguous()), "tokens that follow one another"),
        (lambda: attend(moments=None), "moments come with"),
        (lambda: attend(indexed=1536), "1536 indexed tokens"),
        (lambda: attend(tangents=torch.zeros(1, 100)), r"tangents must have shape \(1, 208\)"),
        (lambda: attend(tangents=torch.zeros(1, 208, dtype=F64)), "tangents must be contiguous"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()
