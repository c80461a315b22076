"""Measure every number of README and docs again, on the commit that is checked out.

    python benchmarks/release.py --data TEXTS            # all, some five hours of two cores
    python benchmarks/release.py --data TEXTS --list     # what would run
    python benchmarks/release.py --data TEXTS --only lm-tinyshakespeare decode
    python benchmarks/release.py --check                 # are the results of one commit?

TEXTS is a folder with tinyshakespeare.txt, enwiki6.txt and shakespeare/, a folder of works. A job
is one call of another benchmark. First those that are timed by the clock, each alone, and then
trainings, which are timed by their processor time, `--at-once` of them beside one another. What a
job wrote stays in build/bench/COMMIT, so that a run that was stopped goes on where it was. The
files of benchmarks/results are replaced when all jobs are done; if one is not, the program names it
and fails.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import commit, machine_name
from files import write_atomically, write_csv
from transformer import GATED

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
FIGURES = FOLDER.parent / "docs" / "figures"
TEXTS = ("tinyshakespeare.txt", "enwiki6.txt", "shakespeare")
GATED_CHANGES = tuple(f"{name}={value}" for name, value in GATED.items())
BASELINES = ("transformer", "windowed", "state-space")


@dataclass(frozen=True)
class Job:
    """One call of a benchmark.

    Args:
        file: the CSV of benchmarks/results that its rows belong to, without its ending.
        command: a script of this folder, or -m and a module, and its arguments; {data} and {build}
            stand for folders.
        alone: whether nothing else may run meanwhile.
        option: that takes the CSV to write, or None: what it prints is kept.
        curves: the CSV of benchmarks/results of its curves, or None.
        plot: the figure of docs/figures that it draws, without its ending, or None.
        needs: file of a job before it, whose work it reads, or None.
    """

    file: str
    command: tuple[str, ...]
    alone: bool = True
    option: str | None = "--output"
    curves: str | None = None
    plot: str | None = None
    needs: str | None = None

    @property
    def name(self) -> str:
        words = (Path(word).name for word in self.command)
        return " ".join((self.file, *(word.strip("-{}") for word in words)))


def language_model(
    dataset: str,
    provider: str,
    rate: str,
    steps: int,
    seeds: Iterable[int] = (0,),
    changes: Sequence[str] = (),
) -> Iterator[Job]:
    """Trainings of `lm.py`, one for each seed."""
    name, _, context = dataset.rpartition("-")
    text, shape = {
        "tinyshakespeare": ("tinyshakespeare.txt", "--vocabulary char --batch 12"),
        "shakespeare": ("shakespeare", "--vocabulary char --batch 12"),
        "enwiki6": ("enwiki6.txt", f"--vocabulary byte --batch {2048 // int(context) or 1}"),
    }[name]
    settings = (*GATED_CHANGES, *changes) if provider in BASELINES else tuple(changes)
    words = ("--set", *settings) if settings else ()
    for seed in seeds:
        yield Job(
            f"lm-{dataset}" if name == "enwiki6" else f"lm-{name}",
            (
                "lm.py", "--data", f"{{data}}/{text}", *shape.split(), "--context", context,
                "--provider", provider, *words, "--rate", rate, "--steps", str(steps),
                "--seeds", str(seed),
            ),
            alone=False,
            # lm-times, from which curves have their seconds, has no model that was changed.
            curves=None if changes else "lm-curves",
        )  # fmt: skip


def recall(providers: Iterable[str], options: str, seeds: Iterable[int] = (0,)) -> Iterator[Job]:
    """Trainings of `recall.py`, one for each provider and seed."""
    for provider in providers:
        for seed in seeds:
            command = ("recall.py", "--providers", provider, *options.split(), "--seeds", str(seed))
            yield Job("recall", command, alone=False, curves="recall-curves")


def published() -> Iterator[Job]:
    """What the documents' networks learn, and what the delta rule does."""
    text = "train --data {data}/tinyshakespeare.txt --context-length 64 --batch-size 12 "
    text += "--max-steps 2000 --epochs 100"
    for preset in ("flux", "qfnn"):
        for layers in (6, 0):
            for seed in range(3):
                shape = f"--preset {preset} --num-layers {layers} --hidden-dim 64 --seed {seed}"
                into = f"--output-dir {{build}}/{preset}-{layers}-{seed}"
                words = f"-m qflux {text} {shape} {into}"
                yield Job("published", tuple(words.split()), alone=False, option=None)
    for preset in ("flux", "qfnn", "lm"):
        shape = f"--preset {preset} --use-hebbian --num-layers 2 --hidden-dim 128"
        words = f"-m qflux {text} {shape} --eval-interval 500 --output-dir {{build}}/delta-{preset}"
        yield Job("published", tuple(words.split()), alone=False, option=None)


