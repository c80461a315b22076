"""The reference against loops over plain numbers, written from docs/operators.md."""

import itertools
import math

import pytest
import torch
from assertions import assert_interaction_close, count_borderline
from inputs import EXTREME_SCORES, mean_of, with_reductions
from torch.utils._python_dispatch import TorchDispatchMode

from qflux_kernels import InverseGate, Radius, Sparsemax, Threshold, reference

F64 = torch.float64


def keys_seen(row, rows, keys, causal, length):
    """The keys that a row may see, ends aligned when there are more or fewer keys than rows."""
    if length is not None and row >= length:
        return []
    end = keys if length is None else length
    return [j for j in range(end) if not causal or j <= row + keys - rows]


def pair_weights(x, keys, seen, window, score):
    """{key: w_ij} of the pairs that row state x keeps."""
    if isinstance(score, Threshold):
        s = {j: (x[0] * keys[j][0] + x[1] * keys[j][1] + 1) / 2 for j in {*seen, *window}}
        if not window:
            return {}
        mean = sum(s[j] for j in window) / len(window)
        deviation = math.sqrt(sum((s[j] - mean) ** 2 for j in window) / len(window) + score.eps)
        tau = mean + score.sigma * deviation
        start = tau if score.shrinkage == "soft" else 0.0
        return {j: s[j] - start for j in seen if s[j] >= tau}
    if isinstance(score, Sparsemax):
        z = {j: score.scale * (x[0] * keys[j][0] + x[1] * keys[j][1]) for j in seen}
        # Of the thresholds of the k largest, the right one is the largest.
        ranked = sorted(z.values(), reverse=True)
        tau = max(((sum(ranked[:k]) - 1) / k for k in range(1, len(z) + 1)), default=0.0)
        return {j: z[j] - tau for j in seen if z[j] > tau}
    kept = {}
    for j in seen:
        radii = math.hypot(*x) * math.hypot(*keys[j])
        angle = math.atan2(x[1], x[0]) - math.atan2(keys[j][1], keys[j][0])
        similarity = radii * math.cos(angle) + score.alpha * radii * math.sin(angle)
        gate = 1 / (score.eps + abs(similarity))
        if gate > score.min_gate:
            kept[j] = similarity * gate
    return kept


def interact_loops(states, keys, values, causal, score, reduction, length=None):
    """Context, strength and degree of one sequence, as lists."""
    contexts, strengths, degrees = [], [], []
    for i, x in enumerate(states):
        seen = keys_seen(i, len(states), len(keys), causal, length)
        whole = isinstance(score, Threshold) and score.stats == "row"
        window = keys_seen(i, len(states), len(keys), False, length) if whole else seen
        weights = pair_weights(x, keys, seen, window, score)
        scale = 1 / max(1, len(seen)) if reduction == "mean" else 1
        columns = range(len(values[0]))
        contexts.append(
            [scale * sum(w * values[j][d] for j, w in weights.items()) for d in columns]
        )
        strengths.append(scale * sum(weights.values()))
        degrees.append(len(weights))
    return contexts, strengths, degrees


def evolve_loops(states, dt, skip, causal, score, radius, reduction, length=None):
    """One Heun-Euler step of one sequence; dt and skip are lists, skip may be None."""

    def context(points):
        return interact_loops(points, points, points, causal, score, reduction, length)

    first, strengths, degrees = context(states)
    middle = [
        [x + dt[i] * c for x, c in zip(states[i], first[i], strict=True)]
        for i in range(len(states))
    ]
    second, _, _ = context(middle)
    out = []
    for i, x in enumerate(states):
        if length is not None and i >= length:
            out.append(list(x))
            continue
        moved = [x[d] + (dt[i] * first[i][d] + dt[i] * second[i][d]) / 2 for d in range(2)]
        if radius is not None:
            r = max(math.hypot(*moved), 1e-6)
            rho = r + radius.rate * strengths[i] - radius.reversion * (r - radius.target)
            rho = min(max(rho, radius.min), radius.max)
            moved = [rho / r * m for m in moved]
        if skip is not None:
            moved = [skip[i] * x[d] + (1 - skip[i]) * moved[d] for d in range(2)]
        out.append(moved)
    return out, strengths, degrees


def close(got, loops):
    torch.testing.assert_close(got, torch.tensor(loops, dtype=got.dtype), rtol=1e-11, atol=1e-13)


