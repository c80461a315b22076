"""Files that a benchmark leaves: whole, or a row at a time."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at `path`: it holds the old text or all of the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fresh.write_text(text, encoding="utf-8", newline="")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    """Replace the CSV at `path` with these rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def append_row(path: Path, columns: Sequence[str], row: dict[str, object]) -> None:
    """Add a row to the CSV at `path`, which is on the disk when this returns.

    What is left of a row that a process was killed over stays a line of its own.
    """
    before = path.read_bytes() if path.exists() else b""
    text = io.StringIO()
    if before and not before.endswith(b"\n"):
        text.write("\r\n")
    writer = csv.DictWriter(text, columns, restval="")
    if not before:
        writer.writeheader()
    writer.writerow(row)
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of the CSV at `path`; none if there is no such file.

    A row that a process was killed over has fewer cells, and is left out.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]
