"""Associative recall: the sequences, what is scored, and that a run leaves rows."""

import csv
import math
import sys

import pytest
import recall
import recall_curves
import torch

from qflux.text.windows import IGNORED_LABEL

TASKS = [
    recall.Recall("simple", 32, 6, 40),
    recall.Recall("simple", 18, 6, 14),  # no filler, every key
    recall.Recall("zoology", 64, 8, 50),
    recall.Recall("zoology", 24, 6, 41),  # every place
    recall.Recall("zoology", 4, 1, 4),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_every_key_is_asked_once_for_its_value(task):
    ids, labels = task.batch(50, 3)
    assert ids.shape == labels.shape == (50, task.length)
    half = task.vocabulary // 2
    assert ids.min() >= 0 and ids.max() < task.vocabulary
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        start = 2 * task.pairs
        pairs = dict(zip(row[0:start:2], row[1:start:2], strict=True))
        assert len(pairs) == task.pairs == len(set(pairs.values()))
        assert all(0 < key < half <= value < task.vocabulary for key, value in pairs.items())
        asked = [place for place, label in enumerate(wanted) if label != IGNORED_LABEL]
        assert min(asked) >= start
        assert sorted(row[place] for place in asked) == sorted(pairs)
        assert all(wanted[place] == pairs[row[place]] for place in asked)
        rest = [row[place] for place in range(start, task.length) if place not in asked]
        if task.task == "simple":
            assert set(rest) <= {recall.FILLER}
        else:
            assert all(place % 2 == 0 for place in asked)


def test_batches_are_a_function_of_the_seed():
    task = recall.Recall()
    first, again, other = (task.batch(8, seed) for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_places_follow_the_tasks_law():
    """One pair: "simple" is uniform, "zoology" asks at distance n as often as n^(power - 1)."""
    for name, power in (("simple", 1.0), ("zoology", 0.01), ("zoology", 0.5)):
        task = recall.Recall(name, 18, 1, 8, power)
        _, labels = task.batch(40_000, 0)
        place = (labels != IGNORED_LABEL).int().argmax(-1) - 2
        step = 1 if name == "simple" else 2
        shares = torch.bincount(place // step, minlength=16 // step).double() / len(place)
        law = torch.arange(1, 16 // step + 1).double() ** (power - 1)
        torch.testing.assert_close(shares, law / law.sum(), atol=0.01, rtol=0)


def test_keys_and_values_are_uniform():
    ids, _ = recall.Recall("simple", 32, 6, 40).batch(20_000, 0)
    keys, values = ids[:, 0:12:2], ids[:, 1:12:2]
    for tokens, low, high in ((keys, 1, 20), (values, 20, 40)):
        shares = torch.bincount(tokens.flatten(), minlength=40)[low:high] / tokens.numel()
        torch.testing.assert_close(
            shares, torch.full_like(shares, 1 / (high - low)), atol=0.003, rtol=0
        )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": "copy"}, "task must be one of .*got 'copy'"),
        ({"pairs": 0}, "pairs"),
        ({"pairs": 20}, "vocabulary must be .*42"),
        ({"length": 17}, "length must be .*18"),
        ({"task": "zoology", "length": 23}, "length must be .*24"),
        ({"power": 0.0}, "power"),
    ],
)
def test_impossible_tasks_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        recall.Recall(**changes)


def test_accuracy_and_loss_are_those_of_the_queries():
    class Oracle(torch.nn.Linear):
        """Looks the value up, with a probability of 0.9, but knows the even keys only."""

        def forward(self, ids):
            logits = torch.full((*ids.shape, 40), 0.1 / 39).log()
            for row, tokens in enumerate(ids.tolist()):
                pairs = dict(zip(tokens[0:12:2], tokens[1:12:2], strict=True))
                for place, token in enumerate(tokens[12:], 12):
                    if token and token % 2 == 0:
                        logits[row, place, pairs[token]] = torch.tensor(0.9).log()
            return logits

    task = recall.Recall()
    accuracy, loss, queries = recall.evaluate(Oracle(1, 1), task, sequences=40, batch=20)
    keys = torch.cat([task.batch(20, recall.EVALUATION_SEED + n)[0][:, 0:12:2] for n in (0, 1)])
    known = (keys % 2 == 0).double().mean().item()
    # Where all logits are equal the first token is said, which is no value.
    assert queries == 240 and accuracy == pytest.approx(known)
    expected = -known * math.log(0.9) + (1 - known) * math.log(40)
    assert loss == pytest.approx(expected, rel=1e-6)


SMALL = ["--width", "16", "--layers", "1", "--cylinders", "4", "--length", "12", "--pairs", "2"]
SMALL += ["--vocabulary", "8", "--batch", "4", "--sequences", "8"]


@pytest.mark.parametrize("name", recall.PROVIDERS)
def test_models_are_causal(name):
    arguments, task = recall.parse(["--providers", name, *SMALL])
    torch.manual_seed(0)
    model = recall.make_network(recall.PROVIDERS[name], arguments).double().eval()
    ids, _ = task.batch(3, 0)
    whole = recall.logits_of(model, ids)
    torch.testing.assert_close(recall.logits_of(model, ids[:, :5]), whole[:, :5])
    assert not torch.allclose(recall.logits_of(model, ids.flip(1))[:, -1], whole[:, -1])


def test_softmax_is_over_the_states_of_the_model():
    arguments, task = recall.parse(["--providers", "softmax", *SMALL])
    torch.manual_seed(0)
    model = recall.make_network(recall.PROVIDERS["softmax"], arguments)
    [layer] = model(task.batch(3, 0)[0], return_layers=True).layers
    values = torch.randn(3, 4, 12, 4)
    mean, _ = model.layers[0].attention.gather(layer.queries, layer.keys, values)
    scaled = layer.queries * layer.score.scale[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        scaled, layer.keys, values, is_causal=True, scale=1.0
    )
    torch.testing.assert_close(mean, expected)


def test_runs_leave_rows_and_curves(tmp_path, monkeypatch, capsys):
    output, curves, figure = (tmp_path / name for name in ("out.csv", "curves.csv", "out.svg"))
    run = ["--providers", "lm", "transformer", *SMALL, "--steps", "5", "--points", "2"]
    files = ["--output", str(output), "--curves", str(curves)]
    monkeypatch.setattr(sys, "argv", ["recall.py", *run, *files, "--seeds", "0", "1"])
    threads = torch.get_num_threads()
    recall.main()
    torch.set_num_threads(threads)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["provider"], row["seed"]) for row in rows] == [
        ("lm", "0"), ("lm", "1"), ("transformer", "0"), ("transformer", "1"),
    ]  # fmt: skip
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= 1 and float(row["loss"]) > 0
        assert row["steps"] == "5" and row["queries"] == "16" and row["commit"]
        assert (row["kept"] == "") == (row["provider"] == "transformer")
    [(key, runs)] = recall_curves.read_curves(curves).items()
    assert key == ("simple", 12, 2, 16, "") and sorted(runs)[0] == "lm, rate 0.004"
    assert [point[0] for point in runs["lm, rate 0.004"]["1"]] == [3, 5]
    with curves.open("ab") as file:  # the first point of a run that was killed
        file.write(curves.read_bytes().splitlines()[-2].replace(b",1,", b",2,") + b"\r\n")
    [(_, again)] = recall_curves.read_curves(curves).items()
    assert again == runs and "seed 2, which has 3 of 5 steps" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="the figure is drawn with matplotlib")
    monkeypatch.setattr(sys, "argv", ["recall_curves.py", str(curves), str(figure)])
    recall_curves.main()
    assert "12 tokens, 2 pairs" in figure.read_text() or figure.stat().st_size > 1000


