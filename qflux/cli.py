"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

import torch

from qflux_kernels import BackendUnavailableError

from .models.presets import PRESETS, make_config
from .text.data import TextSplit, load_dataset_text, load_text, ngram_losses
from .text.vocabulary import (
    DEFAULT_BPE_SIZE,
    VOCABULARIES,
    BpeVocabulary,
    Vocabulary,
    make_vocabulary,
)
from .train.checkpoint import load_model
from .train.loop import NonFiniteLossError, TrainingOptions, train
from .train.options import ERRORS, LEARNING, PRECISIONS, TRACKERS

_USER_ERRORS = (ValueError, OSError, ImportError, BackendUnavailableError, NonFiniteLossError)
_PARSERS = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str}


def main(argv: list[str] | None = None) -> int:
    """Run `qflux` with these arguments (default: the process's); returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args([_with_hyphens(argument) for argument in arguments])
    try:
        options.run(options)
    except _USER_ERRORS as error:
        print(f"qflux {options.command}: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _with_hyphens(argument: str) -> str:
    """`--batch_size=8` as `--batch-size=8`: the spelling of the documents is accepted too."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qflux", description="Train Quantum Flux language models and generate text."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = argparse.ArgumentDefaultsHelpFormatter

    training = commands.add_parser("train", help="train on a text", formatter_class=show)
    training.set_defaults(run=_train)
    add = training.add_argument
    defaults = TrainingOptions
    add("--output-dir", required=True, help="folder for the model, its state and the metrics")
    add("--preset", choices=PRESETS, default="lm", help="network: of a document, or recommended")
    add("--data", help="text file, or folder of .txt files; by default the Shakespeare inside")
    add("--dataset", help="instead of --data, name of a Hugging Face dataset, or its folder")
    add("--dataset-config", help="configuration of the dataset")
    add("--text-column", default="text", help="of the dataset")
    add("--vocabulary", choices=VOCABULARIES, default="char", help="what a token is")
    add("--vocab-size", type=int, default=DEFAULT_BPE_SIZE, help="tokens of --vocabulary bpe")
    add("--vocabulary-file", help="GPT-2's vocab.json (beside merges.txt) or a tokenizer.json")
    add("--epochs", type=float, default=defaults.epochs, help="passes over the text")
    add("--batch-size", type=int, default=defaults.batch_size, help="windows a step")
    add("--accumulation", type=int, default=defaults.accumulation, help="parts of a batch")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="peak rate")
    add("--learning", choices=LEARNING, default=defaults.learning, help="how weights change")
    add("--use-hebbian", action="store_const", const="hebbian", dest="learning",
        default=argparse.SUPPRESS, help="the same as --learning hebbian")  # fmt: skip
    add("--hebbian-rate", type=float, default=defaults.hebbian_rate, help="peak rate")
    add("--hebbian-error", choices=ERRORS, default=defaults.hebbian_error, help="of an output")
    add("--weight-decay", type=float, default=defaults.weight_decay, help="of weight matrices")
    add("--warmup", type=float, default=defaults.warmup, help="share of the run")
    add("--max-gradient-norm", type=float, default=defaults.max_gradient_norm, help="clipping")
    add("--precision", choices=PRECISIONS, default=defaults.precision, help="of matrix products")
    add("--gradient-checkpointing", action="store_true", help="recompute layers in backward")
    add("--curriculum-length", type=int, help="window length to begin with")
    add("--curriculum-share", type=float, default=defaults.curriculum_share, help="of the run")
    add("--radius-warmup", type=float, default=defaults.radius_warmup, help="share of the run")
    add("--patience", type=int, help="stop after so many evaluations without improvement")
    add("--max-steps", type=int, help="stop after so many steps")
    add("--max-seconds", type=float, help="stop after so much time, the rate decayed by then")
    add("--log-interval", type=int, default=defaults.log_interval, help="steps")
    add("--eval-interval", type=int, default=defaults.eval_interval, help="steps")
    add("--save-interval", type=int, help="steps; by default states are saved with evaluations")
    add("--seed", type=int, default=defaults.seed, help="of weights and batches")
    add("--device", default=defaults.device, help="cpu, cuda, cuda:1 ...")
    add("--tracker", choices=TRACKERS, action="append", dest="trackers", default=[],
        help="send the metrics there too; may be repeated")  # fmt: skip
    add("--resume", action="store_true", help="continue the run in --output-dir")
    _add_model_options(training)

    generation = commands.add_parser("generate", help="continue a prompt", formatter_class=show)
    generation.set_defaults(run=_generate)
    add = generation.add_argument
    add("--model-path", "--model-dir", required=True, help="folder that training wrote")
    add("--prompt", default="\n", help="text to continue")
    add("--max-new-tokens", "--max-length", type=int, default=300, help="tokens to add")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    add("--top-k", type=int, help="keep the k most likely tokens")
    add("--top-p", type=float, help="keep the most likely tokens of this total probability")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ...")

    exporting = commands.add_parser("export", help="write a Hugging Face model")
    exporting.set_defaults(run=_export)
    add = exporting.add_argument
    add("--model-path", "--model-dir", required=True, help="folder that training wrote")
    add("--output-dir", required=True, help="folder for the Hugging Face model")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """An option for every field of the presets' configurations."""
    group = parser.add_argument_group(
        "network", "replace values of the preset; qflux.QuantumFluxConfig (lm) and "
        "qflux.CylinderConfig (flux, qfnn) say what they mean",
    )  # fmt: skip
    found: dict[str, tuple[str, list[str]]] = {}
    for preset, (kind, _) in PRESETS.items():
        for field in fields(kind):
            found.setdefault(field.name, (field.type, []))[1].append(preset)
    del found["vocab_size"]
    for name, (annotation, presets) in found.items():
        how: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if annotation == "bool"
            else {"type": _PARSERS[annotation]}
        )
        flag = "--" + name.replace("_", "-")
        group.add_argument(
            flag, dest=f"model_{name}", default=argparse.SUPPRESS, help=", ".join(presets), **how
        )


