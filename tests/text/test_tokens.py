"""A text as ids: encoded once, mapped, and safe against whatever happens to the files."""

import errno
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from qflux import BpeVocabulary, ByteVocabulary, CharacterVocabulary, TextSplit, ngram_losses
from qflux.text import ngrams, tokens
from qflux.text.sources import open_text
from qflux.text.tokens import TOKENS_FILE, encode_text, sample_windows, token_type
from qflux.text.windows import JoinedWorks, TrainingWindows, evaluation_batches

WORKS = {"a.txt": "first work\n" * 30, "b.txt": "second €\n" * 20, "c.txt": "end\n" * 12}


@pytest.fixture
def folder(tmp_path):
    for name, text in WORKS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def mapped(monkeypatch):
    """Every text goes to a file, and a file is settled as soon as it is written."""
    monkeypatch.setattr(tokens, "MAPPED_BYTES", 10)
    monkeypatch.setattr(tokens, "_CLOCK_NS", -(10**15))


@pytest.fixture
def encodings(monkeypatch):
    """Count the works that are encoded."""
    counted = []
    original = ByteVocabulary.encode_pieces

    def encode_pieces(self, pieces):
        counted.append(1)
        return original(self, pieces)

    monkeypatch.setattr(ByteVocabulary, "encode_pieces", encode_pieces)
    return counted


def texts(encoded, vocabulary):
    return [vocabulary.decode(work.long()) for work in (*encoded.train, *encoded.validation)]


def encode(folder, vocabulary=None, **division):
    return encode_text(
        open_text(folder, **division), vocabulary or ByteVocabulary(), folder / "run"
    )


def test_a_text_is_described(folder):
    encoded = encode(folder)
    assert texts(encoded, ByteVocabulary()) == list(WORKS.values())
    assert [work.name for work in encoded.part("validation")] == ["c.txt"]
    assert (encoded.tokens("train"), encoded.tokens("validation")) == (330 + 220, 48)
    first, second, _ = encoded.works
    assert (second.characters, second.bytes, second.tokens) == (180, 220, 220)
    assert encoded.held_out_share == 48 / 598
    described = encoded.describe()
    assert described["train"]["works"] == 2 and described["train"]["tokens"] == 550
    assert described["train"]["first"][0] == {
        "name": "a.txt", "characters": 330, "sha256": first.sha256,
    }  # fmt: skip
    same = TextSplit({"x": WORKS["a.txt"], "y": WORKS["b.txt"]}, {"z": WORKS["c.txt"]})
    assert encode_text(same, ByteVocabulary()).sha256 == encoded.sha256
    assert encode(folder, validation_works=["a"]).sha256 != encoded.sha256
    assert not (folder / "run").exists()


def test_the_report_says_what_is_used_and_what_is_not(folder):
    (folder / "empty.txt").write_text("")
    (folder / "notes.md").write_text("")
    report = dict(encode(folder).report(300, eval_tokens=20))
    assert report["text"] == "2 works, 510 characters, 550 tokens to train on"
    assert report["held out"] == "48 tokens (8.0%): 'c.txt'"
    assert report["validated"].startswith("on 20 of these")
    assert report["joined"] == "1 work shorter than 300 tokens, separated"
    assert report["not used"] == "'notes.md', 'empty.txt (empty)'"
    assert list(dict(encode(folder).report(16))) == ["text", "held out", "not used"]


def test_ids_take_the_smallest_integers(folder):
    assert [token_type(size) for size in (256, 257, 65536, 65537)] == [
        torch.uint8, torch.uint16, torch.uint16, torch.int32,
    ]  # fmt: skip
    many = CharacterVocabulary(map(chr, range(32, 9000)))
    text = TextSplit({"a": "".join(map(chr, range(32, 9000)))}, {"b": "zz"})
    encoded = encode_text(text, many)
    assert encoded.train[0].dtype == torch.uint16
    assert torch.equal(encoded.train[0].long(), torch.arange(8968))


