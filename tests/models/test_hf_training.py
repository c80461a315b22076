"""Training of Hugging Face models: Trainer, several processes, LoRA."""

import importlib.util
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

# Sixteen rows with unlike numbers of labels, in their order, for two steps of eight rows each; each
# case is a driver with its options.
PROGRAM = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import qflux.hf

folder, cases = sys.argv[1], json.loads(sys.argv[2])
first, size = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
torch.manual_seed(0)
rows = []
for number in range(16):
    ids = torch.randint(7, (12,))
    labels = ids.clone()
    labels[4 + number % 7 :] = -100
    rows.append({"input_ids": ids, "labels": labels})

def load():
    return AutoModelForCausalLM.from_pretrained(os.path.join(folder, "model")).train()

class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(rows)

def with_trainer(batch, steps, checkpointing=False):
    trainer = InOrder(model=load(), train_dataset=rows, args=TrainingArguments(
        folder, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
        gradient_checkpointing=checkpointing, max_steps=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
        lr_scheduler_type="constant"))
    trainer.train()
    return [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history[:2]]

def with_lightning(batch):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses, self.norms = load(), [], []

        def training_step(self, rows):
            # Gradients become the mean over the processes: each divides by its part of all labels.
            labels = self.all_gather((rows["labels"][:, 1:] != -100).sum()).sum()
            loss = self.model(**rows, num_items_in_batch=labels / size).loss
            self.losses.append(self.all_gather(loss.detach()).mean().item())
            return loss

        def on_before_optimizer_step(self, optimizer):
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
            self.norms.append(norm.item())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.0)

    module, rank = Module(), int(os.environ.get("RANK", "0"))
    own = torch.utils.data.DistributedSampler(rows, size, rank, shuffle=False)
    lightning.Trainer(
        accelerator="cpu", strategy="ddp", devices=size, max_steps=2, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
    ).fit(module, torch.utils.data.DataLoader(rows, batch_size=batch, sampler=own))
    return list(zip(module.losses, module.norms))

for name, (driver, options) in cases.items():
    seen = globals()["with_" + driver](**options)
    if first:
        with open(os.path.join(folder, name + ".json"), "w") as stream:
            json.dump(seen, stream)
"""


@pytest.fixture(scope="module", autouse=True)
def packages():
    pytest.importorskip("transformers", reason="qflux.hf is for it")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a model of seven tokens, and a program that trains it."""
    from qflux.hf import from_model

    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    from_model(make_model(make_config("lm", 7, **SMALL))).save_pretrained(folder / "model")
    (folder / "program.py").write_text(PROGRAM)
    return folder


def trained(folder, processes, cases):
    """Loss and gradient norm of two steps of 8 rows, for each case, from processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), folder / "program.py", folder,
         json.dumps(cases)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: torch.tensor(json.loads((folder / f"{name}.json").read_text())) for name in cases}


@pytest.fixture(scope="module")
def whole(exported):
    """What one process sees of batches in one piece; in pieces it is the same."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    cases = {
        "whole": ("trainer", {"batch": 8, "steps": 1}),
        "accumulated": ("trainer", {"batch": 1, "steps": 8}),
    }
    seen = trained(exported, 1, cases)
    assert (seen["whole"][:, 0] < 3).all()  # about ln 7: no multiple of it
    torch.testing.assert_close(seen["accumulated"], seen["whole"], rtol=1e-3, atol=1e-4)
    return seen["whole"]


@pytest.fixture(scope="module")
def divided(exported, whole):
    """What two processes see, all drivers in one start of them, which is what takes time."""
    cases = {
        "Trainer": ("trainer", {"batch": 4, "steps": 1}),
        "accumulated": ("trainer", {"batch": 2, "steps": 2, "checkpointing": True}),
    }
    if importlib.util.find_spec("lightning"):
        cases["Lightning"] = "lightning", {"batch": 4}
    return trained(exported, 2, cases)


@pytest.mark.parametrize("name", ["Trainer", "accumulated", "Lightning"])
def test_the_loss_does_not_depend_on_accumulation_or_processes(divided, whole, name):
    if name == "Lightning":
        pytest.importorskip("lightning", reason="pip install lightning for its Trainer")
    torch.testing.assert_close(divided[name], whole, rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize("kind", ["rows", "texts"])
def test_trl_fine_tunes_an_exported_model(tmp_path, kind):
    """Texts end in a token that the model has: it has no label for the end-of-text token."""
    pytest.importorskip("peft", reason="low-rank adapters")
    trl = pytest.importorskip("trl", reason="supervised fine-tuning")
    datasets = pytest.importorskip("datasets", reason="trl reads its rows")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qflux import CharacterVocabulary, save_model
    from qflux.hf import export

    text, end = "To be,\nor not to be", "\n"
    vocabulary = CharacterVocabulary(text)
    save_model(
        tmp_path / "run", make_model(make_config("lm", vocabulary.size, **SMALL)), vocabulary
    )
    export(tmp_path / "run", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer(text if kind == "rows" else text + end, return_tensors="pt").input_ids
    expected = model(ids, labels=ids).loss.item()
    rows = {"input_ids": ids.tolist()} if kind == "rows" else {"text": [text]}
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({name: row * 8 for name, row in rows.items()}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        args=trl.SFTConfig(
            str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, max_length=24,
            gradient_accumulation_steps=2, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True, eos_token=None if kind == "rows" else end,
        ),
    )  # fmt: skip
    trainer.train()
    seen = trainer.state.log_history
    assert seen[0]["loss"] == pytest.approx(expected, rel=1e-4) and seen[0]["grad_norm"] > 0
