"""What a token is: bytes, characters, or the pieces of a byte-pair encoding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qflux_kernels.checks import check_choice, check_integer

from ..optional import require
from .files import code_points

if TYPE_CHECKING:
    import tokenizers


class UnknownCharacterError(ValueError):
    """A text has a character that the vocabulary does not have."""


class ByteVocabulary:
    """The 256 bytes of UTF-8: every text can be encoded."""

    kind = "byte"
    size = 256
    unknown_id = None
    default_prompt = "\n"

    def encode(self, text: str) -> Tensor:
        """Token ids, int64, one a byte."""
        return join_pieces(self.encode_pieces([text]))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[Tensor]:
        """The ids of a long text, one piece after another."""
        for piece in filter(None, pieces):
            yield torch.frombuffer(bytearray(piece.encode()), dtype=torch.uint8)

    def lacking(self, text: str) -> list[int]:
        """The places of characters without a token: none."""
        return []

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(_integers(ids)).decode(errors="replace")

    @property
    def separator(self) -> Tensor:
        """The ids between works that are joined: a line break."""
        return self.encode("\n")

    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of each token, `(V,)`, int64."""
        return torch.ones(self.size, dtype=torch.int64)

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
    unknown_id = None

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("characters must contain at least one character, got none")
        self.size = len(self.characters)
        points = code_points(self.characters)
        # The last entry is of all characters beyond; -1 is no id.
        self._ids = torch.full((int(points.max()) + 2,), -1, dtype=torch.int64)
        self._ids[points] = torch.arange(self.size)

    def encode(self, text: str) -> Tensor:
        """Token ids, int64, one a character.

        Raises:
            ValueError: a character without an id, named with its place.
        """
        return join_pieces(self.encode_pieces([text]))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[Tensor]:
        """The ids of a long text, one piece after another.

        Raises:
            ValueError: a character without an id, named with its place.
        """
        position = 0
        for piece in pieces:
            ids = self._ids[code_points(piece).clamp_(max=len(self._ids) - 1)]
            if (ids < 0).any():
                at = int((ids < 0).nonzero()[0])
                more = f" and {self.size - 100} more" if self.size > 100 else ""
                raise UnknownCharacterError(
                    f"text contains {piece[at]!r} at position {position + at}, which is not one of "
                    f"the {self.size} characters of the vocabulary: {self.characters[:100]!r}{more}"
                )
            position += len(piece)
            yield ids

    def lacking(self, text: str) -> list[int]:
        """The places of characters without a token, in ascending order."""
        known = set(self.characters)
        return [place for place, character in enumerate(text) if character not in known]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of the ids."""
        return "".join(self.characters[i] for i in _integers(ids))

    @property
    def default_prompt(self) -> str:
        """A text to start from when nobody gives one: a line break where the text has any."""
        return next((text for text in "\n " if text in self.characters), self.characters[0])

    @property
    def separator(self) -> Tensor:
        """The ids between works that are joined: a line break or a space; none if both lack."""
        found = next((text for text in "\n " if text in self.characters), "")
        return self.encode(found)

    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of each token, `(V,)`, int64."""
        lengths = [len(character.encode(errors="surrogatepass")) for character in self.characters]
        return torch.tensor(lengths)

    def to_json(self) -> str:
        """A JSON object that `vocabulary_from_json` reads."""
        return json.dumps({"kind": self.kind, "characters": self.characters}) + "\n"


