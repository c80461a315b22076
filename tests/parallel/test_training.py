"""Training on 2 and 4 processes against one: curves, states, what is refused.

Each `run_...` function is a check that every rank makes; a group of processes makes them all.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import ranks
import torch
from torch.distributed.checkpoint import state_dict_saver

from qflux import QuantumFluxConfig, TextSplit, TrainingOptions, load_model, train
from qflux.text.vocabulary import CharacterVocabulary
from qflux.text.windows import TrainingWindows
from qflux.train.signals import TrainingInterrupted
from qflux.train.states import States

PATTERN = TextSplit({"a": "abcdefgh hgfedcba " * 40}, {"b": "abcdefgh " * 9})
VOCABULARY = CharacterVocabulary(PATTERN.text)
CONFIG = QuantumFluxConfig(
    VOCABULARY.size, num_layers=4, num_cylinders=2, hidden_dim=16, context_length=24
)
SMALL = {"batch_size": 8, "log_interval": 1, "eval_interval": 2, "precision": "float64",
         "rank_timeout": 40}  # fmt: skip
STEPS = 4
KEYS = ("step", "train_loss", "val_loss", "learning_rate", "gradient_norm", "window_length")


def run(folder, **options):
    options = {**SMALL, "max_steps": STEPS, "progress": False, **options}
    return train(CONFIG, PATTERN, VOCABULARY, TrainingOptions(folder, **options))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder):
    return [[line.get(key, 0.0) for key in KEYS] for line in metrics(folder)]


def close(found, expected):
    assert len(found) == len(expected)
    for own, line in zip(found, expected, strict=True):
        assert own == pytest.approx(line, rel=1e-6, abs=1e-9), (own, line)


# What is compared with one process: the division, and options that both have.
DIVISIONS = {
    2: {
        "ddp": {},
        "fsdp": {"parallel": "fsdp", "accumulation": 2, "async_save": True},
        "context": {"context_parallel": 2},
        "pipeline": {"pipeline_parallel": 2, "accumulation": 4, "async_save": True},
    },
    4: {
        "ddp": {"accumulation": 2},
        "fsdp x context": {"parallel": "fsdp", "context_parallel": 2},
        "ddp x pipeline": {"pipeline_parallel": 2, "accumulation": 2},
        "fsdp x pipeline": {"parallel": "fsdp", "pipeline_parallel": 2, "accumulation": 2},
        "context x pipeline": {"pipeline_parallel": 2, "context_parallel": 2, "accumulation": 2},
        "context": {"context_parallel": 4, "gradient_checkpointing": True},
    },
}


def folder_of(name):
    return Path(os.environ["QFLUX_TEST_FOLDER"]) / name


def run_every_division(mesh):
    """The curve of one process, whatever the division; layers are described the same."""
    expected = metrics(folder_of("one"))
    for name, options in DIVISIONS[mesh.size()].items():
        folder = folder_of(f"{mesh.size()} {name}")
        run(folder, **options)
        torch.distributed.barrier()
        close(curve(folder), curve(folder_of("one")))
        # With accumulation they are of the last part of a batch, and a pipeline has none.
        if "accumulation" not in options:
            for own, line in zip(metrics(folder), expected, strict=True):
                for key in ("density", "strength", "radius_mean", "radius_std", "coherence"):
                    assert own[key] == pytest.approx(line[key], rel=1e-5), key


def copied(name, source):
    """A folder of this group's own with what another run left."""
    path = folder_of(name)
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder_of(source), path)
    torch.distributed.barrier()
    return path


def run_from_a_state_of_another_number(mesh):
    """Weights, moments and place of a run of one process, and of two, in shards or not."""
    size = mesh.size()
    sources = {
        2: [("one", {"parallel": "fsdp"}), ("one", {"pipeline_parallel": 2})],
        4: [("2 fsdp", {"context_parallel": 2}), ("2 pipeline", {"parallel": "fsdp"})],
    }
    for number, (source, options) in enumerate(sources[size]):
        folder = copied(f"{size} resumed {number}", source)
        run(folder, resume=True, resume_step=2, **options)
        torch.distributed.barrier()
        close(curve(folder), curve(folder_of("one")))


def run_stops_for_a_signal_to_any_process(mesh):
    """All save and end at the same step, and go on as if nothing had been."""
    folder, original = folder_of(f"{mesh.size()} stopped"), TrainingWindows.batch
    last = mesh.size() - 1

    def batch(self, step, *rows):
        if step == 1 and mesh.get_local_rank() == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *rows)

    TrainingWindows.batch = batch
    try:
        said = f"stopped by SIGTERM and saved at step 2; go on with: torchrun .*{mesh.size()} -m"
        with pytest.raises(TrainingInterrupted, match=f"{said} .* --resume --context-parallel 2$"):
            run(folder, context_parallel=2)
    finally:
        TrainingWindows.batch = original
    run(folder, resume=True)
    torch.distributed.barrier()
    close(curve(folder), curve(folder_of("one")))


