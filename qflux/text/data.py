"""Texts, split by whole works into one part for training and one for validation."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

from qflux_kernels.checks import check_real

from ..optional import require

DEFAULT_TEXT = Path(__file__).parent / "works" / "shakespeare"
_SUFFIXES = (".txt", ".txt.xz")


@dataclass(frozen=True)
class TextSplit:
    """Works for training and works held out for validation, by name."""

    train: dict[str, str]
    validation: dict[str, str]

    @property
    def text(self) -> str:
        """Everything, for counting characters."""
        return "".join([*self.train.values(), *self.validation.values()])


def load_text(path: str | Path | None = None, validation_share: float = 0.1) -> TextSplit:
    """Read a text and hold whole works of it out for validation.

    Args:
        path: None for the Shakespeare that comes with the package; or a file; or a folder whose
            `.txt` and `.txt.xz` files are one work each. A folder with the folders `train` and
            `validation` is split as it says. Otherwise the last works in the order of their names
            are held out, as few as make up `validation_share` of the characters. Of a single work
            the end is held out. Files are UTF-8.
        validation_share: share of the characters to hold out, in (0, 1).

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: no text files, an empty text, or text that is not UTF-8.
    """
    check_real("validation_share", validation_share, above=0.0, below=1.0)
    root = DEFAULT_TEXT if path is None else Path(path)
    if not root.exists():
        raise FileNotFoundError(f"data must be an existing file or folder, got {str(root)!r}")
    if (root / "train").is_dir() and (root / "validation").is_dir():
        return TextSplit(_read_works(root / "train"), _read_works(root / "validation"))
    works = _read_works(root)
    wanted = validation_share * sum(map(len, works.values()))
    if len(works) == 1:
        [(name, text)] = works.items()
        cut = len(text) - max(1, round(wanted))
        return TextSplit({name: text[:cut]}, {f"{name} (end)": text[cut:]})
    names, held_out = list(works), 0
    while held_out < wanted and len(names) > 1:
        held_out += len(works[names.pop()])
    train = {name: works[name] for name in names}
    return TextSplit(train, {name: works[name] for name in works if name not in train})


def load_dataset_text(
    name: str,
    config: str | None = None,
    *,
    column: str = "text",
    validation_share: float = 0.1,
) -> TextSplit:
    """Read a text dataset with the package `datasets`.

    The rows of a split become one work, joined as they are if they end in line breaks and by line
    breaks otherwise. The split "validation" is held out, or else "test", or else the last rows of
    "train", as few as make up `validation_share` of the characters.

    Args:
        name: name of a Hugging Face dataset, or a local folder of the same layout.
        config: its configuration, "wikitext-103-raw-v1" say.
        column: of the text.
        validation_share: in (0, 1).

    Raises:
        ImportError: `datasets` is not installed; the message says how to install it.
        FileNotFoundError: no such dataset.
        ValueError: no training split, no such column (named), or no text.
    """
    check_real("validation_share", validation_share, above=0.0, below=1.0)
    datasets = require("datasets", "a Hugging Face dataset", extra="datasets")
    try:
        splits = datasets.load_dataset(name, config)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"dataset {name!r} cannot be loaded: {error}") from None
    if "train" not in splits:
        raise ValueError(f"dataset {name!r} has no split 'train', only {sorted(splits)}")
    for split, rows in splits.items():
        if column not in rows.column_names:
            raise ValueError(
                f"column must be one of {rows.column_names} of split {split!r}, got {column!r}"
            )
    rows = [row for row in splits["train"][column] if row]
    held_out = next((part for part in ("validation", "test") if part in splits), None)
    if held_out is not None:
        kept = [row for row in splits[held_out][column] if row]
    else:
        wanted, kept = validation_share * sum(map(len, rows)), []
        while rows and sum(map(len, kept)) < wanted:
            kept.insert(0, rows.pop())
    if not rows or not kept:
        raise ValueError(f"dataset {name!r} needs text to train on and text to validate on")
    return TextSplit({"train": _join(rows)}, {held_out or "train (end)": _join(kept)})


def _join(rows: list[str]) -> str:
    return ("" if rows[0].endswith("\n") else "\n").join(rows)


def _read_works(root: Path) -> dict[str, str]:
    files = [root]
    if root.is_dir():
        files = sorted(file for file in root.iterdir() if file.name.endswith(_SUFFIXES))
        if not files:
            raise ValueError(f"data folder {str(root)!r} has no file ending in {_SUFFIXES}")
    return {file.name: _read(file) for file in files}


def _read(file: Path) -> str:
    try:
        opener = lzma.open if file.suffix == ".xz" else open
        with opener(file, "rt", encoding="utf-8") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {str(file)!r} is not UTF-8 text: {error.reason}") from None
    except lzma.LZMAError as error:
        raise ValueError(f"data file {str(file)!r} is not an xz archive: {error}") from None
    if not text:
        raise ValueError(f"data file {str(file)!r} is empty")
    return text
