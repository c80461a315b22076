"""Losses of a text in units that can be compared, and the program's `eval`."""

import json
import math
import shutil

import pytest
import torch

from qflux import (
    ByteVocabulary,
    CharacterVocabulary,
    QuantumFluxConfig,
    QuantumFluxLM,
    TrainingOptions,
    evaluate,
    save_model,
    train,
)
from qflux.text.data import TextSplit
from qflux.train import loop
from qflux.train.evaluation import Evaluation, score

TEXT = "Größe: to be, or not to be €\n" * 20


def uniform(size):
    """A model to which all tokens are equally likely."""
    config = QuantumFluxConfig(
        vocab_size=size, num_layers=1, num_cylinders=2, hidden_dim=8, context_length=16
    )
    model = QuantumFluxLM(config)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    return model


def numbers(out):
    return {line[:21].strip(): float(line[21:]) for line in out.splitlines()[1:]}


def test_units_follow_from_nats_tokens_and_bytes():
    found = Evaluation(nats=math.log(16), tokens=30, bytes=60)
    assert found.bits_per_byte == pytest.approx(2.0)
    assert found.perplexity == pytest.approx(16) and found.byte_perplexity == pytest.approx(4)
    assert Evaluation(1e4, 1, 1).perplexity == math.inf


@pytest.mark.parametrize("vocabulary", [ByteVocabulary(), CharacterVocabulary(TEXT)])
def test_bits_per_byte_are_of_the_text_and_not_of_the_tokens(vocabulary):
    model, ids = uniform(vocabulary.size), vocabulary.encode(TEXT)
    found = score(model, [ids], vocabulary.token_bytes(), batch_size=5)
    assert found.tokens == len(ids) - 1 and found.bytes == len(TEXT.encode()) - 1
    bits = (len(ids) - 1) * math.log2(vocabulary.size)
    assert found.bits_per_byte == pytest.approx(bits / found.bytes, rel=1e-5)
    assert found.nats == evaluate(model, [ids], batch_size=5)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        score(model, [ids[:1], ids[:0]])


def test_eval_measures_a_text(tmp_path, call):
    save_model(tmp_path / "bytes", uniform(256), ByteVocabulary())
    (tmp_path / "a.txt").write_text(TEXT)
    status, out, err = call(
        "eval", "--model-path", tmp_path / "bytes", "--data", tmp_path / "a.txt"
    )
    assert (status, err) == (0, "")
    size = len(TEXT.encode())
    assert out.splitlines()[0].split("  ")[-1].strip() == (
        f"{size - 1:,} of {size:,} ({size - 1:,} bytes)"
    )
    assert numbers(out) == {
        "nats per token": pytest.approx(math.log(256), abs=1e-4),
        "bits per byte": pytest.approx(8, abs=1e-4),
        "perplexity per token": pytest.approx(256, abs=1e-2),
        "perplexity per byte": pytest.approx(256, abs=1e-2),
    }
    model = ["eval", "--model-dir", tmp_path / "bytes", "--data", tmp_path]
    assert "(30 bytes)" in call(*model, "--eval-tokens", "40", "--batch-size", "1")[1]
    (tmp_path / "notes.md").write_text("")
    assert "'notes.md'" in call(*model)[2]


def test_the_saved_model_has_the_loss_of_its_validation(tmp_path, call):
    for part, text in (("train", TEXT), ("validation", TEXT[7:300])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "work.txt").write_text(text)
    small = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2",
             "--context-length", "16", "--batch-size", "2"]  # fmt: skip
    for name, more in (("all", []), ("some", ["--eval-tokens", "60"])):
        folder = tmp_path / name
        status, _, err = call("train", "--data", tmp_path, "--output-dir", folder, *small,
                             "--max-steps", "6", "--eval-interval", "2",
                             "--learning-rate", "0.3", *more)  # fmt: skip
        assert status == 0, err
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        best = min(line["val_loss"] for line in lines if "val_loss" in line)
        out = call("eval", "--model-path", folder, "--data", tmp_path / "validation", *more)[1]
        assert numbers(out)["nats per token"] == pytest.approx(best, abs=6e-5)