SCORES = [
    Threshold(),
    Threshold(1.0, "row"),
    Threshold(-0.5, "prefix", 0.0),
    Threshold(0.0, "row", 0.1),
    InverseGate(),
    InverseGate(-1.3, 0.1, 0.9),
    Threshold(0.4, shrinkage="soft"),
    Threshold(-0.2, "row", 0.1, shrinkage="soft"),
    Sparsemax(),
    Sparsemax(-0.05),
]
REDUCED_SCORES = with_reductions(SCORES)


@pytest.mark.parametrize("score, reduction", REDUCED_SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_interact_equals_loops(score, causal, reduction):
    options = {"causal": causal, "score": score, "reduction": reduction}
    for rows, keys, depth in [(7, 7, 2), (5, 9, 1), (9, 4, 3), (1, 1, 8), (6, 1, 2), (1, 6, 3)]:
        states = torch.randn(rows, 2, dtype=F64)
        sources = torch.randn(keys, 2, dtype=F64)
        values = torch.randn(keys, depth, dtype=F64)
        context, strength, degree = reference.interact(states, sources, values, **options)
        loops = interact_loops(
            states.tolist(), sources.tolist(), values.tolist(), causal, score, reduction
        )
        close(context, loops[0])
        close(strength, loops[1])
        close(degree, loops[2])
        assert degree.dtype == torch.int32

        alone = reference.interact(states, **options)
        x = states.tolist()
        loops = interact_loops(x, x, x, causal, score, reduction)
        for got, wanted in zip(alone, loops, strict=True):
            close(got, wanted)
        with_values = reference.interact(states, values=states, **options)
        assert all(torch.equal(a, b) for a, b in zip(alone, with_values, strict=True))


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_equal_loops(score, causal):
    states = torch.randn(2, 3, 6, 2, dtype=F64)
    lengths = torch.tensor([[0, 1, 6], [3, 5, 2]])
    got = reference.interact(
        states, lengths=lengths, causal=causal, score=score, reduction=mean_of(score)
    )
    for a, b in itertools.product(range(2), range(3)):
        x = states[a, b].tolist()
        length = int(lengths[a, b])
        loops = interact_loops(x, x, x, causal, score, mean_of(score), length)
        for result, wanted in zip(got, loops, strict=True):
            close(result[a, b], wanted)
            assert not result[a, b, length:].any()


def test_coefficients_of_each_cylinder():
    states = torch.randn(2, 3, 6, 2, dtype=F64)
    x = states.tolist()
    sigma = torch.tensor([0.0, 0.5, 1.4], dtype=F64)
    alpha, min_gate = torch.randn(2, 3, dtype=F64), torch.rand(2, 1, dtype=F64) * 3
    for a, b in itertools.product(range(2), range(3)):
        for score, scalar in [
            (Threshold(sigma), Threshold(sigma[b].item())),
            (
                InverseGate(alpha, 1e-5, min_gate),
                InverseGate(alpha[a, b].item(), 1e-5, min_gate[a, 0].item()),
            ),
        ]:
            loops = interact_loops(x[a][b], x[a][b], x[a][b], True, scalar, "sum")
            for result, wanted in zip(reference.interact(states, score=score), loops, strict=True):
                close(result[a, b], wanted)


@pytest.mark.parametrize("score, reduction", REDUCED_SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "radius",
    [
        None,
        Radius(),
        Radius(0.0, 1e9, 0.3, 0.4, 1.2),
        Radius(1.0, 1.1, -0.2),
        Radius(0.7, 0.7),
    ],
    ids=str,
)
def test_evolve_equals_loops(score, reduction, causal, radius):
    states = torch.randn(6, 2, dtype=F64)
    states[0] = 0.0
    dt, skip = torch.rand(6, dtype=F64), torch.rand(6, dtype=F64)
    options = {"causal": causal, "score": score, "reduction": reduction, "radius": radius}
    for given_skip, lengths in [(None, None), (skip, None), (None, 4), (skip, 4)]:
        got = reference.evolve(
            states,
            dt,
            skip=given_skip,
            lengths=None if lengths is None else torch.tensor(lengths),
            **options,
        )
        loops = evolve_loops(
            states.tolist(),
            dt.tolist(),
            None if given_skip is None else skip.tolist(),
            causal,
            score,
            radius,
            reduction,
            lengths,
        )
        for result, wanted in zip(got, loops, strict=True):
            close(result, wanted)


def test_steps_repeat_the_step():
    states = torch.randn(2, 5, 2, dtype=F64)
    dt, skip = torch.rand(3, 2, 5, dtype=F64), torch.rand(3, 1, 5, dtype=F64)
    got = reference.evolve(states, dt, skip=skip, steps=3)
    for b in range(2):
        x = states[b].tolist()
        for step in range(3):
            x, strength, degree = evolve_loops(
                x, dt[step, b].tolist(), skip[step, 0].tolist(), True, Threshold(), Radius(), "sum"
            )
        close(got.states[b], x)
        close(got.strength[b], strength)
        close(got.degree[b], degree)
    constant = reference.evolve(states, dt[0], skip=0.25, steps=2)
    once = reference.evolve(states, dt[0], skip=0.25)
    assert torch.equal(constant.states, reference.evolve(once.states, dt[0], skip=0.25).states)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (5,),
        (1, 1),
        (3, 1),
        (3, 5),
        (2, 1, 1),
        (2, 3, 5),
        (4, 1, 1, 1),
        (4, 2, 3, 5),
        (4, 1, 3, 1),
    ],
    ids=str,
)
def test_shapes_of_dt_and_skip(shape):
    states = torch.randn(2, 3, 5, 2, dtype=F64)
    step = torch.rand(shape, dtype=F64)
    full = step.expand(4, 2, 3, 5)
    got = reference.evolve(states, step, skip=step, steps=4)
    assert torch.equal(got.states, reference.evolve(states, full, skip=full, steps=4).states)
    x = states
    for i in range(4):
        x = reference.evolve(x, full[i], skip=full[i]).states
    assert torch.equal(got.states, x)


