"""Training of a language model: one loop, read from top to bottom."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import (
    STATE_FILE,
    load_state,
    save_model,
    save_state,
    usable_device,
    write_atomically,
)
from .config import QuantumFluxConfig
from .data import IGNORED_LABEL, TextSplit, TrainingWindows, Vocabulary, evaluation_batches
from .model import QuantumFluxLM

METRICS_FILE = "metrics.jsonl"


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Args:
        output_dir: folder for `config.json`, `vocabulary.json`, `model.safetensors` (the weights
            with the lowest validation loss so far), `training_state.pt` (the latest state, to
            resume from) and `metrics.jsonl`.
        epochs: passes over the training works, > 0.
        batch_size: windows in a step, >= 1. A window has the configuration's `context_length`.
        learning_rate: peak of the schedule, > 0.
        max_steps: at most so many steps, whatever `epochs` says; None: no such limit.
        max_seconds: stop when so much time has passed, resumed runs included, evaluations too; the
            learning rate then decays with the time; None: no such limit.
        seed: of the initial weights, the order of the windows and dropout, >= 0.
        weight_decay: of the weights of linear maps and convolutions; >= 0.
        warmup: share of the run in which the learning rate rises linearly, in [0, 1).
        max_gradient_norm: gradients are scaled down to this norm, > 0.
        log_interval: steps between lines of `metrics.jsonl`.
        eval_interval: steps between evaluations, each of which writes the files; None: only at
            the end.
        device: where to train, as PyTorch names it.
        progress: show a progress bar, if standard error is a terminal.
        resume: continue the run in `output_dir`.

    Raises:
        ValueError: an option outside its range.
    """

    output_dir: str | Path
    epochs: float = 5.0
    batch_size: int = 4
    learning_rate: float = 5e-3
    max_steps: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    weight_decay: float = 0.1
    warmup: float = 0.05
    max_gradient_norm: float = 1.0
    log_interval: int = 10
    eval_interval: int | None = 500
    device: str = "cpu"
    progress: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "max_gradient_norm", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {value!r}")
        for name in ("batch_size", "max_steps", "log_interval", "eval_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value!r}")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed must lie in [0, 2**40), got {self.seed!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and >= 0, got {self.weight_decay!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), got {self.warmup!r}")


@dataclass(frozen=True)
class TrainingResult:
    """The model of the last step, its validation loss in nats a token, and the run's extent."""

    model: QuantumFluxLM
    validation_loss: float
    best_validation_loss: float
    steps: int
    seconds: float


def train(
    config: QuantumFluxConfig, text: TextSplit, vocabulary: Vocabulary, options: TrainingOptions
) -> TrainingResult:
    """Train a new model on `text.train`, or resume one, and validate it on `text.validation`.

    A run that was stopped and resumed from its last saved state continues exactly as if it had
    not been stopped: same batches, same losses, same weights (with `max_seconds` the schedule
    depends on the clock, and only the batches are the same).

    Raises:
        FileNotFoundError: `resume` without a saved state.
        FileExistsError: a saved state in `output_dir` that `resume` does not ask for.
        ValueError: a text too short for the context, a resumed run with another model, or no such
            device.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    folder, device = Path(options.output_dir), usable_device(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    if not options.resume and (folder / STATE_FILE).exists():
        raise FileExistsError(
            f"output_dir {str(folder)!r} holds a run already: resume it, or choose another folder"
        )

    works = [vocabulary.encode(work) for work in text.train.values()]
    held_out = [vocabulary.encode(work) for work in text.validation.values()]
    windows = TrainingWindows(works, config.context_length, options.batch_size, options.seed)
    if max(map(len, held_out), default=0) < 2:
        raise ValueError("the validation text must have a work of at least 2 tokens")
    total_steps = math.ceil(options.epochs * windows.steps_per_epoch)
    if options.max_steps is not None:
        total_steps = min(total_steps, options.max_steps)

    torch.manual_seed(options.seed)
    model = QuantumFluxLM(config).to(device)
    optimizer = make_optimizer(model, options)
    step, seconds_before, validation_loss, best = 0, 0.0, math.nan, math.inf
    if options.resume:
        state = load_state(folder)
        _check_same_model(state, config, vocabulary)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random_state"])
        step, seconds_before = state["step"], state["seconds"]
        validation_loss, best = state["validation_loss"], state["best_validation_loss"]
    _drop_metrics_after(folder, step)

    start = time.perf_counter() - seconds_before

    def progress_made() -> float:
        share = step / total_steps
        if options.max_seconds is not None:
            share = max(share, (time.perf_counter() - start) / options.max_seconds)
        return min(share, 1.0)

    losses: list[float] = []
    window_start = time.perf_counter()
    bar = tqdm(
        total=total_steps if options.max_seconds is None else None,
        initial=step,
        unit="step",
        disable=None if options.progress else True,
    )
    model.train()
    with bar, open(folder / METRICS_FILE, "a", encoding="utf-8") as metrics:
        while (share := progress_made()) < 1:
            rate = learning_rate_at(share, options.learning_rate, options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate

            batch = windows.batch(step).to(device)
            loss = model(batch, labels=batch).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NonFiniteLossError(
                    f"the training loss is {losses[-1]} at step {step + 1}, learning rate "
                    f"{rate:.3g}; a lower learning_rate or max_gradient_norm usually helps"
                )
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.max_gradient_norm)
            optimizer.step()
            step += 1
            bar.update()

            last = progress_made() >= 1
            evaluate_now = last or (
                options.eval_interval is not None and step % options.eval_interval == 0
            )
            if not evaluate_now and step % options.log_interval:
                continue
            now = time.perf_counter()
            line = {
                "step": step,
                "epoch": step / windows.steps_per_epoch,
                "train_loss": sum(losses) / len(losses),
                "learning_rate": rate,
                "gradient_norm": norm.item(),
                "tokens_per_second": len(losses) * batch.numel() / (now - window_start),
                "elapsed_seconds": now - start,
            }
            bar.set_postfix_str(
                f"loss {line['train_loss']:.3f}, {line['tokens_per_second']:.0f} tokens/s"
            )
            if evaluate_now:
                validation_loss = evaluate(model, held_out, options.batch_size)
                line["val_loss"] = validation_loss
                if options.progress:
                    bar.write(
                        f"step {step}: training loss {line['train_loss']:.3f}, "
                        f"validation loss {validation_loss:.3f} nats/token"
                    )
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            if evaluate_now:
                if validation_loss < best:
                    best = validation_loss
                    save_model(folder, model, vocabulary)
                save_state(
                    folder,
                    {
                        "config": config.to_json(),
                        "vocabulary": vocabulary.to_json(),
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "random_state": torch.get_rng_state(),
                        "step": step,
                        "seconds": time.perf_counter() - start,
                        "validation_loss": validation_loss,
                        "best_validation_loss": best,
                    },
                )
            losses.clear()
            window_start = time.perf_counter()
    seconds = time.perf_counter() - start
    return TrainingResult(model.eval(), validation_loss, best, step, seconds)


def learning_rate_at(share: float, peak: float, warmup: float) -> float:
    """Linear warm-up to `peak` over the first `warmup` of the run, then a cosine down to 0.

    Args:
        share: how much of the run is behind, in [0, 1].
        peak: the highest rate.
        warmup: share of the run at which the peak is reached, in [0, 1).
    """
    if share < warmup:
        # A tenth to start with: the first step must not be empty.
        return peak * (0.1 + 0.9 * share / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW that decays the weights of linear maps and convolutions only.

    Biases, norms, time steps, frequencies, and the radii and phases of the embedding have no
    reason to be small.
    """
    decayed = [
        module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d)
    ]
    chosen = set(map(id, decayed))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.99))


@torch.no_grad()
def evaluate(model: QuantumFluxLM, works: list[Tensor], batch_size: int = 12) -> float:
    """Mean loss in nats a token over every token of the works but the first of each.

    A token is predicted from at most `context_length - 1` tokens before it. The model is put into
    evaluation mode meanwhile.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for ids, labels in evaluation_batches(works, model.config.context_length, batch_size):
        scored = int((labels[:, 1:] != IGNORED_LABEL).sum())
        total += model(ids.to(device), labels=labels.to(device)).loss.item() * scored
        count += scored
    model.train(was_training)
    return total / count


def _check_same_model(
    state: dict[str, object], config: QuantumFluxConfig, vocabulary: Vocabulary
) -> None:
    saved, wanted = json.loads(state["config"]), json.loads(config.to_json())
    different = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]
    if different:
        raise ValueError(f"cannot resume with another configuration: {', '.join(different)}")
    if state["vocabulary"] != vocabulary.to_json():
        raise ValueError("cannot resume with another vocabulary: the text or its kind has changed")


def _drop_metrics_after(folder: Path, step: int) -> None:
    """Forget lines of steps that a resumed run will take again, or of an earlier run."""
    path = folder / METRICS_FILE
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(kept).encode())
