"""Training of a language model: a run from its first step to its last, stops and returns included.

`train` prepares; `_Run.learn` is the loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..inference.generate import evaluating
from ..models.base import CausalLM
from ..models.config import ModelConfig
from ..models.presets import make_model
from ..text.data import TextSplit
from ..text.files import check_path
from ..text.sources import TextSource
from ..text.tokens import EncodedText, encode_text
from ..text.vocabulary import UnknownCharacterError, Vocabulary, check_vocabulary_size
from ..text.windows import TrainingWindows
from .checkpoint import (
    CONFIG_FILE,
    VOCABULARY_FILE,
    check_same_model,
    first_line,
    save_model,
    usable_device,
    write_atomically,
)
from .display import Display
from .errors import plain_errors
from .evaluation import evaluate
from .figures import check_figures, cylinder_figures
from .folder import check_vacant, clear, forget_trackers, sole_writer
from .graph import check_recordable
from .metrics import METRICS_FILE, Interval, append_line, drop_lines_after, peak_memory
from .optimizer import make_optimizer
from .options import DEFAULT_EPOCHS, TrainingOptions
from .ranks import Group, Ranks, check_windows, joined, own_device
from .record import (
    changed_options,
    check_same_text,
    make_record,
    read_record,
    resume_command,
)
from .replica import Replica
from .schedules import radius_factor, radius_rate, radius_rules, shorten, window_length
from .sharded import parameter_order, restore, tensors_of
from .signals import Stopper, StopRequested, TrainingInterrupted
from .start import load_start
from .states import States, all_finite, random_state, set_random_state
from .step import StepResult, TrainStep, checkpoint_layers
from .trackers import open_trackers


class NonFiniteLossError(RuntimeError):
    """A loss, or what a step left of the weights, became NaN or infinite."""


@dataclass(frozen=True)
class TrainingResult:
    """The model of the last step, its validation loss in nats a token, and the run's extent.

    seconds: of training, resumed runs included. reason: why the run ended, in words. more: the
    command that makes the run longer. text: what it was trained and validated on. first: whether
    this process is the one of the run that writes files; the model of several is in their parts.
    """

    model: CausalLM
    validation_loss: float
    best_validation_loss: float
    steps: int
    seconds: float
    reason: str = ""
    more: str = ""
    text: EncodedText | None = None
    first: bool = True


def train(
    config: ModelConfig,
    text: TextSplit | TextSource,
    vocabulary: Vocabulary,
    options: TrainingOptions,
    *,
    source: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a new model on a text, or resume one, and validate it on the part held out.

    A text that is not small is encoded once, into `tokens.bin` in `output_dir`.

    A run that was stopped and resumed from its last saved state continues exactly as if it had
    not been stopped: same batches, same losses, same weights (with `max_seconds` the schedule
    depends on the clock, and only the batches are the same). Ctrl-C, SIGTERM and SIGHUP save the
    state first; a second one ends the process at once. A state is saved only if the model it holds
    has a finite loss.

    Args:
        config, text, vocabulary, options: as their classes say.
        source: where the text came from, kept in `run.json` as it is given; None: what a resumed
            run has there stays.

    Raises:
        FileNotFoundError: `resume` without a run, `resume_step` without that state, or no model
            in `init_from`.
        FileExistsError: `output_dir` holds a run or a model and neither `resume` nor `overwrite`
            is given, or another process is writing there.
        ValueError: a text too short for the context; a resumed run with another text, model or
            option that may not change; a broken file of the run; or no such device.
        NonFiniteLossError: a loss became NaN or infinite; the states saved before are kept.
        MemoryError: the device has too little memory; says which options need less.
        TrainingInterrupted: a signal stopped the run, and its state is saved.
    """
    folder = check_path("output_dir", options.output_dir)
    device = usable_device(own_device(options.device))
    if options.cuda_graph:
        check_recordable(device)
    if options.resume and not folder.is_dir():
        raise FileNotFoundError(f"nothing to resume: there is no folder {str(folder)!r}")
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(options, device))
        stack.enter_context(plain_errors(options))
        with ranks.together():
            if ranks.first:
                if not options.dry_run:
                    stack.enter_context(sole_writer(folder))
                if not (options.resume or options.overwrite):
                    check_vacant(folder)
        with ranks.together():
            run = _Run(config, text, vocabulary, options, device, source, ranks)
        ranks.agree(run.facts())
        with ranks.together():
            check_windows(config, options)
        run.prepare()
        if options.dry_run:
            shown = run.rehearse()
            if ranks.first:
                print(shown)
        else:
            run.learn()
    return TrainingResult(
        run.model.eval(),
        run.validation_loss,
        run.best,
        run.step,
        run.seconds(),
        run.reason(),
        f"{run.resume_command()} {run.longer()}",
        run.text,
        ranks.first,
    )


