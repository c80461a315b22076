"""Starting from a model, compiled steps, a rehearsal, and what a run says while it goes."""

import io
import json
import math
import os
import pty
import sys

import pytest
import torch

from qflux import QuantumFluxConfig, TextSplit, TrainingOptions, load_model, make_config, train
from qflux.models.base import CausalLM
from qflux.text.vocabulary import ByteVocabulary, CharacterVocabulary
from qflux.train import display as display_module
from qflux.train import step as step_module
from qflux.train.display import Display
from qflux.train.start import read_start

PATTERN = TextSplit({"a": "abcdefgh " * 60}, {"b": "abcdefgh " * 7})
OTHER = TextSplit({"a": "hgfe dcba " * 60}, {"b": "hgfe dcba " * 7})
VOCABULARY = CharacterVocabulary(PATTERN.text)
CONFIG = QuantumFluxConfig(
    VOCABULARY.size, num_layers=1, num_cylinders=2, hidden_dim=16, context_length=12
)
SMALL = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2", "--context-length", "16"]
TEXT = "To be, or not to be: that is the question.\n" * 12


def run(folder, text=PATTERN, config=CONFIG, vocabulary=VOCABULARY, **options):
    given = {"batch_size": 4, "max_steps": 6, "log_interval": 1, "eval_interval": 3}
    options = TrainingOptions(folder, **{"progress": False, **given, **options})
    return train(config, text, vocabulary, options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def trained(tmp_path, call):
    (tmp_path / "text.txt").write_text(TEXT)
    folder = tmp_path / "model"
    given = ["--data", tmp_path / "text.txt", *SMALL, "--max-steps", "5", "--batch-size", "2"]
    status, _, err = call("train", "--output-dir", folder, *given)
    assert status == 0, err
    return folder


# --- from a model ---


def test_a_run_starts_with_the_weights_of_a_model(tmp_path):
    first = run(tmp_path / "first", max_steps=60, epochs=50)
    expected = load_model(tmp_path / "first")[0].state_dict()
    result = run(tmp_path / "second", OTHER, init_from=tmp_path / "first", max_steps=1,
                 learning_rate=1e-30)  # fmt: skip
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
    near = run(tmp_path / "third", init_from=tmp_path / "first", max_steps=1)
    assert near.validation_loss < first.best_validation_loss + 0.2
    # The start is read once: the run goes on without it.
    for file in (tmp_path / "first").iterdir():
        file.unlink()
    start = tmp_path / "first"
    assert run(tmp_path / "third", init_from=start, max_steps=2, resume=True).steps == 2
    assert json.loads((tmp_path / "third" / "run.json").read_text())["options"]["init_from"]


def test_the_program_takes_network_and_vocabulary_from_the_model(tmp_path, call, trained):
    (tmp_path / "new.txt").write_text(TEXT[::-1])
    base = ["train", "--init-from", trained, "--data", tmp_path / "new.txt", "--max-steps", "2"]
    status, _, err = call(*base, "--output-dir", tmp_path / "new", "--context-length", "8")
    assert status == 0, err
    assert f"starts from {trained}" in err
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["hidden_dim"], config["num_cylinders"], config["context_length"]) == (8, 2, 8)
    vocabularies = [
        (folder / "vocabulary.json").read_text() for folder in (trained, tmp_path / "new")
    ]
    assert vocabularies[0] == vocabularies[1]
    assert call("train", "--output-dir", tmp_path / "new", "--resume", "--max-steps", "3")[0] == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--preset", "flux"], "preset and init_from"),
        (["--vocabulary", "byte"], "vocabulary and init_from"),
        (["--hidden-dim", "16"], "another network"),
        (["--num-layers", "2"], "layers.1"),
        (["--embedding", "learned"], "no embedding"),
        (["--data", "{root}/unknown.txt"], "'~'"),
        (["--init-from", "{root}/nowhere"], "nowhere', which has no config.json"),
        (["--init-from", "{root}"], "which has no config.json"),
    ],
)
def test_what_does_not_fit_the_model_is_named(tmp_path, call, trained, more, named):
    (tmp_path / "unknown.txt").write_text("~" + TEXT)
    given = ["--init-from", trained, "--data", tmp_path / "text.txt", "--max-steps", "1"]
    filled = [part.format(root=tmp_path) for part in more]
    status, out, err = call("train", "--output-dir", tmp_path / "new", *given, *filled)
    assert (status, out, err.count("\n")) == (2, "", 1) and named in err
    assert not (tmp_path / "new" / "run.json").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 100], ids=["empty", "garbage"])
