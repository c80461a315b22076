"""Signals, full disks and kills: a stopped run has saved what it can and continues exactly."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from qflux import QuantumFluxConfig, TextSplit, TrainingOptions, train
from qflux.cli import main
from qflux.text.vocabulary import CharacterVocabulary
from qflux.text.windows import TrainingWindows
from qflux.train import loop as loop_module
from qflux.train.signals import Stopper, TrainingInterrupted
from qflux.train.states import States
from qflux.train.step import TrainStep

SOAK = Path(__file__).resolve().parents[1] / "soak.py"
PATTERN = TextSplit({"a": "abcdefgh " * 60}, {"b": "abcdefgh " * 7})
VOCABULARY = CharacterVocabulary(PATTERN.text)
CONFIG = QuantumFluxConfig(
    VOCABULARY.size, num_layers=1, num_cylinders=2, hidden_dim=16, context_length=12, dropout=0.1
)
SMALL = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2", "--context-length", "16"]
TEXT = "To be, or not to be: that is the question.\n" * 12


@pytest.fixture(autouse=True)
def main_thread():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("Python handles signals in the main thread only")


def run(folder, **options):
    given = {"batch_size": 4, "max_steps": 12, "log_interval": 5, "eval_interval": 4}
    options = TrainingOptions(folder, progress=False, **{**given, **options})
    return train(CONFIG, PATTERN, VOCABULARY, options)


def curve(folder):
    keys = ("step", "train_loss", "val_loss", "learning_rate", "gradient_norm")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(key) for key in keys] for line in lines]


def step_of(folder):
    return torch.load(folder / "training_state.pt", weights_only=True)["step"]


def signal_at(monkeypatch, step, number, times=1):
    """Send the signal to this process while it takes a step."""
    original = TrainingWindows.batch

    def batch(self, at):
        if at == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, at)

    monkeypatch.setattr(TrainingWindows, "batch", batch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", [0, 5, 6])
def test_a_signal_saves_first_and_the_run_continues_exactly(tmp_path, monkeypatch, number, at):
    """In the middle of an interval, too: the next line is the mean over all its steps."""
    whole, handler = run(tmp_path / "whole"), signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        signal_at(patch, at, number)
        run(tmp_path / "parts")
    assert step_of(tmp_path / "parts") == at + 1
    assert caught.value.status == 128 + number and signal.getsignal(number) == handler
    assert f"saved at step {at + 1}; go on with: qflux train --output-dir" in str(caught.value)
    torch.manual_seed(99)
    parts = run(tmp_path / "parts", resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    for found, expected in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("step", [4, 12])
def test_a_signal_in_an_evaluation_saves_the_state_before_it(tmp_path, monkeypatch, step):
    run(tmp_path / "whole")
    original = loop_module.evaluate
    calls = []

    def evaluate(model, *arguments):
        calls.append(len(calls))
        if 4 * len(calls) == step:
            torch.rand(3)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, *arguments)

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        patch.setattr(loop_module, "evaluate", evaluate)
        run(tmp_path / "parts")
    assert step_of(tmp_path / "parts") == step
    run(tmp_path / "parts", resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_kill_between_a_line_and_its_state_does_not_write_the_line_twice(tmp_path, monkeypatch):
    """The state before is one whose line waits for its evaluation, which is then done again."""
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        original = loop_module.evaluate

        def evaluate(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return original(*arguments)

        patch.setattr(loop_module, "evaluate", evaluate)
        run(tmp_path / "parts")

    class Killed(BaseException):
        pass

    def kill(self, state):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(States, "save", kill)
        run(tmp_path / "parts", resume=True)
    assert curve(tmp_path / "parts")[-1][0] == step_of(tmp_path / "parts") == 4
    assert run(tmp_path / "parts", resume=True).best_validation_loss == whole.best_validation_loss
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_second_signal_ends_the_process_at_once(tmp_path, monkeypatch):
    signal_at(monkeypatch, 6, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt, match="second Ctrl-C before it had saved") as caught:
        run(tmp_path)
    assert not isinstance(caught.value, TrainingInterrupted) and step_of(tmp_path) == 4


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, monkeypatch):
    signal_at(monkeypatch, 11, signal.SIGINT)
    monkeypatch.setattr(loop_module, "evaluate", lambda *_: 1.0)
    assert run(tmp_path).steps == 12


def test_a_signal_does_not_save_what_is_not_finite(tmp_path, monkeypatch):
    run(tmp_path, max_steps=4)
    good = (tmp_path / "training_state.pt").read_bytes()
    signal_at(monkeypatch, 4, signal.SIGINT)
    with pytest.raises(loop_module.NonFiniteLossError):
        run(tmp_path, max_steps=50, learning_rate=1e30, resume=True)
    assert (tmp_path / "training_state.pt").read_bytes() == good


def test_ignored_signals_stay_ignored():
    """As in a shell's background, or under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper().listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_trains_without_handlers(tmp_path):
    steps = []
    thread = threading.Thread(target=lambda: steps.append(run(tmp_path, max_steps=1).steps))
    thread.start()
    thread.join()
    assert steps == [1]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_program_says_how_to_go_on(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "text.txt").write_text(TEXT)
    folder = tmp_path / "my run"
    base = ["train", "--output-dir", str(folder)]
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        signal_at(patch, 3, number)
        given = [*SMALL, "--data", str(tmp_path / "text.txt"), "--max-steps", "6"]
        assert main([*base, *given]) == 128 + number
    out, err = capsys.readouterr()
    called = "Ctrl-C" if name == "SIGINT" else name
    assert out == "" and err.splitlines()[-1] == (
        f"qflux train: stopped by {called} and saved at step 4; go on with: "
        f"qflux train --output-dir '{folder}' --resume"
    )
    assert main([*base, "--resume"]) == 0
    assert "6 steps" in capsys.readouterr().out