def _text(options: argparse.Namespace) -> TextSplit:
    if options.dataset is None:
        return load_text(options.data)
    if options.data is not None:
        raise ValueError("data and dataset cannot both be given")
    return load_dataset_text(options.dataset, options.dataset_config, column=options.text_column)


def _vocabulary(options: argparse.Namespace, text: TextSplit) -> Vocabulary:
    if options.vocabulary_file is not None:
        return BpeVocabulary.read(options.vocabulary_file)
    # Characters of the held-out works need ids; their pairs must not be counted.
    source = text.text if options.vocabulary == "char" else "".join(text.train.values())
    return make_vocabulary(options.vocabulary, source, options.vocab_size)


def _train(options: argparse.Namespace) -> None:
    text = _text(options)
    vocabulary = _vocabulary(options, text)
    given = vars(options)
    changes = {
        name.removeprefix("model_"): value
        for name, value in given.items()
        if name.startswith("model_")
    }
    config = make_config(options.preset, vocabulary.size, **changes)
    names = {field.name for field in fields(TrainingOptions)}
    training = {name: value for name, value in given.items() if name in names}
    training["trackers"] = tuple(options.trackers)
    result = train(config, text, vocabulary, TrainingOptions(**training))
    baselines = ngram_losses(
        [vocabulary.encode(work) for work in text.train.values()],
        [vocabulary.encode(work) for work in text.validation.values()],
        vocabulary.size,
    )
    print(f"{result.steps} steps in {result.seconds:.1f} s, files in {options.output_dir}")
    print("validation loss, nats per token:")
    print(f"  model    {result.validation_loss:.3f} (best {result.best_validation_loss:.3f})")
    for name, loss in baselines.items():
        print(f"  {name:8} {loss:.3f}")


def _generate(options: argparse.Namespace) -> None:
    model, vocabulary = load_model(options.model_path, options.device)
    prompt = vocabulary.encode(options.prompt)[None].to(options.device)
    ids = model.generate(
        prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )
    print(vocabulary.decode(ids[0]))


def _export(options: argparse.Namespace) -> None:
    # Only here: importing transformers takes seconds, and it may be missing.
    from .hf import export

    export(options.model_path, options.output_dir)
    print(f"Hugging Face model in {options.output_dir}")
