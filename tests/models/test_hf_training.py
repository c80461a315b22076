"""Training of Hugging Face models: Trainer, several processes, LoRA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qflux import make_config, make_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"num_layers": 2, "hidden_dim": 16, "context_length": 24}

# Sixteen rows with unlike numbers of labels, in their order, for two steps of eight rows each.
PROGRAM = """
import json, os, sys
import torch
from transformers import Trainer, TrainingArguments
from qflux import make_config, make_model
from qflux.hf import from_model

folder, preset, batch, steps, checkpointing = sys.argv[1:]
torch.manual_seed(0)
model = from_model(make_model(make_config(
    preset, 7, num_layers=2, hidden_dim=16, context_length=24)))
rows = []
for number in range(16):
    ids = torch.randint(7, (12,))
    labels = ids.clone()
    labels[4 + number % 7 :] = -100
    rows.append({"input_ids": ids, "labels": labels})

class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(rows)

trainer = InOrder(model=model, train_dataset=rows, args=TrainingArguments(
    folder, per_device_train_batch_size=int(batch), gradient_accumulation_steps=int(steps),
    gradient_checkpointing=checkpointing == "1", max_steps=2, learning_rate=1e-2, logging_steps=1,
    report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
    lr_scheduler_type="constant"))
trainer.train()
if os.environ.get("RANK", "0") == "0":
    seen = [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history[:2]]
    with open(os.path.join(folder, "seen.json"), "w") as stream:
        json.dump(seen, stream)
"""


@pytest.fixture(scope="module", autouse=True)
def packages():
    pytest.importorskip("transformers", reason="qflux.hf is for it")


def trained(folder, batch, steps, processes=1, preset="lm", checkpointing=False):
    """Loss and gradient norm of two steps of 8 rows, from a process of its own."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [folder, preset, batch, steps, int(checkpointing)]
    result = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), folder / "program.py",
         *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.tensor(json.loads((folder / "seen.json").read_text()))


def test_the_loss_does_not_depend_on_accumulation_or_processes(tmp_path):
    whole = trained(tmp_path / "whole", 8, 1)
    assert (whole[:, 0] < 3).all()  # about ln 7: no multiple of it
    for name, options in {
        "accumulated": {"batch": 1, "steps": 8},
        "processes": {"batch": 4, "steps": 1, "processes": 2},
        "both": {"batch": 2, "steps": 2, "processes": 2, "checkpointing": True},
    }.items():
        torch.testing.assert_close(
            trained(tmp_path / name, **options), whole, rtol=1e-3, atol=1e-4, msg=name
        )


def linear_layers(model):
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


@pytest.mark.parametrize("preset", ["lm", "flux", "qfnn"])
def test_lora_trains_every_linear_layer(tmp_path, preset):
    """Also behind a fused operation, which would read the weight and miss the adapter."""
    peft = pytest.importorskip("peft", reason="low-rank adapters")
    from qflux.hf import from_model

    model = make_model(make_config(preset, 7, **SMALL)).eval()
    wrapped = from_model(model)
    ids = torch.randint(7, (2, 12))
    before = wrapped(ids).logits.detach()
    targets = linear_layers(wrapped) - {"model.head"}
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    adapted = peft.get_peft_model(wrapped, options)
    torch.testing.assert_close(adapted(input_ids=ids).logits, before)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets) and all("lora_" in name for name in trained)
    adapted.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert [name for name, p in trained.items() if not p.grad.any()] == []
    adapted.gradient_checkpointing_disable()
    expected = adapted(input_ids=ids).logits
    assert not torch.allclose(expected, before)
    weights = {name: value.clone() for name, value in wrapped.state_dict().items()}
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected)
    base = from_model(make_model(make_config(preset, 7, **SMALL)).eval())
    base.load_state_dict(
        {name.replace(".base_layer", ""): value for name, value in weights.items()
         if "lora_" not in name}
    )  # fmt: skip
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_trl_fine_tunes_an_exported_model(tmp_path):
    """Rows of ids: a model has no label for the end-of-text token, which TRL adds to texts."""
    pytest.importorskip("peft", reason="low-rank adapters")
    trl = pytest.importorskip("trl", reason="supervised fine-tuning")
    datasets = pytest.importorskip("datasets", reason="trl reads its rows")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qflux import CharacterVocabulary, save_model
    from qflux.hf import export

    text = "To be, or not to be"
    vocabulary = CharacterVocabulary(text)
    save_model(
        tmp_path / "run", make_model(make_config("lm", vocabulary.size, **SMALL)), vocabulary
    )
    export(tmp_path / "run", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = model(ids, labels=ids).loss.item()
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist() * 8}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        args=trl.SFTConfig(
            str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, max_length=24,
            gradient_accumulation_steps=2, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    seen = trainer.state.log_history
    assert seen[0]["loss"] == pytest.approx(expected, rel=1e-4) and seen[0]["grad_norm"] > 0
