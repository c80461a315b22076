"""A further token through a model by one call, where calling its modules would do the same."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from qflux_kernels.arguments import is_eager
from qflux_kernels.backends import LOAD_ERROR
from qflux_kernels.past import NOTHING

from ..parallel import current_split
from .cache import ModelCache
from .convolution import CausalConvolution
from .embedding import CylinderEmbedding, PhaseRotation
from .layers import EvolutionLayer, GatedMLP, GeometricAttention
from .plain import is_plain

# Sequences for which a matrix is read row by row; more share its reading in a matrix product.
MOST_SEQUENCES = 4


def goes_alone(model: Any, input_ids: Tensor, cache: ModelCache) -> bool:
    """Whether these are tokens `(B, 1)` that a model may take by one call.

    Behind other tokens, of a few sequences without padding, on a CPU in float32 or float64, in
    evaluation and called eagerly.
    """
    return (
        LOAD_ERROR is None
        and is_eager(input_ids)  # else sizes may be unknown
        and input_ids.dtype == torch.int64
        and input_ids.device.type == "cpu"
        and input_ids.shape == (cache.batch, 1)
        and cache.batch <= MOST_SEQUENCES
        and cache.padding is None
        and len(cache) > 0
        and not model.training
        and current_split() is None
        and not torch.is_autocast_enabled("cpu")
    )


class TokenStep:
    """What the operator is given of a model, as long as its modules are what they were.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        ends: list[tuple[str, type[nn.Module]]] = [
            ("embedding", CylinderEmbedding), ("projection", nn.Linear), ("norm", nn.LayerNorm)
        ]  # fmt: skip
        if len(model.layers):
            ends.append(("rotation", PhaseRotation))
        kinds: list[tuple[Any, type[nn.Module]]] = [(getattr(model, n), kind) for n, kind in ends]
        for layer in model.layers:
            kinds += _kinds(layer)
        modules = [model.layers, *(module for module, _ in kinds)]
        bound: list[tuple[dict[str, Any], str, Any]] = [
            (where, name, part)
            for module in modules
            for where in (module._modules, module._parameters)
            for name, part in where.items()
        ]
        names = "layers", *(name for name, _ in ends)
        bound += [(model._modules, name, getattr(model, name)) for name in names]
        bound += [(module.__dict__, "forward", None) for module in modules]
        bound += [(model.__dict__, "read", None)]
        self.model = model
        self._where, self._names, self._parts = zip(*bound, strict=True)
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.possible = (
            len(model.layers) > 0
            and all(layer.attention is not None for layer in model.layers)
            and not any(layer.evolution is not None for layer in model.layers)
            and _plain(kinds, self._parts)
        )
        if not self.possible:
            return
        given = [part for layer in model.layers for part in _weights(layer)]
        embedding = model.embedding
        given += [embedding.radius_logit, embedding.phase]
        given += [part for end in (model.projection, model.norm) for part in (end.weight, end.bias)]
        self._weights = [NOTHING if part is None else part for part in given]
        self._eps = [eps for layer in model.layers for eps in _eps(layer)] + [model.norm.eps]
        self._bounds = [float(bound) for bound in embedding.bounds]
        self._phase, self._rotation = embedding.phase, model.rotation

    def __reduce__(self) -> Any:
        """A copy is None: it would be of the modules of another model."""
        return type(None), ()

    def __call__(self, input_ids: Tensor, cache: ModelCache) -> Tensor | None:
        """What the output layer reads, `(B, 1, H)`; None where modules have to be called.

        Args:
            input_ids: `(B, 1)` token ids.
            cache: of the tokens before, which these join.
        """
        if not self.possible:
            return None
        # By functions that need no frame of Python's: this is asked for every token.
        found = map(dict.get, self._where, self._names)
        if any(self._hooks) or not all(map(operator.is_, found, self._parts)):
            return None
        pasts: list[Tensor] = []
        caches: list[Tensor] = []
        numbers: list[float] = []
        indexed, scores, chunk = [], [], 0
        attentions = []
        for layer in cache.layers:
            inputs, attention = layer.inputs, layer.attention
            if layer.replaying or attention is None or len(inputs) != len(layer.convolutions):
                return None
            prepared = attention.prepare()
            if prepared is None:
                return None
            tensors, chunk, tokens, kernel, own = prepared
            attentions.append(attention)
            pasts += [inputs[name] for name in layer.convolutions]
            caches += tensors
            numbers += own
            indexed.append(tokens)
            scores.append(kernel)
        length, phase = len(cache), self._phase
        if phase.dtype not in (torch.float32, torch.float64) or phase.device.type != "cpu":
            return None
        angle = (self._rotation.frequency() * length).to(phase.dtype)
        out, following, served = _STEP(
            input_ids[:, 0], angle, self._weights, self._eps, self._bounds, pasts, caches, length,
            chunk, indexed, scores, numbers,
        )  # fmt: skip
        if not served:
            return None
        cache.put_behind(input_ids)
        told = iter(following.unbind(0))
        for layer, attention in zip(cache.layers, attentions, strict=True):
            attention.advance()
            for name in layer.convolutions:
                layer.inputs[name] = next(told)
        return out[:, None]


def step(model: Any, input_ids: Tensor, cache: ModelCache) -> Tensor | None:
    """`TokenStep` of a model, which stays in the cache, for tokens that go alone; else None."""
    if not goes_alone(model, input_ids, cache):
        return None
    if cache.step is None or cache.step.model is not model:
        cache.step = TokenStep(model)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return cache.step(input_ids, cache)
    return cache.step(input_ids, cache)


def _kinds(layer: EvolutionLayer) -> list[tuple[Any, type[nn.Module]]]:
    """The modules of a layer that the operator stands for, with the kinds that it knows."""
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
    return kinds


def _weights(layer: Any) -> list[Tensor | None]:
    """`TOKEN_WEIGHTS` of a layer."""
    attention, mlp = layer.attention, layer.mlp
    before = [layer.attention_norm, attention.conv, attention.inputs]
    behind = [attention.norm, attention.output]
    behind += [None] * 4 if mlp is None else [layer.mlp_norm, mlp.conv, mlp.input, mlp.output]
    return [*_parameters(before), attention.own_scale, *_parameters(behind)]


def _parameters(parts: list[Any]) -> list[Tensor | None]:
    return [getattr(part, name, None) for part in parts for name in ("weight", "bias")]


def _eps(layer: Any) -> list[float]:
    """`TOKEN_EPS` of a layer."""
    norms = layer.attention_norm, layer.attention.norm
    return [*(norm.eps for norm in norms), 0.0 if layer.mlp is None else layer.mlp_norm.eps]


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


# The overload itself, which a call finds faster.
_STEP: Any = None if LOAD_ERROR is not None else torch.ops.qflux_kernels.cache_token.default
