"""How much slower or faster than a commit: `python benchmarks/compare.py --base REF`.

The base is checked out into a git worktree and the working tree (or `--new REF`) is copied beside
it, in a temporary directory; both are built there alike. Then three parts:

    kernels   forward and backward of the operators at several shapes
    step      one training step of each model family
    build     a clean build of the compiled object, and what the test suite compiles for itself

Every round starts a process for each tree and measures case after case in both, in an order that
alternates; the first calls of a process do not count. A ratio is new time over base time, so that
more than 1 is slower; the table has the median over the rounds and the quartiles.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import commit
from compare_worker import PARTS
from files import write_csv

ROOT = Path(__file__).resolve().parents[1]
# The fixtures of tests that are modules of C++.
COMPILED = re.compile(r"\b(emulator|math_module)\b")
WORKER = Path(__file__).with_name("compare_worker.py")
SIDES = ("base", "new")
COLUMNS = [
    "part", "case", "mode", "base_ms", "new_ms", "ratio", "ratio_p25", "ratio_p75", "rounds",
    "difference", "device", "threads", "machine", "instruction_set", "torch", "python", "base",
    "commit", "date",
]  # fmt: skip


class MissingError(Exception):
    """Something could not be measured, and why."""


def git(*words: str) -> str:
    """What a git command prints.

    Raises:
        MissingError: it failed, with its last line.
    """
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise MissingError(f"git {words[0]}: {last_line(done.stderr)}")
    return done.stdout


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1]


def copy_working_tree(target: Path) -> None:
    """Everything that git tracks or would track."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextlib.contextmanager
def trees(base: str, new: str | None) -> Iterator[dict[str, Path]]:
    """The two trees, removed again at the end."""
    with tempfile.TemporaryDirectory(prefix="qflux-compare-") as folder:
        found = {side: Path(folder) / side for side in SIDES}
        worktrees = {"base": base} if new is None else {"base": base, "new": new}
        try:
            for side, ref in worktrees.items():
                git("worktree", "add", "--detach", "--quiet", str(found[side]), ref)
            if new is None:
                copy_working_tree(found["new"])
            yield found
        finally:
            for side in worktrees:
                if found[side].exists():
                    git("worktree", "remove", "--force", str(found[side]))
            git("worktree", "prune")


