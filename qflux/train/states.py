"""Training states on disk: the latest, and some before it to go back to."""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import first_line, write_atomically
from .ranks import Ranks
from .sharded import SHARDS, read_plain, write_shards

STATE_FILE = "training_state.pt"
_KEPT = re.compile(r"training_state-(\d+)\.pt")
_SHARDED = re.compile(r"training_state-(\d+)")
# What a state of any version has.
_KEYS = {
    "config", "vocabulary", "model", "learner", "random_state", "step", "seconds",
    "validation_loss", "best_validation_loss", "stale",
}  # fmt: skip


class States:
    """The training states in a folder.

    The latest is `training_state.pt`; the one that it replaces becomes `training_state-STEP.pt`.
    Those of several processes are folders `training_state-STEP`, and the last of them the latest.
    Whatever happens while a state is saved, the folder holds the old ones or all of the new.

    Args:
        folder: where they are.
        keep: how many to keep, >= 1, the latest included.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep
        self._latest: int | None = None
        self._writing: Future[None] | None = None

    def kept(self) -> dict[int, Path]:
        """The states before the latest, by step in ascending order."""
        found = {
            int(match.group(1)): path
            for path in self.folder.glob("training_state-*")
            if (match := (_SHARDED if path.is_dir() else _KEPT).fullmatch(path.name))
        }
        return dict(sorted(found.items()))

    def exist(self) -> bool:
        """Whether there is a state to resume from."""
        return (self.folder / STATE_FILE).is_file() or bool(self.kept())

    def save(self, state: dict[str, Any]) -> None:
        """Write a state of tensors and plain values; it becomes the latest."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.folder / STATE_FILE
        if self.keep > 1 and self._latest not in (None, state["step"]) and path.is_file():
            _give_second_name(path, self.folder / f"training_state-{self._latest}.pt")
        write_atomically(path, buffer.getvalue())
        self._latest = state["step"]
        older = list(self.kept().values())
        for path in older[: max(0, len(older) - (self.keep - 1))]:
            _delete(path)

    def save_shards(self, tensors: dict[str, Any], plain: dict[str, Any], ranks: Ranks) -> None:
        """Write a state of which every process has a part; it becomes the latest.

        Beside training, if the processes have a group for that; one at a time.

        Raises:
            OSError: this state or the one before it could not be written; in all processes.
        """
        self.finish(ranks)
        before, self._latest = self._latest, plain["step"]

        def complete() -> None:
            whole = self.folder / STATE_FILE
            if whole.is_file() and before is not None and self.keep > 1:
                os.replace(whole, self.folder / f"training_state-{before}.pt")
            whole.unlink(missing_ok=True)
            older = list(self.kept().values())
            for path in older[: max(0, len(older) - self.keep)]:
                _delete(path)

        path = self.folder / f"training_state-{plain['step']}"
        self._writing = write_shards(path, tensors, plain, ranks, complete)

    @property
    def failed(self) -> bool:
        """Whether the state that is being written will not be there."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def finish(self, ranks: Ranks) -> None:
        """Wait for the state that is being written, if there is one.

        Raises:
            OSError: it could not be written; in all processes, each of which has to call this.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with ranks.together():
                writing.result()

    @contextmanager
    def finishing(self, ranks: Ranks) -> Iterator[None]:
        """After this no state is being written, however it ends."""
        try:
            yield
        except BaseException:
            # Other processes may be gone: what can be awaited is this one's part.
            if self._writing is not None:
                wait([self._writing])
            raise
        self.finish(ranks)

    def load(self, step: int | None = None) -> dict[str, Any]:
        """Read the latest state, or that of `step`, on the CPU.

        Raises:
            FileNotFoundError: there is no training state, or none of that step; says which are.
            ValueError: the file is not a training state, or broken.
        """
        latest, kept = self.folder / STATE_FILE, self.kept()
        if step in kept:
            state = _read(kept[step], kept)
        elif latest.is_file():
            state = _read(latest, kept)
            # Several processes were killed before they took away what theirs replaces.
            if step is None and state["step"] < max(kept, default=0):
                state = _read(kept[max(kept)], kept)
        elif kept and step is None:
            state = _read(list(kept.values())[-1], kept)
        else:
            state = None
        if state is None and not kept:
            raise FileNotFoundError(f"nothing to resume: {str(self.folder)!r} has no {STATE_FILE}")
        if state is None or step not in (None, state["step"]):
            there = [*kept, *([] if state is None else [state["step"]])]
            raise FileNotFoundError(
                f"resume_step must be the step of a state in {str(self.folder)!r}, "
                f"{', '.join(map(str, there))}, got {step}"
            )
        self._latest = state["step"]
        return state

    def go_back(self, step: int) -> None:
        """Make the kept state of `step` the latest one and forget those after it."""
        kept = self.kept()
        if step in kept and kept[step].is_dir():
            (self.folder / STATE_FILE).unlink(missing_ok=True)
        elif step in kept:
            os.replace(kept[step], self.folder / STATE_FILE)
        for other, path in kept.items():
            if other > step:
                _delete(path)

    def remove(self) -> None:
        """Delete all states."""
        for path in (*self.kept().values(), self.folder / STATE_FILE):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path, kept: dict[int, Path]) -> dict[str, Any]:
    others = [str(step) for step, file in kept.items() if file != path]
    remedy = f"resume_step {others[-1]} goes back to a kept state" if others else "no other is kept"
    if path.is_dir():
        state = read_plain(path)
        if not set(state) >= _KEYS - {"model", "learner"}:
            raise ValueError(f"{str(path)!r} is not a training state; {remedy}")
        return {**state, SHARDS: str(path)}
    with open(path, "rb") as stream:
        try:
            # PyTorch writes checksums and does not read them.
            with zipfile.ZipFile(stream) as archive:
                if (name := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {name!r} is wrong")
            stream.seek(0)
            state = torch.load(stream, map_location="cpu", weights_only=True)
        # A broken archive raises errors of zip, pickle, PyTorch and the system alike.
        except Exception as error:
            raise ValueError(
                f"{str(path)!r} cannot be read ({first_line(error)}); {remedy}"
            ) from None
    if not isinstance(state, dict) or not set(state) >= _KEYS:
        raise ValueError(f"{str(path)!r} is not a training state; {remedy}")
    return state


def _give_second_name(path: Path, name: Path) -> None:
    """Let the file at `path` be at `name` too."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:  # a file system without links
        temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
        shutil.copyfile(path, temporary)
        os.replace(temporary, name)


def all_finite(state: object) -> bool:
    """Whether no tensor in these nested dictionaries and lists holds NaN or an infinity."""
    if isinstance(state, Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    if isinstance(state, dict):
        return all(map(all_finite, state.values()))
    return not isinstance(state, list | tuple) or all(map(all_finite, state))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the random numbers of the CPU and of a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
