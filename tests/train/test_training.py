"""The training loop: it learns, stops, resumes exactly and writes whole files."""

import dataclasses
import json
import math
import os

import pytest
import torch

from qflux import QuantumFluxConfig, QuantumFluxLM, TextSplit, TrainingOptions, load_model, train
from qflux.models.lm import HEAD_START
from qflux.text.vocabulary import CharacterVocabulary
from qflux.text.windows import TrainingWindows
from qflux.train import checkpoint as checkpoint_module
from qflux.train import loop as training_module
from qflux.train.checkpoint import write_atomically
from qflux.train.loop import NonFiniteLossError, evaluate
from qflux.train.optimizer import make_optimizer
from qflux.train.options import OptimizerOptions
from qflux.train.schedules import learning_rate_at

PATTERN = TextSplit({"a": "abcdefgh " * 60}, {"b": "abcdefgh " * 7})
VOCABULARY = CharacterVocabulary(PATTERN.text)
CONFIG = QuantumFluxConfig(
    vocab_size=VOCABULARY.size,
    num_layers=1,
    num_cylinders=2,
    hidden_dim=16,
    context_length=12,
    value_dim=4,
    mlp_ratio=2,
)


def run(folder, config=CONFIG, text=PATTERN, **options):
    given = {"batch_size": 4, "max_steps": 12, "log_interval": 1, "eval_interval": 4}
    options = TrainingOptions(folder, progress=False, **{**given, **options})
    return train(config, text, VOCABULARY, options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder):
    keys = ("step", "epoch", "train_loss", "val_loss", "learning_rate", "gradient_norm")
    return [[line.get(key) for key in keys] for line in metrics(folder)]


@pytest.mark.parametrize("changes", [{}, {"value_dim": 0}], ids=["values", "states alone"])
def test_training_learns_a_pattern(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    result = run(tmp_path, config=config, max_steps=150, epochs=100, learning_rate=1e-2)
    first, last = metrics(tmp_path)[0], metrics(tmp_path)[-1]
    # Nine tokens, whose logits start with the variance of the output layer's uniform weights: half
    # of that is what their loss is above the uniform guess's on average.
    apart = 0.5 + HEAD_START**2 / 3 / 2
    assert first["train_loss"] == pytest.approx(math.log(9), abs=apart)
    assert last["train_loss"] < 0.5 and result.validation_loss < 0.5
    assert last["val_loss"] == result.validation_loss
    assert result.steps == 150


def test_metrics_have_a_line_an_interval(tmp_path):
    result = run(tmp_path, log_interval=3, eval_interval=5, max_steps=11)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10, 11]
    assert [line["step"] for line in lines if "val_loss" in line] == [5, 10, 11]
    assert result.best_validation_loss == min(line.get("val_loss", 9) for line in lines)
    for line in lines:
        assert line["tokens_per_second"] > 0 and line["learning_rate"] > 0
        assert math.isfinite(line["train_loss"]) and line["gradient_norm"] > 0
    elapsed = [line["elapsed_seconds"] for line in lines]
    assert elapsed == sorted(elapsed)


def test_train_loss_is_the_mean_since_the_line_before(tmp_path):
    run(tmp_path / "single", max_steps=8)
    run(tmp_path / "double", max_steps=8, log_interval=2)
    single = [line["train_loss"] for line in metrics(tmp_path / "single")]
    double = [line["train_loss"] for line in metrics(tmp_path / "double")]
    assert double == pytest.approx([sum(single[i : i + 2]) / 2 for i in range(0, 8, 2)])


def test_epochs_and_max_steps_limit_the_run(tmp_path):
    steps = (540 // 12) // 4
    assert run(tmp_path / "a", max_steps=None, epochs=2).steps == 2 * steps
    assert run(tmp_path / "b", max_steps=None, epochs=0.5).steps == math.ceil(steps / 2)
    assert run(tmp_path / "c", max_steps=3, epochs=2).steps == 3
    assert run(tmp_path / "d", max_steps=999, epochs=0.5).steps == math.ceil(steps / 2)


class Clock:
    """A clock on which every training step takes one second and nothing else takes any."""

    def __init__(self, monkeypatch):
        self.now, original = 1000.0, torch.optim.AdamW.step
        monkeypatch.setattr(training_module.time, "perf_counter", lambda: self.now)

        def step(*args, **kwargs):
            self.now += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)


