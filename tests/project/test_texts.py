"""The program on texts that are not what it expects."""

import json

import pytest

SMALL = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2", "--context-length", "16",
         "--max-steps", "2", "--batch-size", "2"]  # fmt: skip


def characters(folder):
    return json.loads((folder / "vocabulary.json").read_text())["characters"]


def test_a_text_without_line_breaks_has_a_prompt_of_its_own(tmp_path, call):
    for name, text, first in (
        ("words", "to be or not " * 30, " "),
        ("letters", "tobeornot" * 30, "b"),
    ):
        (tmp_path / f"{name}.txt").write_text(text)
        folder = tmp_path / name
        status, _, err = call("train", "--data", tmp_path / f"{name}.txt", "--output-dir", folder,
                             *SMALL)  # fmt: skip
        assert status == 0, err
        assert "\n" not in characters(folder)
        status, out, err = call("generate", "--model-path", folder, "--max-new-tokens", "5")
        assert status == 0 and out.startswith(first) and len(out) == 1 + 5 + 1, err


def test_files_shorter_than_the_context_are_joined_and_it_is_said(tmp_path, call):
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i:02}.txt").write_text("tobeornot")
    (tmp_path / "text" / "notes.md").write_text("")
    status, _, err = call("train", "--data", tmp_path / "text", "--output-dir", tmp_path / "run",
                         *SMALL, "--epochs", "1")  # fmt: skip
    assert status == 0, err
    assert "54 works, 486 characters, 486 tokens to train on" in err
    assert "held out    54 tokens (10.0%): '54.txt', '55.txt', '56.txt' and 3 more" in err
    assert "54 works shorter than 16 tokens, separated" in err and "'notes.md'" in err
    # They need something between them.
    assert characters(tmp_path / "run") == "\nbenort"


def test_the_held_out_part_can_be_chosen(tmp_path, call):
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text("to be or not " * 10)
    data = ["train", "--data", tmp_path / "text", *SMALL]
    err = call(*data, "--output-dir", tmp_path / "a", "--validation-works", "b", "c.txt")[2]
    assert "held out    260 tokens (66.7%): 'b.txt', 'c.txt'" in err
    err = call(*data, "--output-dir", tmp_path / "b", "--validation-share", "0.05")[2]
    assert "held out    20 tokens (5.1%): 'c.txt (end)'" in err
    for more, named in (
        (["--validation-works", "d"], "got 'd'"),
        (["--validation-share", "1.5"], "validation_share"),
        (["--validation-share", "0.5", "--validation-works", "a"], "cannot both be given"),
    ):
        status, _, err = call(*data, "--output-dir", tmp_path / "c", *more)
        assert status == 2 and named in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--output-dir", ""],
        ["train", "--output-dir", "{root}/run", "--data", ""],
        ["train", "--output-dir", "{root}/run", "--dataset", ""],
        ["train", "--output-dir", "{root}/run", "--vocabulary-file", ""],
        ["generate", "--model-path", ""],
        ["eval", "--model-path", "", "--data", "{root}"],
        ["export", "--model-path", "", "--output-dir", "{root}/out"],
    ],
)
def test_an_empty_name_is_not_the_current_folder(tmp_path, call, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not " * 30)
    status, out, err = call(*(argument.format(root=tmp_path) for argument in arguments))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert f"{arguments[arguments.index('') - 1][2:].replace('-', '_')} must be the name" in err
    assert {path.name for path in tmp_path.iterdir()} <= {"a.txt", "run"}
