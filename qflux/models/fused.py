"""A further token through a layer by one call, where that is what calling its modules would do."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from qflux_kernels.arguments import is_eager
from qflux_kernels.backends import LOAD_ERROR

from .cache import LayerCache
from .layers import CausalConvolution, EvolutionLayer, GatedMLP, GeometricAttention
from .plain import is_plain

# Sequences for which a matrix is read row by row; more share its reading in a matrix product.
MOST_SEQUENCES = 4


def goes_alone(hidden: Tensor, cache: Any) -> bool:
    """Whether the hidden stream `(B, n, H)` is of one token that all layers may take by one call.

    Behind other tokens, of a few sequences without padding, on a CPU in float32 or float64, in
    evaluation and called eagerly.
    """
    return (
        LOAD_ERROR is None
        and cache is not None
        and is_eager(hidden)  # else sizes may be unknown
        and cache.padding is None
        and cache.goes_on
        and hidden.shape[1] == 1
        and hidden.shape[0] <= MOST_SEQUENCES
        and hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


class LayerStep:
    """What the operator is given of a layer, as long as its modules are what they were.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: EvolutionLayer) -> None:
        attention, mlp = layer.attention, layer.mlp
        kinds: list[tuple[Any, type[nn.Module]]] = [(layer, EvolutionLayer)]
        if layer.evolution is None and attention is not None:
            kinds += [(attention, GeometricAttention), (layer.attention_norm, nn.LayerNorm)]
            kinds += [(attention.norm, nn.LayerNorm)]
            kinds += [(part, nn.Linear) for part in (attention.inputs, attention.output)]
            kinds += _convolution(attention.conv)
        if mlp is not None:
            kinds += [(mlp, GatedMLP), (layer.mlp_norm, nn.LayerNorm)]
            kinds += [(part, nn.Linear) for part in (mlp.input, mlp.output)]
            kinds += _convolution(mlp.conv)
        modules = [module for module, _ in kinds]
        bound: list[tuple[dict[str, Any], str, Any]] = [
            (where, name, part)
            for module in modules
            for where in (module._modules, module._parameters)
            for name, part in where.items()
        ]
        bound += [(module.__dict__, "forward", None) for module in modules]
        self._where, self._names, self._parts = zip(*bound, strict=True)
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.possible = (
            attention is not None and layer.evolution is None and _plain(kinds, self._parts)
        )
        if attention is None or not self.possible:
            return
        self._front = (*_norm(layer.attention_norm), *_taps(attention.conv))
        self._middle = (
            attention.inputs.weight, attention.inputs.bias, *_norm(attention.norm),
            attention.output.weight, attention.output.bias,
        )  # fmt: skip
        self._last: tuple[Any, ...] = (None, None, None, None)
        self._between: tuple[Any, ...] = (None, None, 0.0, None, None)
        if mlp is not None:
            self._between = (*_norm(layer.mlp_norm), *_taps(mlp.conv))
            self._last = (mlp.input.weight, mlp.input.bias, mlp.output.weight, mlp.output.bias)

    def __reduce__(self) -> Any:
        """A copy is None: it would be of the modules of another model."""
        return type(None), ()

    def __call__(self, hidden: Tensor, angle: Tensor, cache: LayerCache) -> Tensor | None:
        """The hidden stream `(B, 1, H)` behind the layer; None where its modules have to be called.

        Args:
            hidden: `(B, 1, H)`.
            angle: `(C, 1)`, the turn of the token's position.
            cache: of the tokens before, which this one joins.
        """
        attention, inputs = cache.attention, cache.inputs
        if not self.possible or attention is None or len(inputs) != len(cache.convolutions):
            return None
        # By functions that need no frame of Python's: this is asked for every token.
        found = map(dict.get, self._where, self._names)
        if any(self._hooks) or not all(map(operator.is_, found, self._parts)):
            return None
        prepared = attention.prepare()
        if prepared is None:
            return None
        out, past, mlp_past, served = _STEP(
            hidden[:, 0], angle[:, 0], *self._front, inputs.get("attention"), *self._middle,
            *self._between, inputs.get("mlp"), *self._last, *prepared,
        )  # fmt: skip
        if not served:
            return None
        attention.advance()
        for name in cache.convolutions:
            inputs[name] = past if name == "attention" else mlp_past
        return out[:, None]


def step(layer: Any, hidden: Tensor, angle: Tensor, cache: LayerCache) -> Tensor | None:
    """`LayerStep` of a layer, which stays in its cache."""
    if cache.replaying or cache.evolution is not None:
        return None
    if cache.step is None:
        cache.step = LayerStep(layer)
    return cache.step(hidden, angle, cache)


def _plain(kinds: list[tuple[Any, type[nn.Module]]], parts: tuple[Any, ...]) -> bool:
    """Whether modules are of their kinds and no more, with weights that are plain tensors."""
    return all(is_plain(module, kind) for module, kind in kinds) and all(
        is_eager(part.detach()) and part.is_contiguous()
        for part in parts
        if isinstance(part, Tensor)
    )


def _convolution(module: Any) -> list[tuple[Any, type[nn.Module]]]:
    """The module with its kind: of a convolution of one token the operator has no form."""
    wide = type(module) is CausalConvolution and module.width > 1
    return [(module, CausalConvolution if wide else nn.Identity)]


def _norm(module: nn.LayerNorm) -> tuple[Any, ...]:
    return module.weight, module.bias, module.eps


def _taps(module: nn.Module) -> tuple[Any, ...]:
    """The weights of a convolution, if it is one."""
    if isinstance(module, CausalConvolution):
        return module.weight, module.bias
    return None, None


# The overload itself, which a call finds faster.
_STEP: Any = None if LOAD_ERROR is not None else torch.ops.qflux_kernels.cache_layer.default