def test_time_budget_ends_the_run_and_sets_the_schedule(tmp_path, monkeypatch):
    Clock(monkeypatch)
    result = run(tmp_path, max_steps=10_000, epochs=10_000, max_seconds=8, eval_interval=None)
    assert (result.steps, result.seconds) == (8, 8)
    rates = [line["learning_rate"] for line in metrics(tmp_path)]
    assert rates == [learning_rate_at(second / 8, 5e-3, 0.05) for second in range(8)]
    assert [line["step"] for line in metrics(tmp_path) if "val_loss" in line] == [8]


def test_time_budget_counts_the_time_before_a_resumption(tmp_path, monkeypatch):
    Clock(monkeypatch)
    run(tmp_path, max_steps=5)
    assert run(tmp_path, max_steps=100, epochs=100, max_seconds=8, resume=True).steps == 8


def test_schedule_warms_up_and_decays_to_zero():
    rates = [learning_rate_at(progress / 100, 2.0, 0.1) for progress in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[5] == pytest.approx(1.1)
    assert rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0, abs=1e-12)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate_at(0.0, 2.0, 0.0) == 2.0


def test_only_weights_of_maps_and_convolutions_decay():
    model = QuantumFluxLM(dataclasses.replace(CONFIG, evolution=True))
    groups = make_optimizer(model, OptimizerOptions(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert decayed | rest == set(names.values()) and not decayed & rest
    assert {"head.weight", "layers.0.attention.conv.weight", "layers.0.mlp.input.weight"} <= decayed
    assert {"head.bias", "embedding.phase", "embedding.radius_logit", "norm.weight"} <= rest
    assert {"rotation.log_frequency", "layers.0.evolution.log_dt"} <= rest


def test_gradients_are_clipped_to_the_largest_norm(tmp_path, monkeypatch):
    norms, original = [], torch.optim.AdamW.step

    def step(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return original(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(tmp_path, max_steps=5, max_gradient_norm=0.01)
    assert norms == pytest.approx([0.01] * 5, rel=1e-3)
    assert all(line["gradient_norm"] > 0.05 for line in metrics(tmp_path))


def test_evaluation_is_the_mean_over_all_tokens():
    torch.manual_seed(0)
    model = QuantumFluxLM(CONFIG)
    works = [VOCABULARY.encode("hgfedcba " * 3), VOCABULARY.encode("abba")]
    total = 0.0
    for work in works:
        for start in range(0, len(work) - 1, 11):
            window = work[None, start : start + 12]
            total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
    expected = total / (26 + 3)
    assert evaluate(model, works, batch_size=2) == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, works, batch_size=100) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_texts_too_short_to_train_or_validate_on_are_named(tmp_path):
    with pytest.raises(ValueError, match="context_length 12"):
        run(tmp_path, text=TextSplit({"a": "abc"}, PATTERN.validation))
    with pytest.raises(ValueError, match=r"validation .* at least 2 tokens"):
        run(tmp_path, text=TextSplit(PATTERN.train, {"b": "a", "c": "b"}))


# --- stopping and resuming ---


def stop_at(monkeypatch, step):
    original = TrainingWindows.batch

    def batch(self, at):
        if at == step:
            raise KeyboardInterrupt
        return original(self, at)

    monkeypatch.setattr(TrainingWindows, "batch", batch)


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, dropout=0.2)
    options = {"config": config, "max_steps": 26, "epochs": 10, "eval_interval": 5}
    whole = run(tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 18)
        run(tmp_path / "parts", **options)
    assert len(metrics(tmp_path / "parts")) == 18
    torch.manual_seed(99)
    parts = run(tmp_path / "parts", **options, resume=True)

    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert parts.best_validation_loss == whole.best_validation_loss
    for (name, expected), found in zip(
        whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found), name
    elapsed = [line["elapsed_seconds"] for line in metrics(tmp_path / "parts")]
    assert elapsed == sorted(elapsed)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path)
    before = curve(tmp_path)
    again = run(tmp_path, resume=True)
    assert curve(tmp_path) == before
    assert (again.steps, again.validation_loss) == (first.steps, first.validation_loss)
    assert again.best_validation_loss == first.best_validation_loss


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 13, "train_')
    run(tmp_path, max_steps=14, resume=True)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 15))


