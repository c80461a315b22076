"""Forecasts of hourly temperatures: a day is a turn of the phase.

`python examples/time_series.py` reads a year of Seattle's temperatures from the package
vega-datasets (`pip install vega-datasets`), trains on the first 80 % of it to forecast the next 24
hours from the last 96, and prints the mean absolute error in degrees Fahrenheit on the rest, beside
that of the day before (seasonal-naive) and of a GRU with as many parameters.
"""

from __future__ import annotations

import argparse
import math

import torch
from own_module import Block
from torch import Tensor, nn

PAST, AHEAD, DAY = 96, 24, 24


def temperatures() -> Tensor:
    """Hourly temperatures of 2010 in degrees Fahrenheit, `(8759,)`.

    Raises:
        ImportError: vega-datasets is missing; says how to install it.
    """
    try:
        from vega_datasets import data
    except ImportError as error:
        raise ImportError(
            f"the data need vega-datasets ({error}): pip install vega-datasets"
        ) from error
    return torch.tensor(data.seattle_temps()["temp"].to_numpy(), dtype=torch.float32)


def change_head(width: int) -> nn.Linear:
    """The last map of a forecast, which begins with no change against the day before."""
    head = nn.Linear(width, AHEAD)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class FluxForecast(nn.Module):
    """Hours are tokens; half of the cylinders turn once a day, the others by learned frequencies.

    What it gives is the change against the same hour of the day before.
    """

    def __init__(self, width: int = 24, cylinders: int = 8) -> None:
        super().__init__()
        self.inputs, self.block = (
            nn.Linear(2, width),
            Block(width, cylinders=cylinders, value_dim=4),
        )
        self.daily = cylinders // 2
        self.log_frequency = nn.Parameter(
            torch.linspace(math.log(1.0), math.log(0.02), cylinders - self.daily)
        )
        self.head = change_head(width)

    def forward(self, past: Tensor) -> Tensor:
        """Changes `(B, 24)` for scaled temperatures `(B, PAST)`."""
        hour = torch.arange(past.shape[1])
        daily = (2 * math.pi / DAY * hour).expand(self.daily, -1)
        angle = torch.cat((daily, self.log_frequency.exp()[:, None] * hour))
        step = torch.diff(past, dim=1, prepend=past[:, :1])
        return self.head(self.block(self.inputs(torch.stack((past, step), -1)), angle)[:, -1])


class GruForecast(nn.Module):
    """The same task for a gated recurrent unit."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, width, batch_first=True), change_head(width)

    def forward(self, past: Tensor) -> Tensor:
        """Changes `(B, 24)` for scaled temperatures `(B, PAST)`."""
        step = torch.diff(past, dim=1, prepend=past[:, :1])
        return self.head(self.gru(torch.stack((past, step), -1))[0][:, -1])


def windows(series: Tensor) -> tuple[Tensor, Tensor]:
    """Every past `(N, PAST)` with what came after it, `(N, 24)`."""
    cut = series.unfold(0, PAST + AHEAD, 1)
    return cut[:, :PAST], cut[:, PAST:]


def naive(past: Tensor) -> Tensor:
    """The day before, `(N, 24)`."""
    return past[:, -DAY:]


def run(steps: int, seed: int = 0) -> dict[str, tuple[float, int]]:
    """Mean absolute error on the last fifth of the year, and parameters, by forecast."""
    series = temperatures()
    train, test = series[: int(0.8 * len(series))], series[int(0.8 * len(series)) :]
    mean, scale = train.mean(), train.std()
    (past, after), (test_past, test_after) = windows(train), windows(test)
    found = {"seasonal-naive": ((naive(test_past) - test_after).abs().mean().item(), 0)}
    for name, kind in (("flux", FluxForecast), ("gru", GruForecast)):
        torch.manual_seed(seed)
        model = kind()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for _ in range(steps):
            rows = torch.randint(len(past), (64,))
            change = (after[rows] - naive(past[rows])) / scale
            loss = (model((past[rows] - mean) / scale) - change).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            made = naive(test_past) + scale * model((test_past - mean) / scale)
        size = sum(p.numel() for p in model.parameters())
        found[name] = ((made - test_after).abs().mean().item(), size)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, (error, size) in run(options.steps, options.seed).items():
        print(f"{name:15} {error:.2f} degrees, {size:,} parameters")


if __name__ == "__main__":
    main()
