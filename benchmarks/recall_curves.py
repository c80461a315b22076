"""Draw accuracies that `recall.py --curves` wrote: `python benchmarks/recall_curves.py CSV SVG`.

A panel over steps for each task, length, number of pairs and width. Seeds are averaged, which takes
curves with the same number of points. A run that was not finished is left out and named.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from lm_curves import mean_curve, save_svg, svg_pyplot

Key = tuple[str, int, int, int, str]  # task, length, pairs, width, mix
Runs = dict[
    str, dict[str, list[tuple[float, float, float]]]
]  # label, seed: step, seconds, accuracy


def read_curves(path: Path) -> dict[Key, Runs]:
    curves: dict[Key, Runs] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    planned: dict[tuple[Key, str, str], int] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            sizes = (int(row[name]) for name in ("length", "pairs", "width"))
            key = (row["task"], *sizes, row["mix"])
            label = f"{row['provider']} {row['changes']}".strip() + f", rate {row['rate']}"
            point = tuple(float(row[name]) for name in ("step", "seconds", "accuracy"))
            curves[key][label][row["seed"]].append(point)
            planned[key, label, row["seed"]] = int(row["steps"])
    for (key, label, seed), steps in planned.items():
        reached = curves[key][label][seed][-1][0]
        if reached < steps:
            print(f"left out: {label}, seed {seed}, which has {reached:.0f} of {steps} steps")
            del curves[key][label][seed]
            if not curves[key][label]:
                del curves[key][label]
            if not curves[key]:
                del curves[key]
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path, help="CSV of recall.py --curves")
    parser.add_argument("figure", type=Path, help="SVG to write")
    options = parser.parse_args()
    pyplot = svg_pyplot("recall_curves.py")
    curves = read_curves(options.curves)
    figure, panels = pyplot.subplots(
        len(curves), 1, figsize=(8, 3.4 * len(curves)), layout="constrained", squeeze=False
    )
    for axes, ((task, length, pairs, width, mix), runs) in zip(
        panels[:, 0], sorted(curves.items()), strict=True
    ):
        trained = f", trained on {mix.replace(' ', ', ')} too" if mix else ""
        for label, seeds in sorted(runs.items()):
            steps, _, accuracies = mean_curve(seeds)
            axes.plot(steps, accuracies, label=label)
        axes.set(
            title=f"{task}: {length} tokens, {pairs} pairs, width {width}{trained}",
            xlabel="steps",
            ylabel="accuracy",
            ylim=(0, 1.02),
        )
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    save_svg(figure, options.figure)


if __name__ == "__main__":
    main()
