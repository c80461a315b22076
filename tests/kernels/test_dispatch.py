"""The operators as PyTorch sees them: dispatcher, compiler, transforms, autocast, memory."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from inputs import mean_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import qflux_kernels
from qflux_kernels import InverseGate, Radius, Sparsemax, Threshold, backends, evolve, interact

OPS = torch.ops.qflux_kernels
PAIR = {
    "threshold": (0, 1e-6, False, True, False, 2),
    "whole window, mean": (0, 1e-6, True, True, True, 0),
    "gate": (1, 1e-3, False, False, False, 1),
    "soft_threshold": (2, 1e-6, False, True, False, 2),
}
STEP = (2, True, 0.1, 2.0, 0.01, 0.1, 1.0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(device, batch=2, rows=9, keys=None, depth=3, dtype=torch.float32):
    """States, keys, values, a coefficient, a minimal gate and lengths of the ops."""
    keys = rows if keys is None else keys

    def tensor(*shape):
        return torch.randn(*shape, dtype=dtype, device=device)

    lengths = torch.tensor([rows, rows // 2], device=device)[:batch]
    return (
        tensor(batch, rows, 2),
        tensor(batch, keys, 2),
        tensor(batch, keys, depth),
        tensor(batch),
        torch.rand(batch, dtype=dtype, device=device),
        lengths,
    )


def requires(tensors, wanted):
    """Copies of the tensors, of which the wanted ones ask for gradients."""
    return [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]


@pytest.mark.parametrize("pair", PAIR)
@pytest.mark.parametrize("given", ["states", "keys", "values", "all", "lengths", "nothing"])
@pytest.mark.parametrize("wanted", [(0,), (1, 2, 3)], ids=str)
def test_opcheck_interact(device, wanted, given, pair):
    rows, keys = (9, 14) if given in ("keys", "all") else (9, 9)
    if given == "nothing":
        rows, keys = 0, 0
    tensors = inputs(device, rows=rows, keys=keys)
    states, sources, values, alpha, min_gate, lengths = requires(tensors, wanted)
    gate = PAIR[pair][0] == 1
    torch.library.opcheck(
        OPS.interact.default,
        (
            states,
            sources if given in ("keys", "all") else None,
            values if given in ("values", "all") else None,
            alpha if given == "all" else None,
            0.5,
            min_gate if given == "all" and gate else None,
            0.0,
            lengths if given == "lengths" else None,
            *PAIR[pair],
            bool(wanted),
        ),
    )


@pytest.mark.parametrize("pair", PAIR)
@pytest.mark.parametrize("given", ["states", "keys", "values", "all", "nothing"])
@pytest.mark.parametrize(
    "needs, wanted",
    [((True, True), (0, 1, 2, 3)), ((True, False), (0,)), ((False, True), (1, 2))],
    ids=str,
)
def test_opcheck_interact_backward(device, needs, wanted, given, pair):
    rows, keys = (9, 14) if given in ("keys", "all") else (9, 9)
    if given == "nothing":
        rows, keys = 0, 0
    tensors = inputs(device, rows=rows, keys=keys)
    states, sources, values, alpha, _, _ = requires(tensors, wanted)
    sources = sources if given in ("keys", "all") else None
    values = values if given in ("values", "all") else None
    alpha = alpha if given == "all" else None
    arguments = (states, sources, values, alpha, 0.5, None, 0.0, None, *PAIR[pair])
    context, strength, _, threshold, moments = (t.detach() for t in OPS.interact(*arguments, True))
    upstream = torch.randn_like(context), torch.randn_like(strength)
    left = threshold, moments if moments.dim() > 1 else None
    torch.library.opcheck(OPS.interact_backward.default, (*upstream, *left, *arguments, *needs))


@pytest.mark.parametrize("pair", PAIR)
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("rows", [0, 9, 33])
@pytest.mark.parametrize("wanted", [(), (0, 3)], ids=str)
def test_opcheck_evolve(device, wanted, rows, save, tensors, pair):
    states, _, _, alpha, min_gate, lengths = requires(inputs(device, rows=rows), wanted)
    dt, skip = torch.rand(2, 2, rows, device=device), torch.rand(1, 2, rows, device=device)
    gate = PAIR[pair][0] == 1
    coefficients = (alpha, 0.0, min_gate if gate else None, 0.0, lengths)
    arguments = (
        states,
        dt if tensors else None,
        0.1,
        skip if tensors else None,
        0.2,
        *(coefficients if tensors else (None, 0.5, None, 0.0, None)),
        *PAIR[pair],
        *STEP,
    )
    torch.library.opcheck(OPS.evolve.default, (*arguments, save))
    if save:
        result, strength, _, tape = (t.detach() for t in OPS.evolve(*arguments, True))
        torch.library.opcheck(
            OPS.evolve_backward.default,
            (torch.randn_like(result), torch.randn_like(strength), tape, *arguments[1:]),
        )


SCORES = {
    "threshold": lambda alpha: Threshold(1.4, "row"),
    "gate": lambda alpha: InverseGate(alpha, 1e-3),
    "soft_threshold": lambda alpha: Threshold(alpha, shrinkage="soft"),
    "sparsemax": lambda alpha: Sparsemax(alpha),
}
RUNS = [(name, score) for name in ("interact", "evolve") for score in SCORES]


def run_interact(states, keys, values, alpha, lengths, score):
    alone = interact(states, lengths=lengths, score=SCORES[score](alpha))
    reduction = mean_of(SCORES[score](0.0))
    full = interact(states, keys, values, score=SCORES[score](alpha), reduction=reduction)
    return alone.context, alone.strength, alone.degree, full.context, full.strength


def run_evolve(states, dt, skip, alpha, lengths, score):
    reduction = mean_of(SCORES[score](0.0))
    options = {"score": SCORES[score](alpha), "steps": 2, "reduction": reduction}
    return tuple(evolve(states, dt, skip=skip, lengths=lengths, **options))


def outputs_and_gradients(function, tensors, *rest):
    """What a function returns and its gradients under a fixed pull."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves, *rest)
    smooth = [t for t in outputs if t.is_floating_point()]
    pull = [torch.arange(t.numel(), device=t.device).cos().view_as(t) for t in smooth]
    return [*outputs, *torch.autograd.grad(smooth, leaves, pull, materialize_grads=True)]