class BpeVocabulary:
    """Byte-level byte-pair encoding: every text can be encoded, frequent pieces are one token.

    Needs the package tokenizers. Make one with `train`, or `read` a GPT-2 vocabulary.

    Args:
        tokenizer: a `tokenizers.Tokenizer`. It is copied without what would cut, pad or vary a
            text: truncation, padding, and the dropout of merges.
    """

    kind = "bpe"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        library = _tokenizers()
        self.tokenizer = library.Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if getattr(self.tokenizer.model, "dropout", None) is not None:
            # The tokenizer gives out a copy of its model.
            given = json.loads(self.tokenizer.to_str())
            given["model"]["dropout"] = None
            self.tokenizer = library.Tokenizer.from_str(json.dumps(given))
        self._vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        # Not the number of tokens: there may be ids without one.
        self.size = max(self._vocabulary.values(), default=-1) + 1
        if not self.size:
            raise ValueError("tokenizer must have at least one token, got none")
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self.unknown_id = None if unknown is None else self._vocabulary.get(unknown)

    @classmethod
    def train(cls, text: str | Iterable[str], size: int) -> BpeVocabulary:
        """Merge the most frequent pairs of `text` until there are `size` tokens, >= 256.

        The text is one string or its pieces. Of one with more than `COUNTED` characters, blocks
        that are evenly spread count, since every distinct word is kept in memory.

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
        pieces = [text] if isinstance(text, str) else text
        tokenizer.train_from_iterator(spread_lines(pieces, COUNTED), trainer)
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
        return join_pieces(self.encode_pieces([text]))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[Tensor]:
        """The ids of a long text, one piece after another, encoded in parallel.

        The text is cut where byte-level encodings cut it anyway, before a space that follows a
        word, so that the ids are those of the whole text.
        """
        fast = getattr(self.tokenizer, "encode_batch_fast", self.tokenizer.encode_batch)
        cuts = cut_at_words(pieces, _CUT)
        while batch := list(islice(cuts, _BATCH)):
            for encoding in fast(batch, add_special_tokens=False):
                yield torch.tensor(encoding.ids, dtype=torch.int64)

    def lacking(self, text: str) -> list[int]:
        """The places of characters without a token, in ascending order.

        Byte-level encodings have none. Others have those of their unknown token, such as all of a
        word that they do not know; without such a token they leave characters out.
        """
        if self.unknown_id is not None:
            found = self.tokenizer.encode(text, add_special_tokens=False)
            spans = zip(found.ids, found.offsets, strict=True)
            return [
                place
                for token, (start, stop) in spans
                if token == self.unknown_id
                for place in range(start, stop)
            ]
        # White space may have no token of its own where words are split at it.
        left_out = {
            character
            for character in set(text)
            if not character.isspace()
            and not self.tokenizer.encode(character, add_special_tokens=False).ids
        }
        return [place for place, character in enumerate(text) if character in left_out]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(_integers(ids), skip_special_tokens=False)

    @property
    def default_prompt(self) -> str:
        """A text to start from when nobody gives one: the first of these that is a known token."""
        return next((text for text in ("\n", " ", ".", "a") if self._known(text)), "a")

    @property
    def separator(self) -> Tensor:
        """The ids between works that are joined: the end of a text, or a line break."""
        for token in _ENDS_OF_TEXT:
            if token in self._vocabulary:
                return torch.tensor([self._vocabulary[token]])
        return self.encode("\n")

    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of the text that each token stands for, `(V,)`, int64."""
        letters = bytes_to_letters() if '"ByteLevel"' in self.tokenizer.to_str() else {}
        lengths = torch.zeros(self.size, dtype=torch.int64)
        for token, i in self._vocabulary.items():
            if all(letter in letters for letter in token):
                lengths[i] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("\u2581", " ").removeprefix("##").encode())
        return lengths

    def _known(self, text: str) -> bool:
        ids = self.encode(text).tolist()
        return bool(ids) and self.unknown_id not in ids

    def to_json(self) -> str:
        """A JSON object that `vocabulary_from_json` reads."""
        return json.dumps({"kind": self.kind, "tokenizer": self.tokenizer.to_str()}) + "\n"


Vocabulary = ByteVocabulary | CharacterVocabulary | BpeVocabulary
VOCABULARIES = (ByteVocabulary.kind, CharacterVocabulary.kind, BpeVocabulary.kind)
DEFAULT_BPE_SIZE = 4096


# Characters whose words are counted at most.
COUNTED = 2**25
# Characters that a tokenizer is given at once, and how many such pieces run in parallel.
_CUT = 2**16
_BATCH = 32
# How vocabularies spell the end of a text.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


