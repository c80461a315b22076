"""A run is a record: what its folder holds, what a resumed run may change, how it goes back."""

import dataclasses
import errno
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch

from qflux import QuantumFluxConfig, QuantumFluxLM, TextSplit, TrainingOptions, load_model, train
from qflux.text import sources as sources_module
from qflux.text import tokens as tokens_module
from qflux.text.vocabulary import CharacterVocabulary
from qflux.text.windows import TrainingWindows
from qflux.train import folder as folder_module
from qflux.train import loop as loop_module
from qflux.train import states as states_module
from qflux.train.checkpoint import usable_device
from qflux.train.folder import LOCK_FILE, sole_writer
from qflux.train.loop import NonFiniteLossError
from qflux.train.options import MAY_CHANGE, OF_THE_CALL
from qflux.train.states import States

PATTERN = TextSplit({"a": "abcdefgh " * 60}, {"b": "abcdefgh " * 7})
VOCABULARY = CharacterVocabulary(PATTERN.text)
CONFIG = QuantumFluxConfig(
    VOCABULARY.size, num_layers=1, num_cylinders=2, hidden_dim=16, context_length=12, mlp_ratio=2
)
TEXT = "To be, or not to be: that is the question.\n" * 12
SMALL = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2", "--context-length", "16"]


def run(folder, text=PATTERN, config=CONFIG, **options):
    given = {"batch_size": 4, "max_steps": 12, "log_interval": 1, "eval_interval": 4}
    options = TrainingOptions(folder, progress=False, **{**given, **options})
    return train(config, text, VOCABULARY, options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder):
    keys = ("step", "train_loss", "val_loss", "learning_rate", "gradient_norm")
    return [[line.get(key) for key in keys] for line in metrics(folder)]


def weights(folder):
    return {name: value.tolist() for name, value in load_model(folder)[0].state_dict().items()}


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# --- the record ---


def test_the_record_has_options_text_vocabulary_and_versions(tmp_path):
    run(tmp_path, learning_rate=1e-3, betas=(0.8, 0.9))
    record = json.loads((tmp_path / "run.json").read_text())
    expected = {field.name for field in dataclasses.fields(TrainingOptions)} - set(OF_THE_CALL)
    assert set(record["options"]) == expected
    assert record["options"]["learning_rate"] == 1e-3 and record["options"]["betas"] == [0.8, 0.9]
    part = record["text"]["train"]
    assert (part["works"], part["characters"], part["first"][0]["name"]) == (1, 540, "a")
    assert len(record["text"]["sha256"]) == 64
    assert record["vocabulary"] == {"kind": "char", "size": 9}
    assert record["versions"]["torch"] == torch.__version__
    assert {"qflux", "python"} <= set(record["versions"])


def test_the_record_keeps_where_the_text_came_from(tmp_path):
    def stored():
        return json.loads((tmp_path / "run.json").read_text())["source"]

    options = {"max_steps": 1, "batch_size": 4, "progress": False}
    train(CONFIG, PATTERN, VOCABULARY, TrainingOptions(tmp_path, **options), source={"a": 1})
    assert stored() == {"a": 1}
    again = TrainingOptions(tmp_path, **options, resume=True)
    train(CONFIG, PATTERN, VOCABULARY, again)
    assert stored() == {"a": 1}
    train(CONFIG, PATTERN, VOCABULARY, again, source={"a": 2})
    assert stored() == {"a": 2}


def test_every_option_may_change_or_may_not():
    names = {field.name for field in dataclasses.fields(TrainingOptions)}
    assert set(MAY_CHANGE) | set(OF_THE_CALL) < names
    assert not set(MAY_CHANGE) & set(OF_THE_CALL)


