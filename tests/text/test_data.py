"""Vocabularies, text splits, windows, n-gram baselines."""

import json
import lzma
import math
import sys
import types

import pytest
import torch

from qflux import (
    BpeVocabulary,
    ByteVocabulary,
    CharacterVocabulary,
    TextSplit,
    load_dataset_text,
    load_text,
    make_vocabulary,
    ngram_losses,
)
from qflux.text.vocabulary import to_tokenizer, vocabulary_from_json
from qflux.text.windows import TrainingWindows, evaluation_batches

# --- vocabularies ---


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_vocabulary_round_trip(kind):
    text = "Größe: 12 €\n\ttail"
    vocabulary = make_vocabulary(kind, text)
    ids = vocabulary.encode(text)
    assert ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < vocabulary.size
    assert len(ids) == (len(text.encode()) if kind == "byte" else len(text))
    assert vocabulary.decode(ids) == vocabulary.decode(ids.tolist()) == text
    again = vocabulary_from_json(vocabulary.to_json())
    assert type(again) is type(vocabulary) and torch.equal(again.encode(text), ids)


def test_empty_text_encodes_to_no_tokens():
    for vocabulary in (ByteVocabulary(), CharacterVocabulary("ab")):
        assert vocabulary.encode("").shape == (0,) and vocabulary.encode("").dtype == torch.int64


def test_bytes_that_are_no_text_decode_to_the_replacement_character():
    assert ByteVocabulary().decode([0x61, 0xFF, 0x62]) == "a\N{REPLACEMENT CHARACTER}b"


def test_character_ids_are_in_code_point_order():
    vocabulary = CharacterVocabulary("banana")
    assert (vocabulary.characters, vocabulary.size) == ("abn", 3)
    assert vocabulary.encode("nab").tolist() == [2, 0, 1]


def test_vocabulary_errors_name_the_trouble():
    with pytest.raises(ValueError, match=r"'z' at position 2"):
        CharacterVocabulary("ab").encode("abz")
    with pytest.raises(ValueError, match="characters"):
        CharacterVocabulary("")
    with pytest.raises(ValueError, match=r"vocabulary must be .*'byte', 'char'.* got 'word'"):
        make_vocabulary("word", "text")


def test_byte_pairs_are_merged_and_every_text_can_be_encoded():
    pytest.importorskip("tokenizers", reason="merges byte pairs")
    text = "the cat sat on the mat, the cat\nsat\n" * 20
    vocabulary = make_vocabulary("bpe", text, size=265)
    assert vocabulary.size == 265 and vocabulary.kind == "bpe"
    ids = vocabulary.encode(text)
    assert ids.dtype == torch.int64 and ids.max() < 265 and len(ids) < 0.7 * len(text)
    assert vocabulary.decode(ids) == vocabulary.decode(ids.tolist()) == text
    other = "Größe: 12 €\n\ttail  end"
    assert vocabulary.decode(vocabulary.encode(other)) == other
    assert vocabulary.encode("").shape == (0,) and vocabulary.encode("").dtype == torch.int64
    again = vocabulary_from_json(vocabulary.to_json())
    assert type(again) is BpeVocabulary and torch.equal(
        again.encode(other), vocabulary.encode(other)
    )
    assert make_vocabulary("bpe", text, size=265).to_json() == vocabulary.to_json()
    with pytest.raises(ValueError, match=r"size must be .*>= 256.* got 255"):
        make_vocabulary("bpe", text, size=255)


def test_gpt2_files_are_read(tmp_path):
    """vocab.json and merges.txt as GPT-2 comes with them, and a tokenizer.json."""
    pytest.importorskip("tokenizers", reason="reads the files")
    trained = BpeVocabulary.train("low lower lowest newer wider\n" * 9, 270)
    trained.tokenizer.model.save(str(tmp_path))
    text = "slower\nwidest \u00e9"
    (tmp_path / "other").mkdir()
    trained.tokenizer.save(str(tmp_path / "other" / "tokenizer.json"))
    for path in ("vocab.json", ".", "other/tokenizer.json", "other"):
        found = BpeVocabulary.read(tmp_path / path)
        assert found.size == 270
        assert torch.equal(found.encode(text), trained.encode(text))
        assert found.decode(found.encode(text)) == text
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        BpeVocabulary.read(tmp_path)
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json.* is not a vocabulary"):
        BpeVocabulary.read(tmp_path / "other")


@pytest.mark.parametrize("make", [ByteVocabulary, lambda: CharacterVocabulary("Gtail \n\tröße €")])
def test_other_libraries_get_the_same_ids(make):
    pytest.importorskip("tokenizers", reason="what other libraries use")
    vocabulary, text = make(), "Größe\n\n  \ttail €"
    tokenizer = to_tokenizer(vocabulary)
    assert tokenizer.get_vocab_size() == vocabulary.size
    assert tokenizer.encode(text).ids == vocabulary.encode(text).tolist()
    assert tokenizer.decode(vocabulary.encode(text).tolist()) == text


