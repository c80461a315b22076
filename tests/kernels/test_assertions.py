"""The comparison itself: what it must accept and what it must not let through."""

import pytest
import torch
from assertions import (
    assert_interaction_close,
    assert_no_missing_gradient,
    assert_relative,
    count_borderline,
)
from inputs import mean_of

from qflux_kernels import Interaction, InverseGate, Sparsemax, Threshold, reference

SCORES = [
    Threshold(),
    Threshold(1.4, "row"),
    InverseGate(),
    InverseGate(0.3, 1e-3, 1.5),
    Sparsemax(),
    Sparsemax(0.02),
]


def truth(states, keys=None, values=None, dtype=None, **options) -> Interaction:
    """The reference in float64, returned in the dtype of the states as a kernel would."""
    wide = [None if t is None else t.double() for t in (states, keys, values)]
    context, strength, degree = reference.interact(*wide, **options)
    dtype = dtype or states.dtype
    return Interaction(context.to(dtype), strength.to(dtype), degree)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_accepts_the_truth(score, causal, dtype):
    states = torch.randn(2, 40, 2).to(dtype)
    keys, values = torch.randn(2, 57, 2).to(dtype), torch.randn(2, 57, 3).to(dtype)
    options = {"causal": causal, "score": score, "reduction": mean_of(score)}
    result = truth(states, keys, values, **options)
    assert_interaction_close(result, states, keys, values, **options)
    lengths = torch.tensor([40, 13])
    result = truth(states, lengths=lengths, causal=causal, score=score)
    assert_interaction_close(result, states, lengths=lengths, causal=causal, score=score)


@pytest.mark.parametrize("score", SCORES)
def test_accepts_an_honest_float32_evaluation(score):
    states, values = torch.randn(300, 2), torch.randn(300, 5)
    result = reference.interact(states, values=values, score=score)
    assert_interaction_close(result, states, values=values, score=score)


def test_accepts_a_borderline_flip():
    # The scores 1, 0 and 0.5: with sigma = 0 the threshold is their mean, the last one exactly.
    score = Threshold(sigma=0.0)
    keys = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    options = {"causal": False, "score": score}
    assert count_borderline(rows, keys, **options) == 1
    result = truth(rows, keys, **options)
    assert result.degree.item() == 2
    flipped = Interaction(result.context - 0.5 * keys[2], result.strength - 0.5, result.degree - 1)
    assert_interaction_close(flipped, rows, keys, **options)
    half = Interaction(result.context - keys[2], result.strength, result.degree)
    with pytest.raises(AssertionError, match="context"):
        assert_interaction_close(half, rows, keys, **options)


def test_accepts_a_borderline_gate_flip():
    # |S| = 1 and eps = 0: the gate is exactly min_gate, so the pair is dropped, but only just.
    rows = torch.tensor([[1.0, 0.0]])
    keys = torch.tensor([[1.0, 0.0], [0.25, 0.0]])
    options = {"causal": False, "score": InverseGate(0.0, 0.0, 1.0)}
    result = truth(rows, keys, **options)
    assert result.degree.item() == 1
    flipped = Interaction(result.context + keys[0], result.strength + 1, result.degree + 1)
    assert_interaction_close(flipped, rows, keys, **options)
    assert count_borderline(rows, keys, **options) == 1


