"""The delta rule is what it says, in chunks; the connection memory is sparse and bounded."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qflux import ConnectionMemory, apply_update, delta_rule
from qflux.train.hebbian import largest_moment
from qflux_kernels import Threshold, scores


def make_case(tokens=37, width=5, vocab=7, dtype=torch.float64):
    head = nn.Linear(width, vocab, dtype=dtype)
    features = torch.randn(tokens, width, dtype=dtype)
    targets = torch.randint(vocab, (tokens,))
    targets[3] = -100
    return head, features, targets


def test_softmax_rule_is_minus_the_gradient_of_the_mean_cross_entropy():
    head, features, targets = make_case()
    features.requires_grad_()
    loss = F.cross_entropy(head(features), targets)
    loss.backward()
    update = delta_rule(head, features.detach(), targets, features_gradient=True)
    torch.testing.assert_close(update.loss.double(), loss, rtol=1e-6, atol=0)
    for found, expected in (
        (update.weight, -head.weight.grad),
        (update.bias, -head.bias.grad),
        (update.features, features.grad),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not update.weight.requires_grad
    assert delta_rule(head, features.detach(), targets).features is None


def test_logits_rule_is_the_least_mean_squares_update():
    head, features, targets = make_case()
    kept = targets >= 0
    residual = F.one_hot(targets[kept], 7) - head(features[kept])
    update = delta_rule(head, features, targets, error="logits", features_gradient=True)
    torch.testing.assert_close(
        update.weight, residual.T @ features[kept] / 36, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(update.bias, residual.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(update.error.double(), residual.abs().mean(), rtol=1e-5, atol=0)
    soft = delta_rule(head, features, targets, features_gradient=True)
    assert torch.equal(soft.features, update.features) and torch.equal(soft.loss, update.loss)


@pytest.mark.parametrize("error", ["softmax", "logits"])
def test_chunks_do_not_change_the_update(error):
    case = make_case()
    whole = delta_rule(*case, error=error, features_gradient=True)
    for chunk in (1, 10, 37, 1000):
        parts = delta_rule(*case, error=error, features_gradient=True, chunk=chunk)
        for found, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_no_matrix_of_tokens_by_vocabulary_exists():
    head = nn.Linear(4, 1000)
    features, targets = torch.randn(2048, 4), torch.randint(1000, (2048,))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    with Largest() as largest:
        delta_rule(head, features, targets, chunk=64)
    assert largest.elements == 64 * 1000


def test_repeated_updates_learn_what_can_be_learned():
    """The raw-logit rule stops where its outputs are 0 and 1; the softmax rule does not."""
    features, targets = torch.eye(6).repeat(4, 1), torch.arange(6).repeat(4)
    floor = math.log((math.e + 5) / math.e)
    for error, expected in (("softmax", 0.0), ("logits", floor)):
        head = nn.Linear(6, 6)
        for _ in range(800):
            update = delta_rule(head, features, targets, error=error)
            apply_update(head, update, 4.0 if error == "softmax" else 1.0)
        assert update.loss.item() == pytest.approx(expected, abs=0.02)


def test_updates_move_weight_and_bias():
    head, features, targets = make_case()
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    update = delta_rule(head, features, targets)
    apply_update(head, update, 0.5)
    torch.testing.assert_close(head.weight.detach(), weight + 0.5 * update.weight)
    torch.testing.assert_close(head.bias.detach(), bias + 0.5 * update.bias)
    plain = nn.Linear(5, 7, bias=False).double()
    apply_update(plain, delta_rule(plain, features, targets), 0.5)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"error": "hinge"}, ValueError, "error.*'hinge'"),
        ({"chunk": 0}, ValueError, "chunk.*0"),
        ({"chunk": 2.5}, TypeError, "chunk.*2.5"),
        ({"features": torch.zeros(3, 4)}, ValueError, r"features.*\(3, 4\)"),
        ({"targets": torch.zeros(4).long()}, ValueError, r"targets.*\(4,\)"),
    ],
)
def test_bad_arguments_are_named(options, error, named):
    head, features, targets = make_case()
    with pytest.raises(error, match=named):
        delta_rule(**{"head": head, "features": features, "targets": targets, **options})


def test_nothing_to_score_changes_nothing():
    head, features, _ = make_case()
    update = delta_rule(head, features, torch.full((37,), -100))
    assert update.loss == 0 and update.weight.abs().max() == 0


def test_the_largest_moment_is_the_largest_eigenvalue():
    for scale in (1.0, 30.0):
        features = scale * torch.randn(50, 6, dtype=torch.float64) + torch.arange(6)
        augmented = torch.cat((features, torch.ones(50, 1)), 1)
        expected = torch.linalg.eigvalsh(augmented.T @ augmented / 50)[-1]
        found = largest_moment(features, iterations=200)
        torch.testing.assert_close(found, expected)
        assert 0.7 * expected < largest_moment(features) <= expected * (1 + 1e-9)
    assert largest_moment(torch.zeros(3, 2)) == 1  # the bias


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_no_rate_below_four_moments_raises_the_loss(scale):
    head, features, targets = make_case()
    features = scale * features
    head.weight.data /= scale
    moment = largest_moment(features, iterations=100)
    losses = []
    for _ in range(30):
        update = delta_rule(head, features, targets)
        apply_update(head, update, 3.9 / moment)
        losses.append(update.loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1


# --- connection memory ---

RULE = {"decay": 0.9, "strength": 0.2, "gate": 0.9, "cap": 0.25, "weight": 0.5}


def dense(memory, sequences):
    matrix = torch.zeros(sequences * memory.length**2, dtype=memory.values.dtype)
    matrix[memory.pairs] = memory.values
    return matrix.view(sequences, memory.length, memory.length)


def test_memory_follows_its_rule_on_kept_pairs_only():
    score = Threshold(0.5)
    memory = ConnectionMemory.empty(torch.zeros(2, 3, 9, 2).double(), **RULE)
    expected = torch.zeros(6, 9, 9).double()
    for _ in range(4):
        states = torch.randn(2, 3, 9, 2).double()
        w = scores(states, score=score).flatten(0, 1)
        expected = 0.9 * expected + torch.where(w > 0.9, 0.2 * w, 0.0)
        expected = expected.clamp(-0.25, 0.25)
        assert ((w > 0) & (w < 0.9)).any()
        before, memory = memory, memory.update(states, score)
        torch.testing.assert_close(dense(memory, 6), expected)
    assert (expected == 0.25).any()
    assert len(memory.pairs) == (expected != 0).sum() < 6 * 45
    assert torch.equal(memory.pairs, memory.pairs.unique()) and len(before.pairs) > 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_memory_adds_its_weights_to_the_interaction(reduction):
    states = torch.randn(2, 3, 9, 2).double().requires_grad_()
    memory = ConnectionMemory.empty(states, **RULE).update(states, Threshold(0.5))
    weights = 0.5 * dense(memory, 6).view(2, 3, 9, 9)
    if reduction == "mean":
        weights = weights / torch.arange(1, 10)[:, None]
    context, strength = memory.context(states, reduction)
    torch.testing.assert_close(context, weights @ states)
    torch.testing.assert_close(strength, weights.sum(-1))
    [found] = torch.autograd.grad(context.square().sum(), states)
    [wanted] = torch.autograd.grad((weights @ states).square().sum(), states)
    torch.testing.assert_close(found, wanted)


def test_an_empty_memory_adds_nothing():
    states = torch.randn(1, 1, 4, 2)
    context, strength = ConnectionMemory.empty(states).context(states)
    assert context.shape == states.shape and strength.shape == (1, 1, 4)
    assert context.abs().max() == 0 and strength.abs().max() == 0
