"""Random calls of every public operator against plain PyTorch: `make fuzz`, and a few in the tests.

A case is a function of its number, which a failure prints: `python tests/fuzz.py --first NUMBER
--cases 1` repeats it. Shapes, layouts, dtypes, values up to overflow and down to denormals, what is
not finite, lengths and options are drawn; docs/reliability.md says what a case compares.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from assertions import assert_interaction_close, assert_relative, count_borderline
from torch.nn import functional as F

from qflux_kernels import (
    EvolutionCache,
    InteractionCache,
    InverseGate,
    Radius,
    Sparsemax,
    Threshold,
    evolve,
    interact,
    project_norm,
    scores,
)

F64 = torch.float64
DTYPES = [torch.float32, F64, F64, torch.bfloat16, torch.float16]


class Draw:
    """Everything that a case draws, from its number."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def size(self, most: int) -> int:
        """Small sizes often, and those around the widths of vectors, tiles and blocks."""
        near = [0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 300]
        return min(most, self.one(*near, self.random.randint(1, most)))

    def batch(self) -> tuple[int, ...]:
        shapes = [(), (1,), (2,), (3, 2), (1, 4), (2, 1, 3), (0,), (2, 0)]
        return self.random.choices(shapes, [6, 2, 6, 6, 2, 3, 0.3, 0.3])[0]

    def points(self, *shape: int, calm: bool = False) -> torch.Tensor:
        """Points or values `(*shape)`, float64; calm ones are neither large nor special."""
        kinds = {
            "normal": lambda: self.normal(*shape),
            "small": lambda: 1e-3 * self.normal(*shape),
            "spread": lambda: self.normal(*shape) * torch.exp(self.normal(*shape[:-1], 1)),
            "lattice": lambda: self.integers(-2, 3, shape).double(),
            "close": lambda: 0.6 + 1e-2 * self.normal(*shape),
            "zeros": lambda: self.normal(*shape) * self.integers(0, 2, (*shape[:-1], 1)),
        }
        if not calm:
            kinds |= {
                "large": lambda: 1e9 * self.normal(*shape),
                "near overflow": lambda: 1e17 * self.normal(*shape),
                "tiny": lambda: 1e-20 * self.normal(*shape),
                "denormal": lambda: 1e-39 * self.normal(*shape),
                "all sizes": lambda: (
                    self.normal(*shape) * 10.0 ** self.integers(-20, 16, (*shape[:-1], 1))
                ),
            }
        return kinds[self.one(*kinds)]()

    def poisoned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with a few entries that are not finite."""
        tensor = tensor.clone()
        if tensor.numel():
            for _ in range(self.random.randint(1, 3)):
                index = self.random.randrange(tensor.numel())
                tensor.view(-1)[index] = self.one(math.nan, math.inf, -math.inf)
        return tensor

    def layout(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers in other strides."""
        kind = self.random.randrange(6)
        if kind == 1:
            order = list(range(tensor.dim()))
            self.random.shuffle(order)
            return (
                tensor.permute(order)
                .contiguous()
                .permute([order.index(d) for d in range(len(order))])
            )
        if kind == 2:
            wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
            wide[..., 1 : tensor.shape[-1] + 1] = tensor
            return wide[..., 1 : tensor.shape[-1] + 1]
        if kind == 3:
            doubled = tensor.new_full(
                (*tensor.shape[:-2], 2 * tensor.shape[-2], tensor.shape[-1]), math.nan
            )
            doubled[..., 1::2, :] = tensor
            return doubled[..., 1::2, :]
        if kind == 4:
            off = tensor.new_full((tensor.numel() + 1,), math.nan)
            off[1:] = tensor.flatten()
            return off[1:].view(tensor.shape)
        return tensor

    def broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to `shape`."""
        shape = tuple(1 if self.chance(0.3) else size for size in shape)
        return shape[self.random.randint(0, len(shape)) :] if self.chance(0.3) else shape

    def number(self, value: float, batch: tuple[int, ...], dtype: torch.dtype) -> Any:
        """A float, or a tensor that broadcasts to the batch."""
        if self.chance(0.5):
            return value
        return (value + 0.1 * self.normal(*self.broadcast(batch))).to(dtype)

    def score(self, batch: tuple[int, ...], dtype: torch.dtype, calm: bool = False) -> Any:
        compute = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        number = lambda value: self.number(value, batch, compute)  # noqa: E731
        stats, eps = self.one("prefix", "row"), self.one(1e-6, 1e-3)
        kinds = {
            "hard": lambda: Threshold(number(self.one(0.5, 1.4, -0.5, 0.0)), stats, eps),
            "gate": lambda: InverseGate(
                number(self.one(0.5, -0.7)),
                self.one(1e-2, 0.1),
                number(1.5) if self.chance(0.5) else 0.0,
            ),
            "sparsemax": lambda: Sparsemax(number(self.one(1.0, 0.1, 3.0, -1.0))),
            "soft": lambda: Threshold(number(self.one(0.4, -0.3)), stats, eps, shrinkage="soft"),
        }
        return kinds[self.one(*kinds)]()


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Rounded into a dtype; in float16, whose results overflow early, no larger than 3."""
    if tensor is None:
        return None
    if dtype == torch.float16:
        tensor = torch.where(tensor.isfinite(), tensor.clamp(-3, 3), tensor)
    return tensor.to(dtype)


