"""Any batch dimensions with any strides: the results of contiguous copies, without a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qflux_kernels
from qflux_kernels import InverseGate, Sparsemax, Threshold

OPS = torch.ops.qflux_kernels
ROWS, KEYS, DIM, STEPS = 33, 40, 3, 2
Make = Callable[..., torch.Tensor]

# With `new(*shape)`, a tensor (*batch, n, d) of n tokens of d numbers. The kernels walk the batch
# of each of these by two strides.
LAYOUTS = {
    "none": lambda new, n, d: new(n, d),
    "one": lambda new, n, d: new(3, n, d),
    "one, tokens first": lambda new, n, d: new(n, 3, d).transpose(0, 1),
    "one, expanded": lambda new, n, d: new(n, d).expand(3, n, d),
    "two": lambda new, n, d: new(2, 3, n, d),
    "two, heads of a projection": lambda new, n, d: new(2, n, 3, d + 4)[..., 1 : d + 1].transpose(
        1, 2
    ),
    "two, numbers apart": lambda new, n, d: new(2, 3, d, n).transpose(2, 3),
    "two, transposed": lambda new, n, d: new(3, 2, n, d).transpose(0, 1),
    "two, every second": lambda new, n, d: new(4, 6, 2 * n, d)[::2, 1::2, ::2],
    "two, expanded over the first": lambda new, n, d: new(3, n, d).expand(2, 3, n, d),
    "two, expanded over the second": lambda new, n, d: new(2, 1, n, d).expand(2, 3, n, d),
    "two, expanded over both": lambda new, n, d: new(n, d).expand(2, 3, n, d),
    "two, the first of one": lambda new, n, d: new(n, 3, d).transpose(0, 1)[None],
    "three": lambda new, n, d: new(2, 2, 3, n, d),
    "three, heads": lambda new, n, d: new(2, 2, n, 3, d).transpose(2, 3),
    "three, the first inside": lambda new, n, d: new(2, 3, 2, n, d).movedim(2, 0),
    "three, expanded over the last two": lambda new, n, d: new(2, 1, 1, n, d).expand(2, 2, 3, n, d),
    "four": lambda new, n, d: new(2, 1, 2, 2, n, d),
    "four, two by two": lambda new, n, d: new(2, 2, n, 2, 3, d).movedim(2, 4),
    "four, two of one": lambda new, n, d: new(2, n, 3, d).transpose(1, 2)[:, None, :, None],
}
# Of these a copy is made.
COPIED = {
    "three, reversed": lambda new, n, d: new(3, 2, 2, n, d).permute(2, 1, 0, 3, 4),
    "three, expanded over the second": lambda new, n, d: new(2, 1, 3, n, d).expand(2, 2, 3, n, d),
    "four, reversed": lambda new, n, d: new(3, 2, 2, 2, n, d).permute(3, 2, 1, 0, 4, 5),
}
EVERY = LAYOUTS | COPIED
# The arguments of a pair from `score` on: eps, whole_window, causal, mean, algorithm.
PAIRS = {
    "hard": (0, 1e-6, False, True, False, 0),
    "gate": (1, 1e-3, False, True, False, 0),
    "soft": (2, 1e-6, True, True, True, 0),
    "soft, every key": (2, 1e-6, False, False, False, 0),
}
SCORES = [Threshold(), InverseGate(0.3), Threshold(0.4, shrinkage="soft")]


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lengths(*shape: int) -> torch.Tensor:
    return torch.randint(ROWS + 1, shape)


def contiguous(arguments: tuple) -> tuple:
    """The arguments, each tensor as a copy that has all its own memory, in order."""
    return tuple(
        a.clone(memory_format=torch.contiguous_format) if isinstance(a, torch.Tensor) else a
        for a in arguments
    )


def run(op: Callable, *arguments) -> tuple[torch.Tensor, ...]:
    """What the op returns, after comparing it with what it returns for contiguous copies."""
    found, expected = op(*arguments), op(*contiguous(arguments))
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.is_contiguous(), number
        assert torch.equal(one, other), f"result {number} of {op}"
    return found


class Call:
    """Arguments of the ops, each in the layout of its name or else that of all."""

    def __init__(self, layout: Make, **others: Make):
        self.layout, self.others = layout, others

    def tokens(self, name: str, n: int, d: int) -> torch.Tensor:
        return self.others.get(name, self.layout)(rand, n, d)

    def number(self, name: str, new: Make = rand) -> torch.Tensor:
        return self.others.get(name, self.layout)(new, 1, 1)[..., 0, 0]

    def row(self, name: str) -> torch.Tensor:
        return self.tokens(name, ROWS, 1)[..., 0]

    def per_token(self, name: str, steps: int) -> torch.Tensor:
        return self.tokens(name, ROWS, steps).movedim(-1, 0) * 1.0

    def pair(self, pair: tuple, with_lengths: bool) -> tuple:
        return (
            self.number("coefficient"), 0.0, self.number("min_gate"), 0.0,
            self.number("lengths", lengths) if with_lengths else None, *pair,
        )  # fmt: skip

    def interact(self, pair: tuple, given: str) -> None:
        states = self.tokens("states", ROWS, 2)
        keys = self.tokens("keys", KEYS, 2) if given != "states" else None
        values = self.tokens("values", KEYS, DIM) if given == "values" else None
        options = self.pair(pair, given == "states")
        points = (states, keys, values)
        *_, threshold, moments = run(OPS.interact, *points, *options, True)
        grad_context = self.tokens("grad_context", ROWS, DIM if given == "values" else 2)
        left = (threshold, moments if moments.dim() > 1 else None)
        upstream = (grad_context, self.row("grad_strength"), *left)
        for needs in ((True, True), (True, False), (False, True)):
            run(OPS.interact_backward, *upstream, *points, *options, *needs)
        run(
            OPS.threshold_backward, self.row("grad_threshold"), states, keys, options[0], 0.0,
            options[4], *pair[1:4],
        )  # fmt: skip

    def evolve(self, pair: tuple, rows_of_dt: int) -> None:
        tokens = (self.per_token("dt", rows_of_dt), 0.0, self.per_token("skip", 1), 0.0)
        options = (*self.pair(pair, True), STEPS, True, 0.1, 2.0, 0.01, 0.1, 1.0)
        states = self.tokens("states", ROWS, 2)
        tape = run(OPS.evolve, states, *tokens, *options, True)[3]
        upstream = (self.tokens("grad_states", ROWS, 2), self.row("grad_strength"), tape)
        run(OPS.evolve_backward, *upstream, *tokens, *options)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("given", ["states", "keys", "values"])
@pytest.mark.parametrize("layout", EVERY)
def test_interact(layout, given, pair):
    Call(EVERY[layout]).interact(PAIRS[pair], given)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rows_of_dt", [1, STEPS])
@pytest.mark.parametrize("layout", EVERY)
def test_evolve(layout, rows_of_dt, pair):
    Call(EVERY[layout]).evolve(PAIRS[pair], rows_of_dt)


@pytest.mark.parametrize("dims", ["two", "three", "four"])
def test_every_argument_in_a_layout_of_its_own(dims):
    """One split of the batch dimensions has to serve all the tensors of a call."""
    fitting = [make for name, make in EVERY.items() if name.split(",")[0] == dims]
    shape = fitting[0](rand, 1, 1).shape
    fitting = [make for make in fitting if make(rand, 1, 1).shape == shape]
    names = (
        "states", "keys", "values", "coefficient", "min_gate", "lengths", "grad_context",
        "grad_strength", "grad_threshold", "dt", "skip", "grad_states",
    )  # fmt: skip
    for turn in range(len(fitting)):
        of = {name: fitting[(turn + n) % len(fitting)] for n, name in enumerate(names)}
        call = Call(fitting[0], **of)
        for pair in PAIRS.values():
            for given in ("states", "values"):
                call.interact(pair, given)
            call.evolve(pair, STEPS)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 2, 3)], ids=str)
def test_an_empty_batch(shape):
    call = Call(lambda new, n, d: new(*shape, n, d))
    call.interact(PAIRS["soft"], "values")
    call.evolve(PAIRS["soft"], STEPS)


def differentiated(layout: Make, score, copy: bool):
    """Results and gradients of both functions, on views or copies, and the ops that ran."""
    torch.manual_seed(1)
    shapes = {"states": (ROWS, 2), "keys": (KEYS, 2), "values": (KEYS, DIM), "grad": (ROWS, DIM)}
    given = {name: layout(rand, *shape) for name, shape in shapes.items()}
    given["dt"] = layout(rand, ROWS, 1)[..., 0]
    if copy:
        given = dict(zip(given, contiguous(tuple(given.values())), strict=True))
    states, keys, values, dt = (
        given[n].requires_grad_() for n in ("states", "keys", "values", "dt")
    )
    found = []
    with torch.autograd.profiler.profile() as profile:
        one = qflux_kernels.interact(states, keys, values, score=score, backend="cpu")
        found += one[:3]
        # The gradient of a sum comes expanded.
        found += torch.autograd.grad(
            (one.context, one.strength.sum()), (states, keys, values), (given["grad"], None)
        )
        two = qflux_kernels.evolve(states, dt, score=score, steps=STEPS, backend="cpu")
        found += two[:3]
        found += torch.autograd.grad((two.states.sum(), two.strength.sum()), (states, dt))
    return found, [event.name for event in profile.function_events]


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("layout", EVERY)
def test_public_functions_copy_nothing(layout, score):
    """Neither the functions nor the ops behind them; the batches that need it, once in a call."""
    found, events = differentiated(EVERY[layout], score, copy=False)
    expected, usual = differentiated(EVERY[layout], score, copy=True)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), number
    assert any("qflux_kernels::interact_backward" in name for name in events)
    copies = [name for name in events if name in ("aten::clone", "aten::copy_")]
    assert bool(copies) == (layout in COPIED), copies
    assert not [name for name in usual if name in ("aten::clone", "aten::copy_")]


def far_apart(tmp_path, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The tensor with more than 2^31 elements between neighbours along a dimension.

    It lies in a sparse file, of which only the pages that are touched take memory.
    """
    stride = 2**31 + 7
    elements = (tensor.shape[dim] - 1) * stride + tensor.numel()
    file = tmp_path / str(len(list(tmp_path.iterdir())))
    memory = torch.from_file(str(file), shared=True, size=elements, dtype=tensor.dtype)
    strides = list(tensor.stride())
    strides[dim] = stride
    view = memory.as_strided(tensor.shape, strides)
    return view.copy_(tensor)


