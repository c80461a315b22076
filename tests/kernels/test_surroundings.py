"""What a program around the operators does: threads, processes, subclasses, thousands of calls."""

import copy
import ctypes
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qflux import make_config, make_model
from qflux_kernels import (
    InteractionCache,
    InverseGate,
    Sparsemax,
    Threshold,
    evolve,
    interact,
    project_norm,
)

SCORES = [Threshold(), Threshold(0.4, shrinkage="soft"), InverseGate(), Sparsemax()]


def everything(states):
    """Results and gradients of a call of each operator."""
    leaf = states.detach().clone().requires_grad_()
    weight = torch.ones(5, 2, dtype=states.dtype, requires_grad=True)
    total, found = project_norm(leaf, weight, torch.ones(5, dtype=states.dtype)).square().sum(), []
    for score in SCORES:
        seen = interact(leaf, values=leaf * 2, score=score)
        moved = evolve(leaf, 0.1, score=score, steps=2)
        found += [*seen, *moved]
        total = total + seen.context.sum() + moved.states.square().sum()
    total.backward()
    return [t.detach() for t in (*found, leaf.grad, weight.grad)]


def test_threads_may_call_at_once():
    given = [torch.randn(2, 40 + 9 * n, 2) for n in range(12)]
    wanted = [everything(states) for states in given]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for got, right in zip(pool.map(everything, given), wanted, strict=True):
                assert all(map(torch.equal, got, right))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_no_more_threads_than_were_asked_for(run_python):
    """All work is in torch's pool, whose size `set_num_threads` says."""
    shown = run_python(
        """
import os
import torch
from qflux_kernels import Sparsemax, evolve, interact

def threads(count):
    torch.set_num_threads(count)
    states = torch.randn(2, 3000, 2)
    before = len(os.listdir("/proc/self/task"))
    for score in (None, Sparsemax()):
        options = {} if score is None else {"score": score}
        interact(states, causal=False, algorithm="dense", **options)
        interact(states, causal=False, algorithm="sweep", **options)
    evolve(states, 0.1)
    return len(os.listdir("/proc/self/task")) - before

print(threads(1), threads(3))
""",
        OMP_NUM_THREADS="4",
    ).stdout.split()
    assert int(shown[0]) == 0 and int(shown[1]) <= 2


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_may_call(run_python, tmp_path, start):
    """Also those that are forked from a process whose threads have worked."""
    (tmp_path / "worker.py").write_text(
        """
import torch
from qflux_kernels import evolve, interact

class Moved(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, number):
        states = torch.randn(300, 2, generator=torch.Generator().manual_seed(number))
        return evolve(states, 0.1).states + interact(states).context
"""
    )
    shown = run_python(
        f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from worker import Moved

torch.set_num_threads(2)
wanted = torch.stack([Moved()[number] for number in range(6)])
loader = torch.utils.data.DataLoader(
    Moved(), batch_size=3, num_workers=2, multiprocessing_context={start!r}, timeout=60
)
print(torch.equal(torch.cat(list(loader)), wanted))
""",
        OMP_NUM_THREADS="2",
    )
    assert shown.stdout.split() == ["True"]


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what is allocated"
)
def test_ten_thousand_calls_leave_no_memory(run_python):
    """Not one object a call: all of Python's come from malloc here, which counts its bytes."""
    shown = run_python(
        """
import ctypes
import gc
import torch
from qflux_kernels import InteractionCache, InverseGate, evolve, interact, project_norm

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Allocated
states = torch.randn(2, 6, 2, requires_grad=True)
weight, lengths = torch.ones(4, 2, requires_grad=True), torch.tensor([3, 6])
alpha = torch.tensor(0.5, requires_grad=True)

def calls(count):
    for _ in range(count):
        total = interact(states, values=states + 1, lengths=lengths).context.sum()
        total = total + evolve(states, 0.1, score=InverseGate(alpha)).states.sum()
        total = total + project_norm(states, weight).sum()
        total.backward()
        cache = InteractionCache(batch_shape=(2,))
        cache.append(states)
        cache.attend(states)
        try:
            interact(states, lengths=lengths + 9)
        except ValueError:
            pass
    gc.collect()
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd

before = calls(2500)  # what grows once has grown by then
print(calls(2500) - before)  # four operators each
""",
        PYTHONMALLOC="malloc",
        MALLOC_ARENA_MAX="1",  # it tells of the main arena only
    ).stdout
    assert int(shown) < 2500 * 16, "a leaked object has 16 bytes at least"


class Tagged(torch.Tensor):
    """A subclass that only has a name."""


SEEN = []


class Watched(torch.Tensor):
    """A subclass that sees every function called on it."""

    @classmethod
    def __torch_function__(cls, function, types, given=(), options=None):
        SEEN.append(function)
        return super().__torch_function__(function, types, given, options or {})


@pytest.mark.parametrize("kind", [Tagged, Watched, torch.nn.Parameter, torch.nn.Buffer])
def test_subclasses_of_tensors(kind):
    states = torch.randn(2, 9, 2)
    given = kind(states) if kind.__module__.startswith("torch.nn") else states.as_subclass(kind)
    given = given.requires_grad_()
    for score in SCORES:
        found, wanted = interact(given, score=score), interact(states, score=score)
        assert all(torch.equal(a.detach(), b) for a, b in zip(found, wanted, strict=True))
        moved = evolve(given, 0.1, score=score, lengths=torch.tensor([4, 9]))
        assert torch.equal(
            moved.states.detach(),
            evolve(states, 0.1, score=score, lengths=torch.tensor([4, 9])).states,
        )
        (found.context.sum() + moved.states.sum()).backward()
    assert given.grad.isfinite().all()
    projected = project_norm(given, torch.ones(3, 2))
    assert torch.equal(projected.detach(), project_norm(states, torch.ones(3, 2)))
    cache = InteractionCache(batch_shape=(2,))
    cache.append(given)
    assert torch.equal(cache.keys, states)


def test_memory_that_is_not_there_is_named():
    states = torch.zeros(1, 1, 2).expand(2**45, 1, 2)  # more than a process can address
    with pytest.raises(
        RuntimeError, match=r"shape \(35184372088832, 1, 2\) could not be allocated"
    ):
        interact(states)
    assert interact(states[:1]).context.shape == (1, 1, 2)


def test_nothing_here_is_refused_as_not_deterministic():
    states = torch.randn(2, 30, 2)
    wanted = everything(states)
    torch.use_deterministic_algorithms(True)
    try:
        got = everything(states)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("preset", ["lm", "flux", "qfnn"])
def test_modules_are_copied_pickled_and_saved(preset):
    model = make_model(make_config(preset, 11, num_layers=2, hidden_dim=12)).eval()
    ids = torch.arange(18).view(2, 9) % 11
    wanted = model(ids).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(again(ids).logits, wanted)
        with torch.no_grad():
            again.head.weight.zero_()
    assert torch.equal(model(ids).logits, wanted)
