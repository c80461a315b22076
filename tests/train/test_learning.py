"""How a run learns: rules, precision, schedules, early stopping, a killed process, few waits."""

import dataclasses
import json
import signal
import sys

import pytest
import torch

from qflux import (
    TextSplit,
    TrainingOptions,
    load_text,
    make_config,
    make_model,
    ngram_losses,
    train,
)
from qflux.cli import main
from qflux.text.vocabulary import CharacterVocabulary
from qflux.text.windows import TrainingWindows
from qflux.train import loop as training_module
from qflux.train import step as step_module
from qflux.train.hebbian import largest_moment
from qflux.train.metrics import peak_memory
from qflux.train.schedules import (
    learning_rate_at,
    radius_rate,
    radius_rules,
    shorten,
    window_length,
)
from qflux.train.step import TrainStep, checkpoint_layers

PATTERN = TextSplit({"a": "abcdefgh " * 60}, {"b": "abcdefgh " * 7})
VOCABULARY = CharacterVocabulary(PATTERN.text)
SMALL = {"num_layers": 1, "num_cylinders": 2, "hidden_dim": 16, "context_length": 12}
CONFIG = make_config(
    "lm", VOCABULARY.size, **SMALL, value_dim=4, mlp_ratio=2, dropout=0.1, evolution=True
)
FLUX = make_config("flux", VOCABULARY.size, **SMALL)
CPU = torch.device("cpu")


def run(folder, config=CONFIG, text=PATTERN, vocabulary=VOCABULARY, **options):
    given = {"batch_size": 4, "max_steps": 12, "log_interval": 1, "eval_interval": 4}
    options = TrainingOptions(folder, progress=False, **{**given, **options})
    return train(config, text, vocabulary, options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder):
    keys = ("step", "train_loss", "val_loss", "learning_rate", "gradient_norm", "window_length")
    return [[line.get(key) for key in keys] for line in metrics(folder)]


def step_of(config=CONFIG, **options):
    torch.manual_seed(0)
    model = make_model(config)
    return model, TrainStep(model, TrainingOptions("", warmup=0.0, **options), CPU)


BATCH = VOCABULARY.encode("abcdefgh " * 8).view(6, 12)

# --- rules ---


def test_hebbian_learning_moves_the_output_layer_only():
    model, step = step_of(learning="hebbian")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [step(BATCH, 0.0).loss.item() for _ in range(60)]
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"head.weight", "head.bias"}
    assert losses[-1] < 0.5 < 1.5 < losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hebbian_learning_builds_no_graph():
    model, step = step_of(learning="hebbian")
    recorded = []
    model.layers[0].register_forward_hook(
        lambda module, inputs, output: recorded.append(output[1].requires_grad)
    )
    step(BATCH, 0.0)
    assert recorded == [False]


def test_hebbian_learning_converges_on_real_text(tmp_path):
    """The loss of the untrained network falls below that of counting single characters."""
    sonnets = load_text().train["sonnets.txt.xz"]
    text = TextSplit({"a": sonnets[:40000]}, {"b": sonnets[40000:44000]})
    vocabulary = CharacterVocabulary(text.text)
    config = make_config(
        "lm", vocabulary.size, num_layers=1, num_cylinders=4, hidden_dim=64, context_length=32
    )
    options = {"batch_size": 16, "max_steps": 120, "eval_interval": 60, "epochs": 50}
    result = run(tmp_path, config, text, vocabulary, learning="hebbian", **options)
    unigram = ngram_losses(
        [vocabulary.encode(work) for work in text.train.values()],
        [vocabulary.encode(work) for work in text.validation.values()],
        vocabulary.size,
    )["unigram"]
    first, second = [line["val_loss"] for line in metrics(tmp_path) if "val_loss" in line]
    assert result.validation_loss == second < first < metrics(tmp_path)[0]["train_loss"]
    assert second < unigram - 0.1


def test_the_raw_logit_error_can_be_chosen():
    learned = {}
    for error in ("softmax", "logits"):
        model, step = step_of(learning="hebbian", hebbian_error=error)
        step(BATCH, 0.0)
        learned[error] = model.head.weight.detach().clone()
    assert not torch.allclose(learned["softmax"], learned["logits"], atol=1e-5)


