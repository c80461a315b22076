"""Draw training curves that `lm.py --curves` wrote: `python benchmarks/lm_curves.py CSV SVG`.

A panel over steps and one over seconds for each dataset and context. Seeds are averaged, which
takes curves with the same number of points; every point is the mean of up to five around it.

Trainings of several machines, or beside one another, have seconds that say little side by side.
With `--times` a step takes what `lm_times.py` measured of its provider and context, in turn with
the others; a provider that it did not measure is named and has no curve over seconds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # dataset and context
Runs = dict[str, dict[str, list[tuple[float, float, float]]]]  # label, seed: step, seconds, loss


def label_of(row: dict[str, str]) -> str:
    name = f"{row['provider']} {row['changes']}".strip()
    return f"{name}, rate {row['rate']}, {row['limit']}"


def read_curves(path: Path) -> dict[Key, Runs]:
    curves: dict[Key, Runs] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with path.open() as file:
        for row in csv.DictReader(file):
            point = tuple(float(row[name]) for name in ("step", "seconds", "train_loss"))
            curves[row["dataset"], row["context"]][label_of(row)][row["seed"]].append(point)
    return curves


def mean_curve(
    seeds: dict[str, list[tuple[float, float, float]]],
) -> tuple[list[float], list[float], list[float]]:
    """Steps, seconds and losses, each the mean over the seeds."""
    points = zip(*seeds.values(), strict=True)
    means = [[statistics.fmean(column) for column in zip(*at, strict=True)] for at in points]
    steps, seconds, losses = zip(*means, strict=True)
    return list(steps), list(seconds), list(losses)


def read_times(path: Path) -> dict[tuple[str, str], float]:
    """Seconds of a step, by provider and context."""
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (row["provider"], row["context"]): float(row["ms_p50"]) / 1000
            for row in csv.DictReader(file)
        }


def svg_pyplot(script: str) -> Any:
    """pyplot that writes the same SVG every time; ends the program where there is none."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"{script} needs matplotlib: pip install 'qflux[bench]'")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qflux"
    from matplotlib import pyplot

    return pyplot


def save_svg(figure: Any, path: Path) -> None:
    """Write a figure, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path, help="CSV of lm.py --curves")
    parser.add_argument("figure", type=Path, help="SVG to write")
    parser.add_argument("--times", type=Path, help="CSV of lm_times.py, for the seconds of a step")
    options = parser.parse_args()
    pyplot = svg_pyplot("lm_curves.py")
    curves = read_curves(options.curves)
    times = read_times(options.times) if options.times else None
    figure, panels = pyplot.subplots(
        len(curves), 2, figsize=(11.5, 3.2 * len(curves)), layout="constrained", squeeze=False
    )
    for (over_steps, over_seconds), ((dataset, context), runs) in zip(
        panels, sorted(curves.items()), strict=True
    ):
        for label, seeds in sorted(runs.items()):
            steps, seconds, losses = mean_curve(seeds)
            smooth = [statistics.fmean(losses[max(0, n - 2) : n + 3]) for n in range(len(losses))]
            [line] = over_steps.plot(steps, smooth, label=textwrap.fill(label, 36))
            if times is not None:
                step = times.get((label.split()[0].rstrip(","), context))
                if step is None:
                    print(f"no seconds: {label}, context {context}, is not in {options.times}")
                    continue
                seconds = [step * n for n in steps]
            over_seconds.plot(seconds, smooth, color=line.get_color())
        over_steps.set(
            title=f"{dataset}, context {context}", xlabel="steps", ylabel="training loss"
        )
        over_seconds.set(xlabel="seconds of training")
        over_seconds.legend(
            handles=over_steps.lines, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5)
        )
        low = min(loss for seeds in runs.values() for loss in mean_curve(seeds)[2])
        for axes in (over_steps, over_seconds):
            axes.set_ylim(low - 0.05, low + 1.7)
            axes.grid(True, alpha=0.3)
    save_svg(figure, options.figure)


if __name__ == "__main__":
    main()