def run_states_are_written_beside_the_next_steps(mesh):
    """One after another, and each as the weights were when it began."""
    if mesh.size() > 2:
        return  # two show it
    folder, batch, save = folder_of(f"{mesh.size()} async"), TrainingWindows.batch, (
        state_dict_saver.save
    )  # fmt: skip
    second, seen = threading.Event(), []

    def batch_of(self, step, *rows):
        if step == 1:
            second.set()
        return batch(self, step, *rows)

    def slow_save(*arguments, **options):
        seen.append("begin")
        assert second.wait(60), "training waited for the state"
        time.sleep(0.2)  # in which the second step moves the weights
        save(*arguments, **options)
        seen.append("end")

    TrainingWindows.batch, state_dict_saver.save = batch_of, slow_save
    given = {"eval_interval": None, "save_interval": 1, "keep_states": STEPS, "async_save": True}
    try:
        run(folder, **given)
    finally:
        TrainingWindows.batch, state_dict_saver.save = batch, save
    assert seen == ["begin", "end"] * STEPS
    expected = curve(folder)
    run(folder, resume=True, resume_step=1, **given | {"async_save": False})
    torch.distributed.barrier()
    close(curve(folder), expected)


def run_a_state_that_cannot_be_written_ends_all(mesh):
    """On the full disk of one process; the state before it stays, here that of one process."""
    if mesh.size() > 2:
        return  # two show it
    folder, last = copied(f"{mesh.size()} full", "one"), mesh.get_local_rank() == mesh.size() - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, asynchronous in enumerate((False, True)):
        if last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            again = {} if number else {"resume_step": 2}
            text = f"training_state-3' cannot be written: rank {mesh.size() - 1}: .*File too large"
            raises(OSError, text, folder=folder, resume=True, keep_states=1, save_interval=1,
                   parallel="fsdp", async_save=asynchronous, **again)  # fmt: skip
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        torch.distributed.barrier()
        assert States(folder).load()["step"] == 2


def raises(kind, text, **options):
    folder = options.pop("folder", folder_of("refused"))
    with pytest.raises(kind, match=text):
        run(folder, **options)


def run_is_refused_by_all(mesh):
    """The same error in every process, before anything is written."""
    size, rank = mesh.size(), mesh.get_local_rank()
    raises(ValueError, f"must divide the number of processes, got {size}", context_parallel=3)
    raises(ValueError, "batch_size must be a multiple", batch_size=size + 1)
    raises(ValueError, "need learning='backprop', got 'hebbian'", learning="hebbian")
    raises(ValueError, "compile goes with neither", compile=True, context_parallel=2)
    raises(ValueError, "accumulation must divide", pipeline_parallel=2, accumulation=5)
    raises(ValueError, "sample_prompt needs a whole model", pipeline_parallel=2, sample_prompt="a")
    raises(ValueError, "windows of at least 12 tokens", context_parallel=2, curriculum_length=6)
    mine = f"same options: rank 0 has .* rank {size - 1} has"
    raises(ValueError, mine, seed=int(rank == size - 1))
    raises(
        ValueError, "same context_parallel: rank 0 has 1", context_parallel=1 + rank // (size - 1)
    )
    raises(ValueError, "same async_save: rank 0 has True", async_save=rank == 0)
    mine = "holds a run already" if rank == 0 else "rank 0: output_dir"
    raises((ValueError, FileExistsError), mine, folder=folder_of("one"))
    others = TextSplit({"a": "abcdefgh" * (40 + rank)}, {"b": "abcdefgh " * 9})
    with pytest.raises(ValueError, match="all ranks must have the same text"):
        train(CONFIG, others, VOCABULARY, TrainingOptions(folder_of("refused"), **SMALL))
    if rank == size - 1:
        others = TextSplit({"a": "xyz" * 40}, {"b": "abcdefgh " * 9})
    mine = "is not one of the 9 characters" if rank == size - 1 else f"rank {size - 1}: "
    with pytest.raises(ValueError, match=mine):
        train(CONFIG, others, VOCABULARY, TrainingOptions(folder_of("refused"), **SMALL))
    torch.distributed.barrier()
    assert not list(folder_of("refused").glob("*"))


CHECKS = [name for name in globals() if name.startswith("run_")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    run(path / "one")
    return path


@pytest.fixture(scope="module", params=[2, 4])
def checked(request, folder):
    os.environ["QFLUX_TEST_FOLDER"] = str(folder)
    return ranks.run(request.param, __file__, CHECKS)


def test_one_process_goes_on_where_two_stopped(checked, folder, tmp_path):
    """And reads the model that they wrote."""
    for source in ("2 fsdp", "2 pipeline"):
        path = tmp_path / source
        shutil.copytree(folder / source, path)
        run(path, resume=True, resume_step=2)
        close(curve(path), curve(folder / "one"))
        model, _ = load_model(folder / source)
        expected, _ = load_model(folder / "one")
        for own, parameter in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(own, parameter)


@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_are_one(checked, name):
    assert not checked[name], checked[name]
