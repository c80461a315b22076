"""Small models with known texts, and the report of one of them, made once."""

from __future__ import annotations

import json
import os

import pytest
import torch
from filelock import FileLock
from inputs import TEXT

from qflux import make_config, make_model, save_model
from qflux.analysis.record import record_layers
from qflux.text.vocabulary import CharacterVocabulary

VOCABULARY = CharacterVocabulary(TEXT)
CHANGES = {
    # Of the sharpest cylinders that a preset has, untrained rows keep one key.
    "lm": {"num_cylinders": 3, "hidden_dim": 12, "value_dim": 2, "scale_max": 1.0},
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
def shared(tmp_path_factory):
    """A folder that all processes of a test run have, so that what takes long is made once."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    (root / "analysis").mkdir(exist_ok=True)
    return root / "analysis"


@pytest.fixture(scope="session")
def folder(make, shared):
    """A model folder with the curves of a run, and a text beside it."""
    with FileLock(shared.parent / "analysis-folder.lock"):
        if not (shared / "text.txt").exists():
            save_model(shared / "run", make(), VOCABULARY)
            lines = [
                {"step": step, "train_loss": 4.0 / step, "density": [0.25, 0.5], "sample": "text"}
                for step in (1, 2, 4)
            ]
            lines[-1]["val_loss"] = 1.5
            (shared / "run" / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines) + "no line of metrics\n"
            )
            (shared / "text.txt").write_text(TEXT)
    return shared


@pytest.fixture(scope="session")
def report(folder):
    """The page that `analyze_file` wrote, and its notes."""
    pytest.importorskip("matplotlib", reason='pip install "qflux[analysis]" for figures')
    pytest.importorskip("plotly", reason='pip install "qflux[analysis]" for the page')
    from qflux.report.write import AnalysisOptions, analyze_file

    out = folder / "out"
    with FileLock(folder.parent / "analysis-report.lock"):
        if not out.exists():
            analyze_file(
                AnalysisOptions(
                    str(folder / "run"), str(folder / "text.txt"), str(out), first_token=2
                )
            )
    summary = json.loads((out / "data" / "summary.json").read_text(encoding="utf-8"))
    return out / "report.html", summary["notes"]
