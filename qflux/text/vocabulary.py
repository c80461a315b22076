"""What a token is: bytes, characters, or the pieces of a byte-pair encoding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qflux_kernels.checks import check_choice, check_integer

from ..optional import require

if TYPE_CHECKING:
    import tokenizers


class ByteVocabulary:
    """The 256 bytes of UTF-8: every text can be encoded."""

    kind = "byte"
    size = 256

    def encode(self, text: str) -> Tensor:
        """Token ids, int64, one a byte."""
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(_integers(ids)).decode(errors="replace")

    def to_json(self) -> str:
        """A JSON object that `vocabulary_from_json` reads."""
        return json.dumps({"kind": self.kind}) + "\n"


class CharacterVocabulary:
    """The characters of a text, in code point order.

    Args:
        characters: every character that is to have an id; duplicates are dropped.

    Raises:
        ValueError: no characters.
    """

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("characters must contain at least one character, got none")
        self.size = len(self.characters)
        self._ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> Tensor:
        """Token ids, int64, one a character.

        Raises:
            ValueError: a character without an id, named with its place.
        """
        try:
            return torch.tensor([self._ids[character] for character in text], dtype=torch.int64)
        except KeyError as error:
            unknown = error.args[0]
            raise ValueError(
                f"text contains {unknown!r} at position {text.index(unknown)}, which is not one "
                f"of the {self.size} characters of the vocabulary: {self.characters!r}"
            ) from None

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of the ids."""
        return "".join(self.characters[i] for i in _integers(ids))

    def to_json(self) -> str:
        """A JSON object that `vocabulary_from_json` reads."""
        return json.dumps({"kind": self.kind, "characters": self.characters}) + "\n"


class BpeVocabulary:
    """Byte-level byte-pair encoding: every text can be encoded, frequent pieces are one token.

    Needs the package tokenizers. Make one with `train`, or `read` a GPT-2 vocabulary.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """

    kind = "bpe"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, text: str, size: int) -> BpeVocabulary:
        """Merge the most frequent pairs of `text` until there are `size` tokens, >= 256.

        Raises:
            ImportError: tokenizers is not installed; the message says how to install it.
            TypeError, ValueError: no integer, or fewer tokens than there are bytes.
        """
        check_integer("size", size, 256)
        library = _tokenizers()
        tokenizer = _byte_level(library, library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        # Lines, because a piece never spans a line break and one long string is slow.
        tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(tokenizer)

    @classmethod
    def read(cls, path: str | Path) -> BpeVocabulary:
        """Read GPT-2's `vocab.json`, with `merges.txt` beside it, or a `tokenizer.json`.

        Args:
            path: one of these files, or the folder that holds them.

        Raises:
            ImportError: tokenizers is not installed; the message says how to install it.
            FileNotFoundError: a file is missing.
            ValueError: not such a file.
        """
        path = Path(path)
        if path.is_dir():
            path = path / ("vocab.json" if (path / "vocab.json").exists() else "tokenizer.json")
        merges = path.with_name(path.name.replace("vocab.json", "merges.txt"))
        for file in {path, merges}:
            if not file.is_file():
                raise FileNotFoundError(f"vocabulary file {str(file)!r} does not exist")
        library = _tokenizers()
        try:
            if merges == path:
                return cls(library.Tokenizer.from_file(str(path)))
            model = library.models.BPE.from_file(str(path), str(merges))
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{str(path)!r} is not a vocabulary of tokenizers: {error}") from None
        return cls(_byte_level(library, model))

    def encode(self, text: str) -> Tensor:
        """Token ids, int64."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(_integers(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """A JSON object that `vocabulary_from_json` reads."""
        return json.dumps({"kind": self.kind, "tokenizer": self.tokenizer.to_str()}) + "\n"


Vocabulary = ByteVocabulary | CharacterVocabulary | BpeVocabulary
VOCABULARIES = (ByteVocabulary.kind, CharacterVocabulary.kind, BpeVocabulary.kind)
DEFAULT_BPE_SIZE = 4096


def _integers(ids: Iterable[int] | Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)


def _tokenizers():
    return require("tokenizers", "a BPE vocabulary", extra="bpe")


def _byte_level(library, model) -> tokenizers.Tokenizer:
    """A tokenizer that splits and spells like GPT-2's."""
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def make_vocabulary(kind: str, text: str, size: int = DEFAULT_BPE_SIZE) -> Vocabulary:
    """The vocabulary of that kind for `text`.

    Args:
        kind: "byte", "char" or "bpe".
        text: whose characters get ids, or whose pairs are merged.
        size: tokens of "bpe", >= 256.

    Raises:
        TypeError, ValueError, ImportError: as the vocabularies; or no such kind.
    """
    check_choice("vocabulary", kind, VOCABULARIES)
    if kind == BpeVocabulary.kind:
        return BpeVocabulary.train(text, size)
    return ByteVocabulary() if kind == ByteVocabulary.kind else CharacterVocabulary(text)


def vocabulary_from_json(text: str) -> Vocabulary:
    """The inverse of `to_json` of every vocabulary."""
    given = json.loads(text)
    if given["kind"] == BpeVocabulary.kind:
        return BpeVocabulary(_tokenizers().Tokenizer.from_str(given["tokenizer"]))
    return make_vocabulary(given["kind"], given.get("characters", ""))


def to_tokenizer(vocabulary: Vocabulary, further: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A `tokenizers.Tokenizer` with the same ids, for other libraries.

    Args:
        vocabulary: the vocabulary.
        further: tokens that a vocabulary of characters gets after its own ids. The last one stands
            for every character that it does not have. Without one such characters are refused.

    Raises:
        ImportError: tokenizers is not installed; the message says how to install it.
    """
    if isinstance(vocabulary, BpeVocabulary):
        return vocabulary.tokenizer
    library = _tokenizers()
    if isinstance(vocabulary, ByteVocabulary):
        letters = bytes_to_letters()
        return _byte_level(library, library.models.BPE(vocab=letters, merges=[]))
    ids = {character: i for i, character in enumerate(vocabulary.characters)}
    ids |= {name: vocabulary.size + i for i, name in enumerate(further)}
    unknown = further[-1] if further else ""  # no token: the package refuses what it does not know
    tokenizer = library.Tokenizer(library.models.WordLevel(ids, unk_token=unknown))
    single = library.Regex(r"[\s\S]")
    tokenizer.pre_tokenizer = library.pre_tokenizers.Split(single, "isolated")
    tokenizer.decoder = library.decoders.Fuse()
    return tokenizer


def bytes_to_letters() -> dict[str, int]:
    """The printable letter that stands for each byte in byte-level encodings, with the byte.

    Printable Latin-1 bytes stand for themselves, the others for U+0100 and so on in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
