"""Tables and tensors as files, and a folder that has all of them or none."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from ..analysis.tables import Table
from ..train.folder import check_free


def csv_bytes(table: Table) -> bytes:
    """A table as CSV, UTF-8: a header, then a line a row, numbers to nine digits."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*(column.tolist() for column in table.values()), strict=True):
        writer.writerow([f"{v:.9g}" if isinstance(v, float) else v for v in row])
    return stream.getvalue().encode()


def json_bytes(value: Any) -> bytes:
    """A value as JSON, what is not finite as null."""
    return (json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file."""
    return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_target(target: Path, overwrite: bool, model_path: Path | None = None) -> None:
    """Raise unless a report may be written to `target`.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty without `overwrite`.
        ValueError: it is the model's own folder.
    """
    if model_path is not None and target.exists() and model_path.exists() and (
        os.path.samefile(target, model_path)
    ):  # fmt: skip
        raise ValueError(
            f"output_dir must not be the model's own folder {str(model_path)!r}: name another one"
        )
    check_free(target, overwrite)


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write files, by their names with folders, into `target`: all of them, or none.

    They are made in a folder beside it and renamed. In a folder that has files already, those of
    the same names are replaced, one after another, and others stay.

    Raises:
        OSError: they cannot be written; names the file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        for name, content in files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.write_bytes(content)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(target / name)) from None
        if target.exists() and any(target.iterdir()):
            for name in files:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(made / name, target / name)
        else:
            # A folder for temporary files is closed to others, a new one is as the user has it.
            target.mkdir(exist_ok=True)
            made.chmod(target.stat().st_mode & 0o777)
            target.rmdir()
            made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
