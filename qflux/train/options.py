"""The options of training and the names they choose among; imports nothing of the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qflux_kernels.checks import check_choice, check_flag, check_integer, check_real

Learning = Literal["backprop", "hebbian", "hybrid"]
Precision = Literal["float32", "bfloat16", "float16", "float64"]
Parallel = Literal["ddp", "fsdp"]
OutputError = Literal["softmax", "logits"]
TrackerName = Literal["tensorboard", "wandb"]

LEARNING: tuple[str, ...] = get_args(Learning)
PRECISIONS: tuple[str, ...] = get_args(Precision)
PARALLEL: tuple[str, ...] = get_args(Parallel)
ERRORS: tuple[str, ...] = get_args(OutputError)
TRACKERS: tuple[str, ...] = get_args(TrackerName)

# How long the run is when nothing says so.
DEFAULT_EPOCHS = 5.0

# What a resumed run may do otherwise than before: how long it is, what it reports and keeps, where
# it runs, how it saves memory, and the two remedies for a run that diverges.
MAY_CHANGE = (
    "epochs",
    "max_steps",
    "max_seconds",
    "patience",
    "log_interval",
    "eval_interval",
    "save_interval",
    "keep_states",
    "sample_prompt",
    "sample_tokens",
    "trackers",
    "log_figures",
    "device",
    "compile",
    "cuda_graph",
    "accumulation",
    "gradient_checkpointing",
    "learning_rate",
    "max_gradient_norm",
)
# What is said of a call and is no part of the run.
OF_THE_CALL = (
    "output_dir", "progress", "resume", "resume_step", "overwrite", "dry_run",
    "parallel", "context_parallel", "pipeline_parallel", "rank_timeout", "async_save",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How weights move along their gradients: AdamW, its schedule and clipping.

    Args:
        learning_rate: peak of the schedule, > 0.
        betas: decay of AdamW's running means of gradients and of their squares, each in [0, 1).
        eps: what AdamW adds to the root of the mean square, > 0.
        weight_decay: of the weights of linear maps and convolutions; >= 0.
        warmup: share of the run in which the learning rate rises linearly, in [0, 1).
        max_gradient_norm: gradients are scaled down to this norm, > 0.

    Raises:
        TypeError, ValueError: naming the option, its value and the allowed values.
    """

    learning_rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup: float = 0.05
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "max_gradient_norm"):
            check_real(name, getattr(self, name), above=0)
        check_real("weight_decay", self.weight_decay, minimum=0)
        check_real("warmup", self.warmup, minimum=0, below=1)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        for i, beta in enumerate(self.betas):
            check_real(f"betas[{i}]", beta, minimum=0, below=1)


