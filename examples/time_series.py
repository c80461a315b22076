"""Forecasts of daily temperatures: a year is a turn of the phase.

`python examples/time_series.py` reads four years of Seattle's weather from the package
vega-datasets (`pip install vega-datasets`), trains on the first 80 % to forecast the highest
temperatures of the next 7 days from the last 28, and prints the mean absolute error in degrees
Celsius on the rest, beside those of the last day, of the same day a year before (seasonal-naive),
and of a GRU.
"""

from __future__ import annotations

import argparse
import math

import torch
from own_module import Block
from torch import Tensor, nn

PAST, AHEAD, YEAR = 28, 7, 365


def temperatures() -> Tensor:
    """Highest temperatures of the days of 2012 to 2015 in degrees Celsius, `(1461,)`.

    Raises:
        ImportError: vega-datasets is missing; says how to install it.
    """
    try:
        from vega_datasets import data
    except ImportError as error:
        raise ImportError(
            f"the data need vega-datasets ({error}): pip install vega-datasets"
        ) from error
    return torch.tensor(data.seattle_weather()["temp_max"].to_numpy(), dtype=torch.float32)


def points(series: Tensor) -> Tensor:
    """Each day as a temperature and a place on the circle of the year, `(N, 3)`."""
    phase = 2 * math.pi / 365.25 * torch.arange(len(series))
    return torch.stack((series, phase.cos(), phase.sin()), -1)


def change_head(width: int) -> nn.Linear:
    """The last map of a forecast, which begins with no change against the last day."""
    head = nn.Linear(width, AHEAD)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class FluxForecast(nn.Module):
    """Days are tokens, whose points turn with their place by learned frequencies."""

    def __init__(self, width: int = 24, cylinders: int = 8) -> None:
        super().__init__()
        self.inputs, self.block = (
            nn.Linear(3, width),
            Block(width, cylinders=cylinders, value_dim=4),
        )
        self.log_frequency = nn.Parameter(torch.linspace(0.0, math.log(0.02), cylinders))
        self.norm, self.head = nn.LayerNorm(width), change_head(width)

    def forward(self, past: Tensor) -> Tensor:
        """Changes against the last day `(B, AHEAD)` for days `(B, PAST, 3)`."""
        angle = self.log_frequency.exp()[:, None] * torch.arange(past.shape[1])
        return self.head(self.norm(self.block(self.inputs(past), angle)[:, -1]))


class GruForecast(nn.Module):
    """The same task for a gated recurrent unit."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, width, batch_first=True), change_head(width)

    def forward(self, past: Tensor) -> Tensor:
        """Changes against the last day `(B, AHEAD)` for days `(B, PAST, 3)`."""
        return self.head(self.gru(past)[0][:, -1])


def windows(days: Tensor) -> tuple[Tensor, Tensor]:
    """Every past `(N, PAST, 3)` with the temperatures after it, `(N, AHEAD)`."""
    cut = days.unfold(0, PAST + AHEAD, 1).transpose(1, 2)
    return cut[:, :PAST], cut[:, PAST:, 0]


def run(steps: int, seed: int = 0) -> dict[str, tuple[float, int]]:
    """Mean absolute error on the last fifth of the days, and parameters, by forecast."""
    series = temperatures()
    start = int(0.8 * len(series))
    mean, scale = series[:start].mean(), series[:start].std()
    days = points((series - mean) / scale)
    (past, after), (test_past, test_after) = windows(days[:start]), windows(days[start:])
    last = test_past[:, -1:, 0]
    before = series[start + PAST - YEAR : -YEAR].unfold(0, AHEAD, 1)
    found = {
        "last day": (scale * (last - test_after).abs().mean()).item(),
        "seasonal-naive": ((before - mean) / scale - test_after).abs().mean().item() * scale.item(),
    }
    results = {name: (error, 0) for name, error in found.items()}
    for name, kind in (("flux", FluxForecast), ("gru", GruForecast)):
        torch.manual_seed(seed)
        model = kind()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for _ in range(steps):
            rows = torch.randint(len(past), (64,))
            change = after[rows] - past[rows, -1:, 0]
            loss = (model(past[rows]) - change).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            error = scale * (last + model(test_past) - test_after).abs().mean()
        results[name] = (error.item(), sum(p.numel() for p in model.parameters()))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, (error, size) in run(options.steps, options.seed).items():
        print(f"{name:15} {error:.2f} degrees, {size:,} parameters")


if __name__ == "__main__":
    main()
