"""Texts from files and datasets: what is read, what is held out, and what is said of the rest."""

import bz2
import gzip
import lzma
import os
import sys
import types

import pytest

from qflux import load_dataset_text, load_text
from qflux.commands import TextOptions
from qflux.text import files, sources
from qflux.text.sources import open_dataset, open_split, open_text

TEXT = "Größe\r\nline two €\r\n" * 40
READ = TEXT.replace("\r\n", "\n")
PACKERS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


def whole(works):
    return {work.name: "".join(work.read()) for work in works}


# --- files ---


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("suffix", list(PACKERS))
def test_packed_texts_are_read_in_pieces(tmp_path, monkeypatch, suffix, mark):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKERS[suffix](mark + TEXT.encode()))
    (tmp_path / "misnamed.txt").write_bytes(path.read_bytes())
    for size in (7, 2**20):
        monkeypatch.setattr(files, "PIECE", size)
        for name in (path.name, "misnamed.txt"):
            pieces = list(files.read_pieces(tmp_path / name))
            assert "".join(pieces) == READ and max(map(len, pieces)) <= size


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("latin.txt", "Größe".encode("latin-1"), "iconv"),
        ("late.txt", b"a" * 3000000 + b"\xff", "iconv"),
        ("marked.txt", "text".encode("utf-16"), "iconv -f UTF-16"),
        ("unmarked.txt", "plain text".encode("utf-16-le"), "iconv -f UTF-16"),
        ("long.txt", "text".encode("utf-32"), "iconv -f UTF-32"),
        ("cut.txt.xz", lzma.compress(TEXT.encode())[:-9], "get it again"),
        ("cut.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-9], "get it again"),
        ("flipped.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-6] + b"~" * 6, "get it again"),
        ("cut.txt.bz2", bz2.compress(TEXT.encode())[:-9], "get it again"),
        ("flipped.txt.bz2", bz2.compress(TEXT.encode())[:20] + b"~" * 40, "get it again"),
        ("flipped.txt.xz", lzma.compress(TEXT.encode())[:30] + b"~" * 90, "get it again"),
        ("no.txt.gz", b"plain text", "rename it"),
        ("book.txt", b"PK\3\4 and more", "unpack it"),
        ("paper.txt", b"%PDF-1.7 \xe2\xe3", "pdftotext"),
        ("new.txt", b"\x28\xb5\x2f\xfd and more", "unzstd"),
    ],
)
def test_files_that_are_no_text_are_named_with_the_remedy(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=named) as caught:
            load_text(path)
        assert repr(str(tmp_path / name)) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_pipe_is_read_once_and_used_as_often_as_needed():
    reading, writing = os.pipe()
    os.write(writing, b"abcdefghij" * 10)
    os.close(writing)
    source = open_text(f"/dev/fd/{reading}")
    os.close(reading)
    assert [sum(map(len, whole(part).values())) for part in source.parts] == [90, 10]
    assert source.characters == "abcdefghij" and source.stamp is None


@pytest.mark.parametrize("path", ["", " ", "a\0b"])
def test_an_empty_name_is_no_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="data must be the name"):
        load_text(path)
    for name in ("data", "dataset", "vocabulary_file"):
        with pytest.raises(ValueError, match=f"{name} must be the name"):
            TextOptions(**{name: path})


def test_hidden_and_other_files_are_no_works_and_others_are_said(tmp_path):
    for name in ("a.txt", "b.txt.gz", ".a.txt.swp", "._a.txt", ".hidden.txt", "notes.md"):
        (tmp_path / name).write_bytes(PACKERS[".gz"](b"ab") if name.endswith("gz") else b"ab")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "more.txt").mkdir()
    source = open_text(tmp_path)
    assert [work.name for work in source.works] == ["a.txt", "b.txt.gz", "empty.txt"]
    assert source.unused == ["more.txt/", "notes.md"] and source.empty == ["empty.txt"]
    assert "empty.txt" not in {work.name for part in source.parts for work in part}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "book.epub").write_text("")
    with pytest.raises(ValueError, match=r"no file ending in .*, only 'book\.epub'"):
        open_text(tmp_path / "none")


# --- what is held out ---


@pytest.mark.parametrize(
    ("sizes", "share", "expected"),
    [
        # The only two works are too different: the end of the long one is held out.
        ({"a": 1000, "b": 40000}, 0.1, {"b.txt (end)": 4100}),
        ({"a": 40000, "b": 1000}, 0.1, {"a.txt (end)": 4100}),
        ({"a": 100, "b": 100}, 0.1, {"b.txt (end)": 20}),
        # A last work that is far too long is passed over.
        ({"a": 500, "b": 90, "c": 400}, 0.1, {"b.txt": 90}),
        ({f"{i:03}": 50 for i in range(300)} | {"long": 20000}, 0.1, 70),
    ],
)
def test_the_held_out_part_is_near_the_share(tmp_path, sizes, share, expected):
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text("x" * size)
    train, held_out = map(whole, open_text(tmp_path, validation_share=share).parts)
    if isinstance(expected, dict):
        assert {name: len(text) for name, text in held_out.items()} == expected
    else:
        assert len(held_out) == expected and "long.txt" in train
    lengths = [sum(map(len, part.values())) for part in (train, held_out)]
    assert sum(lengths) == sum(sizes.values())
    assert 0.4 * share <= lengths[1] / sum(lengths) <= 2.5 * share


