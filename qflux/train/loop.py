"""Training of a language model: one loop, read from top to bottom."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.base import CausalLM
from ..models.presets import make_model
from ..models.record import Record
from ..text.data import IGNORED_LABEL, TextSplit, TrainingWindows, evaluation_batches
from ..text.vocabulary import Vocabulary
from .checkpoint import (
    STATE_FILE,
    load_state,
    save_model,
    save_state,
    usable_device,
    write_atomically,
)
from .hebbian import ERRORS
from .schedules import radius_factor, radius_rate, radius_rules, shorten, window_length
from .step import LEARNING, PRECISIONS, Learner, checkpoint_layers
from .trackers import TRACKERS, open_trackers

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
        accumulation: parts in which a batch is worked through, >= 1; their gradients add up to
            those of the whole batch in less memory.
        learning_rate: peak of the schedule, > 0.
        learning: "backprop": AdamW on every parameter. "hebbian": the delta rule moves the output
            layer, nothing else changes and nothing is backpropagated. "hybrid": the delta rule for
            the output layer, backpropagation of the cross entropy for the layers below.
        hebbian_rate: peak rate of the delta rule, > 0, on the same schedule, in units of one over
            `qflux.train.hebbian.largest_moment` of the batch, so that it suits every model.
        hebbian_error: "softmax" or "logits", see `qflux.train.hebbian.delta_rule`.
        precision: of matrix products in the forward pass of training: "float32", "bfloat16" or
            "float16" (with loss scaling). States evolve in float32, and evaluation is float32.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping what
            it computed.
        max_steps: at most so many steps, whatever `epochs` says; None: no such limit.
        max_seconds: stop when so much time has passed, resumed runs included, evaluations too; the
            learning rate then decays with the time; None: no such limit.
        seed: of the initial weights, the order of the windows and dropout, >= 0.
        weight_decay: of the weights of linear maps and convolutions; >= 0.
        warmup: share of the run in which the learning rate rises linearly, in [0, 1).
        max_gradient_norm: gradients are scaled down to this norm, > 0.
        curriculum_length: window length to begin with, >= 2; it doubles in equal parts of the run
            until it is `context_length`. A step then has more windows, not fewer tokens. None:
            whole windows from the start.
        curriculum_share: share of the run after which windows are whole, in (0, 1].
        radius_warmup: share of the run in which the growth rate of the radii rises linearly from 0
            to the configured one, in [0, 1). Evaluation always uses the configured rate.
        patience: stop after so many evaluations in a row without a new lowest validation loss,
            >= 1; None: never.
        log_interval: steps between lines of `metrics.jsonl`.
        eval_interval: steps between evaluations, each of which writes the files; None: only at
            the end.
        save_interval: steps between training states saved without an evaluation, >= 1; a killed
            run loses at most so many steps. None: states are saved with the evaluations only.
        device: where to train, as PyTorch names it.
        trackers: names from `qflux.train.trackers.TRACKERS` of services that get the metrics too.
        progress: show a progress bar, if standard error is a terminal.
        resume: continue the run in `output_dir`.

    Raises:
        ValueError: an option outside its range.

    Source: first seed, section 7 (gradient checkpointing; curriculum by sequence length; radius
    schedule; sparse memory), section 9 (mixed precision); second seed, "Hebbian Learning".
    """

    output_dir: str | Path
    epochs: float = 5.0
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 5e-3
    learning: str = "backprop"
    hebbian_rate: float = 10.0
    hebbian_error: str = "softmax"
    precision: str = "float32"
    gradient_checkpointing: bool = False
    max_steps: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    weight_decay: float = 0.1
    warmup: float = 0.05
    max_gradient_norm: float = 1.0
    curriculum_length: int | None = None
    curriculum_share: float = 0.5
    radius_warmup: float = 0.0
    patience: int | None = None
    log_interval: int = 10
    eval_interval: int | None = 500
    save_interval: int | None = None
    device: str = "cpu"
    trackers: tuple[str, ...] = ()
    progress: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "learning_rate",
            "hebbian_rate",
            "max_gradient_norm",
            "max_seconds",
            "curriculum_share",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {value!r}")
        if self.curriculum_share > 1:
            raise ValueError(f"curriculum_share must be <= 1, got {self.curriculum_share!r}")
        for name, least in (
            ("batch_size", 1),
            ("accumulation", 1),
            ("max_steps", 1),
            ("curriculum_length", 2),
            ("patience", 1),
            ("log_interval", 1),
            ("eval_interval", 1),
            ("save_interval", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value!r}")
        for name, allowed in (
            ("learning", LEARNING),
            ("hebbian_error", ERRORS),
            ("precision", tuple(PRECISIONS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"trackers must be among {tuple(TRACKERS)}, got {name!r}")
        if self.learning == "hybrid" and self.precision == "float16":
            raise ValueError(
                "precision must be 'float32' or 'bfloat16' for learning='hybrid', "
                "whose gradients are not scaled, got 'float16'"
            )
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed must lie in [0, 2**40), got {self.seed!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and >= 0, got {self.weight_decay!r}")
        for name in ("warmup", "radius_warmup"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


@dataclass(frozen=True)
class TrainingResult:
    """The model of the last step, its validation loss in nats a token, and the run's extent."""

    model: CausalLM
    validation_loss: float
    best_validation_loss: float
    steps: int
    seconds: float


def train(
    config: Record, text: TextSplit, vocabulary: Vocabulary, options: TrainingOptions
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
    model = make_model(config).to(device)
    if options.gradient_checkpointing:
        checkpoint_layers(model)
    learner = Learner(model, options, device)
    rules = radius_rules(model)
    step, seconds_before, validation_loss, best, stale = 0, 0.0, math.nan, math.inf, 0
    if options.resume:
        state = load_state(folder)
        _check_same_model(state, config, vocabulary)
        model.load_state_dict(state["model"])
        learner.load_state_dict(state["learner"])
        _set_random_state(state["random_state"], device)
        step, seconds_before = state["step"], state["seconds"]
        validation_loss, best = state["validation_loss"], state["best_validation_loss"]
        stale = state["stale"]
    _drop_metrics_after(folder, step)

    start = time.perf_counter() - seconds_before

    def progress_made() -> float:
        share = step / total_steps
        if options.max_seconds is not None:
            share = max(share, (time.perf_counter() - start) / options.max_seconds)
        if options.patience is not None and stale >= options.patience:
            share = 1.0
        return min(share, 1.0)

    losses: list[Tensor] = []
    tokens = 0
    window_start = time.perf_counter()
    bar = tqdm(
        total=total_steps if options.max_seconds is None else None,
        initial=step,
        unit="step",
        disable=None if options.progress else True,
    )
    model.train()
    with (
        bar,
        open(folder / METRICS_FILE, "a", encoding="utf-8") as metrics,
        open_trackers(options.trackers, folder, config) as trackers,
    ):
        while (share := progress_made()) < 1:
            length = window_length(share, config.context_length, options)
            batch = shorten(windows.batch(step), length).to(device)
            with radius_rate(rules, radius_factor(share, options.radius_warmup)):
                taken = learner.step(batch, share)
            losses.append(taken.loss)
            tokens += batch.numel()
            step += 1
            bar.update()

            last = progress_made() >= 1
            evaluate_now = last or _due(step, options.eval_interval)
            save_now = evaluate_now or _due(step, options.save_interval)
            if not save_now and not _due(step, options.log_interval):
                continue
            # The one place where the host waits for the device.
            *numbers, norm = torch.stack([*losses, taken.norm]).tolist()
            for number, at in zip(numbers, range(step - len(numbers) + 1, step + 1), strict=True):
                if not math.isfinite(number):
                    raise NonFiniteLossError(
                        f"the training loss is {number} at step {at}, learning rate "
                        f"{taken.rate:.3g}; a lower learning_rate or max_gradient_norm usually "
                        f"helps"
                    )
            now = time.perf_counter()
            line = {
                "step": step,
                "epoch": step / windows.steps_per_epoch,
                "train_loss": sum(numbers) / len(numbers),
                "learning_rate": taken.rate,
                "gradient_norm": norm,
                "window_length": length,
                "tokens_per_second": tokens / (now - window_start),
                "peak_memory_mb": peak_memory(device) / 2**20,
                "elapsed_seconds": now - start,
                **layer_metrics(taken.layers),
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
            for tracker in trackers:
                tracker.log(step, line)
            if evaluate_now:
                stale += 1
                if validation_loss < best:
                    best, stale = validation_loss, 0
                    save_model(folder, model, vocabulary)
            if save_now:
                save_state(
                    folder,
                    {
                        "config": config.to_json(),
                        "vocabulary": vocabulary.to_json(),
                        "model": model.state_dict(),
                        "learner": learner.state_dict(),
                        "random_state": _random_state(device),
                        "step": step,
                        "seconds": time.perf_counter() - start,
                        "validation_loss": validation_loss,
                        "best_validation_loss": best,
                        "stale": stale,
                    },
                )
            losses.clear()
            tokens, window_start = 0, time.perf_counter()
    seconds = time.perf_counter() - start
    return TrainingResult(model.eval(), validation_loss, best, step, seconds)


def peak_memory(device: torch.device) -> float:
    """Largest memory so far, in bytes: allocated on a GPU, resident of the process on a CPU.

    NaN where the system does not tell.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return math.nan
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def layer_metrics(layers: tuple[NamedTuple, ...]) -> dict[str, list[float]]:
    """The metrics of the layers by name, a number for each layer, fetched in one transfer."""
    if not layers:
        return {}
    table = torch.stack([torch.stack(tuple(layer)).detach() for layer in layers]).T.tolist()
    return dict(zip(layers[0]._fields, table, strict=True))


@torch.no_grad()
def evaluate(model: CausalLM, works: list[Tensor], batch_size: int = 12) -> float:
    """Mean loss in nats a token over every token of the works but the first of each.

    A token is predicted from at most `context_length - 1` tokens before it. The model is put into
    evaluation mode meanwhile.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for ids, labels in evaluation_batches(works, model.config.context_length, batch_size):
        scored = int((labels[:, 1:] != IGNORED_LABEL).sum())
        total += model(ids.to(device), labels=labels.to(device)).loss * scored
        count += scored
    model.train(was_training)
    return total.item() / count


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _check_same_model(state: dict[str, object], config: Record, vocabulary: Vocabulary) -> None:
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