LONG_RECALL = (
    "--length 256 --pairs 32 --vocabulary 160 --width 64 --cylinders 32 --batch 16 --mix 64:4 128:8"
)


def trainings() -> Iterator[Job]:
    """Those whose losses and accuracies are published, in the order in which they run."""
    seeds = range(6)
    yield from language_model("tinyshakespeare-64", "qflux", "6e-3", 2000, seeds)
    yield from language_model("tinyshakespeare-64", "transformer", "6e-3", 2000, seeds)
    # For the time of QFlux's 2,000 steps, by lm-times.
    yield from language_model("tinyshakespeare-64", "transformer", "6e-3", 1840, seeds)
    yield from language_model("enwiki6-1024", "qflux", "8e-3", 750, range(3))
    yield from language_model("enwiki6-1024", "transformer", "8e-3", 750, range(3))
    yield from language_model("enwiki6-1024", "no-geometry", "8e-3", 750, range(3))
    yield from language_model("enwiki6-1024", "windowed", "8e-3", 750, range(3))
    # What attention is worth to the transformer.
    yield from language_model("enwiki6-1024", "windowed", "8e-3", 750, range(3), ("window=1",))
    yield from language_model("enwiki6-1024", "state-space", "8e-3", 750, range(3))
    for provider in ("qflux", "no-geometry", "windowed", "state-space", "hierarchical"):
        yield from language_model("enwiki6-16384", provider, "8e-3", 94, range(3))
    yield from language_model("enwiki6-16384", "transformer", "8e-3", 94, range(3))
    # For the time of the window's 94 steps, by lm-times.
    yield from language_model("enwiki6-16384", "qflux", "8e-3", 24)
    # For the time of QFlux's 94 steps, likewise; two scales by the trainings' own times.
    for provider, steps in (
        ("transformer", 58),
        ("windowed", 370),
        ("state-space", 439),
        ("no-geometry", 682),
        ("hierarchical", 247),
    ):
        yield from language_model("enwiki6-16384", provider, "8e-3", steps)
    yield from recall(("lm",), "", range(3))
    yield from recall(("lm",), "--set own_value=scaled value_dim=8", range(2))
    rest = "soft hard gate mixture softmax no-geometry flux qfnn transformer plain-transformer"
    yield from recall(rest.split(), "")
    yield from recall(("lm",), f"{LONG_RECALL} --rate 8e-3", range(3))
    yield from recall(("lm", "transformer"), LONG_RECALL)
    yield from recall(("soft", "mixture", "transformer"), f"{LONG_RECALL} --rate 8e-3")
    # For the time of QFlux's 750 steps, by lm-times.
    yield from language_model("enwiki6-1024", "transformer", "8e-3", 674, range(3))
    for provider, steps in (("windowed", 824), ("state-space", 1008), ("no-geometry", 1407)):
        yield from language_model("enwiki6-1024", provider, "8e-3", steps, range(3))
    # And 2,198 steps for the time of QFlux's 2,000, by lm-times.
    for steps in (2000, 2198):
        yield from language_model("tinyshakespeare-64", "no-geometry", "6e-3", steps, range(3))
    yield from language_model("shakespeare-64", "qflux", "6e-3", 2000, range(3))
    for steps in (2000, 1840):
        yield from language_model("shakespeare-64", "transformer", "6e-3", steps, range(3))
    for name in ("tinyshakespeare-64", "shakespeare-64"):
        yield from language_model(name, "zero-layer", "4e-3", 2000)
        yield from language_model(name, "ngram", "4e-3", 1)
    yield from language_model("enwiki6-1024", "zero-layer", "4e-3", 750)
    yield from language_model("enwiki6-1024", "ngram", "4e-3", 1)
    yield from published()


