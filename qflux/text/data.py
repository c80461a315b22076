"""Texts split by whole works, windows for training, and n-gram baselines."""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..optional import require

DEFAULT_TEXT = Path(__file__).parent / "works" / "shakespeare"
IGNORED_LABEL = -100
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
    _check_share(validation_share)
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
    _check_share(validation_share)
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


def _check_share(validation_share: float) -> None:
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must lie between 0 and 1, got {validation_share!r}")


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


class TrainingWindows:
    """Batches of windows in shuffled epochs, a pure function of (seed, step).

    In each epoch every work is cut into windows at a fresh random phase, and the windows of all
    works are shuffled; none spans two works. Because a batch depends on the seed and the step
    alone, a resumed run continues with the very batches it would have seen.

    Args:
        works: token ids `(N,)` of each work.
        length: tokens in a window, >= 2.
        batch_size: windows in a batch, >= 1.
        seed: of the shuffling.

    A work shorter than a window is left out. Where an epoch has fewer windows than a batch, they
    repeat.

    Raises:
        ValueError: no work is as long as a window.
    """

    def __init__(self, works: Sequence[Tensor], length: int, batch_size: int, seed: int) -> None:
        self.works = [work for work in works if len(work) >= length]
        self.length, self.batch_size, self.seed = length, batch_size, seed
        if not self.works:
            longest = max((len(work) for work in works), default=0)
            raise ValueError(
                f"the training text is too short for context_length {length}: "
                f"its longest work has {longest} tokens"
            )
        # As many windows as there are at any phase, so that none comes twice in an epoch.
        windows = sum((len(work) - self._slack(work)) // length for work in self.works)
        self.steps_per_epoch = max(1, windows // batch_size)
        self._tokens = torch.cat(self.works)
        self._epoch = -1

    def batch(self, step: int) -> Tensor:
        """The `(batch_size, length)` token ids of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._starts, self._epoch = self._shuffled_starts(epoch), epoch
        at = torch.arange(self.batch_size) + position * self.batch_size
        starts = self._starts[at % len(self._starts)]
        return self._tokens[starts[:, None] + torch.arange(self.length)]

    def _slack(self, work: Tensor) -> int:
        """The largest phase at which the windows of a work may start."""
        return min(self.length - 1, len(work) - self.length)

    def _shuffled_starts(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        starts, offset = [], 0
        for work in self.works:
            phase = int(torch.randint(self._slack(work) + 1, (), generator=generator))
            starts.append(
                torch.arange(offset + phase, offset + len(work) - self.length + 1, self.length)
            )
            offset += len(work)
        starts = torch.cat(starts)
        return starts[torch.randperm(len(starts), generator=generator)]


def evaluation_batches(
    works: Sequence[Tensor], length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows that predict every token of every work but its first exactly once.

    Neighbouring windows share one token, the last label of one and the first input of the next.
    A last window that is too short is padded at the right with id 0 and the label that the loss
    ignores.

    Yields:
        input ids and labels, `(up to batch_size, length)` each.
    """
    rows = [
        work[start : start + length]
        for work in works
        for start in range(0, len(work) - 1, length - 1)
    ]
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        ids = torch.zeros(len(chunk), length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED_LABEL)
        for row, tokens in enumerate(chunk):
            ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
        yield ids, labels


def ngram_losses(
    train: Sequence[Tensor], validation: Sequence[Tensor], vocab_size: int
) -> dict[str, float]:
    """Loss of counting models on the tokens that `evaluation_batches` scores, in nats a token.

    "unigram" is the add-one estimate p(b) = (n(b) + 1) / (N + V). "bigram" interpolates with it as
    Witten and Bell do: p(b|a) = (n(ab) + T(a) p(b)) / (n(a) + T(a)), with T(a) the number of
    different tokens seen after a. Pairs are counted within works.

    Args:
        train, validation: token ids `(N,)` of each work.
        vocab_size: V.

    Returns:
        {"unigram": loss, "bigram": loss}.
    """
    singles = torch.zeros(vocab_size, dtype=torch.float64)
    for work in train:
        singles += torch.bincount(work, minlength=vocab_size)
    unigram = (singles + 1) / (singles.sum() + vocab_size)

    # Only pairs that occur are stored, so that large vocabularies cost no V x V table.
    codes, counts = torch.cat([_pair_codes(work, vocab_size) for work in train]).unique(
        return_counts=True
    )
    first = codes.div(vocab_size, rounding_mode="floor")
    followers = torch.bincount(first, minlength=vocab_size)
    total = torch.bincount(first, weights=counts.double(), minlength=vocab_size) + followers

    wanted = torch.cat([_pair_codes(work, vocab_size) for work in validation])
    before, after = wanted.div(vocab_size, rounding_mode="floor"), wanted % vocab_size
    place = torch.searchsorted(codes, wanted).clamp(max=max(0, len(codes) - 1))
    seen = torch.zeros(len(wanted), dtype=torch.float64)
    if len(codes):
        seen = torch.where(codes[place] == wanted, counts[place].double(), seen)
    interpolated = (seen + followers[before] * unigram[after]) / total[before].clamp(min=1)
    bigram = torch.where(total[before] > 0, interpolated, unigram[after])
    return {
        "unigram": -unigram[after].log().mean().item(),
        "bigram": -bigram.log().mean().item(),
    }


def _pair_codes(work: Tensor, vocab_size: int) -> Tensor:
    """The pairs (a, b) of neighbours as a V + b."""
    return work[:-1] * vocab_size + work[1:]