@pytest.mark.parametrize("score", [Threshold(), InverseGate(0.3, 1e-3, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rejects_a_flip_with_a_margin(score, dtype):
    """Drop the kept pair nearest to its threshold among those that rounding cannot decide."""
    states = torch.randn(64, 2, dtype=dtype)
    weight = reference.scores(states.double(), score=score)
    row = 50
    key = int(weight[row].nonzero()[0])
    result = truth(states, score=score)
    context, strength, degree = (t.clone() for t in result)
    context[row] -= (weight[row, key] * states[key]).to(dtype)
    strength[row] -= weight[row, key].to(dtype)
    degree[row] -= 1
    with pytest.raises(AssertionError, match="degree"):
        assert_interaction_close(Interaction(context, strength, degree), states, score=score)
    with pytest.raises(AssertionError, match=r"strength.*row 50"):
        assert_interaction_close(Interaction(context, strength, result.degree), states, score=score)
    with pytest.raises(AssertionError, match=r"context.*row 50"):
        assert_interaction_close(
            Interaction(context, result.strength, result.degree), states, score=score
        )


@pytest.mark.parametrize("dtype, relative", [(torch.float64, 1e-11), (torch.float32, 1e-3)])
@pytest.mark.parametrize("score", SCORES)
def test_rejects_a_perturbed_value(score, dtype, relative):
    states = torch.randn(3, 64, 2, dtype=dtype)
    result = truth(states, score=score)
    context = result.context.clone()
    row = context.abs().sum(-1).flatten().argmax()
    context.view(-1, 2)[row] *= 1 + relative
    with pytest.raises(AssertionError, match="context"):
        assert_interaction_close(result._replace(context=context), states, score=score)


@pytest.mark.parametrize("score", SCORES)
def test_rejects_the_wrong_option(score):
    states = torch.randn(64, 2)
    result = truth(states, score=score)
    for other in (
        {"score": score, "causal": False},
        *([] if score.kind.mass else [{"score": score, "reduction": "mean"}]),
        {"score": score, "lengths": torch.tensor(40)},
        {"score": Threshold(0.6)},
        {"score": InverseGate(0.4)},
    ):
        with pytest.raises(AssertionError):
            assert_interaction_close(result, states, **other)


@pytest.mark.parametrize("score", [Threshold(), InverseGate()])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_entries_must_agree(score, value):
    states = torch.randn(20, 2)
    states[7, 1] = value
    context, strength, degree = truth(states, score=score)
    assert context[7:].isnan().all() and context[:7].isfinite().all()
    assert_interaction_close(Interaction(context, strength, degree), states, score=score)

    hidden = context.clone()
    hidden[12] = 0.0
    with pytest.raises(AssertionError, match=r"context.*row 12"):
        assert_interaction_close(Interaction(hidden, strength, degree), states, score=score)
    spread = context.clone()
    spread[6] = float("nan")
    with pytest.raises(AssertionError, match=r"context.*row 6"):
        assert_interaction_close(Interaction(spread, strength, degree), states, score=score)
    hidden = strength.clone()
    hidden[12] = 0.0
    with pytest.raises(AssertionError, match=r"strength.*row 12"):
        assert_interaction_close(Interaction(context, hidden, degree), states, score=score)


def test_a_value_poisons_its_own_column():
    states, values = torch.randn(20, 2), torch.randn(20, 3)
    values[4, 1] = float("nan")
    result = truth(states, values=values)
    assert result.context[4:, 1].isnan().all() and result.context[:, 0].isfinite().all()
    assert_interaction_close(result, states, values=values)
    spread = result.context.clone()
    spread[10, 0] = float("nan")
    with pytest.raises(AssertionError, match=r"row 10, column 0"):
        assert_interaction_close(result._replace(context=spread), states, values=values)


def test_rejects_the_wrong_shape_and_dtype():
    states = torch.randn(8, 2)
    result = truth(states)
    with pytest.raises(AssertionError):
        assert_interaction_close(result._replace(context=result.context[:7]), states)
    with pytest.raises(AssertionError, match="float64"):
        assert_interaction_close(result._replace(context=result.context.double()), states)
    with pytest.raises(AssertionError, match="int64"):
        assert_interaction_close(result._replace(degree=result.degree.long()), states)


@pytest.mark.parametrize("score", [Threshold(), InverseGate(0.3, 1e-3, 1.5)])
def test_random_inputs_are_hardly_borderline(score):
    """Otherwise the comparison would excuse what it should find."""
    states = torch.randn(1000, 2)
    assert count_borderline(states, score=score) < 1e-4 * 1000**2 / 2
    assert count_borderline(states.double(), score=score) == 0


def test_relative_comparison():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert_relative("x", truth + 3e-9, truth, 1e-9)
    with pytest.raises(AssertionError, match="error"):
        assert_relative("x", truth + 5e-9, truth, 1e-9)
    with pytest.raises(AssertionError, match="shape"):
        assert_relative("x", truth[:1], truth, 1e-9)
    with pytest.raises(AssertionError, match="error"):
        assert_relative("x", truth - truth + 1e-16, truth - truth, 1e-9)
    assert_relative("x", truth - truth + 1e-16, truth - truth, 1e-9, floor=1e-3)


def test_missing_gradient():
    truth = torch.tensor([1.0, 1e-14, 0.5])
    assert_no_missing_gradient("x", torch.tensor([1.0, 0.0, 0.5]), truth)
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_no_missing_gradient("x", torch.tensor([1.0, 0.0, 0.0]), truth)


def test_poisoned_memory(poisoned_memory):
    assert torch.empty(100).isnan().all()