def test_hybrid_learning_gives_the_layers_below_the_gradient_of_the_cross_entropy():
    config = dataclasses.replace(CONFIG, dropout=0.0)
    model, step = step_of(config, learning="hybrid", max_gradient_norm=1e9, accumulation=2)
    twin, _ = step_of(config)
    batch = torch.cat((BATCH[:3], BATCH[:3].flip(1)))
    twin(batch, labels=batch).loss.backward()
    head = model.head.weight.detach().clone()
    taken = step(batch, 0.0)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name.startswith("head."):
            assert found.grad is None
        else:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    features = [twin.features(part)[:, :-1].flatten(0, 1) for part in batch.chunk(2)]
    rate = 10.0 / torch.stack([largest_moment(part) for part in features]).mean()
    torch.testing.assert_close(
        model.head.weight.detach(), head - rate * twin.head.weight.grad, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(taken.loss, twin(batch, labels=batch).loss.detach())
    for _ in range(60):
        taken = step(batch, 0.0)
    assert taken.loss < 0.5


def test_the_optimiser_leaves_an_output_layer_with_its_own_rule_alone():
    model = make_model(CONFIG)
    for learning, expected in (("backprop", True), ("hybrid", False)):
        options = TrainingOptions("", learning=learning)
        groups = TrainStep(model, options, CPU).optimizer.param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
        assert (id(model.head.weight) in held) == (id(model.head.bias) in held) == expected
        assert len(held) == len(list(model.parameters())) - (0 if expected else 2)


@pytest.mark.parametrize("learning", ["backprop", "hebbian", "hybrid"])
def test_accumulated_parts_are_the_whole_batch(monkeypatch, learning):
    # The unit of the rate is the mean over the parts, which is not exactly that of the whole.
    monkeypatch.setattr(step_module, "largest_moment", lambda features: torch.tensor(10.0))
    config = dataclasses.replace(CONFIG, dropout=0.0)
    states = []
    for parts in (1, 4):
        model, step = step_of(config, learning=learning, accumulation=parts)
        norms = [step(BATCH, 0.0) for _ in range(2)]
        states.append((model.state_dict(), norms))
    for (name, whole), parts in zip(states[0][0].items(), states[1][0].values(), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4, msg=name)
    for whole, parts in zip(states[0][1], states[1][1], strict=True):
        torch.testing.assert_close(parts.loss, whole.loss)
        torch.testing.assert_close(parts.norm, whole.norm, rtol=1e-3, atol=1e-5)


# --- precision and memory ---


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_matrix_products_have_the_precision_and_states_stay_float32(precision):
    model, step = step_of(precision=precision)
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    evolution = model.layers[0].evolution
    evolution.register_forward_hook(lambda module, inputs, output: seen.append(output.states.dtype))
    losses = [step(BATCH, 0.0).loss for _ in range(40)]
    assert set(seen[:2]) == {torch.float32, getattr(torch, precision)}
    assert seen[0] == torch.float32 and losses[0].dtype == torch.float32
    assert losses[-1] < 0.7
    scale = step.state_dict()["scaler"].get("scale")
    assert (scale is not None and scale > 1) == (precision == "float16")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_scaled_gradients_are_clipped_at_their_own_size():
    _, plain = step_of(dataclasses.replace(CONFIG, dropout=0.0))
    _, scaled = step_of(dataclasses.replace(CONFIG, dropout=0.0), precision="float16")
    expected = plain(BATCH, 0.0).norm
    torch.testing.assert_close(scaled(BATCH, 0.0).norm, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(FLUX, embedding="annulus", train_embedding=True)],
    ids=["lm", "flux"],
)
def test_gradient_checkpointing_recomputes_and_changes_nothing(tmp_path, config):
    run(tmp_path / "kept", config)
    run(tmp_path / "recomputed", config, gradient_checkpointing=True)
    assert curve(tmp_path / "kept") == curve(tmp_path / "recomputed")
    model, calls = make_model(config), []
    original = model.layers[0].forward
    model.layers[0].forward = lambda *args: calls.append(1) or original(*args)
    checkpoint_layers(model)
    model(BATCH, labels=BATCH).loss.backward()
    assert len(calls) == 2


def test_peak_memory_is_that_of_the_process():
    before = peak_memory(CPU)
    block = torch.ones(16 << 20)
    assert 30e6 < before < 100e9
    assert peak_memory(CPU) >= before and block[0] == 1


