"""Generation for a terminal: prompts from anywhere, text to standard output as it is made."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from qflux_kernels.checks import check_choice, check_flag, check_integer

from ..text.files import check_path
from ..text.vocabulary import Vocabulary
from .generate import BeyondContextWarning, LanguageModel
from .sampling import check_sampling
from .text import UNKNOWN, TextStream, fit_prompt

STANDARD_INPUT = "-"
BETWEEN_SAMPLES = "---\n"


@dataclass(frozen=True)
class GenerationOptions:
    """What to continue, and how to draw tokens.

    Args:
        model_path: folder that training wrote.
        prompt: text to continue; None: that of `prompt_file`, or what is piped into the program,
            or else a line break (a space or the first character where the text had none).
        prompt_file: file with the text to continue, UTF-8, without the line break at its end; "-"
            is standard input.
        interactive: read prompts from standard input, one a line, and continue each.
        max_new_tokens: tokens to add, >= 0.
        num_samples: continuations of the prompt, >= 1, with a line "---" between them; the n-th
            is that of seed + n - 1.
        stop: text that ends a continuation before it; may be repeated.
        unknown: what becomes of characters of the prompt that the vocabulary does not have:
            "refuse", "replace" by a space, or "drop".
        temperature: divides the logits, >= 0; 0 takes the most likely token.
        top_k: keep the k most likely tokens, >= 1.
        top_p: keep the most likely tokens of this total probability, in (0, 1].
        seed: of the sampling, in [-2^63, 2^63 - 1].
        device: where to run, as PyTorch names it, such as cpu, cuda or cuda:1.
        analyze: also write a report of prompt and continuation, as `qflux analyze` does.
        output_dir: folder for that report, a new or an empty one.
        overwrite: replace what has the same names there, if it is not empty.

    Raises:
        TypeError, ValueError: a bad value, or two options that contradict each other; named.
    """

    model_path: str
    prompt: str | None = None
    prompt_file: str | None = None
    interactive: bool = False
    max_new_tokens: int = 300
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    unknown: str = "refuse"
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    device: str = "cpu"
    analyze: bool = False
    output_dir: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("model_path", "prompt_file", "output_dir"):
            if getattr(self, name) is not None:
                check_path(name, getattr(self, name))
        if self.prompt == "":
            raise ValueError("prompt must have length >= 1, got ''")
        check_flag("interactive", self.interactive)
        check_integer("max_new_tokens", self.max_new_tokens, 0)
        check_integer("num_samples", self.num_samples, 1)
        if "" in self.stop:
            raise ValueError("stop must have length >= 1, got ''")
        check_choice("unknown", self.unknown, UNKNOWN)
        check_sampling(self.temperature, self.top_k, self.top_p)
        check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file cannot both be given")
        if self.interactive and (self.prompt is not None or self.prompt_file is not None):
            raise ValueError("interactive reads prompts itself: give no prompt and no prompt_file")
        self._check_report()

    def _check_report(self) -> None:
        for name in ("analyze", "overwrite"):
            check_flag(name, getattr(self, name))
        if self.analyze and self.output_dir is None:
            raise ValueError("analyze needs output_dir, the folder for the report")
        if self.output_dir is not None and not self.analyze:
            raise ValueError("output_dir is the folder for a report: give analyze too")
        if self.analyze and (self.interactive or self.num_samples > 1):
            raise ValueError("analyze takes one text: give no interactive, and num_samples 1")


class Session:
    """Continues prompts on standard output, and tells on standard error how it goes.

    Args:
        options: what to do.
        model: the language model, on `options.device`.
        vocabulary: its vocabulary.

    Raises:
        OSError: standard output is closed.

    `text` is the last prompt with its continuation, as far as it was made.
    """

    def __init__(
        self, options: GenerationOptions, model: LanguageModel, vocabulary: Vocabulary
    ) -> None:
        self.options, self.model, self.vocabulary = options, model, vocabulary
        self.out = _standard_output()
        self.text = ""

    def run(self) -> None:
        """Continue the prompt, or each line in turn.

        A reader that takes no more ends it quietly. Ctrl-C ends it too, but what was made is out
        by then; where lines are read, it ends the continuation and the next line may come.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the last text is out.
            OSError, ValueError: no prompt, one with characters that the vocabulary lacks, text
                that cannot be written, or a model without finite logits.
        """
        try:
            with _noted_warnings():
                if self.options.interactive:
                    self._converse()
                else:
                    self._continue(_prompt(self.options) or self.vocabulary.default_prompt)
        except BrokenPipeError:
            _discard(self.out)

    def _converse(self) -> None:
        for number, line in enumerate(_lines(self.out)):
            try:
                self._continue(line, self.options.seed + number)
            except KeyboardInterrupt:
                continue
            except ValueError as error:
                note(str(error))

    def _continue(self, given: str, seed: int | None = None) -> None:
        """Write each sample of a prompt, and how fast it was."""
        options = self.options
        first = options.seed if seed is None else seed
        prompt, told = fit_prompt(given, self.vocabulary, options.unknown)
        if told:
            note(f"prompt: {told}")
        made, start = [], time.perf_counter()
        try:
            for number in range(options.num_samples):
                if number:
                    self._write(BETWEEN_SAMPLES)
                # Back to the smallest seed after the largest.
                its_seed = (first + number + 2**63) % 2**64 - 2**63
                stream = TextStream(
                    self.model,
                    self.vocabulary,
                    prompt,
                    options.max_new_tokens,
                    stop=options.stop,
                    device=options.device,
                    temperature=options.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    generator=torch.Generator(options.device).manual_seed(its_seed),
                )
                made.append(stream)
                self._write_all(stream)
        except (KeyboardInterrupt, BrokenPipeError):
            _tell_speed(made, start)
            raise
        _tell_speed(made, start)

    def _write_all(self, stream: TextStream) -> None:
        self.text = ""
        try:
            for text in stream:
                self.text += text
                self._write(text)
        except KeyboardInterrupt:
            self._write(stream.finish() + "\n")
            raise
        self._write("\n")

    def _write(self, text: str) -> None:
        # At once, so that it can be read and nothing is lost when the program is killed.
        self.out.write(text)
        self.out.flush()


def note(text: str) -> None:
    """Say something on standard error, if somebody listens."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _noted_warnings() -> Iterator[None]:
    """Meanwhile what generation warns of is a line like the others, once."""
    told = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message: Any, category: type[Warning], *others: Any) -> None:
            if issubclass(category, BeyondContextWarning):
                if str(message) not in told:
                    note(str(message))
                told.add(str(message))
            else:
                show(message, category, *others)

        warnings.simplefilter("always", BeyondContextWarning)
        warnings.showwarning = tell
        yield