def test_evaluations_in_training_are_limited_and_always_the_same(tmp_path, monkeypatch):
    seen = []

    def counting(model, works, batch_size):
        seen.append([work.tolist() for work in works])
        return 1.0

    monkeypatch.setattr(loop, "evaluate", counting)
    text = TextSplit({"a": TEXT}, {"b": TEXT * 9, "c": TEXT})
    config = QuantumFluxConfig(
        vocab_size=256, num_layers=1, num_cylinders=2, hidden_dim=8, context_length=16
    )
    options = TrainingOptions(
        tmp_path, max_steps=3, eval_interval=1, eval_tokens=100, progress=False
    )
    train(config, text, ByteVocabulary(), options)
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    assert sum(len(work) - 1 for work in seen[0]) == 90
    with pytest.raises(ValueError, match=r"eval_tokens must be .* got 0"):
        TrainingOptions(tmp_path, eval_tokens=0)


def test_a_run_on_mapped_tokens_is_the_run_in_memory(tmp_path, monkeypatch):
    text = TextSplit({"a": TEXT, "b": TEXT[:11]}, {"c": TEXT[:100]})
    config = QuantumFluxConfig(
        vocab_size=256, num_layers=1, num_cylinders=2, hidden_dim=8, context_length=16
    )
    weights = {}
    for name, limit in (("memory", 10**6), ("mapped", 10)):
        monkeypatch.setattr("qflux.text.tokens.MAPPED_BYTES", limit)
        options = TrainingOptions(tmp_path / name, max_steps=4, progress=False)
        weights[name] = train(config, text, ByteVocabulary(), options).model.state_dict()
    assert (tmp_path / "mapped" / "tokens.bin").exists()
    assert not (tmp_path / "memory" / "tokens.bin").exists()
    assert all(torch.equal(weights["memory"][name], weights["mapped"][name])
               for name in weights["memory"])  # fmt: skip
    with pytest.raises(ValueError, match="output_dir must be the name"):
        train(config, text, ByteVocabulary(), TrainingOptions("", progress=False))
    with pytest.raises(ValueError, match="vocab_size of the model, 256"):
        train(config, text, CharacterVocabulary(TEXT),
              TrainingOptions(tmp_path / "x", progress=False))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "one of data and dataset"),
        (["--data", "{root}/a.txt", "--dataset", "x"], "one of data and dataset"),
        (["--data", ""], "data must be the name"),
        (["--data", "{root}/nowhere"], "nowhere"),
        (["--data", "{root}/short.txt"], "at least 2 tokens"),
        (["--data", "{root}/empty.txt"], "empty"),
        (["--data", "{root}/other.txt"], "work 'other.txt': text contains '~'"),
        (["--data", "{root}/latin.txt"], "iconv"),
        (["--data", "{root}/a.txt", "--eval-tokens", "0"], "eval_tokens"),
        (["--data", "{root}/a.txt", "--batch-size", "0"], "batch_size"),
        (["--data", "{root}/a.txt", "--device", "abacus"], "abacus"),
        (["--data", "{root}/a.txt", "--model-path", "{root}/diverged"], "have diverged"),
        (["--data", "{root}/a.txt", "--model-path", ""], "model_path must be the name"),
    ],
)
def test_errors_of_eval_are_one_line(tmp_path, call, arguments, named):
    model = uniform(len(set(TEXT)))
    save_model(tmp_path / "model", model, CharacterVocabulary(TEXT))
    shutil.copytree(tmp_path / "model", tmp_path / "diverged")
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    save_model(tmp_path / "diverged", model, CharacterVocabulary(TEXT))
    for name, content in (
        ("a", TEXT.encode()), ("short", b"t"), ("empty", b""), ("other", b"to ~ be"),
        ("latin", "ö".encode("latin-1")),
    ):  # fmt: skip
        (tmp_path / f"{name}.txt").write_bytes(content)
    filled = [argument.format(root=tmp_path) for argument in arguments]
    if "--model-path" not in filled:
        filled += ["--model-path", str(tmp_path / "model")]
    status, out, err = call("eval", *filled)
    assert (status, out) == (2, "")
    assert named in err and err.count("\n") == 1 and err.startswith("qflux eval: ")
