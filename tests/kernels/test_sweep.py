"""The sub-quadratic sweep: the dense kernels' answers from far fewer pairs, whatever the states."""

import itertools
import math

import pytest
import torch
from algorithms import assert_same, both
from assertions import assert_interaction_close, assert_relative
from inputs import SWEEP_STATES, layouts, score_on

from qflux_kernels import BackendUnavailableError, Radius, Threshold, evolve, interact
from qflux_kernels.backends import check_algorithm

F64 = torch.float64
# Long enough for several levels of blocks, the last of them not full; of 2,048 keys on a CPU, of
# 1,024 on a GPU.
LENGTH = 5300
RTOL = {F64: 1e-9, torch.float32: 1e-5}
OPTIONS = [
    (Threshold(), True),
    (Threshold(1.3, "row", 0.01), True),
    (Threshold(-0.7, eps=0.0), True),
    (Threshold(0.0), False),
    (Threshold(2.5, eps=10.0), False),
    (Threshold(0.8, shrinkage="soft"), True),
    (Threshold(0.3, "row", shrinkage="soft"), False),
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def draw(name: str, length: int = LENGTH, dtype: torch.dtype = F64) -> torch.Tensor:
    return SWEEP_STATES[name](length).to(dtype)


@pytest.mark.parametrize("name", SWEEP_STATES)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_meets_the_pairs_of_the_dense_kernel(device, dtype, name):
    states = draw(name, dtype=dtype).to(device)
    for score, causal in OPTIONS:
        if score.shrinkage == "soft" and device.type == "cuda":
            continue  # not there, see test_soft_threshold_is_swept_on_a_cpu_only
        assert_same(*both(states, score=score, causal=causal), RTOL[dtype])


@pytest.mark.parametrize("name", ["random", "clamped", "outlier", "drift", "radii of all sizes"])
def test_is_the_interaction(device, name):
    """Against the definition, row by row, by the rules of tests/assertions.py."""
    states = draw(name, 2500)
    for dtype, score in ((F64, Threshold(1.0)), (torch.float32, Threshold())):
        narrow = states.to(dtype)
        result = interact(narrow.to(device), score=score, causal=False, algorithm="sweep")
        assert_interaction_close(result, narrow, score=score, causal=False)


def test_a_key_far_away_leaves_no_trace():
    """In the sums of rows that drop it, each row measured by its own."""
    states = draw("random", 8192)
    states[3000] = torch.tensor([1e13, 3e12])
    dense, sweep = both(states, score=Threshold(-0.3), causal=False)
    without = dense[0].context.abs().amax(-1) < 1e6
    assert without.sum() > 3000 and (dense[0].degree[without] > 4000).all()
    difference = (sweep[0].context - dense[0].context).abs().amax(-1)
    assert (difference <= 1e-12 * dense[0].context.abs().amax(-1))[without].all()
    assert work(states, -0.3, causal=False).sum() < 0.01


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows, keys", [(4200, 4200), (3000, 6000), (6000, 3000), (40, 9000)])
@pytest.mark.parametrize("depth", [1, 2, 9])
def test_keys_and_values_of_their_own(device, depth, rows, keys, causal):
    states, sources = torch.randn(rows, 2, dtype=F64), torch.randn(keys, 2, dtype=F64) + 0.3
    values = torch.randn(keys, depth, dtype=F64)
    given = [t.to(device) for t in (states, sources, values)]
    scores = [Threshold(), Threshold(1.2, "row")]
    if device.type == "cpu":
        scores.append(Threshold(0.6, shrinkage="soft"))
    for score in scores:
        assert_same(*both(*given, score=score, causal=causal), 1e-12)


def test_soft_threshold_is_swept_on_a_cpu_only():
    score = Threshold(shrinkage="soft")
    check_algorithm("sweep", score, "compiled", torch.device("cpu"))
    with pytest.raises(BackendUnavailableError, match=r"soft.*'auto' or 'dense'"):
        check_algorithm("sweep", score, "compiled", torch.device("cuda"))


def test_values_in_any_layout(device):
    values = torch.randn(1, 4200, 3, dtype=F64, device=device)
    states = torch.randn(4200, 2, dtype=F64, device=device)
    expected = interact(states[None], values=values, algorithm="sweep")
    for name, view in layouts(values).items():
        got = interact(states[None], values=view, algorithm="sweep")
        assert torch.equal(got.context, expected.context), name


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_batches_lengths_and_a_sigma_for_each_cylinder(device, reduction):
    states = torch.randn(2, 3, 4500, 2, dtype=F64, device=device)
    lengths = torch.tensor([[4500], [3333]], device=device)
    score = score_on(device, Threshold(torch.tensor([-0.8, 0.5, 1.4], dtype=F64)))
    dense, sweep = both(states, score=score, lengths=lengths, reduction=reduction)
    assert_same(dense, sweep, 1e-12)
    assert not sweep[0].context[1, :, 3333:].any() and not sweep[1][0][1, :, 3333:].any()


@pytest.mark.parametrize("length", [0, 1, 2, 63, 1024, 1025, 2047, 2048, 2049, 4097])
def test_lengths_around_the_blocks(device, length):
    states = torch.randn(length, 2, dtype=F64, device=device)
    for causal in (True, False):
        assert_same(*both(states, causal=causal), 1e-12)


def test_only_some_gradients(device):
    states, keys, values = torch.randn(3, 4200, 2, dtype=F64, device=device)
    for wanted in itertools.product([False, True], repeat=3):
        found = []
        for algorithm in ("dense", "sweep"):
            leaves = [
                t.clone().requires_grad_(want)
                for t, want in zip((states, keys, values), wanted, strict=True)
            ]
            result = interact(*leaves, algorithm=algorithm)
            needed = [t for t in leaves if t.requires_grad]
            # The gradient arrives expanded, with strides of zero.
            found.append(torch.autograd.grad(result.context.sum(), needed) if needed else ())
        for theirs, mine in zip(*found, strict=True):
            assert_relative("gradient", mine, theirs, 1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_evolution(device, causal):
    outcomes = []
    states = torch.randn(2, 4300, 2, dtype=F64, device=device)
    score = score_on(device, Threshold(torch.tensor([0.5, 1.3], dtype=F64)))
    for algorithm in ("dense", "sweep"):
        x = states.clone().requires_grad_()
        dt = torch.full((2, 1), 0.1, dtype=F64, device=device, requires_grad=True)
        result = evolve(
            x, dt, score=score, causal=causal, steps=2,
            radius=Radius(rate=0.1), skip=0.2, reduction="mean", algorithm=algorithm,
        )  # fmt: skip
        torch.manual_seed(1)
        weights = torch.randn_like(result.states), torch.randn_like(result.strength)
        grads = torch.autograd.grad([result.states, result.strength], [x, dt], weights)
        outcomes.append((result, grads))
    (dense, theirs), (sweep, mine) = outcomes
    assert torch.equal(dense.degree, sweep.degree)
    for name in ("states", "strength"):
        assert_relative(name, getattr(sweep, name), getattr(dense, name), 1e-12)
    for name, a, b in zip(("states", "dt"), mine, theirs, strict=True):
        assert_relative(f"gradient of {name}", a, b, 1e-11)


def test_any_number_of_threads_gives_the_same_bits():
    states = draw("walk", 20_000, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            for batch in (states, torch.stack([states] * 8)):
                x = batch.clone().requires_grad_()
                result = interact(x, algorithm="sweep")
                (grad,) = torch.autograd.grad(result.context.square().sum(), x)
                results.append([t.view(-1, 20_000, *t.shape[batch.dim() - 1 :])[0]
                                for t in (*result, grad)])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


def work(states: torch.Tensor, sigma: float, causal: bool) -> torch.Tensor:
    """The share of visible pairs that a sweep meets one by one, [densely, in bands]."""
    length = len(states)
    pairs = length * (length + 1) / 2 if causal else length**2
    counts = torch.ops.qflux_kernels.sweep_work(states[None], None, sigma, 1e-6, False, causal)
    return counts / pairs


@pytest.mark.parametrize("name", ["random", "clamped", "clusters", "far from the origin", "ties"])
def test_few_pairs_are_met_one_by_one(name):
    states = draw(name, 65_536, torch.float32)
    dense, banded = work(states, 0.5, causal=True)
    # Base blocks of 2,048 rows are 1 / 32 of the triangle.
    assert 1 / 32 < dense < 0.06 and banded < 0.03
    assert work(states, 0.5, causal=False).sum() < 0.01


def test_work_grows_less_than_quadratically():
    shares = [work(draw("random", n, torch.float32), 0.5, True).sum() for n in (1 << 15, 1 << 18)]
    # The number of pairs met grows with an exponent below 1.25.
    growth = math.log2(shares[1] / shares[0] * 64) / 3
    assert growth < 1.25


def test_hopeless_data_are_met_densely():
    """Where every pair stands on the threshold there is nothing to win."""
    states = draw("equal", 8192)
    counts = torch.ops.qflux_kernels.sweep_work(states[None], None, 0.0, 0.0, False, False)
    assert counts.tolist() == [8192**2, 0]


def test_rows_that_keep_nothing_cost_nothing():
    counts = torch.ops.qflux_kernels.sweep_work(
        torch.zeros(1, 8192, 2), None, 0.5, 1e-6, False, False
    )
    assert counts.tolist() == [0, 0]
