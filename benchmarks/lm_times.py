"""Time of a training step of each model of `lm.py`, taken in turn, for comparisons at equal time.

    python benchmarks/lm_times.py --data enwiki6.txt --context 1024 --batch 2 --output CSV

In every round each provider takes one step, so that other work on the machine meets all of them.
The baselines have convolutions and the gated MLP. The first `--skip` rounds are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import environment
from files import append_row
from lm import MODELS, update
from transformer import GATED, TransformerConfig

from qflux.text.data import load_text
from qflux.text.vocabulary import VOCABULARIES, make_vocabulary
from qflux.text.windows import TrainingWindows
from qflux.train.optimizer import make_optimizer
from qflux.train.options import OptimizerOptions
from qflux_kernels.checks import check_integer, check_real

COLUMNS = [
    "dataset", "provider", "context", "batch", "rate", "rounds", "ms_p20", "ms_p50", "ms_p80",
    "ratio", "device", "threads", "machine", "instruction_set", "torch", "python", "commit", "date",
]  # fmt: skip


def measure(
    names: list[str], windows: TrainingWindows, vocab_size: int, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each provider's steps, in the order of the rounds."""
    alone = arguments.threads == 1
    clock = time.process_time if alone else time.perf_counter
    options = OptimizerOptions(learning_rate=arguments.rate)
    runs = {}
    for name in names:
        torch.manual_seed(0)
        changes = GATED if issubclass(MODELS[name].config, TransformerConfig) else {}
        config = MODELS[name].configuration(vocab_size, arguments.context, changes)
        model = MODELS[name].model(config)
        runs[name] = model, make_optimizer(model, options)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.skip + arguments.rounds):
        batch = windows.batch(number)
        for name, (model, optimizer) in runs.items():
            start = clock()
            update(model, optimizer, batch, options.max_gradient_norm)
            if number >= arguments.skip:
                seconds[name].append(clock() - start)
    return seconds


def parse(line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a file or a folder of works")
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="byte")
    parser.add_argument("--providers", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--skip", type=int, default=2, help="rounds before those that count")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append rows to this CSV")
    arguments = parser.parse_args(line)
    try:
        for name in ("batch", "rounds", "threads"):
            check_integer(name, getattr(arguments, name), 1)
        check_integer("context", arguments.context, 2)
        check_integer("skip", arguments.skip, 0)
        check_real("rate", arguments.rate, above=0.0)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(line: list[str] | None = None) -> None:
    arguments = parse(line)
    torch.set_num_threads(arguments.threads)
    text = load_text(arguments.data)
    vocabulary = make_vocabulary(arguments.vocabulary, text.text)
    works = [vocabulary.encode(work) for work in text.train.values()]
    windows = TrainingWindows(works, arguments.context + 1, arguments.batch, 0)
    seconds = measure(arguments.providers, windows, vocabulary.size, arguments)
    common = {
        **environment(torch.device("cpu")),
        "dataset": Path(arguments.data).stem,
        **{name: getattr(arguments, name) for name in ("context", "batch", "rate", "rounds")},
    }
    first = statistics.median(seconds[arguments.providers[0]])
    for name, taken in seconds.items():
        ordered = sorted(taken)
        row = {**common, "provider": name, "ratio": round(statistics.median(taken) / first, 3)}
        for percent in (20, 50, 80):
            at = ordered[round(percent / 100 * (len(ordered) - 1))]
            row[f"ms_p{percent}"] = round(1e3 * at, 2)
        print(f"{name} {row['ms_p50']} ms, ratio {row['ratio']}", flush=True)
        if arguments.output:
            append_row(arguments.output, COLUMNS, {column: row[column] for column in COLUMNS})


if __name__ == "__main__":
    main()
