"""The public operators: arguments checked, a backend chosen, results in the caller's shape."""

from __future__ import annotations

import torch

from . import autograd, reference
from .arguments import evolve_arguments, interact_arguments
from .backends import OP_FAMILIES, check_algorithm, choose_backend
from .options import ALGORITHMS, Evolution, Interaction, Radius, Score, Threshold


def _pair_options(
    score: Score, causal: bool, reduction: str, algorithm: str
) -> autograd.PairOptions:
    threshold = isinstance(score, Threshold)
    return autograd.PairOptions(
        score=autograd.SCORES.index(
            f"{score.shrinkage}_threshold" if threshold else "inverse_gate"
        ),
        eps=float(score.eps),
        row_window=threshold and score.stats == "row",
        causal=causal,
        mean=reduction == "mean",
        algorithm=ALGORITHMS.index(algorithm),
    )


def _split(value: float | torch.Tensor, flat: tuple[int, ...]) -> autograd.Coefficient:
    """A number as the pair (tensor or None, float) that the ops take."""
    if isinstance(value, torch.Tensor):
        return value.reshape(flat), 0.0
    return None, value


def _score_coefficients(
    score: Score, flat: tuple[int, ...]
) -> tuple[autograd.Coefficient, autograd.Coefficient]:
    if isinstance(score, Threshold):
        return _split(score.sigma, flat), (None, 0.0)
    return _split(score.alpha, flat), _split(score.min_gate, flat)


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

    with the weights of `Threshold` or `InverseGate`. The pairs are never stored: memory is O(S).
    float32 and float64 are computed in their own precision; sums over more than one tile of keys
    (128 on CPU) continue in float64 for float32 and compensated for float64, so that the error
    does not grow with S. float16 and bfloat16 are how points and values are stored and saved for
    the backward; they are computed in float32, and results and gradients returned as they came.
    Two runs on the same inputs are bitwise equal.

    Args:
        states: `(..., S, 2)` floating point, one point per token; the rows.
        keys: `(..., K, 2)`; default the states themselves (the published system).
        values: `(..., K, D)`, any D >= 1; default the keys.
        causal: row i sees keys j <= i + K - S (ends aligned), else all keys of its sequence.
        score: `Threshold` (default) or `InverseGate`.
        reduction: "sum" (default), or "mean" over the visible keys.
        lengths: integer tensor that broadcasts to the batch shape, for right-padded sequences
            with K == S: padding rows get zeros, and nobody sees padding.
        algorithm: "dense" meets every pair. "sweep" gives the same answer in about O(S log S), for
            `Threshold` only. "auto" (default) takes it from 8,192 tokens on a CPU (2,048 if not
            causal), and never on a GPU, where no crossover is measured yet.
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
    args = interact_arguments(states, keys, values, causal, score, reduction, lengths)
    chosen = choose_backend(backend, args.states.device)
    check_algorithm(algorithm, args.score, chosen, args.states.device)
    if chosen == "reference":
        return reference.interact(
            states, keys, values, causal=causal, score=score, reduction=reduction, lengths=lengths
        )
    batch, (rows, _) = args.states.shape[:-2], args.states.shape[-2:]
    flat = (batch.numel(),)

    def flatten(points: torch.Tensor | None) -> torch.Tensor | None:
        return None if points is None else points.reshape(flat + points.shape[-2:])

    context, strength, degree = autograd.interact(
        args.states.reshape(*flat, rows, 2),
        flatten(args.keys),
        flatten(args.values),
        *_score_coefficients(args.score, flat),
        None if args.lengths is None else args.lengths.reshape(flat),
        _pair_options(args.score, args.causal, args.reduction, algorithm),
        OP_FAMILIES[chosen],
    )
    dtype = args.result_dtype
    return Interaction(
        context.reshape(*batch, rows, context.shape[-1]).to(dtype),
        strength.reshape(*batch, rows).to(dtype),
        degree.reshape(*batch, rows),
    )


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
    args = evolve_arguments(states, dt, causal, score, radius, skip, reduction, steps, lengths)
    chosen = choose_backend(backend, args.states.device)
    check_algorithm(algorithm, args.score, chosen, args.states.device)
    if chosen == "reference":
        return reference.evolve(
            states, dt, causal=causal, score=score, radius=radius, skip=skip,
            reduction=reduction, steps=steps, lengths=lengths,
        )  # fmt: skip
    batch, length = args.states.shape[:-2], args.states.shape[-2]
    flat = (batch.numel(),)

    def per_token(value: float | torch.Tensor) -> autograd.Coefficient:
        lead = value.shape[:1] if isinstance(value, torch.Tensor) else ()
        return _split(value, (*lead, *flat, length))

    rule = Radius() if radius is None else radius
    out, strength, degree = autograd.evolve(
        args.states.reshape(*flat, length, 2),
        per_token(args.dt),
        per_token(args.skip),
        *_score_coefficients(args.score, flat),
        None if args.lengths is None else args.lengths.reshape(flat),
        _pair_options(args.score, args.causal, args.reduction, algorithm),
        autograd.StepOptions(
            steps=args.steps,
            has_radius=radius is not None,
            radius_min=float(rule.min),
            radius_max=float(rule.max),
            radius_rate=float(rule.rate),
            radius_reversion=float(rule.reversion),
            radius_target=float(rule.target),
        ),
        OP_FAMILIES[chosen],
    )
    dtype = args.result_dtype
    return Evolution(
        out.reshape(args.states.shape).to(dtype),
        strength.reshape(*batch, length).to(dtype),
        degree.reshape(*batch, length),
    )


def scores(
    states: torch.Tensor,
    *,
    causal: bool = True,
    score: Score = Threshold(),  # noqa: B008 (frozen)
    layout: str = "dense",
) -> torch.Tensor:
    """The weights w_ij themselves, for analysis.

    Args:
        states: `(..., S, 2)` floating point; for `layout="csr"` one sequence, `(S, 2)`.
        causal, score: as in `interact`.
        layout: "dense" returns `(..., S, S)`, zero where a pair is dropped or invisible. "csr"
            returns a sparse `(S, S)` tensor of the kept pairs without ever forming S x S.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    return reference.scores(states, causal=causal, score=score, layout=layout)
