"""The gradient of the adaptive threshold, from moments of the keys: O(S), no pass over pairs.

Only weights that are measured from the threshold need it; the rest treat it as a decision.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def threshold_vjp(
    grad: torch.Tensor,
    states: torch.Tensor,
    keys: torch.Tensor | None,
    sigma: torch.Tensor | float,
    lengths: torch.Tensor | None,
    eps: float,
    whole_window: bool,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of `sum(grad * tau)` in states, keys and sigma, in the dtype of `grad`.

    With m and C, mean and covariance of the keys in the window of a row x::

        tau = (x . m + 1) / 2 + sigma * sd,   sd = sqrt(v + eps),   v = x' C x / 4

        d tau / dx = m / 2 + sigma C x / (4 sd)
        d tau / dm = x / 2 - sigma (x . m) x / (4 sd)        m also stands in C = M - m m'
        d tau / dM = sigma x x' / (8 sd)

    Computed in float64. Rows that see no key have no part in it.

    Args:
        grad: `(*batch, S)`. states: `(*batch, S, 2)`. keys: `(*batch, K, 2)` or None: the states.
        sigma: `(*batch)` or a float. lengths: `(*batch)` or None.
        causal, whole_window: which keys a row's window has, see `Threshold`.

    Returns:
        `(*batch, S, 2)`, `(*batch, K, 2)` or None without keys, and `(*batch)`.
    """
    points = states if keys is None else keys
    rows, count = states.shape[-2], points.shape[-2]
    shift, prefix = count - rows, causal and not whole_window
    if not (rows and count):
        return (
            grad.new_zeros(states.shape),
            None if keys is None else grad.new_zeros(keys.shape),
            grad.new_zeros(grad.shape[:-1]),
        )
    if torch.is_tensor(sigma):
        sigma = sigma.double()[..., None]
    (x0, x1), (k0, k1), g = states.double().unbind(-1), points.double().unbind(-1), grad.double()
    row = torch.arange(rows, device=grad.device)
    # Windows start with key 0.
    window = (row + shift + 1).clamp(0, count) if prefix else torch.full_like(row, count)
    seen = row + shift >= 0 if causal else None
    inside = None
    if lengths is not None:
        lengths = lengths[..., None]
        inside = torch.arange(count, device=grad.device) < lengths
        window = torch.minimum(window, lengths)
        seen = row < lengths if seen is None else seen & (row < lengths)
    if seen is not None:
        # Padding may hold anything.
        g, x0, x1 = (torch.where(seen, plane, 0.0) for plane in (g, x0, x1))
    inverse = 1 / window.clamp(min=1).double()

    # A variance is that of differences: relative to one of the keys, equal keys have exactly none.
    if inside is not None:
        k0, k1 = (torch.where(inside, plane, 0.0) for plane in (k0, k1))
    o0, o1 = k0[..., :1], k1[..., :1]
    d0, d1 = k0 - o0, k1 - o1
    if inside is not None:
        d0, d1 = (torch.where(inside, plane, 0.0) for plane in (d0, d1))
    sums = torch.stack((d0, d1, d0 * d0, d0 * d1, d1 * d1))
    if prefix:
        sums = F.pad(sums.cumsum(-1), (max(-shift, 0), 0))[..., max(shift, 0) :]
    else:
        sums = sums.sum(-1, keepdim=True)
    m0, m1, s00, s01, s11 = (sums * inverse).unbind(0)
    c00, c01, c11 = s00 - m0 * m0, s01 - m0 * m1, s11 - m1 * m1
    y0, y1 = c00 * x0 + c01 * x1, c01 * x0 + c11 * x1
    variance = (x0 * y0 + x1 * y1) / 4
    sd = torch.sqrt(variance.clamp(min=0) + eps)
    half = g / 2
    # g sigma / (4 sd); nothing where rounding made a variance negative or nothing deviates.
    slope = torch.where(variance > 0, half * sigma / (2 * sd), 0.0)

    of_x = torch.stack((half * (o0 + m0) + slope * y0, half * (o1 + m1) + slope * y1), -1)
    of_m = half - slope * (x0 * m0 + x1 * m1)
    t0, t1 = slope * x0, slope * x1
    shares = torch.stack((of_m * x0, of_m * x1, t0 * x0, t0 * x1, t1 * x1)) * inverse
    if prefix:
        # Key j is in the windows of rows j - shift and later.
        later = shares.flip(-1).cumsum(-1).flip(-1)
        of_keys = F.pad(later[..., max(-shift, 0) :], (max(shift, 0), 0))
        if shift > 0:
            of_keys[..., :shift] = later[..., :1]
    else:
        of_keys = shares.sum(-1, keepdim=True)
    a0, a1, a00, a01, a11 = of_keys.unbind(0)
    of_k = torch.stack((a0 + a00 * d0 + a01 * d1, a1 + a01 * d0 + a11 * d1), -1)
    if inside is not None:
        of_k = torch.where(inside[..., None], of_k, 0.0)
    dtype = grad.dtype
    of_x, of_k, of_sigma = of_x.to(dtype), of_k.to(dtype), (g * sd).sum(-1).to(dtype)
    if keys is None:
        return of_x + of_k, None, of_sigma
    return of_x, of_k, of_sigma
