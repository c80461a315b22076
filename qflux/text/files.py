"""Text files in pieces: compressed or not, UTF-8, and what is wrong with one on one line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

PIECE = 2**20
TEXT_SUFFIXES = tuple(".txt" + packed for packed in ("", ".xz", ".gz", ".bz2"))

# What a file begins with says how it is packed, whatever its name is.
_OPENERS = {b"\xfd7zXZ\0": lzma.open, b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
_FOREIGN = {
    codecs.BOM_UTF32_LE: "is UTF-32; convert it with iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF16_LE: "is UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    b"PK\3\4": "is a zip archive or a word processor's document; unpack it or save it as text",
    b"\x28\xb5\x2f\xfd": "is a zstd archive; unpack it with unzstd",
    b"%PDF": "is a PDF; convert it with pdftotext",
}
_LONGEST_MARK = 6


def check_path(name: str, path: object) -> Path:
    """Return `path` as a Path if it names something; an empty name means no folder.

    Raises:
        TypeError, ValueError: naming the argument `name`.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"{name} must be the name of a file or folder, got {path!r}")
    if not str(path).strip() or "\0" in str(path):
        raise ValueError(f"{name} must be the name of a file or folder, got {str(path)!r}")
    return Path(path)


def is_rereadable(file: Path) -> bool:
    """Whether the file gives the same text each time: pipes and terminals give it once."""
    return stat.S_ISREG(file.stat().st_mode)


def file_stamp(file: Path) -> list[Any]:
    """What changes with a file: its full name, size, times of change and place on the disk."""
    found = file.stat()
    return [
        str(file.resolve()),
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_ino,
    ]


def text_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The text files of a folder by name, and the names of what else is in it.

    Hidden files are neither: they belong to the system or to an editor.

    Raises:
        ValueError: no text file.
    """
    files, others = [], []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.name.endswith(TEXT_SUFFIXES) and not entry.is_dir():
            files.append(entry)
        else:
            others.append(entry.name + "/" * entry.is_dir())
    if not files:
        found = f", only {some_of(others)}" if others else ""
        raise ValueError(
            f"data folder {str(folder)!r} has no file ending in {TEXT_SUFFIXES}{found}; "
            "give the file itself, or rename the files"
        )
    return files, others


def read_pieces(file: Path) -> Iterator[str]:
    """The text of a file in pieces of up to `PIECE` characters, line ends as "\\n".

    xz, gzip and bzip2 are recognised by what the file begins with. A byte order mark is no text.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8 text, or a broken archive; names the file and the remedy.
    """
    read = 0
    try:
        with open(file, "rb") as packed, _unpacked(packed, file) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig")
            while piece := text.read(PIECE):
                if piece.count("\0") > 0.3 * len(piece):
                    raise ValueError(
                        f"data file {str(file)!r} is not UTF-8 text but full of zero bytes; if it "
                        "is UTF-16, convert it with iconv -f UTF-16 -t UTF-8"
                    )
                read += len(piece)
                yield piece
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"data file {str(file)!r} is not UTF-8 text: byte 0x{byte:02x} in the "
            f"{PIECE} characters from character {read} on ({error.reason}); convert it with "
            "iconv -f ENCODING -t UTF-8, such as -f WINDOWS-1252"
        ) from None
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        # The system's errors have a number; those of bz2 and gzip have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"data file {str(file)!r} is not a whole xz, gzip or bzip2 archive ({error}); "
            "get it again"
        ) from None


def _unpacked(stream: io.BufferedReader, file: Path) -> IO[bytes]:
    start = stream.peek(_LONGEST_MARK)[:_LONGEST_MARK]
    for mark, trouble in _FOREIGN.items():
        if start.startswith(mark):
            raise ValueError(f"data file {str(file)!r} is not UTF-8 text: it {trouble}")
    for mark, opener in _OPENERS.items():
        if start.startswith(mark):
            return opener(stream, "rb")
    if start and file.suffix in (".xz", ".gz", ".bz2"):
        raise ValueError(
            f"data file {str(file)!r} is not an archive of the kind {file.suffix[1:]}; "
            "get it again, or rename it if it is plain text"
        )
    return stream


def code_points(text: str) -> Tensor:
    """The number of each character, int64."""
    if not text:
        return torch.zeros(0, dtype=torch.int64)
    if text.isascii():
        return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()
    # Half a surrogate pair can come from a command line; it has a number like any other.
    data = bytearray(text.encode("utf-32-le", "surrogatepass"))
    return torch.frombuffer(data, dtype=torch.int32).long()


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more."""
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
