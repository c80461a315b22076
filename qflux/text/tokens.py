"""A text as token ids: in memory where it is small, else in a file that is mapped.

The file is made once, beside the run, and used again as long as text, division and vocabulary are
the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from tqdm import tqdm

from qflux_kernels.checks import check_integer

from .data import TextSplit
from .files import PIECE, some_of
from .sources import Measure, TextSource, Work
from .vocabulary import UnknownCharacterError, Vocabulary
from .windows import evaluation_windows, predicted_tokens

TOKENS_FILE = "tokens.bin"
# Fewer bytes of tokens stay in memory: encoding them again costs less than a file in the folder.
MAPPED_BYTES = 2**23
_MAGIC = b"QFLUXTOK"
_VERSION = 1
# Two changes of a file in so short a time may leave the same time of change.
_CLOCK_NS = 2_000_000_000


@dataclass(frozen=True)
class WorkRecord:
    """What a work is: its part "train" or "validation", its sizes, and the digest of its text."""

    name: str
    part: str
    characters: int
    bytes: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class EncodedText:
    """The token ids of a text to train on and of one to validate on; `encode_text` makes one.

    Args:
        works: one record for each work, those to train on first.
        train, validation: token ids `(N,)` of each work, in the smallest integer type that holds
            the vocabulary.
        separator: token ids `(n,)`, int64, to put between works that are joined; may be empty.
        unknown: tokens that stand for text which the vocabulary cannot spell.
        unused: names of what was found beside the works and is not part of the text.
        path: the file that the ids are mapped from; None: they are in memory.
    """

    works: tuple[WorkRecord, ...]
    train: Sequence[Tensor]
    validation: Sequence[Tensor]
    separator: Tensor
    unknown: int = 0
    unused: tuple[str, ...] = ()
    path: Path | None = field(default=None, compare=False)

    def part(self, part: str) -> list[WorkRecord]:
        """The records of "train" or "validation"."""
        return [work for work in self.works if work.part == part]

    def tokens(self, part: str) -> int:
        """The number of tokens of "train" or "validation"."""
        return sum(work.tokens for work in self.part(part))

    @property
    def held_out_share(self) -> float:
        """Share of the tokens that is held out."""
        held_out = self.tokens("validation")
        return held_out / (self.tokens("train") + held_out)

    @property
    def sha256(self) -> str:
        """A digest of the whole text and its division, whatever the files are called."""
        whole = hashlib.sha256()
        for work in self.works:
            whole.update(f"{work.part} {work.sha256}\n".encode())
        return whole.hexdigest()

    def describe(self, most: int = 1000) -> dict[str, Any]:
        """For the record of a run: the digest, and the sizes of each part and its first works."""
        parts = {}
        for part in ("train", "validation"):
            works = self.part(part)
            parts[part] = {
                "works": len(works),
                "characters": sum(work.characters for work in works),
                "tokens": sum(work.tokens for work in works),
                "first": [
                    {"name": work.name, "characters": work.characters, "sha256": work.sha256}
                    for work in works[:most]
                ],
            }
        return {"sha256": self.sha256, **parts}

    def report(self, length: int, eval_tokens: int | None = None) -> list[tuple[str, str]]:
        """What is trained on, what is held out and what is not used, as headings and lines.

        Args:
            length: tokens in a window.
            eval_tokens: as `validation_sample` takes it.
        """
        train, held_out = self.part("train"), self.part("validation")
        characters = sum(work.characters for work in train)
        rows = [
            (
                "text",
                f"{_count(len(train), 'work')}, {characters:,} characters, "
                f"{self.tokens('train'):,} tokens to train on",
            ),
            (
                "held out",
                f"{self.tokens('validation'):,} tokens ({self.held_out_share:.1%}): "
                f"{some_of([work.name for work in held_out])}",
            ),
        ]
        if eval_tokens is not None and eval_tokens < predicted_tokens(self.validation):
            rows.append(("validated", f"on {eval_tokens:,} of these, evenly spread (eval_tokens)"))
        short = sum(work.tokens < length for work in train)
        if short and len(train) > 1:
            by = "separated" if len(self.separator) else "without a separator"
            rows.append(("joined", f"{_count(short, 'work')} shorter than {length} tokens, {by}"))
        if self.unknown:
            total = sum(work.tokens for work in self.works)
            rows.append(("unknown", f"{self.unknown:,} tokens ({self.unknown / total:.2%}): text "
                                    "that the vocabulary cannot spell"))  # fmt: skip
        if self.unused:
            rows.append(("not used", some_of(self.unused)))
        return rows

    def validation_sample(self, eval_tokens: int | None, length: int) -> list[Tensor]:
        """What to validate on: the held-out works, or windows of them, evenly spread.

        The windows are some of those that `evaluation_batches` makes of the works, the same ones
        each time, so that losses can be compared.

        Args:
            eval_tokens: at most so many tokens are predicted, >= 1, but at least one window; None:
                all.
            length: tokens in a window, >= 2.
        """
        return sample_windows(self.validation, eval_tokens, length)


def sample_windows(works: Sequence[Tensor], eval_tokens: int | None, length: int) -> list[Tensor]:
    """The works, or some windows of theirs; see `EncodedText.validation_sample`."""
    if eval_tokens is not None:
        check_integer("eval_tokens", eval_tokens, 1)
    if eval_tokens is None or predicted_tokens(works) <= eval_tokens:
        return list(works)
    windows = torch.tensor([evaluation_windows(work, length) for work in works])
    ends = windows.cumsum(0)
    wanted = min(max(1, eval_tokens // (length - 1)), int(ends[-1]))
    # The middles of equal parts of all windows.
    chosen = ((2 * torch.arange(wanted) + 1) * ends[-1]).div(2 * wanted, rounding_mode="floor")
    owners = torch.searchsorted(ends, chosen, right=True)
    starts = (chosen - (ends - windows)[owners]) * (length - 1)
    return [
        works[work][start : start + length]
        for work, start in zip(owners.tolist(), starts.tolist(), strict=True)
    ]


def encode_text(
    text: TextSplit | TextSource,
    vocabulary: Vocabulary,
    folder: str | Path | None = None,
    *,
    progress: bool = False,
) -> EncodedText:
    """The token ids of a text.

    Up to `MAPPED_BYTES` of ids are kept in memory. More go to `tokens.bin` in `folder`, and are
    mapped into memory from there. If the file is there already and is of the same text, division
    and vocabulary, it is used: files of unchanged size and times are not read again, other works
    are read and compared by their digest.

    Args:
        text: what to encode.
        vocabulary: of the tokens.
        folder: of the run; None: the ids are in a file without a name, which goes with the process.
        progress: show how many characters have been encoded, if standard error is a terminal.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: text that cannot be read or has a character without an id (named, with its
            work), a file that changed meanwhile, or a `tokens.bin` of another program.
    """
    folder = None if folder is None else Path(folder)
    if folder is not None:
        found = _read_file(folder / TOKENS_FILE, text, vocabulary)
        if found is not None:
            return found
    started = time.time_ns()
    train, validation = text.parts
    encoder = _Encoder(vocabulary, folder)
    try:
        with tqdm(
            desc="encoding",
            unit=" characters",
            unit_scale=True,
            delay=1,
            disable=None if progress else True,
        ) as bar:
            works = [encoder.add(work, "train", bar) for work in train]
            works += [encoder.add(work, "validation", bar) for work in validation]
        if not text.unchanged:
            raise ValueError("the text was changed while it was read; start again when it is done")
        head = {
            "version": _VERSION,
            "vocabulary": _digest(vocabulary),
            "stamp": text.stamp,
            "started": started,
            "unknown": encoder.unknown,
            "unused": [*text.unused, *(f"{name} (empty)" for name in text.empty)],
            "works": [list(asdict(work).values()) for work in works],
        }
        tokens, path = encoder.finish(head)
    except BaseException:
        encoder.discard()
        raise
    return _encoded(head, tokens, vocabulary, path)


def token_type(size: int) -> torch.dtype:
    """The smallest integer type that holds the ids below `size`."""
    if size <= 2**8:
        return torch.uint8
    return torch.uint16 if size <= 2**16 else torch.int32


class _Encoder:
    """Collects ids in memory, and from `MAPPED_BYTES` on in a file."""

    def __init__(self, vocabulary: Vocabulary, folder: Path | None) -> None:
        self.vocabulary, self.folder = vocabulary, folder
        self.dtype = token_type(vocabulary.size)
        self.unknown = 0
        self._kept: list[Tensor] = []
        self._kept_bytes = 0
        self._stream: IO[bytes] | None = None
        self._path = Path()
        self._count = self._checksum = 0

    def add(self, work: Work, part: str, bar: tqdm) -> WorkRecord:
        """Encode a work."""
        measure, before = Measure(), self._count

        def measured() -> Iterator[str]:
            for piece in work.read():
                measure.add(piece)
                bar.update(len(piece))
                yield piece

        try:
            for ids in self.vocabulary.encode_pieces(measured()):
                self._write(ids)
        except UnknownCharacterError as error:
            raise UnknownCharacterError(
                f"work {work.name!r}: {error}; the vocabulary 'byte' takes every text"
            ) from None
        return WorkRecord(
            work.name,
            part,
            measure.characters,
            measure.bytes,
            self._count - before,
            measure.sha256,
        )

    def _write(self, ids: Tensor) -> None:
        if self.vocabulary.unknown_id is not None:
            self.unknown += int((ids == self.vocabulary.unknown_id).sum())
        ids = ids.to(self.dtype)
        self._count += len(ids)
        if self._stream is None:
            self._kept.append(ids)
            self._kept_bytes += ids.nbytes
            if self._kept_bytes > MAPPED_BYTES:
                self._open()
        else:
            self._store(ids)

    def _open(self) -> None:
        if self.folder is None:
            handle, name = tempfile.mkstemp(prefix="qflux-", suffix=".tokens")
            self._path, self._stream = Path(name), os.fdopen(handle, "wb")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self.folder / f".{TOKENS_FILE}.{os.getpid()}.tmp"
            self._stream = open(self._path, "wb")  # noqa: SIM115 (finish and discard close it)
        for ids in self._kept:
            self._store(ids)
        self._kept = []

    def _store(self, ids: Tensor) -> None:
        assert self._stream is not None
        data = ids.numpy().data
        try:
            self._stream.write(data)
        except OSError as error:
            raise _named(error, self._path) from None
        self._checksum = zlib.crc32(data, self._checksum)

    def finish(self, head: dict[str, Any]) -> tuple[Tensor, Path | None]:
        """All ids, and the file that they are mapped from."""
        if self._stream is None:
            empty = torch.zeros(0, dtype=self.dtype)
            return torch.cat(self._kept) if self._kept else empty, None
        tail = json.dumps({**head, "count": self._count, "crc32": self._checksum}).encode()
        try:
            # At the end, because it is known last, and so that ids begin at the first byte.
            self._stream.write(tail + len(tail).to_bytes(8, "little") + _MAGIC)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        except OSError as error:
            raise _named(error, self._path) from None
        if self.folder is None:
            tokens = _map(self._path, self._count, self.dtype)
            # The mapping outlives the name.
            self.discard()
            return tokens, None
        path = self.folder / TOKENS_FILE
        os.replace(self._path, path)
        return _map(path, self._count, self.dtype), path

    def discard(self) -> None:
        """Remove the file."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def _named(error: OSError, path: Path) -> OSError:
    """The same error with the name of the file, which writing does not give."""
    return OSError(error.errno, error.strerror, str(path))


