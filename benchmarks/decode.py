"""Decoding: prefill, latency of a token and bytes of the cache, against the context.

python benchmarks/decode.py [--contexts 1024 4096 16384] [--batches 1 32] [--tokens 32]

`lm` is the default model with its cache; `transformer` is that of `transformer.py`, of nearly as
many parameters, with keys and values in a buffer and `scaled_dot_product_attention`. Weights are
as they start. Tokens of the two take turns, so that other work on the machine meets both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import environment, percentile
from torch import Tensor
from transformer import Transformer, TransformerConfig, TransformerLayer

from qflux import QuantumFluxConfig, make_model
from qflux_kernels.checks import check_integer

VOCABULARY = 256
CHUNK = 1024


@dataclass
class Decoder:
    """A model with an empty cache: `read` gives the logits `(B, V)` behind further tokens."""

    read: Callable[[Tensor], Tensor]
    cache_bytes: Callable[[], int]
    parameters: int


def flux(batch: int, context: int) -> Decoder:
    torch.manual_seed(0)
    model = make_model(QuantumFluxConfig(vocab_size=VOCABULARY)).eval()
    cache = model.new_cache(batch, capacity=context)
    return Decoder(lambda ids: model.prefill(ids, cache), lambda: cache.nbytes, _count(model))


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

    return Decoder(read, lambda: past.nbytes, _count(model))


def attend(layer: TransformerLayer, x: Tensor, past: Tensor, length: int) -> Tensor:
    """A layer on tokens `(B, n, H)` behind `length` others, whose keys and values are `past`."""
    joint = layer.inputs(layer.attention_norm(x))
    parts = joint.unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    end = length + x.shape[1]
    position = torch.arange(length, end)
    angle = position[:, None] * layer.rotary.frequency
    queries, keys = (turn(points, angle) for points in parts[:2])
    past[0, :, :, length:end], past[1, :, :, length:end] = keys, parts[2]
    # No mask for one token, which sees all.
    mask = None if x.shape[1] == 1 else position[:, None] >= torch.arange(end)
    gathered = F.scaled_dot_product_attention(
        queries, past[0, :, :, :end], past[1, :, :, :end], attn_mask=mask
    )
    x = x + layer.output(gathered.transpose(1, 2).flatten(2))
    return x + layer.down(F.gelu(layer.up(layer.mlp_norm(x))))


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions, as `transformer.Rotary` has them, at angles `(n, width / 2)`."""
    left, right = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((left * cos - right * sin, left * sin + right * cos), -1)


PROVIDERS = {"lm": flux, "transformer": transformer}


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def measure(batch: int, context: int, tokens: int) -> dict[str, dict[str, float]]:
    """Seconds of the prefill, seconds of each token sorted, and bytes, by provider."""
    decoders = {name: make(batch, context + tokens) for name, make in PROVIDERS.items()}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(VOCABULARY, (batch, context), generator=generator)
    found: dict[str, dict[str, float]] = {}
    last: dict[str, Tensor] = {}
    for name, decoder in decoders.items():
        start = time.perf_counter()
        for part in prompt.split(CHUNK, 1):
            last[name] = decoder.read(part)
        found[name] = {"prefill": time.perf_counter() - start}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(tokens):
        for name, decoder in decoders.items():
            token = last[name].argmax(-1, keepdim=True)
            start = time.perf_counter()
            last[name] = decoder.read(token)
            seconds[name].append(time.perf_counter() - start)
    for name, decoder in decoders.items():
        found[name] |= {
            "p50": percentile(seconds[name], 50),
            "p99": percentile(seconds[name], 99),
            "tokens_per_s": batch * tokens / sum(seconds[name]),
            "bytes_per_token": decoder.cache_bytes() / (batch * (context + tokens)),
            "parameters": decoder.parameters,
        }
    return found


def parse(line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=32, help="tokens to time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(line)
    try:
        for name in ("contexts", "batches"):
            for value in getattr(options, name):
                check_integer(name, value, 1)
        for name in ("tokens", "threads"):
            check_integer(name, getattr(options, name), 1)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(line: list[str] | None = None) -> None:
    options = parse(line)
    torch.set_num_threads(options.threads)
    about = environment(torch.device("cpu"))
    print("# " + ", ".join(f"{name} {value}" for name, value in about.items()))
    print("batch,context,provider,parameters,prefill_s,p50_ms,p99_ms,tokens_per_s,bytes_per_token")
    for batch in options.batches:
        for context in options.contexts:
            for name, row in measure(batch, context, options.tokens).items():
                print(
                    f"{batch},{context},{name},{row['parameters']},{row['prefill']:.3f},"
                    f"{1e3 * row['p50']:.3f},{1e3 * row['p99']:.3f},{row['tokens_per_s']:.1f},"
                    f"{row['bytes_per_token']:.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