def problem(device, name, rows, score):
    states, keys, values, alpha, _, lengths = inputs(device, rows=rows, keys=rows + 3)
    if name == "interact":
        return run_interact, (states, keys, values, alpha), (lengths, score)
    dt, skip = torch.rand(2, 2, rows, device=device) / 10, torch.rand(rows, device=device)
    return run_evolve, (states, dt, skip, alpha), (lengths, score)


@pytest.mark.parametrize("name, score", RUNS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(device, backend, name, score):
    function, tensors, rest = problem(device, name, 21, score)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    wanted = outputs_and_gradients(function, tensors, *rest)
    got = outputs_and_gradients(compiled, tensors, *rest)
    assert all(map(torch.equal, got, wanted))


def test_compile_with_inductor(device):
    function, tensors, rest = problem(device, "evolve", 21, "gate")
    compiled = torch.compile(function, fullgraph=True)
    wanted = outputs_and_gradients(function, tensors, *rest)
    got = outputs_and_gradients(compiled, tensors, *rest)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, score", RUNS)
def test_no_recompilation_over_lengths(device, name, score):
    function, tensors, rest = problem(device, name, 21, score)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    outputs_and_gradients(compiled, tensors, *rest)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (22, 37, 64, 130):
            function, tensors, rest = problem(device, name, rows, score)
            got = outputs_and_gradients(compiled, tensors, *rest)
            wanted = outputs_and_gradients(function, tensors, *rest)
            assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: interact(x).context,
        lambda x: evolve(x, 0.1).states,
        lambda x: qflux_kernels.project_norm(x, torch.ones(4, 2, device=x.device)),
    ],
    ids=["interact", "evolve", "project_norm"],
)
def test_compile_where_nothing_needs_a_gradient(device, function, mode):
    states = torch.randn(3, 20, 2, device=device)
    with mode():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(states)
        assert torch.equal(compiled, function(states))


