"""Language models of equal budget: `qflux`, baselines, and counting. See benchmarks/README.md.

    python benchmarks/lm.py --data tinyshakespeare.txt --provider qflux --seeds 0 1 2
    python benchmarks/lm.py --data tinyshakespeare.txt --provider transformer --rate 4e-3
    python benchmarks/lm.py --data tinyshakespeare.txt --provider ngram

Optimiser, schedule, batches and validation are the same for every provider.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ablations import hierarchical_model, mixture_model, no_geometry
from arguments import add_training, optimizer_options, parse_changes
from common import environment, nothing_missing
from state_space import StateSpaceConfig, StateSpaceModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformer import Transformer, TransformerConfig
from windowed import WindowedConfig, WindowedTransformer

from qflux import QuantumFluxConfig, QuantumFluxLM, make_config
from qflux.models.base import CausalLM
from qflux.text.data import load_text
from qflux.text.ngrams import ngram_loss
from qflux.text.vocabulary import VOCABULARIES, make_vocabulary
from qflux.text.windows import IGNORED_LABEL, TrainingWindows, evaluation_batches
from qflux.train.optimizer import make_optimizer
from qflux.train.options import OptimizerOptions
from qflux.train.schedules import learning_rate_at

COLUMNS = [
    "dataset", "provider", "changes", "context", "batch", "rate", "seed", "parameters", "steps",
    "seconds", "ms_per_step", "train_loss", "validation_loss", "kept", "vocabulary", "weight_decay",
    "beta2", "warmup", "device", "threads", "machine", "instruction_set", "torch", "python",
    "commit", "date",
]  # fmt: skip
CURVE_COLUMNS = [
    "dataset", "provider", "changes", "context", "rate", "limit", "seed", "commit", "step",
    "seconds", "train_loss",
]  # fmt: skip


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def loss_of(model: nn.Module, windows: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Summed loss of windows of context + 1 tokens, and how many predictions it is of."""
    targets = labels[:, 1:]
    logits = logits_of(model, windows[:, :-1])
    total = F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
    return total, int((targets != IGNORED_LABEL).sum())


@torch.no_grad()
def validate(model: nn.Module, works: Sequence[Tensor], context: int, batch: int) -> float:
    """Mean loss over every token of the works but the first of each, each predicted once.

    Windows of `context` inputs follow each other without overlap; the loss is over all their
    positions, so that a token has between 1 and `context` tokens before it.
    """
    device = next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for ids, labels in evaluation_batches(works, context + 1, batch):
        summed, scored = loss_of(model, ids.to(device), labels.to(device))
        total, count = total + summed.item(), count + scored
    model.train()
    return total / count


@torch.no_grad()
def kept_share(model: nn.Module, works: Sequence[Tensor], context: int) -> float | None:
    """Of the pairs that causality allows, the share that passes the threshold; None without one."""
    if not isinstance(model, CausalLM):
        return None
    ids = max(works, key=len)[:context].to(next(model.parameters()).device)
    layers = model(ids[None], return_layers=True).layers
    visible = (len(ids) + 1) / 2
    kept = [layer.degree.double().mean() / visible for layer in layers if layer.degree is not None]
    return torch.stack(kept).mean().item() if kept else None


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, max_norm: float
) -> float:
    """One step of the optimiser on windows of context + 1 tokens; the loss before it."""
    summed, count = loss_of(model, batch, batch)
    loss = summed / count
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


