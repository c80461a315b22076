"""The options that benchmarks share when they train models."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from qflux.train.options import OptimizerOptions


def add_training(parser: argparse.ArgumentParser, curves: str) -> None:
    """Add the options of a run; `curves` says what `--curves` appends to its CSV."""
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of the configuration"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--beta2", type=float, default=0.99)
    parser.add_argument("--warmup", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="append rows to this CSV")
    parser.add_argument("--curves", type=Path, help=f"append {curves} to this CSV")
    parser.add_argument("--verbose", action="store_true")


def optimizer_options(arguments: argparse.Namespace) -> OptimizerOptions:
    """Those of the command line.

    Raises:
        TypeError, ValueError: a bad value, named.
    """
    return OptimizerOptions(
        learning_rate=arguments.rate,
        betas=(0.9, arguments.beta2),
        weight_decay=arguments.weight_decay,
        warmup=arguments.warmup,
    )


def parse_changes(pairs: Sequence[str], kind: type) -> dict[str, object]:
    """The fields of a configuration that `--set` gives; another name ends the program."""
    known = {known.name for known in fields(kind)}
    changes = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in known:
            raise SystemExit(f"--set: {name!r} is no field of {kind.__name__}: {sorted(known)}")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes
