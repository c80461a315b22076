"""Sparsemax by trees: the dense kernels' answers from far fewer pairs, whatever the states."""

import itertools
import math

import pytest
import torch
from algorithms import both
from assertions import assert_relative
from inputs import SWEEP_STATES, layouts

import qflux_kernels
from qflux_kernels import (
    BackendUnavailableError,
    Radius,
    Sparsemax,
    evolve,
    interact,
    reference,
)
from qflux_kernels.backends import check_algorithm

F64 = torch.float64
# Long enough for several levels of blocks of 512, the last of them not full.
LENGTH = 1700
SCALES = (0.01, 1.0, 50.0)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def ties(states, keys, scale, causal: bool, rows) -> torch.Tensor:
    """How many pairs of each of these rows stand on its threshold, up to rounding."""
    z = scale * (states[rows].double() @ keys.double().mT)
    end = rows[:, None] + (len(keys) - len(states) if causal else len(keys))
    z = z.masked_fill(torch.arange(len(keys)) > end, -math.inf)
    ranked = z.sort(-1, descending=True).values
    count = torch.arange(1, len(keys) + 1)
    kept = 1 + count * (ranked - ranked[:, :1]) > (ranked - ranked[:, :1]).cumsum(-1)
    kept &= ranked.isfinite()
    tau = (ranked.where(kept, 0).sum(-1) - 1) / kept.sum(-1)
    size = states[rows].double().norm(dim=-1) * keys.double().norm(dim=-1).max() * abs(scale)
    room = 8 * torch.finfo(states.dtype).eps * (1 + size)
    return ((z - tau[:, None]).abs() <= room[:, None]).sum(-1)


def assert_same(dense, tree, rtol: float, states, keys, scale, causal: bool) -> None:
    """Equal degrees up to ties, and equal sums up to rounding, their own and that of q . k."""
    if not len(states):
        assert not tree[0].context.numel()
        return
    largest = [t.nan_to_num(0, 0, 0).norm(dim=-1).amax().item() for t in (states, keys)]
    rtol = max(rtol, 64 * torch.finfo(states.dtype).eps * abs(scale) * largest[0] * largest[1])
    if rtol > 1:  # the rounding of q . k alone is more than all weights
        assert torch.equal(tree[0].context.isfinite(), dense[0].context.isfinite())
        return
    # Terms of a gradient cancel where all keys that are kept are alike.
    floor = abs(scale) * max(largest)
    apart = (tree[0].degree - dense[0].degree).abs()
    (rows,) = apart.nonzero(as_tuple=True)
    assert (apart[rows] <= ties(states, keys, scale, causal, rows)).all()
    pairs = [
        ("context", tree[0].context, dense[0].context, 0.0),
        ("strength", tree[0].strength, dense[0].strength, 0.0),
    ]
    if not len(rows):
        pairs += [
            ("gradient", mine, theirs, floor)
            for mine, theirs in zip(tree[1], dense[1], strict=True)
        ]
    for name, mine, theirs, least in pairs:
        finite = theirs.isfinite()
        assert torch.equal(mine.isfinite(), finite), name
        assert_relative(name, mine.where(finite, 0), theirs.where(finite, 0), rtol, least)


@pytest.mark.parametrize("name", SWEEP_STATES)
@pytest.mark.parametrize("causal", [True, False])
def test_answers_of_the_dense_kernel(name, causal):
    states = SWEEP_STATES[name](LENGTH)
    for scale in SCALES:
        dense, tree = both(states, score=Sparsemax(scale), causal=causal)
        assert_same(dense, tree, 1e-9, states, states, scale, causal)


@pytest.mark.parametrize("name", ["random", "clamped", "sorted around the circle", "walk"])
def test_answers_in_float32(name):
    states = SWEEP_STATES[name](LENGTH).float()
    for scale in (0.01, 1.0):
        dense, tree = both(states, score=Sparsemax(scale))
        assert_same(dense, tree, 2e-5, states, states, scale, True)


