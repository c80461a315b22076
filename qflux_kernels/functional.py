"""The public operators: arguments checked, a backend chosen, results in the caller's shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from . import autograd, reference
from .arguments import InteractArguments, evolve_arguments, interact_arguments
from .backends import OP_FAMILIES, check_algorithm, choose_backend
from .options import Evolution, Interaction, Radius, Score, Threshold

# The weights are for analysis and have no kernels.
from .reference import scores as scores


class Server(Protocol):
    """Something that serves the calls of `interact` and `evolve`, which have their arguments."""

    def interact(self, states: Any, keys: Any, values: Any, **options: Any) -> Interaction: ...

    def evolve(self, states: Any, dt: Any, **options: Any) -> Evolution: ...


# Not a context variable: a backward that recomputes a layer may run in another thread.
_server: Server | None = None


@contextmanager
def served_by(server: Server) -> Iterator[None]:
    """Meanwhile `server` gets the calls of `interact` and `evolve`, in every thread."""
    global _server
    before, _server = _server, server
    try:
        yield
    finally:
        _server = before


def is_served() -> bool:
    """Whether a server gets the calls now."""
    return _server is not None


def interact(
    states: torch.Tensor,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    *,
    causal: bool = True,
    score: Score = Threshold(),  # noqa: B008 (frozen)
    reduction: str = "sum",
    lengths: torch.Tensor | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
) -> Interaction:
    """Weighted sums of what each state keeps of the others: the network's attention.

    For row i over the keys j it may see::

        context_i  = sum_j w_ij v_j      strength_i = sum_j w_ij      degree_i = #{j kept}

    with the weights of `Threshold`, `Sparsemax` or `InverseGate`. The pairs are never stored:
    memory is O(S). float32 and float64 are computed in their own precision; sums over more than
    one tile of keys (128 on CPU) continue in float64 for float32 and compensated for float64, so
    that the error does not grow with S. float16 and bfloat16 are how points and values are stored
    and saved for the backward; they are computed in float32, and results and gradients returned as
    they came. Two runs on the same inputs are bitwise equal.

    Args:
        states: `(..., S, 2)` floating point, one point per token; the rows.
        keys: `(..., K, 2)`; default the states themselves (the published system).
        values: `(..., K, D)`, any D >= 1; default the keys.
        causal: row i sees keys j <= i + K - S (ends aligned), else all keys of its sequence.
        score: `Threshold` (default), `Sparsemax` or `InverseGate`.
        reduction: "sum" (default), or "mean" over the visible keys, which `Sparsemax` refuses.
        lengths: integer tensor that broadcasts to the batch shape, for right-padded sequences
            with K == S: padding rows get zeros, and nobody sees padding. Numbers outside of [0, S]
            are an error where they can be read, and count as the nearest of these where not: on a
            GPU and in traced programs.
        algorithm: "dense" meets every pair. "sweep" gives the same answer in about O(S log S), for
            `Threshold`, and between that and O(S^1.5) for `Sparsemax` (on a CPU only). "auto"
            (default) takes it on a CPU from 8,192 tokens, if not causal from 2,048, and for
            `Sparsemax` from 24,576 forward and 8,192 backward, if not causal from 6,144 and 4,096.
            It never does on a GPU, where no crossover is measured yet.
        backend: "auto" (the device of the states decides), "cpu", "cuda", "triton" or "reference".
            "auto" takes "triton" on a GPU for which nothing was compiled.

    Returns:
        Interaction(context `(..., S, D)`, strength `(..., S)`, degree `(..., S)` int32).

    Raises:
        TypeError, ValueError: bad arguments, naming the argument, what came and what is allowed.
        BackendUnavailableError: the backend or algorithm asked for is not there, and why.

    Source: the Flux document, section 5 (`compute_score`); the QFNN document, "Quantum Flux
    Attention".
    """
    if _server is not None:
        return _server.interact(
            states, keys, values, causal=causal, score=score, reduction=reduction, lengths=lengths,
            algorithm=algorithm, backend=backend,
        )  # fmt: skip
    args = interact_arguments(
        states, keys, values, causal=causal, score=score, reduction=reduction, lengths=lengths
    )
    return interact_checked(args, algorithm, backend)


def interact_checked(args: InteractArguments, algorithm: str, backend: str) -> Interaction:
    """`interact` of arguments that have been checked, here and now, whoever serves calls."""
    chosen = choose_backend(backend, args.states.device)
    check_algorithm(algorithm, args.score, chosen, args.states.device)
    if chosen == "reference":
        return reference.interact_checked(args)
    context, strength, degree = autograd.interact(args, algorithm, OP_FAMILIES[chosen])
    dtype = args.result_dtype
    if context.dtype != dtype:
        context, strength = context.to(dtype), strength.to(dtype)
    return Interaction(context, strength, degree)


def evolve(
    states: torch.Tensor,
    dt: float | torch.Tensor,
    *,
    causal: bool = True,
    score: Score = Threshold(),  # noqa: B008 (frozen)
    radius: Radius | None = Radius(),  # noqa: B008 (frozen)
    skip: float | torch.Tensor | None = None,
    reduction: str = "sum",
    steps: int = 1,
    lengths: torch.Tensor | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
) -> Evolution:
    """Heun-Euler steps of the token states under their interaction, with the radius rule.

    One step, with `context` and `strength` of `interact`::

        k1 = dt * context(x);   k2 = dt * context(x + k1);   x' = x + (k1 + k2) / 2
        r' = max(|x'|, 1e-6)
        rho = clamp(r' + rate * strength(x) - reversion * (r' - target), min, max)
        x_out = x' * rho / r';   result = skip * x + (1 - skip) * x_out

    Backward saves O(S) numbers and recomputes the pairs. Precision as in `interact`.

    Args:
        states: `(..., S, 2)` floating point.
        dt: time step, a float or a tensor that broadcasts to `(..., S)`; gets a gradient.
        causal, score, reduction, lengths, algorithm, backend: as in `interact`. Padding rows are
            returned as they came.
        radius: the radius rule, or None to leave radii alone.
        skip: share of the old state that stays, like `dt`; None (default) for none.
        steps: how many times to repeat the step. `dt` and `skip` may then have a leading
            dimension of `steps`; give all dimensions, `(steps, ..., S)`, where sizes coincide.

    Returns:
        Evolution(states `(..., S, 2)`, strength `(..., S)`, degree `(..., S)` int32), the last two
        from the first stage of the last step.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as `interact`.

    Source: the Flux document, sections 5 and 7; the QFNN document, "State Evolution".
    """
    if _server is not None:
        return _server.evolve(
            states, dt, causal=causal, score=score, radius=radius, skip=skip, reduction=reduction,
            steps=steps, lengths=lengths, algorithm=algorithm, backend=backend,
        )  # fmt: skip
    args = evolve_arguments(
        states, dt, causal=causal, score=score, radius=radius, skip=skip, reduction=reduction,
        steps=steps, lengths=lengths,
    )  # fmt: skip
    chosen = choose_backend(backend, args.states.device)
    check_algorithm(algorithm, args.score, chosen, args.states.device)
    if chosen == "reference":
        return reference.evolve_checked(args)
    moved, strength, degree = autograd.evolve(args, algorithm, OP_FAMILIES[chosen])
    dtype = args.result_dtype
    if moved.dtype != dtype:
        moved, strength = moved.to(dtype), strength.to(dtype)
    return Evolution(moved, strength, degree)