def test_a_skip_of_zero_or_one():
    states = torch.randn(5, 2, dtype=F64)
    plain = reference.evolve(states, 0.1).states
    assert torch.equal(reference.evolve(states, 0.1, skip=0.0).states, plain)
    assert torch.equal(reference.evolve(states, 0.1, skip=1.0).states, states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype):
    states, values = torch.randn(30, 2).to(dtype), torch.randn(30, 3).to(dtype)
    half = reference.interact(states, values=values)
    wide = reference.interact(states.float(), values=values.float())
    assert half.context.dtype == half.strength.dtype == dtype
    assert torch.equal(half.context, wide.context.to(dtype))
    assert torch.equal(half.degree, wide.degree)
    half = reference.evolve(states, 0.1, steps=3)
    wide = reference.evolve(states.float(), 0.1, steps=3)
    assert torch.equal(half.states, wide.states.to(dtype))
    assert reference.scores(states).dtype == dtype


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_scores_are_the_weights(score, causal):
    states = torch.randn(2, 9, 2, dtype=F64)
    dense = reference.scores(states, score=score, causal=causal)
    result = reference.interact(states, score=score, causal=causal)
    torch.testing.assert_close(dense @ states, result.context)
    torch.testing.assert_close(dense.sum(-1), result.strength)
    for b in range(2):
        x = states[b].tolist()
        for i in range(9):
            seen = keys_seen(i, 9, 9, causal, None)
            whole = isinstance(score, Threshold) and score.stats == "row"
            window = range(9) if whole else seen
            weights = pair_weights(x[i], x, seen, window, score)
            close(dense[b, i], [weights.get(j, 0.0) for j in range(9)])


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2, 33, 1100])
def test_csr_equals_dense(score, causal, length):
    states = torch.randn(length, 2, dtype=F64)
    sparse = reference.scores(states, score=score, causal=causal, layout="csr")
    assert sparse.layout == torch.sparse_csr and sparse.shape == (length, length)
    dense = reference.scores(states, score=score, causal=causal)
    torch.testing.assert_close(sparse.to_dense(), dense)
    degree = reference.interact(states, score=score, causal=causal).degree
    assert torch.equal(sparse.crow_indices().diff(), degree.long())
    rows = length // 3  # the last ones
    options = {"score": score, "causal": causal, "rows": rows}
    last = reference.scores(states, **options)
    torch.testing.assert_close(last, dense[length - rows :])
    sparse = reference.scores(states, **options, layout="csr")
    assert sparse.shape == (rows, length)
    torch.testing.assert_close(sparse.to_dense(), last)
    with pytest.raises(ValueError, match=rf"rows must be an integer in \[0, {length}\]"):
        reference.scores(states, score=score, rows=length + 1)


