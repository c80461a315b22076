"""The Triton backend, in Triton's interpreter where there is no GPU.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter gets a process of its own:
`test_in_the_interpreter` runs this file again in it, and the file for the schemas.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assertions import assert_interaction_close, assert_relative, count_borderline
from inputs import layouts

from qflux_kernels import (
    BackendUnavailableError,
    InverseGate,
    Radius,
    Sparsemax,
    Threshold,
    backends,
    evolve,
    interact,
    reference,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

# The ops of this family against the table; of every family that runs.
SCHEMA = Path(__file__).with_name("test_schema.py")
F32, F64 = torch.float32, torch.float64
INTERPRETED = backends.TRITON_INTERPRETED
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HERE = INTERPRETED or torch.cuda.is_available()
needs_kernels = pytest.mark.skipif(not HERE, reason="no GPU; test_in_the_interpreter runs it")


def tensor(*shape, dtype=F64):
    return torch.randn(*shape, dtype=F64).to(DEVICE, dtype)


def calm(score, *shapes, causal=True, lengths=None):
    """Random points in float32 steps, none of whose pairs lies near its threshold."""
    for _ in range(500):
        points = [torch.randn(*shape).double() for shape in shapes]
        if not count_borderline(*points, causal=causal, score=score, lengths=lengths):
            return [p.to(DEVICE) for p in points]
    raise AssertionError("no calm points found")


def gradients(function, backend, tensors, **options):
    """Gradients of a fixed pull at the floating-point results."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = [t for t in function(*leaves, backend=backend, **options) if t.is_floating_point()]
    loss = sum(
        (torch.arange(t.numel(), device=t.device).cos().view_as(t) * t).sum() for t in outputs
    )
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


SIGMA = torch.tensor([0.3, 1.1], dtype=F64, device=DEVICE if HERE else None)

# rows, keys (None: the states), depth (None: the values are the keys), score, causal, reduction
CASES = [
    (0, None, None, Threshold(), True, "sum"),
    (0, 5, 3, InverseGate(), True, "sum"),
    (5, 0, 3, Threshold(), True, "mean"),
    (1, None, None, Threshold(), True, "mean"),
    (31, None, None, Threshold(0.0, eps=0.0), True, "sum"),
    (32, None, None, InverseGate(-0.7, 1e-2, 1.5), True, "mean"),
    (33, None, None, Threshold(1.4, "row"), True, "mean"),
    (33, None, None, Threshold(0.3, shrinkage="soft"), True, "mean"),
    (20, 37, 5, Threshold(0.6, "row", shrinkage="soft"), True, "sum"),
    (40, None, None, InverseGate(), False, "sum"),
    (65, 33, None, Threshold(), True, "mean"),
    (7, 70, None, InverseGate(0.4, 0.1, 1.1), True, "sum"),
    (17, None, 1, Threshold(SIGMA), True, "sum"),
    (16, 33, 2, InverseGate(SIGMA, 1e-2, SIGMA), True, "mean"),
    (34, 15, 3, Threshold(-1.0, "row"), True, "sum"),
    (9, 18, 8, InverseGate(0.5, 0.1), True, "sum"),
    (8, 17, 33, Threshold(), False, "mean"),
    (0, None, None, Sparsemax(), True, "sum"),
    (5, 0, 3, Sparsemax(), True, "sum"),
    (1, None, None, Sparsemax(), True, "sum"),
    (33, None, None, Sparsemax(4.0), True, "sum"),
    (40, None, None, Sparsemax(0.1), False, "sum"),
    (65, 33, None, Sparsemax(), True, "sum"),
    (16, 40, 9, Sparsemax(SIGMA), True, "sum"),
]


