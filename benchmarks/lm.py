"""Language models of equal budget: `qflux`, a transformer, and counting. See benchmarks/README.md.

    python benchmarks/lm.py --data tinyshakespeare.txt --provider qflux --seeds 0 1 2
    python benchmarks/lm.py --data tinyshakespeare.txt --provider transformer --rate 4e-3
    python benchmarks/lm.py --data tinyshakespeare.txt --provider ngram

Optimiser, schedule, batches and validation are the same for every provider.
"""

from __future__ import annotations

import argparse
import ast
import csv
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import torch
from common import environment
from torch import Tensor, nn
from torch.nn import functional as F

import qflux.models.layers
from qflux import QuantumFluxConfig, QuantumFluxLM
from qflux.text.data import IGNORED_LABEL, TrainingWindows, evaluation_batches, load_text
from qflux.text.vocabulary import VOCABULARIES, make_vocabulary
from qflux.train.loop import TrainingOptions
from qflux.train.schedules import learning_rate_at
from qflux.train.step import make_optimizer
from qflux_kernels import Interaction, interact

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


# --- the transformer ---


@dataclass(frozen=True)
class TransformerConfig:
    """A pre-norm transformer: 4 layers, width 128 and 4 heads are nanoGPT's CPU model.

    Args:
        vocab_size: number of token ids.
        num_layers, hidden_dim, num_heads, mlp_ratio: the shape.
        context_length: only learned positions are limited to it.
        positions: "rotary" or "learned".
        tied: the head shares the embedding's weights.
        bias: biases in linear maps and norms.
        conv_width: taps of a causal depthwise convolution before the projections; 0: none.
        mlp_conv: one before the MLP too, of the same width.
        mlp: "gelu" or "swiglu" (at two thirds of the width: equal parameters).
        init: "torch" (its defaults) or "gpt2" (0.02, residual outputs by 1/sqrt(2 L)).
        theta: base of the rotary frequencies.
        dropout: on the residual branches.
    """

    vocab_size: int
    num_layers: int = 4
    hidden_dim: int = 128
    num_heads: int = 4
    mlp_ratio: float = 4.0
    context_length: int = 64
    positions: str = "rotary"
    tied: bool = False
    bias: bool = True
    conv_width: int = 0
    mlp_conv: bool = False
    mlp: str = "gelu"
    init: str = "torch"
    theta: float = 10000.0
    dropout: float = 0.0


class Rotary(nn.Module):
    """Rotary positions of a head of even width (Su et al. 2021)."""

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        frequency = theta ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos - right * sin, left * sin + right * cos), -1)


