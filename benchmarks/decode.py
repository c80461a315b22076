"""Decoding: prefill, latency of a token and bytes of the cache, against the context.

python benchmarks/decode.py [--contexts 1024 4096 16384] [--batches 1 32] [--tokens 32]
python benchmarks/decode.py --contexts 1024 16384 102400 1048576 --batches 1 --prefill-to 0 \
    --output CSV --plot SVG
python benchmarks/decode.py --stream 1048576
python benchmarks/decode.py --heads 256 4096 50257 --threads 1

`lm` is the default model with its cache; `transformer` is that of `transformer.py`, of nearly as
many parameters, with keys and values in a buffer and `scaled_dot_product_attention`. `windowed` and
`state-space` are what a transformer becomes with attention to the last 256 tokens only and with
Mamba-2's recurrence: they keep as much of any past, and are beside the others for what that costs.
Weights are as they start. All take turns, so that other work on the machine meets each of them; a
turn has 32 tokens, since one that finds another's keys in the caches of the processor tells
nothing of a model that decodes alone. One thread (`--threads 1`) is timed by its processor time,
several by the wall clock.

A context beyond `--prefill-to` is not read: caches are filled with what they would have. For `lm`
that is keys and values of a prompt, drawn again for all positions and turned as these turn keys;
the time of the transformer does not depend on the numbers.

`--stream` appends tokens one after another to an `InteractionCache` of eight cylinders and attends
with each; it gives microseconds a token, all work on the index included, over blocks of 4,096.

`--heads` times the published networks with so many token ids, by their modules and by the collapsed
head that they have in evaluation: a token behind 256 others, and logits of 1,024 tokens. The two
take turns, and the smallest times are given.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, percentile
from files import append_row
from lm_curves import save_svg, svg_pyplot
from state_space import StateSpaceConfig, StateSpaceModel
from torch import Tensor
from transformer import Transformer, TransformerConfig, TransformerLayer
from windowed import WindowedConfig, WindowedTransformer

from qflux import QuantumFluxConfig, make_config, make_model
from qflux.models.base import CausalLM
from qflux.models.embedding import rotate
from qflux_kernels import InteractionCache, Sparsemax
from qflux_kernels.checks import check_integer

VOCABULARY = 256
CHUNK = 1024
# Tokens of the prompt that caches are filled from, and that are filled at once.
SAMPLE, FILLED = 4096, 65536
STREAMED, BLOCK = 8, 4096
# Tokens behind a filled cache before those that are timed: the first has the index to build.
WARMING = 2
# Tokens of one provider before it is the other's turn.
TURN = 32


@dataclass
class Decoder:
    """A model with an empty cache: `read` gives the logits `(B, V)` behind further tokens.

    `fill` makes a cache one of so many tokens.
    """

    read: Callable[[Tensor], Tensor]
    fill: Callable[[int], None]
    cache_bytes: Callable[[], int]
    parameters: int


def flux(batch: int, context: int) -> Decoder:
    torch.manual_seed(0)
    model = make_model(QuantumFluxConfig(vocab_size=VOCABULARY)).eval()
    cache = model.new_cache(batch, capacity=context)

    def fill(length: int) -> None:
        sample = min(SAMPLE, length)
        model.prefill(torch.randint(VOCABULARY, (batch, sample)), cache)
        for start in range(sample, length, FILLED):
            position = torch.arange(start, min(start + FILLED, length))
            drawn = torch.randint(sample, position.shape)
            angle = model.rotation.at(position - drawn)
            for layer in cache.layers:
                keys, values = layer.attention.keys, layer.attention.values
                layer.attention.append(rotate(keys[:, :, drawn], angle), values[:, :, drawn])
        with cache.reading(torch.zeros(batch, length - sample, dtype=torch.int64)):
            pass

    read = lambda ids: model.prefill(ids, cache)  # noqa: E731
    return Decoder(read, fill, lambda: cache.nbytes, _count(model))


def transformer(batch: int, context: int) -> Decoder:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=VOCABULARY)
    model = Transformer(config).eval()
    width = config.hidden_dim // config.num_heads
    past = torch.empty(config.num_layers, 2, batch, config.num_heads, context, width)
    length = 0

    def read(ids: Tensor) -> Tensor:
        nonlocal length
        x = model.embedding(ids)
        for layer, buffer in zip(model.layers, past, strict=True):
            x = attend(layer, x, buffer, length)
        length += ids.shape[1]
        return model.head(model.norm(x[:, -1]))

    def fill(count: int) -> None:
        nonlocal length
        past[..., :count, :].normal_()
        length = count

    return Decoder(read, fill, lambda: past.nbytes, _count(model))


def windowed(batch: int, context: int) -> Decoder:
    del context
    torch.manual_seed(0)
    config = WindowedConfig(vocab_size=VOCABULARY)
    model = WindowedTransformer(config).eval()
    shape = batch, config.num_heads, config.window - 1, config.hidden_dim // config.num_heads
    past: list[Any] = [None] * config.num_layers
    length = 0

    def read(ids: Tensor) -> Tensor:
        nonlocal length
        x = model.embedding(ids)
        for n, layer in enumerate(model.layers):
            told, past[n] = layer.advance(layer.attention_norm(x), past[n], length)
            x = behind(layer, x, told)
        length += ids.shape[1]
        return model.head(model.norm(x[:, -1]))

    def fill(count: int) -> None:
        nonlocal length
        kept = min(count, shape[2])
        past[:] = [torch.randn(2, *shape)[..., :kept, :].unbind(0) for _ in past]
        length = count

    return Decoder(read, fill, lambda: _bytes(past), _count(model))


def recurrent(batch: int, context: int) -> Decoder:
    del context
    torch.manual_seed(0)
    config = StateSpaceConfig(vocab_size=VOCABULARY)
    model = StateSpaceModel(config).eval()
    state: list[Any] = [None] * config.num_layers

    def read(ids: Tensor) -> Tensor:
        x = model.embedding(ids)
        for n, layer in enumerate(model.layers):
            told, state[n] = layer.advance(layer.attention_norm(x), state[n])
            x = behind(layer, x, told)
        return model.head(model.norm(x[:, -1]))

    def fill(count: int) -> None:
        read(torch.randint(VOCABULARY, (batch, min(count, CHUNK))))

    return Decoder(read, fill, lambda: _bytes([state]), _count(model))


def behind(layer: TransformerLayer, x: Tensor, told: Tensor) -> Tensor:
    """The rest of a layer without convolutions, behind what tokens told one another."""
    x = x + layer.output(told)
    return x + layer.down(F.gelu(layer.up(layer.mlp_norm(x))))


def _bytes(kept: list[Any]) -> int:
    return sum(tensor.nbytes for tensors in kept for tensor in tensors)


def attend(layer: TransformerLayer, x: Tensor, past: Tensor, length: int) -> Tensor:
    """A layer on tokens `(B, n, H)` behind `length` others, whose keys and values are `past`."""
    queries, keys, values = layer.project(layer.attention_norm(x))
    end = length + x.shape[1]
    queries, keys = layer.rotary(queries, length), layer.rotary(keys, length)
    past[0, :, :, length:end], past[1, :, :, length:end] = keys, values
    # No mask for one token, which sees all.
    mask = None if x.shape[1] == 1 else torch.arange(length, end)[:, None] >= torch.arange(end)
    gathered = F.scaled_dot_product_attention(
        queries, past[0, :, :, :end], past[1, :, :, :end], attn_mask=mask
    )
    return behind(layer, x, gathered.transpose(1, 2).flatten(2))


PROVIDERS = {
    "lm": flux, "transformer": transformer, "windowed": windowed, "state-space": recurrent,
}  # fmt: skip
COLUMNS = [
    "batch", "context", "provider", "parameters", "prefill_s", "p50_ms", "p99_ms", "tokens_per_s",
    "bytes_per_token", "device", "threads", "machine", "instruction_set", "torch", "python",
    "commit", "date",
]  # fmt: skip
SHOWN = COLUMNS[:9]


def clock() -> float:
    """Seconds: of the processor where one thread does all."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def measure(batch: int, context: int, tokens: int, reads: bool) -> dict[str, dict[str, float]]:
    """Seconds of the prefill, seconds of each token sorted, and bytes, by provider."""
    room = context + tokens + WARMING
    decoders = {name: make(batch, room) for name, make in PROVIDERS.items()}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(VOCABULARY, (batch, context if reads else WARMING), generator=generator)
    found: dict[str, dict[str, float]] = {}
    last: dict[str, Tensor] = {}
    for name, decoder in decoders.items():
        if not reads:
            decoder.fill(context)
        start = clock()
        for part in prompt.split(CHUNK if reads else 1, 1):
            last[name] = decoder.read(part)
        found[name] = {"prefill": clock() - start if reads else math.nan}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for first in range(0, tokens, TURN):
        for name, decoder in decoders.items():
            for _ in range(min(TURN, tokens - first)):
                token = last[name].argmax(-1, keepdim=True)
                start = clock()
                last[name] = decoder.read(token)
                seconds[name].append(clock() - start)
    for name, decoder in decoders.items():
        found[name] |= {
            "p50": percentile(seconds[name], 50),
            "p99": percentile(seconds[name], 99),
            "tokens_per_s": batch * tokens / sum(seconds[name]),
            "bytes_per_token": decoder.cache_bytes() / (batch * room),
            "parameters": decoder.parameters,
        }
    return found