NUMBERS = {
    "dt": lambda x, number: evolve(x, number).states,
    "skip": lambda x, number: evolve(x, 0.1, skip=number).states,
    "sigma": lambda x, number: interact(x, score=Threshold(number)).context,
    "alpha": lambda x, number: interact(x, score=InverseGate(number)).context,
    "min_gate": lambda x, number: interact(x, score=InverseGate(min_gate=number)).context,
    "scale": lambda x, number: evolve(x, 0.1, score=Sparsemax(number)).states,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_recompilation_over_numbers(device, name):
    """One graph for the first value, as everywhere in PyTorch, and one for all others."""
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(NUMBERS[name], fullgraph=True, backend=count)
    states = torch.randn(12, 2, device=device)
    for number in (0.1, 0.25, 0.5, 0.75, 1.5):
        assert torch.equal(compiled(states, number), NUMBERS[name](states, number))
    assert len(graphs) <= 2


def dynamic_programs():
    return {
        "interact": lambda x: interact(x).context,
        "values": lambda x: interact(x, values=x.repeat(1, 1, 2)).context,
        "soft": lambda x: interact(x, score=Threshold(shrinkage="soft")).context,
        "sparsemax": lambda x: interact(x, score=Sparsemax(x.new_ones(1))).context,
        "evolve": lambda x: evolve(x, x[..., 0], steps=2).states,
        "project_norm": lambda x: qflux_kernels.project_norm(x, x.new_ones(4, 2)),
        "reference": lambda x: interact(x, backend="reference", score=Sparsemax()).context,
        "scores": lambda x: qflux_kernels.scores(x),
    }


@pytest.mark.parametrize("name", dynamic_programs())
def test_traced_programs_take_any_batch_and_length(device, name):
    function = dynamic_programs()[name]

    class Program(torch.nn.Module):
        def forward(self, x):
            return function(x)

    given, other = torch.randn(4, 12, 2, device=device), torch.randn(7, 31, 2, device=device)
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    exported = torch.export.export(Program(), (given,), dynamic_shapes=sizes).module()
    traced = make_fx(function, tracing_mode="symbolic")(given)
    for program in (exported, traced):
        torch.testing.assert_close(program(other), function(other))


def test_exported_programs_that_return_results_are_saved():
    class Program(torch.nn.Module):
        def forward(self, x):
            return interact(x), evolve(x, 0.1)

    file, states = io.BytesIO(), torch.randn(4, 12, 2)
    torch.export.save(torch.export.export(Program(), (states,)), file)
    file.seek(0)
    interaction, evolution = torch.export.load(file).module()(states)
    assert type(interaction) is qflux_kernels.Interaction
    assert torch.equal(interaction.context, interact(states).context)
    assert torch.equal(evolution.states, evolve(states, 0.1).states)


def test_tensors_of_a_device_that_is_not_here(monkeypatch):
    """Traced for a GPU on a machine without one, as a cross-compiler does."""
    monkeypatch.setattr(backends, "CUDA_ARCHITECTURES", ("sm_90",))
    with FakeTensorMode():
        states = torch.empty(3, 8, 2, device="cuda")
        assert interact(states).context.device.type == "cuda"
        assert evolve(states, 0.1, steps=2).states.shape == (3, 8, 2)


def test_the_default_device_is_not_where_results_lie():
    states = torch.randn(5, 2)
    with torch.device("meta"):
        cache, steps = qflux_kernels.InteractionCache(), qflux_kernels.EvolutionCache()
        cache.append(states)
        results = [
            *interact(states),
            *interact(states, backend="reference", score=Sparsemax()),
            *evolve(states, 0.1, backend="reference"),
            qflux_kernels.scores(states),
            qflux_kernels.scores(states, layout="csr").to_dense(),
            *cache.attend(states),
            *steps.advance(states, 0.1),
        ]
    assert all(result.device.type == "cpu" for result in results)


@pytest.mark.parametrize("rows", [0, 1, 8])
def test_jacobians(rows):
    states, weight = torch.randn(rows, 2), torch.randn(3, 2)
    functions = [
        lambda x: interact(x).context,
        lambda x: interact(x, score=Threshold(shrinkage="soft")).context,
        lambda x: interact(x, score=Sparsemax()).context,
        lambda x: evolve(x, 0.1, steps=2).states,
        lambda x: evolve(torch.ones_like(x), x[:, 0], score=InverseGate()).states,
        lambda x: qflux_kernels.project_norm(x, weight),
        lambda x: qflux_kernels.project_norm(torch.ones(5, 2), x) if rows else x,
    ]
    for function in functions:
        found = torch.func.jacrev(function)(states)
        out = function(states)
        assert found.shape == (*out.shape, *states.shape)
        for index in range(out.numel()):
            (row,) = torch.autograd.grad(
                function(leaf := states.clone().requires_grad_()).flatten()[index], leaf
            )
            torch.testing.assert_close(found.flatten(0, -3)[index], row)


def test_saved_tensors_may_come_back_in_another_layout():
    def turned(tensor):
        return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() else tensor

    def gradient(unpack):
        leaf = states.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            total = evolve(leaf, 0.1, steps=2).states.sum()
            for score in (Threshold(shrinkage="soft"), Sparsemax(), InverseGate()):
                total = total + interact(leaf, values=leaf + 1, score=score).context.sum()
            total = total + qflux_kernels.project_norm(leaf, weight).square().sum()
            total.backward()
        return leaf.grad

    states, weight = torch.randn(3, 8, 2), torch.randn(4, 2)
    assert torch.equal(gradient(turned), gradient(lambda t: t))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_lengths_of_any_integer(dtype):
    states = torch.randn(2, 5, 2)
    found = interact(states, lengths=torch.tensor([3, 5], dtype=dtype))
    assert torch.equal(found.context, interact(states, lengths=torch.tensor([3, 5])).context)
    with pytest.raises(ValueError, match="lengths"):
        interact(states, lengths=torch.tensor([3, 6], dtype=dtype))


def test_lengths_that_are_not_read_count_as_the_nearest():
    states, lengths = torch.randn(3, 5, 2), torch.tensor([-2, 9, 3])
    wanted = interact(states, lengths=lengths.clamp(0, 5))
    for backend in ("auto", "reference"):
        compiled = torch.compile(
            lambda x, n, backend=backend: interact(x, lengths=n, backend=backend),
            backend="eager", fullgraph=True,
        )  # fmt: skip
        torch.testing.assert_close(compiled(states, lengths), wanted)


def test_operations_are_counted():
    states = torch.randn(6, 2, requires_grad=True)
    for run in (
        lambda: interact(states).context,
        lambda: evolve(states, 0.1).states,
        lambda: qflux_kernels.project_norm(states, torch.ones(4, 2)),
    ):
        with FlopCounterMode(display=False) as counter:
            out = run()
            forward = counter.get_total_flops()
            out.sum().backward()
        assert 0 < forward < counter.get_total_flops()


def test_compile_refuses_second_derivatives(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(states):
        return interact(states).context.pow(2).sum()

    states = torch.randn(9, 2, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(states), states, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def loop(function, *batched):
    """What vmap over the first dimension should return."""
    results = [function(*arguments) for arguments in zip(*batched, strict=True)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("rows", [0, 1, 12])
def test_vmap(device, rows):
    states = torch.randn(4, 2, rows, 2, device=device)
    keys, values = torch.randn(4, 2, 7, 2, device=device), torch.randn(4, 2, 7, 3, device=device)
    dt, alpha = torch.rand(4, 2, rows, device=device) / 10, torch.randn(4, 2, device=device)
    lengths = torch.randint(0, rows + 1, (4, 2), device=device)
    vmap = torch.func.vmap

    def check(function, *batched, in_dims=0, moved=None):
        got = vmap(function, in_dims=in_dims)(*(moved or batched))
        wanted = loop(function, *batched)
        assert all(map(torch.equal, got, wanted))

    check(lambda x: interact(x), states)
    check(lambda x, k, v: interact(x, k, v), states, keys, values)
    check(lambda k: interact(states[0], k), keys)
    check(lambda v: interact(states[0], keys[0], v), values)
    check(lambda x, n: interact(x, lengths=n), states, lengths)
    check(lambda x, a: interact(x, score=InverseGate(a)), states, alpha)
    check(lambda x, a: interact(x, score=Threshold(a)), states, alpha)
    check(lambda x, a: interact(x, score=Threshold(a, shrinkage="soft")), states, alpha)
    check(lambda x, dt: evolve(x, dt), states, dt)
    check(lambda dt: evolve(states[0], dt, skip=dt), dt)
    check(lambda x, a, n: evolve(x, 0.1, score=InverseGate(a), lengths=n), states, alpha, lengths)
    check(lambda x, a: evolve(x, 0.1, score=Threshold(a, shrinkage="soft")), states, alpha)
    check(
        lambda x, dt: evolve(x, dt), states, dt, in_dims=(2, 1),
        moved=(states.movedim(0, 2), dt.movedim(0, 1)),
    )  # fmt: skip
    nested = vmap(vmap(lambda x: interact(x).context))(states)
    assert torch.equal(nested, interact(states).context)


@pytest.mark.parametrize("score", SCORES)
def test_vmap_of_grad(device, score):
    states, dt = torch.randn(4, 2, 12, 2, device=device), torch.rand(4, 2, 12, device=device) / 10
    keys, values = torch.randn(4, 2, 9, 2, device=device), torch.randn(4, 2, 9, 3, device=device)
    alpha = torch.randn(4, 2, device=device)

    def interact_loss(x, k, v, a):
        return interact(x, k, v, score=SCORES[score](a)).context.pow(2).sum()

    def alone_loss(x, a):
        result = interact(x, score=SCORES[score](a))
        return result.context.pow(2).sum() + result.strength.pow(2).sum()

    def evolve_loss(x, dt, a):
        return evolve(x, dt, skip=dt, score=SCORES[score](a), steps=2).states.pow(2).sum()

    runs = [
        (interact_loss, (states, keys, values, alpha)),
        (alone_loss, (states, alpha)),
        (evolve_loss, (states, dt, alpha)),
    ]
    for function, tensors in runs:
        # The threshold has no use for alpha, which then gets zeros under torch.func.
        positions = tuple(range(len(tensors)))
        leaves = [t.clone().requires_grad_() for t in tensors]
        total = sum(function(*arguments) for arguments in zip(*leaves, strict=True))
        wanted = torch.autograd.grad(total, leaves, materialize_grads=True)

        grad = torch.func.grad(function, positions)
        apart = loop(grad, *tensors)
        together = torch.func.vmap(grad)(*tensors)
        summed = torch.func.grad(lambda *t, f=function: torch.func.vmap(f)(*t).sum(), positions)(
            *tensors
        )
        plain = torch.autograd.grad(
            torch.func.vmap(function)(*leaves).sum(), leaves, materialize_grads=True
        )
        for name, got in [
            ("grad", apart),
            ("vmap(grad)", together),
            ("grad(vmap)", summed),
            ("autograd of vmap", plain),
        ]:
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, n=name: f"{n}: {text}")


def test_vmap_of_grad_for_some(device):
    """in_dims that share a tensor between the mapped calls: its gradients are one for each."""
    states, dt = torch.randn(2, 12, 2, device=device), torch.rand(4, 2, 12, device=device) / 10

    def loss(x, dt):
        return evolve(x, dt).states.pow(2).sum()

    got = torch.func.vmap(torch.func.grad(loss, (0, 1)), in_dims=(None, 0))(states, dt)
    wanted = [torch.func.grad(loss, (0, 1))(states, each) for each in dt]
    for a, b in zip(got, zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_jacobian(device):
    states = torch.randn(6, 2, dtype=torch.float64, device=device)
    jacobian = torch.func.jacrev(lambda x: interact(x).context)(states)
    wanted = torch.autograd.functional.jacobian(
        lambda x: interact(x, backend="reference").context, states
    )
    torch.testing.assert_close(jacobian, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_float32(device, dtype):
    states, values = torch.randn(2, 30, 2, device=device), torch.randn(2, 30, 3, device=device)
    dt = torch.rand(2, 30, device=device)

    def run():
        leaves = [t.clone().requires_grad_() for t in (states, values, dt)]
        result = interact(leaves[0], values=leaves[1])
        moved = evolve(leaves[0], leaves[2], steps=2)
        return leaves, [*result, *moved], (result.context.sum() + moved.states.sum())

    leaves, wanted, loss = run()
    wanted_grads = torch.autograd.grad(loss, leaves)
    with torch.autocast(torch.device(device).type, dtype=dtype):
        leaves, got, loss = run()
        inside = interact(states, backend="reference")
        mixed = interact(states.to(dtype), values=values)
        half = interact(states.to(dtype))
    grads = torch.autograd.grad(loss, leaves)
    assert got[0].dtype == torch.float32 and inside.context.dtype == torch.float32
    assert all(map(torch.equal, got, wanted))
    assert all(map(torch.equal, grads, wanted_grads))
    outside = interact(states, backend="reference")
    assert torch.equal(inside.context, outside.context)
    wide = states.to(dtype).float()
    assert mixed.context.dtype == torch.float32
    assert torch.equal(mixed.context, interact(wide, values=values).context)
    assert half.context.dtype == dtype
    assert torch.equal(half.degree, interact(wide).degree)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, use_reentrant):
    states, dt = torch.randn(2, 30, 2, device=device), torch.rand(2, 30, device=device)

    def layers(x, dt):
        x = evolve(x, dt, reduction="mean", steps=2).states
        return interact(x, score=InverseGate()).context

    leaves = [t.clone().requires_grad_() for t in (states, dt)]
    wanted = torch.autograd.grad(layers(*leaves).pow(2).sum(), leaves)
    again = [t.clone().requires_grad_() for t in (states, dt)]
    checkpoint(layers, *again, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(again, wanted, strict=True))


def test_saved_tensors_hooks(device):
    """What the graph keeps is O(S), and goes through the hooks that offload it."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    length = 500
    for run in (lambda x: interact(x).context, lambda x: evolve(x, 0.1).states):
        kept.clear()
        x = torch.randn(length, 2, device=device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(x).sum().backward()
        assert 0 < sum(kept) <= 16 * length


def test_nothing_is_saved_without_gradients(device):
    x = torch.randn(500, 2, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        interact(x)
        evolve(x, 0.1)
    assert not kept


@pytest.mark.parametrize(
    "options",
    [Threshold(1.4, "row", 1e-3), InverseGate(-1.0, 0.1, 2.0), Radius(0.2, 3.0, 0.1, 0.2, 0.9)],
    ids=str,
)
def test_options_are_values(options):
    for again in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert again == options and hash(again) == hash(options) and again is not options
    assert repr(options) == repr(copy.copy(options))


def test_options_with_tensors_are_copied():
    score = Threshold(torch.tensor([0.5, 1.4]))
    for again in (copy.deepcopy(score), pickle.loads(pickle.dumps(score))):
        assert torch.equal(again.sigma, score.sigma) and again.sigma is not score.sigma
    result = interact(torch.randn(5, 2))
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is qflux_kernels.Interaction
    assert all(map(torch.equal, again, result))


def test_meta_tensors_have_the_results_shapes():
    states = torch.empty(3, 70, 2, device="meta")
    result = interact(states, values=torch.empty(3, 70, 5, device="meta"))
    assert result.context.shape == (3, 70, 5) and result.context.device.type == "meta"
    assert result.degree.dtype == torch.int32
    assert evolve(states, 0.1).states.shape == states.shape


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_of_a_long_sequence(run_python):
    """200,000 tokens forward and backward: a thousandth of their pairs would not fit the limit.

    The peak is not taken from getrusage, which starts a new program with its parent's peak.
    """
    result = run_python(
        """
from pathlib import Path
import torch
from qflux_kernels import evolve

def peak_after_step(length):
    states = torch.randn(length, 2, requires_grad=True)
    evolve(states, 0.1, reduction="mean").states.sum().backward()
    assert states.grad.isfinite().all()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

before = peak_after_step(1000)
print(peak_after_step(200_000) - before)
"""
    )
    assert float(result.stdout) < 100


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_of_many_short_sequences(run_python):
    """A million of one token: their planes, padded to whole vectors, would take 640 MB at once."""
    result = run_python(
        """
from pathlib import Path
import torch
from qflux_kernels import interact

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

states = torch.randn(1_000_000, 1, 2, requires_grad=True)
interact(states[:9]).context.sum().backward()
before = peak()
interact(states).context.sum().backward()
print(peak() - before)
"""
    )
    assert float(result.stdout) < 120


@pytest.mark.parametrize(
    "architectures, capability, wanted",
    [
        (("sm_80", "sm_90", "compute_100"), (9, 0), True),
        (("sm_80", "sm_90", "compute_100"), (8, 6), True),
        (("sm_80", "sm_90", "compute_100"), (12, 0), True),
        (("sm_80", "sm_90", "compute_100"), (7, 5), False),
        (("sm_90",), (8, 0), False),
        (("sm_86",), (8, 0), False),
        (("sm_90",), (10, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("compute_80",), (7, 5), False),
    ],
)
def test_compiled_code_serves_the_gpus_it_runs_on(monkeypatch, architectures, capability, wanted):
    """Where it does not, "auto" takes Triton, and asking for it names both."""
    monkeypatch.setattr(backends, "CUDA_ARCHITECTURES", architectures)
    monkeypatch.setattr(backends, "LOAD_ERROR", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # The GPU is the second one; the first is older than any architecture here.
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(1, 0), capability].__getitem__)
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(backends, "TRITON_ERROR", None)
    assert backends.choose_backend("auto", gpu) == ("compiled" if wanted else "triton")
    if wanted:
        assert backends.choose_backend("cuda", gpu) == "compiled"
        return
    monkeypatch.setattr(backends, "TRITON_ERROR", "no Triton")
    for backend in ("auto", "cuda"):
        with pytest.raises(backends.BackendUnavailableError) as raised:
            backends.choose_backend(backend, gpu)
        number = "{}.{}".format(*capability)
        of_the_gpu = f"compute capability {number}:", f"TORCH_CUDA_ARCH_LIST={number},"
        assert all(name in str(raised.value) for name in (*architectures, *of_the_gpu))


def test_compiled_code_does_not_serve_another_makers_gpus(monkeypatch):
    monkeypatch.setattr(backends, "CUDA_ARCHITECTURES", ("sm_90",))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(backends, "TRITON_ERROR", None)
    assert backends.choose_backend("auto", torch.device("cuda")) == "triton"
    with pytest.raises(backends.BackendUnavailableError, match="ROCm"):
        backends.choose_backend("cuda", torch.device("cuda"))
