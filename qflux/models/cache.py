"""What a model keeps of the tokens so far, so that it can go on without reading them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qflux_kernels import EvolutionCache, InteractionCache
from qflux_kernels.cache import check_integers, checked_index, reorder_all
from qflux_kernels.checks import check_integer

from .collapsed import CollapsedHead

SMALLEST_CAPACITY = 64


@dataclass
class LayerCache:
    """The past of one layer.

    evolution, attention: of its states and of its keys and values, where it has them. inputs: by
    the name of each convolution, its last `width - 1` inputs `(B, width - 1, H)`. seen: sums over
    the states so far, and how many those are. present, positions: of the tokens that are read now,
    as in `ModelCache`. replaying: whether these tokens' keys are in the cache already.
    convolutions, sums: the names that inputs will have, and whether there will be such sums.
    """

    evolution: EvolutionCache | None = None
    attention: InteractionCache | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    seen: tuple[Tensor, int] | None = None
    present: Tensor | None = None
    positions: Tensor | None = None
    replaying: bool = False
    convolutions: tuple[str, ...] = ()
    sums: bool = False

    def interactions(self) -> list[InteractionCache]:
        """All caches of points."""
        own = [] if self.attention is None else [self.attention]
        return own + ([] if self.evolution is None else self.evolution.caches)

    def tensors(self) -> list[Tensor]:
        """All that it keeps of the tokens so far, which are at least one."""
        caches = self.interactions()
        points = [t for cache in caches for t in (cache.keys, cache.values) if t is not None]
        seen = [] if self.seen is None else [self.seen[0]]
        return [*points, *(self.inputs[name] for name in self.convolutions), *seen]

    def put(self, given: Iterator[Tensor]) -> int:
        """Take the next of these tensors, in the order of `tensors`; gives how many tokens."""
        for cache in self.interactions():
            keys = next(given)
            cache.append(keys, None if cache.values is None else next(given))
        self.inputs = {name: next(given) for name in self.convolutions}
        length = self.interactions()[0].keys.shape[-2]
        if self.sums:
            self.seen = (next(given), length)
        return length

    def convolve(self, convolution: Any, name: str, x: Tensor) -> Tensor:
        """A causal convolution over `(B, n, H)` behind its inputs so far."""
        width = getattr(convolution, "width", 1)
        if width == 1:
            return convolution(x)
        if self.present is not None:
            x = x.masked_fill(~self.present[..., None], 0.0)
        past = self.inputs.get(name)
        if past is None:
            past = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        whole = torch.cat((past, x), 1)
        self.inputs[name] = whole[:, whole.shape[1] - (width - 1) :]
        return convolution.behind(whole)

    def gather(self, queries: Tensor, keys: Tensor, values: Tensor) -> Any:
        """`interact` of new tokens with all tokens so far."""
        cache = self.attention
        assert cache is not None
        dtype = cache.dtype
        if queries.dtype != dtype:  # under autocast
            queries, keys, values = (part.to(dtype) for part in (queries, keys, values))
        if not self.replaying:
            cache.append(keys, values)
        return cache.attend(queries)

    def running_sums(
        self, states: Tensor, past: Tensor, features: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Sums `(B, C, n, F)` of a function of the states over the tokens up to each new one.

        Args:
            states: `(B, C, n, 2)` of the new tokens.
            past: `(B, C, S, 2)`, those of all tokens before, read only after an edit.
            features: of states `(..., 2)`, `(..., F)`.
        """
        new, start = features(states), past.shape[2]
        if self.present is not None:
            new = new.masked_fill(~self.present[:, None, :, None], 0.0)
        before, count = self.seen or (torch.zeros_like(new[:, :, 0]), 0)
        if count != start:
            old = features(past)
            if self.positions is not None and self.positions.dim() == 2:
                padding = start - self.positions[:, :1]  # (B, 1)
                own = torch.arange(start, device=old.device) >= padding
                old = old.masked_fill(~own[:, None, :, None], 0.0)
            before = old.sum(2)
        sums = new.cumsum(2) + before[:, :, None]
        self.seen = (sums[:, :, -1], start + new.shape[2])
        return sums


