"""The workloads of `compare.py`, measured for the tree that PYTHONPATH names.

`compare.py` starts this in a process of its own for each tree and asks for one case after another:
a line of JSON in, `{"case": NAME, "seconds": S}`, and a line of JSON out. The trees may be of
different ages, so a workload tries today's names first and then older ones.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Runner, environment, synchronize, time_once

import qflux_kernels
from qflux_kernels import InverseGate, Threshold

LEAST_CALLS, MOST_CALLS = 5, 1000
VOCABULARY = 84


class NotHereError(Exception):
    """The tree has no such thing under any name that is known here."""


def first(*attempts: Callable[[], Any]) -> Any:
    """What the first attempt gives whose names this tree knows.

    Raises:
        NotHereError: with the reason of every attempt.
    """
    reasons = []
    for attempt in attempts:
        try:
            return attempt()
        except (AttributeError, ImportError, TypeError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise NotHereError("; ".join(reasons))


def attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def soft_threshold(sigma: float = 0.5) -> Threshold:
    return first(
        lambda: Threshold(sigma, shrinkage="soft"),
        lambda: Threshold(sigma, weight="excess"),
    )


@dataclass(frozen=True)
class Scale:
    """Limits on the sizes, for a quick run, and where the tensors go."""

    device: torch.device
    batch: int = sys.maxsize
    length: int = sys.maxsize

    def shape(self, *batch: int, length: int) -> tuple[int, ...]:
        return (*(min(size, self.batch) for size in batch), min(length, self.length))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal numbers, the same in every tree."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.device, dtype).requires_grad_()


@dataclass
class Workload:
    """Something to measure.

    once: runs it and gives seconds by mode. value: a number that it computes, to see that two trees
    compute the same.
    """

    once: Callable[[], dict[str, float]]
    value: float


Case = Callable[[Scale], Workload]


def differentiable(
    function: Callable[[], torch.Tensor], inputs: list[torch.Tensor], device: torch.device
) -> Workload:
    """Forward and backward of a function of `inputs`."""
    output = function()
    gradient = torch.ones_like(output)
    runner = Runner(function, lambda out: torch.autograd.grad(out, inputs, gradient))
    return Workload(lambda: time_once(runner, device), output.detach().double().sum().item())


def interaction(
    *batch: int,
    length: int,
    score: Callable[[], object] = Threshold,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Case:
    """`interact` of states with themselves."""

    def build(scale: Scale) -> Workload:
        states = scale.normal(*scale.shape(*batch, length=length), 2, dtype=dtype)
        chosen = score()
        return differentiable(
            lambda: qflux_kernels.interact(states, score=chosen, **options).context,
            [states],
            scale.device,
        )

    return build


def attention(
    batch: int,
    cylinders: int,
    length: int,
    value_dim: int,
    score: Callable[[], object] = Threshold,
) -> Case:
    """`interact` of `(B, C, S, D)` views of one `(B, S, C (4 + D))` projection, as in a layer."""

    def build(scale: Scale) -> Workload:
        size, tokens = scale.shape(batch, length=length)
        heads = min(cylinders, scale.batch)
        widths = (2 * heads, 2 * heads, value_dim * heads)
        projection = scale.normal(size, tokens, sum(widths))
        chosen = score()

        def call() -> torch.Tensor:
            parts = projection.split(widths, -1)
            views = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
            return qflux_kernels.interact(*views, score=chosen).context

        return differentiable(call, [projection], scale.device)

    return build


def evolution(
    *batch: int, length: int, score: Callable[[], object] = Threshold, **options: object
) -> Case:
    def build(scale: Scale) -> Workload:
        states = scale.normal(*scale.shape(*batch, length=length), 2)
        chosen = score()
        return differentiable(
            lambda: (
                qflux_kernels.evolve(states, 1e-3, score=chosen, reduction="mean", **options).states
            ),
            [states],
            scale.device,
        )

    return build


def projection(tokens: int, features: int, outputs: int) -> Case:
    def build(scale: Scale) -> Workload:
        [count] = scale.shape(length=tokens)
        shapes = ((count, features), (outputs, features), (outputs,), (outputs,), (outputs,))
        tensors = [scale.normal(*shape) for shape in shapes]
        return differentiable(lambda: qflux_kernels.project_norm(*tensors), tensors, scale.device)

    return build


def training_step(model: Callable[[], torch.nn.Module], batch: int, length: int) -> Case:
    """One step of `qflux.train`: forward, backward, clipping and AdamW."""

    def build(scale: Scale) -> Workload:
        torch.manual_seed(0)
        made = model().to(scale.device)
        kind = first(
            lambda: attribute("qflux.train.step", "TrainStep"),
            lambda: attribute("qflux.train.step", "Learner"),
            lambda: attribute("qflux.learner", "Learner"),
        )
        made_step = kind(
            made, attribute("qflux", "TrainingOptions")(output_dir="unused"), scale.device
        )
        step = getattr(made_step, "step", made_step)  # a method before the step was a call
        size, tokens = scale.shape(batch, length=length)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(VOCABULARY, (size, tokens), generator=generator).to(scale.device)

        def once() -> dict[str, float]:
            synchronize(scale.device)
            start = time.perf_counter()
            step(ids, 0.5)
            synchronize(scale.device)
            return {"step": time.perf_counter() - start}

        made.eval()
        with torch.no_grad():
            loss = made(ids, labels=ids).loss.item()
        made.train()
        return Workload(once, loss)

    return build


def language_model() -> torch.nn.Module:
    config = attribute("qflux", "QuantumFluxConfig")(vocab_size=VOCABULARY)
    return attribute("qflux", "QuantumFluxLM")(config)


def published_model(**changes: object) -> torch.nn.Module:
    names = [("PublishedConfig", "PublishedLM"), ("CylinderConfig", "CylinderLM")]
    config, model = first(
        *(lambda pair=pair: [attribute("qflux", name) for name in pair] for pair in names)
    )
    return model(config(vocab_size=VOCABULARY, **changes))


PARTS: dict[str, dict[str, Case]] = {
    "kernels": {
        "interact 8": interaction(length=8),
        "interact 1,024": interaction(length=1024),
        "interact 192 x 64": interaction(12, 16, length=64),
        "interact 192 x 64 bfloat16": interaction(12, 16, length=64, dtype=torch.bfloat16),
        "interact 2,048 row": interaction(length=2048, score=lambda: Threshold(stats="row")),
        "interact 2,048 all pairs": interaction(length=2048, causal=False),
        "interact 4,096 dense": interaction(length=4096, algorithm="dense"),
        "interact 16,384 dense": interaction(length=16384, algorithm="dense"),
        "interact 16,384 sweep": interaction(length=16384, algorithm="sweep"),
        "interact 2,048 gate": interaction(length=2048, score=InverseGate),
        "interact 2,048 soft": interaction(length=2048, score=soft_threshold),
        "attention 12 x 32 x 64 x 4": attention(12, 32, 64, 4),
        "attention 12 x 32 x 64 x 4 soft": attention(12, 32, 64, 4, soft_threshold),
        "attention 12 x 32 x 64 x 4 gate": attention(12, 32, 64, 4, InverseGate),
        "attention 2 x 32 x 1,024 x 4 soft": attention(2, 32, 1024, 4, soft_threshold),
        "attention 1 x 8 x 8,192 x 8 soft": attention(1, 8, 8192, 8, soft_threshold),
        "evolve 8": evolution(length=8),
        "evolve 192 x 64": evolution(12, 16, length=64),
        "evolve 1,024, 4 steps": evolution(length=1024, steps=4),
        "evolve 4,096 dense": evolution(length=4096, algorithm="dense"),
        "evolve 16,384 sweep": evolution(length=16384, algorithm="sweep"),
        "evolve 2,048 gate": evolution(length=2048, score=InverseGate),
        "project_norm 512: 2 to 128": projection(512, 2, 128),
        "project_norm 16,384: 2 to 128": projection(16384, 2, 128),
        "project_norm 16,384: 8 to 512": projection(16384, 8, 512),
    },
    "step": {
        "lm 12 x 64": training_step(language_model, 12, 64),
        "lm 1 x 1,024": training_step(language_model, 1, 1024),
        "published 12 x 64": training_step(published_model, 12, 64),
        "published 12 x 64 gate": training_step(
            lambda: published_model(score="inverse_gate"), 12, 64
        ),
    },
}


def measure(workload: Workload, seconds: float) -> dict[str, float]:
    """Medians by mode over as many calls as fit in `seconds`, after one that warms up.

    At least five are measured, but only one if `seconds` is 0.
    """
    workload.once()
    calls = [workload.once()]
    if seconds:
        fitting = int(seconds / sum(calls[0].values()))
        calls += [workload.once() for _ in range(min(MOST_CALLS, max(LEAST_CALLS, fitting)) - 1)]
    return {mode: statistics.median(call[mode] for call in calls) for mode in calls[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, required=True, help="where qflux must come from")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    imported = Path(qflux_kernels.__file__).resolve()
    if not imported.is_relative_to(options.tree.resolve()):
        sys.exit(f"qflux_kernels came from {imported}, not from {options.tree}")
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(found: dict[str, object]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    scale = Scale(options.device, 2, 32) if options.quick else Scale(options.device)
    cases = {name: case for part in PARTS.values() for name, case in part.items()}
    built: dict[str, Workload] = {}
    answer(environment(options.device))
    for line in sys.stdin:
        request = json.loads(line)
        name = request["case"]
        try:
            if name not in built:
                built.clear()  # one case in memory at a time
                built[name] = cases[name](scale)
            found = measure(built[name], request["seconds"])
            answer({"seconds": found, "value": built[name].value})
        except (AttributeError, NotHereError, RuntimeError, TypeError, ValueError) as error:
            answer({"missing": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
