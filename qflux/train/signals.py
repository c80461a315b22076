"""Ctrl-C and requests to end: they are remembered, so that a run can save first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import nn

# A closed terminal is a request to end, too.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class TrainingInterrupted(KeyboardInterrupt):
    """A run was stopped by a signal and has saved its state; the message says how to go on.

    Args:
        message: what happened.
        signal_number: the signal; `status` is the exit status that shells give such an end.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


class StopRequested(Exception):
    """A signal has come while the model was evaluated."""


class Stopper:
    """Remembers the first signal that asks the process to end; the second one ends it.

    Args:
        repeats: a signal may come more than once and means the same: torchrun passes on what the
            terminal sends, too, and ends by itself what takes half a minute.

    Signals that the process ignores stay ignored, and outside the main thread, where Python allows
    no handlers, nothing is caught.
    """

    def __init__(self, repeats: bool = False) -> None:
        self.signal: int | None = None
        self.repeats = repeats

    @property
    def name(self) -> str:
        """The signal as people call it."""
        if self.signal is None:
            return ""
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile signals are remembered."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, self._remember)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if self.repeats:
                return
            raise KeyboardInterrupt(f"stopped by a second {self.name} before it had saved")
        self.signal = number

    @contextmanager
    def interrupting(
        self, model: nn.Module, listen: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Meanwhile a pass of the model after a signal raises `StopRequested`.

        `listen` is called before each pass, to learn of signals elsewhere.
        """

        def check(module: nn.Module, inputs: object) -> None:
            if listen is not None:
                listen()
            if self.signal is not None:
                raise StopRequested

        hook = model.register_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()
