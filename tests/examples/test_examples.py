"""Notebooks and examples run to their end, in small, and what they compare with is right."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    for package in ("matplotlib", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason='pip install "qflux[test]" runs notebooks')
    import nbclient
    import nbformat

    monkeypatch.setenv("STEPS", "4")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [part for cell in notebook.cells for part in cell.get("outputs", ())]
    assert not [part for part in outputs if part.output_type == "error"]
    text = "".join(part.get("text", "") for part in outputs)
    wanted = {"demonstration": "4 steps", "efficiency": "2112", "score_patterns": "inverse gate"}
    assert wanted[path.stem].replace("2112", "2,112") in text
    assert path.stem == "efficiency" or any("image/png" in part.get("data", {}) for part in outputs)


def test_there_are_three_notebooks():
    assert [p.stem for p in NOTEBOOKS] == ["demonstration", "efficiency", "score_patterns"]


def test_a_module_of_ones_own_learns_to_recall(example):
    found = example("own_module").train(200)
    assert found["attention"] > 0.5 > 0.25 > found["none"]


def test_own_attention_looks_back_only(example):
    layer = example("own_module").CylinderAttention(8, cylinders=4, value_dim=2)
    x = torch.randn(2, 9, 8, requires_grad=True)
    layer(x)[:, 4].sum().backward()
    assert (x.grad[:, 5:] == 0).all() and (x.grad[:, :5] != 0).any()
    assert layer.sigma.grad.abs().sum() > 0


def test_forecasts_have_an_honest_baseline(example):
    pytest.importorskip("vega_datasets", reason="pip install vega-datasets for temperatures")
    module = example("time_series")
    series = module.temperatures()
    assert len(series) == 1461 and -5 < series.min() < series.max() < 40
    past, after = module.windows(module.points(torch.arange(100.0)))
    assert past.shape == (66, 28, 3) and after[0].tolist() == list(range(28, 35))
    assert past[3, -1, 0] == 30
    found = module.run(2)
    days = range(int(0.8 * 1461) + 28, 1461 - 6)
    for name, lag in (("last day", None), ("seasonal-naive", 365)):
        errors = [
            (series[day : day + 7] - (series[day - 1] if lag is None else
             series[day - lag : day - lag + 7])).abs().mean() for day in days
        ]  # fmt: skip
        assert found[name][0] == pytest.approx(sum(errors).item() / len(days), rel=1e-4)
    # Both networks start at the last day, and two steps change little.
    for name in ("flux", "gru"):
        assert found[name][0] == pytest.approx(found["last day"][0], rel=0.05)
        assert 3_000 < found[name][1] < 8_000


def test_pixels_have_two_phases(example):
    pytest.importorskip("sklearn", reason="pip install scikit-learn for the digits")
    module = example("images")
    model = module.FluxImages(cylinders=4)
    angle = model.angle.reshape(4, 8, 8)
    assert (angle[0].diff(dim=1) == 0).all() and (angle[0].diff(dim=0) > 0).all()
    assert (angle[1].diff(dim=0) == 0).all() and (angle[1].diff(dim=1) > 0).all()
    blind = module.FluxImages(positions=False)
    pixels, _ = module.digits()
    mixed = pixels[:4, torch.randperm(64)]
    torch.testing.assert_close(blind(pixels[:4]), blind(mixed), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(pixels[:4]), model(mixed), atol=1e-3)
    assert set(module.run(1)) == {"two phases", "no positions", "logistic regression"}