def _tell_speed(made: Sequence[TextStream], start: float) -> None:
    tokens, seconds = sum(stream.tokens for stream in made), time.perf_counter() - start
    note(f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s")


def _standard_output() -> TextIO:
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed: there is nowhere to write text to")
    # Text that an encoding other than UTF-8 lacks is spelled, not an error half-way.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    return sys.stdout


def _discard(out: TextIO) -> None:
    """Send what is still in the buffer nowhere; Python would report it at its end."""
    try:
        number = out.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _prompt(options: GenerationOptions) -> str | None:
    """The prompt that was given, whichever way; None for none.

    Raises:
        OSError: a file that cannot be read.
        ValueError: an empty prompt, or one that is not UTF-8.
    """
    if options.prompt is not None:
        return options.prompt
    if options.prompt_file is not None and options.prompt_file != STANDARD_INPUT:
        name = f"prompt_file {options.prompt_file!r}"
        text = _read(Path(options.prompt_file).read_bytes(), name)
    elif options.prompt_file is not None or _is_piped():
        if sys.stdin is None:
            raise ValueError("prompt_file is '-', and standard input is closed")
        name = "standard input"
        text = _read(sys.stdin.buffer.read(), name)
        if not text and options.prompt_file is None:
            return None
    else:
        return None
    if not text:
        raise ValueError(f"prompt must have length >= 1, and {name} is empty")
    return text


def _read(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, and not a terminal or /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    if stat.S_ISFIFO(mode) and not select.select([sys.stdin], [], [], 0)[0]:
        note("reading the prompt from standard input; --prompt gives one")
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _lines(out: TextIO) -> Iterator[str]:
    """The lines of standard input, until it ends or Ctrl-C comes."""
    if sys.stdin is None:
        raise ValueError("interactive needs standard input, which is closed")
    by_hand = sys.stdin.isatty() and out.isatty()
    if by_hand:
        note("one prompt a line; Ctrl-C ends a continuation, Ctrl-D the program")
    while True:
        try:
            # A terminal's lines can be edited this way.
            line = input("> ") if by_hand else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            line = ""
            by_hand = False
        if not by_hand and not line:
            return
        line = line.removesuffix("\n")
        if line:
            yield line