@pytest.mark.parametrize("name", ["random", "clusters", "lattice", "outlier"])
def test_is_the_interaction(name):
    """Against the definition in float64."""
    states = SWEEP_STATES[name](1500)
    values = torch.randn(1500, 3, dtype=F64)
    for scale in SCALES:
        score = Sparsemax(scale)
        outcomes = []
        for function, how in ((reference.interact, {}), (interact, {"algorithm": "sweep"})):
            leaves = [t.clone().requires_grad_() for t in (states, values)]
            result = function(leaves[0], values=leaves[1], score=score, **how)
            torch.manual_seed(2)
            grads = torch.autograd.grad(result.context, leaves, torch.randn_like(result.context))
            outcomes.append((result, grads))
        assert_same(*outcomes, 1e-9, states, states, scale, True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows, keys", [(2200, 2200), (1500, 3000), (3000, 1500), (40, 5000)])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 9])
def test_keys_and_values_of_their_own(depth, rows, keys, causal):
    states, sources = torch.randn(rows, 2, dtype=F64), torch.randn(keys, 2, dtype=F64) + 0.3
    values = torch.randn(keys, depth, dtype=F64)
    for scale in SCALES:
        dense, tree = both(states, sources, values, score=Sparsemax(scale), causal=causal)
        assert_same(dense, tree, 1e-9, states, sources, scale, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.01, 50.0, 1e4])
def test_searches_that_go_on_among_the_keys_of_trees(scale, causal):
    # The last 2,048 of so many keys tell a sharp row little; clusters come and go among them.
    keys = torch.randn(140_000, 2, dtype=F64)
    keys[20_000:90_000] += 3 * torch.randn(7, 2, dtype=F64).repeat_interleave(10_000, 0)
    states, values = torch.randn(600, 2, dtype=F64), torch.randn(140_000, 1, dtype=F64)
    dense, tree = both(states, keys, values, score=Sparsemax(scale), causal=causal)
    assert_same(dense, tree, 1e-9, states, keys, scale, causal)