def test_a_large_text_is_encoded_once(folder, mapped, encodings):
    first = encode(folder)
    assert first.path == folder / "run" / TOKENS_FILE and len(encodings) == 3 + 1
    encodings.clear()
    again = encode(folder)
    assert len(encodings) == 1  # the separator
    assert again.works == first.works and again.sha256 == first.sha256
    assert texts(again, ByteVocabulary()) == list(WORKS.values())
    assert os.listdir(folder / "run") == [TOKENS_FILE]


def test_touched_files_are_compared_and_not_encoded(folder, mapped, encodings):
    encode(folder)
    encodings.clear()
    os.utime(folder / "a.txt", ns=(1, 1))
    encode(folder)
    assert len(encodings) == 1


def same_size(folder):
    found = (folder / "a.txt").stat()
    (folder / "a.txt").write_text(WORKS["a.txt"].replace("first", "fifth"))
    os.utime(folder / "a.txt", ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        same_size,
        lambda folder: (folder / "b.txt").write_text("longer " * 40),
        lambda folder: (folder / "d.txt").write_text("a new work"),
        lambda folder: (folder / "a.txt").rename(folder / "aa.txt"),
        lambda folder: (folder / "b.txt").unlink(),
    ],
    ids=["size and time kept", "longer", "new", "renamed", "gone"],
)
@pytest.mark.parametrize("settled", [True, False])
def test_a_changed_text_is_encoded_again(folder, mapped, monkeypatch, change, settled):
    encode(folder)
    if not settled:
        monkeypatch.setattr(tokens, "_CLOCK_NS", 2 * 10**9)
    change(folder)
    encoded = encode(folder)
    whole = [file.read_text() for file in sorted(folder.glob("*.txt"))]
    assert sorted(texts(encoded, ByteVocabulary())) == sorted(whole)
    assert [work.name for work in encoded.works] == sorted(p.name for p in folder.glob("*.txt"))


def test_a_change_within_the_clocks_resolution_is_seen(folder, mapped, monkeypatch):
    """Size, both times and place are the same: only reading tells."""
    monkeypatch.setattr(tokens, "_CLOCK_NS", 2 * 10**9)
    stamp = open_text(folder).stamp
    encode(folder)
    same_size(folder)
    source = open_text(folder)
    monkeypatch.setattr(type(source), "stamp", property(lambda _: stamp))
    assert "fifth" in texts(encode_text(source, ByteVocabulary(), folder / "run"),
                            ByteVocabulary())[0]  # fmt: skip


def test_another_vocabulary_or_division_is_encoded_again(folder, mapped):
    encode(folder)
    vocabulary = CharacterVocabulary("".join(WORKS.values()))
    assert texts(encode(folder, vocabulary), vocabulary) == list(WORKS.values())
    other = CharacterVocabulary(vocabulary.characters[:-1] + "@€")
    assert texts(encode(folder, other), other) == list(WORKS.values())
    assert len(encode(folder, validation_works=["a"]).train[0]) == 220
    assert len(encode(folder, validation_share=0.9).train) == 1


def test_damaged_tokens_are_replaced_and_other_files_are_kept(folder, mapped):
    encode(folder)
    path = folder / "run" / TOKENS_FILE
    good = path.read_bytes()
    for bad in (b"~" + good[1:], good[:40] + good[41:], good[:-60] + b"~" * 44 + good[-16:]):
        path.write_bytes(bad)
        assert texts(encode(folder), ByteVocabulary()) == list(WORKS.values())
    for bad in (good[:-1], b"", b"somebody's notes, and rather long ones"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"tokens\.bin.* move it away"):
            encode(folder)
        assert path.read_bytes() == bad


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_no_file(folder, mapped, monkeypatch, call):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_):
        raise full

    if call == "fsync":
        monkeypatch.setattr(tokens.os, "fsync", fail)
    else:
        monkeypatch.setattr(tokens._Encoder, "_store", lambda *_: fail())
    with pytest.raises(OSError, match="No space left"):
        encode(folder)
    assert os.listdir(folder / "run") == []


