"""The dispatcher ops `qflux_kernels::*`: each argument and result with its name, type and batch.

Everything that Python says of an op comes from this table: the schemas of the Triton family, the
records in which arguments and results are named, the rules of vmap, and the constants that Python
and C++ share. `csrc/library.cpp` and `csrc/ops` state the same schemas for the compiled family;
`tests/kernels/test_schema.py` compares them with the table.

States are `(*batch, S, 2)`, keys `(*batch, K, 2)` and values `(*batch, K, D)`, with any number of
batch dimensions and any strides, float32 or float64. A number that may differ between sequences or
tokens is a pair: a tensor, or where there is none the float beside it.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class ScoreKind(NamedTuple):
    """A score as the kernels know it, with the traits of `csrc/math/score.h`."""

    name: str
    thresholded: bool  # its limit is tau, the row's adaptive threshold
    mass: bool  # of which the weights of a row sum to one
    limit_vjp: bool  # the limit has a gradient, which goes to the statistics of the row
    # Over keys as values, sums over the keys that a row keeps spare a backward its pairs.
    kept_sums: bool
    swept_on: tuple[str, ...]  # devices with a method below O(S^2), which needs an affine weight


# In the order of `ScoreKind` in csrc/math/score.h.
SCORE_KINDS = (
    ScoreKind(
        "hard_threshold", thresholded=True, mass=False, limit_vjp=False, kept_sums=True,
        swept_on=("cpu", "cuda"),
    ),
    ScoreKind(
        "inverse_gate", thresholded=False, mass=False, limit_vjp=False, kept_sums=False,
        swept_on=(),
    ),
    ScoreKind(
        "soft_threshold", thresholded=True, mass=False, limit_vjp=True, kept_sums=False,
        swept_on=("cpu",),
    ),
    ScoreKind(
        "sparsemax", thresholded=True, mass=True, limit_vjp=False, kept_sums=False,
        swept_on=("cpu",),
    ),
)  # fmt: skip
SCORES = tuple(kind.name for kind in SCORE_KINDS)
# What a token leaves on the tape at each step of `evolve`: planes of numbers, points have two.
TAPE = {
    "states": 2,
    "middle": 2,  # x + k1
    "context": 2,
    "middle_context": 2,
    "strength": 1,
    "threshold": 1,
    "middle_threshold": 1,
}
TAPE_PLANES = sum(TAPE.values())
# Numbers of `moments`: with a mass; of a score with kept_sums, of which both stages of a step are
# on the tape, behind the others.
KEPT_MOMENTS = 3
KEPT_SUMS = 5
# The most features that the kernels of `project_norm` take.
MAX_FEATURES = 8


class Field(NamedTuple):
    """An argument or a result of an op."""

    name: str
    type: str  # as in a schema: "Tensor", "Tensor?", "float", "int" or "bool", or a list of one
    batch: int | None = None  # the first batch dimension; None: it has none


@dataclass(frozen=True)
class Op:
    """An op, its fields in schema order."""

    name: str
    arguments: tuple[Field, ...]
    results: tuple[Field, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Those of the arguments."""
        return tuple(field.name for field in self.arguments)

    @cached_property
    def Arguments(self) -> type:
        """The arguments by name: a named tuple."""
        return record(f"{self.name}_arguments", self.arguments)

    @cached_property
    def Results(self) -> type:
        """The results by name: a named tuple."""
        return record(f"{self.name}_results", self.results)

    @cached_property
    def schema(self) -> str:
        """Arguments and results as `torch.library.define` reads them."""
        arguments = ", ".join(f"{field.type} {field.name}" for field in self.arguments)
        if len(self.results) == 1:
            return f"({arguments}) -> {self.results[0].type}"
        return f"({arguments}) -> ({', '.join(f'{f.type} {f.name}' for f in self.results)})"


def record(name: str, fields: tuple[Field, ...]) -> type:
    """A named tuple of the fields."""
    return namedtuple(name, [field.name for field in fields])


def numbers(fields: tuple[Field, ...]) -> tuple[Field, ...]:
    """The fields that are no tensors."""
    return tuple(field for field in fields if not field.type.startswith("Tensor"))


