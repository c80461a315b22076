"""The op table of Python against the ops themselves, and the fakes against what kernels return."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qflux_kernels import backends, past, schema
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
    if name.startswith("List["):
        return f"{name.removeprefix('List[').removesuffix(']')}[]"
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
    found = dict(part.split("=") for part in text.split())
    assert float(found.pop("largest_tame")) == past.LARGEST_TAME
    assert found == {
        "scores": ",".join(schema.SCORES),
        "algorithms": ",".join(ALGORITHMS),
        "tape_planes": str(schema.TAPE_PLANES),
        "kept_moments": str(schema.KEPT_MOMENTS),
        "kept_sums": str(schema.KEPT_SUMS),
        "max_features": str(schema.MAX_FEATURES),
        "run_factor": str(past.RUN_FACTOR),
        "moments_tile": str(past.MOMENTS_TILE),
    }


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("algorithm", range(len(ALGORITHMS)), ids=ALGORITHMS)
@pytest.mark.parametrize("score", range(len(schema.SCORES)), ids=schema.SCORES)
def test_what_a_gpu_leaves_for_a_backward(score, algorithm, save):
    """By the fakes, which need none; test_batches compares them with the ops on one."""
    plain = schema.SCORES[score] == "hard_threshold" and ALGORITHMS[algorithm] != "sweep"
    pair = (None, 0.5, None, 0.0, None, score, 1e-6, False, True, False, algorithm)
    with FakeTensorMode():
        states = torch.empty(2, 9, 2, device="cuda")
        values = torch.empty(2, 9, 3, device="cuda")
        left = OPS.interact(states, None, None, *pair, save)[-1]
        beside = OPS.interact(states, None, values, *pair, save)[-1]
        step = (2, False, 0.1, 2.0, 0.0, 0.0, 1.0)
        tape = OPS.evolve(states, None, 0.1, None, 0.0, *pair, *step, save)[-1]
    sums = schema.KEPT_SUMS if plain and save else 0
    assert left.shape == ((2, 9, sums) if sums else (0,))
    assert beside.shape == ((2, 9, 3) if schema.SCORES[score] == "sparsemax" else (0,))
    assert tape.shape == (2 if save else 0, schema.TAPE_PLANES + 2 * sums, 2, 9)


def test_every_option_of_a_score_has_a_kernel():
    """The public scores name kernels, and each kernel has a score that names it."""
    from inputs import SCORES

    assert {score.kernel for score in SCORES} == set(schema.SCORES)
    assert {type(score) for score in SCORES} == set(Score.__subclasses__())
    assert all(score.kind.name == score.kernel for score in SCORES)


def spaced(tensor, _at):
    wide = tensor.repeat_interleave(2, -1) if tensor.dim() else tensor
    return wide[..., ::2] if tensor.dim() else tensor


def batch_inside(tensor, at):
    """The first batch dimension next to the last one in memory: of (B, S, C, 2), say."""
    if tensor.dim() < at + 2:
        return tensor
    return tensor.movedim(at, -2).contiguous().movedim(-2, at)


def expanded(tensor, at):
    if tensor.dim() < at + 2:
        return tensor
    return tensor.narrow(at, 0, min(1, tensor.shape[at])).expand_as(tensor)


LAYOUTS = {
    "contiguous": lambda tensor, at: tensor,
    "spaced": spaced,
    "batch inside": batch_inside,
    "expanded": expanded,
}
BATCHES = [(), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)]
if backends.TRITON_INTERPRETED:  # at the speed of Python; test_triton.py runs this file in it
    BATCHES = [(), (2, 3), (2, 0)]
    LAYOUTS = {name: LAYOUTS[name] for name in ("batch inside", "expanded")}
# What stands before and behind the batch dimensions of a tensor; rows are keys here.
ROWS, STEPS, VALUE_DIM = 5, 2, 3
HEADS = {"dt": (STEPS,), "skip": (1,), "tape": (STEPS, schema.TAPE_PLANES)}
TAILS = {
    "states": (ROWS, 2), "keys": (ROWS, 2), "values": (ROWS, VALUE_DIM),
    "grad_context": (ROWS, VALUE_DIM), "grad_states": (ROWS, 2), "grad_strength": (ROWS,),
    "grad_threshold": (ROWS,), "threshold": (ROWS,), "moments": (ROWS, schema.KEPT_MOMENTS),
    "dt": (ROWS,), "skip": (ROWS,), "tape": (ROWS,),
}  # fmt: skip
NUMBERS = {
    "coefficient_value": 0.5, "min_gate_value": 0.1, "eps": 1e-3, "whole_window": False,
    "causal": True, "mean": True, "algorithm": 0, "dt_value": 0.1, "skip_value": 0.2,
    "steps": STEPS, "has_radius": True, "radius_min": 0.1, "radius_max": 2.0, "radius_rate": 0.01,
    "radius_reversion": 0.1, "radius_target": 1.0, "save": True, "need_rows": True,
    "need_keys": True,
}  # fmt: skip


def arguments_of(op, batch, layout, device, score, given):
    """One value for each argument of the op; optional tensors are there if `given`."""
    for field in op.arguments:
        if field.type == "Tensor?" and not given:
            yield None
        elif field.type.startswith("Tensor"):
            shape = (*HEADS.get(field.name, ()), *batch, *TAILS.get(field.name, ()))
            if field.name == "grad_context" and not given:
                shape = (*shape[:-1], 2)
            integers = field.name == "lengths"
            tensor = torch.randint(ROWS + 1, shape) if integers else torch.rand(shape) / 2
            if field.name != "tape":  # which is contiguous
                tensor = LAYOUTS[layout](tensor, field.batch)
            yield tensor.to(device)
        else:
            yield score if field.name == "score" else NUMBERS[field.name]


def merged(tensor, at, batch):
    """The tensor with its batch dimensions, from `at` on, as one."""
    if tensor is None or at is None:
        return tensor
    return tensor.reshape(*tensor.shape[:at], -1, *tensor.shape[at + len(batch) :])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("op", schema.FAMILY_OPS, ids=lambda op: op.name)
def test_batches(device, op, batch, layout):
    """Fakes have the shapes, strides and types of results, and a batch is its sequences."""
    families = FAMILIES
    if device.type == "cpu":
        families = [schema.TRITON if backends.TRITON_INTERPRETED else schema.COMPILED]
    for family in families:
        function = getattr(OPS, family + op.name).default
        for score, given in ((0, True), (1, True), (2, True), (2, False)):
            arguments = list(arguments_of(op, batch, layout, device, score, given))
            torch.library.opcheck(
                function, tuple(arguments), test_utils=("test_schema", "test_faketensor")
            )
            if 0 in batch:
                continue
            flat = [
                merged(value, field.batch, batch)
                for field, value in zip(op.arguments, arguments, strict=True)
            ]
            found = zip(op.results, function(*arguments), function(*flat), strict=True)
            for field, got, wanted in found:
                if wanted.shape != (0,):
                    got = merged(got, field.batch, batch)
                assert torch.equal(got, wanted), field.name