def test_a_text_that_changes_while_it_is_read_is_refused(folder, mapped):
    source = open_text(folder)
    assert source.parts
    (folder / "a.txt").write_text("other text")
    with pytest.raises(ValueError, match="changed while it was read"):
        encode_text(source, ByteVocabulary(), folder / "run")
    assert os.listdir(folder / "run") == []


def test_without_a_folder_no_file_is_left(folder, mapped, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    encoded = encode_text(open_text(folder), ByteVocabulary())
    assert texts(encoded, ByteVocabulary()) == list(WORKS.values()) and encoded.path is None
    assert os.listdir(tmp_path / "temporary") == []


def test_a_character_without_an_id_is_named_with_its_work(folder, monkeypatch):
    monkeypatch.setattr("qflux.text.files.PIECE", 7)
    with pytest.raises(ValueError, match=r"work 'b\.txt': .*'€' at position 7, .*'byte'"):
        encode(folder, CharacterVocabulary("".join(WORKS.values()).replace("€", "")))


def test_memory_is_a_few_bytes_a_character(tmp_path):
    """The ids of 30 million characters and their windows and counts, in a process of its own."""
    (tmp_path / "a.txt").write_text("To be, or not to be: that is the question.\n" * 700_000)
    program = """
import resource, sys
from qflux import make_vocabulary, ngram_losses
from qflux.text.sources import open_text
from qflux.text.tokens import encode_text
from qflux.text.windows import TrainingWindows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
source = open_text(sys.argv[1] + "/a.txt")
vocabulary = make_vocabulary("char", source.characters)
encoded = encode_text(source, vocabulary, sys.argv[1])
windows = TrainingWindows(encoded.train, 64, 4, 0, encoded.separator)
windows.batch(0)
ngram_losses(encoded.train, encoded.validation_sample(1000, 64), vocabulary.size)
print((peak() - before) * 1024 / 30e6)
"""
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    # One for the mapped ids, the rest for pieces of fixed size; it was 48.
    assert float(found.stdout) < 9


# --- windows ---


def rows_of(windows, epochs):
    steps = epochs * windows.steps_per_epoch
    return torch.cat([windows.batch(step) for step in range(steps)])


def test_short_works_are_joined_and_all_tokens_are_seen():
    works = [torch.arange(50) + 1 + 50 * i for i in range(300)]
    works.insert(7, torch.arange(2000) + 20000)
    separator = torch.tensor([0])
    windows = TrainingWindows(works, 64, 4, seed=1, separator=separator)
    assert windows.steps_per_epoch * 4 * 64 > 0.95 * (15000 + 2000)
    rows = rows_of(windows, epochs=8)
    # Only what a phase can leave out at the ends of a work is rare.
    assert len(set(torch.cat(works).tolist()) - set(rows.flatten().tolist())) < 2 * 2 * 64
    # Inside a window what follows is the next token, or a separator between two works.
    left, right = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    between = (left == 0) | (right == 0)
    assert (right[~between] == left[~between] + 1).all()
    assert (left[right == 0] % 50 == 0).all() and (right[left == 0] % 50 == 1).all()
    # The long work is with none of the others.
    assert ((rows >= 20000).any(1) == (rows >= 20000).all(1)).all()


def test_a_short_work_alone_joins_a_long_one():
    works = [torch.arange(100, 103), torch.arange(40)]
    windows = TrainingWindows(works, 10, 2, seed=0, separator=torch.tensor([77, 78]))
    seen = set(rows_of(windows, epochs=20).flatten().tolist())
    assert seen == {*range(40), 77, 78, 100, 101, 102}
    joined = JoinedWorks([torch.arange(3), torch.arange(3)], torch.zeros(0, dtype=torch.int64))
    assert joined[0:6].tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match=r"longest work has 3 tokens and all 2 together 7"):
        TrainingWindows([torch.arange(3)] * 2, 10, 1, 0, torch.tensor([1]))