def test_broken_weights_of_a_start_are_named(tmp_path, call, trained, content):
    (trained / "model.safetensors").write_bytes(content)
    given = ["--init-from", trained, "--data", tmp_path / "text.txt", "--max-steps", "1"]
    status, _, err = call("train", "--output-dir", tmp_path / "new", *given)
    assert (status, err.count("\n")) == (2, 1) and "model.safetensors" in err


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_run_starts_from_an_exported_model(tmp_path, call, kind):
    pytest.importorskip("transformers", reason="exports models")
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--data", tmp_path / "text.txt", *SMALL, "--max-steps", "2", "--vocabulary", kind]
    given += ["--vocab-size", "260"] if kind == "bpe" else []
    assert call("train", "--output-dir", tmp_path / "run", *given)[0] == 0
    status, _, err = call(
        "export", "--model-path", tmp_path / "run", "--output-dir", tmp_path / "hf"
    )
    assert status == 0, err
    config, vocabulary = read_start(tmp_path / "hf")
    model, own = load_model(tmp_path / "run")
    assert config == model.config and vocabulary.size == own.size
    assert type(vocabulary) is type(own)
    ids = own.encode(TEXT)
    assert torch.equal(vocabulary.encode(TEXT), ids) and vocabulary.decode(ids) == TEXT
    result = train(
        config, TextSplit({"a": TEXT}, {"b": TEXT}), vocabulary,
        TrainingOptions(tmp_path / "new", init_from=tmp_path / "hf", max_steps=1, progress=False,
                        learning_rate=1e-30),
    )  # fmt: skip
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-12)
    base = ["train", "--init-from", tmp_path / "hf", "--data", tmp_path / "text.txt"]
    assert call(*base, "--max-steps", "1", "--output-dir", tmp_path / "cli")[0] == 0


def test_folders_of_other_models_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for config, named in (('{"model_type": "gpt2"}', "gpt2"), ("{", "not valid JSON"),
                          ('{"model_type": "qflux", "model": 3}', "qflux")):  # fmt: skip
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=rf"config\.json.*{named}"):
            read_start(tmp_path)
    good = {"model_type": "qflux", "model": json.loads(CONFIG.to_json())}
    (tmp_path / "config.json").write_text(json.dumps(good))
    for tokenizer in ("{", "[]", '{"model": {"type": "WordLevel", "vocab": {"b": 0, "a": 1}}}'):
        (tmp_path / "tokenizer.json").write_text(tokenizer)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            read_start(tmp_path)
    (tmp_path / "vocabulary.json").write_text(ByteVocabulary().to_json())
    with pytest.raises(ValueError, match=r"vocab_size of the model, 9, got .* 256 tokens"):
        read_start(tmp_path)


# --- compiled, and rehearsed ---


def test_steps_are_compiled_and_nothing_else(tmp_path, monkeypatch):
    compiled = []

    def compile(model):
        def forward(*arguments, **options):
            compiled.append(model.training)
            return model(*arguments, **options)

        return forward

    plain = run(tmp_path / "plain")
    monkeypatch.setattr(step_module.torch, "compile", compile)
    result = run(tmp_path / "compiled", compile=True, save_interval=2)
    assert compiled == [True] * 6
    assert result.validation_loss == plain.validation_loss
    compiled.clear()
    assert run(tmp_path / "plain", max_steps=8, compile=True, resume=True).steps == 8
    assert compiled == [True, True]


