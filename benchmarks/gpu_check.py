"""Everything a GPU has to show, in one command: `make gpu-check`.

    PYTHONPATH=$PWD python benchmarks/gpu_check.py --out DIR --minutes 9
    PYTHONPATH=$PWD python benchmarks/gpu_check.py --out DIR --minutes 2 --device cpu

It needs torch, Triton for two of the providers, and no network; it installs nothing. In DIR it
leaves `report.md`, `timings.csv`, `machine.json`, `clocks.csv` and `steps.log`, each of them as far
as the run has come. First the object (the one here, or one built in place), then each operator
once, then timings, then the tests, then compute-sanitizer. Each step is a process of its own with
its own time; whatever happens to one, the next runs. What no longer fits in the minutes is left
out, and the report names it. `--device cpu` runs the same code in small, so that it is no news on
the day there is a GPU.

Exits with 0 if everything ran and passed, 1 if something failed or was left out, 2 for bad
arguments, and 3 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gpu_report import facts, summary
from gpu_schedule import NOTHING_HERE, UNTIL, Schedule, Step

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
LEFT_BY_A_RUN = ("report.md", "timings.csv", "machine.json", "clocks.csv", "steps.log")
CLOCKS = "timestamp,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,pstate"
BOTH = ("--dtypes", "float32", "float64")
# The least seconds of a step there.
ON_A_CPU = 5.0
ON_A_GPU = "there is no GPU in a run with --device cpu"


def script(name: str, *words: str) -> list[str]:
    return [sys.executable, f"benchmarks/{name}.py", *words]


def timing_steps(options: argparse.Namespace, work: Path) -> list[Step]:
    """A process for each part, so that a slow one does not take the time of the others."""
    on_gpu = options.device == "cuda"
    found = []
    for part, timeout, least, stall in (
        ("operators", 130.0, 40.0, 25.0),
        ("others", 70.0, 15.0, 25.0),
        ("training", 60.0, 15.0, 40.0),
        # One compilation takes longer than all that is timed.
        ("compile", 100.0, 20.0, 90.0),
    ):
        words = ["--part", part, "--device", options.device, "--until", UNTIL]
        words += ["--output", str(options.out / "timings.csv"), "--work", str(work)]
        step = Step(
            f"timings of {part}",
            script("gpu_timing", *words, *(["--quick"] if options.quick else [])),
            timeout=timeout,
            least=least if on_gpu else ON_A_CPU,
            mark=work / f"{part}.at",
            stall=stall,
        )
        if part == "compile" and options.quick:
            step = replace(step, command=(), not_here="a quick run compiles nothing")
        found.append(step)
    return found


def test_steps(options: argparse.Namespace) -> list[Step]:
    """pytest on what only a GPU can show, and on the tests that take a device."""
    on_gpu = options.device == "cuda"
    pytest = [sys.executable, "-m", "pytest"]
    workers = min(12, (os.cpu_count() or 1) - 1)
    spread = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
    if on_gpu:
        # The Triton tests take the GPU where there is one, and the interpreter is for elsewhere.
        wanted = "cuda or (test_triton and not interpreter)"
        words = ["tests/kernels", "tests/models", "-k", wanted, *spread]
    else:
        words = ["tests/kernels/test_project_norm.py", "-k", "cpu and bitwise"]
    return [
        Step(
            "tests of the GPU alone",
            [*pytest, "tests/kernels/test_gpu.py"] if on_gpu else [],
            timeout=90.0,
            least=20.0,
            not_here=ON_A_GPU,
        ),
        Step(
            f"tests on {options.device}",
            [*pytest, *words],
            timeout=150.0,
            least=30.0 if on_gpu else ON_A_CPU,
        ),
    ]


def sanitizer_steps(options: argparse.Namespace) -> list[Step]:
    """The operators under compute-sanitizer, in both precisions."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or f"{home}/bin/compute-sanitizer"
    # Fewer sequences than the default, and still enough for the stack that is one launch.
    smoke = script("gpu_smoke", "--device", "cuda", "--batch", "130", *BOTH)
    return [
        Step(
            f"compute-sanitizer {tool}",
            [found, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", *smoke]
            if options.device == "cuda"
            else [],
            timeout=60.0,
            least=15.0,
            # Without its cache every tensor is an allocation of its own, whose ends are seen.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            not_here=ON_A_GPU,
        )
        for tool in SANITIZERS
    ]


def gpus() -> int:
    """How many GPUs this machine shows, without asking a driver that may hang."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def parallel_step(options: argparse.Namespace) -> Step:
    """Two processes with NCCL between them; on a CPU with gloo."""
    on_gpu, there = options.device == "cuda", gpus()
    lacking = on_gpu and there < 2
    return Step(
        "two processes",
        [] if lacking else script("gpu_parallel", "--device", options.device),
        timeout=120.0,
        least=40.0 if on_gpu else ON_A_CPU,
        not_here=f"NCCL needs two GPUs, and this machine has {there}" if lacking else "",
    )


def plan(options: argparse.Namespace, work: Path) -> list[Step]:
    """All steps, the most important first."""
    on_gpu = options.device == "cuda"
    device = ["--device", options.device]
    steps = [
        Step(
            "the object",
            script("gpu_object", *device, "--facts", str(options.out / "machine.json")),
            timeout=240.0,
            least=10.0 if on_gpu else ON_A_CPU,
        ),
        Step(
            "each operator once",
            script("gpu_smoke", *device, "--batch", "384" if on_gpu else "130", *BOTH),
            timeout=60.0,
            least=10.0 if on_gpu else ON_A_CPU,
        ),
        Step(
            "compilation of each operator",
            script("gpu_smoke", *device, "--part", "compile"),
            timeout=90.0,
            least=15.0 if on_gpu else ON_A_CPU,
        ),
        *timing_steps(options, work),
        *test_steps(options),
        parallel_step(options),
        *sanitizer_steps(options),
    ]
    if options.quick:
        # What it runs is too small to be shared among threads.
        steps = [replace(s, environment={**s.environment, "OMP_NUM_THREADS": "1"}) for s in steps]
    return steps


@contextmanager
def clocks(path: Path, on_gpu: bool) -> Iterator[str]:
    """nvidia-smi beside the run: clocks, temperature and power every two seconds.

    Yields:
        What the report says of it.
    """
    program = shutil.which("nvidia-smi")
    if not on_gpu or program is None:
        yield "not logged" + (": nvidia-smi is not here" if on_gpu else f": {ON_A_GPU}")
        return
    with path.open("ab") as output:
        command = [program, f"--query-gpu={CLOCKS}", "--format=csv", "-l", "2"]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield f"in {path.name}"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for what it leaves; default: a new one")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--quick", action="store_true", help="with --device cpu: tiny sizes, one sample each"
    )
    options = parser.parse_args(words)
    if not options.minutes > 0:
        parser.error(f"--minutes must be > 0, got {options.minutes:g}")
    if options.quick and options.device != "cpu":
        parser.error("--quick is for --device cpu")
    if options.out is None:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        options.out = ROOT / "build" / "gpu-check" / now
    options.out = options.out.resolve()
    there = [name for name in LEFT_BY_A_RUN if (options.out / name).exists()]
    if there:
        parser.error(f"--out {options.out} holds {there[0]} of an earlier run: name another folder")
    return options


def main() -> int:
    options = parse()
    on_gpu = options.device == "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="qflux-gpu-check-") as folder,
        clocks(options.out / "clocks.csv", on_gpu) as logged,
    ):
        work = Path(folder)
        began = datetime.datetime.now().isoformat(" ", "seconds")

        def head() -> str:
            ran = f"- began: {began}, for at most {options.minutes:g} minutes\n- clocks: {logged}\n"
            return facts(options.out / "machine.json") + ran

        status = Schedule(
            plan(options, work),
            60 * options.minutes,
            options.out,
            ROOT,
            head,
            lambda: summary(options.out / "timings.csv", work, on_gpu),
        ).run()
    if status == NOTHING_HERE:
        print("gpu-check: no CUDA GPU is available to torch here, nothing was checked")
    print(f"gpu-check: report in {options.out / 'report.md'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