@dataclass(frozen=True)
class TrainingOptions(OptimizerOptions):
    """How to train; the options of `OptimizerOptions` are given by name beside these.

    Args:
        output_dir: folder for `run.json` (options, text and versions of the run), `config.json`,
            `vocabulary.json`, `model.safetensors` (the weights with the lowest validation loss so
            far, or before the first evaluation the latest), `training_state.pt` (the latest state,
            to resume from) and `metrics.jsonl`.
        epochs: passes over the training works, > 0; None: no such limit where `max_steps` or
            `max_seconds` is given, else 5.
        batch_size: windows in a step, >= 1. A window has the configuration's `context_length`.
        accumulation: parts in which a batch is worked through, >= 1; their gradients add up to
            those of the whole batch in less memory.
        learning: "backprop": AdamW on every parameter. "hebbian": the delta rule moves the output
            layer, nothing else changes and nothing is backpropagated. "hybrid": the delta rule for
            the output layer, backpropagation of the cross entropy for the layers below.
        hebbian_rate: peak rate of the delta rule, > 0, on the same schedule, in units of one over
            `qflux.train.hebbian.largest_moment` of the batch, so that it suits every model.
        hebbian_error: error that the delta rule reduces, "softmax" or "logits", see
            `qflux.train.hebbian.delta_rule`.
        precision: of matrix products in the forward pass of training: "float32", "bfloat16" or
            "float16" (with loss scaling). States evolve in float32, and evaluation is float32.
            "float64" is the precision of everything, weights and evaluation too.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping what
            it computed.
        max_steps: at most so many steps, >= 1; None: no such limit. Of several limits the one that
            is reached first ends the run.
        max_seconds: stop when so much time has passed, > 0, resumed runs included, evaluations
            too; the learning rate then decays with the time; None: no such limit.
        seed: of the initial weights, the order of the windows and dropout, in [0, 2**40).
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
        eval_tokens: predict at most so many of the held-out tokens in an evaluation, >= 1, in
            windows that are evenly spread and always the same; None: all of them.
        save_interval: steps between training states saved without an evaluation, >= 1; a killed
            run loses at most so many steps. None: states are saved with the evaluations only.
        keep_states: states to keep, >= 1: the latest and those before it, as
            `training_state-STEP.pt`, to go back to with `resume_step`.
        sample_prompt: text that the model continues at every evaluation, to be seen and in
            `metrics.jsonl`; None: none.
        sample_tokens: tokens that it adds to the prompt, >= 1.
        device: where to train, as PyTorch names it, such as cpu, cuda or cuda:1.
        compile: run the steps through `torch.compile`; the delta rule itself stays as it is.
        cuda_graph: replay a step as one CUDA graph, recorded for each length of windows, instead of
            launching its kernels one by one; steps that write a line run as they are. On one GPU,
            with `learning` "backprop", no "float16" and no `max_seconds`.
        parallel: how several processes, started by torchrun, share a model. "ddp": each has all of
            its weights. "fsdp": each has a shard of them. None: "ddp" where there are several.
        context_parallel: processes that share each sequence, >= 1.
        pipeline_parallel: processes that share the layers, >= 1; the parts of `accumulation` are
            what runs at the same time in different layers. The product of both divides the number
            of processes, and the others get windows of their own, in equal numbers.
        rank_timeout: seconds after which a process that does not answer is given up, > 0.
        async_save: several processes write a training state beside the next steps, from a copy in
            memory; the state after it, and the end of the run, wait for it.
        trackers: services that get the metrics too: "tensorboard", "wandb".
        log_figures: the trackers also get pictures of the cylinders at every evaluation; needs
            `trackers` and matplotlib.
        init_from: folder of a model, as training or export wrote it, whose weights to start with.
            From the command line it gives network and vocabulary too. None: new weights.
        progress: say on standard error what is trained and how it goes: a bar on a terminal, else
            a line for each line of `metrics.jsonl`.
        resume: continue the run in `output_dir`, with the options that it had. Those for its
            length, reports, device and memory, the learning rate and the largest gradient norm may
            be given anew; all others are refused if they differ.
        resume_step: with `resume`, go back to the kept state of this step, >= 1, and forget states
            and metrics after it; None: the latest.
        overwrite: replace the run or the model that `output_dir` holds.
        dry_run: show shapes, memory and the first batch, take one step, and write nothing.

    Raises:
        TypeError, ValueError: naming the option, its value and the allowed values.

    Source: the Flux document, section 7 (gradient checkpointing; curriculum by sequence length;
    radius schedule), section 9 (mixed precision); the QFNN document, "Hebbian Learning".
    """

    output_dir: str | Path
    epochs: float | None = None
    batch_size: int = 4
    accumulation: int = 1
    learning: Learning = "backprop"
    hebbian_rate: float = 10.0
    hebbian_error: OutputError = "softmax"
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    max_steps: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    curriculum_length: int | None = None
    curriculum_share: float = 0.5
    radius_warmup: float = 0.0
    patience: int | None = None
    log_interval: int = 10
    eval_interval: int | None = 500
    eval_tokens: int | None = 2**17
    save_interval: int | None = None
    keep_states: int = 2
    sample_prompt: str | None = None
    sample_tokens: int = 100
    device: str = "cpu"
    compile: bool = False
    cuda_graph: bool = False
    parallel: Parallel | None = None
    context_parallel: int = 1
    pipeline_parallel: int = 1
    rank_timeout: float = 600.0
    async_save: bool = False
    trackers: tuple[TrackerName, ...] = ()
    log_figures: bool = False
    init_from: str | Path | None = None
    progress: bool = True
    resume: bool = False
    resume_step: int | None = None
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("hebbian_rate", self.hebbian_rate, above=0)
        check_real("curriculum_share", self.curriculum_share, above=0, maximum=1)
        check_real("radius_warmup", self.radius_warmup, minimum=0, below=1)
        for name in ("epochs", "max_seconds"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name), above=0)
        check_real("rank_timeout", self.rank_timeout, above=0)
        for name in (
            "batch_size", "accumulation", "log_interval", "keep_states", "sample_tokens",
            "context_parallel", "pipeline_parallel",
        ):  # fmt: skip
            check_integer(name, getattr(self, name), 1)
        if self.parallel is not None:
            check_choice("parallel", self.parallel, PARALLEL)
        if self.pipeline_parallel > 1 and self.sample_prompt is not None:
            raise ValueError("sample_prompt needs a whole model: leave out pipeline_parallel")
        check_integer("seed", self.seed, 0, 2**40 - 1)
        for name, minimum in (
            ("max_steps", 1),
            ("curriculum_length", 2),
            ("patience", 1),
            ("eval_interval", 1),
            ("eval_tokens", 1),
            ("save_interval", 1),
            ("resume_step", 1),
        ):
            value = getattr(self, name)
            if value is not None:
                check_integer(name, value, minimum)
        check_choice("learning", self.learning, LEARNING)
        check_choice("hebbian_error", self.hebbian_error, ERRORS)
        check_choice("precision", self.precision, PRECISIONS)
        for name in self.trackers:
            check_choice("trackers", name, TRACKERS)
        for name in (
            "gradient_checkpointing", "compile", "cuda_graph", "log_figures", "progress", "resume",
            "overwrite", "dry_run", "async_save",
        ):  # fmt: skip
            check_flag(name, getattr(self, name))
        if self.sample_prompt == "":
            raise ValueError("sample_prompt must have at least one character, got ''")
        if self.log_figures and not self.trackers:
            raise ValueError(f"log_figures needs trackers, some of {TRACKERS}, got none")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other: give one of them")
        if self.resume_step is not None and not self.resume:
            raise ValueError(f"resume_step needs resume, got {self.resume_step!r} without it")
        if self.cuda_graph and self.learning != "backprop":
            raise ValueError(f"cuda_graph needs learning='backprop', got {self.learning!r}")
        if self.cuda_graph and self.precision == "float16":
            raise ValueError(
                "cuda_graph needs precision='float32' or 'bfloat16', whose gradients are not "
                "scaled, got 'float16'"
            )
        if self.cuda_graph and self.max_seconds is not None:
            raise ValueError(
                "cuda_graph needs epochs or max_steps instead of max_seconds, with which every "
                f"step may be the last and is measured, got max_seconds={self.max_seconds!r}"
            )
        if self.learning == "hybrid" and self.precision == "float16":
            raise ValueError(
                "precision must be 'float32' or 'bfloat16' for learning='hybrid', "
                "whose gradients are not scaled, got 'float16'"
            )

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """Steps until `epochs` or `max_steps` ends the run; None where only the time does."""
        epochs = self.epochs
        if epochs is None and self.max_steps is None and self.max_seconds is None:
            epochs = DEFAULT_EPOCHS
        limits = [] if epochs is None else [math.ceil(epochs * steps_per_epoch)]
        limits += [] if self.max_steps is None else [self.max_steps]
        return min(limits, default=None)

    def limit(self, steps_per_epoch: int) -> str:
        """The limit that `total_steps` obeys, in words: "5 epochs", "max_steps 30"."""
        total = self.total_steps(steps_per_epoch)
        if total is None:
            return f"max_seconds {self.max_seconds:g}"
        if total == self.max_steps:
            return f"max_steps {total:,}"
        epochs = DEFAULT_EPOCHS if self.epochs is None else self.epochs
        words = f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
        if self.max_steps is not None:
            words += f", which come before max_steps {self.max_steps:,}"
        return words
