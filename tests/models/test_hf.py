"""Models among Hugging Face's: folders, round trip, padding, unknown characters, lm-eval."""

import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

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
    assert torch.equal(output.logits[..., : vocabulary.size], model(ids).logits)
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
            logits = output.logits[row, batch.attention_mask[row].bool(), : vocabulary.size]
            torch.testing.assert_close(logits, alone.logits[0])
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
        export(tmp_path / "run", tmp_path / "hf", overwrite=True)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == vocabulary.size
        ids = torch.tensor([[tokenizer.eos_token_id, *vocabulary.encode("To").tolist()]])
        expected = model(vocabulary.encode("\nTo")[None]).logits
        assert torch.equal(loaded(ids).logits[..., : vocabulary.size], expected)
        ended = ids.roll(-1, 1)
        plain = ended[:, :-1]
        torch.testing.assert_close(loaded(ended, labels=ended).loss, model(plain, plain).loss)


def test_resized_or_read_heads_are_those_of_the_model(transformers):
    from qflux.hf import from_model

    model = make_model(make_config("flux", 5, **SMALL))
    wrapped = from_model(model)
    assert wrapped.get_output_embeddings() is model.head and wrapped.model is model
    assert wrapped.config.vocab_size == 5 and wrapped.config.num_hidden_layers == 1