def test_csr_never_forms_the_square():
    """No tensor it makes, outside the result, holds more than its block of rows."""
    length, largest = 3000, 0
    states = torch.randn(length, 2)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    largest = max(largest, tensor.numel())
            return result

    with Largest():
        sparse = reference.scores(states, score=Threshold(1.4), layout="csr")
    assert largest >= len(sparse.values())
    assert largest < length**2 / 2, "csr formed S x S"


@pytest.mark.parametrize("score", [Threshold(), InverseGate()], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(score, causal):
    def leaf(*shape):
        return torch.randn(*shape, dtype=F64, requires_grad=True)

    def interact(states, keys, values, alpha):
        used = InverseGate(alpha) if isinstance(score, InverseGate) else score
        result = reference.interact(states, keys, values, causal=causal, score=used)
        return result.context, result.strength

    tensors = leaf(2, 5, 2), leaf(2, 7, 2), leaf(2, 7, 3), leaf(2)
    torch.autograd.gradcheck(interact, tensors)

    def evolve(states, dt, skip):
        return reference.evolve(states, dt, skip=skip, causal=causal, score=score, steps=2)[:2]

    torch.autograd.gradcheck(evolve, (leaf(2, 5, 2), leaf(2, 2, 5), leaf(5)))


def test_no_gradient_through_the_decision():
    states = torch.randn(12, 2, dtype=F64, requires_grad=True)
    sigma = torch.tensor(0.5, dtype=F64, requires_grad=True)
    strength = reference.interact(states, score=Threshold(sigma)).strength
    kept = reference.scores(states.detach()) != 0
    (grad,) = torch.autograd.grad(strength.sum(), states)
    frozen = (kept * (states @ states.mT + 1) / 2).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(frozen, states)[0])
    assert strength.requires_grad
    strength = reference.interact(states, score=Threshold(sigma)).strength
    assert torch.autograd.grad(strength.sum(), sigma, allow_unused=True) == (None,)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_states_reach_whom_they_can(score, value):
    states = torch.randn(9, 2, dtype=F64)
    clean = reference.interact(states, score=score)
    states[4, 1] = value
    context, strength, _ = reference.interact(states, score=score)
    sees = torch.arange(9) >= 4
    if isinstance(score, Threshold) and score.stats == "row":
        sees[:] = True
    assert torch.equal(context.isfinite().all(-1), ~sees)
    assert torch.equal(strength.isfinite(), ~sees)
    assert torch.equal(context[~sees], clean.context[~sees])
    full = reference.interact(states, score=score, causal=False)
    assert not full.context.isfinite().any()
    padded = reference.interact(states, score=score, lengths=torch.tensor(4))
    assert padded.context.isfinite().all()


@pytest.mark.parametrize("score", EXTREME_SCORES, ids=str)
@pytest.mark.parametrize("size", [1e8, 3e9, 1e12, 1e18])
def test_large_states_lose_no_row(score, size):
    """In float32 the squares of such scores, or sums of them, are infinite."""
    states = (torch.randn(2, 30, 2) * size).float()
    narrow, wide = (reference.interact(s, score=score) for s in (states, states.double()))
    assert_interaction_close(narrow, states, score=score)
    assert (narrow.degree - wide.degree).abs().sum() <= count_borderline(states, score=score)


@pytest.mark.parametrize("score", [Threshold(), InverseGate()], ids=str)
def test_empty_inputs(score):
    for shape in [(0, 2), (3, 0, 2), (0, 5, 2), (1, 2)]:
        states = torch.randn(shape, dtype=F64)
        result = reference.interact(states, score=score)
        assert result.context.shape == shape and result.degree.shape == shape[:-1]
        assert reference.evolve(states, 0.1, score=score).states.shape == shape
    keys, values = torch.randn(0, 2), torch.randn(0, 3)
    nothing = reference.interact(torch.randn(4, 2), keys, values, score=score)
    assert not nothing.context.any() and nothing.context.shape == (4, 3)
    early = reference.interact(torch.randn(4, 2), torch.randn(2, 2), score=score)
    assert not early.context[:2].any() and not early.degree[:2].any()
