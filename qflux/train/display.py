"""What a run says on standard error while it goes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

# Steps after which the time of a step is known: the first ones allocate and compile.
STEPS_TO_TIME = 3
# Of a terminal that does not say; tqdm hides a bar for which there is no row.
UNKNOWN_SIZE: dict[str, Any] = {"ncols": 80, "nrows": 20}


class Display:
    """A header, then a bar on a terminal or lines elsewhere; nothing at all if not enabled.

    A standard error that is closed never stops a run.

    Args:
        enabled: whether to say anything.
        total_steps: of the run; None if only the time ends it.
    """

    def __init__(self, enabled: bool, total_steps: int | None = None) -> None:
        # Without one, print would take standard output.
        self.enabled, self.total_steps = enabled and sys.stderr is not None, total_steps
        self.terminal = self.enabled and _is_terminal()
        self._bar: Any = None
        self._begin = self._progress = 0.0
        self._taken, self._numbers = 0, ""

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self.enabled:
            return
        try:
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError, AttributeError):
            self.enabled = self.terminal = False

    def header(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what there is to say of them."""
        for name, text in rows:
            self.say(f"{name:11} {text}")

    @contextmanager
    def running(self, progress: float) -> Iterator[None]:
        """The bar is there meanwhile; `progress` of the run is behind, in [0, 1]."""
        self._begin, self._progress, self._taken = time.perf_counter(), progress, 0
        if self.terminal:
            size: dict[str, Any] = {"dynamic_ncols": True} if _has_size() else UNKNOWN_SIZE
            self._bar = tqdm(
                total=1.0,
                initial=progress,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
                file=sys.stderr,
                **size,
            )
        try:
            yield
        finally:
            if self._bar is not None:
                bar, self._bar = self._bar, None
                bar.close()

    def step(self, step: int, progress: float) -> None:
        """A step has been taken."""
        self._taken += 1
        now = time.perf_counter()
        if self._taken == 1:
            # The first step compiles and allocates, and says little about the others.
            self._begin, self._progress = now, progress
        if self._taken == STEPS_TO_TIME and self.enabled:
            seconds = (now - self._begin) / (STEPS_TO_TIME - 1)
            self.say(
                f"{'time':11} {seconds:.3g} s a step, {self._left(progress)}, evaluations aside"
            )
        if self._bar is not None:
            self._bar.n = progress
            self._bar.set_description_str(self._place(step, progress), refresh=False)
            self._bar.update(0)

    def interval(self, line: dict[str, Any], progress: float) -> None:
        """A line of metrics has been measured."""
        # All of a bar has to fit into 80 columns.
        rate = "learning rate" if self._bar is None else "lr"
        self._numbers = (
            f": loss {line['train_loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, "
            f"{rate} {line['learning_rate']:.2e}"
        )
        if self._bar is None:
            self.say(self._place(line["step"], progress))

    def _place(self, step: int, progress: float) -> str:
        of = "" if self.total_steps is None else f" of {self.total_steps:,}"
        share = "" if self._bar is not None else f" ({100 * progress:.0f} %)"
        return f"step {step:,}{of}{share}, {self._left(progress)}{self._numbers}"

    def _left(self, progress: float) -> str:
        """The time until the end, as the time since the first step suggests."""
        made = progress - self._progress
        if progress < 1 and made <= 0:
            return "time left unknown"
        elapsed = time.perf_counter() - self._begin
        return f"{clock(elapsed * (1 - progress) / made if progress < 1 else 0.0)} left"

    @contextmanager
    def evaluating(self, model: nn.Module, tokens: int) -> Iterator[None]:
        """Meanwhile each pass of the model moves a bar for the evaluation of so many tokens."""
        if self._bar is None:
            yield
            return
        begin, seen = time.perf_counter(), 0
        place = self._bar.desc

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            nonlocal seen
            seen += inputs[0].numel()
            share = min(1.0, seen / max(1, tokens))
            left = clock((time.perf_counter() - begin) * (1 - share) / share)
            self._bar.set_description_str(f"evaluating, {100 * share:.0f} %, {left} left")

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()
            self._bar.set_description_str(place)


def clock(seconds: float) -> str:
    """A duration as "mm:ss" or "h:mm:ss"."""
    return tqdm.format_interval(max(0.0, seconds))


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def _has_size() -> bool:
    """Whether the terminal knows how large it is."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        return False