class ModelCache:
    """The past of a model: its layers' caches, and how many tokens they are of.

    `model.new_cache(batch)` makes one, and `model(input_ids, cache=cache)` reads further tokens
    and puts them behind those that are there. Whatever fails leaves it as it was.

    Args:
        layers: the layers' caches, empty.
        batch: sequences.
        padding: `(B,)` integers on the device, positions in front of each sequence that are
            padding; None for none.
        receptive: tokens before a position on which the inputs of its convolutions depend.
        device: of the model.
    """

    def __init__(
        self,
        layers: list[LayerCache],
        batch: int,
        padding: Tensor | None = None,
        receptive: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers, self.receptive = layers, receptive
        self.padding, self._length = padding, 0
        # Tokens are read again where their convolutions' inputs are gone.
        self._ids = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self._batch, self._stale = batch, False
        self.head: CollapsedHead | None = None
        # Whether the tokens that were read last stand behind others.
        self.goes_on = False
        # The model's `TokenStep`, once it was asked for.
        self.step: Any = None

    def __len__(self) -> int:
        """Tokens so far, padding included."""
        return self._length

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._batch

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, with the room that is still free."""
        inputs = [tensor for layer in self.layers for tensor in layer.inputs.values()]
        caches = [cache for layer in self.layers for cache in layer.interactions()]
        head = 0 if self.head is None else self.head.nbytes
        return self._ids.nbytes + head + sum(part.nbytes for part in (*inputs, *caches))

    def tensors(self) -> list[Tensor]:
        """All that its layers keep; tokens to read again after a truncation are not among it."""
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Become what the cache was that had these `tensors()`; it is empty now."""
        given = iter(tensors)
        for layer in self.layers:
            self._length = layer.put(given)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, which is at most `len(cache)`.

        Raises:
            TypeError, ValueError: another length.
        """
        check_integer("length", length, 0, self._length)
        if length == self._length:
            return
        self._cut(length)
        self._stale = self.receptive > 0
        for layer in self.layers:
            layer.inputs = {}

    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes what sequence `index[b]` was, as beam search wants it.

        Args:
            index: `(N,)` integers in [0, B); the cache has N sequences afterwards.

        Raises:
            TypeError, ValueError: another index.
        """
        index = checked_index(index, (self._batch,)).to(self._ids.device)
        ids = self._ids[index]
        inputs = [{n: kept[index] for n, kept in layer.inputs.items()} for layer in self.layers]
        seen = [layer.seen and (layer.seen[0][index], layer.seen[1]) for layer in self.layers]
        reorder_all([cache for layer in self.layers for cache in layer.interactions()], index)
        for layer, tails, sums in zip(self.layers, inputs, seen, strict=True):
            layer.inputs, layer.seen = tails, sums
        if self.padding is not None:
            self.padding = self.padding[index]
        self._ids, self._batch = ids, len(index)

    @contextmanager
    def reading(self, input_ids: Tensor) -> Iterator[Tensor]:
        """Meanwhile the layers' caches take these tokens `(B, n)`; gives their positions.

        Positions count from the first token of a sequence: `(n,)`, or `(B, n)` with padding, whose
        own are negative.
        """
        before = self._length
        self.goes_on = before > 0
        if input_ids.shape[0] != self._batch or input_ids.device != self._ids.device:
            raise ValueError(
                f"input_ids must be {self._batch} sequences on {self._ids.device} like the cache, "
                f"got shape {tuple(input_ids.shape)} on {input_ids.device}"
            )
        kept = [(dict(layer.inputs), layer.seen) for layer in self.layers]
        try:
            if self.receptive:
                self._remember(input_ids)
            yield self._place(before, input_ids.shape[1])
        except BaseException:
            self._cut(before)
            for layer, (inputs, seen) in zip(self.layers, kept, strict=True):
                layer.inputs, layer.seen = inputs, seen
            raise
        self._length = before + input_ids.shape[1]

    @contextmanager
    def replay(self) -> Iterator[tuple[Tensor, Tensor] | None]:
        """After an edit: meanwhile the layers take tokens for their convolutions only.

        Gives these tokens `(B, n)` and their positions; None where nothing is to be done.
        """
        count = min(self.receptive, self._length)
        if not self._stale or not count:
            self._stale = False
            yield None
            return
        start = self._length - count
        for layer in self.layers:
            layer.replaying = True
            if layer.evolution is not None:
                layer.evolution.truncate(start)
        try:
            yield self._ids[:, start : self._length], self._place(start, count)
            self._stale = False
        finally:
            for layer in self.layers:
                layer.replaying = False

    def put_behind(self, input_ids: Tensor) -> None:
        """Take tokens `(B, n)` whose keys, values and convolutions' inputs the layers have."""
        if self.receptive:
            self._remember(input_ids)
        self._length += input_ids.shape[1]

    def _place(self, start: int, count: int) -> Tensor:
        positions = torch.arange(start, start + count, device=self._ids.device)
        present = None
        if self.padding is not None:
            positions = positions - self.padding[:, None]
            present = positions >= 0
        for layer in self.layers:
            layer.present, layer.positions = present, positions
        return positions

    def _cut(self, length: int) -> None:
        self._length = length
        for layer in self.layers:
            for cache in layer.interactions():
                cache.truncate(min(length, len(cache)))

    def _remember(self, input_ids: Tensor) -> None:
        end = self._length + input_ids.shape[1]
        if end > self._ids.shape[1]:
            capacity = max(end, 2 * self._ids.shape[1], SMALLEST_CAPACITY)
            grown = self._ids.new_zeros(self._batch, capacity)
            grown[:, : self._length] = self._ids[:, : self._length]
            self._ids = grown
        self._ids[:, self._length : end] = input_ids


def checked_padding(padding: object, batch: int, device: torch.device) -> Tensor | None:
    """Padding `(B,)` on the device of the model, or None where there is none."""
    if padding is None:
        return None
    padding = check_integers("padding", padding)
    if padding.shape != (batch,) or (padding.numel() and int(padding.min()) < 0):
        raise ValueError(
            f"padding must be {batch} numbers >= 0, one for each sequence, got {padding.tolist()}"
        )
    return padding.to(device) if bool(padding.any()) else None
