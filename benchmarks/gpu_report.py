"""The report of `gpu_check.py` in Markdown, from what its steps left: no torch is needed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from files import read_rows

Row = dict[str, str]
FAULTS = ("failed", "crashed")
# So many cases of a kind are named; the CSV and the log have the rest.
NAMED = 40


def facts(path: Path) -> str:
    """The head of the report, from the JSON of `gpu_object.py`."""
    found = json.loads(path.read_text()) if path.exists() else {}
    lines = [f"# GPU check on {found.get('name', 'an unknown device')}\n"]
    lines += [f"- {name}: {value}" for name, value in found.items() if name != "name"]
    return "\n".join([*lines, ""])


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def case_of(row: Row) -> str:
    """A row's case as `Case` prints it, which is how plans name it."""
    names = list(row)[: list(row).index("status")]
    return " ".join(f"{name}={row[name]}" for name in names)


def number(row: Row | None, column: str) -> float:
    """A cell, NaN where nothing was measured."""
    return float(row[column]) if row is not None and row.get(column) else math.nan


def milliseconds(row: Row) -> str:
    """What a table shows of a case: device, host, share."""
    if not row["device_ms"]:
        return row["status"]
    shown = f"{number(row, 'device_ms'):.3g} / {number(row, 'host_ms'):.3g}"
    if row["share"]:
        shown += f" ({100 * number(row, 'share'):.0f} %)"
    # A time without a graph has the gaps between launches in it.
    return shown + (" *" if row["timing"] == "events" else "")


def shape_of(row: Row) -> str:
    if row["operator"] == "project_norm":
        return f"{row['rows']}: {row['keys']} to {row['width']}"
    shape = f"{row['batch']} x {row['rows']}"
    if row["keys"] != row["rows"]:
        shape += f" x {row['keys']} keys"
    if row["width"] != "0":
        shape += f", D {row['width']}"
    if row["steps"] not in ("0", "1"):
        shape += f", {row['steps']} steps"
    return shape


def timing_tables(rows: Sequence[Row]) -> str:
    """A table for each operator: a line for each shape, score and provider, a column a mode."""
    parts = ["## Timings\n"]
    parts.append(
        "Milliseconds on the device / of a plain call by the host's clock (share of the ceiling); "
        "`*`: no CUDA graph, so launches count.\n"
    )
    timed = [row for row in rows if row["status"] in ("ok", *FAULTS)]
    for row in timed:
        if row["provider"] == "ceiling":
            parts.append(
                f"- measured ceiling, {row['operator']}: {row['rate_per_s']} {row['unit']}/s"
            )
    parts.append("")
    for operator in dict.fromkeys(row["operator"] for row in timed):
        mine = [r for r in timed if r["operator"] == operator and r["provider"] != "ceiling"]
        if not mine:
            continue
        modes = list(dict.fromkeys(row["mode"] for row in mine))
        lines: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in mine:
            dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
            line = (shape_of(row), row["score"], row["provider"] + dtype)
            lines.setdefault(line, {})[row["mode"]] = milliseconds(row)
        parts.append(f"### {operator}\n")
        parts.append(
            table(
                ["shape", "score", "provider", *modes],
                [
                    [*line, *(cells.get(mode, "") for mode in modes)]
                    for line, cells in lines.items()
                ],
            )
        )
    return "\n".join(parts)


def find(measured: Sequence[Row], /, **wanted: object) -> Row | None:
    for row in measured:
        if row["device_ms"] and all(row[name] == str(value) for name, value in wanted.items()):
            return row
    return None


def ratio(rows: Sequence[Row], ours: dict[str, object], other: dict[str, object]) -> float:
    """How many times faster ours is."""
    theirs = number(find(rows, **other), "device_ms")
    return theirs / number(find(rows, **ours), "device_ms")


Goal = tuple[str, float, Callable[[Sequence[Row]], float]]


def share(mode: str, length: int) -> Callable[[Sequence[Row]], float]:
    """Of the FMA ceiling, without values, where a hard threshold has no row pass."""
    score = "soft" if mode == "rows" else "hard"
    case = {"operator": "interact", "provider": "dense", "score": score, "width": 0, "batch": 1}
    return lambda rows: number(find(rows, **case, mode=mode, rows=length, keys=length), "share")


