"""Training of a language model: one loop, read from top to bottom."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..models.base import CausalLM
from ..models.config import ModelConfig
from ..models.presets import make_model
from ..text.data import TextSplit
from ..text.files import check_path
from ..text.sources import TextSource
from ..text.tokens import encode_text
from ..text.vocabulary import Vocabulary, check_vocabulary_size
from ..text.windows import TrainingWindows
from .checkpoint import (
    STATE_FILE,
    check_same_model,
    load_state,
    random_state,
    save_model,
    save_state,
    set_random_state,
    usable_device,
)
from .evaluation import evaluate
from .metrics import METRICS_FILE, Interval, drop_lines_after, peak_memory
from .options import TrainingOptions
from .schedules import radius_factor, radius_rate, radius_rules, shorten, window_length
from .step import TrainStep, checkpoint_layers
from .trackers import open_trackers


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainingResult:
    """The model of the last step, its validation loss in nats a token, and the run's extent."""

    model: CausalLM
    validation_loss: float
    best_validation_loss: float
    steps: int
    seconds: float


def train(
    config: ModelConfig,
    text: TextSplit | TextSource,
    vocabulary: Vocabulary,
    options: TrainingOptions,
) -> TrainingResult:
    """Train a new model on a text, or resume one, and validate it on the part held out.

    A text that is not small is encoded once, into `tokens.bin` in `output_dir`.

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
    folder = check_path("output_dir", options.output_dir)
    device = usable_device(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    if not options.resume and (folder / STATE_FILE).exists():
        raise FileExistsError(
            f"output_dir {str(folder)!r} holds a run already: resume it, or choose another folder"
        )

    check_vocabulary_size(vocabulary, config.vocab_size)
    encoded = encode_text(text, vocabulary, folder, progress=options.progress)
    held_out = encoded.validation_sample(options.eval_tokens, config.context_length)
    windows = TrainingWindows(
        encoded.train,
        config.context_length,
        options.batch_size,
        options.seed,
        encoded.separator,
    )
    if max(map(len, held_out), default=0) < 2:
        raise ValueError("the validation text must have a work of at least 2 tokens")
    total_steps = math.ceil(options.epochs * windows.steps_per_epoch)
    if options.max_steps is not None:
        total_steps = min(total_steps, options.max_steps)

    torch.manual_seed(options.seed)
    model = make_model(config).to(device)
    if options.gradient_checkpointing:
        checkpoint_layers(model)
    train_step = TrainStep(model, options, device)
    rules = radius_rules(model)
    step, seconds_before, validation_loss, best, stale = 0, 0.0, math.nan, math.inf, 0
    if options.resume:
        state = load_state(folder)
        check_same_model(state, config, vocabulary)
        model.load_state_dict(state["model"])
        train_step.load_state_dict(state["learner"])
        set_random_state(state["random_state"], device)
        step, seconds_before = state["step"], state["seconds"]
        validation_loss, best = state["validation_loss"], state["best_validation_loss"]
        stale = state["stale"]
    drop_lines_after(folder, step)

    start = time.perf_counter() - seconds_before

    def progress_made() -> float:
        progress = step / total_steps
        if options.max_seconds is not None:
            progress = max(progress, (time.perf_counter() - start) / options.max_seconds)
        if options.patience is not None and stale >= options.patience:
            progress = 1.0
        return min(progress, 1.0)

    def writes_line(step: int) -> bool:
        intervals = (options.log_interval, options.eval_interval, options.save_interval)
        return any(_due(step, interval) for interval in intervals)

    interval = Interval()
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
        if options.progress:
            for heading, line in encoded.report(config.context_length, options.eval_tokens):
                bar.write(f"{heading:11} {line}", file=sys.stderr)
        while (progress := progress_made()) < 1:
            length = window_length(progress, config.context_length, options)
            batch = shorten(windows.batch(step), length).to(device)
            # With a time limit any step may turn out to be the last, which has a line.
            measured = writes_line(step + 1) or step + 1 == total_steps or options.max_seconds
            with radius_rate(rules, radius_factor(progress, options.radius_warmup)):
                taken = train_step(batch, progress, return_layers=bool(measured))
            interval.add(taken.loss, batch.numel())
            step += 1
            bar.update()

            last = progress_made() >= 1
            if not last and not writes_line(step):
                continue
            evaluate_now = last or _due(step, options.eval_interval)
            numbers = interval.fetch(taken)
            _check_finite(numbers.losses, step, taken.rate)
            now = time.perf_counter()
            line = {
                "step": step,
                "epoch": step / windows.steps_per_epoch,
                "train_loss": sum(numbers.losses) / len(numbers.losses),
                "learning_rate": taken.rate,
                "gradient_norm": numbers.gradient_norm,
                "window_length": length,
                "tokens_per_second": interval.tokens_per_second(now),
                "peak_memory_mb": peak_memory(device) / 2**20,
                "elapsed_seconds": now - start,
                **numbers.layers,
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
            if evaluate_now or _due(step, options.save_interval):
                save_state(
                    folder,
                    {
                        "config": config.to_json(),
                        "vocabulary": vocabulary.to_json(),
                        "model": model.state_dict(),
                        "learner": train_step.state_dict(),
                        "random_state": random_state(device),
                        "step": step,
                        "seconds": time.perf_counter() - start,
                        "validation_loss": validation_loss,
                        "best_validation_loss": best,
                        "stale": stale,
                    },
                )
            interval = Interval()
    seconds = time.perf_counter() - start
    return TrainingResult(model.eval(), validation_loss, best, step, seconds)


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _check_finite(losses: list[float], step: int, rate: float) -> None:
    """Raise for the first loss that is not finite; the last one is of `step`."""
    for at, loss in enumerate(losses, start=step - len(losses) + 1):
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss is {loss} at step {at}, learning rate {rate:.3g}; "
                f"a lower learning_rate or max_gradient_norm usually helps"
            )
