"""The language model benchmark: its baselines, and that a run leaves a row."""

import csv
import dataclasses
import math
import sys

import lm
import lm_curves
import lm_times
import pytest
import torch
from transformer import Transformer, TransformerConfig

from qflux.models.embedding import rotate


def counted(train, context, token, vocab_size):
    """The Witten-Bell probability of `token` after `context`, by the formula."""
    if not context:
        total = sum(map(len, train))
        return (sum(work.count(token) for work in train) + 1) / (total + vocab_size)
    lower = counted(train, context[1:], token, vocab_size)
    after = [
        work[end]
        for work in train
        for end in range(len(context), len(work))
        if work[end - len(context) : end] == context
    ]
    if not after:
        return lower
    kinds = len(set(after))
    return (after.count(token) + kinds * lower) / (len(after) + kinds)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngram_loss_is_the_formula(order):
    generator = torch.Generator().manual_seed(0)

    def works(*lengths):
        return [torch.randint(4, (n,), generator=generator) for n in lengths]

    train, validation = works(60, 3, 40), works(30, 2, 25)
    lists = [work.tolist() for work in train]
    losses = [
        -math.log(counted(lists, work[max(0, end - order + 1) : end], work[end], 5))
        for work in (work.tolist() for work in validation)
        for end in range(1, len(work))
    ]
    expected = sum(losses) / len(losses)
    assert lm.ngram_loss(train, validation, 5, order) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "gpt2"},
        {"positions": "learned"},
        {"conv_width": 3, "mlp_conv": True},
        {"mlp": "swiglu"},
    ],
)
def test_transformer_is_causal_and_ordered(changes):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(11, hidden_dim=16, num_layers=1, **changes))
    model = model.double().eval()
    ids = torch.randint(11, (2, 12))
    whole = model(ids)
    torch.testing.assert_close(model(ids[:, :5]), whole[:, :5])
    swapped = ids[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(model(swapped)[:, -1], whole[:, -1])


def test_validation_scores_every_token_once():
    class Recorder(torch.nn.Linear):
        """Gives token t + 1 after t (mod 7) a probability of 0.9, and the rest the same."""

        def forward(self, ids):
            off = math.log(0.1 / 6)
            logits = torch.full((*ids.shape, 7), off)
            return logits.scatter(-1, ((ids + 1) % 7)[..., None], math.log(0.9))

    ramp = torch.arange(50) % 7
    loss = lm.validate(Recorder(1, 1), [ramp, ramp[:23].flip(0)], context=8, batch=3)
    expected = -(49 * math.log(0.9) + 22 * math.log(0.1 / 6)) / (49 + 22)
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("provider", lm.PROVIDERS)
def test_a_run_appends_rows(provider, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 20)
    small = [] if provider in ("zero-layer", "ngram") else ["--set", "num_layers=1"]
    command = ["lm.py", "--data", str(text), "--provider", provider, "--context", "8", *small]
    output, curves = tmp_path / "rows.csv", tmp_path / "curves.csv"
    files = ["--output", str(output), "--curves", str(curves)]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "3", *files])
    threads = torch.get_num_threads()
    lm.main()
    lm.main()
    torch.set_num_threads(threads)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (8 if provider == "ngram" else 2)
    for row in rows:
        assert 0 < float(row["validation_loss"]) < 5 and row["dataset"] == "text"
        assert ("score=sparsemax" in row["changes"]) == (provider in ("qflux", "zero-layer"))
    if provider != "ngram":
        assert rows[0]["steps"] == "3" and rows[0]["validation_loss"] == rows[1]["validation_loss"]
        assert int(rows[0]["parameters"]) > 1000
        [runs] = lm_curves.read_curves(curves).values()
        [(label, seeds)] = runs.items()
        steps, seconds, losses = lm_curves.mean_curve({"0": seeds["0"][:2], "1": seeds["0"][2:4]})
        assert label.startswith(provider) and len(seeds["0"]) == 4
        assert steps == [2, 3] and 0 <= seconds[0] <= seconds[1] and min(losses) > 1