def test_tokenizers_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: make_vocabulary("bpe", "text"), lambda: to_tokenizer(ByteVocabulary())):
        with pytest.raises(ImportError, match=r"'tokenizers'.*qflux\[bpe\]"):
            call()


# --- texts ---


def test_shipped_text_is_a_megabyte_with_whole_works_held_out():
    split = load_text()
    sizes = [len(text) for text in (*split.train.values(), *split.validation.values())]
    assert 0.95e6 < sum(sizes) < 1.1e6
    assert list(split.validation) == ["tempest.txt.xz"]
    assert 0.08 < len(split.validation["tempest.txt.xz"]) / sum(sizes) < 0.12
    assert "Our revels now are ended" in split.validation["tempest.txt.xz"]
    assert "Shall I compare thee to a summer's day?" in split.train["sonnets.txt.xz"]
    assert split.text.isascii()
    for word in ("gutenberg", "copyright", "trademark", "etext", "e-text", "http", "\r", "\t"):
        assert word not in split.text.lower(), word


def test_no_passage_of_the_held_out_work_is_trained_on():
    split = load_text()
    [held_out] = split.validation.values()
    lines = {line for text in split.train.values() for line in text.splitlines()}
    shared = [line for line in held_out.splitlines() if len(line) > 40 and line in lines]
    assert shared == []


def test_folder_holds_out_its_last_works(tmp_path):
    for name, length in (("a", 50), ("b", 46), ("c", 3), ("d", 1)):
        (tmp_path / f"{name}.txt").write_text(name * length)
    (tmp_path / "e.txt.xz").write_bytes(lzma.compress(b"e" * 4))
    (tmp_path / "notes.md").write_text("no work")
    split = load_text(tmp_path)
    assert list(split.train) == ["a.txt", "b.txt"]
    assert list(split.validation) == ["c.txt", "d.txt", "e.txt.xz"]
    split = load_text(tmp_path, validation_share=0.04)
    assert list(split.train) == ["a.txt", "b.txt", "c.txt"]
    assert split.validation == {"d.txt": "d", "e.txt.xz": "eeee"}
    assert list(load_text(tmp_path, validation_share=0.9999).train) == ["a.txt"]


def test_folder_with_named_parts_is_split_by_them(tmp_path):
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "work.txt").write_text(part)
    split = load_text(tmp_path)
    assert split.train == {"work.txt": "train"} and split.validation == {"work.txt": "validation"}


def test_single_file_holds_out_its_end(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(95))
    (tmp_path / "one.txt").write_text(text)
    split = load_text(tmp_path / "one.txt")
    assert split.train == {"one.txt": text[:85]}
    assert list(split.validation.values()) == [text[85:]]
    assert split.text == text


