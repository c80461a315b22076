"""What `gpu_check.py` times: cases as plain data, and what each of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import partial

import kernels
import project_norm as projection
import torch
from common import Runner
from torch import Tensor, nn
from torch.nn import functional as F
from transformer import Transformer, TransformerConfig

from qflux import QuantumFluxConfig, QuantumFluxLM
from qflux.train.optimizer import make_optimizer
from qflux.train.options import OptimizerOptions
from qflux_kernels import (
    BackendUnavailableError,
    InverseGate,
    Threshold,
    diagnostics,
    evolve,
    interact,
)

VOCABULARY = 84
# Least issue slots of the FP32 pipe that a pair costs on a GPU, by mode and width of the values
# (0: none of their own); `benchmarks/README.md` has the tables these come from.
SLOTS = {
    ("hard", "forward"): {0: 7, 4: 10, 8: 14, 16: 13, 64: 30},  # from 16 on by tensor cores
    ("soft", "forward"): {0: 7, 4: 9, 8: 13},
    ("gate", "forward"): {0: 12},
    ("hard", "rows"): {4: 9},  # without values they meet no pairs
    ("soft", "rows"): {0: 7, 4: 10},
    ("hard", "keys"): {0: 9, 4: 13, 8: 21},
    ("soft", "keys"): {0: 9, 4: 13, 8: 21},
}


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        operator: interact, evolve, project_norm, attention, step (of training), or a ceiling: fma
            or copy.
        provider: dense and sweep are this package's kernels, all else is what stands beside them.
        mode: forward (without gradients), rows or keys (a backward that wants only those, and the
            values with the keys), both (forward and the whole backward), step.
        batch, rows, keys: sequences, and tokens of each. For project_norm rows are tokens and keys
            features.
        width: of the values, 0 if the keys are the values. For project_norm the outputs.
        score: hard, soft or gate.
        steps: of `evolve`.
    """

    operator: str
    provider: str
    mode: str
    batch: int = 1
    rows: int = 1
    keys: int = 1
    width: int = 0
    score: str = ""
    steps: int = 0
    dtype: str = "float32"

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other cases, as its row in a CSV spells it."""
        return tuple(map(str, astuple(self)))

    def __str__(self) -> str:
        return " ".join(f"{f.name}={v}" for f, v in zip(fields(self), astuple(self), strict=True))


IDENTITY = [f.name for f in fields(Case)]


@dataclass(frozen=True)
class Sizes:
    """How large the cases of a run are.

    Args:
        batch, lengths, widths: many short sequences, as in the language model.
        long: lengths of one sequence; the sweep runs from the second on.
        decode: (batch, rows, keys) of few rows over many keys.
        evolve_steps: steps of one call.
        project: (tokens, features, outputs).
        eager, compiled: lengths for the reference and for `torch.compile`.
        heads: (sequences, heads, their width) of the attention beside `lengths`.
        training: (batch, context) of whole training steps.
        layers: of the models that train.
        copied, rounds: bytes and multiply-adds of the measured ceilings.
    """

    batch: int = 384
    lengths: tuple[int, ...] = (64, 256, 1024)
    widths: tuple[int, ...] = (4, 0, 8, 16, 64)
    long: tuple[int, ...] = (1 << 14, 1 << 16, 1 << 18, 1 << 20)
    decode: tuple[tuple[int, int, int], ...] = (
        (384, 1, 1 << 14),
        (32, 1, 1 << 20),
        (32, 8, 1 << 16),
    )
    evolve_steps: tuple[int, ...] = (1, 4)
    project: tuple[tuple[int, int, int], ...] = (
        (1 << 16, 2, 128), (1 << 16, 2, 512), (1 << 14, 8, 512), (512, 2, 128),
    )  # fmt: skip
    eager: tuple[int, ...] = (1024, 4096)
    compiled: tuple[int, ...] = (4096, 16384)
    heads: tuple[int, int, int] = (12, 4, 32)
    training: tuple[tuple[int, int], ...] = ((12, 64), (12, 256), (12, 1024))
    layers: int = 4
    copied: int = 1 << 30
    rounds: int = 2048


GPU = Sizes()
# The same code in small: for a machine without a GPU, and for a test.
CPU = Sizes(
    batch=24, lengths=(64, 256), widths=(4, 0, 16), long=(2048, 16384),
    decode=((24, 1, 4096),), project=((4096, 2, 128),), eager=(512,), compiled=(512,),
    heads=(2, 4, 16), training=((4, 64),), layers=2, copied=1 << 26,
)  # fmt: skip
QUICK = Sizes(
    batch=3, lengths=(16,), widths=(4, 0), long=(64, 2048), decode=((2, 1, 128),),
    evolve_steps=(1, 2), project=((64, 2, 16),), eager=(32,), compiled=(32,), heads=(1, 2, 8),
    training=((2, 16),), layers=1, copied=1 << 16,
)  # fmt: skip


def ceilings(sizes: Sizes) -> Iterator[Case]:
    """What the machine can do at best, for the shares."""
    yield Case("fma", "ceiling", "forward", rows=sizes.rounds)
    yield Case("copy", "ceiling", "forward", rows=sizes.copied)


def short(sizes: Sizes, scores: tuple[str, ...], widths: tuple[int, ...]) -> Iterator[Case]:
    """Many short sequences."""
    for score in scores:
        for width in widths:
            for length in sizes.lengths:
                for mode in ("forward", "rows", "keys", "both"):
                    yield Case("interact", "dense", mode, sizes.batch, length, length, width, score)


def narrow(sizes: Sizes) -> Iterator[Case]:
    """As the model has them, and without values."""
    return short(sizes, ("soft", "hard", "gate"), sizes.widths[:2])


def wide(sizes: Sizes) -> Iterator[Case]:
    return short(sizes, ("soft", "hard"), sizes.widths[2:])


def long(sizes: Sizes) -> Iterator[Case]:
    """One long sequence, dense and by the sweep."""
    for length in sizes.long:
        for score in ("hard", "soft", "gate"):
            for mode in ("forward", "rows", "keys"):
                if score != "gate" or mode == "forward" or length < 1 << 20:
                    yield Case("interact", "dense", mode, 1, length, length, 0, score)
    for length in sizes.long[1:]:
        for score in ("hard", "soft"):
            for mode in ("forward", "both"):
                yield Case("interact", "sweep", mode, 1, length, length, 0, score)
    for length in sizes.long[:2]:
        for mode in ("forward", "rows", "keys"):
            yield Case("interact", "dense", mode, 1, length, length, 4, "soft")


def decode(sizes: Sizes) -> Iterator[Case]:
    for batch, rows, keys in sizes.decode:
        for score in ("soft", "hard"):
            yield Case("interact", "dense", "forward", batch, rows, keys, 4, score)


def evolution(sizes: Sizes) -> Iterator[Case]:
    for steps in sizes.evolve_steps:
        for score in ("hard", "gate"):
            for length in sizes.lengths:
                for mode in ("forward", "both"):
                    yield Case(
                        "evolve", "dense", mode, sizes.batch, length, length, 0, score, steps
                    )
    for mode in ("forward", "both"):
        length = sizes.long[1]
        yield Case("evolve", "dense", mode, 1, length, length, 0, "hard", 1)
        yield Case("evolve", "sweep", mode, 1, length, length, 0, "hard", 1)


def projections(sizes: Sizes) -> Iterator[Case]:
    for tokens, features, outputs in sizes.project:
        for provider in ("dense", "layer_norm"):
            for mode in ("forward", "both"):
                yield Case("project_norm", provider, mode, 1, tokens, features, outputs)


def others(sizes: Sizes) -> Iterator[Case]:
    """What else computes such things, at the sizes of cases above or beside our own."""
    batch, heads, width = sizes.heads
    for dtype in ("float32", "bfloat16"):
        for length in sizes.lengths:
            for mode in ("forward", "both"):
                yield Case(
                    "attention", "sdpa", mode, batch * heads, length, length, width, dtype=dtype
                )
    for length in sizes.lengths:
        for mode in ("forward", "both"):
            yield Case("interact", "triton", mode, sizes.batch, length, length, 4, "soft")
    for mode in ("forward", "both"):
        yield Case("interact", "triton", mode, 1, sizes.long[0], sizes.long[0], 0, "hard")
    for length in sorted({*sizes.eager, *sizes.compiled}):
        for mode in ("forward", "both"):
            yield Case("interact", "dense", mode, 1, length, length, 0, "hard")
    for length in sizes.eager:
        for mode in ("forward", "both"):
            yield Case("interact", "eager", mode, 1, length, length, 0, "hard")
            yield Case("evolve", "eager", mode, 1, length, length, 0, "hard", 1)


def compiled(sizes: Sizes) -> Iterator[Case]:
    for length in sizes.compiled:
        for mode in ("forward", "both"):
            yield Case("interact", "compile", mode, 1, length, length, 0, "hard")


def training(sizes: Sizes) -> Iterator[Case]:
    for batch, context in sizes.training:
        for provider in ("qflux", "transformer"):
            yield Case("step", provider, "step", batch, context, context)


# What one process times, one after another.
PARTS: dict[str, tuple[Callable[[Sizes], Iterator[Case]], ...]] = {
    "operators": (ceilings, narrow, long, decode, evolution, projections, wide),
    "others": (others,),
    "compile": (compiled,),
    "training": (training,),
}


def cases_of(part: str, sizes: Sizes) -> list[Case]:
    """The cases of a part, each once."""
    found = (case for cases in PARTS[part] for case in cases(sizes))
    return list(dict.fromkeys(found))


def not_here(case: Case, device: torch.device) -> str | None:
    """Why a case does not apply to a device, or None."""
    if device.type == "cuda":
        return None
    if case.provider == "triton":
        return "Triton has no CPU compiler"
    if case.operator == "fma":
        return "benchmarks/issue_bound.py measures it on a CPU"
    return None


def pairs(case: Case) -> float:
    """Visible pairs of a call; the ends of rows and keys are aligned."""
    visible = case.rows * case.keys - case.rows * (case.rows - 1) / 2
    # Two stages a step.
    return case.batch * visible * (2 * case.steps if case.operator == "evolve" else 1)


def amount(case: Case) -> tuple[str, float]:
    """What a call works through, for its rate: a unit, and how many of it."""
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    if case.operator == "copy":
        return "bytes", 2.0 * case.rows
    if case.operator == "project_norm":
        return "bytes", size * case.rows * (case.keys + case.width) * 1.0
    if case.operator == "step":
        return "tokens", case.batch * case.rows * 1.0
    if case.operator == "interact" and case.rows * 64 < case.keys:
        # So few rows only read the keys and values.
        return "bytes", size * case.batch * case.keys * (2 + case.width) * 1.0
    return "pairs", pairs(case)


def slots(case: Case) -> int | None:
    """The least issue slots a pair, where they are known and a call is one pass over the pairs."""
    if case.operator != "interact" or case.provider != "dense":
        return None
    return SLOTS.get((case.score, case.mode), {}).get(case.width)


def points(*shape: int, device: torch.device, grad: bool, dtype: str = "float32") -> Tensor:
    """Normal numbers, other ones for every tensor of a case."""
    return torch.randn(shape, device=device).to(getattr(torch, dtype)).requires_grad_(grad)


def score_of(case: Case, device: torch.device) -> Threshold | InverseGate:
    if case.score == "gate":
        return InverseGate()
    sigma: float | Tensor = 0.5
    if case.batch > 1:  # one for each cylinder, as in the model
        sigma = torch.linspace(0.0, 1.4, case.batch, device=device)
    return Threshold(sigma, shrinkage=case.score)


def differentiated(forward: Callable[[], Tensor], wanted: list[Tensor], keep: bool) -> Runner:
    with torch.no_grad():
        pull = torch.randn_like(forward())
    return Runner(
        forward, lambda output: torch.autograd.grad(output, wanted, pull, retain_graph=keep)
    )


def interaction(case: Case, device: torch.device) -> Runner:
    make = partial(points, device=device, dtype=case.dtype)
    states = make(case.batch, case.rows, 2, grad=case.mode in ("rows", "both"))
    keys = make(case.batch, case.keys, 2, grad=case.mode in ("keys", "both"))
    values = None
    if case.width:
        values = make(case.batch, case.keys, case.width, grad=case.mode in ("keys", "both"))
    how = {"score": score_of(case, device)}
    if case.provider == "triton":
        how["backend"] = "triton"
    else:  # "auto" could take another backend than the one to be timed
        how |= {"backend": device.type, "algorithm": case.provider}
    wanted = [t for t in (states, keys, values) if t is not None and t.requires_grad]
    return differentiated(
        lambda: interact(states, keys, values, **how).context, wanted, case.mode != "both"
    )


def evolved(case: Case, device: torch.device) -> Runner:
    states = points(case.batch, case.rows, 2, device=device, grad=case.mode == "both")
    how = {"score": score_of(case, device), "steps": case.steps, "algorithm": case.provider}
    how["backend"] = device.type
    return differentiated(
        lambda: evolve(states, 1e-3, reduction="mean", **how).states, [states], False
    )


def attention(case: Case, device: torch.device) -> Runner:
    """Causal softmax attention of as many heads as the batch."""
    shape = (1, case.batch, case.rows, case.width)
    inputs = [
        points(*shape, device=device, grad=case.mode == "both", dtype=case.dtype) for _ in range(3)
    ]
    return differentiated(
        lambda: F.scaled_dot_product_attention(*inputs, is_causal=True), inputs, False
    )


def projected(case: Case, device: torch.device) -> Runner:
    name = "qflux" if case.provider == "dense" else case.provider
    if name == "qflux" and device.type not in diagnostics()["backends"]:
        # It would quietly take the reference.
        raise BackendUnavailableError(f"the object has no code for {device.type}")
    return projection.build(projection.PROVIDERS[name], case.rows, case.keys, case.width, device)


def beside(case: Case, device: torch.device) -> Runner:
    """A provider of `kernels.py` on one sequence."""
    return kernels.build(case.operator, case.provider, case.rows, device, dynamic=False)


def copy(case: Case, device: torch.device) -> Callable[[], object]:
    source = torch.ones(case.rows, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def training_step(case: Case, sizes: Sizes, device: torch.device) -> Callable[[], object]:
    """Forward, backward, clipping and AdamW of a model on one batch."""
    torch.manual_seed(0)
    model: nn.Module
    if case.provider == "qflux":
        model = QuantumFluxLM(
            QuantumFluxConfig(VOCABULARY, num_layers=sizes.layers, context_length=case.rows)
        )
    else:
        # What the language model has beside its geometry.
        model = Transformer(
            TransformerConfig(
                VOCABULARY, num_layers=sizes.layers, context_length=case.rows, conv_width=4,
                mlp_conv=True, mlp="swiglu",
            )
        )  # fmt: skip
    model = model.to(device)
    optimizer = make_optimizer(model, OptimizerOptions())
    for group in optimizer.param_groups:
        # Steps are counted on the device, so that a graph can replay them.
        group["capturable"] = device.type == "cuda"
    ids = torch.randint(VOCABULARY, (case.batch, case.rows + 1), device=device)
    inputs, targets = ids[:, :-1], ids[:, 1:].flatten()

    def step() -> None:
        optimizer.zero_grad()
        output = model(inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        F.cross_entropy(logits.flatten(0, 1).float(), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def call_of(case: Case, sizes: Sizes, device: torch.device) -> Callable[[], object]:
    """What is timed. Of a backward alone the forward has run when this returns."""
    if case.operator == "step":
        return training_step(case, sizes, device)
    if case.operator == "copy":
        return copy(case, device)
    if case.operator == "fma":
        from gpu_fma import multiply_adds  # needs Triton

        return multiply_adds(device, case.rows)
    if case.provider in ("eager", "compile"):
        runner = beside(case, device)
    else:
        build = {
            "interact": interaction,
            "evolve": evolved,
            "attention": attention,
            "project_norm": projected,
        }[case.operator]
        runner = build(case, device)
    if case.mode == "forward":
        return torch.no_grad()(runner.forward)
    if case.mode == "both":
        return lambda: runner.backward(runner.forward())
    output = runner.forward()
    return lambda: runner.backward(output)