def test_resume_needs_a_state_and_the_same_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(tmp_path / "a", resume=True)
    run(tmp_path / "b", max_steps=1)
    with pytest.raises(FileExistsError, match="resume it"):
        run(tmp_path / "b")
    wider = dataclasses.replace(CONFIG, hidden_dim=20)
    with pytest.raises(ValueError, match="hidden_dim 16 -> 20"):
        run(tmp_path / "b", config=wider, resume=True)
    other = TrainingOptions(tmp_path / "b", resume=True, progress=False)
    with pytest.raises(ValueError, match="vocabulary"):
        train(CONFIG, PATTERN, CharacterVocabulary("abcdefgh."), other)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_state(tmp_path, monkeypatch):
    original = QuantumFluxLM.forward
    calls = iter(range(1000))

    def forward(self, input_ids, labels=None, return_layers=False):
        output = original(self, input_ids, labels, return_layers)
        poison = float("nan") if self.training and next(calls) == 6 else 1.0
        return output._replace(loss=output.loss * poison)

    monkeypatch.setattr(QuantumFluxLM, "forward", forward)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 7.*learning_rate"):
        run(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    model, _ = load_model(tmp_path)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_saved_model_is_the_best_one(tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 3.0])
    kept = []

    def evaluate(model, works, batch_size):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(training_module, "evaluate", evaluate)
    result = run(tmp_path)
    assert (result.validation_loss, result.best_validation_loss) == (3.0, 1.0)
    model, vocabulary = load_model(tmp_path)
    assert vocabulary.characters == VOCABULARY.characters and model.config == CONFIG
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[1][name]), name
    assert not torch.equal(model.head.weight, kept[2]["head.weight"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("max_gradient_norm", 0.0),
        ("max_seconds", 0.0),
        ("batch_size", 0),
        ("max_steps", 0),
        ("log_interval", 0),
        ("eval_interval", 0),
        ("seed", -1),
        ("weight_decay", -0.1),
        ("warmup", 1.0),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        TrainingOptions("", **{name: value})
    assert repr(value) in str(caught.value)


# --- files ---


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    def crash(*_):
        assert path.read_bytes() == b"old"
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.os, broken, crash)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file.bin"]


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(handle):
        events.append(("fsync", os.fstat(handle).st_size))
        fsync(handle)

    def recording_replace(source, target):
        events.append(("replace", os.path.dirname(source), os.fspath(target)))
        replace(source, target)

    monkeypatch.setattr(checkpoint_module.os, "fsync", recording_fsync)
    monkeypatch.setattr(checkpoint_module.os, "replace", recording_replace)
    write_atomically(tmp_path / "file.bin", b"12345")
    assert events == [("fsync", 5), ("replace", str(tmp_path), str(tmp_path / "file.bin"))]


def test_a_run_killed_while_saving_resumes_from_the_state_before(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    replace = os.replace

    def crash(source, target):
        if os.fspath(target).endswith("training_state.pt") and len(metrics(tmp_path / "parts")) > 4:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_module.os, "replace", crash)
        run(tmp_path / "parts")
    parts = run(tmp_path / "parts", resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert parts.best_validation_loss == whole.best_validation_loss
    assert sorted(os.listdir(tmp_path / "parts")) == sorted(os.listdir(tmp_path / "whole"))