def test_a_model_learns_to_recall():
    command = ["--providers", "transformer", "--length", "12", "--pairs", "2", "--vocabulary", "8"]
    arguments, task = recall.parse([*command, "--steps", "250", "--points", "1", "--rate", "1e-2"])
    torch.manual_seed(0)
    model = recall.make_network(recall.PROVIDERS["transformer"], arguments)
    before, *_ = recall.evaluate(model, task, 256, 32)
    recall.train(model, task, arguments, seed=0, tell=lambda point: None)
    after, *_ = recall.evaluate(model, task, 256, 32)
    assert before < 0.6 and after > 0.9


def test_steps_take_turns_between_mixed_tasks():
    """A model that notes what it is given: shapes, and how many pairs."""

    class Recorder(torch.nn.Linear):
        def forward(self, ids):
            if self.training:
                seen.append((*ids.shape, int((ids[0] >= 20).sum())))
            return self.weight.new_zeros(*ids.shape, 40) + self.weight[0, 0]

    seen = []
    command = ["--length", "24", "--pairs", "5", "--mix", "8:2", "12:3", "--batch", "4"]
    arguments, task = recall.parse([*command, "--steps", "5", "--points", "1"])
    recall.train(Recorder(1, 1), task, arguments, seed=0, tell=lambda point: None)
    assert seen == [(12, 8, 2), (8, 12, 3), (4, 24, 5), (12, 8, 2), (8, 12, 3)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mix", "8"], "mix must be LENGTH:PAIRS, got '8'"),
        (["--mix", "8:x"], "mix must be LENGTH:PAIRS, got '8:x'"),
        (["--mix", "8:3"], "length must be"),
        (["--mix", "64:3"], "length of mix must be"),
        (["--rate", "0"], "learning_rate must be"),
        (["--length", "17"], "length must be"),
        (["--batch", "0"], "batch must be"),
        (["--set", "sigma_max=-1"], "sigma_max must be"),
        (["--providers", "softmax", "--set", "scale_min=0"], "scale_min must be"),
    ],
)
def test_bad_options_end_with_one_line(options, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        recall.parse(options)
    assert stop.value.code == 2 and reason in capsys.readouterr().err.splitlines()[-1]
