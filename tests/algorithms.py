"""The sweep beside the dense kernels: the same results and gradients."""

import torch
from assertions import assert_relative

from qflux_kernels import interact


def both(states, keys=None, values=None, **options):
    """Results and gradients of every input, of the dense kernel and of the sweep."""
    given = [t for t in (states, keys, values) if t is not None]
    outcomes = []
    for algorithm in ("dense", "sweep"):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        names = iter(leaves)
        result = interact(
            next(names),
            next(names) if keys is not None else None,
            next(names) if values is not None else None,
            algorithm=algorithm,
            **options,
        )
        torch.manual_seed(1)
        weights = [torch.randn_like(result.context), torch.randn_like(result.strength)]
        grads = torch.autograd.grad([result.context, result.strength], leaves, weights)
        outcomes.append((result, grads))
    return outcomes


def assert_same(dense, sweep, rtol: float) -> None:
    """The same pairs kept, and the same sums up to rounding."""
    assert torch.equal(sweep[0].degree, dense[0].degree)
    pairs = [
        ("context", sweep[0].context, dense[0].context),
        ("strength", sweep[0].strength, dense[0].strength),
        *(("gradient", mine, theirs) for mine, theirs in zip(sweep[1], dense[1], strict=True)),
    ]
    for name, mine, theirs in pairs:
        finite = theirs.isfinite()
        assert torch.equal(mine.isfinite(), finite), name
        assert_relative(name, mine.where(finite, 0), theirs.where(finite, 0), rtol)