OTHER_VALUES = {
    "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3, "warmup": 0.2, "batch_size": 5,
    "learning": "hybrid", "hebbian_rate": 2.0, "hebbian_error": "logits", "precision": "float16",
    "seed": 7, "curriculum_length": 4, "curriculum_share": 0.9, "radius_warmup": 0.3,
    "eval_tokens": 99, "init_from": "elsewhere",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_an_option_that_may_not_change_is_refused_with_the_stored_value(tmp_path, name):
    run(tmp_path, max_steps=2)
    before = snapshot(tmp_path)
    stored = json.loads(json.dumps(getattr(TrainingOptions("", batch_size=4), name)))
    with pytest.raises(ValueError, match="cannot resume") as caught:
        run(tmp_path, max_steps=2, resume=True, **{name: OTHER_VALUES[name]})
    assert f"{name} {stored!r} -> " in str(caught.value)
    assert snapshot(tmp_path) == before


def test_every_option_that_may_not_change_is_tried():
    names = {field.name for field in dataclasses.fields(TrainingOptions)}
    assert set(OTHER_VALUES) == names - set(MAY_CHANGE) - set(OF_THE_CALL)
    with pytest.raises(TypeError):
        TrainingOptions("", no_such_option=1)


def test_options_that_may_change_are_used_and_kept(tmp_path, call, text_file):
    base = ["train", "--output-dir", tmp_path / "run"]
    given = [*SMALL, "--data", text_file, "--max-steps", "4", "--log-interval", "1"]
    assert call(*base, *given)[0] == 0
    more = ["--max-steps", "8", "--learning-rate", "1e-3", "--log-interval", "2"]
    status, _, err = call(*base, "--resume", *more)
    assert status == 0, err
    assert "max_steps 4 -> 8" in err and "learning_rate 0.005 -> 0.001" in err
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 6, 8]
    assert max(line["learning_rate"] for line in lines[4:]) <= 1e-3
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert (stored["max_steps"], stored["learning_rate"], stored["log_interval"]) == (8, 1e-3, 2)


def test_resume_alone_continues_exactly(tmp_path, call, text_file, monkeypatch):
    """None of the options is said again, and the folder is another one by then."""
    options = [
        *SMALL, "--data", text_file.name, "--batch-size", "3", "--seed", "5", "--max-steps", "9",
        "--learning-rate", "2e-3", "--weight-decay", "0.3", "--precision", "bfloat16",
        "--log-interval", "1", "--eval-interval", "4", "--vocabulary", "byte", "--dropout", "0.1",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call("train", "--output-dir", "whole", *options)[0] == 0
    original = TrainingWindows.batch

    def batch(self, step):
        if step == 6:
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingWindows, "batch", batch)
        assert call("train", "--output-dir", "parts", *options)[0] == 130
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    status, _, err = call("train", "--output-dir", "../parts", "--resume")
    assert status == 0, err
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    records = [
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "parts")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--batch-size", "8"], "batch_size 4 -> 8"),
        (["--use-hebbian"], "learning 'backprop' -> 'hebbian'"),
        (["--hidden-dim", "16"], "hidden_dim 8 -> 16"),
        (["--preset", "flux"], "preset: 'lm' -> 'flux'"),
        (["--vocabulary", "byte"], "vocabulary: 'char' -> 'byte'"),
        (["--embedding", "learned"], "no embedding"),
        (["--data", "{root}/other.txt"], "'other.txt'"),
        (["--data", "{root}/nowhere.txt"], "nowhere.txt"),
        (["--data", "{root}/new.txt"], "another text: work 'new.txt': text contains '~'"),
        (["--resume-step", "3"], "5, got 3"),
        (["--overwrite"], "contradict"),
        (["--precision", "float16"], "precision 'float32' -> 'float16'"),
    ],
)
def test_a_resumed_run_cannot_become_another(tmp_path, call, text_file, more, named):
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    (tmp_path / "new.txt").write_text("~" + TEXT)
    base = ["train", "--output-dir", tmp_path / "run"]
    assert call(*base, *SMALL, "--data", text_file, "--max-steps", "5")[0] == 0
    before = snapshot(tmp_path / "run")
    status, out, err = call(*base, "--resume", *(part.format(root=tmp_path) for part in more))
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err
    assert snapshot(tmp_path / "run") == before


def test_a_changed_text_is_refused_by_its_digest(tmp_path):
    run(tmp_path, max_steps=2)
    swapped = TextSplit({"a": "bacdefgh " + PATTERN.train["a"][9:]}, PATTERN.validation)
    with pytest.raises(ValueError, match="'a' has the same size and other characters"):
        run(tmp_path, text=swapped, resume=True)
    shorter = TextSplit({"a": PATTERN.train["a"][:-9]}, PATTERN.validation)
    with pytest.raises(ValueError, match=r"'a' had 540 characters and has 531.*init_from"):
        run(tmp_path, text=shorter, resume=True)
    more = TextSplit({**PATTERN.train, "c": "abc"}, PATTERN.validation)
    with pytest.raises(ValueError, match="training work 'c' is new"):
        run(tmp_path, text=more, resume=True)
    renamed = TextSplit({"z": PATTERN.train["a"]}, PATTERN.validation)
    assert run(tmp_path, text=renamed, max_steps=3, resume=True).steps == 3


