"""Notebooks and examples run to their end, in small, and what they compare with is right."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from qflux import make_model

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


def test_a_configuration_of_torchtitan(example, tmp_path):
    """It parses, and the model is made, sharded and initialised as the trainer does it."""
    pytest.importorskip("torchtitan", reason="pip install torchtitan for its trainer")
    import torch.distributed as dist
    from torchtitan.config import ConfigManager

    module = example("torchtitan_config")
    given = ["--module", "torchtitan_config", "--config", "small", "--training.seq-len", "32"]
    config = ConfigManager().parse_args([*given, "--training.steps", "7"])
    assert config.training.steps == 7
    made = config.model_spec.model
    made.num_layers, made.hidden_dim, made.vocab_size, made.num_cylinders = 2, 16, 11, 2
    made.update_from_config(config=config)
    with torch.device("meta"):
        model = made.build()
    model.verify_module_protocol()
    store = dist.FileStore(str(tmp_path / "store"))
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))

        class Dimensions:
            dp_replicate_enabled = False

            def get_mesh(self, names):
                return mesh[tuple(names)]

        model = config.model_spec.parallelize_fn(model, parallel_dims=Dimensions())
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.init_weights(buffer_device=None)
        ids = torch.randint(11, (2, 32))
        logits = model(ids)
        torch.manual_seed(module.SEED)
        torch.testing.assert_close(logits, make_model(made.network())(ids).logits)
        config.loss.build(compile_config=config.compile)(logits, ids, 64)[0].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        parameters, operations = made.get_nparams_and_flops(model, 32)
        assert operations > 6 * parameters
    finally:
        dist.destroy_process_group()
    config.parallelism.context_parallel_degree = 2
    with pytest.raises(ValueError, match="context_parallel_degree must be 1 here, got 2"):
        made.update_from_config(config=config)


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