def timings() -> Iterator[Job]:
    """What is measured by the clock, alone on the machine."""
    providers = ("qflux", "transformer", "windowed", "state-space", "no-geometry")
    for text, shape in (
        ("tinyshakespeare", "--vocabulary char --context 64 --batch 12 --rate 6e-3 --rounds 60"),
        ("enwiki6", "--context 1024 --batch 2 --rate 8e-3 --rounds 15"),
        ("enwiki6", "--context 16384 --batch 1 --rate 8e-3 --rounds 3"),
    ):
        given = ("--data", f"{{data}}/{text}.txt", *shape.split())
        yield Job("lm-times", ("lm_times.py", *given, "--providers", *providers))
    yield Job("short", ("short.py",), option=None)
    yield Job("issue-bound", ("issue_bound.py", "--threads", "1"), option=None)
    kernels = "--full --sizes 4096 65536 --kernels evolve"
    yield Job("kernels-cpu", ("kernels.py", *kernels.split()))
    yield Job("decode", ("decode.py", *DECODE.split()), plot="decode")
    yield Job("stream", ("decode.py", "--stream", "1048576"), option=None)
    heads = "--heads 256 50257 --threads 1 --tokens 7"
    yield Job("heads", ("decode.py", *heads.split()), option=None)
    yield Job("sparsemax-cpu", ("sparsemax.py", "--parts", "growth"), plot="sparsemax")
    yield Job("model", (*TRAIN.split(), "{build}/model"), option=None)
    yield Job("sparsemax-cpu", ("sparsemax.py", "--parts", "model", *MODEL), needs="model")
    yield Job("sparsemax-cpu", ("sparsemax.py", *HOSTILE.split()))
    early = "--hostile-algorithm sweep --hostile-sizes 8192 16384"
    yield Job("sparsemax-cpu", ("sparsemax.py", *HOSTILE.split(), *early.split()))
    yield Job("scaling-cpu", ("scaling.py", "--rounds", "1", "--seconds", "1"), plot="scaling")
    yield Job("bands", ("scaling.py", "--bands"), option=None)
    name = "threshold-model"
    train = TRAIN.replace("--output-dir", "--score threshold --output-dir")
    yield Job(name, (*train.split(), f"{{build}}/{name}"), option=None)
    given = ("--model", f"{{build}}/{name}", "--text", "{data}/enwiki6.txt", "--model-length")
    for length in ("16384", "65536", "262144"):
        yield Job("bands", ("scaling.py", "--bands", *given, length), option=None, needs=name)
    sizes = ("--sizes", "4096", "8192", "32768")
    yield Job("compare", ("scaling.py", "--compare", *sizes), option=None)
    row = ("--score", "0", "0", "row")
    yield Job("compare", ("scaling.py", "--compare", *sizes, *row), option=None)
    yield Job("train", ("scaling.py", "--train", "3", "--sizes", "1048576"), option=None)
    yield Job("parallel", ("parallel.py", "--tokens", "8192"), option="--csv")
    wall = "--wall --tokens 512 2048 8192 --steps 6"
    yield Job("parallel-wall", ("parallel.py", *wall.split()), option="--csv")
    yield Job("text-memory", ("text_memory.py", "--megabytes", "40"), option=None)