class Worker:
    """A process that measures cases with one tree's packages."""

    def __init__(self, tree: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, str(WORKER), "--tree", str(tree), "--device", options.device]
        command += ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
        self.errors = tree.with_name(f"{tree.name}.errors")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=tree.parent,
                env=os.environ | {"PYTHONPATH": str(tree)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.environment = self._answer()
        except MissingError:
            self.close()
            raise

    def measure(self, case: str, seconds: float) -> tuple[dict[str, float], float]:
        """Seconds of one case by mode, and the number that it computed.

        Raises:
            MissingError: the tree has no such case, or the process ended.
        """
        try:
            print(json.dumps({"case": case, "seconds": seconds}), file=self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer tells why
        found = self._answer()
        if "missing" in found:
            raise MissingError(found["missing"])
        return found["seconds"], found["value"]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        raise MissingError(f"the process ended with {code}: {last_line(self.errors.read_text())}")


@dataclass
class Measured:
    """Seconds of the rounds by (part, case, mode) and side, the values, and what is missing."""

    seconds: dict[tuple[str, str, str], dict[str, list[float]]] = field(
        default_factory=lambda: collections.defaultdict(lambda: {side: [] for side in SIDES})
    )
    values: dict[tuple[str, str], dict[str, float]] = field(
        default_factory=lambda: collections.defaultdict(dict)
    )
    missing: dict[tuple[str, str], str] = field(default_factory=dict)
    environment: dict[str, object] = field(default_factory=dict)

    def add(self, part: str, case: str, taken: dict[str, dict[str, float]]) -> None:
        """One round of one case: both sides' seconds by mode."""
        for mode in taken["new"]:
            for side in SIDES:
                self.seconds[part, case, mode][side].append(taken[side][mode])

    def rows(self) -> list[dict[str, object]]:
        """The table, in the order of measuring."""
        found = []
        for (part, case, mode), seconds in self.seconds.items():
            pairs = zip(seconds["new"], seconds["base"], strict=True)
            ratios = [new / base for new, base in pairs]
            low, middle, high = quartiles(ratios)
            row = {"part": part, "case": case, "mode": mode, "rounds": len(ratios)}
            for side in SIDES:
                row[f"{side}_ms"] = f"{1e3 * statistics.median(seconds[side]):.5g}"
            row |= {"ratio": f"{middle:.4f}", "ratio_p25": f"{low:.4f}", "ratio_p75": f"{high:.4f}"}
            values = self.values.get((part, case))
            if values:
                size = max(map(abs, values.values())) or 1.0
                row["difference"] = f"{abs(values['new'] - values['base']) / size:.1e}"
            found.append(row | {k: v for k, v in self.environment.items() if k in COLUMNS})
        return found


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def in_turn(number: int) -> tuple[str, ...]:
    """The order of the sides, another one every time."""
    return SIDES if number % 2 == 0 else SIDES[::-1]


def measure_cases(
    found: dict[str, Path], options: argparse.Namespace, measured: Measured, parts: list[str]
) -> None:
    """Rounds over the kernels and steps."""
    cases = [(part, case) for part in parts for case in PARTS[part]]
    for round_ in range(options.rounds):
        say(f"round {round_ + 1} of {options.rounds}: {', '.join(parts)}")
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for number, (part, case) in enumerate(cases):
                if (part, case) in measured.missing:
                    continue
                taken = {}
                for side in in_turn(round_ + number):
                    try:
                        if side not in workers or not workers[side].alive:
                            workers[side] = Worker(found[side], options)
                            stack.callback(workers[side].close)
                            measured.environment |= workers[side].environment
                        taken[side], value = workers[side].measure(case, options.seconds)
                    except MissingError as error:
                        measured.missing[part, case] = f"{side}: {error}"
                        break
                    measured.values[part, case][side] = value
                else:
                    measured.add(part, case, taken)


def timed(command: list[str], tree: Path, environment: dict[str, str]) -> float:
    """Seconds of a command in a tree.

    Raises:
        MissingError: it failed, with its last line.
    """
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)} | environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise MissingError(
            f"{' '.join(command[1:4])} failed: {last_line(done.stdout + done.stderr)}"
        )
    return seconds


def build_object(tree: Path, options: argparse.Namespace, clean: bool) -> float:
    """Seconds of a build of `qflux_kernels/_C`; a clean one takes nothing from ccache."""
    environment = {"QFLUX_CUDA": "1" if options.cuda else "0", "MAX_JOBS": str(options.jobs)}
    if clean:
        environment["CCACHE_DISABLE"] = "1"
    with tempfile.TemporaryDirectory(prefix="build-", dir=tree.parent) as temporary:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        return timed([*command, "--build-temp", temporary], tree, environment)


def build_fixtures(tree: Path) -> float:
    """Seconds in which the test suite compiles what its tests need, without running them.

    Only the files that use a compiled module are set up. The fixtures of others train models or run
    a program, which is no build.
    """
    found = sorted((tree / "tests").rglob("test_*.py"))
    files = [str(path) for path in found if COMPILED.search(path.read_text())]
    if not files:
        raise MissingError("no file of tests uses a compiled module")
    command = [sys.executable, "-m", "pytest", "-q", "--setup-only", *files]
    return timed(command, tree, {"CCACHE_DISABLE": "1"})