def check_bits(run: Callable[[], Any]) -> Any:
    """What a call returns, which is the same twice."""
    first, second = run(), run()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5)), "two runs differ"
        assert torch.equal(a.isnan(), b.isnan()), "two runs differ"
    return first


def fuzz_interact(draw: Draw) -> None:
    """Forward, any values: the float64 truth with the budget of rounding and borderline pairs."""
    dtype, batch = draw.one(*DTYPES), draw.batch()
    rows = draw.size(300)
    causal, own = draw.chance(0.6), draw.chance(0.4)
    score = draw.score(batch, dtype)
    # The weights of a soft threshold have the rounding of tau, which outliers make large.
    calm = score.kernel == "soft_threshold"
    keys = draw.size(300) if own else rows
    states = draw.points(*batch, rows, 2, calm=calm)
    given = {
        "keys": draw.points(*batch, keys, 2, calm=calm) if own else None,
        "values": draw.points(*batch, keys, draw.one(1, 2, 3, 4, 7, 16), calm=True),
    }
    # A weight that is almost infinite leaves no room for a value, even where terms cancel.
    large = any(t is not None and (t.abs() > 1e9).any() for t in (states, given["keys"]))
    if not large and draw.chance(0.6):
        given["values"] = None
    lengths = None
    if not own and draw.chance(0.4):
        lengths = draw.integers(0, rows + 1, draw.broadcast(batch))
    if draw.chance(0.15):
        states = draw.poisoned(states)
    if draw.chance(0.1) and given["values"] is not None:
        given["values"] = draw.poisoned(given["values"])
    states = draw.layout(cast(states, dtype))
    keys, values = (None if t is None else draw.layout(cast(t, dtype)) for t in given.values())
    options = {
        "causal": causal,
        "score": score,
        "reduction": draw.one("sum", "mean") if not score.kind.mass else "sum",
        "lengths": lengths,
    }
    swept = "cpu" in score.kind.swept_on
    algorithm = draw.one("auto", "dense", "sweep") if swept else "auto"
    found = check_bits(lambda: interact(states, keys, values, algorithm=algorithm, **options))
    if 0 in batch:
        assert found.context.shape == (*batch, rows, 2 if values is None else values.shape[-1])
        return
    # The truth is computed in float64 too, of points of all sizes.
    rtol = 1e-12 if dtype == F64 else None
    assert_interaction_close(found, states, keys, values, rtol=rtol, **options)


def leaves_of(*tensors: Any) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors if isinstance(t, torch.Tensor)]


def compare_gradients(run: Callable[..., Any], tensors: list, pull: Draw) -> None:
    """Results and gradients of the kernels and of the reference, in float64."""
    results, gradients = {}, {}
    for backend in ("auto", "reference"):
        leaves = leaves_of(*tensors)
        outs = run(leaves, backend)
        smooth = [t for t in outs if t.is_floating_point()]
        weights = [torch.linspace(-1, 1, t.numel(), dtype=F64).cos().view(t.shape) for t in smooth]
        results[backend] = outs
        gradients[backend] = torch.autograd.grad(
            smooth, leaves, weights, allow_unused=True, materialize_grads=True
        )
    for name, (a, b) in enumerate(zip(results["auto"], results["reference"], strict=True)):
        assert_relative(f"result {name}", a, b, 1e-9, floor=1e-3)
    for name, (a, b) in enumerate(zip(gradients["auto"], gradients["reference"], strict=True)):
        assert_relative(f"gradient {name}", a, b, 1e-7, floor=1e-3)