POINTS = (
    Field("states", "Tensor", 0),
    Field("keys", "Tensor?", 0),  # None: the states
    Field("values", "Tensor?", 0),  # None: the keys
)
PAIR = (
    Field("coefficient", "Tensor?", 0),  # sigma, alpha or scale
    Field("coefficient_value", "float"),
    Field("min_gate", "Tensor?", 0),
    Field("min_gate_value", "float"),
    Field("lengths", "Tensor?", 0),  # int64; None: full sequences
    Field("score", "int"),  # an index into SCORES
    Field("eps", "float"),
    Field("whole_window", "bool"),  # statistics over the whole sequence, or what the row sees
    Field("causal", "bool"),
    Field("mean", "bool"),  # the reduction
    Field("algorithm", "int"),  # an index into options.ALGORITHMS
)
TOKENS = (
    Field("dt", "Tensor?", 1),  # (steps or 1, *batch, S)
    Field("dt_value", "float"),
    Field("skip", "Tensor?", 1),
    Field("skip_value", "float"),
)
STEP = (
    Field("steps", "int"),
    Field("has_radius", "bool"),
    Field("radius_min", "float"),
    Field("radius_max", "float"),
    Field("radius_rate", "float"),
    Field("radius_reversion", "float"),
    Field("radius_target", "float"),
)

