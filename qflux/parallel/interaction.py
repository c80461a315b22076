"""`interact` and `evolve` of sequences that are split over ranks.

Rows are local, keys and values are gathered. A chunk [a, b) of a causal sequence is rectangular:
its rows against the keys [0, b), whose ends `interact` aligns, so that windows of statistics and
counts of visible keys are right by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from qflux_kernels import Evolution, Interaction
from qflux_kernels.arguments import (
    EvolveArguments,
    InteractArguments,
    evolve_arguments,
    interact_arguments,
)
from qflux_kernels.functional import interact_checked
from qflux_kernels.options import Score
from qflux_kernels.reference import evolve_checked

from .layout import Layout
from .split import SequenceSplit

# Cylinders are gathered in so many groups: one travels while the pairs of another are computed.
GROUPS = 4
# A group is not made for less than this.
GROUP_BYTES = 2**20


class SplitOperators:
    """Serves `interact` and `evolve` for the ranks that share sequences."""

    def __init__(self, split: SequenceSplit) -> None:
        self.split = split

    def interact(
        self,
        states: Any,
        keys: Any,
        values: Any,
        *,
        lengths: Any,
        algorithm: str,
        backend: str,
        **options: Any,
    ) -> Interaction:
        """`qflux_kernels.interact` of this rank's part, with the lengths of whole sequences."""
        args = interact_arguments(states, keys, values, **options)
        tokens = args.states.shape[-2]
        if args.keys is not None and args.keys.shape[-2] != tokens:
            raise ValueError(
                f"sequences that are split need as many keys as states ({tokens}), "
                f"got {args.keys.shape[-2]}"
            )
        layout = self.split.layout(tokens)
        args = replace(args, lengths=whole_lengths(lengths, args, layout))
        return self._interact(args, layout, algorithm, backend)

    def evolve(
        self, states: Any, dt: Any, *, lengths: Any, algorithm: str, backend: str, **options: Any
    ) -> Evolution:
        """`qflux_kernels.evolve` of this rank's part, with the lengths of whole sequences."""
        args = evolve_arguments(states, dt, **options)
        layout = self.split.layout(args.states.shape[-2])
        args = replace(args, lengths=whole_lengths(lengths, args, layout))

        def interaction(stage: InteractArguments) -> Interaction:
            return self._interact(stage, layout, algorithm, backend)

        positions = layout.positions(self.split.rank, args.states.device)
        return evolve_checked(args, interaction, positions)

    def _interact(
        self, args: InteractArguments, layout: Layout, algorithm: str, backend: str
    ) -> Interaction:
        present = None
        if args.lengths is not None:
            place = layout.positions(self.split.rank, args.states.device)
            present = place < args.lengths[..., None]
            args = without_padding(args, present)
        groups = list(cylinder_groups(args, layout))
        parts = []
        ahead = _Keys(groups[0], self.split, layout)
        for at, group in enumerate(groups):
            keys = ahead
            if at + 1 < len(groups):
                ahead = _Keys(groups[at + 1], self.split, layout)
            rows = _Rows(group, self.split.rank, layout, algorithm, backend)
            parts.append(self._of_group(rows, keys))
        context, strength, degree = parts[0] if len(parts) == 1 else joined(parts, -3, -2)
        if present is not None:
            # Whatever padding computed is nobody's.
            context = torch.where(present[..., None], context, 0)
            strength, degree = torch.where(present, strength, 0), torch.where(present, degree, 0)
        return Interaction(context, strength, degree)

    @staticmethod
    def _of_group(rows: _Rows, keys: _Keys) -> Interaction:
        """The results of a group of cylinders, once its keys are there."""
        found, states = _InBackward.apply(keys.forget, False, keys.arrived(), rows.args.states)
        rows = replace(rows, args=replace(rows.args, states=states))
        with saved_tensors_hooks(keys.pack, keys.unpack):
            context, strength, degree = rows.meet(found)
        # What was gathered comes along, for a rank whose rows do not lead back to it.
        context, strength, _ = _InBackward.apply(keys.fetch, True, context, strength, found)
        return Interaction(context, strength, degree)