def against_attention(mode: str) -> Callable[[Sequence[Row]], float]:
    """The model's shape beside the heads of a transformer of its width."""
    ours = {"operator": "interact", "provider": "dense", "score": "soft", "width": 4}
    other = {"operator": "attention", "dtype": "float32", "rows": 1024, "mode": mode}
    return lambda rows: ratio(
        rows, {**ours, "batch": 384, "rows": 1024, "keys": 1024, "mode": mode}, other
    )


def against_compile(length: int) -> Callable[[Sequence[Row]], float]:
    case = {"operator": "interact", "batch": 1, "rows": length, "score": "hard", "mode": "both"}
    return lambda rows: ratio(
        rows, {**case, "provider": "dense", "width": 0}, {**case, "provider": "compile"}
    )


def sweep_rate(rows: Sequence[Row]) -> float:
    """Forwards of a million tokens in 5 ms."""
    case = {"operator": "interact", "provider": "sweep", "score": "hard", "mode": "forward"}
    return 5.0 / number(find(rows, **case, rows=1 << 20), "device_ms")


def graph_gain(rows: Sequence[Row]) -> float:
    """A plain step's time over that of its replay."""
    row = find(rows, operator="step", provider="qflux", rows=64, timing="graph")
    return number(row, "host_ms") / number(row, "device_ms")


# What only a GPU can show, and from which value on it is what was aimed at.
GOALS: list[Goal] = [
    *(
        (f"forward at S = {length:,}: share of the FMA ceiling", 0.85, share("forward", length))
        for length in (1 << 16, 1 << 18, 1 << 20)
    ),
    *(
        (f"{name} of the backward at S = {length:,}: share of the FMA ceiling", 0.75,
         share(mode, length))
        for mode, name in (("rows", "rows, soft,"), ("keys", "keys"))
        for length in (1 << 16, 1 << 18, 1 << 20)
    ),
    *(
        (f"384 x 1,024, D = 4, soft, {mode}: times as fast as SDPA", 1.0, against_attention(mode))
        for mode in ("forward", "both")
    ),
    *(
        (f"forward and backward at S = {length:,}: times as fast as torch.compile", 5.0,
         against_compile(length))
        for length in (4096, 16384)
    ),
    ("sweep at S = 1,048,576, forward: 5 ms over its time", 1.0, sweep_rate),
    ("training step of the language model, 12 x 64: plain over CUDA graph", 1.0, graph_gain),
]  # fmt: skip


def goals(rows: Sequence[Row]) -> str:
    """What was aimed at beside what was measured."""
    lines = []
    for name, least, value in GOALS:
        found = value(rows)
        verdict = "not measured" if math.isnan(found) else "reached" if found >= least else "missed"
        lines.append([name, f"{least:g}", "" if math.isnan(found) else f"{found:.3g}", verdict])
    return "## Goals\n\n" + table(["figure", "at least", "measured", ""], lines)


def gaps(rows: Sequence[Row], work: Path) -> str:
    """The cases that were planned and not timed, by name, with the reason."""
    measured = {case_of(row): row for row in rows}
    found: dict[str, list[str]] = {}
    planned = [
        line for plan in sorted(work.glob("*.plan")) for line in plan.read_text().splitlines()
    ]
    for name in dict.fromkeys([*planned, *measured]):
        row = measured.get(name)
        if row is None:
            found.setdefault("not begun", []).append(name)
        elif row["status"] != "ok":
            note = f": {row['note']}" if row["note"] else ""
            found.setdefault(row["status"], []).append(name + note)
    if not found:
        return ""
    parts = ["## Cases without a sound figure\n"]
    for status, names in found.items():
        parts.append(f"{status}, {len(names)}:\n")
        parts += [f"- {name}" for name in names[:NAMED]]
        if len(names) > NAMED:
            parts.append(f"- and {len(names) - NAMED} more")
        parts.append("")
    return "\n".join(parts)


def summary(timings: Path, work: Path, on_gpu: bool) -> str:
    """Goals, gaps and tables of what has been timed so far."""
    rows = read_rows(timings)
    if not rows and not any(work.glob("*.plan")):
        return ""
    counted = Counter(row["status"] for row in rows)
    head = ", ".join(f"{count} {status}" for status, count in counted.items())
    parts = [f"{len(rows)} cases in timings.csv: {head or 'none'}.\n"]
    if on_gpu:
        parts.append(goals(rows))
    return "\n".join([*parts, gaps(rows, work), timing_tables(rows)])
