"""The readout of states: LayerNorm of a linear map, without a pass over its width."""

from __future__ import annotations

import torch

from . import reference
from .arguments import COMPUTE_DTYPES
from .autograd import Gradient, OpFunction, with_mapped
from .backends import CUDA_ARCHITECTURES, LOAD_ERROR
from .checks import check_real
from .schema import MAX_FEATURES, PROJECT_NORM, PROJECT_NORM_BACKWARD

# Where the ops run; anything else is served by the reference.
_DEVICES = {
    *(("cpu", "meta") if LOAD_ERROR is None else ()),
    *(("cuda",) if CUDA_ARCHITECTURES else ()),
}


class _ProjectNormBackward(Gradient):
    op = PROJECT_NORM_BACKWARD

    @staticmethod
    def forward(
        grad, features, weight, bias, norm_weight, eps, need_features, need_parameters
    ):  # fmt: skip
        return torch.ops.qflux_kernels.project_norm_backward.default(
            grad, features, weight, bias, norm_weight, eps, need_features, need_parameters
        )

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        folds = not cls.Inputs(*inputs).need_parameters  # sums are over the tokens of a call
        return _vmap(cls, info.batch_size, in_dims, inputs, 2, folds)


class _ProjectNorm(OpFunction):
    op = PROJECT_NORM

    @staticmethod
    def forward(features, weight, bias, norm_weight, norm_bias, eps):
        return torch.ops.qflux_kernels.project_norm.default(
            features, weight, bias, norm_weight, norm_bias, eps
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, weight, bias, norm_weight, _, ctx.eps = inputs
        ctx.save_for_backward(features, weight, bias, norm_weight)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:5]
        grads = _ProjectNormBackward.run(
            grad, *ctx.saved_tensors, ctx.eps, needs[0], any(needs[1:])
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        return _vmap(cls, info.batch_size, in_dims, inputs, 1, True)


def _vmap(
    function: type[OpFunction],
    size: int,
    in_dims: tuple,
    inputs: tuple,
    per_token: int,
    folds: bool,
) -> tuple:
    """`function` over a mapped dimension: at once if only the tokens have it, else one by one.

    The first `per_token` inputs, and the first result, have a row for each token.
    """
    if folds and all(dim is None for dim in in_dims[per_token:]):
        tokens = [
            with_mapped(tensor, dim, size, 0).flatten(0, 1)
            for tensor, dim in zip(inputs[:per_token], in_dims, strict=False)
        ]
        result = function.apply(*tokens, *inputs[per_token:])
        count = len(tokens[0]) // size if size else 0
        if isinstance(result, torch.Tensor):
            return result.unflatten(0, (size, count)), 0
        first = result[0].unflatten(0, (size, count))
        return (first, *result[1:]), (0, *(None,) * (len(result) - 1))
    results = [
        function.apply(
            *(
                tensor if dim is None else tensor.select(dim, n)
                for tensor, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for n in range(size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _register_fakes() -> None:
    @torch.library.register_fake("qflux_kernels::project_norm")
    def _(features, weight, *_):
        return features.new_empty(features.shape[0], weight.shape[0])

    @torch.library.register_fake("qflux_kernels::project_norm_backward")
    def _(grad, features, weight, *_):
        per_output = [features.new_empty(weight.shape[0]) for _ in range(3)]
        return features.new_empty(features.shape), weight.new_empty(weight.shape), *per_output


if LOAD_ERROR is None:
    _register_fakes()


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
    nothing is saved for the backward but the arguments. Kernels serve up to 8 features on CPU and
    CUDA; for more, `reference.project_norm` does the same with PyTorch's matrix products.
    Statistics are float64 inside; the gradients of the parameters are sums over all tokens, taken
    in the working precision over a tile of tokens and compensated in float64 across tiles, in an
    order that depends on the sizes alone: two runs are bitwise equal, on any number of threads.
    float16 and bfloat16 are computed in float32 and returned as they came; autocast changes
    nothing. Of the kernels, a second derivative raises.

    Args:
        features: `(..., F)` floating point; the states of C cylinders flattened to F = 2 C, say.
        weight: `(d, F)` and bias: `(d,)` or None, of the linear map.
        norm_weight, norm_bias: `(d,)` or None, of the normalisation.
        eps: added to the variance, > 0. Default 1e-5.

    Returns:
        `(..., d)` in the dtype of `features`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.

    Source: the Flux document, section 7.1 ("Combine integration and projection operations").
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
    check_real("eps", eps, above=0.0, finite=False)

    given = (features, weight, bias, norm_weight, norm_bias)
    if features.device.type not in _DEVICES or not 0 < features.shape[-1] <= MAX_FEATURES:
        # Only matrix products know autocast, and "meta" does not.
        where = features.device.type if features.device.type != "meta" else "cpu"
        with torch.autocast(where, enabled=False):
            return reference.project_norm(*given, eps=eps)
    dtype = COMPUTE_DTYPES[features.dtype]
    flat = features.to(dtype).reshape(-1, features.shape[-1])
    parameters = (None if t is None else t.to(dtype) for t in given[1:])
    result = _ProjectNorm.apply(flat, *parameters, float(eps))
    return result.reshape(*features.shape[:-1], width).to(features.dtype)
