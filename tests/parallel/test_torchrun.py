"""torchrun and the command line: a process that is killed ends all, and a resume goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2"]
OPTIONS = ["--context-length", "16", "--batch-size", "4", "--log-interval", "1",
           "--eval-interval", "4", "--max-steps", "8", "--precision", "float64"]  # fmt: skip
TEXT = "To be, or not to be: that is the question.\n" * 20

# The command line, in which the last process kills itself at a step or within the saving of one.
PROGRAM = """
import os, signal, sys
import torch.distributed.checkpoint.state_dict_saver as dcp
from qflux.text.windows import TrainingWindows

where, step = sys.argv[1], int(sys.argv[2])
original_batch, original_save = TrainingWindows.batch, dcp.save

def batch(self, now, *rows):
    if where == "step" and now == step:
        end()
    return original_batch(self, now, *rows)

def save(*arguments, **options):
    if where == "saving" and f"-{step}." in str(options["checkpoint_id"]):
        end()
    return original_save(*arguments, **options)

def end():
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGKILL)

TrainingWindows.batch, dcp.save = batch, save
from qflux.cli import main
sys.exit(main(sys.argv[3:]))
"""


def start(folder, program, *arguments, processes=2):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *map(str, program)]
    return subprocess.run(
        [*command, "train", "--data", str(folder / "text.txt"), "--output-dir",
         str(folder / "run"), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip


def losses(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["train_loss"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT)
    result = start(folder, ["-m", "qflux"], *NETWORK, *OPTIONS, processes=1)
    assert result.returncode == 0, result.stderr
    return losses(folder)


@pytest.mark.parametrize(
    "where, step, kept, given",
    [("step", 6, 4, []), ("saving", 8, 4, []), ("saving", 8, 4, ["--async-save"])],
)
def test_a_killed_process_ends_all_and_a_resume_goes_on(
    tmp_path, expected, where, step, kept, given
):
    """On another number of processes, from the state before, to the same curve."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "program.py").write_text(PROGRAM)
    program = [tmp_path / "program.py", where, step]
    result = start(tmp_path, program, *NETWORK, *OPTIONS, "--rank-timeout", "60", *given)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("qflux train (rank")]
    assert len(said) == 1 and "has lost another of the 2 processes" in said[0], result.stderr
    states = sorted(path.name for path in (tmp_path / "run").glob("training_state*"))
    assert states == [f"training_state-{kept}"]
    result = start(tmp_path, ["-m", "qflux"], "--resume", processes=1)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-6)
    assert "resumes     after step 4" in result.stderr
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_elastic_restart_resumes_by_itself(tmp_path, expected):
    """torchrun starts all processes anew, with the same line, which has no --resume.

    Once more if they miss each other when they come back.
    """
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "program.py").write_text(
        PROGRAM.replace('os.environ["WORLD_SIZE"]) - 1:', 'os.environ["WORLD_SIZE"]) - 1 and '
                        'os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":')
    )  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                "--max-restarts=3", "--monitor-interval=0.1"]  # fmt: skip
    program = [*launcher, tmp_path / "program.py", "step", 6]
    given = ["--context-parallel", "2", "--rank-timeout", "20"]
    result = start(tmp_path, program, *NETWORK, *OPTIONS, *given, processes=1)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-6)
    assert result.stdout.count("validation loss, nats per token") == 1


def test_what_does_not_divide_is_one_line_a_process(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    result = start(tmp_path, ["-m", "qflux"], "--context-parallel", "3")
    said = [line for line in result.stderr.splitlines() if line.startswith("qflux train")]
    assert result.returncode != 0 and len(said) == 2, result.stderr
    assert all("must divide the number of processes, got 2" in line for line in said)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_asked_for_by_torchrun(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    result = start(tmp_path, ["-m", "qflux"], "--parallel", "fsdp", processes=1)
    assert result.returncode == 2 and "torchrun --nproc-per-node N -m qflux" in result.stderr


def test_a_missing_process_is_said(tmp_path):
    """One of two comes, and the other does not within the time."""
    (tmp_path / "text.txt").write_text(TEXT)
    begin = time.monotonic()
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "qflux", "train", "--data", str(tmp_path / "text.txt"),
         "--output-dir", str(tmp_path / "run"), "--rank-timeout", "3"],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 2 and time.monotonic() - begin < 100, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "not all of the 2 processes came within rank_timeout 3 s" in last