def measure_builds(found: dict[str, Path], options: argparse.Namespace, measured: Measured) -> None:
    """Rounds of clean builds; the last object of each tree stays in it."""
    cases = {
        "object": lambda tree: build_object(tree, options, clean=True),
        "test suite": build_fixtures,
    }
    for round_ in range(options.build_rounds):
        say(f"round {round_ + 1} of {options.build_rounds}: build")
        for number, (case, build) in enumerate(cases.items()):
            if ("build", case) in measured.missing:
                continue
            taken = {}
            for side in in_turn(round_ + number):
                try:
                    taken[side] = {"build": build(found[side])}
                except MissingError as error:
                    measured.missing["build", case] = f"{side}: {error}"
                    break
            else:
                measured.add("build", case, taken)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(rows: list[dict[str, object]], measured: Measured) -> None:
    print(f"\n{'case':36}{'mode':10}{'base ms':>10}{'new ms':>10}{'new / base':>12}  quartiles")
    for row in rows:
        print(
            f"{row['case']:36}{row['mode']:10}{float(row['base_ms']):10.4g}"
            f"{float(row['new_ms']):10.4g}{float(row['ratio']):12.3f}"
            f"  {float(row['ratio_p25']):.3f} to {float(row['ratio_p75']):.3f}"
        )
    print()
    for part in dict.fromkeys(row["part"] for row in rows):
        ratios = [float(row["ratio"]) for row in rows if row["part"] == part]
        print(
            f"{part}: median ratio {statistics.median(ratios):.3f} of {len(ratios)}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f}"
        )
    differing = [row["case"] for row in rows if float(row.get("difference") or 0) > 1e-4]
    if differing:
        print(f"the trees compute different numbers in: {', '.join(dict.fromkeys(differing))}")
    for (part, case), reason in measured.missing.items():
        print(f"not measured: {part}, {case}: {reason}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, metavar="REF", help="the commit to compare with")
    parser.add_argument("--new", metavar="REF", help="another commit than the working tree")
    parser.add_argument(
        "--only", nargs="+", choices=(*PARTS, "build"), default=[*PARTS, "build"], metavar="PART"
    )
    parser.add_argument("--rounds", type=int, help="of kernels and steps (default 9)")
    parser.add_argument("--build-rounds", type=int, help="of builds (default 3)")
    parser.add_argument("--seconds", type=float, help="of one case in a round (default 0.2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--cuda", action="store_true", help="build the CUDA code too")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda implies --cuda"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--jobs",
        type=int,
        default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1),
        help="compilers at a time (default MAX_JOBS)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        nargs="?",
        const=Path(),
        help="CSV to write, by default benchmarks/results/compare-BASE-NEW.csv",
    )
    options = parser.parse_args()
    defaults = {"rounds": 9, "build_rounds": 3, "seconds": 0.2}
    if options.quick:
        defaults = {"rounds": 1, "build_rounds": 1, "seconds": 0.0}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("rounds", "build_rounds", "threads", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(options, name)}")
    if options.seconds < 0:
        parser.error(f"--seconds must be >= 0, got {options.seconds}")
    options.cuda = options.cuda or options.device == "cuda"
    try:
        options.names = {
            side: commit()
            if ref is None
            else git("rev-parse", "--short=10", "--verify", f"{ref}^{{commit}}").strip()
            for side, ref in (("base", options.base), ("new", options.new))
        }
    except MissingError as error:
        parser.error(str(error))
    if options.output == Path():
        name = f"compare-{options.names['base']}-{options.names['new']}.csv"
        options.output = ROOT / "benchmarks" / "results" / name
    return options


def main() -> int:
    options = parse()
    # A termination has to remove the worktree too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    measured = Measured()
    parts = [part for part in PARTS if part in options.only]
    with trees(options.base, options.new) as found:
        if "build" in options.only:
            measure_builds(found, options, measured)
        else:
            say("building both trees")
            for side in SIDES:
                try:
                    build_object(found[side], options, clean=False)
                except MissingError as error:
                    measured.missing["build", "object"] = f"{side}: {error}"
        if ("build", "object") not in measured.missing:
            measure_cases(found, options, measured, parts)
        else:
            reason = "there is no object to measure"
            measured.missing |= {(part, case): reason for part in parts for case in PARTS[part]}
    measured.environment |= {"base": options.names["base"], "commit": options.names["new"]}
    rows = measured.rows()
    show(rows, measured)
    if options.output:
        write_csv(options.output, COLUMNS, rows)
        print(f"{len(rows)} rows in {options.output}")
    return 1 if measured.missing else 0


if __name__ == "__main__":
    sys.exit(main())
