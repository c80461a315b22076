"""Steps one after another, each in a process of its own, in a time that all of them share.

Nothing that a step does keeps those after it from running: one that fails, hangs or dies costs its
own time. What no longer fits is left out by name, and the report says so after every step, so that
it is true whenever the run is cut off. This module imports no torch: a broken driver hangs a step
and never the schedule.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from files import write_atomically

# Exit statuses: of a step that has nothing to run on, and of one that left something out.
NOTHING_HERE, INCOMPLETE = 3, 4
PASSED, FAILED, TIMED_OUT = "passed", "FAILED", "TIMED OUT"
PARTLY, LEFT_OUT, NOT_HERE = "incomplete", "LEFT OUT", "not applicable"
# Stands in a command for the time, in seconds of the epoch, at which the step should be done. An
# amount of seconds would not count what a program takes to start.
UNTIL = "{until}"
# It is told this many seconds less than it gets, to end in good order.
MARGIN = 4.0
# What a step may take beyond its time to end.
GRACE = 1.0
TAIL = 30


@dataclass(frozen=True)
class Step:
    """A program to run.

    Args:
        name: what the report calls it.
        command: its words; empty: it does not apply here, for the reason `not_here`.
        timeout: seconds after which it is ended.
        least: it is left out if fewer seconds are left, and the steps before it leave it as many.
        environment: variables beside those of this process.
        mark: a file in which it notes what it is about to do, and in the end nothing. A step with
            one is started again where it died, as long as the mark moves on.
        stall: it hangs if its mark stays for so many seconds, and is then ended as if it had died.
    """

    name: str
    command: Sequence[str] = ()
    timeout: float = 60.0
    least: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)
    mark: Path | None = None
    stall: float = 60.0
    not_here: str = ""


@dataclass
class Outcome:
    """How a step went, in words, and the end of what it printed."""

    step: Step
    verdict: str
    seconds: float = 0.0
    note: str = ""
    tail: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in (PASSED, NOT_HERE)


class Stopped(Exception):
    """Somebody ended the run."""


def end_group(process: subprocess.Popen) -> None:
    """End a process and those it started: politely, then for good, and without waiting forever."""
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            # The leader may go before the others, so the second signal is sent in any case.
            process.wait(patience)


def run_process(
    command: Sequence[str],
    log: Path,
    seconds: float,
    cwd: Path,
    environment: Mapping[str, str],
    mark: Path | None = None,
    stall: float = 60.0,
) -> tuple[int | None, str]:
    """Run a program with its output in `log`.

    Returns:
        Its exit status, or None if it was ended, and what to say of that.
    """
    start = time.monotonic()
    with log.open("ab") as output:
        # A file and no pipe: what a process leaves running cannot keep this one waiting.
        process = subprocess.Popen(
            list(command), cwd=cwd, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment},
        )  # fmt: skip
    began = time.time()
    try:
        while True:
            left = seconds - (time.monotonic() - start)
            try:
                status = process.wait(max(0.0, min(left, 0.5)))
            except subprocess.TimeoutExpired:
                if left <= 0:
                    return None, f"ended after {seconds:.0f} s"
                moved = mark.stat().st_mtime if mark is not None and mark.exists() else 0.0
                if mark is not None and time.time() - max(began, moved) > stall:
                    return None, f"ended after {stall:.0f} s at one place"
            else:
                return status, f"killed by signal {-status}" if status < 0 else f"status {status}"
    finally:
        end_group(process)


def content(path: Path | None) -> str:
    return path.read_text() if path is not None and path.exists() else ""


class Schedule:
    """Runs steps and reports.

    Args:
        steps: in order of importance.
        seconds: for all of them.
        folder: of the report `report.md` and of `steps.log`, all that the steps print.
        cwd: where the steps run.
        facts, summary: Markdown for the top of the report and for below its table of steps.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        seconds: float,
        folder: Path,
        cwd: Path,
        facts: Callable[[], str] = str,
        summary: Callable[[], str] = str,
    ) -> None:
        self.steps, self.seconds, self.folder, self.cwd = steps, seconds, folder, cwd
        self.facts, self.summary = facts, summary
        self.log = folder / "steps.log"
        self.outcomes: list[Outcome] = []
        self.start = time.monotonic()

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def run(self) -> int:
        """Run all steps.

        Returns:
            0 if every step passed or does not apply here, NOTHING_HERE if a step found nothing to
            run on, else 1.
        """
        self.folder.mkdir(parents=True, exist_ok=True)

        def stop(number: int, _frame: FrameType | None) -> None:
            raise Stopped(signal.Signals(number).name)

        previous = signal.signal(signal.SIGTERM, stop)
        nothing, reason = False, ""
        try:
            for number, step in enumerate(self.steps):
                later = sum(s.least + GRACE for s in self.steps[number + 1 :] if s.command)
                outcome, nothing = self._take(step, later)
                self._add(outcome)
                if nothing:
                    reason = f"{step.name} found nothing to run on"
                    break
        except (KeyboardInterrupt, Stopped) as end:
            reason = f"the run was stopped: {end or 'interrupted'}"
        finally:
            signal.signal(signal.SIGTERM, previous)
        for step in self.steps[len(self.outcomes) :]:
            self.outcomes.append(Outcome(step, LEFT_OUT, note=reason))
        self.write_report()
        if nothing:
            return NOTHING_HERE
        return 0 if all(outcome.good for outcome in self.outcomes) else 1

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"gpu-check: {line_of(outcome)}", flush=True)
        self.write_report()

    def _take(self, step: Step, later: float) -> tuple[Outcome, bool]:
        """Run a step, and tell whether it found nothing to run on."""
        if not step.command:
            return Outcome(step, NOT_HERE, note=step.not_here), False
        left = self.left()
        if left < step.least:
            note = f"needs {step.least:.0f} s, {max(0.0, left):.0f} s were left"
            return Outcome(step, LEFT_OUT, note=note), False
        print(f"gpu-check: {step.name} ...", flush=True)
        allowed = min(step.timeout, max(step.least, left - later))
        start = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n==> {step.name}: {' '.join(step.command)}\n")
        begin = self.log.stat().st_size
        restarts = 0
        while True:
            rest = allowed - (time.monotonic() - start)
            place = content(step.mark)
            command = [
                word.replace(UNTIL, f"{time.time() + rest - min(MARGIN, rest / 4):.1f}")
                for word in step.command
            ]
            try:
                status, note = run_process(
                    command, self.log, rest, self.cwd, step.environment, step.mark, step.stall
                )
            except OSError as error:
                return Outcome(step, FAILED, note=f"{type(error).__name__}: {error}"), False
            over = allowed - (time.monotonic() - start) < 1.0
            alive = status in (0, 1, INCOMPLETE, NOTHING_HERE)
            if alive or over or step.mark is None or content(step.mark) == place:
                break
            restarts += 1
        verdict = {0: PASSED, None: TIMED_OUT, INCOMPLETE: PARTLY}.get(status, FAILED)
        note = "" if status in (0, INCOMPLETE) else note
        if restarts:
            note = f"started again {restarts} times" + (f"; {note}" if note else "")
        seconds = time.monotonic() - start
        return (
            Outcome(step, verdict, seconds, note, self._tail(begin)),
            status == NOTHING_HERE,
        )

    def _tail(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL:])

    def write_report(self) -> None:
        """Write what is known so far; steps without a line are still to come."""
        parts = [self.facts(), "## Steps\n"]
        parts.append("| step | outcome | seconds | |\n|---|---|---|---|")
        for outcome in self.outcomes:
            cells = (outcome.step.name, outcome.verdict, f"{outcome.seconds:.0f}", outcome.note)
            parts.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        to_come = [step.name for step in self.steps[len(self.outcomes) :]]
        if to_come:
            parts.append(f"\nStill to come: {', '.join(to_come)}.")
        bad = [outcome for outcome in self.outcomes if not outcome.good]
        parts.append(f"\n{len(bad)} of {len(self.outcomes)} steps did not pass.\n")
        try:
            parts.append(self.summary())
        except Exception as error:  # no figure may keep a step from running
            parts.append(f"The summary failed: {type(error).__name__}: {error}\n")
        parts.append("## What the steps printed last\n")
        for outcome in self.outcomes:
            if outcome.tail:
                lines = outcome.tail.splitlines()
                shown = "\n".join(lines[-5:] if outcome.good else lines)
                parts.append(f"### {line_of(outcome)}\n\n```\n{shown}\n```\n")
        write_atomically(self.folder / "report.md", "\n".join(parts))


def line_of(outcome: Outcome) -> str:
    note = f" ({outcome.note})" if outcome.note else ""
    return f"{outcome.step.name}: {outcome.verdict}, {outcome.seconds:.0f} s{note}"