def test_a_moved_text_can_be_named_anew(tmp_path, call, text_file):
    base = ["train", "--output-dir", tmp_path / "run"]
    assert call(*base, *SMALL, "--data", text_file, "--max-steps", "2")[0] == 0
    moved = text_file.rename(tmp_path / "moved.txt")
    status, _, err = call(*base, "--resume", "--max-steps", "3")
    assert status == 2 and "data says where" in err
    assert call(*base, "--resume", "--max-steps", "3", "--data", moved)[0] == 0
    assert call(*base, "--resume", "--max-steps", "4")[0] == 0


def test_a_mapped_text_is_not_read_again(tmp_path, call, text_file, monkeypatch):
    """Not for its characters, and not for the counts at the end."""
    monkeypatch.setattr(tokens_module, "MAPPED_BYTES", 100)
    # Whatever the clock says, the file was written long ago.
    monkeypatch.setattr(tokens_module, "_CLOCK_NS", -(2**62))
    reads = []
    original = sources_module.read_pieces
    monkeypatch.setattr(
        sources_module, "read_pieces", lambda file: reads.append(file) or original(file)
    )
    folder = tmp_path / "run"
    base = ["train", "--output-dir", folder]
    given = [*SMALL, "--data", text_file, "--max-steps", "2"]
    assert call(*base, *given, "--dry-run")[0] == 0 and not folder.exists()
    assert call(*base, *given)[0] == 0
    assert reads
    reads.clear()
    before = (folder / "tokens.bin").read_bytes()
    status, out, err = call(*base, "--resume", "--max-steps", "4")
    assert status == 0 and "bigram" in out, err
    assert not reads and (folder / "tokens.bin").read_bytes() == before
    assert call(*base, *given, "--overwrite")[0] == 0
    assert (folder / "tokens.bin").read_bytes() == before
    (folder / "tokens.bin").write_bytes(b"precious")
    status, _, err = call(*base, "--resume", "--max-steps", "5")
    assert status == 2 and err.count("\n") == 1 and "tokens.bin' is not a whole file" in err


def test_a_run_without_a_record_takes_the_options_given(tmp_path):
    """As versions without run.json left them."""
    run(tmp_path, max_steps=2)
    (tmp_path / "run.json").unlink()
    assert run(tmp_path, max_steps=3, weight_decay=0.2, resume=True).steps == 3
    assert json.loads((tmp_path / "run.json").read_text())["options"]["weight_decay"] == 0.2


def test_the_backend_is_not_part_of_the_model(tmp_path):
    reference = dataclasses.replace(CONFIG, backend="reference")
    run(tmp_path, config=reference, max_steps=2)
    assert load_model(tmp_path)[0].config.backend == "auto"
    # As a file from a machine with a GPU has it.
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"reference"', '"cuda"'))
    model, vocabulary = load_model(tmp_path)
    model(vocabulary.encode("abc")[None])
    assert run(tmp_path, config=CONFIG, max_steps=3, resume=True).steps == 3


# --- limits ---


def test_a_limit_that_nobody_gave_does_not_end_a_run():
    def total(**options):
        return TrainingOptions("", **options).total_steps(3)

    assert total() == 15 and total(max_steps=30) == 30 and total(max_seconds=1.0) is None
    assert total(epochs=5, max_steps=30) == 15 and total(epochs=50, max_steps=30) == 30
    assert total(max_steps=7, max_seconds=1.0) == 7 and total(epochs=0.5, max_seconds=9.0) == 2


def test_what_ends_a_run_is_said_before_and_after(tmp_path, call, text_file):
    base = ["train", *SMALL, "--data", text_file, "--batch-size", "9", "--eval-interval", "100"]
    for name, given, reason, more in (
        ("a", ["--epochs", "2", "--max-steps", "30"], "2 epochs, which come before max_steps 30",
         "--epochs 4"),
        ("b", ["--max-steps", "7"], "max_steps 7", "--max-steps 14"),
        ("c", ["--max-steps", "8", "--eval-interval", "1", "--learning-rate", "1e-30",
               "--patience", "2"], "patience 2", "--patience 4"),
        ("d", ["--max-seconds", "0.01"], "max_seconds 0.01", "--max-seconds 0.02"),
    ):  # fmt: skip
        status, out, err = call(*base, *given, "--output-dir", tmp_path / name)
        assert status == 0, err
        assert f"ended at {reason}" in out and f"--resume {more}\n" in out
        assert f"next: qflux generate --model-path {tmp_path / name}\n" in out
        assert name == "c" or f"(ends at {reason})" in err
    status, out, _ = call("train", "--output-dir", tmp_path / "b", "--resume")
    assert status == 0 and "nothing was left to do" in out