def test_runs_log_speed_memory_and_what_layers_do(tmp_path):
    run(tmp_path, FLUX, max_steps=4)
    for line in metrics(tmp_path):
        assert line["peak_memory_mb"] > 30 and line["tokens_per_second"] > 0
        assert len(line["density"]) == len(line["coherence"]) == 1
        assert 0 < line["density"][0] <= 1


def test_the_host_waits_for_the_device_once_an_interval(tmp_path, monkeypatch):
    waits = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def reading(self, *args, original=original):
            caller = sys._getframe(1).f_globals["__name__"]
            if caller in (
                "qflux.train.evaluation",
                "qflux.train.loop",
                "qflux.train.metrics",
                "qflux.train.step",
                "qflux.models.published",
                "qflux.models.layers",
            ):
                waits.append(sys._getframe(1).f_code.co_name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, reading)
    run(tmp_path, max_steps=12, log_interval=3, eval_interval=None)
    assert waits.count("fetch") == 4
    assert [wait for wait in waits if wait != "fetch"] == ["score"] * waits.count("score")


# --- schedules ---


def test_curriculum_doubles_the_windows_and_keeps_the_tokens():
    options = TrainingOptions("", curriculum_length=8, curriculum_share=0.5)
    lengths = [window_length(progress / 100, 64, options) for progress in range(100)]
    assert sorted(set(lengths)) == [8, 16, 32, 64] and lengths == sorted(lengths)
    assert [lengths.count(length) for length in (8, 16, 32)] == [17, 17, 16]
    assert window_length(0.0, 8, options) == 8 and window_length(0.0, 4, options) == 4
    assert window_length(0.0, 50, options) == 8 and window_length(0.49, 50, options) == 32
    assert window_length(0.0, 64, TrainingOptions("")) == 64
    batch = torch.arange(2 * 12).view(2, 12)
    assert shorten(batch, 4).tolist() == torch.arange(24).view(6, 4).tolist()
    assert shorten(batch, 5)[:, 0].tolist() == [0, 5, 12, 17]
    assert torch.equal(shorten(batch, 12), batch)


def test_a_run_with_a_curriculum_grows_its_windows(tmp_path, monkeypatch):
    shapes, original = [], TrainStep.__call__

    def step(self, batch, progress, **options):
        shapes.append(tuple(batch.shape))
        return original(self, batch, progress, **options)

    monkeypatch.setattr(TrainStep, "__call__", step)
    result = run(tmp_path, curriculum_length=3, curriculum_share=0.5)
    assert shapes == [(16, 3)] * 3 + [(8, 6)] * 3 + [(4, 12)] * 6
    assert [line["window_length"] for line in metrics(tmp_path)] == [3] * 3 + [6] * 3 + [12] * 6
    assert result.steps == 12


@pytest.mark.parametrize("config", [CONFIG, FLUX], ids=["lm", "flux"])
def test_radii_learn_to_grow_and_evaluation_has_the_configured_rate(tmp_path, monkeypatch, config):
    rates, original = {"step": [], "evaluate": []}, training_module.evaluate

    def rate(model):
        [(_, rule)] = radius_rules(model)
        return rule.rate

    def step(self, batch, progress, original=TrainStep.__call__, **options):
        rates["step"].append(rate(self.model))
        return original(self, batch, progress, **options)

    def evaluate(model, *args):
        rates["evaluate"].append(rate(model))
        return original(model, *args)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(training_module, "evaluate", evaluate)
    run(tmp_path, config, radius_warmup=0.5)
    assert rates["step"] == pytest.approx([0.01 * min(1, 2 * at / 12) for at in range(12)])
    assert rates["evaluate"] == [0.01] * 3
    rates["step"].clear()
    run(tmp_path / "constant", config, max_steps=2)
    assert rates["step"] == [0.01] * 2


def test_the_radius_rate_is_restored_after_an_error():
    model = make_model(FLUX)
    rules = radius_rules(model)
    with pytest.raises(KeyboardInterrupt), radius_rate(rules, 0.0):
        assert model.layers[0].radius.rate == 0
        raise KeyboardInterrupt
    assert model.layers[0].radius.rate == 0.01


