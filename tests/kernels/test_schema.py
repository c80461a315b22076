"""The op table of Python against the ops themselves, and the fakes against what kernels return."""

import pytest
import torch

from qflux_kernels import backends, schema
from qflux_kernels.options import ALGORITHMS, Score

OPS = torch.ops.qflux_kernels
FAMILIES = [schema.COMPILED] + [schema.TRITON] * (backends.TRITON_ERROR is None)
TABLE = [
    *((schema.COMPILED, op) for op in schema.COMPILED_OPS),
    *((family, op) for family in FAMILIES[1:] for op in schema.FAMILY_OPS),
]


def type_of(value) -> str:
    """The type of an argument or a result, as the table writes it."""
    name = str(value.type)
    if name.startswith("Optional["):
        return f"{name.removeprefix('Optional[').removesuffix(']')}?"
    return name


@pytest.mark.parametrize("family, op", TABLE, ids=lambda part: getattr(part, "name", part))
def test_every_op_is_what_the_table_says(family, op):
    found = getattr(OPS, family + op.name).default._schema
    for fields, values in ((op.arguments, found.arguments), (op.results, found.returns)):
        assert [f.type for f in fields] == [type_of(v) for v in values]
    assert [f.name for f in op.arguments] == [v.name for v in found.arguments]
    if len(op.results) > 1:  # the one result of an op has no name in its schema
        assert [f.name for f in op.results] == [v.name for v in found.returns]
    assert not any(v.has_default_value() or v.kwarg_only for v in found.arguments)


def test_no_op_is_missing_from_the_table():
    named = {f"qflux_kernels::{family}{op.name}" for family, op in TABLE}
    there = torch._C._dispatch_get_all_op_names()
    assert {name for name in there if name.startswith("qflux_kernels::")} == named


def test_constants_are_those_of_the_kernels():
    text = backends._text("constants")
    assert dict(part.split("=") for part in text.split()) == {
        "scores": ",".join(schema.SCORES),
        "algorithms": ",".join(ALGORITHMS),
        "tape_planes": str(schema.TAPE_PLANES),
        "max_features": str(schema.MAX_FEATURES),
    }


def test_every_option_of_a_score_has_a_kernel():
    """The public scores name kernels, and each kernel has a score that names it."""
    from inputs import SCORES

    assert {score.kernel for score in SCORES} == set(schema.SCORES)
    assert {type(score) for score in SCORES} == set(Score.__subclasses__())
    assert all(score.kind.name == score.kernel for score in SCORES)


# Batch shapes, and how the batch dimensions of an input lie in memory.
BATCHES = [(), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)]
LAYOUTS = {
    "contiguous": lambda tensor, at: tensor,
    "spaced": lambda tensor, at: spaced(tensor),
    # Of (B, S, C, 2), as projections of a model are, say.
    "batch inside": lambda tensor, at: (
        tensor.movedim(-1, at).contiguous().movedim(at, -1) if tensor.dim() > at + 1 else tensor
    ),
    "expanded": lambda tensor, at: tensor[:, :1].expand_as(tensor) if tensor.dim() > 2 else tensor,
}


def spaced(tensor):
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1]) if tensor.dim() else tensor
    if tensor.dim():
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor


SIZES = {"rows": 5, "keys": 5, "steps": 2, "value_dim": 3}
TAILS = {
    "states": ("rows", 2),
    "keys": ("keys", 2),
    "values": ("keys", "value_dim"),
    "grad_context": ("rows", "value_dim"),
    "grad_states": ("rows", 2),
    "grad_strength": ("rows",),
    "grad_threshold": ("rows",),
    "threshold": ("rows",),
    "dt": ("rows",),
    "skip": ("rows",),
    "tape": ("rows",),
}
HEADS = {"dt": ("steps",), "skip": (1,), "tape": ("steps", schema.TAPE_PLANES)}
NUMBERS = {
    "coefficient_value": 0.5, "min_gate_value": 0.1, "score": 0, "eps": 1e-3,
    "whole_window": False, "causal": True, "mean": True, "algorithm": 0, "dt_value": 0.1,
    "skip_value": 0.2, "steps": SIZES["steps"], "has_radius": True, "radius_min": 0.1,
    "radius_max": 2.0, "radius_rate": 0.01, "radius_reversion": 0.1, "radius_target": 1.0,
    "save": True, "need_rows": True, "need_keys": True,
}  # fmt: skip


def arguments_of(op, batch, layout, device, given=True, **numbers):
    """One value for each argument of the op: optional tensors are there if `given`."""
    sizes = SIZES if given else SIZES | {"value_dim": 2}
    found = []
    for field in op.arguments:
        if not field.type.startswith("Tensor"):
            found.append((NUMBERS | numbers)[field.name])
            continue
        if field.type == "Tensor?" and not given:
            found.append(None)
            continue
        shape = tuple(
            sizes.get(size, size)
            for size in (*HEADS.get(field.name, ()), *batch, *TAILS.get(field.name, ()))
        )
        if field.name == "lengths":
            tensor = torch.randint(0, sizes["rows"] + 1, shape)
        else:
            tensor = torch.rand(shape) / 2
        if field.name != "tape":  # which is contiguous
            tensor = LAYOUTS[layout](tensor, field.batch)
        found.append(tensor.to(device))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("op", schema.FAMILY_OPS, ids=lambda op: op.name)
def test_fakes_are_like_the_kernels(device, op, batch, layout):
    """The shapes, strides and types that tracing sees are those of the results."""
    for family in families_on(device):
        for score, given in ((0, True), (1, True), (2, True), (2, False)):
            arguments = arguments_of(op, batch, layout, device, given, score=score)
            packet = getattr(OPS, family + op.name).default
            torch.library.opcheck(packet, tuple(arguments), test_utils=UTILS)
            compare_batches(packet, op, arguments, batch)


UTILS = ("test_schema", "test_faketensor")


def families_on(device):
    if device.type == "cuda" or backends.TRITON_INTERPRETED:
        return FAMILIES
    return FAMILIES[:1]


def compare_batches(packet, op, arguments, batch):
    """A sequence has the results it has in a batch of its own, whatever the batch shape."""
    if 0 in batch or len(batch) < 2:
        return

    def merged(tensor, at):
        if tensor is None or at is None:
            return tensor
        return tensor.reshape(*tensor.shape[:at], -1, *tensor.shape[at + len(batch) :])

    flat = [
        merged(value, field.batch) for field, value in zip(op.arguments, arguments, strict=True)
    ]
    for field, got, wanted in zip(op.results, packet(*arguments), packet(*flat), strict=True):
        if wanted.shape != (0,):
            got = merged(got, field.batch)
        assert torch.equal(got, wanted), field.name
