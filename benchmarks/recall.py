"""Associative recall (MQAR): which attention finds the value that stood behind a key.

    python benchmarks/recall.py --providers lm transformer --output CSV --curves CSV
    python benchmarks/recall.py --providers lm --set score=sparsemax scale_max=4
    python benchmarks/recall.py --length 256 --pairs 32 --vocabulary 160 --width 64 --mix 64:4 128:8

A sequence starts with pairs of a key and its value; later each key comes once more, and the loss is
at these queries only. Task, batches, optimiser and schedule are the same for every provider. With
`--mix` steps take turns between this task and shorter ones, from which long ones are learned.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ablations import hierarchical_model, mixture_model, no_geometry, softmax_model
from arguments import add_training, optimizer_options, parse_changes
from common import environment
from files import append_row
from lm import logits_of
from state_space import StateSpaceConfig, StateSpaceModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformer import GATED, Transformer, TransformerConfig
from windowed import WindowedConfig, WindowedTransformer

from qflux.models.base import CausalLM
from qflux.models.presets import PRESETS, make_config, make_model
from qflux.text.windows import IGNORED_LABEL
from qflux.train.optimizer import make_optimizer
from qflux.train.schedules import learning_rate_at
from qflux_kernels.checks import check_choice, check_integer, check_real

COLUMNS = [
    "task", "provider", "changes", "length", "pairs", "mix", "vocabulary", "layers", "width",
    "cylinders", "batch", "rate", "seed", "parameters", "steps", "seconds", "ms_per_step",
    "train_loss", "loss", "accuracy", "queries", "kept", "weight_decay", "beta2", "warmup",
    "device", "threads", "machine", "instruction_set", "torch", "python", "commit", "date",
]  # fmt: skip
CURVE_COLUMNS = [
    "task", "provider", "changes", "length", "pairs", "mix", "vocabulary", "width", "rate", "seed",
    "commit", "steps", "step", "seconds", "accuracy", "loss",
]  # fmt: skip
TASKS = ("simple", "zoology")
FILLER = 0
EVALUATION_SEED = 2**40


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall (Arora et al. 2023, "Zoology").

    Of V tokens, 0 is filler, the others below V / 2 are keys, the rest values. A sequence has P
    pairs of a key and a value, both drawn without repetition, and then the P keys again, in places
    of their own. "simple": the places are uniform and all else is filler. "zoology": a key's
    distance is even and follows the power law p(n) ~ n^(power - 1), without repetition, and all
    else is random tokens.

    Args:
        task: "simple" or "zoology".
        length: tokens of a sequence, >= 3 P ("simple") or 4 P ("zoology").
        pairs: P, >= 1, at most the number of keys.
        vocabulary: V.
        power: of the power law, > 0. Default 0.01.

    Raises:
        TypeError, ValueError: naming the argument, its value and the allowed values.
    """

    task: str = "simple"
    length: int = 32
    pairs: int = 6
    vocabulary: int = 40
    power: float = 0.01

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        check_integer("pairs", self.pairs, 1)
        check_real("power", self.power, above=0.0)
        check_integer("vocabulary", self.vocabulary, 2 * (self.pairs + 1))
        check_integer("length", self.length, self.pairs * (3 if self.task == "simple" else 4))

    def batch(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels `(size, length)`: the value where a query stands, else -100."""
        generator = torch.Generator().manual_seed(seed)

        def draw(weights: Tensor) -> Tensor:
            """`pairs` different places of the weights, in random order, for each sequence."""
            # The largest of log w + Gumbel noise are a draw without repetition.
            noise = torch.rand(size, len(weights), generator=generator).log().neg().log().neg()
            return (weights.log() + noise).topk(self.pairs).indices

        half, start = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + draw(torch.ones(half - 1))
        values = half + draw(torch.ones(self.vocabulary - half))
        if self.task == "simple":
            places = start + draw(torch.ones(self.length - start))
            ids = torch.full((size, self.length), FILLER)
        else:
            distance = torch.arange(1, (self.length - start) // 2 + 1)
            places = start + 2 * draw(distance ** (self.power - 1))
            ids = torch.randint(self.vocabulary, (size, self.length), generator=generator)
        ids[:, :start] = torch.stack((keys, values), -1).flatten(1)
        labels = torch.full_like(ids, IGNORED_LABEL)
        return ids.scatter(1, places, keys), labels.scatter(1, places, values)


BASELINES: dict[str, type[TransformerConfig]] = {
    "transformer": TransformerConfig,
    "windowed": WindowedConfig,
    "state-space": StateSpaceConfig,
}


@dataclass(frozen=True)
class Provider:
    """A model by its preset or by one of `BASELINES`, and fields that it changes."""

    preset: str
    changes: dict[str, object]
    make: Callable[[Any], nn.Module] = make_model


def with_lm(make: Callable[[Any], nn.Module] = make_model, **changes: object) -> Provider:
    return Provider("lm", changes, make)


PROVIDERS = {
    "lm": with_lm(),
    "hard": with_lm(score="threshold", shrinkage="hard"),
    "soft": with_lm(score="threshold", shrinkage="soft"),
    "gate": with_lm(score="inverse_gate"),
    "sparsemax": with_lm(score="sparsemax"),
    "softmax": with_lm(softmax_model, score="sparsemax"),
    "no-geometry": with_lm(no_geometry, score="threshold"),
    "mixture": with_lm(mixture_model),
    "hierarchical": with_lm(hierarchical_model),
    "flux": Provider("flux", {}),
    "qfnn": Provider("qfnn", {}),
    "transformer": Provider("transformer", GATED, Transformer),
    "plain-transformer": Provider("transformer", {}, Transformer),
    "windowed": Provider("windowed", GATED, WindowedTransformer),
    "state-space": Provider("state-space", GATED, StateSpaceModel),
}


def make_network(provider: Provider, arguments: argparse.Namespace) -> nn.Module:
    """The provider's model in the size that was asked for.

    Raises:
        TypeError, ValueError: a bad value of a field, named.
    """
    shape = {
        "num_layers": arguments.layers,
        "hidden_dim": arguments.width,
        "context_length": arguments.length,
    }
    if provider.preset in BASELINES:
        kind = BASELINES[provider.preset]
        shape["num_heads"] = max(1, arguments.width // 16)
        given = parse_changes(arguments.set, kind)
        return provider.make(kind(arguments.vocabulary, **{**shape, **provider.changes, **given}))
    kind = PRESETS[provider.preset][0]
    if provider.preset == "lm":
        shape["num_cylinders"] = arguments.cylinders
    given = parse_changes(arguments.set, kind)
    made = make_config(
        provider.preset, arguments.vocabulary, **{**shape, **provider.changes, **given}
    )
    return provider.make(made)


@torch.no_grad()
def evaluate(
    model: nn.Module, recall: Recall, sequences: int, batch: int
) -> tuple[float, float, int]:
    """Accuracy and mean loss at the queries of sequences that no run trains on, and how many."""
    device = next(model.parameters()).device
    model.eval()
    right, total, count = 0, 0.0, 0
    for index in range(math.ceil(sequences / batch)):
        ids, labels = recall.batch(batch, EVALUATION_SEED + index)
        logits = logits_of(model, ids.to(device)).float()
        asked = labels != IGNORED_LABEL
        logits, labels = logits[asked.to(device)], labels[asked].to(device)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    model.train()
    return right / count, total / count, count


@torch.no_grad()
def kept_share(model: nn.Module, recall: Recall) -> float | None:
    """Of the pairs that causality allows, the share that weighs anything; None without scores."""
    if not isinstance(model, CausalLM):
        return None
    ids, _ = recall.batch(1, EVALUATION_SEED)
    layers = model(ids.to(next(model.parameters()).device), return_layers=True).layers
    visible = (recall.length + 1) / 2
    return torch.stack([layer.degree.double().mean() / visible for layer in layers]).mean().item()


def train(
    model: nn.Module,
    recall: Recall,
    arguments: argparse.Namespace,
    seed: int,
    tell: Callable[[dict[str, object]], None],
) -> dict[str, object]:
    """Train in place; columns of the run. `tell` gets each of its `--points` as it is measured.

    One thread on a CPU is timed by its processor time, anything else by the wall clock; what the
    points cost is not counted.
    """
    device = torch.device(arguments.device)
    alone = device.type == "cpu" and arguments.threads == 1
    clock = time.process_time if alone else time.perf_counter
    options = optimizer_options(arguments)
    optimizer = make_optimizer(model, options)
    tasks = mixed(recall, arguments.mix)
    losses, points, spent, start = [], 0, 0.0, clock()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step / arguments.steps, options.learning_rate, options.warmup
            )
        task = tasks[step % len(tasks)]
        sequences = arguments.batch * recall.length // task.length
        ids, labels = task.batch(sequences, (seed << 24) + step)
        logits = logits_of(model, ids.to(device))
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten().to(device),
            ignore_index=IGNORED_LABEL,
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.max_gradient_norm)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step + 1}, seed {seed}")
        if (step + 1) * arguments.points // arguments.steps > points:
            spent += clock() - start
            accuracy, mean, _ = evaluate(model, recall, 64, arguments.batch)
            point = {"step": step + 1, "seconds": round(spent, 2)}
            tell({**point, "accuracy": round(accuracy, 4), "loss": round(mean, 4)})
            points, start = points + 1, clock()
    spent += clock() - start
    return {
        "steps": arguments.steps,
        "seconds": round(spent, 1),
        "ms_per_step": round(1e3 * spent / arguments.steps, 2),
        "train_loss": round(statistics.fmean(losses[-100:]), 4),
    }


def mixed(recall: Recall, mix: list[str]) -> list[Recall]:
    """The tasks whose names are LENGTH:PAIRS, and this one.

    Raises:
        TypeError, ValueError: another form, or an impossible task; named.
    """
    tasks = []
    for name in mix:
        length, separator, pairs = name.partition(":")
        if not (separator and length.isdecimal() and pairs.isdecimal()):
            raise ValueError(f"mix must be LENGTH:PAIRS, got {name!r}")
        tasks.append(replace(recall, length=int(length), pairs=int(pairs)))
        check_integer("length of mix", int(length), 1, recall.length)
    return [*tasks, recall]


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Recall]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=["lm"])
    add_training(parser, "accuracies over training")
    parser.add_argument("--task", choices=TASKS, default="simple")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument(
        "--mix",
        nargs="*",
        default=[],
        metavar="LENGTH:PAIRS",
        help="tasks to train on in turn with this one, as many tokens of each",
    )
    parser.add_argument("--vocabulary", type=int, default=40, help="filler, keys and values")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--cylinders", type=int, default=16, help="of the preset lm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=20, help="accuracies of the curve")
    parser.add_argument("--sequences", type=int, default=512, help="of the last evaluation")
    arguments = parser.parse_args(argv)
    try:
        recall = Recall(arguments.task, arguments.length, arguments.pairs, arguments.vocabulary)
        mixed(recall, arguments.mix)
        optimizer_options(arguments)
        for name in ("layers", "width", "cylinders", "batch", "steps", "sequences", "threads"):
            check_integer(name, getattr(arguments, name), 1)
        check_integer("points", arguments.points, 0)
        for name in arguments.providers:
            make_network(PROVIDERS[name], arguments)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return arguments, recall


def main() -> None:
    arguments, recall = parse()
    torch.set_num_threads(arguments.threads)
    columns = (
        "task", "length", "pairs", "vocabulary", "layers", "width", "batch", "rate",
        "weight_decay", "beta2", "warmup",
    )  # fmt: skip
    common = {
        "steps": arguments.steps,
        **environment(torch.device(arguments.device)),
        **{name: getattr(arguments, name) for name in columns},
        "changes": " ".join(arguments.set),
        "mix": " ".join(arguments.mix),
    }
    for name in arguments.providers:
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            model = make_network(PROVIDERS[name], arguments).to(arguments.device)
            run = {**common, "provider": name, "seed": seed}

            def tell(point: dict[str, object], run: dict[str, object] = run) -> None:
                if arguments.verbose:
                    print(*(f"{key} {value}" for key, value in point.items()), flush=True)
                if arguments.curves:
                    append(arguments.curves, CURVE_COLUMNS, {**run, **point})

            result = train(model, recall, arguments, seed, tell)
            accuracy, loss, queries = evaluate(model, recall, arguments.sequences, arguments.batch)
            kept = kept_share(model, recall)
            config = getattr(model, "config", None)
            row = {
                **run,
                "cylinders": getattr(config, "num_cylinders", ""),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                **result,
                "loss": round(loss, 4),
                "accuracy": round(accuracy, 4),
                "queries": queries,
                "kept": "" if kept is None else round(kept, 4),
            }
            shown = ("provider", "changes", "rate", "seed", "parameters", "steps", "ms_per_step")
            print(*(f"{key} {row[key]}" for key in shown if row[key] != ""), end=" ")
            print(f"accuracy {accuracy:.4f}", flush=True)
            if arguments.output:
                append(arguments.output, COLUMNS, row)


def append(path: Path, columns: list[str], row: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    append_row(path, columns, {name: row.get(name, "") for name in columns})


if __name__ == "__main__":
    main()