def test_the_delta_rule_follows_the_schedule():
    model, step = step_of(learning="hebbian", hebbian_rate=2.0)
    assert step(BATCH, 0.5).rate == learning_rate_at(0.5, 2.0, 0.0)
    before = model.head.weight.detach().clone()
    step(BATCH, 1.0)
    assert torch.equal(model.head.weight, before)


# --- stopping, killing, resuming ---


def with_losses(monkeypatch, *values):
    values = iter(values)
    monkeypatch.setattr(training_module, "evaluate", lambda *_: next(values))


def test_early_stopping_waits_for_patience(tmp_path, monkeypatch):
    with_losses(monkeypatch, 3.0, 2.0, 2.5, 1.9, 2.0, 1.95, 1.0)
    options = {"max_steps": 100, "epochs": 100, "eval_interval": 2, "patience": 2}
    result = run(tmp_path, **options)
    assert (result.steps, result.best_validation_loss, result.validation_loss) == (12, 1.9, 1.95)
    again = run(tmp_path, **options, resume=True)
    assert again.steps == 12


def test_patience_survives_a_resumption(tmp_path, monkeypatch):
    with_losses(monkeypatch, 2.0, 2.5, 2.6, 2.7, 1.0)
    run(tmp_path, max_steps=4, eval_interval=2, patience=3)
    result = run(tmp_path, max_steps=100, epochs=100, eval_interval=2, patience=3, resume=True)
    assert result.steps == 8


KILLED = """
import os, signal, sys
from qflux.cli import main
from qflux.text.windows import TrainingWindows

original = TrainingWindows.batch

def batch(self, step):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, step)

TrainingWindows.batch = batch
sys.exit(main({arguments!r}))
"""


def test_a_killed_process_resumes_to_the_identical_curve(tmp_path, run_python):
    """Random time steps, curriculum and radius schedule included."""
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question.\n" * 30)
    arguments = [
        "train", "--preset", "flux", "--data", str(tmp_path / "text.txt"), "--num-layers", "1",
        "--hidden-dim", "8", "--context-length", "16", "--batch-size", "2", "--max-steps", "14",
        "--log-interval", "1", "--eval-interval", "7", "--save-interval", "3",
        "--curriculum-length", "4", "--radius-warmup", "0.9", "--warmup", "0.3",
    ]  # fmt: skip
    whole, parts = (str(tmp_path / name) for name in ("whole", "parts"))
    assert main([*arguments, "--output-dir", whole]) == 0
    program = KILLED.format(step=11, arguments=[*arguments, "--output-dir", parts])
    assert run_python(program, check=False).returncode == -signal.SIGKILL
    assert len(metrics(tmp_path / "parts")) == 11
    assert torch.load(tmp_path / "parts" / "training_state.pt")["step"] == 9
    assert main([*arguments, "--output-dir", parts, "--resume"]) == 0
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("options", [{"learning": "hebbian"}, {"learning": "hybrid"}, {
    "precision": "float16"}], ids=str)  # fmt: skip
def test_every_rule_resumes_exactly(tmp_path, monkeypatch, options):
    run(tmp_path / "whole", **options)
    original = TrainingWindows.batch

    def batch(self, step):
        if step == 10:
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingWindows, "batch", batch)
        run(tmp_path / "parts", **options)
    torch.manual_seed(99)
    run(tmp_path / "parts", **options, resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_the_loss_scale_is_part_of_the_state():
    _, first = step_of(precision="float16")
    first(BATCH, 0.0)
    first.scaler.update(1234.0)
    _, second = step_of(precision="float16")
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 1234


# --- options ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulation", 0),
        ("learning", "evolution"),
        ("hebbian_rate", 0.0),
        ("hebbian_error", "hinge"),
        ("precision", "int8"),
        ("curriculum_length", 1),
        ("curriculum_share", 1.5),
        ("curriculum_share", 0.0),
        ("radius_warmup", 1.0),
        ("patience", 0),
        ("save_interval", 0),
        ("trackers", ("mlflow",)),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        TrainingOptions("", **{name: value})
    assert repr(value if isinstance(value, str | int | float) else value[0]) in str(caught.value)


def test_unscaled_half_precision_gradients_are_refused():
    with pytest.raises(ValueError, match=r"precision .*'float16'"):
        TrainingOptions("", learning="hybrid", precision="float16")
