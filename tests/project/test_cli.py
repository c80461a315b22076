"""The command line from the outside."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest

from qflux import (
    BpeVocabulary,
    CylinderConfig,
    QuantumFluxConfig,
    TrainingOptions,
    commands,
    make_config,
)
from qflux.cli import main

SMALL = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2", "--context-length", "16"]
TEXT = "To be, or not to be: that is the question.\n" * 12


def qflux(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "qflux", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    (root / "text.txt").write_text(TEXT)
    arguments = ["train", "--output_dir", root / "run", f"--data={root / 'text.txt'}", *SMALL]
    result = qflux(*arguments, "--max_steps=6", "--batch_size=2", "--eval-interval", "3")
    assert result.returncode == 0, result.stderr
    return root, arguments, result


@pytest.fixture
def run(capsys):
    """Run the command line in this process: status, standard output, standard error."""

    def call(*arguments):
        status = main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return call


def test_train_writes_a_model_and_prints_losses(trained):
    root, _, result = trained
    names = {file.name for file in (root / "run").iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
        "training_state.pt",
        "training_state-3.pt",
        "vocabulary.json",
    }
    config = json.loads((root / "run" / "config.json").read_text())
    assert (config["num_layers"], config["hidden_dim"], config["num_cylinders"]) == (1, 8, 2)
    last = json.loads((root / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6
    assert f"model    {last['val_loss']:.3f}" in result.stdout
    assert "unigram" in result.stdout and "bigram" in result.stdout


def test_generate_prints_prompt_and_continuation(trained):
    options = ["--model-path", trained[0] / "run", "--prompt", "To be", "--max-new-tokens", "40"]
    result = qflux("generate", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("To be") and len(result.stdout) == 5 + 40 + 1
    assert set(result.stdout) <= set(TEXT)


def test_generate_passes_its_options_on(trained, run):
    def text(*more):
        options = ["--model-path", trained[0] / "run", "--prompt", "To be", "--max-length", "40"]
        status, out, err = run("generate", *options, *more)
        assert (status, err) == (0, "")
        return out

    first = text("--seed", "1")
    assert text("--seed", "1") == first != text("--seed", "2")
    assert text("--seed", "1", "--top_k", "1000", "--top-p=1") == first
    greedy = text("--temperature", "0")
    assert greedy != first
    assert text("--seed", "1", "--top-k", "1") == text("--seed", "1", "--top-p", "1e-6") == greedy
    assert text("--temperature", "1e-6", "--seed", "3") == greedy


def test_resume_continues_the_run(trained, run):
    root, arguments, _ = trained
    status, _, err = run(*arguments, "--max-steps", "9", "--batch-size", "2")
    assert status == 2 and "resume" in err
    assert run(*arguments, "--max-steps", "9", "--batch-size", "2", "--resume")[0] == 0
    lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 9


def test_byte_vocabulary_and_states_alone(tmp_path, run):
    (tmp_path / "text.txt").write_text(TEXT)
    status, _, err = run(
        "train", "--output-dir", tmp_path / "run", "--data", tmp_path / "text.txt", *SMALL,
        "--vocabulary", "byte", "--value-dim", "0", "--score", "inverse_gate", "--max-steps", "2",
    )  # fmt: skip
    assert status == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vocab_size"], config["value_dim"], config["score"]) == (256, 0, "inverse_gate")
    status, out, err = run("generate", "--model-dir", tmp_path / "run", "--prompt", "é")
    assert status == 0 and out.startswith("é"), err


@pytest.mark.parametrize("preset", ["flux", "qfnn"])
def test_presets_train_and_given_options_override_them(tmp_path, run, preset):
    (tmp_path / "text.txt").write_text(TEXT)
    status, out, err = run(
        "train", "--preset", preset, "--data", tmp_path / "text.txt", "--output_dir",
        tmp_path / "run", "--use_hebbian", "--num_layers=2", "--hidden_dim=8",
        "--context-length", "16", "--radius_rate=.02", "--no-train-embedding", "--max-steps", "2",
        "--batch-size", "2",
    )  # fmt: skip
    assert status == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    chosen = make_config(preset, len(set(TEXT)), num_layers=2, hidden_dim=8, context_length=16,
                         radius_rate=0.02, train_embedding=False)  # fmt: skip
    assert config == json.loads(chosen.to_json())
    assert "model " in out and "bigram" in out


def test_use_hebbian_chooses_the_rule_and_its_rate(tmp_path, run, monkeypatch):
    seen = []

    def stop(config, text, vocabulary, options, source):
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(commands, "train", stop)
    base = ["train", "--output-dir", tmp_path]
    for more in ([], ["--use-hebbian"], ["--learning", "hybrid"]):
        run(*base, *more, "--hebbian_rate", "0.25", "--tracker", "wandb", "--precision", "bfloat16")
    assert [options.learning for options in seen] == ["backprop", "hebbian", "hybrid"]
    assert {options.hebbian_rate for options in seen} == {0.25}
    assert seen[0].trackers == ("wandb",) and seen[0].precision == "bfloat16"


def test_every_option_of_training_and_of_every_model_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for kind in (TrainingOptions, QuantumFluxConfig, CylinderConfig):
        for field in dataclasses.fields(kind):
            if field.name not in ("progress", "trackers"):
                assert f"--{field.name.replace('_', '-')}" in out, field.name


def test_datasets_and_vocabularies_from_files(tmp_path, run, monkeypatch):
    pytest.importorskip("tokenizers", reason="reads the vocabulary")
    module = types.ModuleType("datasets")
    names = []

    class Rows(dict):
        column_names = ("body",)

    def load_dataset(name, config):
        names.append((name, config))
        return {"train": Rows(body=[TEXT]), "validation": Rows(body=[TEXT])}

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    BpeVocabulary.train(TEXT, 260).tokenizer.model.save(str(tmp_path))
    data = ["--dataset", "wikitext", "--dataset-config", "raw", "--text-column", "body"]
    base = ["train", *SMALL, *data, "--max-steps", "1", "--batch-size", "1"]
    for folder, more in (
        ("file", ["--vocabulary-file", tmp_path / "vocab.json"]),
        ("trained", ["--vocabulary", "bpe", "--vocab-size", "260"]),
    ):
        status, _, err = run(*base, *more, "--output-dir", tmp_path / folder)
        assert status == 0, err
        assert json.loads((tmp_path / folder / "config.json").read_text())["vocab_size"] == 260
        status, out, err = run("generate", "--model-path", tmp_path / folder, "--prompt", "To be")
        assert status == 0 and out.startswith("To be"), err
    assert names == [("wikitext", "raw")] * 2


def test_pairs_are_counted_in_the_training_text_only(tmp_path, run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        commands, "make_vocabulary", lambda kind, text, size: seen.append("".join(text)) or 1 / 0
    )
    for part, text in (("train", "ab"), ("validation", "xy")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.txt").write_text(text)
    for kind in ("bpe", "char"):
        with pytest.raises(ZeroDivisionError):
            run("train", "--output-dir", tmp_path, "--data", tmp_path, "--vocabulary", kind)
    assert seen == ["ab", "abxy"]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "train" in out and "generate" in out


def test_an_error_reaches_the_shell():
    result = qflux("generate", "--model-path", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("qflux generate: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--data", "{root}/nowhere.txt"], "nowhere.txt"),
        (["train", "--data", "{root}/short.txt"], "context_length 256"),
        (["train", "--hidden-dim", "0"], "hidden_dim"),
        (["train", "--learning-rate", "-1"], "learning_rate"),
        (["train", "--device", "abacus"], "abacus"),
        (["train", "--resume"], "nothing to resume"),
        (["train", "--preset", "flux", "--value-dim", "8"], "value_dim"),
        (["train", "--learning", "hybrid", "--precision", "float16"], "precision"),
        (["train", "--data", "{root}/short.txt", "--dataset", "wikitext"], "dataset"),
        (["train", "--vocabulary-file", "{root}/nowhere.json"], "nowhere.json"),
        (["train", "--tracker", "wandb"], "qflux[wandb]"),
        (["generate", "--model-path", "{root}/nowhere"], "nowhere"),
        (["generate", "--model-path", "{run}", "--prompt", "~"], "'~'"),
        (["generate", "--model-path", "{run}", "--prompt", ""], "length >= 1"),
        (["generate", "--model-path", "{run}", "--top-p", "2"], "top_p"),
        (["generate", "--model-path", "{run}", "--device", "abacus"], "abacus"),
    ],
)
def test_user_errors_are_one_line_and_status_2(trained, tmp_path, run, arguments, named):
    (tmp_path / "short.txt").write_text("To be")
    filled = [part.format(root=tmp_path, run=trained[0] / "run") for part in arguments]
    if arguments[0] == "train":
        filled += ["--output-dir", str(tmp_path / "run")]
    status, out, err = run(*filled)
    assert (status, out) == (2, "")
    assert named in err and err.count("\n") == 1
    assert err.startswith(f"qflux {arguments[0]}: ")