# --- what is in the folder already ---


@pytest.mark.parametrize(
    "name", ["config.json", "vocabulary.json", "model.safetensors", "metrics.jsonl", "run.json"]
)
def test_files_of_somebody_else_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=name if name != "run.json" else "overwrite") as error:
        run(tmp_path)
    assert "overwrite" in str(error.value)
    assert snapshot(tmp_path) == {name: b"precious"}
    assert run(tmp_path, max_steps=2, overwrite=True).steps == 2
    assert len(metrics(tmp_path)) == 2


def test_a_run_is_replaced_only_when_that_is_asked_for(tmp_path):
    run(tmp_path)
    (tmp_path / "wandb_id").write_text("old")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"resume it.*overwrite"):
        run(tmp_path)
    with pytest.raises(ValueError, match="context_length"):
        run(tmp_path, text=TextSplit({"a": "abc"}, PATTERN.validation), overwrite=True)
    assert snapshot(tmp_path) == before
    run(tmp_path, max_steps=2, overwrite=True)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert not States(tmp_path).kept() and not (tmp_path / "wandb_id").exists()


def test_other_files_are_left_alone_and_leftovers_are_not(tmp_path):
    for name in ("notes.txt", ".hidden", ".mine.tmp", ".training_state.pt.4242.tmp"):
        (tmp_path / name).write_text("x")
    run(tmp_path, max_steps=1)
    assert {"notes.txt", ".hidden", ".mine.tmp"} <= set(os.listdir(tmp_path))
    assert ".training_state.pt.4242.tmp" not in os.listdir(tmp_path)
    assert LOCK_FILE not in os.listdir(tmp_path)


def test_a_folder_has_one_writer(tmp_path):
    program = (
        "import sys, pathlib\nfrom qflux.train.folder import sole_writer\n"
        f"with sole_writer(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('here', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "here\n"
        for resume in (False, True):
            with pytest.raises(FileExistsError, match=f"written by process {other.pid} on "):
                run(tmp_path, resume=resume)
    finally:
        other.kill()
        other.communicate()
    # A lock does not outlive its process, and its file is in nobody's way.
    assert run(tmp_path, max_steps=1).steps == 1
    assert LOCK_FILE not in os.listdir(tmp_path)


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_module.fcntl, "flock", flock)
    assert run(tmp_path, max_steps=1).steps == 1


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume: there is no folder"):
        run(tmp_path / "mistyped", resume=True)
    assert os.listdir(tmp_path) == []


def test_a_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    """A run that ends while another one waits for its lock takes the file away."""
    original, calls = folder_module.fcntl.flock, []

    def flock(handle, operation):
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(handle)
        return original(handle, operation)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.fcntl, "flock", flock)
        with sole_writer(tmp_path):
            assert len(calls) == 2
            with pytest.raises(FileExistsError, match=str(os.getpid())), sole_writer(tmp_path):
                pass
    assert os.listdir(tmp_path) == []


# --- states ---


def test_the_last_states_are_kept_and_a_run_goes_back_to_any(tmp_path):
    options = {"eval_interval": 2, "keep_states": 3, "max_steps": 10}
    run(tmp_path / "whole", **options)
    states = States(tmp_path / "whole", 3)
    assert list(states.kept()) == [6, 8] and step_of(states.folder / "training_state.pt") == 10
    assert [step_of(path) for path in states.kept().values()] == [6, 8]
    expected, best = curve(tmp_path / "whole"), weights(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="6, 8, 10, got 4"):
        run(tmp_path / "whole", **options, resume=True, resume_step=4)
    assert curve(tmp_path / "whole") == expected
    for step in (8, 10, 6):
        result = run(tmp_path / "whole", **options, resume=True, resume_step=step)
        assert result.steps == 10 and curve(tmp_path / "whole") == expected
        assert weights(tmp_path / "whole") == best
    assert list(states.kept()) == [6, 8]


