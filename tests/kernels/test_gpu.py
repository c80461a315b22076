"""What only a GPU can show: streams, devices, graph capture. The other tests run on it as well."""

import pytest
import torch
from algorithms import assert_same, both
from inputs import SWEEP_STATES

from qflux_kernels import InverseGate, Threshold, diagnostics, evolve, interact, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Lengths are such that a sweep has rectangles: base blocks are of 1,024 keys.
SOFT = Threshold(shrinkage="soft")
WAYS = [
    (Threshold(), "dense"),
    (Threshold(), "sweep"),
    (InverseGate(), "dense"),
    (SOFT, "dense"),
]


def step(states, dt, score, algorithm):
    """One step forward and backward: what a captured graph replays."""
    states = states.detach().requires_grad_()
    options = {"reduction": "mean", "algorithm": algorithm}
    result = evolve(states, dt, score=score, **options)
    heard = interact(result.states, score=score, **options)
    (gradient,) = torch.autograd.grad(heard.context.square().sum(), states)
    return result.states.detach(), heard.strength.detach(), gradient


def test_the_object_has_code_for_this_gpu():
    major, minor = torch.cuda.get_device_capability()
    compiled = diagnostics()["cuda_architectures"]
    assert f"sm_{major}{minor}" in compiled or any(a.startswith("compute_") for a in compiled)


@pytest.mark.parametrize("score, algorithm", WAYS, ids=str)
@pytest.mark.parametrize("length", [1, 33, 500, 3300, 5000])
def test_equals_the_cpu(length, score, algorithm):
    states = torch.randn(3, length, 2, dtype=torch.float64)
    for on_cpu, on_gpu in zip(
        step(states, 0.05, score, "dense"),
        step(states.cuda(), 0.05, score, algorithm),
        strict=True,
    ):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["random", "clusters", "walk"])
def test_a_long_sweep_keeps_what_pairs_keep(name, causal):
    states = SWEEP_STATES[name](150_001).float().cuda()
    assert_same(*both(states, causal=causal), 1e-5)


@pytest.mark.parametrize("score, algorithm", WAYS, ids=str)
def test_graph_replays_with_new_data(score, algorithm):
    states = torch.randn(4, 2500, 2, device="cuda", dtype=torch.float64)
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        for _ in range(3):
            step(states, 0.05, score, algorithm)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(states, 0.05, score, algorithm)
    for _ in range(3):
        states.copy_(torch.randn_like(states))
        graph.replay()
        wanted = step(states, 0.05, score, algorithm)
        for replayed, eager in zip(captured, wanted, strict=True):
            assert torch.equal(replayed, eager)


def test_side_stream_waits_for_nothing_else():
    side = torch.cuda.Stream()
    states = torch.randn(2000, 2, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Work in front of the kernel on its own stream: a launch on another one would overtake it.
        torch.cuda._sleep(50_000_000)
        moved = states + 1
        result = interact(moved)
    side.synchronize()
    assert torch.equal(result.context, interact(states + 1).context)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device():
    states = torch.randn(300, 2)
    first, second = (interact(states.to(f"cuda:{i}")) for i in range(2))
    assert second.context.device.index == 1
    assert torch.equal(first.context.cpu(), second.context.cpu())


@pytest.mark.parametrize("length", [3000, 70_000])
@pytest.mark.parametrize("algorithm", ["dense", "sweep"])
def test_repeats_bitwise(algorithm, length):
    states = torch.randn(3, length, 2, device="cuda")
    once = step(states, 0.05, Threshold(), algorithm)
    for _ in range(20):
        assert all(map(torch.equal, once, step(states, 0.05, Threshold(), algorithm)))


def test_autocast_keeps_float32():
    states = torch.randn(300, 2, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = interact(states)
        assert reference.interact(states).context.dtype == torch.float32
    assert torch.equal(inside.context, interact(states).context)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    keys, width = 1 << 15, (1 << 16) + 8
    assert keys * width > 1 << 31
    values = torch.zeros(1, keys, width, device="cuda")
    values[..., -1, -1] = 3.0
    states, points = (torch.ones(1, length, 2, device="cuda") for length in (1, keys))
    heard = interact(states, points, values, score=InverseGate())
    torch.testing.assert_close(heard.context[..., -1], 3 * heard.strength / keys)
    assert not heard.context[..., :-1].any()