def test_curves_over_seconds_take_the_measured_times_of_steps(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    curves, times = tmp_path / "curves.csv", tmp_path / "times.csv"
    columns = "dataset,provider,changes,context,rate,limit,seed,commit,step,seconds,train_loss\n"
    rows = (
        f"text,{provider},{changes},64,0.1,2 steps,0,abc,{step},{step * 7},2\n"
        for provider, changes in (("qflux", "score=sparsemax"), ("zero-layer", ""))
        for step in (1, 2)
    )
    curves.write_text(columns + "".join(rows))
    times.write_text("provider,context,ms_p50\nqflux,64,50\nqflux,128,70\nzero-layer,128,9\n")
    figures = []
    monkeypatch.setattr(lm_curves, "save_svg", lambda figure, path: figures.append(figure))
    for given in ([], ["--times", str(times)]):
        monkeypatch.setattr(sys, "argv", ["lm_curves.py", str(curves), "figure.svg", *given])
        lm_curves.main()
    drawn = [[list(line.get_xdata()) for line in figure.axes[1].lines] for figure in figures]
    assert drawn == [[[7, 14], [7, 14]], [[0.05, 0.1]]]
    assert "no seconds: zero-layer, rate 0.1" in capsys.readouterr().out


def test_no_geometry_is_thresholds_that_nothing_passes():
    small = {"num_layers": 1, "num_cylinders": 2, "hidden_dim": 8, "score": "threshold"}
    torch.manual_seed(0)
    model = lm.MODELS["no-geometry"].model(lm.QuantumFluxConfig(5, **small))
    other = lm.QuantumFluxLM(lm.QuantumFluxConfig(5, **small, sigma_min=1e3, sigma_max=1e3))
    other.load_state_dict(model.state_dict())
    ids = torch.randint(5, (2, 9))
    torch.testing.assert_close(model(ids).logits, other(ids).logits)
    assert lm.kept_share(model, [ids[0]], 9) == 0


def test_steps_are_timed_in_turn(tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "rows.csv"
    text.write_text("to be or not to be, that is the question. " * 20)
    small = ["--context", "8", "--batch", "2", "--rounds", "3", "--skip", "1"]
    names = ["zero-layer", "windowed"]
    threads = torch.get_num_threads()
    lm_times.main(["--data", str(text), "--providers", *names, *small, "--output", str(output)])
    torch.set_num_threads(threads)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == names and list(rows[0]) == lm_times.COLUMNS
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        expected = float(row["ms_p50"]) / float(rows[0]["ms_p50"])
        assert float(row["ratio"]) == pytest.approx(expected, rel=0.05)
    for line in (["--rounds", "0"], ["--rate", "0"], ["--context", "1"]):
        with pytest.raises(SystemExit) as stop:
            lm_times.main(["--data", str(text), *line])
        assert stop.value.code == 2


def test_kept_share_counts_pairs():
    small = {"num_layers": 1, "num_cylinders": 2, "score": "threshold"}
    config = lm.QuantumFluxConfig(5, **small, sigma_min=-1e3, sigma_max=-1e3)
    works = [torch.randint(5, (40,))]
    assert lm.kept_share(lm.QuantumFluxLM(config), works, 16) == 1
    config = dataclasses.replace(config, sigma_min=0.5, sigma_max=0.5, backend="reference")
    model = lm.QuantumFluxLM(config)
    assert 0.1 < lm.kept_share(model, works, 16) < 0.6
    inputs = []
    model.layers[0].attention.register_forward_hook(lambda *call: inputs.append(call[1]))
    share = lm.kept_share(model, works, 16)
    [(hidden, _, angle, *_)] = inputs
    attention = model.layers[0].attention
    queries, keys = attention.inputs(attention.conv(hidden))[0, :, :8].chunk(2, -1)
    queries, keys = (
        rotate(part.unflatten(-1, (2, 2)).transpose(0, 1), angle) for part in (queries, keys)
    )
    scores = (queries @ keys.transpose(-1, -2) + 1) / 2
    kept = sum(
        int((row >= row.mean() + 0.5 * (row.var(correction=0) + 1e-6).sqrt()).sum())
        for cylinder in scores
        for row in (cylinder[i, : i + 1] for i in range(16))
    )
    assert share == pytest.approx(kept / (2 * 16 * 17 / 2))


@pytest.mark.parametrize(
    ("name", "value"), [("mlp", "relu"), ("positions", "none"), ("init", "zero")]
)
def test_transformer_refuses_unknown_choices(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be one of .*got '{value}'"):
        TransformerConfig(11, **{name: value})


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--rate", "0"], "learning_rate must be"),
        (["--beta2", "1"], "betas"),
        (["--warmup", "1"], "warmup must be"),
    ],
)
def test_bad_optimiser_options_are_named(option, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm.py", "--data", "nowhere", *option])
    with pytest.raises(SystemExit) as stop:
        lm.main()
    assert stop.value.code == 2 and reason in capsys.readouterr().err