DECODE = "--contexts 1024 16384 102400 1048576 --batches 1 --prefill-to 0 --tokens 160"
TRAIN = (
    "-m qflux train --data {data}/enwiki6.txt --vocabulary byte --context-length 1024"
    " --batch-size 1 --max-steps 500 --epochs 100 --output-dir"
)
HOSTILE = "--parts hostile --scales 0.0003 0.001 0.05 1 50 10000 --calls 2"
MODEL = ("--model", "{build}/model", "--text", "{data}/enwiki6.txt")


def run(job: Job, data: Path, build: Path) -> str | None:
    """Do a job whose rows are not there yet; what went wrong, or None.

    Its CSV appears whole, so that one that was stopped is done again.
    """
    done, curves = build / f"{job.name}.csv", build / f"{job.name}.curves"
    if done.exists():
        print(f"there already: {job.name}", flush=True)
        return None
    first, *rest = job.command
    program = [sys.executable, first if first == "-m" else str(FOLDER / first)]
    words = [*program, *(word.format(data=data, build=build) for word in rest)]
    fresh, log = build / f"{job.name}.part", build / f"{job.name}.txt"
    for path in (fresh, curves):
        path.unlink(missing_ok=True)
    if job.option:
        words += [job.option, str(fresh)]
    if job.curves:
        words += ["--curves", str(curves)]
    if job.plot:
        words += ["--plot", str(build / f"{job.plot}.svg")]
    if "--output-dir" in words:  # of a training that was stopped
        shutil.rmtree(words[words.index("--output-dir") + 1], ignore_errors=True)
    # Trainings have a thread each, or those beside one another would share two.
    environment = os.environ if job.alone else {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as printed:
        code = subprocess.run(
            words, stdout=printed, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    minutes = (time.monotonic() - start) / 60
    print(f"{minutes:5.1f} min, exit {code}: {shlex.join(job.command)}", flush=True)
    if code != 0 or (job.option and not fresh.exists()):
        return f"{job.name}: exit {code}, see {log}"
    if job.option:
        fresh.rename(done)
    else:
        done.touch()
    return None


def collect(
    jobs: Sequence[Job], every: Sequence[Job], build: Path, results: Path, figures: Path
) -> list[Path]:
    """Replace the files that jobs wrote, by what all of them did; which these are.

    Curves of which other jobs than these have a part stay as they are.

    Raises:
        ValueError: rows of one file that have different columns.
    """
    files = []
    for name in dict.fromkeys(job.file for job in jobs):
        own = [job for job in jobs if job.file == name]
        if own[0].option is None:
            about = f"commit {build.name}, {datetime.date.today().isoformat()}, {machine_name()}"
            printed = [
                without_progress((build / f"{job.name}.txt").read_text(encoding="utf-8")).replace(
                    str(build), "{build}"
                )
                for job in own
            ]
            calls = [f"$ {shlex.join(job.command)}" for job in own]
            parts = [f"{a}\n{b.rstrip()}" for a, b in zip(calls, printed, strict=True)]
            files.append(results / f"{name}.txt")
            write_atomically(files[-1], "\n\n".join([about, *parts]) + "\n")
        else:
            files.append(results / f"{name}.csv")
            join(files[-1], [build / f"{job.name}.csv" for job in own])
    for name in dict.fromkeys(job.curves for job in jobs if job.curves):
        if any(job.curves == name and job not in jobs for job in every):
            print(f"as it was, since it has curves of other jobs too: {results / name}.csv")
            continue
        drawn = [build / f"{job.name}.curves" for job in jobs if job.curves == name]
        files.append(results / f"{name}.csv")
        join(files[-1], [path for path in drawn if path.exists()])
        files.append(figures / f"{name}.svg")
        words = [str(FOLDER / f"{name.replace('-', '_')}.py"), str(files[-2]), str(files[-1])]
        if name == "lm-curves":
            words += ["--times", str(results / "lm-times.csv")]
        subprocess.run([sys.executable, *words], check=True)
    for job in jobs:
        if job.plot:
            files.append(figures / f"{job.plot}.svg")
            write_atomically(files[-1], (build / files[-1].name).read_text(encoding="utf-8"))
    return files


def without_progress(printed: str) -> str:
    """What a program printed but for the lines that say how far a training is."""
    lines = printed.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"step [\d,]+ of [\d,]+ \(", line))