def inputs(rows, keys, depth, dtype):
    states = tensor(2, rows, 2, dtype=dtype)
    given = {}
    if keys is not None:
        given["keys"] = tensor(2, keys, 2, dtype=dtype)
    if depth is not None:
        given["values"] = tensor(2, rows if keys is None else keys, depth, dtype=dtype)
    return states, given


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interact(case, dtype, poisoned_memory):
    rows, keys, depth, score, causal, reduction = case
    states, given = inputs(rows, keys, depth, dtype)
    options = {"causal": causal, "score": score, "reduction": reduction}
    result = interact(states, **given, **options, backend="triton")
    assert_interaction_close(result, states, **given, **options)


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_interact(case, poisoned_memory):
    rows, keys, depth, score, causal, reduction = case
    states, given = inputs(rows, keys, depth, F64)
    # The coefficients that act through the query.
    name = {InverseGate: "alpha", Sparsemax: "scale"}.get(type(score))
    coefficient = [] if name is None else [SIGMA.to(DEVICE)]

    def run(states, *tensors, backend):
        used = score
        if name is not None:
            *tensors, number = tensors
            used = dataclasses.replace(score, **{name: number})
        return interact(
            states, **dict(zip(given, tensors, strict=True)), score=used, causal=causal,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    tensors = [states, *given.values(), *coefficient]
    got, wanted = (gradients(run, backend, tensors) for backend in ("triton", "reference"))
    for name, a, b in zip(("states", *given, "coefficient"), got, wanted, strict=False):
        assert_relative(name, a, b, 1e-9)


@needs_kernels
@pytest.mark.parametrize("score", [Threshold(), InverseGate(0.5, 0.1), Sparsemax()], ids=str)
def test_gradients_of_interact_in_float32(score):
    states, keys = calm(score, (1, 20, 2), (1, 20, 2))
    values = tensor(1, 20, 3, dtype=F32).double()
    for given in ((states,), (states, keys, values)):
        got = gradients(interact, "triton", [t.float() for t in given], score=score)
        wanted = gradients(interact, "reference", given, score=score)
        for a, b in zip(got, wanted, strict=True):
            assert_relative("gradient", a, b, 1e-5)


@needs_kernels
@pytest.mark.parametrize(
    "score",
    [
        Threshold(1.4, "row"),
        Threshold(),
        InverseGate(),
        Threshold(0.3, shrinkage="soft"),
        Sparsemax(),
    ],
    ids=str,
)
def test_padding(score):
    """Padding gets zeros, and not even a NaN in it reaches anybody."""
    lengths = torch.tensor([0, 20, 33], device=DEVICE)
    states, values = tensor(3, 33, 2), tensor(3, 33, 3)
    for given in ({}, {"values": values}):
        options = {
            "score": score, "lengths": lengths, "causal": not given,
            "reduction": "sum" if score.kind.mass else "mean",
        }  # fmt: skip
        clean = interact(states, **given, **options, backend="triton")
        assert_interaction_close(clean, states, **given, **options)
        tensors = [states, *given.values()]
        wanted = gradients(interact_of(given), "reference", tensors, **options)
        padding = torch.arange(33, device=DEVICE)[None, :, None] >= lengths[:, None, None]
        dirty = [t.masked_fill(padding, float("nan")) for t in tensors]
        got = gradients(interact_of(given), "triton", dirty, **options)
        for a, b in zip(got, wanted, strict=True):
            assert_relative("gradient", a, b, 1e-9)
        result = interact_of(given)(*dirty, **options, backend="triton")
        assert all(map(torch.equal, result, clean))


def interact_of(given):
    """`interact` of the states and what else is given, in order."""
    return lambda states, *tensors, **options: interact(
        states, **dict(zip(given, tensors, strict=True)), **options
    )


@needs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", [Threshold(), InverseGate(0.5, 1e-3, 0.1), Sparsemax()], ids=str)
def test_not_finite(score, bad):
    states, keys, values = tensor(1, 40, 2), tensor(1, 40, 2), tensor(1, 40, 3)
    for name in ("states", "keys", "values"):
        given = {"states": states, "keys": keys, "values": values}
        given[name] = given[name].clone()
        given[name][0, 20, 0] = bad
        result = interact(**given, score=score, backend="triton")
        assert_interaction_close(result, **given, score=score)
    alone = states.clone()
    alone[0, 20, 0] = bad
    result = interact(alone, score=score, backend="triton")
    assert_interaction_close(result, alone, score=score)
    assert result.context[0, :20].isfinite().all()
    # Keys that no bad row can see, and rows that see no bad key, keep their gradients.
    pull = torch.ones_like(values)
    pull[0, 20] = bad
    leaves = [t.clone().requires_grad_() for t in (states, keys, values)]
    context = interact(*leaves, score=score, backend="triton").context
    grads = torch.autograd.grad(context, leaves, pull)
    assert grads[0][0, :20].isfinite().all() and not grads[0][0, 20].isfinite().any()
    assert all(g[0, 21:].isfinite().all() for g in grads)


@needs_kernels
def test_sums_over_several_chunks():
    """A float32 that joins a sum 2^24 times its size is not lost, forward or backward."""
    few, many = torch.zeros(5, 2, device=DEVICE), torch.zeros(600, 2, device=DEVICE)
    sizes = torch.zeros(600, 1, device=DEVICE)
    sizes[0], sizes[300], sizes[599] = 2.0**25, 2, -(2.0**25)
    # Every weight is 1/2.
    options = {"causal": False, "score": Threshold(0.0), "backend": "triton"}
    context = interact(few, many, sizes, **options).context
    assert torch.equal(context, torch.ones_like(context))
    values = torch.zeros(5, 1, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(interact(many, few, values, **options).context, values, sizes)
    assert torch.equal(grad, torch.ones_like(grad))


@needs_kernels
def test_layouts():
    states, values = tensor(2, 18, 2), tensor(2, 18, 3)
    wanted = interact(states, values=values, backend="triton")
    wanted_grads = gradients(interact_of({"values": values}), "triton", [states, values])
    for (name, x), v in zip(layouts(states).items(), layouts(values).values(), strict=True):
        leaves = [x.detach().requires_grad_(), v.detach().requires_grad_()]
        got = interact(leaves[0], values=leaves[1], backend="triton")
        assert all(map(torch.equal, got, wanted)), name
    pulled = gradients(interact_of({"values": values}), "triton", leaves)
    assert all(map(torch.equal, pulled, wanted_grads))


RADII = [Radius(), Radius(0.0, 1e9, 0.2, 0.3, 1.5), Radius(0.5, 0.9, -0.1), None]


@needs_kernels
@pytest.mark.parametrize("radius", RADII, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        Threshold,
        lambda alpha: InverseGate(alpha, 1e-2),
        lambda sigma: Threshold(sigma, shrinkage="soft"),
        Sparsemax,
    ],
    ids=["hard_threshold", "inverse_gate", "soft_threshold", "sparsemax"],
)
def test_evolve(make, radius, poisoned_memory):
    states, coefficient = tensor(2, 18, 2), SIGMA.to(DEVICE)
    gated = isinstance(make(0.5), InverseGate)
    dt = tensor(2, 2, 18).abs() / 10
    skip = tensor(18).sigmoid()
    lengths = torch.tensor([18, 11], device=DEVICE) if radius == RADII[1] else None

    def run(states, dt, skip, coefficient, backend):
        return evolve(
            states, dt, skip=skip, score=make(coefficient), radius=radius, lengths=lengths, steps=2,
            reduction="mean" if gated else "sum", backend=backend,
        )  # fmt: skip

    tensors = (states, dt, skip, coefficient)
    got, wanted = run(*tensors, "triton"), run(*tensors, "reference")
    assert torch.equal(got.degree, wanted.degree)
    assert_relative("states", got.states, wanted.states, 1e-9)
    assert_relative("strength", got.strength, wanted.strength, 1e-9)
    got, wanted = (gradients(run, backend, tensors) for backend in ("triton", "reference"))
    names = ("states", "dt", "skip", "coefficient")
    for name, a, b in zip(names, got, wanted, strict=True):
        assert_relative(name, a, b, 1e-9)


@needs_kernels
def test_evolve_in_float32_with_numbers():
    """A gate that keeps every pair has no borderline ones."""
    states = tensor(2, 20, 2, dtype=F32)
    options = {"dt": 0.1, "skip": 0.25, "score": InverseGate(0.5, 0.1), "reduction": "mean"}
    got = evolve(states, **options, backend="triton")
    wanted = reference.evolve(states.double(), **options)
    assert_relative("states", got.states, wanted.states, 1e-6)
    (got,) = gradients(evolve, "triton", [states], **options)
    (wanted,) = gradients(evolve, "reference", [states.double()], **options)
    assert_relative("gradient", got, wanted, 1e-5)


@needs_kernels
@pytest.mark.parametrize("function", [interact, lambda x, **o: evolve(x, 0.1, **o)])
def test_second_derivatives_are_refused(function):
    states = tensor(5, 2).requires_grad_()
    (grad,) = torch.autograd.grad(
        function(states, backend="triton")[0].pow(2).sum(), states, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@needs_kernels
def test_dispatcher():
    """Schemas, fakes and strides are what PyTorch demands of an op."""
    ops = torch.ops.qflux_kernels
    pair = (SIGMA.to(DEVICE), 0.0, None, 0.5, None, 1, 1e-2, False, True, True, 0)
    x = tensor(2, 2, 7).mT.requires_grad_()
    values = tensor(2, 3, 7).mT
    torch.library.opcheck(ops.triton_interact.default, (x, None, values, *pair, True))
    context, strength, _, threshold, _ = ops.triton_interact(x, None, values, *pair, True)
    grads = torch.randn_like(context), torch.randn_like(strength)
    torch.library.opcheck(
        ops.triton_interact_backward.default,
        (*(t.detach() for t in (*grads, threshold)), None, x, None, values, *pair, True, True),
    )
    step = (2, True, 0.1, 2.0, 0.01, 0.1, 1.0)
    rest = (tensor(1, 2, 7), 0.0, None, 0.2, *pair, *step)
    torch.library.opcheck(ops.triton_evolve.default, (x, *rest, True))
    out, strength, _, tape = ops.triton_evolve(x.detach(), *rest, True)
    torch.library.opcheck(ops.triton_evolve_backward.default, (out.mT.mT, strength, tape, *rest))


@needs_kernels
def test_ops_refuse_what_does_not_fit():
    x = tensor(2, 5, 2)
    pair = (None, 0.5, None, 0.0, None, 0, 1e-6, False, True, False, 0)
    for keys, values in (
        (tensor(1, 10, 2), None),
        (tensor(2, 5, 2, dtype=F32), None),
        (None, tensor(2, 4, 3)),
        (None, tensor(2, 5)),
    ):
        with pytest.raises(RuntimeError, match=r"(keys|values) must be"):
            torch.ops.qflux_kernels.triton_interact(x, keys, values, *pair, False)


@needs_kernels
def test_compile_and_vmap():
    def run(x, dt, values):
        mixed = interact(x, values=values, backend="triton").context
        return evolve(x, dt, steps=2, backend="triton").states, mixed

    tensors = [tensor(2, 9, 2), tensor(2, 9).abs() / 10, tensor(2, 9, 3)]

    def with_gradients(function):
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        return [*outputs, *torch.autograd.grad(sum(t.pow(2).sum() for t in outputs), leaves)]

    wanted = with_gradients(run)
    compiled = with_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"))
    mapped = with_gradients(torch.func.vmap(run))
    assert all(map(torch.equal, compiled, wanted))
    assert all(map(torch.equal, mapped, wanted))


@needs_kernels
def test_two_runs_are_equal(poisoned_memory):
    states, values = tensor(1, 70, 2, dtype=F32), tensor(1, 70, 3, dtype=F32)
    run = interact_of({"values": values})
    first, second = (gradients(run, "triton", [states, values]) for _ in range(2))
    assert all(map(torch.equal, first, second))


@needs_kernels
def test_diagnostics_list_the_backend():
    found = backends.diagnostics()
    assert "triton" in found["backends"] and found["triton_error"] is None


if not INTERPRETED:

    def test_in_the_interpreter():
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=short", __file__, str(SCHEMA)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
        assert "skipped" not in result.stdout.splitlines()[-1]

    def test_states_on_the_cpu_are_refused():
        x = torch.randn(5, 2)
        for call in (lambda: interact(x, backend="triton"), lambda: evolve(x, 1, backend="triton")):
            with pytest.raises(BackendUnavailableError, match=r"GPU.*got cpu.*TRITON_INTERPRET=1"):
                call()


def test_choice(monkeypatch):
    cuda = torch.device("cuda")
    assert backends.choose_backend("triton", cuda) == "triton"
    monkeypatch.setattr(backends, "LOAD_ERROR", None)
    monkeypatch.setattr(backends, "CUDA_ARCHITECTURES", ("sm_90",))
    assert backends.choose_backend("auto", cuda) == "compiled"
    monkeypatch.setattr(backends, "CUDA_ARCHITECTURES", ())
    assert backends.choose_backend("auto", cuda) == "triton"
    assert backends.choose_backend("auto", torch.device("cpu")) == "compiled"
    monkeypatch.setattr(backends, "LOAD_ERROR", "not built")
    assert backends.choose_backend("auto", cuda) == "triton"
    for backend, device in (("cuda", cuda), ("auto", torch.device("cpu"))):
        with pytest.raises(BackendUnavailableError, match="not built"):
            backends.choose_backend(backend, device)
    monkeypatch.setattr(backends, "TRITON_ERROR", "not installed")
    with pytest.raises(BackendUnavailableError, match="not built"):
        backends.choose_backend("auto", cuda)


def test_without_triton(run_python):
    result = run_python(
        """
import sys
sys.modules["triton"] = None
import torch
from qflux_kernels import BackendUnavailableError, diagnostics, interact
try:
    interact(torch.randn(5, 2), backend="triton")
except BackendUnavailableError as error:
    assert diagnostics()["triton_error"] == str(error)
    assert "triton" not in diagnostics()["backends"]
    print(error)
"""
    )
    assert "pip install qflux[triton]" in result.stdout


def test_importing_does_not_load_triton(run_python):
    run_python("import sys, qflux_kernels; assert 'triton' not in sys.modules")


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from qflux_kernels.triton import kernels, ops

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", int: "i32"}
done = set()


def compile_only(name, blocks, device, *arguments, **constants):
    kernel = getattr(kernels, name)
    values = dict(zip(kernel.arg_names, arguments)) | constants
    values = {n: values[n] for n in kernel.arg_names}
    fixed = {n: v for n, v in values.items() if v is None or n in constants}
    signature = {
        n: "constexpr" if n in fixed else TYPES[getattr(v, "dtype", type(v))]
        for n, v in values.items()
    }
    kind = (name, *signature.values(), *fixed.items())
    if kind in done:
        return
    done.add(kind)
    places = {(kernel.arg_names.index(n),): v for n, v in fixed.items()}
    built = compile(ASTSource(kernel, signature, places), target=target)
    assert built.asm[binary]


NVIDIA = GPUTarget("cuda", 90, 32), "cubin"
AMD = GPUTarget("hip", "gfx942", 64), "hsaco"
ops._launch = compile_only
for dtype, score, (target, binary) in (
    (torch.float32, 0, NVIDIA),
    (torch.float64, 1, AMD),
    (torch.float32, 3, NVIDIA),
    (torch.float64, 3, AMD),
):
    x, v = torch.randn(1, 3, 2, dtype=dtype), torch.randn(1, 3, 9, dtype=dtype)
    lengths = torch.tensor([3])
    pair = (None, 0.5, None, 0.0, lengths, score, 1e-5, False, True, False, 0)
    for values in (None, v):
        context, strength, _, threshold, _ = torch.ops.qflux_kernels.triton_interact(
            x, None, values, *pair, True
        )
        torch.ops.qflux_kernels.triton_interact_backward(
            context, strength, threshold, None, x, None, values, *pair, True, True
        )
print(len(done))
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_kernels_compile(run_python, tmp_path):
    """Every kernel becomes machine code for NVIDIA and AMD GPUs, with or without one at hand."""
    result = run_python(COMPILE, TRITON_CACHE_DIR=str(tmp_path / "cache"), TRITON_INTERPRET="0")
    # By score: thresholds of all but the gate; forward, row and key pass with and without values of
    # their own, and the gradient of those.
    assert int(result.stdout) == 3 + 4 * 7