def test_a_compiler_that_fails_is_one_line(tmp_path, call, monkeypatch):
    from torch._dynamo.exc import InternalTorchDynamoError

    def compile(model):
        def forward(*arguments, **options):
            raise InternalTorchDynamoError("no compiler\nand a long story")

        return forward

    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(step_module.torch, "compile", compile)
    given = ["--data", tmp_path / "text.txt", *SMALL, "--compile"]
    status, _, err = call("train", "--output-dir", tmp_path / "run", *given)
    last = err.splitlines()[-1]
    assert status == 2 and "no compiler" in last and "leave out compile" in last


def test_steps_with_the_delta_rule_are_compiled(tmp_path, monkeypatch):
    """Up to what the output layer reads; traced whole, and with the losses of the steps as such."""
    plain = run(tmp_path / "plain", learning="hybrid", max_steps=2)
    compile, compiled = torch.compile, []

    def traced(function):
        compiled.append(getattr(function, "__name__", None))
        return compile(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(step_module.torch, "compile", traced)
    result = run(tmp_path / "compiled", learning="hybrid", max_steps=2, compile=True)
    assert compiled.count("features") == 1
    monkeypatch.setattr(step_module.torch, "compile", lambda function: compiled.append)
    with pytest.raises(TypeError):
        run(tmp_path / "alone", learning="hebbian", compile=True)
    assert isinstance(compiled[-1], torch.Tensor), "hebbian steps run what was compiled"
    assert result.validation_loss == pytest.approx(plain.validation_loss, rel=1e-5)
    torch._dynamo.reset()


def test_a_dry_run_shows_and_writes_nothing(tmp_path, call):
    (tmp_path / "text.txt").write_text(TEXT)
    folder = tmp_path / "run"
    base = ["train", "--output-dir", folder]
    given = ["--data", tmp_path / "text.txt", *SMALL, "--max-steps", "5", "--batch-size", "2"]
    status, out, err = call(*base, *given, "--dry-run")
    assert (status, err) == (0, "") and not folder.exists()
    assert "head.weight" in out and "(18, 8)" in out
    assert "(2, 16) tokens" in out and "MB in all" in out and "parameters, context 16" in out
    assert call(*base, *given)[0] == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call(*base, *given, "--dry-run")[0] == 2
    status, out, _ = call(*base, "--resume", "--max-steps", "9", "--dry-run")
    assert status == 0 and "after step 5" in out and "max_steps 5 -> 9" in out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- what is said ---


def test_the_header_says_what_is_trained_on_what(tmp_path, call):
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--data", tmp_path / "text.txt", *SMALL, "--max-steps", "4", "--batch-size", "2"]
    status, _, err = call("train", "--output-dir", tmp_path / "run", *given, "--log-interval", "2")
    assert status == 0
    parameters = sum(p.numel() for p in load_model(tmp_path / "run")[0].parameters())
    for words in (
        "text        1 work, 464 characters, 464 tokens to train on",
        "held out    52 tokens (10.1%): 'text.txt (end)'",
        "char, 18 tokens", f"{parameters:,} parameters", "cpu, float32",
        "4 steps of 2 x 16 tokens", "s a step, 00:0",
        "step 2 of 4 (50 %), 00:0", "step 4 of 4 (100 %), 00:00 left: loss ",
        "tokens/s, learning rate ", "step 4: training loss ",
    ):  # fmt: skip
        assert words in err, words


def test_nothing_is_said_without_progress(tmp_path, capfd):
    run(tmp_path, sample_prompt="abc")
    assert capfd.readouterr() == ("", "")


def test_a_sample_comes_with_every_evaluation_and_changes_nothing(tmp_path, capfd, monkeypatch):
    # Its time steps are random in training, and a model may draw while it generates.
    published = make_config("flux", VOCABULARY.size, num_layers=1, hidden_dim=8, context_length=12)
    generate = CausalLM.generate

    def drawing(*arguments, **options):
        torch.rand(3)
        return generate(*arguments, **options)

    monkeypatch.setattr(CausalLM, "generate", drawing)
    for name, config in (("lm", CONFIG), ("flux", published)):
        run(tmp_path / name / "plain", config=config)
        run(tmp_path / name / "samples", config=config, sample_prompt="abc", sample_tokens=7,
            progress=True)  # fmt: skip
        with_sample = metrics(tmp_path / name / "samples")
        samples = [line["sample"] for line in with_sample if "sample" in line]
        assert [line["step"] for line in with_sample if "sample" in line] == [3, 6]
        assert all(text.startswith("abc") and len(text) == 10 for text in samples)
        err = capfd.readouterr().err
        assert all(text in err for text in samples)
        losses = [
            [(line["train_loss"], line.get("val_loss")) for line in metrics(tmp_path / name / part)]
            for part in ("plain", "samples")
        ]
        assert losses[0] == losses[1]


@pytest.mark.parametrize("prompt", ["", "~"])
def test_a_prompt_that_cannot_be_read_is_refused_at_the_start(tmp_path, prompt):
    with pytest.raises(ValueError, match="sample_prompt"):
        run(tmp_path, sample_prompt=prompt)
    assert not (tmp_path / "run.json").exists()


class Terminal(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self):
        return True


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(display_module.time, "perf_counter", lambda: self.now)


LINE = {"step": 2, "train_loss": 1.25, "tokens_per_second": 1234.0, "learning_rate": 0.005}


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    """From the share of the run alone, so that it is there with max_seconds too."""
    screen, clock = Terminal(), Clock(monkeypatch)
    monkeypatch.setattr(sys, "stderr", screen)
    display = Display(True, None)
    with display.running(0.2):
        clock.now += 1000  # for a first step that compiles
        display.step(1, 0.25)
        assert display._bar.desc == "step 1, time left unknown"
        clock.now += 5
        display.interval(LINE, 0.3)
        display.step(2, 0.3)
        assert display._bar.desc == ("step 2, 01:10 left: loss 1.250, 1,234 tokens/s, lr 5.00e-03")
        layer = torch.nn.Linear(2, 2)
        with display.evaluating(layer, 40):
            clock.now += 3
            layer(torch.zeros(5, 2))
            assert display._bar.desc == "evaluating, 25 %, 00:09 left"
        assert "loss 1.250" in display._bar.desc
        display.say("above")
    assert "30%|" in screen.getvalue() and "above" in screen.getvalue()


def test_without_a_terminal_there_is_a_line_an_interval(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    display = Display(True, 8)
    with display.running(0.0):
        for step in range(1, 5):
            clock.now += 2
            display.step(step, step / 8)
        display.interval({**LINE, "step": 4}, 4 / 8)
        with display.evaluating(torch.nn.Linear(2, 2), 40):
            pass
    assert capsys.readouterr().err.splitlines() == [
        f"{'time':11} 2 s a step, 00:10 left, evaluations aside",
        "step 4 of 8 (50 %), 00:08 left: loss 1.250, 1,234 tokens/s, learning rate 5.00e-03",
    ]


@pytest.mark.parametrize("broken", [None, "closed"])
def test_a_missing_standard_error_is_no_error(monkeypatch, capsys, broken):
    stream = None if broken is None else io.StringIO()
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    display = Display(True, 8)
    with display.running(0.0):
        display.step(1, 1 / 8)
        display.interval(LINE, 1 / 8)
        display.say("nobody hears this")
    assert capsys.readouterr().out == ""


def test_a_run_on_a_real_terminal_ends_with_a_full_bar(tmp_path, monkeypatch):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        result = run(tmp_path, progress=True, max_seconds=30.0)
        screen.flush()
        shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert math.isfinite(result.validation_loss)
    assert "100%|" in shown and "left" in shown and "validation loss" in shown
    assert "evaluating, " in shown