class _Run:
    """A run: the model that learns, how far it is, and its files.

    Nothing but `tokens.bin` is written before `learn`.
    """

    def __init__(
        self,
        config: ModelConfig,
        text: TextSplit | TextSource,
        vocabulary: Vocabulary,
        options: TrainingOptions,
        device: torch.device,
        source: Mapping[str, Any] | None,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.config, self.vocabulary, self.options = config, vocabulary, options
        self.folder, self.device = Path(options.output_dir), device
        self.states = States(self.folder, options.keep_states)
        self.display = Display(options.progress and ranks.first)
        check_vocabulary_size(vocabulary, config.vocab_size)
        self.text = self._encode(text)
        self.record = make_record(self.text, vocabulary, options, source)
        self.changes: dict[str, tuple[Any, Any]] = {}
        self.state = self._find_state(source) if options.resume else None

        length = config.context_length
        self.held_out = self.text.validation_sample(options.eval_tokens, length)
        self.windows = TrainingWindows(
            self.text.train, length, options.batch_size, options.seed, self.text.separator
        )
        if max(map(len, self.held_out), default=0) < 2:
            raise ValueError("the validation text must have a work of at least 2 tokens")
        self.prompt = self._encode_prompt()
        self.total_steps = options.total_steps(self.windows.steps_per_epoch)
        self.display.total_steps = self.total_steps

    def facts(self) -> dict[str, Any]:
        """What all processes of a run must have in common."""
        record = self.record
        return {
            "versions": record.versions,
            "text": record.text["sha256"],
            "vocabulary": self.vocabulary.to_json(),
            "network": self.config.to_json(),
            "options": record.options,
            "state": None if self.state is None else self.state["step"],
        }

    def prepare(self) -> None:
        """Make the model, as this process holds it, and take it where its state says."""
        options, device, state = self.options, self.device, self.state
        torch.manual_seed(options.seed)
        model = make_model(self.config).to(device)
        if options.precision == "float64":
            model = model.double()
        if options.init_from is not None and state is None:
            load_start(model, options.init_from)
        if options.gradient_checkpointing:
            checkpoint_layers(model)
        self.model, self.parameters = model, parameters(model)
        self.order = parameter_order(model, make_optimizer(model, options))
        if isinstance(self.ranks, Group) and self.ranks.pipeline > 1:
            from .pipeline import PipelinedReplica

            self.replica: Replica = PipelinedReplica(model, options, self.ranks)
        else:
            self.replica = Replica(model, options, self.ranks)
        self.train_step = TrainStep(model, options, device, self.replica)
        if self.ranks.rank > 0:
            # Random draws in training are each process's own.
            torch.manual_seed(options.seed + self.ranks.rank)
        self.rules = radius_rules(self.model)
        self.step, self.validation_loss, self.best, self.stale = 0, math.nan, math.inf, 0
        self.interval, self.pending, seconds_before = Interval(), None, 0.0
        self.last_batch: Tensor | None = None
        if state is not None:
            seconds_before = state["seconds"]
            self._restore(state)
        self.first_step, self.saved_step = self.step, self.step if state is not None else None
        self.start = time.perf_counter() - seconds_before
        self.heard = seconds_before
        self.stopper = Stopper(repeats=self.ranks.size > 1)

    def _encode(self, text: TextSplit | TextSource) -> EncodedText:
        try:
            with self.ranks.first_alone("encoded"):
                return encode_text(
                    text,
                    self.vocabulary,
                    None if self.options.dry_run else self.folder,
                    progress=self.display.terminal,
                )
        except UnknownCharacterError as error:
            if self.options.resume:
                # The vocabulary of the run has every character of its text.
                raise ValueError(f"cannot resume with another text: {error}") from None
            raise

    def _find_state(self, source: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The state to resume from; None if the run was stopped before it saved one.

        The record takes over where the text came from, if that is not said anew.
        """
        stored = read_record(self.folder)
        if stored is not None:
            self.changes = changed_options(stored, self.options)
            check_same_text(stored.text, self.record.text)
            if source is None:
                self.record.source.update(stored.source)
            if not self.states.exist() and self.options.resume_step is None:
                return None
        return self.states.load(self.options.resume_step)

    def _restore(self, state: dict[str, Any]) -> None:
        check_same_model(state, self.config, self.vocabulary)
        try:
            drawn = restore(state, self.train_step, self.ranks, self.order)
            if drawn is None:
                # Another number of processes draws anew.
                torch.manual_seed(self.options.seed + 1_000_003 * state["step"] + self.ranks.rank)
            else:
                set_random_state(drawn, self.device)
            self.step, self.stale = state["step"], state["stale"]
            self.validation_loss = state["validation_loss"]
            self.best = state["best_validation_loss"]
            # States of older versions were saved between intervals only.
            if state.get("interval") is not None:
                self.interval.load_state_dict(state["interval"], self.device)
            self.pending = state.get("pending")
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the training state in {str(self.folder)!r} does not fit this run: "
                f"{first_line(error)}"
            ) from None

    def _encode_prompt(self) -> Tensor | None:
        if self.options.sample_prompt is None:
            return None
        try:
            return self.vocabulary.encode(self.options.sample_prompt)[None].to(self.device)
        except ValueError as error:
            raise ValueError(f"sample_prompt: {error}") from None

    def seconds(self) -> float:
        """How long the run has taken, its earlier parts included."""
        return time.perf_counter() - self.start

    def clock(self) -> float:
        """The seconds by which the run goes: the same in all processes."""
        return self.seconds() if self.ranks.size == 1 else self.heard

    def _listen(self) -> None:
        """Learn of signals that came to other processes, and of the time there."""
        if self.ranks.size > 1:
            number, self.heard, failed = self.ranks.largest(
                self.stopper.signal or 0, self.seconds(), self.states.failed
            )
            self.stopper.signal = int(number) or None
            if failed:
                self.states.finish(self.ranks)

    def progress(self) -> float:
        """How much of the run is behind, in [0, 1]."""
        options = self.options
        progress = 0.0 if self.total_steps is None else self.step / self.total_steps
        if options.max_seconds is not None:
            progress = max(progress, self.clock() / options.max_seconds)
        if self._out_of_patience():
            progress = 1.0
        return min(progress, 1.0)

    def reason(self) -> str:
        """Why the run ended."""
        options = self.options
        if options.dry_run:
            return "dry run"
        if self._out_of_patience():
            reason = f"patience {options.patience}: {self.stale} evaluations without a lower loss"
        elif self._out_of_steps():
            reason = options.limit(self.windows.steps_per_epoch)
        else:
            reason = f"max_seconds {options.max_seconds:g}"
        return reason if self.step > self.first_step else f"{reason}; nothing was left to do"

    def longer(self) -> str:
        """The option that makes the run twice as long."""
        options = self.options
        if self._out_of_patience():
            return f"--patience {2 * self.stale}"
        if not self._out_of_steps():
            return f"--max-seconds {2 * (options.max_seconds or 0):g}"
        if self.total_steps == options.max_steps:
            return f"--max-steps {2 * self.step}"
        return f"--epochs {2 * (options.epochs or DEFAULT_EPOCHS):g}"

    def _out_of_steps(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    def _out_of_patience(self) -> bool:
        return self.options.patience is not None and self.stale >= self.options.patience

    def learn(self) -> None:
        """Step after step until the end, with the files of the run."""
        if self.options.log_figures:
            check_figures()
        if self.options.overwrite:
            forget_trackers(self.folder)
        trackers = self.options.trackers if self.ranks.first else ()
        with open_trackers(trackers, self.folder, self.config, self.step) as self.trackers:
            with self.ranks.together():
                if self.ranks.first:
                    self._prepare_folder()
            self.display.header(self.header())
            with (
                self.stopper.listening(),
                self.display.running(self.progress()),
                self.states.finishing(self.ranks),
            ):
                self.model.train()
                if self.pending is not None:
                    self._close_interval(self.pending, evaluate_now=True)
                while (progress := self.progress()) < 1:
                    taken, length = self._take_step(progress)
                    self._listen()
                    last = self.progress() >= 1
                    if last or self._writes_line(self.step):
                        line = self._measure(taken, length)
                        self._close_interval(line, last or self._due(self.options.eval_interval))
                    if self.stopper.signal is not None and not last:
                        self._save_and_stop()

    def _prepare_folder(self) -> None:
        """Write down what the run is, and forget what it will do again."""
        if self.options.overwrite:
            clear(self.folder)
        if self.options.resume_step is not None:
            self.states.go_back(self.options.resume_step)
        self.record.write(self.folder)
        write_atomically(self.folder / CONFIG_FILE, self.config.to_json().encode())
        write_atomically(self.folder / VOCABULARY_FILE, self.vocabulary.to_json().encode())
        # A line that waits for its evaluation is written again, even if that was done once already.
        bad = drop_lines_after(self.folder, self.step - (self.pending is not None))
        if bad:
            self.display.say(
                f"warning: {bad} lines of {str(self.folder / METRICS_FILE)!r} were no lines of "
                f"metrics and are gone"
            )

    def header(self) -> list[tuple[str, str]]:
        """What is trained on what, and for how long: names and text."""
        options = self.options
        batch = f"{options.batch_size} x {self.config.context_length} tokens"
        length = "steps until max_seconds" if self.total_steps is None else (
            f"{self.total_steps:,} steps"
        )  # fmt: skip
        rows = [
            *self.text.report(self.config.context_length, options.eval_tokens),
            ("vocabulary", f"{self.vocabulary.kind}, {self.vocabulary.size:,} tokens"),
            ("model", f"{self.config.architecture}, {self.parameters:,} parameters, "
                      f"context {self.config.context_length}"),
            ("device", f"{self.device}, {options.precision}, {torch.get_num_threads()} threads"),
            ("run", f"{length} of {batch} into {options.output_dir} "
                    f"(ends at {options.limit(self.windows.steps_per_epoch)})"),
        ]  # fmt: skip
        if options.max_seconds is not None:
            rows.append(("time", f"at most {options.max_seconds:g} s (max_seconds)"))
        if self.ranks.size > 1:
            rows.append(("processes", self.ranks.describe(options)))
        if options.init_from is not None and not options.resume:
            rows.append(("starts from", str(options.init_from)))
        if options.resume:
            rows.append(("resumes", f"after step {self.step:,}"))
        rows += [("changed", f"{name} {old} -> {new}") for name, (old, new) in self.changes.items()]
        return rows

    def _writes_line(self, step: int) -> bool:
        options = self.options
        intervals = (options.log_interval, options.eval_interval, options.save_interval)
        return any(interval is not None and step % interval == 0 for interval in intervals)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def _take_step(self, progress: float) -> tuple[StepResult, int]:
        """Learn from the next batch; returns also the length of its windows."""
        options = self.options
        length = window_length(progress, self.config.context_length, options)
        batch = shorten(self._windows(), length).to(self.device)
        # With a time limit any step may turn out to be the last, which has a line.
        measured = (
            self._writes_line(self.step + 1)
            or self.step + 1 == self.total_steps
            or options.max_seconds is not None
        )
        with radius_rate(self.rules, radius_factor(progress, options.radius_warmup)):
            taken = self.train_step(batch, progress, return_layers=measured)
        self.interval.add(taken.loss, batch.numel() * self.ranks.data)
        self.step, self.last_batch = self.step + 1, batch
        self.display.step(self.step, self.progress())
        return taken, length

    def _windows(self) -> Tensor:
        """The windows of the next step that are this process's."""
        if self.ranks.data == 1:
            return self.windows.batch(self.step)
        return self.windows.batch(self.step, self.ranks.rows(self.options.batch_size))

    def _measure(self, taken: StepResult, length: int) -> dict[str, Any]:
        """The line of metrics of the interval that ends here."""
        numbers = self.interval.fetch(taken, self.ranks, length)
        (peak,) = self.ranks.largest(peak_memory(self.device))
        self._check_losses(numbers.losses, taken.rate)
        line = {
            "step": self.step,
            "epoch": self.step / self.windows.steps_per_epoch,
            "train_loss": sum(numbers.losses) / len(numbers.losses),
            "learning_rate": taken.rate,
            "gradient_norm": numbers.gradient_norm,
            "window_length": length,
            "tokens_per_second": self.interval.tokens_per_second(time.perf_counter()),
            "peak_memory_mb": peak / 2**20,
            "elapsed_seconds": self.seconds(),
            **numbers.layers,
        }
        self.display.interval(line, self.progress())
        return line

    def _close_interval(self, line: dict[str, Any], evaluate_now: bool) -> None:
        """Evaluate if it is time, write the line and the files, and begin a new interval."""
        self.interval, self.pending = Interval(), None
        if evaluate_now:
            self._evaluate(line)
        if self.ranks.first:
            append_line(self.folder / METRICS_FILE, line)
        for tracker in self.trackers:
            tracker.log(self.step, line)
        if evaluate_now and self.options.log_figures:
            # Of the text whose loss has just been measured.
            work = max(self.held_out, key=len)
            for name, figure in cylinder_figures(self.model, work, self.vocabulary):
                for tracker in self.trackers:
                    tracker.log_figure(self.step, f"cylinders/{name}", figure)
        if evaluate_now:
            self.stale += 1
            if self.validation_loss < self.best:
                self.best, self.stale = self.validation_loss, 0
                self._save_model()
        if evaluate_now or self._due(self.options.save_interval):
            self._save(known_good=evaluate_now)
        self.interval = Interval()

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Add the validation loss to the line, and a sample if one is wanted.

        A signal meanwhile saves the state as it was before.
        """
        before, tokens = random_state(self.device), sum(map(len, self.held_out))
        try:
            with (
                self.display.evaluating(self.model, tokens),
                self.stopper.interrupting(self.model, self._listen),
            ):
                loss = self._loss_of_held_out()
        except StopRequested:
            set_random_state(before, self.device)
            self.pending = line
            self._save_and_stop()
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the validation loss is {loss} at step {self.step}; "
                                     f"{self._remedy()}")  # fmt: skip
        self.validation_loss = line["val_loss"] = loss
        self.display.say(
            f"step {self.step:,}: training loss {line['train_loss']:.3f}, "
            f"validation loss {loss:.3f} nats/token"
        )
        if self.prompt is not None:
            with self._random_numbers_kept():
                line["sample"] = self._sample(self.prompt)
            self.display.say(line["sample"])

    def _loss_of_held_out(self) -> float:
        if self.ranks.size == 1:
            return evaluate(self.model, self.held_out, self.options.batch_size)
        with evaluating(self.model):
            return self.replica.evaluate(self.held_out, self.options.batch_size)

    def _save_model(self) -> None:
        """Write the model file, from the weights of all processes."""
        weights = self.replica.weights()
        with self.ranks.together():
            if self.ranks.first:
                save_model(self.folder, self.model, self.vocabulary, weights)

    def _sample(self, prompt: Tensor) -> str:
        generator = torch.Generator(self.device).manual_seed(self.options.seed)
        ids = self.model.generate(
            prompt, self.options.sample_tokens, temperature=0.8, generator=generator
        )
        return self.vocabulary.decode(ids[0])

    @contextmanager
    def _random_numbers_kept(self) -> Iterator[None]:
        before = random_state(self.device)
        try:
            yield
        finally:
            set_random_state(before, self.device)

    def _save_and_stop(self) -> None:
        """Save the state and leave, as a signal asked.

        Raises:
            TrainingInterrupted: always, unless the state is not finite.
        """
        if self.saved_step != self.step:
            self._save()
        self.states.finish(self.ranks)
        assert self.stopper.signal is not None
        raise TrainingInterrupted(
            f"stopped by {self.stopper.name} and saved at step {self.step:,}; go on with: "
            f"{self.resume_command()}",
            self.stopper.signal,
        )

    def _save(self, known_good: bool = False) -> None:
        """Write the state, if the model in it is good: its loss is finite, and so are its numbers.

        Where no model was validated yet, the model file has this one.
        """
        state = {
            "config": self.config.to_json(),
            "vocabulary": self.vocabulary.to_json(),
            "random_state": random_state(self.device),
            "step": self.step,
            "seconds": self.seconds(),
            "validation_loss": self.validation_loss,
            "best_validation_loss": self.best,
            "stale": self.stale,
            "interval": self.interval.state_dict(),
            "pending": self.pending,
        }
        divided = self.ranks.size > 1
        if divided:
            on_cpu = self.ranks.writers is None
            tensors = tensors_of(self.model, self.train_step.optimizer, on_cpu)
            state["scaler"] = self.train_step.scaler.state_dict()
            state["random_states"] = self.ranks.gathered(state["random_state"])
        else:
            tensors = {
                "model": self.model.state_dict(),
                "learner": self.train_step.state_dict(),
            }
        good = known_good or self._loss_is_finite()
        if not self.ranks.all(good and all_finite(tensors)):
            raise NonFiniteLossError(
                f"step {self.step} left weights that are not finite or have no finite loss; "
                f"{self._remedy()}"
            )
        if self.best == math.inf:
            self._save_model()
        if divided:
            self.states.save_shards(tensors, state, self.ranks)
        else:
            self.states.save({**state, **tensors})
        self.saved_step = self.step

    @torch.no_grad()
    def _loss_is_finite(self) -> bool:
        """Whether the model, after its step, has a loss on the batch that it has just seen."""
        batch = self.last_batch
        assert batch is not None, "a state is saved after a step"
        # A part that is known to fit into memory.
        batch = batch.chunk(self.options.accumulation)[0]
        with self._random_numbers_kept(), evaluating(self.model):
            return self.replica.finite_loss(batch)

    def _check_losses(self, losses: list[float], rate: float) -> None:
        """Raise for the first loss that is not finite; the last one is of this step."""
        for at, loss in enumerate(losses, start=self.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"the training loss is {loss} at step {at}, learning "
                                         f"rate {rate:.3g}; {self._remedy()}")  # fmt: skip

    def _remedy(self) -> str:
        self.states.finish(self.ranks)
        advice = "a lower learning_rate or max_gradient_norm usually helps"
        if self.saved_step is None:
            return f"{advice}; no state was saved before"
        return (
            f"{advice}; the state of step {self.saved_step:,} is kept: "
            f"{self.resume_command()} --learning-rate {self.options.learning_rate / 4:.2g}"
        )

    def resume_command(self) -> str:
        """What to type to go on with this run as it is."""
        options, given = self.options, []
        if options.parallel is not None:
            given.append(f" --parallel {options.parallel}")
        for name in ("context_parallel", "pipeline_parallel"):
            if getattr(options, name) > 1:
                given.append(f" --{name.replace('_', '-')} {getattr(options, name)}")
        if options.async_save:
            given.append(" --async-save")
        return resume_command(self.folder, self.ranks.size, "".join(given))

    def rehearse(self) -> str:
        """What a run would be like: header, shapes, memory, and one step on the first batch."""
        window = self._windows()
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        width = max(map(len, shapes))
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        progress = self.progress()
        length = window_length(progress, self.config.context_length, self.options)
        batch = shorten(window, length).to(self.device)
        self.model.train()
        begin = time.perf_counter()
        with radius_rate(self.rules, radius_factor(progress, self.options.radius_warmup)):
            loss = self.ranks.sum(self.train_step(batch, progress).loss.double())
        seconds = time.perf_counter() - begin
        rows = [f"{name:11} {text}" for name, text in self.header()]
        rows += ["parameters", *(f"  {name:{width}} {shape}" for name, shape in shapes.items())]
        rows += [
            f"memory      {weights / 2**20:,.1f} MB of weights, "
            f"{peak_memory(self.device) / 2**20:,.0f} MB in all after one step",
            f"first batch {tuple(batch.shape)} tokens, "
            f"loss {loss.item() / self.ranks.data:.3f} nats/token, "
            f"{seconds:.3g} s with what happens once",
            f"its window  {self.vocabulary.decode(batch[0][:60])!r}",
            "dry run: nothing was written",
        ]
        return "\n".join(rows)


def parameters(model: torch.nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
