"""Texts in memory, divided into works to train on and works held out for validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .sources import TextSource, Work, open_dataset, open_text, text_work


@dataclass(frozen=True)
class TextSplit:
    """Works for training and works held out for validation, by name."""

    train: dict[str, str]
    validation: dict[str, str]

    @property
    def text(self) -> str:
        """Everything, for counting characters."""
        return "".join([*self.train.values(), *self.validation.values()])

    # What `TextSource` says of a text that is not in memory.
    stamp, unchanged, changed_at = None, True, 0
    unused, empty = (), ()

    @property
    def parts(self) -> tuple[list[Work], list[Work]]:
        """The works to train on and those held out, to be read in pieces."""
        train, validation = (
            [text_work(name, text) for name, text in part.items()]
            for part in (self.train, self.validation)
        )
        return train, validation


def load_text(
    path: str | Path | None = None,
    validation_share: float | None = None,
    validation_works: tuple[str, ...] = (),
) -> TextSplit:
    """Read a text and hold some of it out for validation.

    Whole works are held out where works make up about the share, from the last in the order of
    their names backwards; otherwise the end of the longest work is.

    Args:
        path, validation_share, validation_works: as `qflux.text.sources.open_text` takes them.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: no text files, an empty text, or text that is not UTF-8.
    """
    return _read(
        open_text(path, validation_share=validation_share, validation_works=validation_works)
    )


def load_dataset_text(
    name: str,
    config: str | None = None,
    *,
    column: str = "text",
    validation_share: float | None = None,
) -> TextSplit:
    """Read a text dataset with the package `datasets`.

    Args:
        name, config, column, validation_share: as `qflux.text.sources.open_dataset` takes them.

    Raises:
        ImportError: `datasets` is not installed; the message says how to install it.
        FileNotFoundError: no such dataset.
        ValueError: no training split, no such column (named), or no text.
    """
    split = _read(open_dataset(name, config, column=column, validation_share=validation_share))
    if any(len(text) < 2 for part in (split.train, split.validation) for text in part.values()):
        raise ValueError(f"dataset {name!r} needs text to train on and text to validate on")
    return split


def _read(source: TextSource) -> TextSplit:
    train, validation = source.parts
    return TextSplit(_texts(train), _texts(validation))


def _texts(works: list[Work]) -> dict[str, str]:
    return {work.name: "".join(work.read()) for work in works}