def test_text_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_text(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no file"):
        load_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt.*UTF-8"):
        load_text(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt.*empty"):
        load_text(tmp_path / "empty.txt")
    (tmp_path / "broken.txt.xz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"broken\.txt\.xz.*xz"):
        load_text(tmp_path / "broken.txt.xz")
    with pytest.raises(ValueError, match=r"validation_share.*got 1"):
        load_text(tmp_path, validation_share=1)


# --- windows ---


def test_an_epoch_cuts_every_work_into_windows_without_overlap():
    works = [torch.arange(0, 100), torch.arange(200, 203), torch.arange(300, 371)]
    windows = TrainingWindows(works, length=10, batch_size=4, seed=3)
    assert windows.steps_per_epoch == (9 + 6) // 4
    epochs = []
    for epoch in range(3):
        rows = torch.cat([windows.batch(3 * epoch + step) for step in range(3)])
        assert rows.shape == (12, 10)
        assert (rows.diff() == 1).all()
        tokens = rows.flatten()
        assert len(tokens.unique()) == len(tokens) == 120
        epochs.append(rows)
    assert not torch.equal(epochs[0], epochs[1])
    assert len({int(row[0]) % 10 for rows in epochs for row in rows if row[0] < 100}) > 1


def test_batches_depend_on_seed_and_step_alone():
    works = [torch.arange(1000)]
    forward = TrainingWindows(works, 7, 5, seed=1)
    batches = [forward.batch(step) for step in range(80)]
    jumping = TrainingWindows(works, 7, 5, seed=1)
    for step in (79, 3, 40, 41, 0):
        assert torch.equal(jumping.batch(step), batches[step])
    assert not torch.equal(TrainingWindows(works, 7, 5, seed=2).batch(0), batches[0])


def test_few_windows_repeat_and_none_is_an_error():
    batch = TrainingWindows([torch.arange(8)], length=8, batch_size=3, seed=0).batch(5)
    assert torch.equal(batch, torch.arange(8).expand(3, 8))
    with pytest.raises(ValueError, match=r"context_length 9.*8 tokens"):
        TrainingWindows([torch.arange(8)], length=9, batch_size=3, seed=0)


def test_evaluation_predicts_every_token_but_the_first_once():
    works = [torch.arange(1, 24), torch.arange(101, 106), torch.arange(201, 210)]
    scored = []
    for ids, labels in evaluation_batches(works, length=5, batch_size=3):
        assert ids.shape == labels.shape and len(ids) <= 3 and ids.shape[1] == 5
        for row_ids, row in zip(ids, labels, strict=True):
            assert torch.equal(row_ids[row >= 0], row[row >= 0])
            assert (row_ids[row < 0] == 0).all() and (row[row < 0] == -100).all()
            scored += [label for label in row[1:].tolist() if label >= 0]
    assert sorted(scored) == [*range(2, 24), *range(102, 106), *range(202, 210)]


# --- n-grams ---


def test_ngram_losses_by_hand():
    # Ids: a=0, b=1, c=2. Training works "aab" and "ba": n(a)=3, n(b)=2, n(c)=0; no pair spans
    # the works, so n(aa)=1, n(ab)=1, n(ba)=1, T(a)=2, T(b)=1, T(c)=0.
    p = [4 / 8, 3 / 8, 1 / 8]
    train = [torch.tensor([0, 0, 1]), torch.tensor([1, 0])]
    validation = [torch.tensor([0, 1, 0, 2]), torch.tensor([2, 1])]
    losses = ngram_losses(train, validation, 3)
    unigram = [p[1], p[0], p[2], p[1]]
    bigram = [
        (1 + 2 * p[1]) / (2 + 2),  # a -> b
        (1 + 1 * p[0]) / (1 + 1),  # b -> a
        (0 + 2 * p[2]) / (2 + 2),  # a -> c
        p[1],  # c -> b, and c was never followed by anything
    ]
    assert losses["unigram"] == pytest.approx(-sum(map(math.log, unigram)) / 4)
    assert losses["bigram"] == pytest.approx(-sum(map(math.log, bigram)) / 4)


def test_ngram_losses_of_the_shipped_text_are_ordered():
    split = load_text()
    vocabulary = make_vocabulary("char", split.text)
    train, held_out = (
        [vocabulary.encode(text) for text in part.values()]
        for part in (split.train, split.validation)
    )
    losses = ngram_losses(train, held_out, vocabulary.size)
    assert 2.4 < losses["bigram"] < 2.7 < 3.2 < losses["unigram"] < math.log(vocabulary.size)


def test_bigrams_of_a_large_vocabulary_need_no_table():
    """V x V numbers would take 20 GB here."""
    train = torch.arange(0, 50000, 7).repeat(2)
    losses = ngram_losses([train], [train[:500], torch.tensor([3, 5])], 50257)
    assert 0 < losses["bigram"] < 2 < 9 < losses["unigram"] < math.log(50257)


# --- datasets ---


class Rows(dict):
    """What is used of a dataset's split."""

    @property
    def column_names(self):
        return list(self)


def stub_datasets(monkeypatch, splits):
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, config=None: {
        split: Rows(text=rows) for split, rows in splits.items()
    }
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.fixture(params=["stub", "package"])
def dataset(request, tmp_path, monkeypatch):
    """Make a dataset of these splits, with the package if it is installed; returns its name."""

    def make(splits):
        if request.param == "stub":
            stub_datasets(monkeypatch, splits)
            return "local"
        folder = tmp_path / "dataset"
        folder.mkdir()
        for split, rows in splits.items():
            lines = [json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows)]
            (folder / f"{split}.jsonl").write_text("".join(lines))
        return str(folder)

    if request.param == "package":
        datasets = pytest.importorskip("datasets", reason="loads the dataset")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return make


def test_dataset_splits_become_works(dataset):
    name = dataset({
        "train": ["", "One line.\n", "", "Another.\n"],
        "validation": ["Held out.\n"],
        "test": ["Never seen.\n"],
    })  # fmt: skip
    split = load_dataset_text(name)
    assert split.train == {"train": "One line.\nAnother.\n"}
    assert split.validation == {"validation": "Held out.\n"}


def test_dataset_without_validation_holds_out_its_last_rows(dataset):
    name = dataset({"train": ["a" * 50, "b" * 30, "c" * 15, "d" * 5]})
    split = load_dataset_text(name)
    assert split.train == {"train": "a" * 50 + "\n" + "b" * 30}
    assert split.validation == {"train (end)": "c" * 15 + "\n" + "d" * 5}


def test_dataset_with_a_test_split_is_validated_on_it(dataset):
    split = load_dataset_text(dataset({"train": ["abc"], "test": ["def"]}))
    assert split == TextSplit({"train": "abc"}, {"test": "def"})


def test_dataset_errors_name_the_trouble(dataset):
    name = dataset({"train": ["abc"], "test": ["def"]})
    with pytest.raises(ValueError, match=r"column .*'text'.* got 'body'"):
        load_dataset_text(name, column="body")
    with pytest.raises(ValueError, match="validation_share"):
        load_dataset_text(name, validation_share=0)


def test_dataset_without_training_text_is_an_error(monkeypatch):
    stub_datasets(monkeypatch, {"test": ["abc"]})
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        load_dataset_text("local")
    stub_datasets(monkeypatch, {"train": ["abc"]})
    with pytest.raises(ValueError, match="text to train on and text to validate on"):
        load_dataset_text("local")


def test_datasets_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'datasets'.*qflux\[datasets\]"):
        load_dataset_text("wikitext", "wikitext-103-raw-v1")
