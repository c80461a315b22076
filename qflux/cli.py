"""The command line: parse, run, and put what went wrong on one line.

PyTorch takes seconds to import, so that nothing here does before a command asks for it.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import redirect_stderr, suppress
from dataclasses import make_dataclass
from importlib import metadata
from io import StringIO
from typing import Annotated, Any, Union

import tyro

COMMANDS = {
    "train": "Train a model on a text.",
    "generate": "Continue a prompt.",
    "eval": "Measure how well a trained model predicts a text.",
    "analyze": "Show what a trained model does with a text: a page, figures and data.",
    "export": "Write a trained model as a Hugging Face model.",
}


class UsageError(ValueError):
    """The arguments are not what the command line takes."""


def main(argv: list[str] | None = None) -> int:
    """Run `qflux` with these arguments (default: the process's); returns the exit status."""
    _open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    finally:
        _flush()


def _main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"qflux {metadata.version('qflux')}")
        return 0
    named = arguments[0] if arguments and arguments[0] in COMMANDS else None
    program = "qflux" if named is None else f"qflux {named}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        program += f" (rank {os.environ.get('RANK')})"
    try:
        command = parse(arguments)
        from .commands import USER_ERRORS

        try:
            command.run()
        except USER_ERRORS as error:
            raise UsageError(str(error)) from error
    except UsageError as error:
        _complain(f"{program}: {error}".replace("\n", " "))
        return 2
    except KeyboardInterrupt as stop:
        _complain(f"{program}: {stop}" if str(stop) else "interrupted")
        return getattr(stop, "status", 130)
    return 0


def _complain(line: str) -> None:
    """Say it on standard error; where nobody listens, the exit status has to do."""
    with suppress(OSError):
        if line:
            print(line, file=sys.stderr, flush=True)


def _open_streams() -> None:
    """Put /dev/null in the place of closed standard streams.

    A file opened later would get the number of a closed stream, and what the process or a library
    prints would end up in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)


def _flush() -> None:
    """Write what is in the buffers; a reader that has gone is no error to report."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
                args=_with_values(arguments),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except BrokenPipeError:
        raise SystemExit(0) from None  # the help's reader has seen enough
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(messages.getvalue())) from None
    # Warnings of what was imported on the way.
    _complain(messages.getvalue().rstrip("\n"))
    return chosen.command


def _with_values(arguments: list[str]) -> list[str]:
    """The arguments with `--option=value` for a value that begins with dashes but is no option.

    An option has letters, digits, dashes and underscores; anything else, such as "--a_b c" or
    "-", can only be the value of the option before it, and must not be changed as options are.
    """
    joined: list[str] = []
    for argument in arguments:
        is_option = re.fullmatch(r"-\w|--[A-Za-z][\w-]*(=.*)?", argument, re.DOTALL)
        takes_value = joined and re.fullmatch(r"--[A-Za-z][\w-]*", joined[-1])
        if argument.startswith("-") and not is_option and takes_value:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _subcommand(name: str) -> Any:
    """A subcommand whose options are read when it is named: they need PyTorch."""

    def options() -> type:
        from . import commands

        return getattr(commands, name.capitalize())

    command = Annotated[Any, tyro.conf.arg(name="", constructor_factory=options)]
    kind = make_dataclass(name, [("command", command)])
    return Annotated[Any, tyro.conf.subcommand(name, description=COMMANDS[name], constructor=kind)]


def _one_line(message: str) -> str:
    """What tyro says in a box, without the box, its title and the help of the option."""
    sections: list[list[str]] = [[]]
    rows = [line.strip("│ ") for line in message.splitlines()]
    for row in rows:
        if re.fullmatch("[─-]{3,}", row):
            sections.append([])
        elif not row.startswith(("╭", "╰")):
            sections[-1] += row.split()
    # Where the terminal has no lines to draw a box with, the title is a section of its own.
    if len(sections) > 1 and not rows[0].startswith("╭"):
        del sections[0]
    texts = [" ".join(words) for words in sections]
    omitted = ("For full help", "Argument help")
    text = "; ".join(part for part in texts if part and not part.startswith(omitted))
    missing = re.search(r"Missing value for argument '(--[\w-]+)'", text)
    if missing:
        text += f" A value that looks like an option has to be written {missing[1]}=VALUE."
    # A long message is wrapped, its full stop too.
    return text.replace(" .", ".")