def test_joined_works_are_cut_like_one_tensor():
    works = [torch.arange(n, dtype=torch.uint8) for n in (1, 4, 2, 7)]
    separator = torch.tensor([9, 9])
    joined = JoinedWorks(works, separator)
    parts = [part for work in works for part in (work.long(), separator)][:-1]
    whole = torch.cat(parts)
    assert len(joined) == len(whole)
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 2):
            assert torch.equal(joined[start:stop], whole[start:stop])


def test_batches_are_the_same_wherever_the_tokens_are(folder, mapped):
    vocabulary = ByteVocabulary()
    works = [vocabulary.encode(WORKS[name]) for name in ("a.txt", "b.txt")]
    encoded = encode(folder)
    for seed in (0, 3):
        memory = TrainingWindows(works, 300, 4, seed, vocabulary.separator)
        from_file = TrainingWindows(encoded.train, 300, 4, seed, encoded.separator)
        for step in (5, 0, 17):
            assert torch.equal(memory.batch(step), from_file.batch(step))


@pytest.mark.parametrize("eval_tokens", [1, 20, 21, 45, 200, 10**6, None])
def test_a_sample_is_some_of_the_windows_evenly_spread(eval_tokens):
    works = [torch.arange(103), torch.arange(200, 201), torch.arange(300, 512)]
    every = [
        ids[labels >= 0].tolist()
        for batch in evaluation_batches(works, 11, 8)
        for ids, labels in zip(*batch, strict=True)
    ]
    sample = sample_windows(works, eval_tokens, 11)
    rows = [
        ids[labels >= 0].tolist()
        for batch in evaluation_batches(sample, 11, 8)
        for ids, labels in zip(*batch, strict=True)
    ]
    assert all(row in every for row in rows)
    scored = sum(len(row) - 1 for row in rows)
    if eval_tokens is None or eval_tokens >= 313:
        assert rows == every
    else:
        assert min(10, eval_tokens) <= scored <= max(10, eval_tokens)
        assert scored > eval_tokens - 20
        places = [every.index(row) for row in rows]
        gaps = [b - a for a, b in pairwise(places)]
        assert max(gaps, default=1) - min(gaps, default=1) <= 1
    with pytest.raises(ValueError, match="eval_tokens"):
        sample_windows(works, 0, 11)


def test_ngrams_are_counted_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    train, held_out = (
        [torch.randint(5, (n,), generator=generator).to(torch.uint8) for n in sizes]
        for sizes in ((40, 1, 2, 300), (1, 2, 3, 100))
    )
    whole = [ngrams.ngram_loss(train, held_out, 5, order) for order in (1, 2, 3, 5)]
    for chunk, table in ((3, 2**22), (3, 1), (50, 30)):
        monkeypatch.setattr(ngrams, "_CHUNK", chunk)
        monkeypatch.setattr(ngrams, "_TABLE", table)
        found = [ngrams.ngram_loss(train, held_out, 5, order) for order in (1, 2, 3, 5)]
        assert found == pytest.approx(whole, rel=1e-12)
    assert ngram_losses(train, held_out, 5)["unigram"] == pytest.approx(whole[0])


def test_texts_of_byte_pairs_are_encoded_in_parallel_pieces(tmp_path, monkeypatch, mapped):
    pytest.importorskip("tokenizers", reason="merges byte pairs")
    text = "the cat sat on the mat, the café\n\n  sat? " * 90
    vocabulary = BpeVocabulary.train(text, 290)
    whole = vocabulary.encode(text)
    (tmp_path / "a.txt").write_text(text)
    for name, value in (("_CUT", 20), ("_BATCH", 3)):
        monkeypatch.setattr(f"qflux.text.vocabulary.{name}", value)
    monkeypatch.setattr("qflux.text.files.PIECE", 13)
    encoded = encode_text(open_text(tmp_path).whole, vocabulary, tmp_path / "run")
    assert torch.equal(encoded.train[0].long(), whole) and encoded.train[0].dtype == torch.uint16