@torch.inference_mode()
def stream(tokens: int) -> None:
    """Print microseconds a token, bytes of the cache and peak resident memory along a stream."""
    torch.manual_seed(0)
    score = Sparsemax(torch.logspace(-2.3, 0, STREAMED))
    cache = InteractionCache(score=score, batch_shape=(STREAMED,), value_dim=4)
    print("tokens,us_per_token,mb_of_cache,mb_of_process")
    shown = BLOCK
    for start in range(0, tokens, BLOCK):
        count = min(BLOCK, tokens - start)
        points, values = torch.randn(2, STREAMED, count, 2), torch.randn(STREAMED, count, 4)
        began = clock()
        for n in range(count):
            cache.append(points[0, :, n : n + 1], values[:, n : n + 1])
            cache.attend(points[1, :, n : n + 1])
        spent = clock() - began
        if start + count >= min(shown, tokens):
            shown *= 2
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{start + count},{1e6 * spent / count:.1f},{cache.nbytes / 2**20:.0f},{peak:.0f}",
                flush=True,
            )


READ, BEHIND = 1024, 256
PUBLISHED = {
    "flux": ("flux", {}),
    "flux, 8 cylinders": ("flux", {"num_cylinders": 8}),
    "flux, readout last": ("flux", {"readout": "last"}),
    "qfnn": ("qfnn", {}),
}


