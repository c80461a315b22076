"""Each operator once on a device, beside the reference in float64 on the CPU.

    python benchmarks/gpu_smoke.py --part operators --dtypes float32 float64
    python benchmarks/gpu_smoke.py --part compile

A short program without pytest, so that compute-sanitizer can run it too. Every check runs whatever
the ones before it did; a line for each says how it went.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from qflux_kernels import (
    InverseGate,
    Sparsemax,
    Threshold,
    diagnostics,
    evolve,
    interact,
    project_norm,
    reference,
)

# Of the norm of the truth. In single precision a pair at its threshold may fall on the other side.
TOLERANCES = {torch.float32: 1e-2, torch.float64: 1e-7}
PARTS = ("operators", "compile")


@dataclass(frozen=True)
class Check:
    """A call and the same in the reference, of tensors that both get gradients of."""

    ours: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def interaction(score: object, *shapes: tuple[int, ...], **options: object) -> Check:
    return Check(
        # "auto" could take another backend than the one to be seen.
        lambda *points: (
            interact(*points, score=score, backend=points[0].device.type, **options).context
        ),
        lambda *points: reference.interact(*points, score=score).context,
        shapes,
    )


def evolution(score: object, shape: tuple[int, ...], steps: int) -> Check:
    how = {"score": score, "steps": steps, "reduction": "mean"}
    return Check(
        lambda x: evolve(x, 0.05, backend=x.device.type, **how).states,
        lambda x: reference.evolve(x, 0.05, **how).states,
        (shape,),
    )


def checks(batch: int) -> dict[str, Check]:
    """By name. A stack of steps runs as one launch from 128 sequences on."""
    # Softer than the default, under which single precision loses most of its digits.
    soft, gate = Threshold(shrinkage="soft"), InverseGate(eps=0.1)
    long = (1, 2600, 2)  # a sweep has rectangles from 2,048 keys on
    layer = ((96, 2), (96,), (96,), (96,))
    return {
        "interact, hard": interaction(Threshold(), (3, 70, 2)),
        "interact, soft": interaction(soft, (3, 70, 2)),
        "interact, gate": interaction(gate, (3, 70, 2)),
        "interact, soft, D = 4": interaction(soft, (3, 70, 2), (3, 70, 2), (3, 70, 4)),
        "interact, hard, D = 33": interaction(Threshold(), (3, 70, 2), (3, 70, 2), (3, 70, 33)),
        "interact, gate, D = 4": interaction(gate, (3, 70, 2), (3, 70, 2), (3, 70, 4)),
        "interact, mass": interaction(Sparsemax(), (3, 70, 2)),
        "interact, mass, D = 4": interaction(Sparsemax(), (3, 70, 2), (3, 70, 2), (3, 70, 4)),
        "interact, mass, few rows": interaction(Sparsemax(), (2, 1, 2), (2, 900, 2), (2, 900, 4)),
        "interact, few rows": interaction(soft, (2, 1, 2), (2, 900, 2), (2, 900, 4)),
        "interact, sweep": interaction(Threshold(), long, algorithm="sweep"),
        "evolve, one step": evolution(Threshold(), (3, 70, 2), 1),
        "evolve, gate, two steps": evolution(gate, (3, 70, 2), 2),
        "evolve, resident": evolution(Threshold(), (batch, 64, 2), 3),
        "evolve, resident, gate": evolution(gate, (batch, 64, 2), 2),
        "project_norm": Check(project_norm, reference.project_norm, ((500, 2), *layer)),
    }


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    pull = torch.arange(output.numel(), device=output.device).to(output.dtype).cos()
    grads = torch.autograd.grad(output, leaves, pull.view_as(output))
    return [output.detach(), *grads]


@cache
def inputs_and_truth(check: Check) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).double() for shape in check.shapes]
    return tensors, with_gradients(check.truth, tensors)


def compare(check: Check, device: torch.device, dtype: torch.dtype) -> str:
    """Run a check, and say how large the largest error is.

    Raises:
        AssertionError: it is too large, or the kernels have nothing for the device.
    """
    backends = diagnostics()["backends"]
    # project_norm would quietly take the reference.
    assert device.type in backends, f"the object serves {backends}"
    tensors, wanted = inputs_and_truth(check)
    got = with_gradients(check.ours, [t.to(device, dtype) for t in tensors])
    worst = 0.0
    for ours, truth in zip(got, wanted, strict=True):
        error = torch.linalg.vector_norm(ours.cpu().double() - truth)
        worst = max(worst, (error / torch.linalg.vector_norm(truth)).item())
        # Not "<=" the other way round: a NaN has to fail.
        assert error <= TOLERANCES[dtype] * torch.linalg.vector_norm(truth), f"error {worst:.3g}"
    return f"error {worst:.2g}"


def compiled(
    function: Callable[[Tensor], Tensor],
    mode: Callable[[], object],
    backend: str,
    device: torch.device,
    grad: bool,
) -> str:
    """Compile a function whole and compare it with itself.

    Raises:
        AssertionError: a result differs.
    """
    torch._dynamo.reset()
    states = torch.randn(3, 50, 2, device=device)
    whole = torch.compile(function, fullgraph=True, backend=backend)
    with mode():
        if grad:
            got, wanted = (with_gradients(f, [states]) for f in (whole, function))
        else:
            got, wanted = [whole(states)], [function(states)]
    for ours, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    return ""


def compile_checks(device: torch.device) -> dict[str, Callable[[], str]]:
    """Tracing of each operator, and on a GPU the default compiler on all of them."""

    def project(x: Tensor) -> Tensor:
        return project_norm(x, torch.ones(5, 2, device=x.device))

    def all_of_them(x: Tensor) -> Tensor:
        moved = evolve(x, 0.05).states
        return project(moved + interact(x, score=Threshold(shrinkage="soft")).context.tanh())

    operators = {
        "interact": lambda x: interact(x).context,
        "soft": lambda x: interact(x, score=Threshold(shrinkage="soft")).context,
        "evolve": lambda x: evolve(x, 0.05).states,
        "project_norm": project,
    }
    modes = {
        "gradients": (torch.enable_grad, True),
        "no_grad": (torch.no_grad, False),
        "inference_mode": (torch.inference_mode, False),
    }
    found = {}
    for name, function in operators.items():
        for title, (mode, grad) in modes.items():
            if name == "soft" and not grad:
                continue  # only its backward differs
            call = partial(compiled, function, mode, "aot_eager", device, grad)
            found[f"aot_eager, {name}, {title}"] = call
    if device.type == "cuda":
        for title in ("gradients", "no_grad"):
            call = partial(
                compiled, all_of_them, modes[title][0], "inductor", device, modes[title][1]
            )
            found[f"inductor, all, {title}"] = call
    return found


def run(named: dict[str, Callable[[], str]]) -> int:
    """Run all checks, print a line each, and return how many failed."""
    failed = 0
    for name, check in named.items():
        try:
            print(f"ok      {name} {check()}", flush=True)
        except Exception as error:  # the next one may work
            failed += 1
            lines = str(error).strip().splitlines() or [""]
            print(f"FAILED  {name}: {type(error).__name__}: {lines[0][:300]}", flush=True)
    print(f"{len(named) - failed} of {len(named)} checks passed", flush=True)
    return failed


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--part", default="operators", choices=PARTS)
    parser.add_argument("--batch", type=int, default=384, help="of the stack of short sequences")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=[str(d)[6:] for d in TOLERANCES]
    )
    return parser.parse_args(words)


def main() -> int:
    options = parse()
    device = torch.device(options.device)
    if options.part == "compile":
        failed = run(compile_checks(device))
    else:
        failed = run(
            {
                f"{name}, {dtype}": partial(compare, check, device, getattr(torch, dtype))
                for name, check in checks(options.batch).items()
                for dtype in options.dtypes
            }
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
