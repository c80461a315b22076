"""Training on 2 and 4 processes against one: curves, states, what is refused.

Each `run_...` function is a check that every rank makes; a group of processes makes them all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import ranks
import torch

from qflux import QuantumFluxConfig, TextSplit, TrainingOptions, train
from qflux.text.vocabulary import CharacterVocabulary

PATTERN = TextSplit({"a": "abcdefgh hgfedcba " * 40}, {"b": "abcdefgh " * 9})
VOCABULARY = CharacterVocabulary(PATTERN.text)
CONFIG = QuantumFluxConfig(
    VOCABULARY.size, num_layers=4, num_cylinders=2, hidden_dim=16, context_length=24
)
SMALL = {"batch_size": 8, "log_interval": 1, "eval_interval": 2, "precision": "float64"}
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
        "fsdp": {"parallel": "fsdp", "accumulation": 2},
        "context": {"context_parallel": 2},
        "pipeline": {"pipeline_parallel": 2, "accumulation": 4},
    },
    4: {
        "ddp": {"accumulation": 2},
        "fsdp x context": {"parallel": "fsdp", "context_parallel": 2},
        "ddp x pipeline": {"pipeline_parallel": 2, "accumulation": 2},
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


@pytest.mark.parametrize("name", CHECKS)
def test_several_processes_are_one(checked, name):
    assert not checked[name], checked[name]