def test_a_run_without_a_state_begins_again(tmp_path, monkeypatch):
    """Killed before it saved anything; its options are known already."""
    run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(States, "save", lambda *_: 1 / 0)
        signal_at(patch, 2, signal.SIGINT, times=2)
        run(tmp_path / "parts")
    with pytest.raises(FileExistsError, match="resume it with --resume to begin again"):
        run(tmp_path / "parts")
    run(tmp_path / "parts", resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


# --- disks and terminals ---


@pytest.mark.parametrize("size", [50, 700, 20_000])
def test_a_full_disk_is_one_line_with_the_file(tmp_path, run_python, size):
    """A limit on the size of files, since a test cannot fill a disk."""
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--data", str(tmp_path / "text.txt"), *SMALL, "--max-steps", "4", "--log-interval"]
    arguments = ["train", "--output-dir", str(tmp_path / "run"), *given, "1"]
    program = (
        "import resource, sys\nfrom qflux.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\nsys.exit(main({arguments}))"
    )
    result = run_python(program, check=False)
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.search(rf"File too large: '{tmp_path / 'run'}/(run.json|training_state.pt|\w+)", last)
    assert "Traceback" not in result.stderr
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".tmp")]
    resume = ["--resume"] if (tmp_path / "run" / "run.json").exists() else [*given, "1"]
    assert main(["train", "--output-dir", str(tmp_path / "run"), *resume]) == 0
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_closed_standard_error_does_not_stop_a_run(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    command = [
        sys.executable, "-m", "qflux", "train", "--output-dir", str(tmp_path / "run"), "--data",
        str(tmp_path / "text.txt"), *SMALL, "--max-steps", "4", "--log-interval", "1",
    ]  # fmt: skip
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stderr=writer, stdout=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == 0 and "4 steps" in result.stdout


def test_a_device_that_fails_keeps_the_last_state(tmp_path, monkeypatch):
    original, calls = TrainStep.__call__, iter(range(100))

    def step(self, *arguments, **options):
        if next(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *arguments, **options)

    monkeypatch.setattr(TrainStep, "__call__", step)
    with pytest.raises(MemoryError):
        run(tmp_path)
    assert step_of(tmp_path) == 4


def test_ten_random_kills_lose_nothing(tmp_path):
    """Of `make soak`; its seed is printed for the case that one fails."""
    result = subprocess.run(
        [sys.executable, str(SOAK), "--kills", "10"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SOAK.parents[1])},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing lost" in result.stdout
