"""Decoding: the keys and values of a growing past, and what new tokens gather from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .arguments import (
    COMPUTE_DTYPES,
    canonical_score,
    check_reduction,
    per_step,
    values_are_known,
)
from .backends import LOAD_ERROR
from .checks import check_integer
from .functional import interact, is_served
from .options import Evolution, Interaction, Radius, Score, Threshold
from .past import Past, Prepared
from .step import RadiusRule, blend

SMALLEST_CAPACITY = 64
# Memory from which large pages are asked for: two of them.
LARGE_BYTES = 1 << 22


class InteractionCache:
    """The keys and values of the tokens so far, for decoding token by token.

    After `append(keys, values)`, `attend(states)` is what `interact` gives, with `causal=True` and
    all keys and values so far, for states that stand at the last positions: degrees exactly, sums
    up to rounding, however the tokens came. Buffers grow by doubling, so that appending a token
    costs the same at any length on average, and they are read where they lie. On a CPU, thresholds
    find what they keep in an index of the keys, which a token is built into O(log length) times;
    so a call with few states costs about the root of the length. No gradient is recorded: tensors
    that require one are taken as they are, and results have none.

    Args:
        score: `Threshold` (default; not with stats="row", where the future would move the past),
            `Sparsemax` or `InverseGate`, with tensors that broadcast to `batch_shape`.
        batch_shape: the leading dimensions, usually (batch, cylinders).
        value_dim: columns D of the values; None (default): the values are the keys.
        dtype: of keys, values, states and results: float32 (default), float64, or float16 or
            bfloat16, in which case it is how they are stored and float32 how they are computed.
        device: where the cache is. Default the CPU.
        capacity: tokens to make room for at once, >= 0; None (default): a few.
        reduction: as in `interact`.
        padding: integer tensor `(batch_shape[0],)`: so many positions in front of each sequence
            are padding. Nobody sees them and their rows are zero, as if the sequence began
            behind them. None (default): none.
        backend: as in `interact`.

    Raises:
        TypeError, ValueError: a bad argument here or of a method, named. The cache is then as it
            was before, also where memory ran out.
    """

    def __init__(
        self,
        *,
        score: Score = Threshold(),  # noqa: B008 (frozen)
        batch_shape: tuple[int, ...] = (),
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        reduction: str = "sum",
        padding: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
        batch = _checked_shape(batch_shape)
        if value_dim is not None:
            check_integer("value_dim", value_dim, 1)
        if capacity is not None:
            check_integer("capacity", capacity, 0)
        check_reduction(reduction, score)
        if isinstance(score, Score) and score.whole_window:
            raise ValueError(
                "score must not have stats='row' in a cache, whose later tokens would move the "
                "thresholds of earlier ones; stats='prefix' does not"
            )
        self._buffers = _empty_buffers(batch, 0, value_dim, dtype, device)
        self._score = canonical_score(score, self._buffers[0], self.batch_shape)
        self._padding = None if padding is None else _checked_padding(padding, batch)
        self._options: dict[str, Any] = {"reduction": reduction, "backend": backend}
        self._length = 0
        self._past: Past | None = None
        on_cpu = self._buffers[0].device.type == "cpu" and backend in ("auto", "cpu")
        if on_cpu and LOAD_ERROR is None and not torch.compiler.is_exporting():
            self._past = Past(
                self._score,
                reduction == "mean",
                _starts(self._padding, batch),
                self.batch_shape,
                value_dim or 2,
                dtype,
            )
        if capacity:
            self._grow(capacity)

    def __len__(self) -> int:
        """Tokens so far."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and of the index, with the room that is still free."""
        past = 0 if self._past is None else self._past.nbytes
        return sum(buffer.nbytes for buffer in self._buffers) + past

    @property
    def capacity(self) -> int:
        """Tokens that there is room for without growing."""
        return self._buffers[0].shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """That of keys, values, states and results."""
        return self._buffers[0].dtype

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions; `reorder` may change the first."""
        return self._buffers[0].shape[:-2]

    @property
    def keys(self) -> torch.Tensor:
        """The keys so far, `(*batch_shape, length, 2)`, a view."""
        return self._buffers[0].narrow(-2, 0, self._length)

    @property
    def values(self) -> torch.Tensor | None:
        """The values so far, `(*batch_shape, length, D)`, a view; None: they are the keys."""
        if len(self._buffers) == 1:
            return None
        return self._buffers[1].narrow(-2, 0, self._length)

    def append(self, keys: torch.Tensor, values: torch.Tensor | None = None) -> None:
        """Put n >= 0 tokens behind those that are there.

        Args:
            keys: `(*batch_shape, n, 2)`.
            values: `(*batch_shape, n, D)`; None for a cache without values.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._append(keys, values)
        return self._append(keys, values)

    def _append(self, keys: torch.Tensor, values: torch.Tensor | None) -> None:
        given: list[tuple[str, Any]] = [("keys", keys)]
        if len(self._buffers) == 2:
            given.append(("values", values))
        elif values is not None:
            raise ValueError("values must be None: in this cache the keys are the values")
        for (name, tensor), buffer in zip(given, self._buffers, strict=True):
            self._check(name, tensor, buffer.shape[-1])
        count = keys.shape[-2]
        if values is not None and values.shape[-2] != count:
            raise ValueError(
                f"values must have one row for each of the {count} keys, "
                f"got shape {tuple(values.shape)}"
            )
        if torch.compiler.is_exporting():
            # A program for any length takes tensors and gives longer ones, without room to grow.
            self._buffers = [
                torch.cat((buffer.narrow(-2, 0, self._length), tensor), -2)
                for (_, tensor), buffer in zip(given, self._buffers, strict=True)
            ]
            self._length = self._length + count
            return
        if not count:
            return
        end = self._length + count
        if end > self.capacity:
            self._grow(max(end, 2 * self.capacity, SMALLEST_CAPACITY))
        if self._past is not None:
            self._past.append(self._buffers, [tensor for _, tensor in given], self._length)
        else:
            for (_, tensor), buffer in zip(given, self._buffers, strict=True):
                buffer.narrow(-2, self._length, count).copy_(tensor)
        self._length = end

    def attend(self, states: torch.Tensor) -> Interaction:
        """What the states of the last n positions gather, each from the keys up to its own.

        Args:
            states: `(*batch_shape, n, 2)`, n <= `len(cache)`.

        Returns:
            Interaction(context `(*batch_shape, n, D)`, strength and degree `(*batch_shape, n)`).
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._gather(states)
        return self._gather(states)

    def _gather(self, states: torch.Tensor) -> Interaction:
        self._check("states", states, 2)
        rows = states.shape[-2]
        if rows > self._length:
            raise ValueError(
                f"states must be at most as many as the {self._length} tokens in the cache, "
                f"got {rows}"
            )
        if self._past is not None and not is_served():
            found = self._past.attend(states, self._buffers, self._length)
            if found is not None:
                return found
        keys, values = self.keys, self.values
        if self._padding is None:
            return self._attend(states, keys, values, self._score)
        width = keys.shape[-1] if values is None else values.shape[-1]
        context = states.new_zeros(*states.shape[:-1], width)
        strength = states.new_zeros(states.shape[:-1])
        degree = torch.zeros(states.shape[:-1], dtype=torch.int32, device=states.device)
        for part, start in _runs(self._padding):
            first = max(0, rows - (self._length - start))
            if first >= rows:
                continue
            own = self._attend(
                states[part, ..., first:, :],
                keys[part, ..., start:, :],
                None if values is None else values[part, ..., start:, :],
                _score_at(self._score, part),
            )
            context[part, ..., first:, :] = own.context
            strength[part, ..., first:] = own.strength
            degree[part, ..., first:] = own.degree
        return Interaction(context, strength, degree)

    def prepare(self) -> Prepared | None:
        """Make room for a token that the op `cache_token` will write, and say what that is given.

        None where that op is not for this cache. `advance` takes what it wrote.
        """
        if self._past is None or self._padding is not None or is_served():
            return None
        if self._length == self.capacity:
            self._grow(max(2 * self.capacity, SMALLEST_CAPACITY))
        return self._past.prepare(self._buffers, self._length)

    def advance(self) -> None:
        """Take the token that stands in the room which `prepare` made."""
        self._length += 1

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, which is at most `len(cache)`."""
        self._length = check_integer("length", length, 0, self._length)
        if self._past is not None:
            self._past.truncate(length)

    @torch.no_grad()
    def reorder(self, index: torch.Tensor) -> None:
        """Sequence b becomes what sequence `index[b]` was, as beam search wants it.

        Args:
            index: `(N,)` integers in [0, batch_shape[0]); the cache has N sequences afterwards.
        """
        batch = self.batch_shape
        index = checked_index(index, batch)
        capacity = self.capacity
        widths = [buffer.shape[-1] for buffer in self._buffers]
        old = self._buffers
        new = _allocate((len(index), *batch[1:]), capacity, widths, old[0].dtype, old[0].device)
        for to, buffer in zip(new, old, strict=True):
            used = buffer.narrow(-2, 0, self._length)
            to.narrow(-2, 0, self._length).copy_(used.index_select(0, index.to(used.device)))
        score = _score_at(self._score, index.to(old[0].device))
        padding = None if self._padding is None else self._padding[index.cpu()]
        past = None if self._past is None else self._past.reordered(index, score)
        self._buffers, self._score, self._padding, self._past = new, score, padding, past

    def _attend(
        self,
        states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        score: Score,
    ) -> Interaction:
        """What states gather from keys of sequences that all begin with the first key.

        Every row is met with every key, or with what the algorithms of `interact` leave of them.
        """
        return interact(states, keys, values, causal=True, score=score, **self._options)

    def _check(self, name: str, tensor: object, width: int) -> None:
        buffer = self._buffers[0]
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != buffer.dtype:
            raise TypeError(
                f"{name} must be {buffer.dtype} like the cache, got dtype {tensor.dtype}"
            )
        if tensor.device != buffer.device:
            raise ValueError(
                f"{name} must be on {buffer.device} like the cache, got {tensor.device}"
            )
        wanted = buffer.shape[:-2]
        if tensor.dim() != buffer.dim() or tensor.shape[:-2] != wanted or tensor.shape[-1] != width:
            shape = ", ".join(map(str, (*wanted, "n", width)))
            raise ValueError(f"{name} must have shape ({shape}), got {tuple(tensor.shape)}")

    def _grow(self, capacity: int) -> None:
        old = self._buffers
        widths = [buffer.shape[-1] for buffer in old]
        new = _allocate(self.batch_shape, capacity, widths, old[0].dtype, old[0].device)
        for to, buffer in zip(new, old, strict=True):
            to.narrow(-2, 0, self._length).copy_(buffer.narrow(-2, 0, self._length))
        if self._past is not None:
            self._past.grow(capacity, lambda shape, dtype: _memory(shape, dtype, capacity))
        self._buffers = new