@pytest.mark.parametrize("dim", range(4))
def test_more_than_2_to_the_31_elements_between_two(tmp_path, dim):
    """A 32-bit offset anywhere, forward or backward, would read another page or none."""
    states, values = torch.randn(2, 3, 5, 2), torch.randn(2, 3, 5, 2)
    pull, dt = torch.randn(2, 3, 5, 2), torch.rand(2, 3, 5) / 10
    for score in (Threshold(), InverseGate(0.3), Threshold(0.4, shrinkage="soft"), Sparsemax()):
        found = []
        for move in (lambda t, _at: t, lambda t, at: far_apart(tmp_path, t, at)):
            given = [move(states, dim), move(values, dim)]
            # A view of a leaf, so that the gradient of a result has far strides too.
            leaves = [t.detach().requires_grad_() for t in given]
            seen = qflux_kernels.interact(leaves[0], values=leaves[1], score=score)
            time = move(dt, min(dim, 2))
            moved = qflux_kernels.evolve(leaves[0], time, score=score, steps=2)
            grads = torch.autograd.grad(
                [seen.context, moved.states], leaves, [move(pull, dim), move(pull, dim)]
            )
            found.append([*seen, *moved, *grads])
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("batch", [(3, 25_000), (25_000, 3), (60_000,)])
@pytest.mark.parametrize("score", [InverseGate, Sparsemax, lambda a: Threshold(a, "row")])
def test_many_short_sequences_are_those_of_smaller_batches(batch, score):
    """They are staged in parts, which end where a batch dimension may not."""
    # Transposed, so that the two batch dimensions cannot be walked as one.
    states, values, alpha = rand(*batch, 2, 2), rand(*batch, 2, 3), rand(*batch)
    states = states.transpose(0, -2).contiguous().transpose(0, -2)
    lengths = torch.randint(0, 3, batch)

    def run(*index):
        leaves = [t[index].clone().requires_grad_() for t in (states, values, alpha)]
        leaves[0] = states[index].detach().requires_grad_()
        options = {"score": score(leaves[2]), "lengths": lengths[index]}
        seen = qflux_kernels.interact(leaves[0], values=leaves[1], **options)
        moved = qflux_kernels.evolve(leaves[0], 0.1, **options)
        grads = torch.autograd.grad(
            seen.context.sum() + seen.strength.square().sum() + moved.states.square().sum(),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        return [*seen, *moved, *grads]

    longest = max(range(len(batch)), key=lambda d: batch[d])
    size = batch[longest] // 5
    whole = run()
    for first in range(0, batch[longest], size):
        part = (slice(None),) * longest + (slice(first, first + size),)
        for got, wanted in zip(whole, run(*part), strict=True):
            assert torch.equal(got[part], wanted)
