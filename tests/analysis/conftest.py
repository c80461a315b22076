"""Small models with known texts, and the report of one of them, made once."""

from __future__ import annotations

import json

import pytest
import torch

from qflux import make_config, make_model, save_model
from qflux.analysis.record import record_layers
from qflux.text.vocabulary import CharacterVocabulary

# Signs that HTML, plotly and matplotlib read, and one that no font has, are tokens like others.
TEXT = 'To be, or <b>not</b> to be: "that" & $x_1$ is\n\U000f0000 the question.\n'
VOCABULARY = CharacterVocabulary(TEXT)
CHANGES = {
    "lm": {"num_cylinders": 3, "hidden_dim": 12, "value_dim": 2},
    "flux": {"hidden_dim": 12},
    "qfnn": {"hidden_dim": 12},
}


@pytest.fixture(scope="session")
def make():
    """A model of a preset with two layers, of random but fixed weights."""

    def made(preset="lm", **changes):
        torch.manual_seed(5)
        options = {"num_layers": 2, "context_length": 48, **CHANGES[preset], **changes}
        return make_model(make_config(preset, VOCABULARY.size, **options)).eval()

    return made


@pytest.fixture(scope="session")
def ids():
    return VOCABULARY.encode(TEXT)[:40].long()


@pytest.fixture(scope="session")
def records(make, ids):
    """Records of the layers of a preset on the text."""
    return lambda preset="lm", **changes: record_layers(make(preset, **changes), ids[None])


@pytest.fixture(scope="session")
def folder(make, tmp_path_factory):
    """A model folder with the curves of a run, and a text beside it."""
    root = tmp_path_factory.mktemp("analysis")
    save_model(root / "run", make(), VOCABULARY)
    lines = [
        {"step": step, "train_loss": 4.0 / step, "density": [0.25, 0.5], "sample": "text"}
        for step in (1, 2, 4)
    ]
    lines[-1]["val_loss"] = 1.5
    (root / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + "no line of metrics\n"
    )
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture(scope="session")
def report(folder):
    """The folder that `qflux analyze` wrote, and what it said: status, output, errors."""
    pytest.importorskip("matplotlib", reason='pip install "qflux[analysis]" for figures')
    pytest.importorskip("plotly", reason='pip install "qflux[analysis]" for the page')
    from qflux.report.write import AnalysisOptions, analyze_file

    options = AnalysisOptions(
        str(folder / "run"), str(folder / "text.txt"), str(folder / "out"), first_token=2
    )
    page, notes = analyze_file(options)
    return page, notes