def train(
    model: nn.Module,
    works: Sequence[Tensor],
    arguments: argparse.Namespace,
    options: OptimizerOptions,
    seed: int,
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Train in place; columns of the run, and its curve.

    Warm-up and cosine follow the steps, or the clock with `--seconds`. The curve has a point for
    each hundredth of the run: the mean training loss since the point before.

    One thread on a CPU is timed by its processor time, which neighbours on a shared machine
    disturb least; anything else by the wall clock.
    """
    device = torch.device(arguments.device)
    alone = device.type == "cpu" and arguments.threads == 1
    clock = time.process_time if alone else time.perf_counter
    windows = TrainingWindows(works, arguments.context + 1, arguments.batch, seed)
    optimizer = make_optimizer(model, options)
    step, losses, start, last_line = 0, [], clock(), 0.0
    curve, drawn = [], 0
    while True:
        now = clock() - start
        progress = now / arguments.seconds if arguments.seconds else step / arguments.steps
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, options.learning_rate, options.warmup)
        batch = windows.batch(step).to(device)
        losses.append(update(model, optimizer, batch, options.max_gradient_norm))
        step += 1
        if not math.isfinite(losses[-1]):
            break
        if progress >= (len(curve) + 1) / 100:
            point = {"step": step, "seconds": round(clock() - start, 2)}
            curve.append({**point, "train_loss": round(statistics.fmean(losses[drawn:]), 4)})
            drawn = step
        if arguments.verbose and now - last_line > 10:
            mean = statistics.fmean(losses[-100:])
            print(f"  step {step}, {now:.0f} s, training loss {mean:.3f}", flush=True)
            last_line = now
    seconds = clock() - start
    result = {
        "steps": step,
        "seconds": round(seconds, 1),
        "ms_per_step": round(1e3 * seconds / step, 2),
        "train_loss": round(statistics.fmean(losses[-100:]), 4),
    }
    return result, curve


def append(path: Path, columns: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Task:
    """What every provider is given: the command line, and the text as token ids."""

    arguments: argparse.Namespace
    options: OptimizerOptions
    vocab_size: int
    works: list[Tensor]
    held_out: list[Tensor]


@dataclass(frozen=True)
class Run:
    """Columns of one run, and the points of its training curve."""

    row: dict[str, object]
    curve: list[dict[str, object]]


@dataclass(frozen=True)
class Provider:
    """Something that predicts text.

    Args:
        runs: what it makes of a task, one run after another.
        missing: why it cannot run here, or None.
    """

    runs: Callable[[Task], Iterator[Run]]
    missing: Callable[[], str | None] = nothing_missing


@dataclass(frozen=True)
class Trained:
    """A model of a configuration class, with other defaults than its own: a run for each seed."""

    model: Callable[[Any], nn.Module]
    config: type
    defaults: Mapping[str, object] = field(default_factory=dict)

    def configuration(self, vocab_size: int, context: int, changes: Mapping[str, object]) -> Any:
        changes = {"context_length": context, **self.defaults, **changes}
        if self.config is QuantumFluxConfig:
            return make_config("lm", vocab_size, **changes)
        return self.config(vocab_size, **changes)

    def runs(self, task: Task) -> Iterator[Run]:
        arguments = task.arguments
        changes = parse_changes(arguments.set, self.config)
        made = self.configuration(task.vocab_size, arguments.context, changes)
        named = list(arguments.set)
        if isinstance(made, QuantumFluxConfig) and "score" not in {**self.defaults, **changes}:
            named.append(f"score={made.score}")
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            network = self.model(made).to(arguments.device)
            result, curve = train(network, task.works, arguments, task.options, seed)
            loss = validate(network, task.held_out, arguments.context, arguments.batch)
            kept = kept_share(network, task.held_out, arguments.context)
            row = {
                "changes": " ".join(named),
                "context": arguments.context,
                "batch": arguments.batch,
                "rate": arguments.rate,
                "seed": seed,
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "weight_decay": arguments.weight_decay,
                "beta2": arguments.beta2,
                "warmup": arguments.warmup,
                **result,
                "validation_loss": round(loss, 4),
                "kept": "" if kept is None else round(kept, 4),
            }
            yield Run(row, curve)


def counted(task: Task) -> Iterator[Run]:
    """Interpolated n-grams, a run for each order; nothing is trained."""
    for order in (1, 2, 3, 5):
        loss = ngram_loss(task.works, task.held_out, task.vocab_size, order)
        yield Run({"provider": f"{order}-gram", "validation_loss": round(loss, 4)}, [])


MODELS: dict[str, Trained] = {
    "qflux": Trained(QuantumFluxLM, QuantumFluxConfig),
    "zero-layer": Trained(QuantumFluxLM, QuantumFluxConfig, {"num_layers": 0}),
    "no-geometry": Trained(no_geometry, QuantumFluxConfig, {"score": "threshold"}),
    "mixture": Trained(mixture_model, QuantumFluxConfig, {"score": "sparsemax"}),
    "hierarchical": Trained(hierarchical_model, QuantumFluxConfig, {"score": "sparsemax"}),
    "transformer": Trained(Transformer, TransformerConfig),
    "windowed": Trained(WindowedTransformer, WindowedConfig),
    "state-space": Trained(StateSpaceModel, StateSpaceConfig),
}
PROVIDERS: dict[str, Provider] = {
    **{name: Provider(trained.runs) for name, trained in MODELS.items()},
    "ngram": Provider(counted),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a file or a folder of works")
    parser.add_argument("--name", help="what to call it in the table; default: its file name")
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="char")
    parser.add_argument("--provider", choices=PROVIDERS, default="qflux")
    add_training(parser, "the training curves")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seconds", type=float, help="train so long instead of --steps")
    arguments = parser.parse_args()
    provider = PROVIDERS[arguments.provider]
    reason = provider.missing()
    if reason is not None:
        parser.error(f"--provider {arguments.provider}: {reason}")
    try:
        options = optimizer_options(arguments)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)

    split = load_text(arguments.data)
    vocabulary = make_vocabulary(arguments.vocabulary, split.text)
    task = Task(
        arguments,
        options,
        vocabulary.size,
        [vocabulary.encode(work) for work in split.train.values()],
        [vocabulary.encode(work) for work in split.validation.values()],
    )
    common = {
        **environment(torch.device(arguments.device)),
        "dataset": arguments.name or Path(arguments.data).stem,
        "provider": arguments.provider,
        "vocabulary": vocabulary.size,
    }
    common = {name: value for name, value in common.items() if name in COLUMNS}
    limit = f"{arguments.seconds or arguments.steps} {'s' if arguments.seconds else 'steps'}"
    for run in provider.runs(task):
        row = {**common, **run.row}
        shown = ("provider", "changes", "rate", "seed", "parameters", "steps", "ms_per_step")
        print(*(f"{name} {row[name]}" for name in shown if row.get(name)), end=" ")
        print(f"validation loss {row['validation_loss']:.4f}", flush=True)
        if arguments.curves and run.curve:
            points = [{**row, "limit": limit, **point} for point in run.curve]
            append(arguments.curves, CURVE_COLUMNS, points)
        if arguments.output:
            append(arguments.output, COLUMNS, [row])


if __name__ == "__main__":
    main()