class Convolution(nn.Conv1d):
    """Causal depthwise convolution, `(B, S, H)` to `(B, S, H)`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x.transpose(1, 2), (self.kernel_size[0] - 1, 0))
        return super().forward(padded).transpose(1, 2)


class TransformerLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_dim, config.bias
        self.heads, self.swiglu = config.num_heads, config.mlp == "swiglu"
        self.attention_norm = nn.LayerNorm(hidden, bias=bias)
        self.conv = self.mlp_conv = nn.Identity()
        if config.conv_width:
            self.conv = Convolution(hidden, config.conv_width)
        if config.conv_width and config.mlp_conv:
            self.mlp_conv = Convolution(hidden, config.conv_width)
        self.inputs = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.output = nn.Linear(hidden, hidden, bias=bias)
        self.rotary = nn.Identity()
        if config.positions == "rotary":
            self.rotary = Rotary(hidden // self.heads, config.theta)
        self.mlp_norm = nn.LayerNorm(hidden, bias=bias)
        inner = round(config.mlp_ratio * hidden * (2 / 3 if self.swiglu else 1))
        self.up = nn.Linear(hidden, inner * (2 if self.swiglu else 1), bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        joint = self.inputs(self.conv(self.attention_norm(x)))
        parts = joint.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        heard = F.scaled_dot_product_attention(
            self.rotary(queries), self.rotary(keys), values, is_causal=True
        )
        x = x + self.dropout(self.output(heard.transpose(1, 2).flatten(2)))
        inner = self.up(self.mlp_conv(self.mlp_norm(x)))
        if self.swiglu:
            gate, inner = inner.chunk(2, -1)
            inner = F.silu(gate) * inner
        else:
            inner = F.gelu(inner)
        return x + self.dropout(self.down(inner))


class Transformer(nn.Module):
    """GPT-2's form."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.position = None
        if config.positions == "learned":
            self.position = nn.Parameter(
                0.02 * torch.randn(config.context_length, config.hidden_dim)
            )
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim, bias=config.bias)
        self.head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        if config.init == "gpt2":
            self.initialise_like_gpt2()
        if config.tied:
            self.head.weight = self.embedding.weight

    def initialise_like_gpt2(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            for last in (layer.output, layer.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * len(self.layers)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.position is not None:
            x = x + self.position[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


# --- counting ---


def runs(work: Tensor, length: int, vocab_size: int) -> Tensor:
    """Every run of `length` neighbouring tokens, as a number in base V."""
    count = max(0, len(work) - length + 1)
    number = torch.zeros(count, dtype=torch.int64)
    for place in range(length):
        number = number * vocab_size + work[place : place + count]
    return number


def ngram_loss(
    train: Sequence[Tensor], validation: Sequence[Tensor], vocab_size: int, order: int
) -> float:
    """Interpolated Witten-Bell n-grams on every token of the validation works but their first.

    p_1(b) = (n(b) + 1) / (N + V), and with T(a) different tokens seen after the context a,
    p_k(b|a) = (n(ab) + T(a) p_{k-1}(b|a')) / (n(a) + T(a)), a' without a's first token.
    """
    counts = torch.bincount(torch.cat(list(train)), minlength=vocab_size).double()
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    probabilities = [unigram[work[1:]] for work in validation]
    for length in range(2, order + 1):
        grams = torch.cat([runs(work, length, vocab_size) for work in train])
        grams, counts = grams.unique(return_counts=True)
        contexts, place, kinds = (grams // vocab_size).unique(
            return_inverse=True, return_counts=True
        )
        sums = torch.zeros_like(kinds).index_add_(0, place, counts)

        def look_up(wanted: Tensor, keys: Tensor, numbers: Tensor) -> Tensor:
            at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            return torch.where(keys[at] == wanted, numbers[at], 0).double()

        for work, probability in zip(validation, probabilities, strict=True):
            wanted = runs(work, length, vocab_size)
            pairs = look_up(wanted, grams, counts)
            seen = look_up(wanted // vocab_size, contexts, sums)
            different = look_up(wanted // vocab_size, contexts, kinds)
            lower = probability[length - 2 :]  # a view: tokens with enough context
            mixed = (pairs + different * lower) / (seen + different).clamp(min=1)
            lower.copy_(torch.where(seen > 0, mixed, lower))
    return -torch.cat(probabilities).log().mean().item()


# --- one run ---


def make_model(provider: str, vocab_size: int, context: int, changes: dict) -> nn.Module:
    if provider == "transformer":
        return Transformer(TransformerConfig(vocab_size, context_length=context, **changes))
    options = {"num_layers": 0} if provider == "zero-layer" else {}
    return QuantumFluxLM(
        QuantumFluxConfig(vocab_size, context_length=context, **{**options, **changes})
    )


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
    kept = []

    def recording(*args: Tensor, **options: object) -> Interaction:
        heard = interact(*args, **options)
        kept.append(heard.degree.double().mean() / ((heard.degree.shape[-1] + 1) / 2))
        return heard

    ids = max(works, key=len)[:context].to(next(model.parameters()).device)
    with mock.patch.object(qflux.models.layers, "interact", recording):
        model(ids[None])
    return torch.stack(kept).mean().item() if kept else None


def train(
    model: nn.Module,
    works: Sequence[Tensor],
    arguments: argparse.Namespace,
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
    options = TrainingOptions(
        output_dir="", learning_rate=arguments.rate, weight_decay=arguments.weight_decay
    )
    optimizer = make_optimizer(model, options)
    for group in optimizer.param_groups:
        group["betas"] = (0.9, arguments.beta2)
    step, losses, start, last_line = 0, [], clock(), 0.0
    curve, drawn = [], 0
    while True:
        now = clock() - start
        share = now / arguments.seconds if arguments.seconds else step / arguments.steps
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(share, arguments.rate, arguments.warmup)
        batch = windows.batch(step).to(device)
        summed, count = loss_of(model, batch, batch)
        loss = summed / count
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if share >= (len(curve) + 1) / 100:
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


def parse_changes(pairs: Sequence[str], kind: type) -> dict[str, object]:
    known = {field.name for field in fields(kind)}
    changes = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in known:
            raise SystemExit(f"--set: {name!r} is no field of {kind.__name__}: {sorted(known)}")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a file or a folder of works")
    parser.add_argument("--name", help="what to call it in the table; default: its file name")
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="char")
    parser.add_argument(
        "--provider",
        choices=("qflux", "zero-layer", "transformer", "ngram"),
        default="qflux",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of the configuration"
    )
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, help="train so long instead of --steps")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--beta2", type=float, default=0.99)
    parser.add_argument("--warmup", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="append rows to this CSV")
    parser.add_argument("--curves", type=Path, help="append the training curves to this CSV")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    split = load_text(arguments.data)
    vocabulary = make_vocabulary(arguments.vocabulary, split.text)
    works = [vocabulary.encode(work) for work in split.train.values()]
    held_out = [vocabulary.encode(work) for work in split.validation.values()]
    common = {
        **environment(torch.device(arguments.device)),
        "dataset": arguments.name or Path(arguments.data).stem,
        "vocabulary": vocabulary.size,
    }
    common = {name: value for name, value in common.items() if name in COLUMNS}

    def report(row: dict[str, object]) -> None:
        row = {**common, **row}
        shown = ("provider", "changes", "rate", "seed", "parameters", "steps", "ms_per_step")
        print(*(f"{name} {row[name]}" for name in shown if row.get(name)), end=" ")
        print(f"validation loss {row['validation_loss']:.4f}", flush=True)
        if arguments.output:
            append(arguments.output, COLUMNS, [row])

    if arguments.provider == "ngram":
        for order in (1, 2, 3, 5):
            loss = ngram_loss(works, held_out, vocabulary.size, order)
            report({"provider": f"{order}-gram", "validation_loss": round(loss, 4)})
        return
    kind = TransformerConfig if arguments.provider == "transformer" else QuantumFluxConfig
    changes = parse_changes(arguments.set, kind)
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        model = make_model(arguments.provider, vocabulary.size, arguments.context, changes)
        model.to(arguments.device)
        result, curve = train(model, works, arguments, seed)
        loss = validate(model, held_out, arguments.context, arguments.batch)
        kept = kept_share(model, held_out, arguments.context)
        run = {
            "provider": arguments.provider,
            "changes": " ".join(arguments.set),
            "context": arguments.context,
            "rate": arguments.rate,
            "seed": seed,
        }
        if arguments.curves:
            limit = (
                f"{arguments.seconds or arguments.steps} {'s' if arguments.seconds else 'steps'}"
            )
            append(
                arguments.curves,
                CURVE_COLUMNS,
                [{**common, **run, "limit": limit, **at} for at in curve],
            )
        report(
            {
                **run,
                "batch": arguments.batch,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "weight_decay": arguments.weight_decay,
                "beta2": arguments.beta2,
                "warmup": arguments.warmup,
                **result,
                "validation_loss": round(loss, 4),
                "kept": "" if kept is None else round(kept, 4),
            }
        )


if __name__ == "__main__":
    main()