INTERACT = Op(
    "interact",
    # save: whether a backward will want the gradient of the states
    (*POINTS, *PAIR, Field("save", "bool")),
    (
        Field("context", "Tensor", 0),
        Field("strength", "Tensor", 0),
        Field("degree", "Tensor", 0),
        Field("threshold", "Tensor", 0),  # tau, for the backward; zero without an adaptive one
        # What the compiled kernels of a GPU leave of the keys that a row keeps, for a backward to
        # start from: (*batch, S, 3), number and sum, where weights have a mass and values are
        # given; (*batch, S, 5), the sums of x, y, xx, xy and yy, of a score with kept_sums where
        # values are the keys, no sweep is asked for and `save` is set; else (0,)
        Field("moments", "Tensor", 0),
    ),
)
# The gradient of an argument that is None, and a gradient that nobody needs, is empty: (0,).
INTERACT_BACKWARD = Op(
    "interact_backward",
    (
        Field("grad_context", "Tensor", 0),
        Field("grad_strength", "Tensor", 0),
        Field("threshold", "Tensor", 0),
        Field("moments", "Tensor?", 0),
        *POINTS,
        *PAIR,
        Field("need_rows", "bool"),
        Field("need_keys", "bool"),
    ),
    (
        Field("grad_states", "Tensor", 0),
        Field("grad_keys", "Tensor", 0),
        Field("grad_values", "Tensor", 0),
        Field("grad_coefficient", "Tensor", 0),
        Field("grad_threshold", "Tensor", 0),  # of scores with limit_vjp
    ),
)
# What reaches states, keys and sigma through the threshold.
THRESHOLD_BACKWARD = Op(
    "threshold_backward",
    (
        Field("grad_threshold", "Tensor", 0),
        Field("states", "Tensor", 0),
        Field("keys", "Tensor?", 0),
        Field("coefficient", "Tensor?", 0),
        Field("coefficient_value", "float"),
        Field("lengths", "Tensor?", 0),
        Field("eps", "float"),
        Field("whole_window", "bool"),
        Field("causal", "bool"),
    ),
    (
        Field("grad_states", "Tensor", 0),
        Field("grad_keys", "Tensor", 0),
        Field("grad_coefficient", "Tensor", 0),
    ),
)
EVOLVE = Op(
    "evolve",
    (Field("states", "Tensor", 0), *TOKENS, *PAIR, *STEP, Field("save", "bool")),
    (
        Field("result", "Tensor", 0),
        Field("strength", "Tensor", 0),
        Field("degree", "Tensor", 0),
        Field("tape", "Tensor", 2),  # (steps, or 0 if not saved, planes, *batch, S)
    ),
)
EVOLVE_BACKWARD = Op(
    "evolve_backward",
    (
        Field("grad_states", "Tensor", 0),
        Field("grad_strength", "Tensor", 0),
        Field("tape", "Tensor", 2),
        *TOKENS,
        *PAIR,
        *STEP,
    ),
    (
        Field("grad_input", "Tensor", 0),
        Field("grad_dt", "Tensor", 1),
        Field("grad_skip", "Tensor", 1),
        Field("grad_coefficient", "Tensor", 0),
    ),
)
_LINEAR = (
    Field("features", "Tensor"),  # (tokens, F)
    Field("weight", "Tensor"),
    Field("bias", "Tensor?"),
    Field("norm_weight", "Tensor?"),
)
PROJECT_NORM = Op(
    "project_norm",
    (*_LINEAR, Field("norm_bias", "Tensor?"), Field("eps", "float")),
    (Field("out", "Tensor"),),
)
PROJECT_NORM_BACKWARD = Op(
    "project_norm_backward",
    (
        Field("grad", "Tensor"),
        *_LINEAR,
        Field("eps", "float"),
        Field("need_features", "bool"),
        Field("need_parameters", "bool"),
    ),
    (
        Field("grad_features", "Tensor"),
        Field("grad_weight", "Tensor"),
        Field("grad_bias", "Tensor"),
        Field("grad_norm_weight", "Tensor"),
        Field("grad_norm_bias", "Tensor"),
    ),
)
# What the attention of a layer of the language model does between its linear maps
# (csrc/attention.h), with the weights of a sparsemax. CPU only.
_ATTENTION = (
    Field("projected", "Tensor"),  # (B, S, 4 C + 2 C D, or 3 C D with own values of their own)
    Field("own", "Tensor?"),  # (B, S, C D), own values apart
    Field("turns", "Tensor"),  # (C, S, 2), cosine and sine of each angle
    Field("scale", "Tensor"),  # (C,)
    Field("norm_weight", "Tensor?"),  # (C D,)
    Field("norm_bias", "Tensor?"),
    Field("norm_eps", "float"),
    Field("value_dim", "int"),
    Field("algorithm", "int"),  # an index into options.ALGORITHMS
)
_ATTENTION_LEFT = (
    Field("points", "Tensor"),  # (2, B, C, S, 2), queries and keys, turned
    Field("threshold", "Tensor"),  # (B, C, S)
    Field("gathered", "Tensor"),  # (B, S, C D), what LayerNorm is given
    Field("moments", "Tensor"),  # (B, S, 2), its mean and inverse deviation
)
ATTENTION = Op("attention", _ATTENTION, (Field("out", "Tensor"), *_ATTENTION_LEFT))
ATTENTION_BACKWARD = Op(
    "attention_backward",
    (Field("grad", "Tensor"), *_ATTENTION, *_ATTENTION_LEFT),
    (
        Field("grad_projected", "Tensor"),
        Field("grad_own", "Tensor"),
        Field("grad_angle", "Tensor"),
        Field("grad_scale", "Tensor"),
        Field("grad_norm_weight", "Tensor"),
        Field("grad_norm_bias", "Tensor"),
    ),
)
# How many pairs a sweep meets one by one: [densely, in bands]. CPU only.
SWEEP_WORK = Op(
    "sweep_work",
    (
        Field("states", "Tensor", 0),
        Field("keys", "Tensor?", 0),
        Field("sigma", "float"),
        Field("eps", "float"),
        Field("whole_window", "bool"),
        Field("causal", "bool"),
    ),
    (Field("work", "Tensor"),),
)
# What a cache does on a CPU; keys and values are planes, of the tokens from `base` on. Buffers,
# moments and index are written in place.
_NOT_CACHED = ("lengths", "whole_window", "causal", "algorithm")
_CACHED = (Field("keys", "Tensor", 0), Field("values", "Tensor?", 0))
_STARTS = Field("starts", "Tensor?", 0)  # int64: padding in front of each sequence
CACHE_APPEND = Op(
    "cache_append",
    (
        Field("key_buffer", "Tensor", 0),
        Field("value_buffer", "Tensor?", 0),
        *_CACHED,
        Field("at", "int"),
    ),
    (Field("tame", "bool"),),  # whether all numbers are such as an index may have
)
CACHE_MOMENTS = Op(
    "cache_moments",
    (
        Field("moments", "Tensor", 0),  # (*batch, records, 6)
        Field("keys", "Tensor", 0),
        _STARTS,
        Field("base", "int"),
        Field("first", "int"),  # tokens in the moments so far
    ),
    (),
)
CACHE_INDEX_UNIT = Op(
    "cache_index_unit",
    (Field("wide", "bool"), Field("value_dim", "int"), Field("chunk", "int")),
    (Field("bytes", "int"),),
)
# Advice to the system: memory that is met here and there.
CACHE_PAGES = Op("cache_pages", (Field("memory", "Tensor"),), ())
CACHE_INDEX = Op(
    "cache_index",
    (
        Field("index", "Tensor", 0),  # (*batch, bytes)
        *_CACHED,
        _STARTS,
        Field("base", "int"),
        Field("score", "int"),
        Field("chunk", "int"),
        Field("tokens", "int"),  # in the index so far
    ),
    (),
)
CACHE_ATTEND = Op(
    "cache_attend",
    (
        Field("states", "Tensor", 0),
        *_CACHED,
        Field("index", "Tensor?", 0),
        Field("moments", "Tensor?", 0),
        Field("tangents", "Tensor?", 0),  # (*batch, 208), written in place
        _STARTS,
        Field("base", "int"),
        Field("chunk", "int"),
        Field("indexed", "int"),
        *(field for field in PAIR if field.name not in _NOT_CACHED),
    ),
    (*INTERACT.results[:3], Field("served", "bool")),
)


