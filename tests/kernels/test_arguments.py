"""Bad arguments: an error that names the argument, what came and what is allowed."""

import re

import pytest
import torch

import qflux_kernels
from qflux_kernels import (
    BackendUnavailableError,
    InverseGate,
    Radius,
    Threshold,
    evolve,
    interact,
    reference,
    scores,
)

X = torch.randn(2, 5, 2)
META = torch.empty(2, 5, 2, device="meta")


def messages(*parts: str) -> str:
    """A pattern that finds all parts, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


@pytest.fixture(params=["kernels", "reference"])
def operators(request):
    """Both sides check alike: the same error must come from each."""
    module = qflux_kernels if request.param == "kernels" else reference
    return module.interact, module.evolve


POINTS = [
    ("a list", [[0.0, 1.0]], TypeError, ["tensor", "list"]),
    ("integers", torch.ones(5, 2, dtype=torch.int64), TypeError, ["float32", "int64"]),
    ("complex", torch.ones(5, 2, dtype=torch.complex64), TypeError, ["float32", "complex64"]),
    ("booleans", torch.ones(5, 2, dtype=torch.bool), TypeError, ["float32", "bool"]),
    ("three columns", torch.ones(5, 3), ValueError, ["2)", "(5, 3)"]),
    ("one dimension", torch.ones(2), ValueError, ["length", "(2,)"]),
    ("no dimension", torch.tensor(1.0), ValueError, ["length", "()"]),
]


@pytest.mark.parametrize("what, bad, error, parts", POINTS, ids=[case[0] for case in POINTS])
def test_states_and_keys(operators, what, bad, error, parts):
    run_interact, run_evolve = operators
    with pytest.raises(error, match=messages("states", *parts)):
        run_interact(bad)
    with pytest.raises(error, match=messages("states", *parts)):
        run_evolve(bad, 0.1)
    with pytest.raises(error, match=messages("keys", *parts)):
        run_interact(torch.ones(5, 2), bad)
    with pytest.raises(error, match=messages("states", *parts)):
        scores(bad)


@pytest.mark.parametrize(
    "values, error, parts",
    [
        ([[1.0]], TypeError, ["tensor", "list"]),
        (torch.ones(2, 5, 3, dtype=torch.int32), TypeError, ["float32", "int32"]),
        (torch.ones(2, 4, 3), ValueError, ["5", "(2, 4, 3)"]),
        (torch.ones(2, 5, 0), ValueError, ["column", "(2, 5, 0)"]),
        (torch.ones(5), ValueError, ["(5,)"]),
    ],
    ids=str,
)
def test_values(operators, values, error, parts):
    with pytest.raises(error, match=messages("values", *parts)):
        operators[0](X, values=values)


def test_values_follow_the_keys(operators):
    with pytest.raises(ValueError, match=messages("values", "7", "(2, 5, 3)")):
        operators[0](X, torch.ones(2, 7, 2), torch.ones(2, 5, 3))


def test_one_dtype(operators):
    with pytest.raises(TypeError, match=messages("keys", "float32", "float64")):
        operators[0](X, X.double())
    with pytest.raises(TypeError, match=messages("values", "float32", "bfloat16")):
        operators[0](X, values=X.bfloat16())


def test_batches_broadcast(operators):
    with pytest.raises(ValueError, match=messages("states", "keys", "(2, 5, 2)", "(3, 5, 2)")):
        operators[0](X, torch.ones(3, 5, 2))


def test_one_device(operators):
    run_interact, run_evolve = operators
    with pytest.raises(ValueError, match=messages("keys", "meta", "cpu")):
        run_interact(X, META)
    with pytest.raises(ValueError, match=messages("values", "meta", "cpu")):
        run_interact(X, values=META)
    with pytest.raises(ValueError, match=messages("lengths", "meta", "cpu")):
        run_interact(X, lengths=torch.ones(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=messages("sigma", "meta", "cpu")):
        run_interact(X, score=Threshold(META[0, 0, 0]))
    with pytest.raises(ValueError, match=messages("min_gate", "meta", "cpu")):
        run_interact(X, score=InverseGate(min_gate=META[0, 0, 0]))
    with pytest.raises(ValueError, match=messages("dt", "meta", "cpu")):
        run_evolve(X, META[..., 0])
    with pytest.raises(ValueError, match=messages("skip", "meta", "cpu")):
        run_evolve(X, 0.1, skip=META[..., 0])


@pytest.mark.parametrize(
    "name, value, error, parts",
    [
        ("causal", 1, TypeError, ["True", "1"]),
        ("causal", None, TypeError, ["True", "None"]),
        ("causal", "yes", TypeError, ["True", "yes"]),
        ("score", "threshold", TypeError, ["Threshold", "InverseGate", "str"]),
        ("score", Threshold, TypeError, ["Threshold", "InverseGate", "type"]),
        ("score", None, TypeError, ["Threshold", "InverseGate", "NoneType"]),
        ("reduction", "max", ValueError, ["sum", "mean", "max"]),
        ("reduction", None, TypeError, ["sum", "mean", "NoneType"]),
        ("lengths", 3, TypeError, ["integer tensor", "int"]),
        ("lengths", [3, 4], TypeError, ["integer tensor", "list"]),
        ("lengths", torch.tensor([3.0, 4.0]), TypeError, ["integer", "float32"]),
        ("lengths", torch.tensor([True, False]), TypeError, ["integer", "bool"]),
        ("lengths", torch.tensor([3, 6]), ValueError, ["[0, 5]", "6"]),
        ("lengths", torch.tensor([-1, 3]), ValueError, ["[0, 5]", "-1"]),
        ("lengths", torch.tensor([1, 2, 3]), ValueError, ["(2,)", "(3,)"]),
        ("lengths", torch.ones(2, 2, dtype=torch.int64), ValueError, ["(2,)", "(2, 2)"]),
        ("algorithm", "fast", ValueError, ["auto", "dense", "fast"]),
        ("algorithm", None, TypeError, ["auto", "dense", "NoneType"]),
        ("backend", "tpu", ValueError, ["auto", "reference", "tpu"]),
        ("backend", 0, TypeError, ["auto", "reference", "int"]),
    ],
    ids=str,
)
def test_options_of_both_operators(operators, name, value, error, parts):
    run_interact, run_evolve = operators
    with pytest.raises(error, match=messages(name, *parts)):
        run_interact(X, **{name: value})
    with pytest.raises(error, match=messages(name, *parts)):
        run_evolve(X, 0.1, **{name: value})


def test_lengths_need_as_many_keys_as_states(operators):
    with pytest.raises(ValueError, match=messages("lengths", "5", "7")):
        operators[0](X, torch.ones(2, 7, 2), lengths=torch.tensor([1, 2]))


@pytest.mark.parametrize("name", ["dt", "skip"])
@pytest.mark.parametrize(
    "value, error, parts",
    [
        (True, TypeError, ["bool"]),
        ("0.1", TypeError, ["str"]),
        (1j, TypeError, ["complex"]),
        (float("nan"), ValueError, ["nan"]),
        ([0.1], TypeError, ["list"]),
        (torch.tensor(1), TypeError, ["floating", "int64"]),
        (torch.tensor(1j), TypeError, ["floating", "complex64"]),
        (torch.ones(4), ValueError, ["(2, 5)", "(4,)"]),
        (torch.ones(2, 4), ValueError, ["(2, 5)", "(2, 4)"]),
        (torch.ones(3, 2, 5), ValueError, ["(2, 5)", "(3, 2, 5)"]),
        (torch.ones(1, 1, 2, 5), ValueError, ["(2, 5)", "(1, 1, 2, 5)"]),
    ],
    ids=str,
)
def test_dt_and_skip(operators, name, value, error, parts):
    arguments = {"dt": 0.1, name: value}
    with pytest.raises(error, match=messages(name, *parts)):
        operators[1](X, steps=2, **arguments)


@pytest.mark.parametrize(
    "name, value, error, parts",
    [
        ("steps", 0, ValueError, ["1", "0"]),
        ("steps", -3, ValueError, ["1", "-3"]),
        ("steps", 2.0, TypeError, ["integer", "float"]),
        ("steps", True, TypeError, ["integer", "bool"]),
        ("radius", 1.0, TypeError, ["Radius", "float"]),
        ("radius", Radius, TypeError, ["Radius", "type"]),
    ],
)
def test_options_of_evolve(operators, name, value, error, parts):
    with pytest.raises(error, match=messages(name, *parts)):
        operators[1](X, 0.1, **{name: value})


@pytest.mark.parametrize(
    "make, name, value, error, parts",
    [
        (Threshold, "sigma", True, TypeError, ["real number", "bool"]),
        (Threshold, "sigma", "0.5", TypeError, ["real number", "str"]),
        (Threshold, "sigma", None, TypeError, ["real number", "NoneType"]),
        (Threshold, "sigma", float("nan"), ValueError, ["nan"]),
        (Threshold, "sigma", torch.tensor(1), TypeError, ["floating-point", "int64"]),
        (Threshold, "stats", "all", ValueError, ["prefix", "row", "all"]),
        (Threshold, "stats", None, TypeError, ["prefix", "row", "NoneType"]),
        (Threshold, "shrinkage", "firm", ValueError, ["hard", "soft", "firm"]),
        (Threshold, "shrinkage", None, TypeError, ["hard", "soft", "NoneType"]),
        (Threshold, "eps", -1e-9, ValueError, ["0", "-1e-09"]),
        (Threshold, "eps", float("nan"), ValueError, ["nan"]),
        (Threshold, "eps", torch.tensor(1e-6), TypeError, ["real number", "Tensor"]),
        (InverseGate, "alpha", False, TypeError, ["real number", "bool"]),
        (InverseGate, "alpha", float("nan"), ValueError, ["nan"]),
        (InverseGate, "alpha", torch.tensor(1j), TypeError, ["floating-point", "complex64"]),
        (InverseGate, "eps", -1.0, ValueError, ["0", "-1.0"]),
        (InverseGate, "min_gate", "0", TypeError, ["real number", "str"]),
        (InverseGate, "min_gate", torch.tensor(1), TypeError, ["floating-point", "int64"]),
        (Radius, "min", -0.1, ValueError, ["0", "-0.1"]),
        (Radius, "min", 3.0, ValueError, ["max", "3.0", "2.0"]),
        (Radius, "max", 0.05, ValueError, ["min", "0.1", "0.05"]),
        (Radius, "rate", "fast", TypeError, ["real number", "str"]),
        (Radius, "reversion", None, TypeError, ["real number", "NoneType"]),
        (Radius, "target", float("nan"), ValueError, ["nan"]),
        (Radius, "rate", torch.tensor(0.1), TypeError, ["real number", "Tensor"]),
    ],
)
def test_scores_and_radius(make, name, value, error, parts):
    with pytest.raises(error, match=messages(name, *parts)):
        make(**{name: value})


@pytest.mark.parametrize(
    "make, name",
    [(Threshold, "sigma"), (InverseGate, "alpha"), (InverseGate, "min_gate")],
)
def test_coefficients_broadcast_to_the_batch(operators, make, name):
    score = make(**{name: torch.ones(3)})
    with pytest.raises(ValueError, match=messages(name, "(2,)", "(3,)")):
        operators[0](X, score=score)
    with pytest.raises(ValueError, match=messages(name, "(2,)", "(3,)")):
        operators[1](X, 0.1, score=score)


def test_options_are_frozen():
    for options in (Threshold(), InverseGate(), Radius()):
        with pytest.raises(AttributeError):
            options.eps = 1.0


def test_positional_arguments_end_with_the_tensors():
    with pytest.raises(TypeError):
        interact(X, X, X, False)
    with pytest.raises(TypeError):
        evolve(X, 0.1, False)


def test_backends_that_are_not_there():
    for call in (lambda **o: interact(X, **o), lambda **o: evolve(X, 0.1, **o)):
        with pytest.raises(ValueError, match=messages("backend='cuda'", "cpu")):
            call(backend="cuda")
        with pytest.raises(BackendUnavailableError, match=messages("backend='triton'", "cpu")):
            call(backend="triton")
        for backend in ("reference", "auto"):
            score = InverseGate() if backend == "auto" else Threshold()
            what = messages("sweep", "InverseGate" if backend == "auto" else backend, "dense")
            with pytest.raises(BackendUnavailableError, match=what):
                call(algorithm="sweep", backend=backend, score=score)
        assert call(backend="reference")[0].shape == X.shape


@pytest.mark.parametrize("value, error", [("sparse", ValueError), (None, TypeError)])
def test_layout_of_scores(value, error):
    with pytest.raises(error, match=messages("layout", "dense", "csr")):
        scores(X[0], layout=value)


def test_csr_takes_one_sequence():
    with pytest.raises(ValueError, match=messages("csr", "(S, 2)", "(2, 5, 2)")):
        scores(X, layout="csr")
