"""Works that are read when they are needed, and which of them are held out."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qflux_kernels.checks import check_real

from ..optional import require
from .files import (
    PIECE,
    TEXT_SUFFIXES,
    check_path,
    code_points,
    file_stamp,
    is_rereadable,
    read_pieces,
    some_of,
    text_files,
)

DEFAULT_TEXT = Path(__file__).parent / "works" / "shakespeare"
DEFAULT_VALIDATION_SHARE = 0.1
_CODE_POINTS = 0x110000
# A part needs a token to predict from and one to predict.
_SHORTEST = 2
# Whole works are held out if together they come this near to the share.
_TOLERANCE = 2.5


@dataclass(frozen=True)
class Work:
    """A text with a name that is read in pieces, as often as it is needed.

    Args:
        name: of the file or of the split of a dataset.
        read: gives the pieces from the start, none of them empty.
        stamp: what changes whenever the text does; None where only reading it tells.
        rows: the same as `read`, for a work that is better cut between its rows.
        file: that it is read from each time.
    """

    name: str
    read: Callable[[], Iterable[str]]
    stamp: list[Any] | None = None
    rows: RowText | None = None
    file: Path | None = None

    def part(self, name: str, start: int, stop: int | None = None) -> Work:
        """The characters from `start` to `stop`, as a work of its own."""

        def read() -> Iterator[str]:
            at = 0
            for piece in self.read():
                if stop is not None and at >= stop:
                    return
                cut = piece[max(0, start - at) : None if stop is None else stop - at]
                at += len(piece)
                if cut:
                    yield cut

        stamp = None if self.stamp is None else [*self.stamp, start, stop]
        return Work(name, read, stamp)


def text_work(name: str, text: str) -> Work:
    """A work that is in memory."""
    return Work(name, lambda: (text[at : at + PIECE] for at in range(0, len(text), PIECE)))


def file_work(file: Path) -> Work:
    """A work that is a file. What can be read only once, such as a pipe, is kept in memory."""
    if not is_rereadable(file):
        return text_work(file.name, "".join(read_pieces(file)))
    return Work(file.name, lambda: read_pieces(file), file_stamp(file), file=file)


class RowText:
    """Rows as one text: joined as they are if the first ends in a line break, else by line breaks.

    Args:
        read: gives the rows from the first, as often as it is called.

    After the text has been read once, `starts` says where rows begin, in characters, and `joint`
    what is between them.
    """

    def __init__(self, read: Callable[[], Iterable[str]]) -> None:
        self._read = read
        self.starts, self.joint = array("q"), ""

    def __call__(self) -> Iterator[str]:
        """The text in pieces."""
        starts, joint, waiting, at, size = array("q"), "", [], 0, 0
        for row in filter(None, self._read()):
            if not starts:
                joint = "" if row.endswith("\n") else "\n"
            else:
                waiting.append(joint)
                at += len(joint)
            starts.append(at)
            waiting.append(row)
            at += len(row)
            size += len(row) + len(joint)
            if size >= PIECE:
                yield "".join(waiting)
                waiting, size = [], 0
        if waiting:
            yield "".join(waiting)
        self.starts, self.joint = starts, joint


class Measure:
    """Counts and hashes text that goes by."""

    def __init__(self) -> None:
        self.characters = self.bytes = 0
        self._hash = hashlib.sha256()

    def add(self, piece: str) -> None:
        """Take a piece in."""
        data = piece.encode()
        self.characters += len(piece)
        self.bytes += len(data)
        self._hash.update(data)

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes so far."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class TextSource:
    """A text to train on and a text to validate on, neither of which has to be in memory.

    `open_text` and `open_dataset` make one.

    Args:
        works: in order.
        separate: works beside these that are held out; then nothing of `works` is.
        share: of the characters to hold out of `works`, in (0, 1).
        named: positions of the works to hold out, instead of a share.
        unused: names of what was found and is not read.
        divided: False: all works are one part, the first.
    """

    works: Sequence[Work]
    separate: Sequence[Work] = ()
    share: float = DEFAULT_VALIDATION_SHARE
    named: Sequence[int] = ()
    unused: Sequence[str] = ()
    divided: bool = True

    @property
    def whole(self) -> TextSource:
        """The same works with nothing held out."""
        return TextSource([*self.works, *self.separate], unused=self.unused, divided=False)

    @property
    def stamp(self) -> list[Any] | None:
        """What changes whenever the text or its division does; None where only reading it tells."""
        parts = [[work.stamp for work in works] for works in (self.works, self.separate)]
        if any(stamp is None for part in parts for stamp in part):
            return None
        names = [[work.name for work in works] for works in (self.works, self.separate)]
        return [names, parts, self.share, list(self.named), self.divided]

    @property
    def unchanged(self) -> bool:
        """Whether the files are those that were opened."""
        works = [*self.works, *self.separate]
        return all(work.file is None or file_stamp(work.file) == work.stamp for work in works)

    @property
    def changed_at(self) -> int:
        """When the files were changed last, in nanoseconds of the clock."""
        stamps = [work.stamp for work in [*self.works, *self.separate] if work.file is not None]
        return max((time for stamp in stamps if stamp for time in stamp[2:4]), default=0)

    @cached_property
    def _scan(self) -> tuple[list[int], str]:
        """Characters of each work, and the different ones there are; reads everything once."""
        seen, lengths = torch.zeros(_CODE_POINTS, dtype=torch.bool), []
        for work in [*self.works, *self.separate]:
            length = 0
            for piece in work.read():
                length += len(piece)
                seen[code_points(piece)] = True
            lengths.append(length)
        return lengths, "".join(map(chr, seen.nonzero().flatten().tolist()))

    @property
    def characters(self) -> str:
        """The different characters of the whole text, in code point order."""
        return self._scan[1]

    @property
    def empty(self) -> list[str]:
        """Names of works without a character; they are left out."""
        works = [*self.works, *self.separate]
        return [work.name for work, length in zip(works, self._scan[0], strict=True) if not length]

    @cached_property
    def parts(self) -> tuple[list[Work], list[Work]]:
        """The works to train on and those held out.

        Without names and without works of their own, whole works are held out from the last one
        backwards, but none that would make the held-out part more than 2.5 times `share`. Where
        that gives less than 0.4 of it, the end of the longest work is held out instead.

        Raises:
            ValueError: no text at all.
        """
        lengths = self._scan[0]
        kept = [i for i in range(len(self.works)) if lengths[i]]
        separate = [
            work
            for work, length in zip(self.separate, lengths[len(self.works) :], strict=True)
            if length
        ]
        if not kept or (self.separate and not separate):
            raise ValueError(f"data {some_of(self.empty)} is empty: it has no text to read")
        if not self.divided:
            return [self.works[i] for i in kept], []
        if self.separate:
            return [self.works[i] for i in kept], separate
        wanted = self.share * sum(lengths)
        held_out = list(self.named) or whole_works_to_hold_out([lengths[i] for i in kept], wanted)
        if not self.named:
            held_out = [kept[at] for at in held_out]
        if held_out:
            train = [self.works[i] for i in kept if i not in set(held_out)]
            validation = [self.works[i] for i in kept if i in set(held_out)]
            if not train or not validation:
                raise ValueError("validation_works must leave text on both sides, got empty works")
            return train, validation
        longest = max(kept, key=lambda i: (lengths[i], i))
        train = [self.works[i] for i in kept]
        at = kept.index(longest)
        train[at], end = _cut_end(self.works[longest], lengths[longest], wanted)
        return train, [end]

    def read_train(self) -> Iterator[str]:
        """The text to train on in pieces, one work after another."""
        for work in self.parts[0]:
            yield from work.read()


def whole_works_to_hold_out(lengths: Sequence[int], wanted: float) -> list[int]:
    """Positions of the works that make up about `wanted` characters; none if no works do.

    The last works come first, and one work is always kept.
    """
    chosen, total = [], 0
    for i in reversed(range(len(lengths))):
        if total >= wanted or len(chosen) == len(lengths) - 1:
            break
        if total + lengths[i] <= _TOLERANCE * wanted:
            chosen.append(i)
            total += lengths[i]
    return sorted(chosen) if _TOLERANCE * total >= wanted else []


def _cut_end(work: Work, length: int, wanted: float) -> tuple[Work, Work]:
    """A work without about `wanted` characters at its end, and these."""
    tail = max(_SHORTEST, min(round(wanted), length - _SHORTEST))
    stop = start = max(1, length - tail)
    if work.rows is not None:
        # The fewest rows that are enough, unless they are far too much.
        row = bisect_right(work.rows.starts, length - wanted) - 1
        if row > 0 and length - work.rows.starts[row] <= _TOLERANCE * wanted:
            start = work.rows.starts[row]
            stop = start - len(work.rows.joint)
    return work.part(work.name, 0, stop), work.part(f"{work.name} (end)", start)


def open_text(
    path: str | Path | None = None,
    *,
    validation_share: float | None = None,
    validation_works: Sequence[str] = (),
) -> TextSource:
    """A text from files, of which nothing is read yet.

    Args:
        path: None for the Shakespeare that comes with the package; or a file; or a folder whose
            `.txt`, `.txt.xz`, `.txt.gz` and `.txt.bz2` files are one work each, hidden ones
            excepted. A folder with the folders `train` and `validation` is divided as it says.
            Files are UTF-8.
        validation_share: share of the characters to hold out, in (0, 1); None: 0.1.
        validation_works: names of the works to hold out, with or without their endings, instead of
            a share.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: no text file, no such work, or a division that contradicts the folder's own.
    """
    share = _check_share(validation_share, validation_works)
    root = DEFAULT_TEXT if path is None else check_path("data", path)
    if not root.exists():
        raise FileNotFoundError(f"data must be an existing file or folder, got {str(root)!r}")
    if not root.is_dir():
        if validation_works:
            raise ValueError(
                f"validation_works must leave a work to train on, but {str(root)!r} is a single "
                "work: use validation_share, or a folder of files"
            )
        return TextSource([file_work(root)], share=share)
    if (root / "train").is_dir() and (root / "validation").is_dir():
        if validation_share is not None or validation_works:
            raise ValueError(
                "validation_share and validation_works cannot be used with data that has the "
                f"folders train and validation, got {str(root)!r}"
            )
        (train, others), (held_out, more) = (
            text_files(root / part) for part in ("train", "validation")
        )
        beside = [
            entry.name
            for entry in sorted(root.iterdir())
            if entry.name not in ("train", "validation") and not entry.name.startswith(".")
        ]
        return TextSource(
            [file_work(file) for file in train],
            [file_work(file) for file in held_out],
            unused=[*beside, *others, *more],
        )
    files, others = text_files(root)
    named = _positions([file.name for file in files], validation_works)
    return TextSource([file_work(file) for file in files], share=share, named=named, unused=others)


def open_dataset(
    name: str,
    config: str | None = None,
    *,
    column: str = "text",
    validation_share: float | None = None,
    validation_works: Sequence[str] = (),
    streaming: bool = False,
) -> TextSource:
    """A text from a dataset of the package `datasets`, read row by row.

    The rows of a split become one work, see `RowText`. The split "validation" is held out, or else
    "test", or else the last rows of "train".

    Args:
        name: name of a Hugging Face dataset, or a local folder of the same layout.
        config: its configuration, "wikitext-103-raw-v1" say.
        column: of the text.
        validation_share: share of the characters of "train" to hold out, in (0, 1), where no split
            is held out; None: 0.1.
        validation_works: names of the splits to hold out, instead of those above.
        streaming: read the rows over the network each time instead of downloading the dataset.

    Raises:
        ImportError: `datasets` is not installed; the message says how to install it.
        FileNotFoundError: no such dataset.
        ValueError: no training split, no such split or column (named), or a dataset that cannot be
            loaded.
    """
    share = _check_share(validation_share, validation_works)
    splits = _load_splits(name, config, streaming)
    if "train" not in splits:
        raise ValueError(f"dataset {name!r} has no split 'train', only {sorted(splits)}")
    held_out = (
        list(dict.fromkeys(validation_works))
        or [part for part in ("validation", "test") if part in splits][:1]
    )
    for split in held_out:
        if split == "train" or split not in splits:
            others = sorted(set(splits) - {"train"})
            raise ValueError(
                f"validation_works must be among {others} of dataset {name!r}, got {split!r}"
            )
    # In this order, so that what is wrong with any split is said.
    works = {split: _split_work(name, split, rows, column) for split, rows in splits.items()}
    if held_out and validation_share is not None:
        raise ValueError(
            f"validation_share cannot be used with dataset {name!r}, whose split "
            f"{held_out[0]!r} is held out"
        )
    unused = [f"split {split!r}" for split in splits if split not in ("train", *held_out)]
    return TextSource([works["train"]], [works[split] for split in held_out], share, unused=unused)


def open_split(
    name: str,
    config: str | None = None,
    *,
    split: str,
    column: str = "text",
    streaming: bool = False,
) -> TextSource:
    """One split of a dataset, undivided; everything else as `open_dataset` has it."""
    splits = _load_splits(name, config, streaming)
    if split not in splits:
        raise ValueError(
            f"dataset_split must be one of {sorted(splits)} of dataset {name!r}, got {split!r}"
        )
    return TextSource([_split_work(name, split, splits[split], column)], divided=False)


def _load_splits(name: str, config: str | None, streaming: bool) -> Mapping[str, Any]:
    """The splits of a dataset."""
    check_path("dataset", name)
    datasets = require("datasets", "a Hugging Face dataset", extra="datasets")
    more = {"streaming": True} if streaming else {}
    with _dataset_errors(name):
        return datasets.load_dataset(name, config, **more)


def _split_work(name: str, split: str, rows: Any, column: str) -> Work:
    """A split of a dataset as a work."""
    # A stream may not know its columns before it is read.
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(
            f"column must be one of {rows.column_names} of split {split!r}, got {column!r}"
        )
    # The package has a number for the content of what it has stored; streams have it for less.
    known = getattr(rows, "_fingerprint", None) if hasattr(rows, "num_rows") else None
    stamp = None if known is None else ["dataset", name, split, column, known]
    text = RowText(_RowReader(name, split, rows, column))
    return Work(split, text, stamp, text)


@dataclass(frozen=True)
class _RowReader:
    """Reads one column of a split from its first row."""

    name: str
    split: str
    rows: Any
    column: str

    def __call__(self) -> Iterator[str]:
        with _dataset_errors(self.name):
            if hasattr(self.rows, "iter"):
                batches = (batch[self.column] for batch in self.rows.iter(batch_size=1000))
            else:
                batches = [self.rows[self.column]]
            for batch in batches:
                for row in batch:
                    if row is not None and not isinstance(row, str):
                        raise ValueError(
                            f"column must hold text, got {self.column!r} of split "
                            f"{self.split!r}, which holds {type(row).__name__}"
                        )
                    yield row or ""


@contextmanager
def _dataset_errors(name: str) -> Iterator[None]:
    """Whatever `datasets` and what it calls raise, on one line with the dataset's name."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"dataset {name!r} cannot be loaded: {error}") from None
    except (ImportError, MemoryError):
        raise
    except ValueError as error:
        if str(error).startswith("column must"):
            raise
        raise _broken_dataset(name, error) from None
    except Exception as error:
        raise _broken_dataset(name, error) from None


def _broken_dataset(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    return ValueError(
        f"dataset {name!r} cannot be loaded ({reason}); check its name, its dataset_config and, "
        "for a local folder, its files"
    )


def _check_share(share: float | None, works: Sequence[str]) -> float:
    """The share to hold out."""
    if share is None:
        return DEFAULT_VALIDATION_SHARE
    check_real("validation_share", share, above=0.0, below=1.0)
    if works:
        raise ValueError(
            "validation_share and validation_works cannot both be given, "
            f"got {share!r} and {list(works)!r}"
        )
    return share


def _positions(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where the wanted works are among the names."""
    found = []
    for name in wanted:
        spellings = {name, *(name + suffix for suffix in TEXT_SUFFIXES)}
        places = [i for i, other in enumerate(names) if other in spellings]
        if not places:
            raise ValueError(f"validation_works must be among {some_of(names, 20)}, got {name!r}")
        found += places
    if wanted and len(set(found)) == len(names):
        raise ValueError(
            f"validation_works must leave a work to train on, got all of {some_of(names, 20)}"
        )
    return sorted(set(found))
