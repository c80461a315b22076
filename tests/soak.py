"""Kill training runs at random, resume them, and see that only the last interval is ever lost.

`python tests/soak.py --kills 200` kills by SIGKILL, SIGTERM and Ctrl-C, lets files grow no further
as on a full disk, and starts second writers. Whatever happened, a run that is resumed to its end
must have the metrics and the weights of a run that nothing happened to. Runs are forked from this
process, which has imported PyTorch but computed nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from qflux import commands  # noqa: F401 (imported before the forks)
from qflux.cli import main as qflux
from qflux.train.checkpoint import load_model
from qflux.train.states import States

torch.set_num_threads(1)

STEPS, SAVE_INTERVAL = 36, 3
OPTIONS = [
    "--num-layers", "1", "--hidden-dim", "16", "--num-cylinders", "2", "--context-length", "16",
    "--dropout", "0.1", "--batch-size", "2", "--max-steps", str(STEPS), "--log-interval", "5",
    "--save-interval", str(SAVE_INTERVAL), "--eval-interval", "8",
]  # fmt: skip
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "full disk", "two writers")
TIMEOUT = 300.0


class Child:
    """A forked process that runs the program; what it prints is read at its end."""

    def __init__(self, arguments: list[str], before: Callable[[], None] = lambda: None) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                os.close(reader)
                os.dup2(writer, 1)
                os.dup2(writer, 2)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
                # A program in a shell's foreground has these.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                before()
                status = qflux(arguments)
            finally:
                with suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        os.close(writer)
        self._reader = reader

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> tuple[int, str]:
        """Its exit status, or minus the signal that killed it, and what it printed."""
        with open(self._reader, encoding="utf-8", errors="replace") as stream:
            printed = stream.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), printed


def metrics(folder: Path) -> list[dict]:
    """The whole lines of metrics; each must be one, whatever killed the writer."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(folder: Path) -> list[list]:
    keys = ("step", "train_loss", "val_loss", "learning_rate", "gradient_norm")
    return [[line.get(key) for key in keys] for line in metrics(folder)]


def names(folder: Path) -> list[str]:
    """Its files; the state before the last is of the step at which a signal stopped the run."""
    return sorted(re.sub(r"-\d+\.pt$", "-STEP.pt", name) for name in os.listdir(folder))


def difference(lines: list[list], expected: list[list]) -> str:
    """Where two curves part, for a message."""
    pairs = enumerate(itertools.zip_longest(lines, expected))
    return "; ".join(f"line {n}: {got}, expected {want}" for n, (got, want) in pairs if got != want)


def saved_step(folder: Path) -> int:
    """The step of the latest state, 0 without one; every kept state must be readable."""
    states = States(folder)
    for step in states.kept():
        assert states.load(step)["step"] == step
    return states.load()["step"] if states.exist() else 0


def wait_until(condition: Callable[[], bool], child: Child) -> None:
    begin = time.monotonic()
    while child.running() and not condition():
        assert time.monotonic() - begin < TIMEOUT, "a run hangs"
        time.sleep(0.001)


def wait_for_a_moment(child: Child, folder: Path, draw: random.Random, seconds: float) -> None:
    """Wait for some step, or for some time, and a little more."""
    if draw.random() < 0.3:
        deadline = time.monotonic() + draw.uniform(0, seconds)
        wait_until(lambda: time.monotonic() > deadline, child)
    else:
        step = len(metrics(folder)) + draw.randint(1, 12)
        wait_until(lambda: len(metrics(folder)) >= step, child)
        time.sleep(draw.uniform(0, 0.02))


def live(kind: str | None, folder: Path, text: Path, draw: random.Random, seconds: float) -> int:
    """Start or resume the run in `folder`, and let happen to it what `kind` says."""
    base = ["train", "--output-dir", str(folder)]
    started = (folder / "run.json").exists()
    arguments = [*base, "--resume"] if started else [*base, "--data", str(text), *OPTIONS]
    floor = saved_step(folder) if folder.exists() else 0

    def small_disk() -> None:
        limit = draw.randint(200, 60_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    child = Child(arguments, small_disk if kind == "full disk" else lambda: None)
    if kind == "two writers":
        lock = folder / "run.lock"

        def locked() -> bool:
            with suppress(FileNotFoundError):
                return lock.read_text().startswith(f"{child.pid} ")
            return False

        wait_until(locked, child)
        status, printed = Child([*base, "--resume"]).end()
        if child.running() and locked():
            assert status == 2, (status, printed)
            assert f"written by process {child.pid}" in printed, printed
        wait_for_a_moment(child, folder, draw, seconds)
        os.kill(child.pid, signal.SIGKILL)
    elif kind is not None and kind.startswith("SIG"):
        wait_for_a_moment(child, folder, draw, seconds)
        os.kill(child.pid, getattr(signal, kind))
    status, printed = child.end()
    check(kind, status, printed, folder, floor)
    return status


def check(kind: str | None, status: int, printed: str, folder: Path, floor: int) -> None:
    """What has to hold after a run ended, however it did."""
    allowed = {
        None: {0},
        "SIGKILL": {0, -signal.SIGKILL},
        "two writers": {0, -signal.SIGKILL},
        "SIGTERM": {0, 128 + signal.SIGTERM, -signal.SIGTERM},
        "SIGINT": {0, 128 + signal.SIGINT},
        "full disk": {0, 2},
    }[kind]
    assert status in allowed, (kind, status, printed)
    assert "Traceback" not in printed, printed
    saved = saved_step(folder) if folder.exists() else 0
    assert saved >= floor, f"{kind}: the state of step {floor} became one of step {saved}"
    lines = metrics(folder)
    if lines:
        assert saved >= lines[-1]["step"] - SAVE_INTERVAL, (kind, saved, lines[-1]["step"])
    if (folder / "model.safetensors").exists():
        load_model(folder)
    last = (printed.splitlines() or [""])[-1]
    if "saved at step" in last:
        assert f"step {saved};" in last and "--resume" in last, (saved, last)
    if status == 2:
        assert str(folder) in last, last
    if status == 0:
        assert saved == STEPS, (kind, saved)


def soak(root: Path, kills: int, seed: int) -> Counter:
    """Kill runs under `root` so many times; returns how often each kind came."""
    draw, counts = random.Random(seed), Counter()
    text = root / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 30)
    whole, begin = root / "whole", time.monotonic()
    live(None, whole, text, draw, 0)
    seconds = time.monotonic() - begin
    expected, weights = curve(whole), (whole / "model.safetensors").read_bytes()
    number = 0
    while counts.total() < kills:
        folder, number = root / f"run{number}", number + 1
        status = -1
        while status != 0:
            kind = draw.choice(KINDS) if counts.total() < kills else None
            status = live(kind, folder, text, draw, seconds)
            counts[kind] += kind is not None
        assert curve(folder) == expected, difference(curve(folder), expected)
        assert (folder / "model.safetensors").read_bytes() == weights
        assert names(folder) == names(whole), (kind, names(folder), names(whole))
        kept = list(States(folder).kept())
        assert all(STEPS - SAVE_INTERVAL <= step < STEPS for step in kept), (kind, kept)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    print(f"{given.kills} kills, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        counts = soak(Path(folder), given.kills, seed)
    print("nothing lost:", ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
