"""Text out of a model: pieces, stop strings, prompts, logits that are no distribution."""

import math
from types import SimpleNamespace

import pytest
import torch

from qflux import BpeVocabulary, ByteVocabulary, CharacterVocabulary, generate
from qflux.inference.generate import next_tokens
from qflux.inference.sampling import sample
from qflux.inference.text import StopFilter, TextDecoder, TextStream, fit_prompt

TEXT = "Größe, \u65e5\u672c \U0001f600 e\u0301 to be\n"


class Speaker:
    """A model that says the ids of a list, whatever it reads."""

    training = False

    def __init__(self, ids, size, context_length=4):
        self.ids, self.size = iter(ids), size
        self.config = SimpleNamespace(context_length=context_length)

    def train(self, mode=True):
        self.training = mode
        return self

    def __call__(self, input_ids):
        assert input_ids.shape[1] <= self.config.context_length and not self.training
        logits = torch.full((*input_ids.shape, self.size), -5.0)
        logits[..., next(self.ids)] = 5.0
        return SimpleNamespace(logits=logits)


def vocabularies():
    yield ByteVocabulary()
    yield CharacterVocabulary(TEXT + "\ufffd")
    pytest.importorskip("tokenizers", reason="for byte pairs")
    yield BpeVocabulary.train(TEXT * 3, 262)
    library = pytest.importorskip("tokenizers")
    words = library.Tokenizer(library.models.WordLevel({"\u2581to": 0, "\u2581be": 1}, "\u2581be"))
    words.pre_tokenizer = library.pre_tokenizers.Metaspace()
    words.decoder = library.decoders.Metaspace()
    yield BpeVocabulary(words)


def test_pieces_are_the_text_that_decode_makes():
    """Characters of several bytes come whole; bytes that are none become U+FFFD at the end."""
    for vocabulary in vocabularies():
        text = TEXT if vocabulary.size > 2 else "to be to to be"
        ids = vocabulary.encode(text).tolist()
        decoder = TextDecoder(vocabulary)
        pieces = [decoder.push([i]) for i in ids]
        assert "".join(pieces) == vocabulary.decode(ids) and decoder.finish() == ""
        assert "\ufffd" not in "".join(pieces) and len([p for p in pieces if p]) > 3
        cut = TextDecoder(vocabulary)
        assert cut.push(ids[:3]) + cut.push(ids[3:]) == vocabulary.decode(ids)
    odd = [0xE6, 0x97, 0x20, 0xFF, 0x41, 0xF0, 0x9F]
    decoder = TextDecoder(ByteVocabulary())
    assert "".join(decoder.push([i]) for i in odd) == "\ufffd \ufffdA"
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stop_string_is_found_across_pieces(size):
    text = "the cat sat on the mat, the end. more"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for stops, expected in [
        (["the end"], "the cat sat on the mat, "),
        (["the m", "sat"], "the cat "),
        (["then"], text),
        ([], text),
        (["e"], "th"),
        (["more and more"], text),
    ]:
        stop = StopFilter(stops)
        shown = ""
        for piece in pieces:
            shown += stop.push(piece)
            if stop.stopped:
                break
        assert shown + stop.finish() == expected and stop.stopped == (expected != text)


def test_a_stream_stops_drawing_where_the_text_stops():
    vocabulary = ByteVocabulary()
    said = "\u65e5 one. two. three"
    speaker = Speaker(vocabulary.encode(said).tolist(), 256).train()
    stream = TextStream(speaker, vocabulary, "\u00e9!", 99, stop=[". t"], temperature=0)
    pieces = list(stream)
    assert "".join(pieces) == "\u00e9!\u65e5 one" and pieces[:2] == ["\u00e9!", "\u65e5"]
    assert stream.tokens == len("\u65e5 one. t".encode()) and speaker.training


def test_tokens_come_one_at_a_time_and_are_those_of_generate():
    tokens = next_tokens(Speaker(range(9), 9), torch.tensor([[7, 8]]), 5, temperature=0)
    assert next(tokens).tolist() == [[0]] and next(tokens).tolist() == [[1]]
    whole = generate(Speaker(range(9), 9), torch.tensor([[7, 8]]), 5, temperature=0)
    assert whole.tolist() == [[7, 8, 0, 1, 2, 3, 4]]


def test_prompts_are_fitted_or_refused():
    letters = CharacterVocabulary("abc ")
    assert fit_prompt("a cab", letters) == ("a cab", "")
    text, told = fit_prompt("a-b-d", letters, "replace")
    assert text == "a b  " and told == "'-' at position 1, 'd' at position 4 replaced by ' '"
    assert fit_prompt("a-b", letters, "drop")[0] == "ab"
    assert fit_prompt("a-b", CharacterVocabulary("ab"), "replace")[0] == "aab"
    with pytest.raises(ValueError, match=r"'0' at position 0.*'4' at position 4 and 5 more"):
        fit_prompt("0123456789", letters)
    for prompt, vocabulary in (("", letters), ("", ByteVocabulary())):
        with pytest.raises(ValueError, match="length >= 1"):
            fit_prompt(prompt, vocabulary)
    with pytest.raises(ValueError, match="not valid UTF-8 at position 1"):
        fit_prompt("a\udcff", ByteVocabulary(), "drop")
    with pytest.raises(ValueError, match="unknown must be one of"):
        fit_prompt("a", letters, "hide")
    for characters, expected in (("\n ab", "\n"), ("a b", " "), ("ba", "a")):
        assert CharacterVocabulary(characters).default_prompt == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution_are_refused(bad, temperature):
    logits = torch.zeros(2, 5)
    if bad == "all":
        logits[1] = -math.inf
    else:
        logits[1, 3] = bad
    with pytest.raises(ValueError, match="logits of the next token must have a finite maximum"):
        sample(logits, temperature=temperature)


def test_extreme_options_draw_a_token():
    logits = torch.tensor([[0.0, 3.0e38, -3.0e38, -math.inf]])
    for options in (
        {"temperature": 1e-320},
        {"temperature": 1e-30},
        {"top_k": 10**30},
        {"top_p": 1e-320},
        {"top_k": 1, "temperature": 1e30},
    ):
        assert sample(logits, **options).tolist() == [[1]]
    drawn = sample(torch.tensor([[0.0, 9.0, -math.inf]]).expand(200, 3), temperature=1e300)
    assert set(drawn.flatten().tolist()) == {0, 1}
