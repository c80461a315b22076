"""The command line: parse, run, and put what went wrong on one line.

PyTorch takes seconds to import, so that nothing here does before a command asks for it.
"""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stderr
from dataclasses import make_dataclass
from importlib import metadata
from io import StringIO
from typing import Annotated, Any, Union

import tyro

COMMANDS = {
    "train": "Train a model on a text.",
    "generate": "Continue a prompt.",
    "eval": "Measure how well a trained model predicts a text.",
    "export": "Write a trained model as a Hugging Face model.",
}


class UsageError(ValueError):
    """The arguments are not what the command line takes."""


def main(argv: list[str] | None = None) -> int:
    """Run `qflux` with these arguments (default: the process's); returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"qflux {metadata.version('qflux')}")
        return 0
    named = arguments[0] if arguments and arguments[0] in COMMANDS else None
    program = "qflux" if named is None else f"qflux {named}"
    try:
        command = parse(arguments)
        from .commands import USER_ERRORS

        try:
            command.run()
        except USER_ERRORS as error:
            raise UsageError(str(error)) from error
    except UsageError as error:
        print(f"{program}: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{program}: {stop}" if str(stop) else "interrupted", file=sys.stderr)
        return getattr(stop, "status", 130)
    return 0


def parse(arguments: list[str]) -> Any:
    """The command of `qflux.commands` that these arguments ask for, with the options given.

    Raises:
        UsageError: what is wrong with them, on one line.
        SystemExit: with status 0, when help was asked for and has been printed.
    """
    messages = StringIO()
    try:
        with redirect_stderr(messages):
            chosen = tyro.cli(
                Union[tuple(_subcommand(name) for name in COMMANDS)],  # noqa: UP007
                prog="qflux",
                description="Train Quantum Flux language models and generate text. "
                "`qflux --version` prints the version.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(messages.getvalue())) from None
    # Warnings of what was imported on the way.
    sys.stderr.write(messages.getvalue())
    return chosen.command


def _subcommand(name: str) -> Any:
    """A subcommand whose options are read when it is named: they need PyTorch."""

    def options() -> type:
        from . import commands

        return getattr(commands, name.capitalize())

    command = Annotated[Any, tyro.conf.arg(name="", constructor_factory=options)]
    kind = make_dataclass(name, [("command", command)])
    return Annotated[Any, tyro.conf.subcommand(name, description=COMMANDS[name], constructor=kind)]


def _one_line(message: str) -> str:
    """What tyro says in a box, without the box and without the help of the option."""
    rows = [line.strip("│ ") for line in message.splitlines() if line.startswith("│")]
    if not rows:
        return " ".join(message.split())
    sections = re.split(r" ─+ ", " ".join(rows))
    kept = [part for part in sections if not part.startswith(("For full help", "Argument help"))]
    text = "; ".join(" ".join(part.split()) for part in kept)
    # A long message is wrapped, its full stop too.
    return text.replace(" .", ".")
