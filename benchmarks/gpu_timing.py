"""Times the cases of `gpu_cases.py`, a row of a CSV each, on the disk as soon as it is measured.

    python benchmarks/gpu_timing.py --part operators --output timings.csv --work DIR

On a GPU a case is captured as a CUDA graph, whose replays are timed by events: the time of the
device alone. Beside it stands the time of a plain call by the host's clock, Python and launches
included. On a CPU both are the host's clock.

In `--work` the process leaves its plan, PART.plan, a case a line, and in PART.at the case under
way. If it dies or hangs there, it can be started again with the same words: it notes that case as
crashed and goes on behind it. It exits with 0, with 1 if a case failed, with INCOMPLETE if some
were left out, and with LOST where it has to be started again.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import environment, peak_mb, percentile, synchronize
from files import append_row, read_rows, write_atomically
from gpu_cases import (
    CPU,
    GPU,
    IDENTITY,
    PARTS,
    QUICK,
    Case,
    Sizes,
    amount,
    call_of,
    cases_of,
    not_here,
    slots,
)
from gpu_schedule import INCOMPLETE

from qflux_kernels import BackendUnavailableError

COLUMNS = [
    *IDENTITY, "status", "timing", "device_ms", "device_p20_ms", "device_p80_ms", "host_ms", "unit",
    "rate_per_s", "share", "peak_mb", "sm_mhz", "note", "device", "threads", "machine",
    "instruction_set", "torch", "python", "commit", "date",
]  # fmt: skip
# Exit status of a process whose device does not answer any more; numbers below are taken.
LOST = 5
OK, FAILED, CRASHED = "ok", "failed", "crashed"
UNAVAILABLE, NOT_HERE, LEFT_OUT = "unavailable", "not applicable", "left out"
# Of cases that differ in sizes only, so many may crash before the rest is left out.
CRASHES = 2
# Seconds after which no further call warms up.
WARM_UP, LONG_WARM_UP = 0.3, 0.5
# Providers whose calls have to work in a CUDA graph.
OURS = ("dense", "sweep", "qflux", "triton")


@dataclass(frozen=True)
class Effort:
    """How much time a case gets: seconds of samples, and how many of them at least and at most."""

    seconds: float = 0.15
    least: int = 3
    most: int = 30


@dataclass
class Timing:
    """Milliseconds of calls: on the device, and by the host's clock with all that it does."""

    kind: str
    device_ms: list[float]
    host_ms: list[float]
    note: str = ""


def host_times(call: Callable[[], object], device: torch.device, effort: Effort) -> list[float]:
    """Milliseconds of plain calls, each waited for."""
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < effort.least or (
        len(found) < effort.most and time.perf_counter() - start < effort.seconds
    ):
        before = time.perf_counter()
        call()
        synchronize(device)
        found.append(1e3 * (time.perf_counter() - before))
    return found


def warm_up(call: Callable[[], object], device: torch.device, long: bool) -> None:
    """Compile and allocate: three calls, or one that takes long.

    Args:
        long: go on for half a second, until an idle device has raised its clock.
    """
    start = time.perf_counter()
    calls = 0
    while True:
        call()
        synchronize(device)
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed > LONG_WARM_UP or (not long and (calls == 3 or elapsed > WARM_UP)):
            return


def event_times(run: Callable[[], object], calls: int, effort: Effort) -> list[float]:
    """Milliseconds a call between CUDA events around `run`, which makes so many calls."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < effort.least or (
        len(found) < effort.most and time.perf_counter() - start < effort.seconds
    ):
        before.record()
        run()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after) / calls)
    return found


def captured(
    call: Callable[[], object], calls: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    """So many calls as one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return graph