def cut_at_words(pieces: Iterable[str], least: int) -> Iterator[str]:
    """The same text in pieces of `least` characters to twice as many, cut at the end of a word.

    Where no word ends a piece is cut before any white space, and where there is none, anywhere.
    The cuts depend on the text alone and not on the pieces that come.
    """
    text = ""
    for piece in pieces:
        text += piece
        start = 0
        while len(text) - start >= 2 * least:
            inside = (start + least, start + 2 * least)
            found = _WORD_END.search(text, *inside) or _BEFORE_SPACE.search(text, *inside)
            end = found.start() if found else inside[1]
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


_WORD_END = re.compile(r"(?<=\w)(?= )")
_BEFORE_SPACE = re.compile(r"(?<=\S)(?=\s)")


def join_pieces(pieces: Iterable[Tensor]) -> Tensor:
    """Token ids of pieces as one tensor, int64."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(piece.long() for piece in pieces)])


def spread_lines(pieces: Iterable[str], most: int, block: int = _CUT) -> Iterator[str]:
    """The lines of a text with their ends; of a long one those of evenly spread blocks.

    Args:
        pieces: the text.
        most: about so many characters at most, and at least half as many of a longer text.
        block: characters of a block at least, >= 1.
    """
    kept: list[str] = []
    now: list[str] = []
    number, stride, size = 0, 1, 0
    for line in _lines(pieces):
        now.append(line)
        size += len(line)
        if size < block:
            continue
        if number % stride == 0:
            kept.append("".join(now))
            if sum(map(len, kept)) > most:
                kept, stride = kept[::2], 2 * stride
        number, now, size = number + 1, [], 0
    for text in (*kept, "".join(now)):
        yield from text.splitlines(keepends=True)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a text with their ends; a very long one in parts."""
    rest = ""
    for piece in filter(None, pieces):
        *lines, rest = (rest + piece).splitlines(keepends=True)
        yield from lines
        if len(rest) > _CUT:
            yield rest
            rest = ""
    if rest:
        yield rest


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


def make_vocabulary(
    kind: str, text: str | Iterable[str], size: int = DEFAULT_BPE_SIZE
) -> Vocabulary:
    """The vocabulary of that kind for `text`.

    Args:
        kind: "byte", "char" or "bpe".
        text: whose characters get ids, or whose pairs are merged; a string or its pieces.
        size: tokens of "bpe", >= 256.

    Raises:
        TypeError, ValueError, ImportError: as the vocabularies; or no such kind.
    """
    check_choice("vocabulary", kind, VOCABULARIES)
    if kind == BpeVocabulary.kind:
        return BpeVocabulary.train(text, size)
    if kind == ByteVocabulary.kind:
        return ByteVocabulary()
    return CharacterVocabulary(character for piece in text for character in piece)


def vocabulary_from_json(text: str) -> Vocabulary:
    """The inverse of `to_json` of every vocabulary.

    Raises:
        ImportError: it needs tokenizers, which is not installed.
        ValueError: no such object.
    """
    given = json.loads(text)
    kind = given.get("kind") if isinstance(given, dict) else None
    if kind == ByteVocabulary.kind:
        return ByteVocabulary()
    fields = {CharacterVocabulary.kind: "characters", BpeVocabulary.kind: "tokenizer"}
    name = fields.get(kind) if isinstance(kind, str) else None
    if name is None or not isinstance(given.get(name), str):
        raise ValueError(
            f"a vocabulary must be an object whose kind is one of {VOCABULARIES}, with the text "
            f"'characters' of 'char' or 'tokenizer' of 'bpe', got {text[:60].strip()!r}"
        )
    if kind == CharacterVocabulary.kind:
        return CharacterVocabulary(given[name])
    library = _tokenizers()
    try:
        return BpeVocabulary(library.Tokenizer.from_str(given[name]))
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"the tokenizer of a vocabulary is broken: {error}") from None


def check_vocabulary_size(vocabulary: Vocabulary, size: int, name: str = "vocabulary") -> None:
    """Raise unless a vocabulary has as many tokens as the model.

    Raises:
        ValueError: both sizes, and `name`, what the vocabulary came from.
    """
    if vocabulary.size != size:
        raise ValueError(
            f"{name} must have the vocab_size of the model, {size}, got one of kind "
            f"{vocabulary.kind!r} with {vocabulary.size} tokens: use the vocabulary that the model "
            "was trained with"
        )


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