@torch.no_grad()
def heads(sizes: list[int], turns: int) -> None:
    """Print smallest milliseconds of a token and of a text, by modules and by a collapsed head."""
    print("model,tokens,vocabulary,modules_ms,collapsed_ms,ratio")
    for name, (preset, changes) in PUBLISHED.items():
        for size in sizes:
            model = make_model(make_config(preset, size, **changes)).eval()
            for tokens in (1, READ):
                ways = [reader(model, tokens), reader(model, tokens)]
                times = [
                    # What something hangs on is called as it is.
                    (timed(ways[0], model.head), timed(ways[1]))
                    for _ in range(turns + 1)
                ]
                modules, collapsed = (1e3 * min(way) for way in zip(*times[1:], strict=True))
                print(
                    f"{name},{tokens},{size},{modules:.3f},{collapsed:.3f},"
                    f"{modules / collapsed:.2f}",
                    flush=True,
                )


def reader(model: CausalLM, tokens: int) -> Callable[[], Tensor]:
    """Logits of so many tokens: of one behind others in a cache, or of a whole text."""
    ids = torch.randint(model.config.vocab_size, (1, max(tokens, BEHIND)))
    if tokens > 1:
        return lambda: model(ids).logits
    cache = model.new_cache(1)
    model.prefill(ids, cache)
    return lambda: model.prefill(ids[:, :1], cache)


