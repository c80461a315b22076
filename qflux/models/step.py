"""Decoding with the past as tensors that go in and come out, as exported programs have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import CausalLM, check_ids


class DecodeStep(nn.Module):
    """What a model does with further tokens, as a function of tensors alone.

    A `ModelCache` is an object that is written to; `torch.export` and AOTInductor want functions.
    Here the past is a number of tensors, which come out longer than they went in::

        step = DecodeStep(model)
        logits, *past = step(prompt)
        logits, *past = step(token, *past)

    In an exported program every call copies the past, and every token meets all of it: no index
    stands beside it. It is the form for a program without Python, not the fast one.

    Args:
        model: a model that is `cacheable`, with at least one layer and no connection memory,
            whose size follows from what the tokens are.

    Raises:
        ValueError: another model.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        if not (model.cacheable and len(model.layers)):
            raise ValueError("model must have a cache and layers: there is no past to go on from")
        if getattr(model.config, "memory", False):
            raise ValueError("model must have no connection memory: its size is that of the pairs")
        self.model = model

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits `(B, n, V)` of tokens `(B, n)` behind those of the past, and the past with them.

        Args:
            input_ids: `(B, n)`, n >= 1.
            past: what the call before returned behind its logits; nothing before the first token.

        Raises:
            TypeError, ValueError: as `CausalLM.forward`.
        """
        check_ids("input_ids", input_ids, self.model.config.vocab_size)
        with torch.no_grad():
            cache = self.model.new_cache(input_ids.shape[0])
            cache.receptive = 0  # nothing will be truncated
            if past:
                cache.put(past)
            with cache.reading(input_ids) as position:
                outputs = self.model.read(input_ids, cache=cache, position=position).outputs
            # A compiled program takes the layout of its examples for that of all.
            past = tuple(tensor.contiguous() for tensor in cache.tensors())
            return (self.model.logits_of(outputs), *past)
