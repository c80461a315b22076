"""Train on the Shakespeare that comes with the package, compare, generate, and time the kernels.

`python examples/demo.py` takes about two and a half minutes on two cores. It prints the validation
loss of the model, of the same model without its layers, and of unigram and bigram
counts, all on the held-out play; then a passage in the model's words; then the kernel table of
`benchmarks/kernels.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from qflux import QuantumFluxConfig, TrainingOptions, load_text, make_vocabulary, ngram_losses
from qflux import train as train_model

KERNEL_TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "kernels.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=110.0, help="training time of the model")
    parser.add_argument("--ablation-seconds", type=float, default=25.0, help="of the ablation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    text = load_text()
    vocabulary = make_vocabulary("char", text.text)
    config = QuantumFluxConfig(vocab_size=vocabulary.size)
    train_size, held_out_size = (
        sum(map(len, works.values())) for works in (text.train, text.validation)
    )
    print(
        f"{len(text.train)} works, {train_size:,} characters, to train on; "
        f"held out: {', '.join(text.validation)}, {held_out_size:,} characters"
    )

    def run(name: str, config: QuantumFluxConfig, seconds: float):
        print(f"\ntraining {name} for {seconds:.0f} s")
        with tempfile.TemporaryDirectory() as folder:
            return train_model(
                config,
                text,
                vocabulary,
                TrainingOptions(
                    output_dir=folder,
                    epochs=1000,
                    max_seconds=seconds,
                    eval_interval=None,
                    seed=options.seed,
                ),
            )

    layers = f"{config.num_layers} layers"
    result = run(f"{layers}", config, options.seconds)
    ablation = run("no layers", dataclasses.replace(config, num_layers=0), options.ablation_seconds)
    baselines = ngram_losses(
        [vocabulary.encode(work) for work in text.train.values()],
        [vocabulary.encode(work) for work in text.validation.values()],
        vocabulary.size,
    )

    print("\nvalidation loss, nats per character")
    rows = [
        (layers, result.validation_loss, f"{parameters(result.model):,} parameters"),
        ("no layers", ablation.validation_loss, f"{parameters(ablation.model):,}"),
        ("bigram counts", baselines["bigram"], ""),
        ("unigram counts", baselines["unigram"], ""),
    ]
    for name, loss, remark in rows:
        print(f"  {name:20} {loss:6.3f}   {remark}".rstrip())

    print("\na passage at temperature 0.8\n")
    ids = result.model.generate(
        vocabulary.encode("\n")[None],
        400,
        temperature=0.8,
        generator=torch.Generator().manual_seed(options.seed),
    )
    print(vocabulary.decode(ids[0]).strip())

    if KERNEL_TABLE.exists():
        print(flush=True)
        return subprocess.run([sys.executable, str(KERNEL_TABLE), "--quick"]).returncode
    return 0


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