def test_unseen_characters_are_a_token_with_the_price_of_a_new_character(transformers, tmp_path):
    """In the logits, where lm-eval reads it, and in the loss; known characters lose nothing."""
    from qflux.hf import export

    model, vocabulary = trained_folder(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("To \u65e5\u672c be", return_tensors="pt").input_ids
    unknown = tokenizer.unk_token_id
    assert unknown >= vocabulary.size and (ids == unknown).sum() == 2
    assert tokenizer.unk_token in tokenizer.decode(ids[0])
    # A fresh code point, and the announcement that one comes.
    price = math.log(0x110000 - vocabulary.size) + math.log(1e6)
    assert price / math.log(2) > 8 * 3  # dearer than the bytes that spell it
    log_likelihood = loaded(ids).logits.log_softmax(-1)
    torch.testing.assert_close(log_likelihood[..., unknown], torch.full(ids.shape, -price))
    known = model(ids.masked_fill(ids == unknown, loaded.config.stand_in)).logits.log_softmax(-1)
    torch.testing.assert_close(log_likelihood[..., : vocabulary.size], known)
    scored = F.cross_entropy(log_likelihood[0, :-1], ids[0, 1:])
    torch.testing.assert_close(loaded(ids, labels=ids).loss, scored)
    out = loaded.generate(ids, max_new_tokens=50, do_sample=True, temperature=50.0)
    assert out[0, ids.shape[1] :].max() < vocabulary.size


@pytest.mark.parametrize("cost", [None, 9.0], ids=["known", "unknown"])
def test_pieces_of_a_batch_add_up_to_its_loss(transformers, cost):
    """Also where a piece has fewer labels, or none."""
    from qflux.hf import from_model

    wrapped = from_model(make_model(make_config("lm", 5, **SMALL)), 0, cost)
    ids = torch.randint(5, (4, 12))
    if cost is not None:
        ids[3, 7] = 6  # the unknown token
    labels = ids.clone()
    labels[1, 4:] = labels[2] = -100
    whole = wrapped(ids, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    for divisor in (count, int(count)):
        pieces = [
            wrapped(row, labels=its_labels, num_items_in_batch=divisor).loss
            for row, its_labels in zip(ids.split(1), labels.split(1), strict=True)
        ]
        assert pieces[2] == 0
        torch.testing.assert_close(sum(pieces), whole)


def test_penalties_count_by_the_labels_of_a_piece(transformers):
    from qflux.hf import from_model

    wrapped = from_model(make_model(make_config("flux", 5, **SMALL)).train())
    ids = torch.randint(5, (4, 12))
    whole = wrapped(ids, labels=ids).loss
    assert whole > wrapped.model(ids, ids).cross_entropy
    for rows in (1, 2, 4):
        pieces = [wrapped(p, labels=p, num_items_in_batch=44).loss for p in ids.split(rows)]
        torch.testing.assert_close(sum(pieces), whole)


def test_embeddings_can_be_read_and_replaced(transformers):
    from qflux.hf import from_model

    for preset in ("lm", "flux", "qfnn"):
        model = make_model(make_config(preset, 5, **SMALL)).eval()
        wrapped = from_model(model)
        ids = torch.randint(5, (2, 6))
        embedding = wrapped.get_input_embeddings()
        assert embedding is model.embedding
        expected = wrapped(ids).logits
        other = make_model(make_config(preset, 5, **SMALL))
        wrapped.set_input_embeddings(other.embedding)
        assert wrapped.get_input_embeddings() is other.embedding
        wrapped.set_input_embeddings(embedding)
        assert torch.equal(wrapped(ids).logits, expected)
        wrapped.set_output_embeddings(other.head)
        assert not torch.equal(wrapped(ids).logits, expected)
        assert wrapped.resize_token_embeddings(5) is embedding
        with pytest.raises(ValueError, match="new_num_tokens must be 5, got 9"):
            wrapped.resize_token_embeddings(9)


def test_the_backbone_and_the_head_make_the_logits(exported):
    """As libraries use them that do not want the logits of all positions."""
    _, vocabulary, loaded, tokenizer = exported
    batch = tokenizer(["To be", "To be, or not"], return_tensors="pt", padding=True)
    states = loaded.base_model(**batch).last_hidden_state
    logits = loaded.get_output_embeddings()(states)
    seen = batch.attention_mask.bool()
    expected = loaded(**batch).logits[..., : vocabulary.size]
    torch.testing.assert_close(logits[seen], expected[seen])
    with pytest.raises(ValueError, match="have no position_ids"):
        loaded.base_model(**batch, position_ids=batch.input_ids)


@pytest.mark.parametrize("preset", ["lm", "flux", "qfnn"])
def test_gradient_checkpointing_changes_no_gradient(transformers, preset):
    from qflux.hf import from_model

    config = make_config(preset, 5, **SMALL | {"num_layers": 3})
    wrapped = from_model(make_model(config)).train()
    ids = torch.randint(5, (2, 12))

    def gradients():
        wrapped.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            wrapped(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]

    expected, calls = gradients(), []
    part = next(module for module in wrapped.model.layers[0].children())
    handle = part.register_forward_hook(lambda *_: calls.append(1))
    wrapped.gradient_checkpointing_enable()
    assert wrapped.is_gradient_checkpointing
    for got, grad in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, grad)
    assert len(calls) == 2  # once more in the backward pass
    wrapped.gradient_checkpointing_disable()
    assert not wrapped.is_gradient_checkpointing
    calls.clear()
    # Transformers leaves a hook at the embedding, which is then called; else it would be equal.
    for got, grad in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, grad)
    assert len(calls) == 1
    handle.remove()


def test_masks_and_arguments_that_cannot_be_followed_are_refused(transformers):
    from qflux.hf import from_model

    wrapped = from_model(make_model(make_config("lm", 5, **SMALL)))
    ids = torch.randint(5, (2, 6))
    for shape in ((2, 4), (2, 1, 6, 6), (1, 6)):
        with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
            wrapped(ids, attention_mask=torch.ones(shape))
    for name in ("inputs_embeds", "position_ids"):
        with pytest.raises(ValueError, match=f"have no {name}"):
            wrapped(ids, **{name: torch.zeros(2, 6)})
    with pytest.raises(ValueError, match="have no output_hidden_states"):
        wrapped(ids, output_hidden_states=True)
    assert wrapped(ids, output_hidden_states=False, use_cache=True).logits.shape == (2, 6, 5)