def test_works_to_hold_out_can_be_named(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    for names in (["b"], ["b.txt"]):
        split = load_text(tmp_path, validation_works=names)
        assert list(split.train) == ["a.txt", "c.txt"] and list(split.validation) == ["b.txt"]
    options = TextOptions(data=str(tmp_path), validation_works=("a", "c"))
    assert list(whole(options.load().parts[1])) == ["a.txt", "c.txt"]
    options = TextOptions(data=str(tmp_path / "a.txt"), validation_share=0.5)
    assert list(map(len, whole(options.load().parts[0]).values())) == [25]
    for names, message in (
        (["d"], r"validation_works must be among 'a\.txt', .* got 'd'"),
        (["a", "b", "c"], "must leave a work to train on"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text(tmp_path, validation_works=names)
    with pytest.raises(ValueError, match="single work"):
        load_text(tmp_path / "a.txt", validation_works=["a"])
    with pytest.raises(ValueError, match="cannot both be given"):
        load_text(tmp_path, validation_share=0.2, validation_works=["a"])
    with pytest.raises(ValueError, match="folders train and validation"):
        load_text(None, validation_share=0.2)


# --- datasets ---


class Rows:
    """A split as `datasets` has it, which counts how often its rows are read."""

    column_names = ("text", "label")

    def __init__(self, rows):
        self.rows, self.num_rows, self.reads = rows, len(rows), 0

    def iter(self, batch_size):
        for start in range(0, len(self.rows), batch_size):
            self.reads += len(self.rows[start : start + batch_size])
            yield {"text": self.rows[start : start + batch_size], "label": [1]}


@pytest.fixture
def dataset(monkeypatch):
    """Make a dataset of these splits."""
    module = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)

    def make(**splits):
        found = {name: Rows(rows) for name, rows in splits.items()}
        module.calls = []

        def load_dataset(*names, **more):
            module.calls.append((names, more))
            return found

        module.load_dataset = load_dataset
        return found

    return make


def test_rows_are_read_a_few_times_however_many_there_are(dataset):
    rows = dataset(train=["row of text"] * 20000)["train"]
    source = open_dataset("name")
    train, held_out = map(whole, source.parts)
    # As few rows as make up the share, with the line breaks between all.
    assert held_out == {"train (end)": "\n".join(["row of text"] * 2001)}
    assert train == {"train": "\n".join(["row of text"] * 17999)}
    assert rows.reads <= 3 * 20000


def test_a_last_row_that_is_most_of_the_text_is_cut(dataset):
    dataset(train=["a" * 10, "b" * 990])
    split = load_dataset_text("name")
    assert len(split.train["train"]) == 901 and split.validation == {"train (end)": "b" * 100}


def test_splits_are_held_out_by_name_and_what_is_unused_is_said(dataset):
    dataset(train=["abc"], validation=["def"], test=["ghi"])
    source = open_dataset("name", "config", streaming=True)
    assert source.unused == ["split 'test'"]
    module = sys.modules["datasets"]
    assert module.calls == [(("name", "config"), {"streaming": True})]
    source = open_dataset("name", validation_works=["test"])
    assert whole(source.parts[1]) == {"test": "ghi"} and source.unused == ["split 'validation'"]
    assert whole(open_split("name", split="test").parts[0]) == {"test": "ghi"}
    with pytest.raises(ValueError, match=r"among \['test', 'validation'\].* got 'dev'"):
        open_dataset("name", validation_works=["dev"])
    with pytest.raises(ValueError, match="validation_share cannot be used"):
        open_dataset("name", validation_share=0.2)
    with pytest.raises(ValueError, match="dataset_split must be one of"):
        open_split("name", split="dev")


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError, UnicodeError, KeyError])
def test_a_broken_dataset_is_one_line(dataset, error):
    rows = dataset(train=["abc"])["train"]

    def fail(*_, **__):
        raise error("what\nis wrong")

    sys.modules["datasets"].load_dataset = fail
    with pytest.raises(ValueError, match=r"dataset 'name' cannot be loaded .*what.*is wrong"):
        load_dataset_text("name")
    sys.modules["datasets"].load_dataset = lambda *_: {"train": rows}
    rows.iter = fail
    with pytest.raises(ValueError, match="dataset 'name' cannot be loaded") as caught:
        load_dataset_text("name")
    assert "\n" not in str(caught.value)


def test_a_column_without_text_is_named(dataset):
    dataset(train=["abc", None, 7, "def"])
    with pytest.raises(ValueError, match=r"column must hold text, got 'text' .* holds int"):
        load_dataset_text("name")


def test_rows_of_a_part_are_joined_once(dataset, monkeypatch):
    """Pieces of rows of every size give the same text."""
    rows = ["", "one\n", "two\n", None, "three\n" * 3] * 5
    dataset(train=rows, test=["xy"])
    texts = set()
    for size in (1, 10, 2**20):
        monkeypatch.setattr(sources, "PIECE", size)
        texts.add(load_dataset_text("name").train["train"])
    assert texts == {"".join(filter(None, rows))}
