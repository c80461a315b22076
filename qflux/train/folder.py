"""The folder of a run: one writer, nothing of anybody else's overwritten, no leftovers."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import CONFIG_FILE, MODEL_FILE, VOCABULARY_FILE
from .metrics import METRICS_FILE
from .record import RUN_FILE
from .states import States

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LOCK_FILE = "run.lock"
OWN_FILES = (RUN_FILE, CONFIG_FILE, VOCABULARY_FILE, MODEL_FILE, METRICS_FILE)
_LEFTOVER = re.compile(r"\.(?:.+)\.\d+\.tmp")
_LEFTOVER_STATE = re.compile(r"\.training_state-\d+\.tmp")


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make the folder and be its only writer meanwhile.

    The system releases the lock when the process ends, however it ends.

    Raises:
        FileExistsError: another process is writing; names its number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    if fcntl is None:
        yield
        return
    handle = _locked(path, folder)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
        remove_leftovers(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path, folder: Path) -> int:
    """A handle of the locked file at `path`."""
    assert fcntl is not None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace") or "unknown"
            os.close(handle)
            raise FileExistsError(
                f"output_dir {str(folder)!r} is being written by process {owner}: "
                f"wait for its end, stop it, or choose another folder"
            ) from None
        except OSError as error:
            # A file system without locks, some network drives say.
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                return handle
            os.close(handle)
            raise
        # Whoever held the lock before has deleted the file, and another may be there by now.
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            return handle
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of savings that were killed."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and _LEFTOVER_STATE.fullmatch(path.name):
            shutil.rmtree(path)
        elif _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def check_vacant(folder: Path) -> None:
    """Raise if a new run in `folder` would replace something.

    Raises:
        FileExistsError: what is there, and what to do.
    """
    remedy = "choose another folder, or replace it with --overwrite"
    if States(folder).exist():
        raise FileExistsError(
            f"output_dir {str(folder)!r} holds a run already: resume it with --resume, {remedy}"
        )
    there = [name for name in OWN_FILES if (folder / name).exists()]
    if RUN_FILE in there and MODEL_FILE not in there:
        raise FileExistsError(
            f"output_dir {str(folder)!r} holds a run that was stopped before it saved a state: "
            f"resume it with --resume to begin again, {remedy}"
        )
    if there:
        raise FileExistsError(
            f"output_dir {str(folder)!r} has {', '.join(there)} already: {remedy}"
        )


def clear(folder: Path) -> None:
    """Delete the run or the model in `folder`."""
    States(folder).remove()
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def forget_trackers(folder: Path) -> None:
    """Delete what trackers left in `folder`, so that they begin a new run."""
    events = (folder / "tensorboard").glob("events.out.tfevents.*")
    for path in (folder / "wandb_id", *events):
        path.unlink(missing_ok=True)


def check_free(target: Path, overwrite: bool) -> None:
    """Raise unless results may be written to `target`.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty without `overwrite`.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"output_dir must be a folder, and {str(target)!r} is a file")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise FileExistsError(
            f"output_dir {str(target)!r} is not empty: name a new folder, or replace what has the "
            "same names there with --overwrite"
        )