def timed(call: Callable[[], Tensor], hooked: torch.nn.Module | None = None) -> float:
    handle = None if hooked is None else hooked.register_forward_hook(lambda *_: None)
    start = clock()
    call()
    spent = clock() - start
    if handle is not None:
        handle.remove()
    return spent


def parse(line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=32, help="tokens to time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prefill-to", type=int, default=16384, help="longest context to read")
    parser.add_argument("--output", type=Path, help="append rows to this CSV")
    parser.add_argument("--plot", type=Path, help="SVG to write: milliseconds over the context")
    parser.add_argument("--stream", type=int, help="tokens of a stream to time instead")
    parser.add_argument("--heads", type=int, nargs="+", help="vocabularies to time instead")
    options = parser.parse_args(line)
    try:
        for name in ("contexts", "batches", "heads"):
            for value in getattr(options, name) or ():
                check_integer(name, value, 1)
        for name in ("tokens", "threads"):
            check_integer(name, getattr(options, name), 1)
        check_integer("prefill_to", options.prefill_to, 0)
        if options.stream is not None:
            check_integer("stream", options.stream, 1)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(line: list[str] | None = None) -> None:
    options = parse(line)
    torch.set_num_threads(options.threads)
    about = environment(torch.device("cpu"))
    print("# " + ", ".join(f"{name} {value}" for name, value in about.items()))
    if options.stream is not None:
        return stream(options.stream)
    if options.heads is not None:
        return heads(options.heads, options.tokens)
    pyplot = None if options.plot is None else svg_pyplot("decode.py --plot")
    print(",".join(SHOWN))
    rows: list[dict[str, object]] = []
    for batch in options.batches:
        for context in options.contexts:
            reads = context <= options.prefill_to
            for name, found in measure(batch, context, options.tokens, reads).items():
                row = {**about, "batch": batch, "context": context, "provider": name}
                row |= shown(found)
                rows.append({column: row[column] for column in COLUMNS})
                print(",".join(str(row[column]) for column in SHOWN), flush=True)
                if options.output is not None:
                    append_row(options.output, COLUMNS, rows[-1])
    if options.plot is not None:
        plot(pyplot, rows, options.plot)


def shown(found: dict[str, float]) -> dict[str, object]:
    """The numbers of a provider as a row has them."""
    prefill = found["prefill"]
    return {
        "parameters": int(found["parameters"]),
        "prefill_s": "" if math.isnan(prefill) else f"{prefill:.3f}",
        "p50_ms": f"{1e3 * found['p50']:.3f}",
        "p99_ms": f"{1e3 * found['p99']:.3f}",
        "tokens_per_s": f"{found['tokens_per_s']:.1f}",
        "bytes_per_token": f"{found['bytes_per_token']:.0f}",
    }


def plot(pyplot: Any, rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the median time of a token over the context, a panel for each batch."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(5.5 * len(batches), 3.6), layout="constrained", squeeze=False
    )
    for axes, batch in zip(panels[0], batches, strict=True):
        for name in PROVIDERS:
            own = [row for row in rows if row["batch"] == batch and row["provider"] == name]
            times = [float(row["p50_ms"]) for row in own]
            axes.loglog([row["context"] for row in own], times, "o-", label=name)
        title = "one sequence" if batch == 1 else f"{batch} sequences"
        axes.set(title=title, xlabel="tokens before", ylabel="milliseconds a token")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize="small")
    save_svg(figure, path)


if __name__ == "__main__":
    main()