def fuzz_gradients(draw: Draw) -> None:
    """interact and its gradients in float64, where no pair lies at its threshold."""
    batch = draw.batch()
    rows, own = draw.size(80), draw.chance(0.5)
    keys = draw.size(80) if own else rows
    score = draw.score(batch, F64, calm=True)
    states = draw.points(*batch, rows, 2, calm=True)
    sources = draw.points(*batch, keys, 2, calm=True) if own else None
    values = (
        draw.points(*batch, keys, draw.one(1, 2, 4, 5), calm=True) if draw.chance(0.6) else None
    )
    lengths = None
    if not own and draw.chance(0.4):
        lengths = draw.integers(0, rows + 1, draw.broadcast(batch))
    options = {"causal": draw.chance(0.6), "score": score, "lengths": lengths}
    if 0 not in batch and count_borderline(states, sources, delta=1e-9, **options):
        return
    reduction = "sum" if score.kind.mass else draw.one("sum", "mean")
    swept = "cpu" in score.kind.swept_on
    algorithm = draw.one("auto", "dense", "sweep") if swept else "auto"
    name = score.per_sequence[0]
    differentiable = score.kernel != "hard_threshold"
    coefficient = getattr(score, name)
    tensors = [states, sources, values]
    if differentiable and isinstance(coefficient, torch.Tensor):
        tensors.append(coefficient)

    def run(leaves: list[torch.Tensor], backend: str) -> Any:
        left = iter(leaves)
        x = draw_layout(next(left))
        k = None if sources is None else next(left)
        v = None if values is None else next(left)
        used = score
        if len(tensors) == 4:
            used = type(score)(**{**vars(score), name: next(left)})
        return interact(
            x, k, v, causal=options["causal"], score=used, lengths=lengths, reduction=reduction,
            backend=backend, algorithm=algorithm if backend == "auto" else "auto",
        )  # fmt: skip

    def draw_layout(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    compare_gradients(run, tensors, draw)


def fuzz_evolve(draw: Draw) -> None:
    """evolve and its gradients in float64, where no pair of either stage lies at its threshold."""
    batch, rows = draw.batch(), draw.size(60)
    score = draw.score(batch, F64, calm=True)
    states = draw.points(*batch, rows, 2, calm=True)
    steps = draw.one(1, 1, 2, 3)
    shape = (*batch, rows)
    dt = 0.1 if draw.chance(0.4) else 0.05 * draw.normal(*draw.broadcast(shape)).abs()
    skip = draw.one(None, 0.3, torch.sigmoid(draw.normal(*draw.broadcast(shape))))
    lengths = draw.integers(0, rows + 1, draw.broadcast(batch)) if draw.chance(0.4) else None
    radius = draw.one(None, Radius(), Radius(0.0, 1e9, 0.2, 0.3, 1.5), Radius(0.5, 0.9, -0.1))
    options = {
        "causal": draw.chance(0.6),
        "lengths": lengths,
        "reduction": "sum" if score.kind.mass else draw.one("sum", "mean"),
        "radius": radius,
        "steps": steps,
    }
    tensors = [states, *(t for t in (dt, skip) if isinstance(t, torch.Tensor))]

    x, pairs = states, {"causal": options["causal"], "score": score, "lengths": lengths}
    for _ in range(steps if 0 not in batch else 0):
        step = {**options, "steps": 1, "score": score, "skip": skip, "backend": "reference"}
        context = interact(x, reduction=options["reduction"], backend="reference", **pairs).context
        k1 = (dt[..., None] if isinstance(dt, torch.Tensor) else dt) * context
        if any(count_borderline(stage, delta=1e-8, **pairs) for stage in (x, x + k1)):
            return
        x = evolve(x, dt, **step).states
        if x.numel() and not x.abs().max() < 1e4:
            return

    def run(leaves: list[torch.Tensor], backend: str) -> Any:
        left = iter(leaves)
        x = next(left)
        own_dt = next(left) if isinstance(dt, torch.Tensor) else dt
        own_skip = next(left) if isinstance(skip, torch.Tensor) else skip
        return evolve(x, own_dt, skip=own_skip, score=score, backend=backend, **options)

    compare_gradients(run, tensors, draw)


def fuzz_poison(draw: Draw) -> None:
    """evolve of what is not finite: it reaches the tokens that see it, and no others."""
    batch, rows = draw.one((), (2,), (3, 2)), draw.size(40)
    score = draw.one(InverseGate(0.5, 0.1), Sparsemax(0.5))
    clean = draw.points(*batch, rows, 2, calm=True)
    states = draw.poisoned(clean) if draw.chance(0.7) else clean
    dt = 0.05 * draw.normal(*batch, rows).abs()
    dt = draw.poisoned(dt) if draw.chance(0.4) else dt
    lengths = draw.integers(0, rows + 1, batch) if draw.chance(0.5) else None
    options = {
        "causal": draw.chance(0.6),
        "score": score,
        "lengths": lengths,
        "radius": draw.one(None, Radius()),
        "skip": draw.one(None, 0.3),
    }
    found, wanted = (evolve(states, dt, backend=b, **options) for b in ("auto", "reference"))
    inside = torch.ones(*batch, rows, dtype=torch.bool)
    if lengths is not None:
        inside = torch.arange(rows) < lengths[..., None]
    for a, b in zip(found[:2], wanted[:2], strict=True):
        a, b = a[inside], b[inside]
        assert torch.equal(a.isfinite(), b.isfinite()), "what is not finite differs"
        assert_relative("result", a[a.isfinite()], b[b.isfinite()], 1e-9, floor=1e-3)
    outside = found.states[~inside].view(torch.int64)
    assert torch.equal(outside, states[~inside].view(torch.int64)), "padding is changed"


def fuzz_scores(draw: Draw) -> None:
    """Dense and sparse weights are one another, and what interact sums."""
    batch, rows = draw.batch(), draw.size(120)
    dtype = draw.one(torch.float32, F64)
    score = draw.score((), dtype)
    states = draw.layout(cast(draw.points(*batch, rows, 2, calm=True), dtype))
    options = {"causal": draw.chance(0.6), "score": score}
    weights = scores(states, **options)
    assert weights.shape == (*batch, rows, rows) and weights.dtype == dtype
    if 0 in batch:
        return
    near = count_borderline(states, **options)
    found = interact(states, **options)
    if not near:
        tolerance = 1e-9 if dtype == F64 else 2e-4
        assert_relative("strength", weights.sum(-1), found.strength, tolerance, floor=1.0)
        assert_relative("context", weights @ states, found.context, tolerance, floor=1.0)
    if not batch:
        sparse = scores(states, layout="csr", **options)
        assert torch.equal(sparse.to_dense(), weights)


def fuzz_project_norm(draw: Draw) -> None:
    """LayerNorm of a linear map, and its gradients."""
    batch, width, count = draw.batch(), draw.one(1, 2, 5, 16, 33), draw.random.randint(1, 10)
    features = draw.points(*batch, count, calm=True) + draw.one(0.0, 3.0)
    tensors = [features, draw.normal(width, count)]
    tensors += [draw.normal(width) if draw.chance(0.6) else None for _ in range(3)]
    eps = draw.one(1e-5, 1e-2)

    def run(leaves: list[torch.Tensor], backend: str) -> Any:
        left = iter(leaves)
        given = [None if t is None else next(left) for t in tensors]
        if backend == "auto":
            return (project_norm(*given, eps=eps),)
        x, weight, bias, norm_weight, norm_bias = given
        return (F.layer_norm(F.linear(x, weight, bias), (width,), norm_weight, norm_bias, eps),)

    compare_gradients(run, tensors, draw)


def fuzz_cache(draw: Draw) -> None:
    """Appending, attending, truncating and reordering in any order against the whole."""
    batch, dtype = draw.one((), (2,), (2, 3)), draw.one(torch.float32, F64)
    score = draw.score(batch[1:], dtype, calm=True)
    if score.whole_window:
        score = type(score)(**{**vars(score), "stats": "prefix"})
    depth = draw.one(None, 1, 3)
    reduction = "sum" if score.kind.mass else draw.one("sum", "mean")
    cache = InteractionCache(
        score=score, batch_shape=batch, value_dim=depth, dtype=dtype, reduction=reduction
    )
    keys = torch.zeros(*batch, 0, 2, dtype=dtype)
    values = None if depth is None else torch.zeros(*batch, 0, depth, dtype=dtype)
    for _ in range(draw.random.randint(2, 8)):
        action = draw.one("append", "append", "attend", "truncate", "reorder")
        if action == "append":
            new = cast(draw.points(*keys.shape[:-2], count := draw.size(90), 2, calm=True), dtype)
            keys = torch.cat((keys, new), -2)
            more = None
            if values is not None:
                more = cast(draw.points(*keys.shape[:-2], count, depth, calm=True), dtype)
                values = torch.cat((values, more), -2)
            cache.append(draw.layout(new), more)
        elif action == "attend":
            rows = draw.random.randint(0, keys.shape[-2])
            states = cast(draw.points(*keys.shape[:-2], rows, 2, calm=True), dtype)
            found = cache.attend(draw.layout(states))
            # Sums of a soft threshold over many keys have the rounding of tau in each term.
            options = {"score": score, "reduction": reduction}
            rtol = 1e-11 if dtype == F64 else None
            assert_interaction_close(found, states, keys, values, rtol=rtol, **options)
        elif action == "truncate":
            length = draw.random.randint(0, len(cache))
            cache.truncate(length)
            keys = keys[..., :length, :]
            values = None if values is None else values[..., :length, :]
        elif batch:
            index = draw.integers(0, keys.shape[0], (keys.shape[0],))
            cache.reorder(index)
            keys = keys[index]
            values = None if values is None else values[index]
        assert len(cache) == keys.shape[-2]
        assert torch.equal(cache.keys, keys)


def fuzz_evolution_cache(draw: Draw) -> None:
    """Advancing in pieces against evolving the whole, in float64 by a score that does not jump."""
    batch, rows, steps = draw.one((), (2,), (2, 3)), draw.size(70), draw.one(1, 2)
    score = draw.one(Sparsemax(0.7), Threshold(0.4, shrinkage="soft"), InverseGate(0.3, 0.1))
    states = draw.points(*batch, rows, 2, calm=True)
    dt, skip = 0.05, draw.one(None, 0.2)
    radius = draw.one(None, Radius())
    cache = EvolutionCache(score=score, batch_shape=batch, dtype=F64, steps=steps, radius=radius)
    parts, first = [], 0
    while first < rows:
        last = min(rows, first + draw.random.randint(1, max(1, rows // 2)))
        parts.append(cache.advance(states[..., first:last, :], dt, skip))
        first = last
    if not parts:
        return
    whole = evolve(states, dt, score=score, steps=steps, skip=skip, radius=radius)
    for name in ("states", "strength"):
        dim = -2 if name == "states" else -1
        pieces = torch.cat([getattr(part, name) for part in parts], dim)
        assert_relative(name, pieces, getattr(whole, name), 1e-9, floor=1e-3)


KINDS = {
    fuzz_interact: 10,
    fuzz_gradients: 6,
    fuzz_evolve: 4,
    fuzz_poison: 3,
    fuzz_scores: 2,
    fuzz_project_norm: 2,
    fuzz_cache: 3,
    fuzz_evolution_cache: 1,
}


def run_case(number: int) -> str:
    """Run a case, and say of which kind it was."""
    draw = Draw(number)
    kind = draw.random.choices(list(KINDS), list(KINDS.values()))[0]
    try:
        kind(draw)
    except Exception as error:
        error.add_note(f"case {number}: {kind.__name__}") if hasattr(error, "add_note") else None
        raise
    return kind.__name__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--cases", type=int, help="how many; default: as many as the time allows")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    counts, failures, number = Counter(), [], options.first
    while (number - options.first < options.cases) if options.cases else time.monotonic() < end:
        try:
            counts[run_case(number)] += 1
        except Exception:
            failures.append(number)
            print(f"case {number} failed", file=sys.stderr)
            traceback.print_exc()
        number += 1
    print(f"cases {options.first} to {number - 1}: {len(failures)} failed {failures[:50]}")
    for name, count in sorted(counts.items()):
        print(f"{name:24} {count}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
