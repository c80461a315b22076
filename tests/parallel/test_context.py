"""Sequences over 2 and 4 ranks against one process: operators, models, and what is refused.

Each `split_...` function is a check that every rank makes; a group of processes makes them all.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import ranks
import torch

import qflux_kernels
from qflux import make_config, make_model
from qflux.parallel import context_parallel, interaction, shard, unshard
from qflux.parallel.layout import Layout
from qflux_kernels import InverseGate, Radius, Threshold, evolve, interact

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Ragged over 4 and over 8 chunks, shorter than the chunks, one token, none.
LENGTHS = (61, 32, 3, 0)
CYLINDERS = 3


def scores():
    sigma = torch.tensor([0.0, 0.5, 1.4], dtype=torch.float64)
    found = [
        Threshold(sigma=sigma),
        Threshold(sigma=sigma, stats="row"),
        Threshold(sigma=sigma, shrinkage="soft"),
        Threshold(sigma=sigma, stats="row", shrinkage="soft"),
        InverseGate(alpha=sigma, min_gate=0.6),
    ]
    if hasattr(qflux_kernels, "Sparsemax"):
        found.append(qflux_kernels.Sparsemax(scale=1 + sigma))
    return found


def with_gradient(score):
    """The score with its numbers of each cylinder as something to learn, and these numbers."""
    name = score.per_sequence[0]
    number = getattr(score, name).clone().requires_grad_()
    return replace(score, **{name: number}), number


def points(*shape):
    return torch.randn(shape, dtype=torch.float64)


def compare_interaction(mesh, length, score, *, values=True, keys=True, lengths=None, **options):
    """Results and every gradient of the parts against those of the whole."""
    whole = [points(2, CYLINDERS, length, 2)]
    whole += [points(2, CYLINDERS, length, 2)] if keys else []
    whole += [points(2, CYLINDERS, length, 5)] if keys and values else []
    whole = [tensor.requires_grad_() for tensor in whole]
    weight = points(2, CYLINDERS, length, 5 if keys and values else 2)
    weight_of_strength = points(2, CYLINDERS, length)
    score, number = with_gradient(score)
    inputs = [*whole, number]
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths)[:, None].clamp(max=length)

    expected = interact(*whole, score=score, **options)
    loss = (expected.context * weight).sum() + (expected.strength * weight_of_strength).sum()
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    parts = [shard(tensor, mesh, -2) for tensor in whole]
    # Without a length the ranks ask one another.
    with context_parallel(mesh, length if length % 2 else None):
        found = interact(*parts, score=score, **options)
        loss = (found.context * shard(weight, mesh, -2)).sum()
        loss = loss + (found.strength * shard(weight_of_strength, mesh, -1)).sum()
        own = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    for name, dim in (("context", -2), ("strength", -1), ("degree", -1)):
        part = shard(getattr(expected, name), mesh, dim)
        torch.testing.assert_close(getattr(found, name), part, **CLOSE, msg=name)
    compare_gradients(own, gradients)


def compare_gradients(own, gradients):
    """Those of all ranks together, in one sum, against those of one process."""
    total = torch.cat([gradient.flatten() for gradient in own])
    torch.distributed.all_reduce(total)
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(total, expected, **CLOSE)


def split_parts_are_the_whole(mesh):
    for length in LENGTHS:
        for tensor, dim in ((torch.randint(9, (3, length)), 1), (points(2, length, 3), -2)):
            part = shard(tensor, mesh, dim)
            assert torch.equal(unshard(part, mesh, dim), tensor)
        flags = torch.rand(2, length) > 0.5
        assert torch.equal(unshard(shard(flags, mesh), mesh), flags)


def split_every_score(mesh):
    for length, score in itertools.product(LENGTHS, scores()):
        compare_interaction(mesh, length, score)
    for score in scores():
        if type(score).__name__ != "Sparsemax":  # its weights are a mean
            compare_interaction(mesh, 61, score, reduction="mean")


def split_states_alone(mesh):
    for causal, score in itertools.product((True, False), scores()):
        compare_interaction(mesh, 37, score, keys=causal, values=False, causal=causal)
        compare_interaction(mesh, 37, score, keys=not causal, values=False, causal=causal)


def split_lengths(mesh):
    """Padded sequences, also one that ends before a rank's chunk and one that is empty."""
    for causal, score in itertools.product((True, False), scores()):
        compare_interaction(mesh, 37, score, causal=causal, lengths=(21, 0))


