"""Vocabularies that other programs saved, and what every vocabulary says of its tokens."""

import itertools
import json

import pytest
import torch

from qflux import BpeVocabulary, ByteVocabulary, CharacterVocabulary, load_model
from qflux.inference.text import fit_prompt
from qflux.text import vocabulary as vocabulary_module
from qflux.text.vocabulary import (
    check_vocabulary_size,
    cut_at_words,
    make_vocabulary,
    spread_lines,
    vocabulary_from_json,
)

TEXT = "the cat sat on the mat, the café\n\n  sat? " * 30


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("tokenizers", reason="reads the files")


@pytest.fixture
def trained(library):
    return BpeVocabulary.train(TEXT, 280)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.enable_truncation(8),
        lambda tokenizer: tokenizer.enable_truncation(8, stride=2, direction="left"),
        lambda tokenizer: tokenizer.enable_padding(length=5000),
        lambda tokenizer: tokenizer.enable_padding(pad_to_multiple_of=512),
    ],
)
def test_a_saved_tokenizer_neither_cuts_nor_pads(trained, tmp_path, change):
    expected = trained.encode(TEXT)
    tokenizer = trained.tokenizer
    change(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = BpeVocabulary.read(tmp_path)
    assert torch.equal(found.encode(TEXT), expected)
    assert torch.equal(vocabulary_from_json(found.to_json()).encode(TEXT), expected)
    saved = json.loads(json.loads(found.to_json())["tokenizer"])
    assert saved["truncation"] is None and saved["padding"] is None
    # In vocabulary.json of an older run, too.
    old = json.dumps({"kind": "bpe", "tokenizer": (tmp_path / "tokenizer.json").read_text()})
    assert torch.equal(vocabulary_from_json(old).encode(TEXT), expected)


def test_a_saved_tokenizer_merges_the_same_way_each_time(trained, tmp_path):
    given = json.loads(trained.tokenizer.to_str())
    given["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(given))
    found = BpeVocabulary.read(tmp_path)
    assert torch.equal(found.encode(TEXT), trained.encode(TEXT))


def test_a_saved_tokenizer_adds_no_tokens(trained, library, tmp_path):
    tokenizer = trained.tokenizer
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = library.processors.TemplateProcessing("<s> $A </s>", None, ids)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = BpeVocabulary.read(tmp_path)
    assert found.size == trained.size + 2 and found.decode(found.encode(TEXT)) == TEXT
    assert found.separator.tolist() == [found.size - 1]


def test_ids_with_holes_have_room_in_the_model(library, tmp_path):
    tokenizer = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 9, "?": 4}, "?"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = BpeVocabulary.read(tmp_path)
    assert (found.size, found.unknown_id) == (10, 4)
    assert found.encode("b a c").tolist() == [9, 0, 4]
    assert found.default_prompt == "a"


@pytest.mark.parametrize("least", [5, 13, 40])
def test_cuts_are_where_words_end_and_do_not_depend_on_pieces(trained, least):
    text = TEXT + "x" * 100 + " end. \t\n  of it"
    cuts = list(cut_at_words([text], least))
    assert "".join(cuts) == text
    for size in (1, 7, 1000):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert list(cut_at_words(pieces, least)) == cuts
    assert all(least <= len(cut) <= 2 * least for cut in cuts[:-1])
    ids = torch.cat([trained.encode(cut) for cut in cut_at_words([TEXT], least)])
    assert torch.equal(ids, trained.encode(TEXT))


def test_pieces_are_merged_like_the_whole_text(library):
    pieces = [TEXT[at : at + 11] for at in range(0, len(TEXT), 11)]
    assert (
        make_vocabulary("bpe", pieces, 280).to_json() == make_vocabulary("bpe", TEXT, 280).to_json()
    )


def test_merges_of_a_long_text_are_learned_from_all_over_it(monkeypatch, library):
    lines = [f"line {number}\n" for number in range(1000)]
    text = "".join(lines)
    assert list(spread_lines([text], len(text) + 20, 20)) == lines
    found = list(spread_lines([text[at : at + 7] for at in range(0, len(text), 7)], 2000, 20))
    assert found == list(spread_lines([text], 2000, 20))
    numbers = [lines.index(line) for line in found]
    assert 1000 <= sum(map(len, found)) <= 2100 and numbers == sorted(numbers)
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    assert numbers[0] == 0 and numbers[-1] == 999 and max(gaps) == 22
    monkeypatch.setattr(vocabulary_module, "COUNTED", 2 * 2**16)
    words = "one two three four five six seven\n" * 4000 + "eight nine ten eleven\n" * 4000
    part = "".join(spread_lines([words], 2 * 2**16))
    assert len(part) < 0.8 * len(words)
    expected = BpeVocabulary.train(words, 280).to_json()
    monkeypatch.undo()
    assert BpeVocabulary.train(part, 280).to_json() == expected


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_bytes_of_tokens_add_up_to_the_text(kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers", reason="merges byte pairs")
    text = TEXT + "€ 12"
    vocabulary = make_vocabulary(kind, text, 280)
    lengths = vocabulary.token_bytes()
    assert lengths.shape == (vocabulary.size,)
    assert int(lengths[vocabulary.encode(text)].sum()) == len(text.encode())


def test_prompts_and_separators_are_in_the_vocabulary():
    for text, expected in (("b\na ", "\n"), ("b a", " "), ("ba", "a")):
        vocabulary = CharacterVocabulary(text)
        assert vocabulary.default_prompt == expected
        assert vocabulary.decode(vocabulary.separator) == (expected if expected != "a" else "")
    assert ByteVocabulary().separator.tolist() == [10]


def test_characters_without_a_token_are_found(library):
    """Of byte-level encodings none; else those of the unknown token, or what is left out."""
    assert BpeVocabulary.train("hello world\n", 256).lacking("hé\U0001f600\n") == []
    assert ByteVocabulary().lacking("é") == [] and CharacterVocabulary("ab").lacking("xab-") == [
        0,
        3,
    ]
    letters = {"a": 0, "b": 1}
    left_out = library.Tokenizer(library.models.BPE(letters, []))
    marked = library.Tokenizer(library.models.BPE({**letters, "?": 2}, [], unk_token="?"))
    words = library.Tokenizer(library.models.WordLevel({**letters, "?": 2}, unk_token="?"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    for tokenizer, expected in ((left_out, [1, 3]), (marked, [1, 3]), (words, [0, 1, 2, 3, 4])):
        vocabulary = BpeVocabulary(tokenizer)
        assert vocabulary.lacking("axbyb") == expected
        assert vocabulary.lacking("a") == []
    assert BpeVocabulary(words).lacking("a xy b") == [2, 3]
    text, told = fit_prompt("a xy b", BpeVocabulary(words), "replace")
    assert (text, told) == ("a    b", "'x' at position 2, 'y' at position 3 replaced by ' '")
    assert fit_prompt("axb", BpeVocabulary(left_out), "drop")[0] == "ab"
    with pytest.raises(ValueError, match="contains 'x' at position 1, not among the 2 tokens"):
        fit_prompt("axb", BpeVocabulary(left_out))


def test_an_unknown_character_is_named_with_a_part_of_a_large_vocabulary():
    vocabulary = CharacterVocabulary(map(chr, range(300, 9000)))
    with pytest.raises(ValueError, match=r"'z' at position 12, .* and 8600 more") as caught:
        list(vocabulary.encode_pieces([chr(300) * 10, chr(400) * 2 + "z"]))
    assert len(str(caught.value)) < 600
    assert vocabulary.encode("\u012c\u012d").tolist() == [0, 1]
    with pytest.raises(ValueError, match="position 0"):
        vocabulary.encode("\U0010ffff")
    with pytest.raises(ValueError, match="position 0"):
        vocabulary.encode("\udc80")


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "7", "null", '"char"', "", "{", '{"kind": 7}', '{"kind": ["char"]}',
        '{"kind": "word"}', '{"kind": "char"}', '{"kind": "char", "characters": 7}',
        '{"kind": "char", "characters": ["a"]}', '{"kind": "char", "characters": ""}',
        '{"kind": "bpe"}', '{"kind": "bpe", "tokenizer": "{}"}', '{"kind": "bpe", "tokenizer": 1}',
    ],
)  # fmt: skip
def test_what_is_no_vocabulary_is_a_value_error(text):
    pytest.importorskip("tokenizers", reason="reads one of them")
    with pytest.raises(ValueError, match=r"vocabulary|character|Expecting"):
        vocabulary_from_json(text)


def test_a_vocabulary_must_have_the_size_of_the_model(tmp_path):
    from qflux import QuantumFluxConfig, QuantumFluxLM, save_model

    config = QuantumFluxConfig(
        vocab_size=3, num_layers=1, num_cylinders=1, hidden_dim=4, context_length=4
    )
    save_model(tmp_path, QuantumFluxLM(config), CharacterVocabulary("abc"))
    load_model(tmp_path)
    for other in (CharacterVocabulary("ab"), CharacterVocabulary("abcd"), ByteVocabulary()):
        (tmp_path / "vocabulary.json").write_text(other.to_json())
        with pytest.raises(ValueError, match=rf"vocabulary\.json.* 3, got .* {other.size} tokens"):
            load_model(tmp_path)
        with pytest.raises(ValueError, match="vocab_size"):
            check_vocabulary_size(other, 3)
    (tmp_path / "vocabulary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocabulary\.json' is not a vocabulary"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="model_path must be the name"):
        load_model("")
