"""`project_norm` against LayerNorm of a linear map, by number of features and outputs.

python benchmarks/project_norm.py [--threads 1] [--rounds 10]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import MODES, Runner, percentile, speed_up, time_in_turn

from qflux_kernels import project_norm, reference

# (tokens, features, outputs)
SIZES = [
    (65536, 2, 128),
    (65536, 2, 512),
    (16384, 4, 128),
    (16384, 8, 128),
    (16384, 8, 512),
    (512, 2, 128),
]


def plain(features, weight, bias, norm_weight, norm_bias):
    return F.layer_norm(F.linear(features, weight, bias), bias.shape, norm_weight, norm_bias)


PROVIDERS = {"qflux": project_norm, "layer_norm": plain, "reference": reference.project_norm}


def build(function, tokens: int, count: int, width: int, device: torch.device) -> Runner:
    torch.manual_seed(0)
    shapes = ((tokens, count), (width, count), (width,), (width,), (width,))
    tensors = [torch.randn(shape).to(device).requires_grad_() for shape in shapes]
    grad = torch.randn(tokens, width).to(device)
    return Runner(lambda: function(*tensors), lambda out: torch.autograd.grad(out, tensors, grad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print("tokens features outputs mode      p50 ms of " + ", ".join(PROVIDERS) + "; faster by")
    for size in SIZES:
        runners = {name: build(function, *size, device) for name, function in PROVIDERS.items()}
        samples = time_in_turn(runners, device, arguments.rounds, 0.2)
        for mode in MODES:
            times = [f"{1e3 * percentile(s.calls[mode], 50):8.2f}" for s in samples.values()]
            ratios = [
                f"{speed_up(samples['qflux'], samples[name], mode):.2f}"
                for name in ("layer_norm", "reference")
            ]
            print(*size, f"{mode:9}", *times, "  ", *ratios, flush=True)


if __name__ == "__main__":
    main()