def _map(path: Path, count: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype)


def _digest(vocabulary: Vocabulary) -> str:
    return hashlib.sha256(vocabulary.to_json().encode(errors="surrogatepass")).hexdigest()


def _encoded(
    head: dict[str, Any], tokens: Tensor, vocabulary: Vocabulary, path: Path | None
) -> EncodedText:
    works = tuple(WorkRecord(*row) for row in head["works"])
    ids = tokens.split([work.tokens for work in works]) if works else ()
    count = sum(work.part == "train" for work in works)
    return EncodedText(
        works,
        ids[:count],
        ids[count:],
        vocabulary.separator,
        head["unknown"],
        tuple(head["unused"]),
        path,
    )


def _read_file(
    path: Path, text: TextSplit | TextSource, vocabulary: Vocabulary
) -> EncodedText | None:
    """The ids in `path` if they are those of this text; None if there are none or others."""
    if not path.exists():
        return None
    with open(path, "rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 16))
        size, magic = int.from_bytes(stream.read(8), "little"), stream.read(8)
        if magic != _MAGIC or size > end - 16:
            raise ValueError(
                f"{str(path)!r} is not a whole file of tokens of this program; move it away, and "
                "the text is encoded again"
            )
        stream.seek(end - 16 - size)
        try:
            head = json.loads(stream.read(size))
            known = head["version"] == _VERSION and head["vocabulary"] == _digest(vocabulary)
        except (ValueError, KeyError, TypeError):
            return None
        dtype = token_type(vocabulary.size)
        if not known or head["count"] * dtype.itemsize != end - 16 - size:
            return None
        if not _same_text(head, text) or _checksum(stream, end - 16 - size) != head["crc32"]:
            return None
    return _encoded(head, _map(path, head["count"], dtype), vocabulary, path)


def _same_text(head: dict[str, Any], text: TextSplit | TextSource) -> bool:
    """Whether the ids are of this text: by size and times of the files, or by reading them."""
    # What was changed just before it was read may have changed after it at the same time.
    settled = text.changed_at < head["started"] - _CLOCK_NS
    stamp = json.loads(json.dumps(text.stamp))
    if settled and stamp is not None and stamp == head["stamp"]:
        return True
    records = [WorkRecord(*row) for row in head["works"]]
    parts = dict(zip(("train", "validation"), text.parts, strict=True))
    works = [(part, work) for part, found in parts.items() for work in found]
    if [(record.part, record.name) for record in records] != [
        (part, work.name) for part, work in works
    ]:
        return False
    for record, (_, work) in zip(records, works, strict=True):
        measure = Measure()
        for piece in work.read():
            measure.add(piece)
        if measure.sha256 != record.sha256:
            return False
    return True


def _checksum(stream: IO[bytes], size: int) -> int:
    stream.seek(0)
    found = 0
    while size and (data := stream.read(min(size, PIECE))):
        found = zlib.crc32(data, found)
        size -= len(data)
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