def whole_lengths(
    lengths: Any, args: InteractArguments | EvolveArguments, layout: Layout
) -> Tensor | None:
    """The lengths of whole sequences, checked, in the batch shape of the states."""
    if lengths is None:
        return None
    # They are checked against sequences that are as long as the whole.
    whole = args.states.new_empty(1, 1).expand(*args.states.shape[:-2], layout.length, 2)
    return interact_arguments(whole, lengths=lengths).lengths


def without_padding(args: InteractArguments, present: Tensor) -> InteractArguments:
    """The same with zeros in padding, which then cannot spoil a sum, nor its gradient."""

    def cleared(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.where(present[..., None], tensor, 0)

    states = torch.where(present[..., None], args.states, 0)
    return replace(args, states=states, keys=cleared(args.keys), values=cleared(args.values))


def cylinder_groups(args: InteractArguments, layout: Layout) -> Iterator[InteractArguments]:
    """The call in parts by its last batch dimension, the cylinders."""
    cylinders = args.states.shape[-3] if args.states.dim() > 2 else 1
    width = 2 if args.values is None else 2 + args.values.shape[-1]
    size = math.prod(args.states.shape[:-2]) * width * layout.length
    groups = min(GROUPS, cylinders, size * args.states.element_size() // GROUP_BYTES)
    if groups < 2:
        yield args
        return
    for group in range(groups):
        start, stop = (at * cylinders // groups for at in (group, group + 1))

        def part(tensor: Any, at: int, start: int = start, stop: int = stop) -> Any:
            return tensor.narrow(at, start, stop - start) if isinstance(tensor, Tensor) else tensor

        names = args.score.per_sequence
        yield replace(
            args,
            states=part(args.states, -3),
            keys=part(args.keys, -3),
            values=part(args.values, -3),
            lengths=part(args.lengths, -1),
            score=replace(args.score, **{n: part(getattr(args.score, n), -1) for n in names}),
        )


class _Keys:
    """Keys and values of a group from all ranks; the backward gathers them anew.

    The hooks for saved tensors keep a note in the place of what was gathered. That is fetched again
    and forgotten by nodes of the graph, not by the first saved tensor that is wanted: every rank
    has these nodes, also one whose rows see nothing.
    """

    def __init__(self, args: InteractArguments, split: SequenceSplit, layout: Layout) -> None:
        self.split, self.layout = split, layout
        self.keys = args.states if args.keys is None else args.keys
        self.values = args.values
        self._versions = self._version()
        self._started = split.start(self._packed(), layout)
        self._storage = 0
        self._found: Tensor | None = None

    def _packed(self) -> Tensor:
        return self.keys if self.values is None else torch.cat((self.keys, self.values), -1)

    def _version(self) -> list[int]:
        return [t._version for t in (self.keys, self.values) if t is not None]

    def arrived(self) -> Tensor:
        """Keys and values of the whole sequences side by side, `(..., length, 2 + D)`."""
        found = self.split.whole(self._started, self.layout)
        del self._started
        self._storage = found.untyped_storage().data_ptr()
        # Only the backward needs them from here on, without their graph.
        self.keys = self.keys.detach()
        self.values = None if self.values is None else self.values.detach()
        return found

    def fetch(self) -> None:
        """Gather them again, for the backward."""
        if self._version() != self._versions:
            raise RuntimeError("keys or values were changed in place before the backward")
        started = self.split.start(self._packed(), self.layout)
        self._found = self.split.whole(started, self.layout).detach()

    def forget(self) -> None:
        """The backward has done with them."""
        self._found = None

    def pack(self, tensor: Tensor) -> Any:
        """What the graph keeps in the place of a tensor that it saves."""
        if not tensor.numel() or tensor.untyped_storage().data_ptr() != self._storage:
            return tensor
        return _Note(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Any) -> Tensor:
        """The tensor itself, when the backward wants it."""
        if not isinstance(kept, _Note):
            return kept
        assert self._found is not None, "the backward fetches keys first"
        return self._found.as_strided(*kept)


class _InBackward(torch.autograd.Function):
    """The tensors as they are; their backward does something first.

    With `together` all of them need a gradient if one does, else each for itself.
    """

    @staticmethod
    def forward(ctx, action, together, *tensors):
        ctx.action = action
        ctx.set_materialize_grads(False)
        results = tuple(tensor.view_as(tensor) for tensor in tensors)
        needs = ctx.needs_input_grad[2:]
        if not together:
            ctx.mark_non_differentiable(
                *(result for result, needed in zip(results, needs, strict=True) if not needed)
            )
        return results

    @staticmethod
    def backward(ctx, *grads):
        ctx.action()
        return None, None, *grads


class _Note(NamedTuple):
    """Where a tensor lies in what was gathered."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Rows:
    """The rows of a rank, which meet the keys of whole sequences."""

    args: InteractArguments
    rank: int
    layout: Layout
    algorithm: str
    backend: str

    def meet(self, found: Tensor) -> Interaction:
        """Their interaction with keys and values `(..., length, 2 + D)`."""
        args, layout = self.args, self.layout
        # Causal rows see no padding. Other rows would, and so would statistics of the whole row.
        if args.lengths is not None and (args.score.whole_window or not args.causal):
            return self._by_length(found)
        places = layout.positions(self.rank, found.device)
        if args.score.whole_window or not args.causal:
            return self._in_places(args.states, places, found)
        rows = args.states.split(layout.sizes(self.rank), -2)
        ends = [stop for _, stop in layout.chunks(self.rank)]
        parts = zip(rows, ends, strict=True)
        return joined([self._call(part, found[..., :end, :]) for part, end in parts], -2, -1)

    def _call(self, rows: Tensor, found: Tensor, score: Score | None = None) -> Interaction:
        """Rows and keys whose ends are aligned."""
        args = self.args
        keys, values = found[..., :2], None if args.values is None else found[..., 2:]
        score = args.score if score is None else score
        args = replace(args, states=rows, keys=keys, values=values, score=score, lengths=None)
        return interact_checked(args, self.algorithm, self.backend)

    def _in_places(
        self, rows: Tensor, places: Tensor, found: Tensor, score: Score | None = None
    ) -> Interaction:
        """Rows that meet every key, or whose statistics do.

        The keys that a causal row sees are told by how far from the end it stands. So that its
        window is whole all the same, all places from the first row on are rows; those that are not
        this rank's hold zeros, and cost as much.
        """
        if not self.args.causal:
            return self._call(rows, found, score)
        length = found.shape[-2]
        start = int(places[0]) if len(places) else length
        at = places - start
        spread = rows.new_zeros(*rows.shape[:-2], length - start, 2).index_copy(-2, at, rows)
        context, strength, degree = self._call(spread, found, score)
        return Interaction(
            context.index_select(-2, at),
            strength.index_select(-1, at),
            degree.index_select(-1, at),
        )

    def _by_length(self, found: Tensor) -> Interaction:
        """The sequences of one length after another, without their padding."""
        args = self.args
        assert args.lengths is not None
        batch = args.states.shape[:-2]
        rows, found = (
            tensor.reshape(math.prod(batch), *tensor.shape[-2:]) for tensor in (args.states, found)
        )
        lengths = args.lengths.flatten()
        places = self.layout.positions(self.rank, found.device)
        context = found.new_zeros(
            *rows.shape[:-1], 2 if args.values is None else found.shape[-1] - 2
        )
        strength = found.new_zeros(rows.shape[:-1])
        degree = torch.zeros(rows.shape[:-1], dtype=torch.int32, device=rows.device)
        for length in lengths.unique().tolist():
            chosen = (lengths == length).nonzero().flatten()
            count = int((places < length).sum())
            if not count:
                continue
            tensors = {
                name: value.flatten()[chosen]
                for name in args.score.per_sequence
                if isinstance(value := getattr(args.score, name), Tensor)
            }
            part = self._in_places(
                rows[chosen, :count],
                places[:count],
                found[chosen, :length],
                replace(args.score, **tensors),
            )
            padding = len(places) - count
            context = context.index_copy(0, chosen, F.pad(part.context, (0, 0, 0, padding)))
            strength = strength.index_copy(0, chosen, F.pad(part.strength, (0, padding)))
            degree = degree.index_copy(0, chosen, F.pad(part.degree, (0, padding)))
        return Interaction(
            *(tensor.reshape(batch + tensor.shape[1:]) for tensor in (context, strength, degree))
        )


def joined(parts: list[Interaction], points: int, numbers: int) -> Interaction:
    """Results side by side: contexts along one dimension, the others along another."""
    context, strength, degree = zip(*parts, strict=True)
    return Interaction(
        torch.cat(context, points), torch.cat(strength, numbers), torch.cat(degree, numbers)
    )