def test_a_padded_batch_can_be_exported_as_a_graph(transformers):
    from qflux.hf import from_model

    wrapped = from_model(make_model(make_config("lm", 5, **SMALL))).eval()
    ids, mask = torch.randint(5, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    graph = torch.export.export(wrapped, (), inputs).module()
    torch.testing.assert_close(graph(**inputs)["logits"], wrapped(**inputs).logits)


def test_a_folder_is_loaded_where_nothing_was_imported(transformers, tmp_path, run_python):
    """And saved again, still with its code and without copies of the library's."""
    from qflux.hf import export

    model, vocabulary = trained_folder(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    files = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_qflux.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {file.name for file in (tmp_path / "hf").iterdir()} == files
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = {str(tmp_path / "hf")!r}
for again in (folder + "2", folder + "3"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    folder = again
make = pipeline("text-generation", model=folder, trust_remote_code=True)
texts = make(["To be", "question"], batch_size=2, max_new_tokens=8, do_sample=False)
print([text["generated_text"] for [text] in texts])
"""
    result = run_python(program, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    for again in ("hf2", "hf3"):
        assert {file.name for file in (tmp_path / again).iterdir()} == files
    expected = [
        vocabulary.decode(model.generate(vocabulary.encode(text)[None], 8, temperature=0)[0])
        for text in ("To be", "question")
    ]
    assert result.stdout.strip().splitlines()[-1] == repr(expected)
    noise = [line for line in result.stderr.splitlines() if "Loading" not in line]
    assert not [line for line in noise if "pad_token" in line or "eos" in line], result.stderr


def test_saving_a_registered_class_copies_no_source(transformers, tmp_path):
    """transformers registers classes that it got from a folder's code, and copies their modules."""
    from qflux.hf import QFluxConfig, QFluxForCausalLM, from_model

    for kind in (QFluxConfig, QFluxForCausalLM):
        kind.register_for_auto_class()
        assert kind._auto_class is None
    from_model(make_model(make_config("lm", 5, **SMALL))).save_pretrained(tmp_path)
    saved = {file.name for file in tmp_path.iterdir()}
    assert {name for name in saved if name.endswith(".py")} == {"modeling_qflux.py"}


def test_a_cache_gives_the_logits_of_the_whole(transformers):
    """In pieces, padded on the left, after a crop, reordered; and what is no such cache."""
    from qflux.hf import QFluxCache, from_model

    torch.manual_seed(0)
    loaded = from_model(make_model(make_config("lm", 5, **SMALL))).eval().double()
    ids = torch.randint(0, 5, (2, 12))
    mask = torch.ones(2, 12).long()
    mask[1, :3] = 0
    full = loaded(ids, attention_mask=mask).logits
    output = loaded(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    cache = output[1]
    assert isinstance(cache, QFluxCache) and not output.logits.requires_grad
    further = {"attention_mask": mask[:, :9], "past_key_values": cache}  # its name in older models
    pieces = [output.logits, loaded(ids[:, 5:9], **further).logits]
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    ids, mask, full = ids.flip(0), mask.flip(0), full.flip(0)
    pieces = [torch.cat(pieces, 1).flip(0)[:, :6]]
    pieces.append(loaded(ids[:, 6:], attention_mask=mask, cache=cache).logits)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[seen], full[seen], rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == 12

    more = ids[:, :1]
    for bad, message in (
        ({"cache": transformers.DynamicCache()}, "^cache must be a QFluxCache"),
        ({"past_key_values": ((ids, ids),)}, "^past_key_values must be a QFluxCache, got tuple"),
        ({"cache": cache, "labels": more}, "labels cannot be given with a cache"),
        ({"cache": cache, "attention_mask": mask}, "one column for each"),
        ({"cache": cache, "attention_mask": 1 - torch.eye(13)[:2]}, "zeros on the left"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loaded(more, **bad)
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            loaded.base_model(more, **{name: cache})
    assert cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="prefill_chunk_size must be larger than the padding"):
        loaded(ids, attention_mask=torch.zeros(2, 12), use_cache=True)


def test_generation_features_stand_on_the_cache(exported):
    """Beams, chunked prefill, assistants and look-ups say what generation without a cache does."""
    _, _, loaded, tokenizer = exported
    texts = ["To be", "the question"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    rest = {"max_new_tokens": 8, "do_sample": False}
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        out = loaded.generate(**batch, **rest, **options)
        plain = loaded.generate(**batch, **rest, **options, use_cache=False)
        assert torch.equal(out, plain)
    out = loaded.generate(**batch, **rest)
    assert torch.equal(out, loaded.generate(**batch, **rest, prefill_chunk_size=9))
    torch.manual_seed(1)
    drawn = loaded.generate(**batch, max_new_tokens=8, do_sample=True, num_return_sequences=3)
    torch.manual_seed(1)
    options = {"do_sample": True, "num_return_sequences": 3, "use_cache": False}
    assert torch.equal(drawn, loaded.generate(**batch, max_new_tokens=8, **options))
    ids = tokenizer(TEXT[:12], return_tensors="pt").input_ids
    alone = loaded.generate(ids, **rest)
    assert torch.equal(alone, loaded.generate(ids, **rest, prompt_lookup_num_tokens=3))
    assert torch.equal(alone, loaded.generate(ids, **rest, assistant_model=loaded))
    with pytest.raises(ValueError, match="cache_implementation must be None"):
        loaded.generate(ids, **rest, cache_implementation="static")


def test_the_page_about_it_runs(transformers, tmp_path, monkeypatch):
    """Its programs, one after another, beside a folder that its command has written."""
    from qflux.cli import main

    trained_folder(tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs" / "huggingface.md").read_text()
    [command] = re.findall(r"^    qflux (export .*)$", page, re.MULTILINE)
    assert main(command.split()) == 0
    names = {}
    for program in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(program, names)
    assert len(names["texts"]) == 2 and names["text"].startswith("To be")
    assert names["loss"].item() > 0 and names["model"].model.head.weight.grad.any()


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("spelling", ["run", "run/", "other/../run", "link", "run/."])
def test_an_export_never_destroys_the_model(transformers, tmp_path, capsys, spelling):
    from qflux.cli import main

    trained_folder(tmp_path / "run")
    (tmp_path / "other").mkdir()
    os.symlink(tmp_path / "run", tmp_path / "link")
    before = snapshot(tmp_path / "run")
    for more in ([], ["--overwrite"]):
        arguments = [
            "--model-path",
            str(tmp_path / "run"),
            "--output-dir",
            f"{tmp_path}/{spelling}",
        ]
        assert main(["export", *arguments, *more]) == 2
        err = capsys.readouterr().err
        assert "the model's own folder" in err and err.count("\n") == 1
        assert snapshot(tmp_path / "run") == before


def test_an_export_leaves_other_folders_alone(transformers, tmp_path, capsys, monkeypatch):
    from qflux.cli import main
    from qflux.hf import QFluxForCausalLM

    trained_folder(tmp_path / "run")
    target = tmp_path / "theirs"
    target.mkdir()
    (target / "config.json").write_text("theirs")
    (target / "notes.txt").write_text("notes")
    before = snapshot(target)
    arguments = ["export", "--model-path", str(tmp_path / "run"), "--output-dir", str(target)]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "theirs' is not empty" in err and "--overwrite" in err and err.count("\n") == 1
    assert snapshot(target) == before
    # A failure on the way leaves all as it was, and nothing beside it.
    with monkeypatch.context() as patch:
        patch.setattr(QFluxForCausalLM, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*arguments, "--overwrite"])
    assert snapshot(target) == before and len(list(tmp_path.iterdir())) == 2
    assert main([*arguments, "--overwrite"]) == 0
    assert (target / "notes.txt").read_text() == "notes"
    transformers.AutoModelForCausalLM.from_pretrained(target)
    for given, named in (("", "output_dir must be the name of"), ("notes.txt", "is a file")):
        monkeypatch.chdir(target)
        assert main([*arguments[:-1], given]) == 2
        assert named in capsys.readouterr().err
    empty = tmp_path / "new" / "empty"
    empty.mkdir(parents=True)
    for folder in (empty, tmp_path / "deeper" / "new"):
        assert main([*arguments[:-1], str(folder)]) == 0
        assert (folder / "model.safetensors").exists()
        assert folder.stat().st_mode == tmp_path.joinpath("new").stat().st_mode


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