def test_going_back_forgets_what_came_after(tmp_path):
    options = {"eval_interval": 2, "keep_states": 5}
    run(tmp_path, **options, max_steps=8)
    run(tmp_path, **options, max_steps=4, resume=True, resume_step=4)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    assert list(States(tmp_path).kept()) == [2] and step_of(tmp_path / "training_state.pt") == 4


@pytest.mark.parametrize("keep", [1, 2])
def test_so_many_states_are_kept(tmp_path, keep):
    run(tmp_path, keep_states=keep, eval_interval=3)
    assert list(States(tmp_path).kept()) == [9][: keep - 1]


def test_states_are_kept_where_files_cannot_have_two_names(tmp_path, monkeypatch):
    def link(*_):
        raise OSError("no links here")

    monkeypatch.setattr(states_module.os, "link", link)
    run(tmp_path, eval_interval=6)
    assert [step_of(path) for path in States(tmp_path).kept().values()] == [6]


def test_without_the_latest_state_the_one_before_serves(tmp_path):
    run(tmp_path)
    expected = curve(tmp_path)
    (tmp_path / "training_state.pt").unlink()
    assert run(tmp_path, resume=True).steps == 12
    assert curve(tmp_path) == expected


@pytest.mark.parametrize("content", [b"", b"no archive", None, {"step": 3}, [1], "cut"], ids=str)
def test_a_broken_state_is_named_with_a_way_out(tmp_path, content):
    run(tmp_path, eval_interval=6)
    path = tmp_path / "training_state.pt"
    if content is None or isinstance(content, dict | list):
        torch.save(content, path)
    else:
        path.write_bytes(path.read_bytes()[:5000] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"training_state\.pt'.*resume_step 6"):
        run(tmp_path, eval_interval=6, resume=True)
    assert run(tmp_path, eval_interval=6, resume=True, resume_step=6).steps == 12