class EvolutionCache:
    """The past states of evolving tokens, for evolving further ones without them.

    `advance(states, dt, skip)` is what `evolve` gives, with `causal=True` and all tokens so far,
    at the last positions. It keeps the states that each stage of each step starts from: 16 bytes a
    token, cylinder and step in float32. No gradient is recorded.

    Args:
        score, batch_shape, dtype, device, capacity, reduction, padding, backend: as in
            `InteractionCache`. Padding is returned as it came.
        radius, steps: as in `evolve`.

    Raises:
        TypeError, ValueError: as `InteractionCache`.
    """

    def __init__(
        self,
        *,
        radius: Radius | None = Radius(),  # noqa: B008 (frozen)
        steps: int = 1,
        **options: Any,
    ) -> None:
        if radius is not None and not isinstance(radius, Radius):
            raise TypeError(f"radius must be a Radius or None, got {type(radius).__name__}")
        check_integer("steps", steps, 1)
        if options.get("value_dim") is not None:
            raise ValueError("value_dim must be None: what evolves gathers states")
        rule = Radius() if radius is None else radius
        self._rule = RadiusRule(
            radius is not None, rule.min, rule.max, rule.rate, rule.reversion, rule.target
        )
        # The first and the second stage of each step.
        self._stages = [
            (InteractionCache(**options), InteractionCache(**options)) for _ in range(steps)
        ]

    @property
    def dtype(self) -> torch.dtype:
        """That of the states."""
        return self._stages[0][0].dtype

    @property
    def caches(self) -> list[InteractionCache]:
        """Those of the states, two a step."""
        return [cache for stages in self._stages for cache in stages]

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._stages[0][0])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, with the room that is still free."""
        return sum(cache.nbytes for cache in self.caches)

    @torch.no_grad()
    def advance(
        self,
        states: torch.Tensor,
        dt: float | torch.Tensor,
        skip: float | torch.Tensor | None = None,
    ) -> Evolution:
        """Evolve n >= 0 tokens behind those that are there.

        Args:
            states: `(*batch_shape, n, 2)`.
            dt, skip: as in `evolve`, for these tokens.

        Returns:
            Evolution(states `(*batch_shape, n, 2)`, strength and degree `(*batch_shape, n)`).
        """
        start = self._stages[0][0]
        before, steps = start._length, len(self._stages)
        start._check("states", states, 2)
        given = states
        dt = per_step("dt", dt, states, steps)
        skip = None if skip is None else per_step("skip", skip, states, steps)
        strength = degree = states
        try:
            for step, (first, second) in enumerate(self._stages):
                time = _of_step(dt, step)
                first.append(states)
                context, strength, degree = first.attend(states)
                k1 = time * context
                middle = (states + k1).to(states.dtype)
                second.append(middle)
                k2 = time * second.attend(middle).context
                moved = self._rule.move(states + (k1 + k2) / 2, strength)
                if skip is not None:
                    moved = blend(_of_step(skip, step), states, moved)
                states = moved.to(states.dtype)
        except BaseException:
            self._truncate(before)
            raise
        padding = start._padding
        if padding is not None:
            position = torch.arange(before, len(self), device=states.device)
            at = padding.to(states.device).view(-1, *[1] * (states.dim() - 2))
            states = torch.where((position < at)[..., None], given, states)
        return Evolution(states, strength, degree)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, which is at most `len(cache)`."""
        self._truncate(check_integer("length", length, 0, len(self)))

    def _truncate(self, length: int) -> None:
        for cache in self.caches:
            cache.truncate(min(length, len(cache)))

    def reorder(self, index: torch.Tensor) -> None:
        """Sequence b becomes what sequence `index[b]` was; as `InteractionCache.reorder`."""
        reorder_all(self.caches, index)