def join(target: Path, parts: Sequence[Path]) -> None:
    """One CSV of the rows of others, which have the same columns."""
    columns: list[str] = []
    rows: list[dict[str, object]] = []
    for part in parts:
        with part.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found = list(reader.fieldnames or ())
            columns = columns or found
            if found != columns:
                raise ValueError(f"{part} has the columns {found}, those before it {columns}")
            rows += reader
    write_csv(target, columns, rows)


def commits_of(results: Path, jobs: Sequence[Job]) -> dict[str, list[str]]:
    """The files that jobs write, by the commits that these name."""
    found: dict[str, list[str]] = {}
    files = {(job.file, "txt" if job.option is None else "csv") for job in jobs}
    files |= {(job.curves, "csv") for job in jobs if job.curves}
    for name, ending in sorted(files):
        path = results / f"{name}.{ending}"
        if not path.exists():
            commits = {"none"}
        elif ending == "csv":
            with path.open(newline="", encoding="utf-8") as file:
                commits = {row["commit"] for row in csv.DictReader(file)}
        else:
            about = path.read_text(encoding="utf-8").split(",", 1)[0]
            commits = {about.removeprefix("commit ")}
        for one in sorted(commits):
            found.setdefault(one, []).append(path.name)
    return found


def parse(line: Sequence[str] | None, jobs: Sequence[Job]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of texts")
    parser.add_argument("--only", nargs="+", help="names of files of benchmarks/results")
    parser.add_argument("--at-once", type=int, default=2, help="trainings beside one another")
    parser.add_argument("--list", action="store_true", help="print the jobs and end")
    parser.add_argument(
        "--check", action="store_true", help="print the commits of the results; fail if several"
    )
    options = parser.parse_args(line)
    if options.check:
        return options
    if options.data is None:
        parser.error("--data is required: a folder of texts")
    files = sorted({job.file for job in jobs})
    unknown = sorted(set(options.only or ()) - set(files))
    missing = [text for text in TEXTS if not (options.data / text).exists()]
    if unknown:
        parser.error(f"--only: {unknown} are none of {files}")
    if options.at_once < 1:
        parser.error(f"--at-once must be >= 1, got {options.at_once}")
    if missing and not options.list:
        parser.error(f"--data: {options.data} has no {missing}")
    if commit().endswith("-dirty") and not options.list:
        parser.error("what is measured has to be committed: git status names the changes")
    return options


def main(line: Sequence[str] | None = None) -> None:
    every = [*timings(), *trainings()]
    options = parse(line, every)
    if options.check:
        found = commits_of(RESULTS, every)
        for one, files in found.items():
            print(f"{one}: {' '.join(files)}")
        sys.exit(len(found) > 1)
    chosen = set(options.only or (job.file for job in every))
    chosen |= {job.needs for job in every if job.file in chosen and job.needs}
    jobs = [job for job in every if job.file in chosen]
    if options.list:
        for job in jobs:
            print(job.file, shlex.join(job.command))
        return
    data = options.data.resolve()
    build = FOLDER.parent / "build" / "bench" / commit()
    build.mkdir(parents=True, exist_ok=True)
    beside, alone = [job for job in jobs if not job.alone], [job for job in jobs if job.alone]
    failures = [run(job, data, build) for job in alone]
    with ThreadPoolExecutor(options.at_once) as pool:
        failures += pool.map(lambda job: run(job, data, build), beside)
    failures = [failure for failure in failures if failure]
    if failures:
        sys.exit("benchmarks/results is as it was:\n" + "\n".join(map(str, failures)))
    for path in collect(jobs, every, build, RESULTS, FIGURES):
        print(path)


if __name__ == "__main__":
    main()