def split_padding_is_not_seen(mesh):
    """Not even NaN in it, forward or backward."""
    for score in scores():
        states = points(1, 1, 20, 2)
        states[..., 13:, :] = float("nan")
        states.requires_grad_()
        options = {"score": type(score)(), "lengths": torch.tensor([[13]])}
        if isinstance(score, Threshold):
            options["score"] = Threshold(stats=score.stats, shrinkage=score.shrinkage)
        with context_parallel(mesh):
            found = interact(shard(states, mesh, -2), **options)
            found.context.sum().backward()
        assert found.context.isfinite().all() and states.grad.isfinite().all()


def split_sweep_and_reference(mesh):
    for score in scores():
        if isinstance(score, Threshold):
            compare_interaction(mesh, 301, score, algorithm="sweep")
        compare_interaction(mesh, 45, score, backend="reference")


def split_groups_of_cylinders(mesh):
    """Keys that travel in several parts, and a part that is kept from being a group."""
    before, interaction.GROUP_BYTES = interaction.GROUP_BYTES, 1
    try:
        for score in scores():
            compare_interaction(mesh, 29, score)
            compare_interaction(mesh, 29, score, lengths=(29, 8), causal=False)
    finally:
        interaction.GROUP_BYTES = before


def split_steps(mesh):
    """Evolution: several steps, time steps of each token, skips, and a radius rule."""
    for length, score in ((37, scores()[0]), (2, scores()[2]), (37, scores()[3])):
        for options in (
            {},
            {"steps": 2, "reduction": "mean", "radius": Radius(reversion=0.1)},
            {"causal": False, "radius": None, "lengths": torch.tensor([[length], [length // 3]])},
        ):
            states = (0.5 * points(2, CYLINDERS, length, 2)).requires_grad_()
            dt = torch.rand(2, 1, length, dtype=torch.float64, requires_grad=True)
            skip = torch.rand(CYLINDERS, 1, dtype=torch.float64, requires_grad=True)
            weight = points(2, CYLINDERS, length, 2)
            tuned, number = with_gradient(score)
            given = {"score": tuned, "skip": skip, **options}
            inputs = [states, dt, skip, number]
            expected = evolve(states, 0.1 * dt, **given)
            loss = (expected.states * weight).sum()
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            with context_parallel(mesh, length):
                found = evolve(shard(states, mesh, -2), 0.1 * shard(dt, mesh, -1), **given)
                loss = (found.states * shard(weight, mesh, -2)).sum()
                own = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            part = shard(expected.states, mesh, -2)
            torch.testing.assert_close(found.states, part, **CLOSE)
            assert torch.equal(found.degree, shard(expected.degree, mesh, -1))
            compare_gradients(own, gradients)


MODELS = (
    ("lm", {"num_layers": 2, "evolution": True, "score": "threshold", "shrinkage": "hard"}),
    ("lm", {"num_layers": 1, "score": "threshold", "shrinkage": "soft"}),
    ("lm", {"num_layers": 2}),
    ("flux", {"num_layers": 2, "coherence_weight": 0.1, "timestep": "constant"}),
    ("qfnn", {"num_layers": 2, "radius_bounds": "context"}),
)


def small_model(preset, options):
    config = make_config(preset, 11, hidden_dim=16, context_length=48, num_cylinders=3, **options)
    return make_model(config).double()


def split_models(mesh):
    """Logits, losses with ignored labels, and the gradient of every parameter."""
    for preset, options in MODELS:
        for length in (48, 45):
            model = small_model(preset, options)
            ids = torch.randint(11, (2, length))
            labels = torch.where(torch.rand(2, length) < 0.3, -100, ids)
            expected = model(ids, labels=labels)
            expected.loss.backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            with context_parallel(mesh):
                found = model(shard(ids, mesh), labels=shard(labels, mesh))
                found.loss.backward()
            torch.testing.assert_close(unshard(found.logits, mesh), expected.logits, **CLOSE)
            for name in ("loss", "cross_entropy"):
                total = getattr(found, name).detach().clone()
                torch.distributed.all_reduce(total)
                torch.testing.assert_close(total, getattr(expected, name), **CLOSE)
            compare_gradients([p.grad for p in model.parameters()], gradients)


def split_recomputed_layers(mesh):
    """Activation checkpointing recomputes a layer, collectives and all, in the backward."""
    from qflux.train.step import checkpoint_layers

    model = small_model("lm", {"num_layers": 2})
    ids = torch.randint(11, (2, 48))
    model(ids, labels=ids).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint_layers(model)
    with context_parallel(mesh, 48):
        part = shard(ids, mesh)
        model(part, labels=part).loss.backward()
    compare_gradients([p.grad for p in model.parameters()], gradients)


def split_the_graph_keeps_a_part(mesh):
    """What autograd saves of gathered keys and values is a note, until the backward."""
    length = 64 * mesh.size()
    whole = [points(2, CYLINDERS, length, width).requires_grad_() for width in (2, 2, 5)]
    parts = [shard(tensor, mesh, -2) for tensor in whole]
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    original = interaction._Keys.pack
    interaction._Keys.pack = lambda self, tensor: (
        kept if not isinstance(kept := original(self, tensor), torch.Tensor) else pack(kept)
    )
    try:
        with context_parallel(mesh):
            interact(*parts, score=Threshold(shrinkage="soft"))
    finally:
        interaction._Keys.pack = original
    assert saved and max(saved) <= 8 * 2 * CYLINDERS * (length // mesh.size()) * 7


def raises(kind, text, action):
    with pytest.raises(kind, match=text):
        action()


def split_what_is_refused(mesh):
    """The same error on every rank, and none of them waits for another."""
    count, rank = mesh.size(), mesh.get_local_rank()
    states = points(1, 2, 8 * count + rank, 2)
    with context_parallel(mesh):
        raises(ValueError, "the shards of .* tokens over .* got", lambda: interact(states))
    with context_parallel(mesh, 64):
        raises(ValueError, "a shard of 64 tokens", lambda: interact(points(1, 2, 65, 2)))
        part = points(1, 2, 64 // count, 2)
        raises(ValueError, "as many keys as states", lambda: interact(part, points(1, 2, 5, 2)))
    model = small_model("lm", {"num_layers": 1})
    ids = shard(torch.randint(11, (1, 4 * count)), mesh)
    with context_parallel(mesh):
        raises(ValueError, "a convolution needs the 3 tokens before", lambda: model(ids))
    model = small_model("flux", {"num_layers": 1, "memory": True})
    with context_parallel(mesh):
        raises(ValueError, "memory needs whole sequences", lambda: model(ids))
    raises(TypeError, "mesh must be a DeviceMesh", lambda: shard(states, "cpu"))
    raises(ValueError, "dim must be an integer in", lambda: shard(states, mesh, 7))
    if count == 4:
        square = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        raises(ValueError, r"one dimension.*\(2, 2\).*mesh\['b'\]", lambda: shard(states, square))
        compare_interaction_on_half(square["b"])


def compare_interaction_on_half(mesh):
    """Two pairs of ranks with sequences of their own."""
    torch.manual_seed(torch.distributed.get_rank() // 2)
    states = points(2, 2, 31, 2)
    expected = interact(states).context
    with context_parallel(mesh):
        found = interact(shard(states, mesh, -2)).context
    torch.testing.assert_close(unshard(found, mesh, -2), expected, **CLOSE)


CHECKS = [name for name in globals() if name.startswith("split_")]


@pytest.fixture(scope="module", params=[2, 4])
def checked(request):
    return ranks.run(request.param, __file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_parts_compute_what_one_process_computes(checked, name):
    assert not checked[name], checked[name]


@pytest.mark.parametrize("length", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_layout_has_every_token_once_and_balances_pairs(length, count):
    layout = Layout(length, count)
    seen = torch.cat([layout.positions(rank) for rank in range(count)])
    assert seen.sort().values.tolist() == list(range(length))
    assert layout.order.sort().values.unique().numel() == length
    pairs = [int((layout.positions(rank) + 1).sum()) for rank in range(count)]
    assert max(pairs) - min(pairs) <= 3 * length + 1