def reorder_all(caches: list[InteractionCache], index: torch.Tensor) -> None:
    """Reorder all caches, or none if one cannot be."""
    before = [(c._buffers, c._score, c._padding, c._past) for c in caches]
    try:
        for cache in caches:
            cache.reorder(index)
    except BaseException:
        for cache, state in zip(caches, before, strict=True):
            cache._buffers, cache._score, cache._padding, cache._past = state
        raise


def _of_step(value: float | torch.Tensor, step: int) -> float | torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value[min(step, len(value) - 1), ..., None]
    return value


def _checked_shape(batch_shape: object) -> tuple[int, ...]:
    if not isinstance(batch_shape, (tuple, list)):
        raise TypeError(f"batch_shape must be a tuple, got {type(batch_shape).__name__}")
    return tuple(check_integer("batch_shape", size, 0) for size in batch_shape)


def check_integers(name: str, tensor: object) -> torch.Tensor:
    """Return `tensor` if it is one of integers with one dimension, else raise."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got dtype {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(tensor.shape)}")
    return tensor.long()


def checked_index(index: object, batch: tuple[int, ...]) -> torch.Tensor:
    """Return `index` as int64 if it numbers sequences of a batch, else raise."""
    if not batch:
        raise ValueError("reorder needs a batch dimension, and batch_shape is ()")
    index = check_integers("index", index)
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= batch[0]):
        raise ValueError(
            f"index must lie in [0, {batch[0]}), got values in "
            f"[{int(index.min())}, {int(index.max())}]"
        )
    return index


def _checked_padding(padding: object, batch: tuple[int, ...]) -> torch.Tensor | None:
    """On the host, where it is read; None where there is no padding."""
    padding = check_integers("padding", padding).cpu()
    if padding.shape != batch[:1]:
        raise ValueError(
            f"padding must have shape {tuple(batch[:1])}, one number for each sequence, "
            f"got {tuple(padding.shape)}"
        )
    if padding.numel() and int(padding.min()) < 0:
        raise ValueError(f"padding must be >= 0, got {int(padding.min())}")
    return padding if bool(padding.any()) else None


def _starts(padding: torch.Tensor | None, batch: tuple[int, ...]) -> torch.Tensor | None:
    """The padding of every sequence of the batch."""
    if padding is None:
        return None
    return padding.view(-1, *[1] * (len(batch) - 1)).expand(batch).contiguous()


def _runs(padding: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """Neighbouring sequences that begin at the same position, and that position."""
    starts, counts = padding.unique_consecutive(return_counts=True)
    first = 0
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        yield slice(first, first + count), start
        first += count


def _score_at(score: Score, index: slice | torch.Tensor) -> Score:
    """The score of some sequences; its tensors have the batch shape."""
    changed = {
        name: value[index]
        for name in score.per_sequence
        if isinstance(value := getattr(score, name), torch.Tensor)
    }
    return replace(score, **changed) if changed else score


def _empty_buffers(
    batch: tuple[int, ...],
    capacity: int,
    value_dim: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[torch.Tensor]:
    widths = [2] if value_dim is None else [2, value_dim]
    return _allocate(batch, capacity, widths, dtype, device)


def _allocate(
    batch: tuple[int, ...],
    capacity: int,
    widths: list[int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[torch.Tensor]:
    """Buffers `(*batch, capacity, width)`, on a CPU with the tokens of a column side by side."""
    if torch.device(device).type == "cpu":
        return [_memory((*batch, w, capacity), dtype, capacity).mT for w in widths]
    return [_memory((*batch, capacity, w), dtype, capacity, device) for w in widths]


def _memory(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    capacity: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    try:
        memory = torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        raise ValueError(
            f"the cache cannot grow to {capacity} tokens, with memory of shape {shape}: {error}"
        ) from error
    if LOAD_ERROR is None and values_are_known(memory) and memory.nbytes >= LARGE_BYTES:
        torch.ops.qflux_kernels.cache_pages(memory)
    return memory