def measure(
    call: Callable[[], object], device: torch.device, effort: Effort, capture: bool
) -> Timing:
    """Time a call that has been warmed up; on a GPU in the stream it was made in.

    Args:
        capture: try a CUDA graph. Without one, and where it cannot be captured, events are
            recorded around plain calls, gaps between their launches included.
    """
    host = host_times(call, device, effort)
    if device.type != "cuda":
        return Timing("perf_counter", host, host)
    note = "" if capture else "no CUDA graph was tried, since one like it failed"
    if capture:
        # Long enough that starting a replay does not count.
        calls = max(1, min(20, math.ceil(0.5 / statistics.median(host))))
        try:
            graph = captured(call, calls, torch.cuda.current_stream(device))
            graph.replay()  # the first one uploads it
            return Timing("graph", event_times(graph.replay, calls, effort), host)
        except RuntimeError as error:
            note = f"no CUDA graph: {first_line(error)}"
            synchronize(device)
    return Timing("events", event_times(call, 1, effort), host, note)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


def answers(device: torch.device) -> bool:
    """Whether the device still works in this process: some errors end it for good."""
    try:
        synchronize(device)
        return bool((torch.ones(2, device=device) + 1 == 2).all())
    except RuntimeError:
        return False


def clock_mhz(device: torch.device) -> int | str:
    """The clock of the multiprocessors now, or nothing where it cannot be read."""
    if device.type != "cuda":
        return ""
    try:
        return torch.cuda.clock_rate(device)
    except Exception:  # without NVIDIA's module for it, or the right to ask
        return ""


