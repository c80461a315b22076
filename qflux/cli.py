"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import sys

import torch

from qflux_kernels import BackendUnavailableError

from .checkpoint import load_model
from .config import BACKENDS, SCORES, QuantumFluxConfig
from .data import VOCABULARIES, load_text, make_vocabulary, ngram_losses
from .training import NonFiniteLossError, TrainingOptions, train

_USER_ERRORS = (ValueError, OSError, BackendUnavailableError, NonFiniteLossError)


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
    add("--output-dir", required=True, help="folder for the model, its state and the metrics")
    add("--data", help="text file, or folder of .txt files; by default the Shakespeare inside")
    add("--vocabulary", choices=VOCABULARIES, default="char", help="what a token is")
    add("--epochs", type=float, default=TrainingOptions.epochs, help="passes over the text")
    add("--batch-size", type=int, default=TrainingOptions.batch_size, help="windows a step")
    add("--context-length", type=int, default=QuantumFluxConfig.context_length, help="tokens")
    add("--learning-rate", type=float, default=TrainingOptions.learning_rate, help="peak rate")
    add("--num-layers", type=int, default=QuantumFluxConfig.num_layers, help="evolution layers")
    add("--hidden-dim", type=int, default=QuantumFluxConfig.hidden_dim, help="hidden width")
    add("--num-cylinders", type=int, default=QuantumFluxConfig.num_cylinders, help="a token")
    add("--value-dim", type=int, default=QuantumFluxConfig.value_dim, help="0: states alone")
    add("--score", choices=SCORES, default=QuantumFluxConfig.score, help="pair score")
    add("--dropout", type=float, default=QuantumFluxConfig.dropout, help="probability")
    add("--max-steps", type=int, help="stop after so many steps")
    add("--max-seconds", type=float, help="stop after so much time, the rate decayed by then")
    add("--eval-interval", type=int, default=TrainingOptions.eval_interval, help="steps")
    add("--seed", type=int, default=TrainingOptions.seed, help="of weights and batches")
    add("--device", default=TrainingOptions.device, help="cpu, cuda, cuda:1 ...")
    add("--backend", choices=BACKENDS, default=QuantumFluxConfig.backend, help="of the kernels")
    add("--resume", action="store_true", help="continue the run in --output-dir")

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
    return parser


def _train(options: argparse.Namespace) -> None:
    text = load_text(options.data)
    vocabulary = make_vocabulary(options.vocabulary, text.text)
    config = QuantumFluxConfig(
        vocab_size=vocabulary.size,
        num_layers=options.num_layers,
        num_cylinders=options.num_cylinders,
        hidden_dim=options.hidden_dim,
        context_length=options.context_length,
        value_dim=options.value_dim,
        score=options.score,
        dropout=options.dropout,
        backend=options.backend,
    )
    result = train(
        config,
        text,
        vocabulary,
        TrainingOptions(
            output_dir=options.output_dir,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            max_steps=options.max_steps,
            max_seconds=options.max_seconds,
            eval_interval=options.eval_interval,
            seed=options.seed,
            device=options.device,
            resume=options.resume,
        ),
    )
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