def test_a_flipped_bit_in_a_state_is_found(tmp_path):
    """PyTorch alone reads most of them as other weights."""
    run(tmp_path, max_steps=4)
    path = tmp_path / "training_state.pt"
    good = path.read_bytes()
    expected, draw = States(tmp_path).load()["model"], random.Random(0)
    found = 0
    for _ in range(40):
        content = bytearray(good)
        content[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            state = States(tmp_path).load()["model"]
        except ValueError:
            found += 1
        else:  # in what only fills the file up
            assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert found > 10


def test_a_state_of_another_network_is_no_traceback(tmp_path):
    run(tmp_path, keep_states=1)
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    del state["model"]["head.weight"]
    torch.save(state, tmp_path / "training_state.pt")
    with pytest.raises(ValueError, match="does not fit this run"):
        run(tmp_path, keep_states=1, resume=True)


def test_a_model_can_be_read_before_the_first_evaluation(tmp_path, monkeypatch):
    kept = []
    original = States.save

    def save(self, state):
        if state["step"] == 4:
            kept.append(weights(tmp_path))
        original(self, state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(States, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, eval_interval=None, save_interval=2)
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert kept == [{name: value.tolist() for name, value in state["model"].items()}]


# --- what is not finite ---


def poison(monkeypatch, when, value=math.nan):
    """From the pass of training number `when` on, losses are `value`."""
    original, calls = QuantumFluxLM.forward, iter(range(10_000))

    def forward(self, input_ids, labels=None, return_layers=False):
        output = original(self, input_ids, labels, return_layers)
        bad = self.training and next(calls) >= when
        return output._replace(loss=output.loss * value) if bad else output

    monkeypatch.setattr(QuantumFluxLM, "forward", forward)


@pytest.mark.parametrize("rate", [1e12, 1e30])
def test_a_diverging_step_does_not_replace_a_good_state(tmp_path, rate):
    run(tmp_path, max_steps=8)
    good = (tmp_path / "training_state.pt").read_bytes()
    options = {"max_steps": 60, "save_interval": 1, "keep_states": 1, "eval_interval": None}
    with pytest.raises(NonFiniteLossError, match=r"step 8 is kept: qflux train .*--learning-rate"):
        run(tmp_path, **options, learning_rate=rate, resume=True)
    assert (tmp_path / "training_state.pt").read_bytes() == good
    result = run(tmp_path, max_steps=14, learning_rate=1e-3, resume=True)
    assert result.steps == 14 and math.isfinite(result.validation_loss)


@pytest.mark.parametrize("part", ["model", "learner"])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, part):
    original = loop_module.all_finite
    monkeypatch.setattr(loop_module, "all_finite", lambda state: False)
    with pytest.raises(NonFiniteLossError, match=r"step 4 left weights .* no state was saved"):
        run(tmp_path)
    assert not States(tmp_path).exist()
    bad = {"model": {"w": torch.ones(2)}, "learner": [{"n": torch.ones(2, dtype=torch.int64)}]}
    assert original(bad)
    bad[part] = {"deep": [torch.tensor([1.0, math.inf])]}
    assert not original(bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_an_error(tmp_path, monkeypatch, value, call):
    losses = iter([2.0, value])
    monkeypatch.setattr(loop_module, "evaluate", lambda *_: next(losses))
    with pytest.raises(
        NonFiniteLossError, match=r"validation loss is .* at step 8.*step 4 is kept"
    ):
        run(tmp_path)
    assert step_of(tmp_path / "training_state.pt") == 4
    assert all(math.isfinite(line.get("val_loss", 0)) for line in metrics(tmp_path))


def test_the_program_does_not_succeed_with_a_loss_that_is_not_finite(
    tmp_path, monkeypatch, call, text_file
):
    poison(monkeypatch, 3)
    arguments = ["train", *SMALL, "--data", text_file, "--max-steps", "6", "--log-interval", "1"]
    status, out, err = call(*arguments, "--output-dir", tmp_path / "run")
    assert (status, out) == (2, "")
    assert "nan at step 4" in err.splitlines()[-1] and "learning_rate" in err.splitlines()[-1]


# --- broken files, small machines ---


@pytest.mark.parametrize("line", [b"\n", b"{broken\n", b"[1]\n", b'{"step": "x"}\n', b"\xff\xfe\n"])
def test_a_bad_line_of_metrics_does_not_block_a_resumption(tmp_path, line):
    run(tmp_path, max_steps=4)
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes()
    path.write_bytes(line + good[: len(good) // 2].rsplit(b"\n", 1)[0] + b"\n" + line)
    run(tmp_path, max_steps=5, resume=True)
    assert {entry["step"] for entry in metrics(tmp_path)} >= {1, 5}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[1]"),
        ("config.json", '{"vocab_size": "many"}'),
        ("config.json", '{"vocab_size": 9, "hidden_dim": null}'),
        ("config.json", "{"),
        ("vocabulary.json", "[]"),
        ("vocabulary.json", "3"),
        ("vocabulary.json", "{}"),
        ("vocabulary.json", '{"kind": 4}'),
        ("vocabulary.json", '{"kind": "char", "characters": 7}'),
        ("vocabulary.json", '{"kind": "char", "characters": [1, 2]}'),
        ("vocabulary.json", "nonsense"),
        ("run.json", "[]"),
        ("run.json", "{"),
        ("run.json", '{"options": 1}'),
        (
            "run.json",
            '{"options": {"batch_size": "four"}, "text": {}, "vocabulary": {}, "source": {}, '
            '"versions": {}}',
        ),
        (
            "run.json",
            '{"options": {"bogus": 1}, "text": {}, "vocabulary": {}, "source": {}, "versions": {}}',
        ),
    ],
)
def test_a_broken_file_is_named_on_one_line(tmp_path, call, text_file, name, content):
    base = ["train", "--output-dir", tmp_path / "run"]
    assert call(*base, *SMALL, "--data", text_file, "--max-steps", "2")[0] == 0
    (tmp_path / "run" / name).write_text(content)
    status, out, err = call(*base, "--resume")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert name in err
    if name != "run.json":
        status, out, err = call("generate", "--model-path", tmp_path / "run")
        assert (status, out, err.count("\n")) == (2, "", 1) and name in err


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_too_little_memory_is_one_line_with_what_needs_less(
    tmp_path, monkeypatch, call, text_file, error
):
    def step(*_, **__):
        raise error

    monkeypatch.setattr(loop_module.TrainStep, "__call__", step)
    status, _, err = call("train", *SMALL, "--data", text_file, "--output-dir", tmp_path / "run")
    assert status == 2
    last = err.splitlines()[-1]
    assert "not enough memory" in last and "batch_size (4)" in last and "accumulation" in last


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def step(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop_module.TrainStep, "__call__", step)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:99", ""])
def test_a_device_without_values_is_none(name):
    with pytest.raises(ValueError, match="device must be one that this PyTorch can use"):
        usable_device(name)
