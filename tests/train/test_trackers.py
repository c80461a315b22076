"""Metrics reach TensorBoard and Weights & Biases; a missing package says how to install it."""

import json
import math
import sys
import types

import pytest

from qflux import TextSplit, TrainingOptions, make_config, train
from qflux.optional import require
from qflux.text.vocabulary import CharacterVocabulary
from qflux.train.trackers import named_scalars

PATTERN = TextSplit({"a": "abcdefgh " * 60}, {"b": "abcdefgh " * 7})
VOCABULARY = CharacterVocabulary(PATTERN.text)
CONFIG = make_config("flux", VOCABULARY.size, num_layers=2, hidden_dim=8, context_length=12)


def run(folder, *trackers, **options):
    given = {"batch_size": 4, "max_steps": 6, "log_interval": 2, "eval_interval": 3}
    options = TrainingOptions(folder, progress=False, trackers=trackers, **{**given, **options})
    return train(CONFIG, PATTERN, VOCABULARY, options)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_becomes_named_scalars():
    line = {
        "step": 3,
        "train_loss": 2.0,
        "val_loss": 1e4,
        "learning_rate": 0.1,
        "density": [0.5, 1],
    }
    assert named_scalars(line) == {
        "train/loss": 2.0,
        "train/perplexity": math.exp(2.0),
        "val/loss": 1e4,
        "val/perplexity": math.exp(700),
        "train/lr": 0.1,
        "layer0/density": 0.5,
        "layer1/density": 1,
    }


class FakeWandb(types.ModuleType):
    """What the tracker uses of wandb, recorded."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished += 1

    class Image:
        def __init__(self, figure):
            self.figure = figure


def test_wandb_gets_configuration_lines_and_an_end(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path / "first", "wandb")
    [options] = wandb.started
    assert (options["name"], options["config"]["num_layers"]) == ("first", 2)
    assert wandb.logged == [
        (line["step"], named_scalars(line)) for line in lines(tmp_path / "first")
    ]
    assert wandb.finished == 1
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb, "log", lambda *_, **__: 1 / 0)
        run(tmp_path / "second", "wandb")
    assert wandb.finished == 2
    run(tmp_path / "first", "wandb", max_steps=8, resume=True)
    assert [options["id"] == wandb.started[0]["id"] for options in wandb.started] == [
        True, False, True,
    ]  # fmt: skip
    assert {options["resume"] for options in wandb.started} == {"allow"}
    assert wandb.logged[-1][0] == 8


def test_figures_are_logged_at_evaluations_and_change_nothing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason='pip install "qflux[analysis]" for figures')
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    plain = run(tmp_path / "plain", "wandb")
    assert not [name for _, values in wandb.logged for name in values if "cylinders" in name]
    wandb.logged.clear()
    # Evaluations after steps 3 and 6.
    shown = run(tmp_path / "shown", "wandb", log_figures=True)
    found = [(step, name, value) for step, values in wandb.logged
             for name, value in values.items() if name.startswith("cylinders/")]  # fmt: skip
    assert [step for step, name, _ in found if name == "cylinders/attention"] == [3, 6]
    assert len(found) == 2 * 6
    image = {name: value for step, name, value in found if step == 6}["cylinders/degrees"]
    # The visible pairs, and the pairs that each of the two layers keeps, of the held-out text.
    visible, *kept = image.figure.axes[0].lines
    assert list(visible.get_ydata()) == list(range(1, 64)) and len(kept) == 2
    for name, value in plain.model.state_dict().items():
        assert value.equal(shown.model.state_dict()[name]), name


def test_figures_need_a_tracker_and_a_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="log_figures needs trackers"):
        run(tmp_path / "run", log_figures=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(ImportError, match=r"qflux\[analysis\]"):
        run(tmp_path / "run", "wandb", log_figures=True)
    assert not (tmp_path / "run" / "run.json").exists()


def test_tensorboard_files_hold_the_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard reads its files")
    pytest.importorskip("matplotlib", reason='pip install "qflux[analysis]" for figures')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "tensorboard", log_figures=True, max_steps=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [image] = events.Images("cylinders/attention")
    assert image.step == 2 and image.encoded_image_string.startswith(b"\x89PNG")


def test_tensorboard_files_hold_the_scalars(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard reads its files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for line in lines(tmp_path):
        for name, value in named_scalars(line).items():
            [found] = [event for event in events.Scalars(name) if event.step == line["step"]]
            assert found.value == pytest.approx(value, rel=1e-5)


def test_steps_that_are_taken_again_are_purged(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append(purge_step)

        def __getattr__(self, name):
            return lambda *_: None

    torch_utils = types.ModuleType("torch.utils.tensorboard")
    torch_utils.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", torch_utils)
    run(tmp_path, "tensorboard")
    run(tmp_path, "tensorboard", resume=True, resume_step=3)
    assert seen == [1, 4]


def test_a_tensorboard_shows_a_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard reads its files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "tensorboard")
    run(tmp_path, "tensorboard", resume=True, resume_step=3, max_steps=8)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [
        line["step"] for line in lines(tmp_path)
    ]


def test_a_service_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    """As wandb without a login."""

    class UsageError(Exception):
        pass

    def init(**options):
        raise UsageError("No API key configured.")

    wandb = FakeWandb()
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError, match=r"No API key.*wandb login.*WANDB_MODE=offline"):
        run(tmp_path, "wandb")
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs the package '{name}'.*qflux\[{name}\]"):
        run(tmp_path, name)


def test_require_returns_the_module():
    assert require("json", "a test", extra="none") is json
