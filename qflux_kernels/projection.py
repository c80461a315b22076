"""The readout of states: LayerNorm of a linear map, without a pass over its width."""

from __future__ import annotations

import torch

from .arguments import COMPUTE_DTYPES
from .options import check_real


def _check_tensor(name: str, tensor: object, shape: tuple[int, ...], like: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of features, {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but features are on {like.device}")


def project_norm(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`layer_norm(linear(features, weight, bias), (d,), norm_weight, norm_bias, eps)`, faster.

    For few features the mean of the d outputs is linear in them and the variance a quadratic form,
    whose (F + 1) x (F + 1) Gram matrix depends on the weights alone. So a token costs O(F^2) for
    its statistics instead of passes over d numbers, the d-wide map is written once, normalised, and
    backward saves F + 1 numbers a token. Everything is PyTorch's own operations, hence any device,
    `torch.compile`, autocast-free float32 inside, and second derivatives.

    Args:
        features: `(..., F)` floating point; the states of C cylinders flattened to F = 2 C, say.
        weight: `(d, F)` and bias: `(d,)` or None, of the linear map.
        norm_weight, norm_bias: `(d,)` or None, of the normalisation.
        eps: added to the variance, > 0. Default 1e-5.

    Returns:
        `(..., d)` in the dtype of `features`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.

    Source: first seed, section 7.1 ("Combine integration and projection operations").
    """
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"features must be a tensor, got {type(features).__name__}")
    if features.dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"features must be float16, bfloat16, float32 or float64, got dtype {features.dtype}"
        )
    if features.dim() < 1:
        raise ValueError("features must have shape (..., F), got a scalar")
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight must be a tensor of shape (d, {features.shape[-1]})")
    width = weight.shape[0]
    _check_tensor("weight", weight, (width, features.shape[-1]), features)
    for name, tensor in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            _check_tensor(name, tensor, (width,), features)
    check_real("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps must be > 0, got {eps!r}")

    dtype = COMPUTE_DTYPES[features.dtype]
    with torch.autocast(features.device.type, enabled=False):
        inputs = features.to(dtype)
        inputs = torch.cat((inputs, inputs.new_ones(*inputs.shape[:-1], 1)), -1)
        offset = weight.new_zeros(width) if bias is None else bias
        matrix = torch.cat((weight, offset[:, None]), -1).to(dtype)
        matrix = matrix - matrix.mean(0)
        gram = matrix.mT @ matrix / width
        variance = ((inputs @ gram) * inputs).sum(-1, keepdim=True).clamp(min=0)
        inputs = inputs * torch.rsqrt(variance + eps)
        if norm_weight is not None:
            matrix = matrix * norm_weight.to(dtype)[:, None]
        shift = None if norm_bias is None else norm_bias.to(dtype)
        return torch.nn.functional.linear(inputs, matrix, shift).to(features.dtype)