# A further token through the language model (csrc/cpu/decode/token.h), written behind `at` others
# in the buffers of its layers' caches. Lists have these of each layer, in the order of
# csrc/ops/token.cpp; a tensor that is not there is empty.
TOKEN_WEIGHTS = (
    *("norm", "norm_bias", "taps", "taps_bias", "inputs", "inputs_bias", "own_scale", "gathered"),
    *("gathered_bias", "output", "output_bias", "mlp_norm", "mlp_norm_bias", "mlp_taps"),
    *("mlp_taps_bias", "mlp_inputs", "mlp_inputs_bias", "mlp_output", "mlp_output_bias"),
)
# Around the layers, behind them in the list.
TOKEN_ENDS = "radius_logit", "phase", "projection", "projection_bias", "norm", "norm_bias"
TOKEN_EPS = "norm", "gathered", "mlp_norm"
TOKEN_CACHES = "keys", "values", "index", "moments", "tangents", "coefficient", "min_gate"
TOKEN_NUMBERS = "coefficient_value", "min_gate_value", "eps"
CACHE_TOKEN = Op(
    "cache_token",
    (
        Field("ids", "Tensor"),  # (B,)
        Field("angle", "Tensor"),  # (C,)
        Field("weights", "Tensor[]"),  # TOKEN_WEIGHTS of each layer, and TOKEN_ENDS
        Field("norm_eps", "float[]"),  # TOKEN_EPS of each layer, and that of the last LayerNorm
        Field("bounds", "float[]"),  # of the radius, two
        Field("pasts", "Tensor[]"),  # (B, width - 1, H) of each convolution, its inputs so far
        Field("caches", "Tensor[]"),  # TOKEN_CACHES of each layer, buffers (B, C, room, 2 or D)
        Field("at", "int"),
        Field("chunk", "int"),
        Field("indexed", "int[]"),
        Field("scores", "int[]"),
        Field("numbers", "float[]"),  # TOKEN_NUMBERS of each layer
    ),
    (
        Field("hidden", "Tensor"),
        Field("pasts", "Tensor"),  # (convolutions, B, width - 1, H)
        Field("served", "bool"),
    ),
)


def _text(name: str) -> Op:
    """A text as uint8: a str in a schema leaks in the stable ABI before torch 2.14."""
    return Op(name, (), (Field("text", "Tensor"),))


# The ops of every family, and all that the compiled object has.
FAMILY_OPS = (INTERACT, INTERACT_BACKWARD, THRESHOLD_BACKWARD, EVOLVE, EVOLVE_BACKWARD)
COMPILED_OPS = (
    *FAMILY_OPS,
    PROJECT_NORM,
    PROJECT_NORM_BACKWARD,
    ATTENTION,
    ATTENTION_BACKWARD,
    SWEEP_WORK,
    CACHE_APPEND,
    CACHE_MOMENTS,
    CACHE_INDEX_UNIT,
    CACHE_PAGES,
    CACHE_INDEX,
    CACHE_ATTEND,
    CACHE_TOKEN,
    _text("instruction_set"),
    _text("cuda_architectures"),
    _text("constants"),
)
# The prefixes of the families' names.
COMPILED, TRITON = FAMILIES = "", "triton_"

# The scalars of a call, by name.
PairOptions = record("PairOptions", numbers(PAIR))
StepOptions = record("StepOptions", (*numbers(TOKENS), *STEP))
