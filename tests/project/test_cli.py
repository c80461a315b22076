"""The command line from the outside."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import types

import pytest
import torch

from qflux import (
    BpeVocabulary,
    CylinderConfig,
    QuantumFluxConfig,
    TrainingOptions,
    commands,
    load_model,
    make_config,
    save_model,
)
from qflux.cli import main

SMALL = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2", "--context-length", "16"]
TEXT = "To be, or not to be: that is the question.\n" * 12
SPEED = r"\d+ tokens in \d+\.\d s, \d+\.\d tokens/s\n"
BEYOND = r"the text grows to \d+ tokens, beyond the model's context of 16: .*\n"


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


def test_generate_passes_its_options_on(trained, call):
    def text(*more):
        options = ["--model-path", trained[0] / "run", "--prompt", "To be", "--max-length", "40"]
        status, out, err = call("generate", *options, *more)
        assert status == 0 and re.fullmatch(BEYOND + SPEED, err), err
        return out

    first = text("--seed", "1")
    assert text("--seed", "1") == first != text("--seed", "2")
    assert text("--seed", "1", "--top_k", "1000", "--top-p=1") == first
    greedy = text("--temperature", "0")
    assert greedy != first
    assert text("--seed", "1", "--top-k", "1") == text("--seed", "1", "--top-p", "1e-6") == greedy
    assert text("--temperature", "1e-6", "--seed", "3") == greedy


def test_generate_takes_prompts_from_files_and_pipes(trained, tmp_path, call):
    base = ["generate", "--model-path", trained[0] / "run", "--max-new-tokens", "5"]
    expected = call(*base, "--prompt", "To be\nor")[1]
    # A byte order mark, Windows' line breaks and the end of the last line are no text.
    for name, content in {"plain": b"To be\nor", "odd": b"\xef\xbb\xbfTo be\r\nor\r\n"}.items():
        (tmp_path / name).write_bytes(content)
        status, out, err = call(*base, "--prompt-file", tmp_path / name)
        assert (status, out) == (0, expected), err
    for more in ([], ["--prompt-file", "-"]):
        piped = subprocess.run(
            [sys.executable, "-m", "qflux", *map(str, base), *more],
            input=b"To be\nor\n", capture_output=True, timeout=120,
        )  # fmt: skip
        assert (piped.returncode, piped.stdout.decode()) == (0, expected), piped.stderr
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty").write_bytes(b"\n")
    (tmp_path / "folder").mkdir()
    for given, named in {
        "latin": "not UTF-8",
        "empty": "is empty",
        "nowhere": "No such file",
        "folder": "directory",
    }.items():
        status, out, err = call(*base, "--prompt-file", tmp_path / given)
        assert (status, out, err.count("\n")) == (2, "", 1) and named in err and given in err
    assert call(*base, "--prompt", "a", "--prompt-file", "b")[0] == 2


def test_samples_are_those_of_the_seeds_that_follow(trained, call):
    base = ["generate", "--model-path", trained[0] / "run", "--prompt", "To", "--max-new-tokens", 9]
    alone = [call(*base, "--seed", seed)[1] for seed in (7, 8, 9)]
    status, out, err = call(*base, "--seed", 7, "--num-samples", 3)
    assert (status, out) == (0, "---\n".join(alone)) and err.startswith("27 tokens in ")
    assert len(set(alone)) == 3
    assert call(*base, "--seed", 2**63 - 1, "--num-samples", 2)[0] == 0


def test_a_stop_string_ends_the_continuation_before_it(trained, call):
    base = ["generate", "--model-path", trained[0] / "run", "--prompt", "To be", "--seed", 3]
    whole = call(*base, "--max-new-tokens", 60)[1]
    stop, other = whole[20:23], whole[40:43]
    expected = whole[: whole.index(stop, 5)] + "\n"
    for stops in (["--stop", stop], ["--stop", other, "--stop", stop], [f"--stop={stop}"]):
        status, out, _ = call(*base, "--max-new-tokens", 60, *stops)
        assert (status, out) == (0, expected)
    assert call(*base, "--max-new-tokens", 60, "--stop", "no such text")[1] == whole


def test_unknown_characters_of_a_prompt_are_shown(trained, call):
    base = ["generate", "--model-path", trained[0] / "run", "--max-new-tokens", "3"]
    status, out, err = call(*base, "--prompt", "T~be\u65e5~")
    assert (status, out) == (2, "")
    assert "'~' at position 1" in err and "'\u65e5' at position 4" in err and "--unknown" in err
    for unknown, start in (("replace", "T be  "), ("drop", "Tbe")):
        status, out, err = call(*base, "--prompt", "T~be\u65e5~", "--unknown", unknown)
        assert status == 0 and out.startswith(start) and len(out) == len(start) + 3 + 1
        assert "'~' at position 1" in err
    status, out, err = call(*base, "--prompt", "~~", "--unknown", "drop")
    assert (status, out) == (2, "") and "length >= 1" in err


def test_each_line_is_a_prompt_when_interactive(trained, call, monkeypatch):
    base = ["generate", "--model-path", trained[0] / "run", "--max-new-tokens", "6"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be\n\n~\nor not"))
    status, out, err = call(*base, "--interactive")
    assert status == 0 and "'~' at position 0" in err and len(re.findall(SPEED, err)) == 2
    alone = (
        call(*base, "--prompt", "To be")[1] + call(*base, "--prompt", "or not", "--seed", "2")[1]
    )
    assert out == alone
    assert call(*base, "--interactive", "--prompt", "To be")[0] == 2


@pytest.mark.parametrize("text", ["abcab" * 60, "a b " * 60, "\n" * 300 + "a"])
def test_the_default_prompt_is_in_every_vocabulary(tmp_path, call, text):
    (tmp_path / "text.txt").write_text(text)
    arguments = ["--data", tmp_path / "text.txt", "--output-dir", tmp_path / "run"]
    assert call("train", *arguments, *SMALL, "--max-steps", "1", "--batch-size", "1")[0] == 0
    status, out, err = call("generate", "--model-path", tmp_path / "run", "--max-new-tokens", "4")
    assert status == 0 and len(out) == 1 + 4 + 1, err


def start(*arguments, **streams):
    return subprocess.Popen(
        [sys.executable, "-m", "qflux", "generate", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        **streams,
    )


def test_text_comes_as_it_is_made_and_ctrl_c_keeps_it(trained):
    options = ["--model-path", trained[0] / "run", "--prompt", "To be", "--max-new-tokens", 10**9]
    process = start(*options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = os.read(process.stdout.fileno(), 2**16)
    # What there is, and not what a buffer holds when it is full.
    assert first.startswith(b"To be") and len(first) < 4096
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.fullmatch(f"({BEYOND})?{SPEED}interrupted\n", err.decode())
    made = int(err.decode().splitlines()[-2].split()[0])
    assert made <= len(first + rest) - 6 <= made + 1 and rest.endswith(b"\n")


def test_a_reader_that_leaves_ends_it_quietly(trained):
    options = ["--model-path", trained[0] / "run", "--max-new-tokens", 10**9]
    process = start(*options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"\n"
    process.stdout.close()
    assert re.fullmatch(f"({BEYOND})?{SPEED}", process.stderr.read().decode())
    assert process.wait(timeout=120) == 0
    help_text = start("--help", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    help_text.stdout.close()
    assert help_text.stderr.read() == b"" and help_text.wait(timeout=120) == 0


def test_closed_and_full_streams(trained):
    """What cannot be said is not an error; text that cannot be written is."""

    def status(redirection):
        command = f'"{sys.executable}" -m qflux generate --model-path "{trained[0] / "run"}" '
        command += f"--max-new-tokens 5 --prompt To {redirection}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        return result.returncode, result.stdout, result.stderr

    expected = status("")[1]
    assert len(expected) == 2 + 5 + 1
    assert status("2>&-") == status("2>/dev/full") == (0, expected, "")
    for redirection, named in ((">&-", "standard output is closed"), (">/dev/full", "No space")):
        code, out, err = status(redirection)
        assert (code, out, err.count("\n")) == (2, "", 1) and named in err


def test_values_that_look_like_options_stay_as_typed(trained, call):
    """Also where underscores and equals signs are in them."""
    base = ["generate", "--model-path", trained[0] / "run", "--max_new_tokens", "1"]
    for value in ("--a_b c", "-x_y z", "-", "--", "-- x", "--a_b\nc"):
        for arguments in (["--prompt", value], [f"--prompt={value}"]):
            status, _, err = call(*base, *arguments)
            unknown = [c for c in dict.fromkeys(value) if c not in TEXT]
            assert status == 2 and f"{unknown[0]!r} at position {value.index(unknown[0])}" in err
            assert ("'_'" in err) == ("_" in value), err
    for value in ("--a_b", "--prompt_file", "--max_new_tokens=3", "--a_b=c d"):
        status, _, err = call(*base, f"--prompt={value}")
        assert status == 2 and f"'_' at position {value.index('_')}" in err
    status, _, err = call(*base, "--prompt", "--a_b")
    assert status == 2 and "--prompt=VALUE" in err and err.count("\n") == 1
    assert "---" not in err and "help" not in err  # no box, no usage


def test_a_model_that_has_diverged_says_so(trained, tmp_path, call):
    model, vocabulary = load_model(trained[0] / "run")
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    save_model(tmp_path, model, vocabulary)
    for temperature in (0, 1):
        status, _, err = call("generate", "--model-path", tmp_path, "--temperature", temperature)
        assert status == 2
        # Behind what is said of a text beyond the context.
        assert "got nan: the model has diverged" in err.splitlines()[-1]
        assert err.count("\n") == 2


def test_resume_continues_the_run(trained, call):
    root, arguments, _ = trained
    status, _, err = call(*arguments, "--max-steps", "9", "--batch-size", "2")
    assert status == 2 and "resume" in err
    assert call(*arguments, "--max-steps", "9", "--batch-size", "2", "--resume")[0] == 0
    lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 9


def test_byte_vocabulary_and_states_alone(tmp_path, call):
    (tmp_path / "text.txt").write_text(TEXT)
    status, _, err = call(
        "train", "--output-dir", tmp_path / "run", "--data", tmp_path / "text.txt", *SMALL,
        "--vocabulary", "byte", "--value-dim", "0", "--score", "inverse_gate", "--max-steps", "2",
    )  # fmt: skip
    assert status == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vocab_size"], config["value_dim"], config["score"]) == (256, 0, "inverse_gate")
    status, out, err = call("generate", "--model-dir", tmp_path / "run", "--prompt", "é")
    assert status == 0 and out.startswith("é"), err


@pytest.mark.parametrize("preset", ["flux", "qfnn"])
def test_presets_train_and_given_options_override_them(tmp_path, call, preset):
    (tmp_path / "text.txt").write_text(TEXT)
    status, out, err = call(
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


def test_use_hebbian_chooses_the_rule_and_its_rate(tmp_path, call, monkeypatch):
    seen = []

    def stop(config, text, vocabulary, options, source):
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(commands, "train", stop)
    base = ["train", "--output-dir", tmp_path]
    for more in ([], ["--use-hebbian"], ["--learning", "hybrid"]):
        call(
            *base, *more, "--hebbian_rate", "0.25", "--tracker", "wandb", "--precision", "bfloat16"
        )
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


def test_datasets_and_vocabularies_from_files(tmp_path, call, monkeypatch):
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
        status, _, err = call(*base, *more, "--output-dir", tmp_path / folder)
        assert status == 0, err
        assert json.loads((tmp_path / folder / "config.json").read_text())["vocab_size"] == 260
        status, out, err = call("generate", "--model-path", tmp_path / folder, "--prompt", "To be")
        assert status == 0 and out.startswith("To be"), err
    assert names == [("wikitext", "raw")] * 2


def test_pairs_are_counted_in_the_training_text_only(tmp_path, call, monkeypatch):
    seen = []
    monkeypatch.setattr(
        commands, "make_vocabulary", lambda kind, text, size: seen.append("".join(text)) or 1 / 0
    )
    for part, text in (("train", "ab"), ("validation", "xy")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.txt").write_text(text)
    for kind in ("bpe", "char"):
        with pytest.raises(ZeroDivisionError):
            call("train", "--output-dir", tmp_path, "--data", tmp_path, "--vocabulary", kind)
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
        (["generate", "--model-path", ""], "model_path"),
        (["generate", "--model-path", "{run}", "--prompt-file", ""], "prompt_file"),
        (["generate", "--model-path", "{run}", "--stop", ""], "stop"),
        (["generate", "--model-path", "{run}", "--num-samples", "0"], "num_samples"),
        (["generate", "--model-path", "{run}", "--seed", str(2**70)], "seed"),
        (["generate", "--model-path", "{run}", "--temperature", "nan"], "temperature"),
        (["generate", "--model-path", "{run}", "--temperature", "hot"], "--temperature"),
        (["generate", "--model-path", "{run}", "--unknown", "hide"], "--unknown"),
        (["generate", "--model-path", "{run}", "--max-new-tokens", "1.5"], "--max-new-tokens"),
        (["train", "--max-steps", "many"], "--max-steps"),
        (["train", "--num-layers", "3.5"], "--num-layers"),
        (["train", "--preset", "bert"], "--preset"),
        (["train", "--learning", "fast"], "--learning"),
        (["train", "--max-step", "3"], "--max-steps"),
        (["train", "--no-such-option"], "--no-such-option"),
        (["export", "--model-path", "{run}"], "--output-dir"),
    ],
)
def test_user_errors_are_one_line_and_status_2(trained, tmp_path, call, arguments, named):
    (tmp_path / "short.txt").write_text("To be")
    filled = [part.format(root=tmp_path, run=trained[0] / "run") for part in arguments]
    if arguments[0] == "train":
        filled += ["--output-dir", str(tmp_path / "run")]
    status, out, err = call(*filled)
    assert (status, out) == (2, "")
    assert named in err and err.count("\n") == 1
    assert err.startswith(f"qflux {arguments[0]}: ")
