"""Models among Hugging Face's: registration, round trip, padding, generation, lm-eval."""

import json
import sys

import pytest
import torch

from qflux import ByteVocabulary, CharacterVocabulary, make_config, make_model, save_model

TEXT = "To be, or not to be: that is the question.\n"
SMALL = {"num_layers": 1, "hidden_dim": 16, "context_length": 24}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("tokenizers", reason="for the tokenizer of the exported model")
    return pytest.importorskip("transformers", reason="qflux.hf is for it")


def trained_folder(folder, preset="lm", vocabulary=None):
    torch.manual_seed(0)
    vocabulary = vocabulary or CharacterVocabulary(TEXT)
    model = make_model(make_config(preset, vocabulary.size, **SMALL)).eval()
    # Far from the start, so that weights which were not loaded show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_model(folder, model, vocabulary)
    return model, vocabulary


@pytest.fixture(params=["lm", "flux", "qfnn"])
def exported(request, tmp_path, transformers):
    from qflux.hf import export

    model, vocabulary = trained_folder(tmp_path / "run", request.param)
    export(tmp_path / "run", tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    return model, vocabulary, loaded, tokenizer


def test_round_trip_keeps_logits_ids_and_loss(exported, tmp_path):
    from qflux.hf import QFluxForCausalLM

    model, vocabulary, loaded, tokenizer = exported
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert isinstance(loaded, QFluxForCausalLM) and not loaded.training
    assert torch.equal(ids[0], vocabulary.encode(TEXT)) and tokenizer.decode(ids[0]) == TEXT
    output = loaded(ids, labels=ids)
    assert torch.equal(output.logits, model(ids).logits)
    assert torch.equal(output.loss, model(ids, labels=ids).loss)
    loss, logits = loaded(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    loaded.save_pretrained(tmp_path / "again")
    again = QFluxForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, output.logits)
    for name, value in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_generation_is_that_of_the_model(exported):
    model, _, loaded, tokenizer = exported
    ids = tokenizer("To be", return_tensors="pt").input_ids
    out = loaded.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(out, model.generate(ids, 30, temperature=0))


def test_padding_on_either_side_changes_nothing(exported):
    model, vocabulary, loaded, tokenizer = exported
    texts = ["To be", "To be, or not"]
    for side in ("left", "right"):
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
        assert batch.input_ids.max() >= vocabulary.size
        output = loaded(**batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, 1))
        losses = []
        for row, text in enumerate(texts):
            ids = vocabulary.encode(text)[None]
            alone = model(ids, labels=ids)
            torch.testing.assert_close(
                output.logits[row][batch.attention_mask[row].bool()], alone.logits[0]
            )
            losses += [alone.loss * (ids.shape[1] - 1)]
        torch.testing.assert_close(output.loss, sum(losses) / (4 + 12))
    with pytest.raises(ValueError, match="attention_mask must have its ones in one piece"):
        loaded(torch.zeros(1, 3).long(), attention_mask=torch.tensor([[1, 0, 1]]))


def test_batches_of_prompts_continue_as_they_do_alone(exported):
    model, vocabulary, loaded, tokenizer = exported
    batch = tokenizer(["To be", "question"], return_tensors="pt", padding=True, padding_side="left")
    out = loaded.generate(**batch, max_new_tokens=20, do_sample=False)
    for row, text in enumerate(["To be", "question"]):
        alone = model.generate(vocabulary.encode(text)[None], 20, temperature=0)
        assert torch.equal(out[row, -20:], alone[0, -20:])


def test_the_end_of_text_token_is_read_as_a_line_break(transformers, tmp_path):
    from qflux.hf import export

    for vocabulary in (ByteVocabulary(), CharacterVocabulary("\t" + TEXT)):
        model, _ = trained_folder(tmp_path / "run", vocabulary=vocabulary)
        export(tmp_path / "run", tmp_path / "hf")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == vocabulary.size
        ids = torch.tensor([[tokenizer.eos_token_id, *vocabulary.encode("To").tolist()]])
        expected = model(vocabulary.encode("\nTo")[None]).logits
        assert torch.equal(loaded(ids).logits, expected)
        ended = ids.roll(-1, 1)
        plain = ended[:, :-1]
        torch.testing.assert_close(loaded(ended, labels=ended).loss, model(plain, plain).loss)


def test_resized_or_read_heads_are_those_of_the_model(transformers):
    from qflux.hf import from_model

    model = make_model(make_config("flux", 5, **SMALL))
    wrapped = from_model(model)
    assert wrapped.get_output_embeddings() is model.head and wrapped.model is model
    assert wrapped.config.vocab_size == 5 and wrapped.config.num_hidden_layers == 1


TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
""",
    "generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - metric: exact_match
""",
}


def test_lm_eval_runs_on_a_local_task(transformers, tmp_path, run_python):
    """In a process that never imports qflux: the folder's own code registers the model."""
    for package in ("lm_eval", "accelerate", "datasets"):
        pytest.importorskip(package, reason="lm-eval with --model hf")
    from qflux.hf import export

    model, vocabulary = trained_folder(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    rows = [
        {"question": "To be, or ", "choices": ["not", "que"], "answer": 0},
        {"question": "that is the ", "choices": ["be", "question"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs:\n  data_files: {{test: {tmp_path / 'rows.jsonl'}}}"
        (tmp_path / f"{name}.yaml").write_text(head + rest)
    program = f"""
import sys, json
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", "--model", "hf", "--model_args",
            "pretrained={tmp_path / "hf"},trust_remote_code=True", "--tasks",
            "{",".join(TASKS)}", "--include_path", "{tmp_path}", "--device", "cpu",
            "--batch_size", "2", "--output_path", "{tmp_path / "results"}"]
cli_evaluate()
"""
    run_python(program, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    [file] = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            ids = vocabulary.encode(row["question"] + choice)[None]
            labels = ids.clone()
            labels[:, : len(row["question"])] = -100
            scores.append(-model(ids, labels=labels).loss.item() * len(choice))
        right += scores.index(max(scores)) == row["answer"]
    assert results["choice"]["acc,none"] == right / 2
    assert results["rolling"]["bits_per_byte,none"] > 0
    assert 0 <= results["generation"]["exact_match,none"] <= 1


def test_the_command_line_exports(transformers, tmp_path, capsys):
    from qflux.cli import main

    trained_folder(tmp_path / "run")
    assert main(["export", "--model-path", str(tmp_path / "run"), "--output-dir",
                 str(tmp_path / "hf")]) == 0  # fmt: skip
    assert (tmp_path / "hf" / "model.safetensors").exists() and "hf" in capsys.readouterr().out


def test_the_command_line_says_that_the_package_is_missing(tmp_path, monkeypatch, capsys):
    from qflux.cli import main

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "qflux.hf", raising=False)
    trained_folder(tmp_path / "run")
    arguments = ["--model-path", str(tmp_path / "run"), "--output-dir", str(tmp_path / "hf")]
    assert main(["export", *arguments]) == 2
    err = capsys.readouterr().err
    assert "qflux.hf needs the package 'transformers'" in err and "qflux[hf]" in err