@pytest.mark.parametrize("scale", [0.0, -0.7, -30.0])
def test_scales_that_are_not_positive(scale):
    states = torch.randn(2000, 2, dtype=F64)
    states[100:130] = 0
    for causal in (True, False):
        dense, tree = both(states, score=Sparsemax(scale), causal=causal)
        assert_same(dense, tree, 1e-9, states, states, scale, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("exponent", [13, 15, 18])
def test_products_coarser_than_a_weight_keep_the_largest_key(exponent, causal):
    """A threshold that is rounded up to the largest pair must not drop it."""
    torch.manual_seed(0)
    states, values = torch.randn(2000, 2) * 2.0**exponent, torch.randn(2000, 3)
    values[:, 0] = 1
    dense, tree = both(states, values=values, score=Sparsemax(1.0), causal=causal)
    assert (tree[0].degree > 0).all()
    assert torch.equal(tree[0].degree, dense[0].degree)
    assert_relative("sum of the weights", tree[0].context[:, 0], torch.ones(2000), 1e-2)
    assert_relative("context", tree[0].context, dense[0].context, 1e-2)


def test_values_in_any_layout():
    values = torch.randn(1, 2200, 3, dtype=F64)
    states = torch.randn(2200, 2, dtype=F64)
    expected = interact(states[None], values=values, score=Sparsemax(), algorithm="sweep")
    for name, view in layouts(values).items():
        got = interact(states[None], values=view, score=Sparsemax(), algorithm="sweep")
        assert torch.equal(got.context, expected.context), name


def test_batches_lengths_and_a_scale_for_each_cylinder():
    states = torch.randn(2, 3, 2500, 2, dtype=F64)
    states[1, :, 1333:] = 1e3
    lengths = torch.tensor([[2500], [1333]])
    found = []
    for algorithm in ("dense", "sweep"):
        scale = torch.tensor([0.02, -1.0, 30.0], dtype=F64, requires_grad=True)
        x = states.clone().requires_grad_()
        result = interact(x, score=Sparsemax(scale), lengths=lengths, algorithm=algorithm)
        torch.manual_seed(1)
        grads = torch.autograd.grad(
            result.context,
            (x, scale),
            torch.randn_like(result.context) * (result.degree > 0)[..., None],
        )
        found.append((result, grads))
    (dense, theirs), (tree, mine) = found
    assert torch.equal(tree.degree, dense.degree)
    assert_relative("context", tree.context, dense.context, 1e-10)
    for name, a, b in zip(("states", "scale"), mine, theirs, strict=True):
        assert_relative(f"gradient of {name}", a, b, 1e-9)
    assert not tree.context[1, :, 1333:].any() and not mine[0][1, :, 1333:].any()
    assert not tree.strength[1, :, 1333:].any() and (tree.strength[0] == 1).all()


@pytest.mark.parametrize("length", [0, 1, 2, 31, 511, 512, 513, 1024, 1025, 1537])
def test_lengths_around_the_blocks(length):
    states = torch.randn(length, 2, dtype=F64)
    for causal in (True, False):
        dense, tree = both(states, score=Sparsemax(0.3), causal=causal)
        assert_same(dense, tree, 1e-9, states, states, 0.3, causal)


def test_what_is_not_finite_shows_where_it_is_seen():
    states = torch.randn(2000, 2, dtype=F64)
    states[700, 1] = math.nan
    dense, tree = both(states, score=Sparsemax())
    assert tree[0].context[:700].isfinite().all() and tree[0].context[700:].isnan().all()
    assert torch.equal(tree[0].context[:700], dense[0].context[:700])


def test_only_some_gradients():
    states, keys, values = torch.randn(3, 2200, 2, dtype=F64)
    for wanted in itertools.product([False, True], repeat=3):
        found = []
        for algorithm in ("dense", "sweep"):
            leaves = [
                t.clone().requires_grad_(want)
                for t, want in zip((states, keys, values), wanted, strict=True)
            ]
            result = interact(*leaves, score=Sparsemax(), algorithm=algorithm)
            needed = [t for t in leaves if t.requires_grad]
            # The gradient arrives expanded, with strides of zero.
            found.append(torch.autograd.grad(result.context.sum(), needed) if needed else ())
        for theirs, mine in zip(*found, strict=True):
            assert_relative("gradient", mine, theirs, 1e-10, floor=1.0)


@pytest.mark.parametrize("causal", [True, False])
def test_evolution(causal):
    outcomes = []
    states = torch.randn(2, 1700, 2, dtype=F64)
    for algorithm in ("dense", "sweep"):
        x = states.clone().requires_grad_()
        scale = torch.tensor([0.1, 3.0], dtype=F64, requires_grad=True)
        result = evolve(
            x, 0.1, score=Sparsemax(scale), causal=causal, steps=2,
            radius=Radius(rate=0.1), skip=0.2, algorithm=algorithm,
        )  # fmt: skip
        torch.manual_seed(1)
        grads = torch.autograd.grad(result.states, [x, scale], torch.randn_like(result.states))
        outcomes.append((result, grads))
    (dense, theirs), (tree, mine) = outcomes
    assert torch.equal(dense.degree, tree.degree)
    assert_relative("states", tree.states, dense.states, 1e-11)
    for name, a, b in zip(("states", "scale"), mine, theirs, strict=True):
        assert_relative(f"gradient of {name}", a, b, 1e-9)


def test_any_number_of_threads_gives_the_same_bits():
    states = torch.randn(6000, 2)
    values = torch.randn(6000, 4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            for copies in (1, 8):
                x, v = (t.repeat(copies, 1, 1).requires_grad_() for t in (states, values))
                result = interact(x, values=v, score=Sparsemax(0.1), algorithm="sweep")
                grads = torch.autograd.grad(result.context.square().sum(), (x, v))
                results.append([t[0] for t in (*result, *grads)])
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


SETS = ("baseline", "AVX2", "AVX-512")
BEST = qflux_kernels.diagnostics()["instruction_set"]


@pytest.mark.parametrize("name", SETS[: SETS.index(BEST)] if BEST in SETS else ())
def test_other_instruction_sets(run_python, name):
    """Whose masks leave more of the padding behind the last key to what is multiplied by zero."""
    tests = (
        "test_answers_of_the_dense_kernel[False-random]",
        "test_answers_in_float32[random]",
        "test_keys_and_values_of_their_own[2-1500-3000-True]",
        "test_keys_and_values_of_their_own[4-1500-3000-True]",
        "test_lengths_around_the_blocks[1537]",
    )
    chosen = [f"{__file__}::{test}" for test in tests]
    program = f"import pytest, sys; sys.exit(pytest.main({chosen!r}))"
    printed = run_python(program, QFLUX_INSTRUCTION_SET=name).stdout
    assert "." * len(tests) in printed, printed


def test_is_there_on_a_cpu_only():
    check_algorithm("sweep", Sparsemax(), "compiled", torch.device("cpu"))
    with pytest.raises(BackendUnavailableError, match=r"sparsemax.*'auto' or 'dense'"):
        check_algorithm("sweep", Sparsemax(), "compiled", torch.device("cuda"))