class Worker:
    """Times cases one after another.

    Args:
        device, sizes, effort: what and how.
        output: the CSV; cases that have a row there are done.
        mark: the file that tells the case under way.
        until: seconds of the epoch; what would start later is left out.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        effort: Effort,
        output: Path,
        mark: Path,
        until: float,
    ) -> None:
        self.device, self.sizes, self.effort = device, sizes, effort
        self.output, self.mark, self.until = output, mark, until
        self.common = {k: v for k, v in environment(device).items() if k in COLUMNS}
        self.rows = read_rows(output)
        self.rates = {
            row["operator"]: float(row["rate_per_s"])
            for row in self.rows
            if row["provider"] == "ceiling" and row["status"] == OK
        }

    def add(self, case: Case, status: str, **columns: object) -> None:
        row = {**self.common, **asdict(case), "status": status, **columns}
        row["date"] = datetime.datetime.now().isoformat(timespec="seconds")
        append_row(self.output, COLUMNS, row)
        self.rows.append({name: str(row.get(name, "")) for name in COLUMNS})
        shown = f"{row['device_ms']} ms" if "device_ms" in columns else columns.get("note", "")
        print(f"{case}: {status} {shown}", flush=True)

    def alike(self, case: Case, test: Callable[[dict[str, str]], bool]) -> int:
        """How many rows of cases that differ in sizes only pass a test."""
        names = ("operator", "provider", "mode", "score", "dtype")
        wanted = [str(getattr(case, name)) for name in names]
        return sum([row[name] for name in names] == wanted and test(row) for row in self.rows)

    def run(self, cases: list[Case]) -> int:
        """Time what has no row yet, and return the exit status."""
        done = {tuple(row[name] for name in IDENTITY) for row in self.rows}
        interrupted = self.mark.read_text() if self.mark.exists() else ""
        for case in cases:
            if case.key in done:
                continue
            if str(case) == interrupted:
                self.add(case, CRASHED, note="the process died or hung here")
                continue
            reason = not_here(case, self.device)
            if reason:
                self.add(case, NOT_HERE, note=reason)
            elif time.time() > self.until:
                self.add(case, LEFT_OUT, note="no time was left")
            elif self.alike(case, lambda row: row["status"] == CRASHED) >= CRASHES:
                self.add(case, LEFT_OUT, note=f"{CRASHES} cases like it crashed")
            else:
                write_atomically(self.mark, str(case))
                if not self.take(case):
                    return LOST
        write_atomically(self.mark, "")
        mine = {case.key for case in cases}
        found = Counter(
            row["status"] for row in self.rows if tuple(row[n] for n in IDENTITY) in mine
        )
        print(", ".join(f"{number} {status}" for status, number in found.items()), flush=True)
        if found[FAILED] or found[CRASHED]:
            return 1
        return INCOMPLETE if found[LEFT_OUT] else 0

    def take(self, case: Case) -> bool:
        """Time one case; False if this process cannot go on."""
        torch.manual_seed(0)
        call, graphless = None, False
        try:
            call = call_of(case, self.sizes, self.device)
            # What all shares refer to must not be measured on a device that wakes up.
            ceiling = self.device.type == "cuda" and case.provider == "ceiling"
            warm_up(call, self.device, ceiling)
            # One capture that fails can spoil the process, so cases alike do not try again.
            capture = not self.alike(case, lambda row: row["note"].startswith("no CUDA graph: "))
            timing = measure(call, self.device, self.effort, capture)
            graphless = capture and timing.note != ""
            columns = self.columns(case, timing, call)
            wrong = timing.note and case.provider in OURS
            self.add(case, FAILED if wrong else OK, **columns)
        except BackendUnavailableError as error:
            self.add(case, UNAVAILABLE, note=first_line(error))
        except Exception as error:  # whatever it is, the next case may work
            self.add(case, FAILED, note=first_line(error))
        del call
        if self.device.type != "cuda":
            return True
        if graphless or not answers(self.device):
            return False
        torch.cuda.empty_cache()
        return True

    def columns(self, case: Case, timing: Timing, call: Callable[[], object]) -> dict[str, object]:
        """What a row says of a measured case."""
        clock = clock_mhz(self.device)
        milliseconds = statistics.median(timing.device_ms)
        if case.operator == "fma":
            from gpu_fma import count

            unit, number = "multiply-adds", count(self.device, case.rows)
        else:
            unit, number = amount(case)
        rate = 1e3 * number / milliseconds
        if case.provider == "ceiling":
            self.rates[case.operator] = rate
        share: float | None = None
        of_pairs = slots(case)
        if unit == "pairs" and of_pairs and "fma" in self.rates:
            share = rate * of_pairs / self.rates["fma"]
        elif unit == "bytes" and case.provider == "dense" and case.mode == "forward":
            share = rate / self.rates["copy"] if "copy" in self.rates else None
        peak = ""
        if case.mode in ("both", "step"):
            peak = round(peak_mb(call, self.device), 2)
        return {
            "timing": timing.kind,
            "device_ms": f"{milliseconds:.5g}",
            "device_p20_ms": f"{percentile(timing.device_ms, 20):.5g}",
            "device_p80_ms": f"{percentile(timing.device_ms, 80):.5g}",
            "host_ms": f"{statistics.median(timing.host_ms):.5g}",
            "unit": unit,
            "rate_per_s": f"{rate:.5g}",
            "share": "" if share is None else f"{share:.4f}",
            "peak_mb": peak,
            "sm_mhz": clock,
            "note": timing.note,
        }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="CSV to add rows to")
    parser.add_argument("--work", type=Path, required=True, help="folder for plan and mark")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--until", type=float, default=math.inf, help="seconds of the epoch, to begin no case after"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    return parser.parse_args(words)


def main() -> int:
    options = parse()
    device = torch.device(options.device)
    sizes = QUICK if options.quick else GPU if device.type == "cuda" else CPU
    effort = Effort(0.0, 1, 1) if options.quick else Effort()
    cases = cases_of(options.part, sizes)
    plan, mark = (options.work / f"{options.part}.{ending}" for ending in ("plan", "at"))
    write_atomically(plan, "".join(f"{case}\n" for case in cases))
    worker = Worker(device, sizes, effort, options.output, mark, options.until)
    # A capture collects garbage first; what is here now will stay.
    gc.collect()
    gc.freeze()
    if device.type != "cuda":
        return worker.run(cases)
    # One stream for all, since a backward runs in the stream of its forward, and the default
    # stream cannot be captured.
    with torch.cuda.stream(torch.cuda.Stream()):
        return worker.run(cases)


if __name__ == "__main__":
    sys.exit(main())
