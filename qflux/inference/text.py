"""From prompts to ids, and from ids to text as they come."""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from qflux_kernels.checks import check_choice

from ..text.vocabulary import ByteVocabulary, CharacterVocabulary, Vocabulary
from .generate import LanguageModel, next_tokens

UNKNOWN = ("refuse", "replace", "drop")
# Characters that a message names.
_NAMED = 5


def fit_prompt(
    prompt: str, vocabulary: Vocabulary, unknown: str = "refuse", name: str = "prompt"
) -> tuple[str, str]:
    """The prompt in characters that the vocabulary has, and what was done to it ("": nothing).

    Args:
        prompt: text.
        vocabulary: the model's. One of bytes lacks none, and so does a byte-level encoding.
        unknown: what becomes of characters that it lacks: "refuse", "replace" by a space (a line
            break or its first character, if it lacks that too), or "drop".
        name: what messages call the text.

    Raises:
        ValueError: no characters, characters that the vocabulary lacks (named), or a prompt that
            is not Unicode.
    """
    check_choice("unknown", unknown, UNKNOWN)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid UTF-8 at position {error.start}") from None
    told = ""
    if lacking := vocabulary.lacking(prompt):
        first: dict[str, int] = {}
        for place in lacking:
            first.setdefault(prompt[place], place)
        named = ", ".join(f"{c!r} at position {i}" for c, i in list(first.items())[:_NAMED])
        if len(first) > _NAMED:
            named += f" and {len(first) - _NAMED} more"
        if unknown == "refuse":
            kind = "characters" if isinstance(vocabulary, CharacterVocabulary) else "tokens"
            raise ValueError(
                f"{name} contains {named}, not among the {vocabulary.size} {kind} of the "
                "vocabulary; --unknown replace or --unknown drop goes on without"
            )
        known = (c for c in (" ", "\n", vocabulary.default_prompt) if not vocabulary.lacking(c))
        instead = "" if unknown == "drop" else next(known, "")
        without = set(lacking)
        prompt = "".join(instead if i in without else c for i, c in enumerate(prompt))
        told = f"{named} dropped" if unknown == "drop" else f"{named} replaced by {instead!r}"
    if not len(vocabulary.encode(prompt)):
        raise ValueError(
            f"{name} must have length >= 1 in tokens, got {prompt!r}"
            + (f" ({told})" if told else "")
        )
    return prompt, told


class TextDecoder:
    """Text of token ids that come one after another.

    A token may end within a character; its text then waits for the rest. All pieces together are
    what the vocabulary's `decode` makes of all ids.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._bytes = None
        if isinstance(vocabulary, ByteVocabulary):
            self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Ids whose text is out, kept because a token's text may depend on the one before; and
        # those that wait.
        self._before: list[int] = []
        self._waiting: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        if self._bytes is not None:
            return self._bytes.decode(bytes(ids))
        self._waiting += ids
        text = self._text_of_waiting()
        if text.endswith("\ufffd") and not isinstance(self.vocabulary, CharacterVocabulary):
            return ""
        self._before, self._waiting = self._waiting or self._before, []
        return text

    def finish(self) -> str:
        """What still waits: U+FFFD for bytes that are no character."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        text, self._waiting = self._text_of_waiting(), []
        return text

    def _text_of_waiting(self) -> str:
        before = self.vocabulary.decode(self._before)
        return self.vocabulary.decode(self._before + self._waiting)[len(before) :]


class StopFilter:
    """Lets text through up to the first of some strings, which itself stays out.

    Text that may be the beginning of one of them is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """What of the text so far may be shown now; `stopped` tells whether a string was found."""
        held = self._held + text
        found = [at for at in map(held.find, self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        longest = max(
            (
                size
                for stop in self.stops
                for size in range(1, min(len(stop) - 1, len(held)) + 1)
                if held.endswith(stop[:size])
            ),
            default=0,
        )
        self._held = held[len(held) - longest :]
        return held[: len(held) - longest]

    def finish(self) -> str:
        """What was held back, since no more text comes."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """A prompt and its continuation as text, in pieces as they are made.

    Args:
        model: the language model.
        vocabulary: its vocabulary.
        prompt: text of at least one token, all of it in the vocabulary.
        max_new_tokens: tokens to add, >= 0.
        stop: strings that end the continuation before them.
        device: where the model is.
        options: `temperature`, `top_k`, `top_p` and `generator` of `qflux.generate`.

    `tokens` counts the tokens made so far. However the iteration ends, `finish` gives the text
    that is not out yet.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocabulary: Vocabulary,
        prompt: str,
        max_new_tokens: int,
        *,
        stop: Sequence[str] = (),
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        self.tokens = 0
        self._ids = vocabulary.encode(prompt)
        self._decoder, self._filter = TextDecoder(vocabulary), StopFilter(stop)
        self._made: Generator[Tensor] = next_tokens(
            model, self._ids[None].to(device), max_new_tokens, **options
        )

    def __iter__(self) -> Iterator[str]:
        yield self._decoder.push(self._ids.tolist())
        with closing(self._made) as made:
            for token in made:
                self.tokens += 1
                text = self._filter.push(self._decoder.push(token[0].tolist()))
                if text:
                    yield text
                if self._filter.stopped:
                    break
        yield self.finish()

    def finish(self) -> str:
        """The text that waits for more, which does not come."""
        if self._filter.stopped:
            return ""
        return self._filter.push(self._decoder.finish()) + self._filter.finish()
