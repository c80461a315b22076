"""`make gpu-check`: the whole of it in small on a CPU, and each part of it alone."""

import csv
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import files
import gpu_check
import gpu_object
import gpu_report
import gpu_schedule
import pytest
import torch
from gpu_schedule import INCOMPLETE, NOTHING_HERE, Schedule, Step

ROOT = Path(__file__).resolve().parents[2]


def check(*words, **environment):
    """The exit status and the output of gpu_check.py."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run on the CPU: its folder, its status and what it printed."""
    if not (ROOT / "qflux_kernels" / "_C.abi3.so").exists():
        pytest.skip("there is no compiled object to measure")
    folder = tmp_path_factory.mktemp("gpu-check") / "out"
    # The minutes are for a machine that does much else.
    status, text = check("--device", "cpu", "--quick", "--minutes", 15, "--out", folder)
    return folder, status, text


def test_everything_runs_on_a_cpu(small_run):
    folder, status, text = small_run
    report = (folder / "report.md").read_text()
    assert status == 0, report
    outcomes = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| \d+ \|", report, re.MULTILINE))
    expected = {step.name for step in gpu_check.plan(gpu_check.parse(["--device", "cpu"]), folder)}
    assert set(outcomes) == expected
    elsewhere = {"tests of the GPU alone", "timings of compile"}
    elsewhere |= {f"compute-sanitizer {tool}" for tool in gpu_check.SANITIZERS}
    for name, outcome in outcomes.items():
        assert outcome == ("not applicable" if name in elsewhere else "passed"), (name, text)
    assert {path.name for path in folder.iterdir()} == {
        "machine.json", "report.md", "steps.log", "timings.csv",
    }  # fmt: skip
    assert json.loads((folder / "machine.json").read_text())["why_not"] is None


def test_every_case_has_a_row(small_run):
    import gpu_cases
    import gpu_timing

    with (small_run[0] / "timings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == gpu_timing.COLUMNS
    parts = ("operators", "others", "training")
    cases = [case for part in parts for case in gpu_cases.cases_of(part, gpu_cases.QUICK)]
    assert [tuple(row[n] for n in gpu_cases.IDENTITY) for row in rows] == [c.key for c in cases]
    for case, row in zip(cases, rows, strict=True):
        if gpu_cases.not_here(case, torch.device("cpu")):
            assert row["status"] == "not applicable" and row["note"]
        else:
            assert row["status"] == "ok", row
            assert float(row["device_ms"]) > 0 and float(row["host_ms"]) > 0
            assert float(row["rate_per_s"]) > 0 and row["torch"] == torch.__version__


def test_a_run_is_not_overwritten(small_run):
    folder = small_run[0]
    before = (folder / "timings.csv").read_bytes()
    status, text = check("--device", "cpu", "--quick", "--out", folder)
    assert status == 2 and "of an earlier run" in text
    assert (folder / "timings.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--minutes", "0"], "--minutes must be > 0, got 0"),
        (["--minutes", "nan"], "--minutes must be > 0, got nan"),
        (["--quick"], "--quick is for --device cpu"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments(words, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.parse(words)
    assert stop.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    status, text = check("--out", tmp_path)
    assert status == 3 and "no CUDA GPU is available" in text
    assert "| each operator once | LEFT OUT |" in (tmp_path / "report.md").read_text()


def test_the_programs_understand_the_plan(tmp_path, monkeypatch):
    """The words that only a run on two GPUs gives them; with one, what needs two is left out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    steps = gpu_check.plan(gpu_check.parse(["--out", str(tmp_path)]), tmp_path)
    [lacking] = [step for step in steps if not step.command]
    assert lacking.name == "two processes"
    assert lacking.not_here == "NCCL needs two GPUs, and this machine has 1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    steps = gpu_check.plan(gpu_check.parse(["--out", str(tmp_path)]), tmp_path)
    assert all(step.command for step in steps)
    understood = 0
    for step in steps:
        words = [word.replace(gpu_schedule.UNTIL, "9") for word in step.command]
        for place, word in enumerate(words):
            if word.startswith("benchmarks/"):
                module = importlib.import_module(Path(word).stem)
                assert module.parse(words[place + 1 :]).device == "cuda"
                understood += 1
    assert understood == 11
    # The steps leave one another their least, and that fits into the default minutes.
    assert sum(step.least for step in steps) < 0.6 * 60 * 9
    assert all(step.least < step.timeout for step in steps)


def shell(script, name="step", **options):
    return Step(name, ["/bin/sh", "-c", script], **options)


def schedule(folder, *steps, seconds=60.0):
    made = Schedule(steps, seconds, folder, folder)
    status = made.run()
    report = (folder / "report.md").read_text()
    return status, {o.step.name: (o.verdict, o.note) for o in made.outcomes}, report


@pytest.mark.parametrize(
    ("script", "verdict", "note"),
    [
        ("exit 7", "FAILED", "status 7"),
        ("kill -SEGV $$", "FAILED", "killed by signal 11"),
        ("sleep 600", "TIMED OUT", "ended after 1 s"),
        ("trap '' TERM; while :; do sleep 1; done", "TIMED OUT", "ended after 1 s"),
        ("sleep 600 & exit 1", "FAILED", "status 1"),
        (f"exit {INCOMPLETE}", "incomplete", ""),
    ],
)
def test_a_bad_step_does_not_block_the_next(tmp_path, script, verdict, note):
    status, outcomes, report = schedule(
        tmp_path, shell(script, "bad", timeout=1.0), shell("echo fine", "good")
    )
    assert status == 1
    assert outcomes == {"bad": (verdict, note), "good": ("passed", "")}
    assert f"| bad | {verdict} |" in report and "fine" in report
    assert "1 of 2 steps did not pass" in report


def test_a_program_that_is_not_there(tmp_path):
    status, outcomes, _ = schedule(tmp_path, Step("bad", ["/no/program"]), shell(":", "good"))
    assert status == 1 and outcomes["good"][0] == "passed"
    assert outcomes["bad"][0] == "FAILED" and "/no/program" in outcomes["bad"][1]


def test_what_a_step_started_ends_with_it(tmp_path):
    script = f"sleep 600 & echo $! > {tmp_path}/pid; wait"
    schedule(tmp_path, shell(script, timeout=1.0))
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


def test_what_does_not_fit_is_named(tmp_path):
    """The later step keeps its least, so the first one is cut; the last never fits."""
    status, outcomes, report = schedule(
        tmp_path,
        shell("sleep 600", "long", timeout=600.0),
        shell(":", "short"),
        shell(":", "huge", least=1e4, timeout=1e5),
        seconds=3.0,
    )
    assert status == 1
    assert outcomes["long"][0] == "TIMED OUT"
    assert outcomes["huge"][0] == "LEFT OUT" and "needs 10000 s" in outcomes["huge"][1]
    assert "| huge | LEFT OUT |" in report
    # With nothing that asks for more than there is, the later step gets its time.
    (tmp_path / "two").mkdir()
    _, outcomes, _ = schedule(
        tmp_path / "two", shell("sleep 600", "long", timeout=600.0), shell(":", "short", least=4.0),
        seconds=6.0,
    )  # fmt: skip
    assert outcomes == {"long": ("TIMED OUT", "ended after 1 s"), "short": ("passed", "")}


def test_what_does_not_apply_is_no_fault(tmp_path):
    status, outcomes, report = schedule(tmp_path, Step("there", not_here="no such thing"))
    assert status == 0 and outcomes == {"there": ("not applicable", "no such thing")}
    assert "| there | not applicable | 0 | no such thing |" in report


def test_a_summary_that_fails_does_not_block(tmp_path):
    def broken():
        raise KeyError("device_ms")

    made = Schedule([shell(":", "a"), shell(":", "b")], 60.0, tmp_path, tmp_path, summary=broken)
    assert made.run() == 0
    report = (tmp_path / "report.md").read_text()
    assert "| b | passed |" in report and "The summary failed: KeyError: 'device_ms'" in report


def test_nothing_to_run_on_ends_the_run(tmp_path):
    status, outcomes, _ = schedule(tmp_path, shell(f"exit {NOTHING_HERE}", "a"), shell(":", "b"))
    assert status == NOTHING_HERE
    assert outcomes["b"] == ("LEFT OUT", "a found nothing to run on")


def test_a_step_is_told_its_end(tmp_path):
    before = time.time()
    schedule(tmp_path, shell("echo ends {until}", timeout=8.0), seconds=300.0)
    [until] = re.findall(r"^ends ([\d.]+)$", (tmp_path / "steps.log").read_text(), re.MULTILINE)
    assert 5.9 < float(until) - before < 8.0 + (time.time() - before)


def test_a_step_may_take_longer_than_it_may_stay_at_one_place(tmp_path):
    mark = tmp_path / "mark"
    script = f"for n in a b c; do echo $n > {mark}; sleep 1.2; done; : > {mark}; sleep 1.2"
    status, outcomes, _ = schedule(tmp_path, shell(script, mark=mark, stall=3.0))
    assert status == 0 and outcomes["step"] == ("passed", "")


# Goes through five items: dies at the second, hangs at the fourth.
RESUMING = """
import os, signal, sys, time
done, mark = sys.argv[1:]
seen = open(done).read().split() if os.path.exists(done) else []
at = open(mark).read() if os.path.exists(mark) else ""
for item in "abcde":
    if item in seen:
        continue
    with open(mark, "w") as file:
        file.write(item)
    if item == at:
        outcome = "over"
    elif item == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    elif item == "d":
        time.sleep(600)
    with open(done, "a") as file:
        file.write(item + "\\n")
"""


def test_a_step_goes_on_where_it_died(tmp_path):
    done, mark = tmp_path / "done", tmp_path / "mark"
    step = Step(
        "resuming",
        [sys.executable, "-c", RESUMING, str(done), str(mark)],
        mark=mark,
        stall=2.0,
        timeout=60.0,
    )
    status, outcomes, _ = schedule(tmp_path, step)
    assert done.read_text().split() == list("abcde")
    assert status == 0 and outcomes["resuming"] == ("passed", "started again 2 times")


def test_a_step_that_makes_no_progress_is_not_started_for_ever(tmp_path):
    mark = tmp_path / "mark"
    script = f"echo x >> {tmp_path}/count; echo here > {mark}; kill -9 $$"
    status, outcomes, _ = schedule(tmp_path, shell(script, "bad", mark=mark), shell(":", "good"))
    assert (tmp_path / "count").read_text() == "x\nx\n"
    assert status == 1 and outcomes["good"][0] == "passed"
    assert outcomes["bad"] == ("FAILED", "started again 1 times; killed by signal 9")


STOPPED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gpu_schedule import Schedule, Step
folder = Path(sys.argv[2])
sleep = ["/bin/sh", "-c", f"echo $$ > {folder}/pid; sleep 600"]
steps = [Step("a", sleep, timeout=500.0), Step("b", ["/bin/true"])]
sys.exit(Schedule(steps, 600.0, folder, folder).run())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_reports(tmp_path, number):
    words = [sys.executable, "-c", STOPPED, str(ROOT / "benchmarks"), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == 1
    report = (tmp_path / "report.md").read_text()
    assert "| a | LEFT OUT | 0 | the run was stopped" in report and "| b | LEFT OUT |" in report
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_rows_are_on_the_disk_when_a_process_is_killed(tmp_path):
    path = tmp_path / "rows.csv"
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from files import append_row\n"
        "for n in range(3): append_row(Path(sys.argv[2]), ['n', 'text'], {'n': n, 'text': 'a,b'})\n"
        "os.kill(os.getpid(), 9)"
    )
    words = [sys.executable, "-c", program, str(ROOT / "benchmarks"), str(path)]
    assert subprocess.run(words).returncode == -9
    rows = [{"n": str(n), "text": "a,b"} for n in range(3)]
    assert files.read_rows(path) == rows
    # Half a row: it is left out, and the next one begins a line of its own.
    with path.open("a") as file:
        file.write("3")
    assert files.read_rows(path) == rows
    files.append_row(path, ["n", "text"], {"n": 4, "text": "c"})
    assert files.read_rows(path) == [*rows, {"n": "4", "text": "c"}]
    assert files.read_rows(tmp_path / "none.csv") == []


@pytest.fixture
def worker(tmp_path):
    """Makes a worker of tiny cases on the CPU, as a new process would."""
    import gpu_cases
    import gpu_timing

    def make(until=math.inf):
        return gpu_timing.Worker(
            torch.device("cpu"), gpu_cases.QUICK, gpu_timing.Effort(0.0, 1, 1),
            tmp_path / "rows.csv", tmp_path / "mark", until,
        )  # fmt: skip

    return make


def interactions(*lengths):
    from gpu_cases import Case

    return [Case("interact", "dense", "both", 1, n, n, 0, "hard") for n in lengths]


def statuses(worker):
    return [row["status"] for row in files.read_rows(worker.output)]


def test_a_case_that_fails_does_not_block_the_next(worker, monkeypatch):
    import gpu_timing

    call_of = gpu_timing.call_of

    def broken(case, *rest):
        if case.rows == 9:
            raise RuntimeError("no luck\nat all")
        return call_of(case, *rest)

    monkeypatch.setattr(gpu_timing, "call_of", broken)
    made = worker()
    assert made.run(interactions(8, 9, 10)) == 1
    assert statuses(made) == ["ok", "failed", "ok"]
    assert files.read_rows(made.output)[1]["note"] == "RuntimeError: no luck"
    assert made.mark.read_text() == ""
    # Again: every case has its row, and what failed still has failed.
    assert worker().run(interactions(8, 9, 10)) == 1 and len(statuses(made)) == 3


def test_a_case_that_killed_the_process_is_noted(worker):
    cases = interactions(8, 9, 10, 11, 12)
    first = worker()
    first.mark.write_text(str(cases[0]))
    assert first.run(cases[:2]) == 1
    assert statuses(first) == ["crashed", "ok"]
    # Two that crash are enough of a kind.
    second = worker()
    second.mark.write_text(str(cases[2]))
    assert second.run(cases) == 1
    assert statuses(second) == ["crashed", "ok", "crashed", "left out", "left out"]


def test_a_spoilt_process_is_left_and_what_spoilt_it_is_not_tried_again(worker, monkeypatch):
    """On a GPU: after a capture that failed, and once the device does not answer."""
    import gpu_timing
    from gpu_cases import Case

    tried, alive = [], [True]

    def measure(call, device, effort, capture):
        tried.append(capture)
        note = "no CUDA graph: RuntimeError: not permitted" if capture else "not tried"
        return gpu_timing.Timing("events", [2.0], [3.0], note)

    monkeypatch.setattr(gpu_timing, "call_of", lambda *_: lambda: None)
    monkeypatch.setattr(gpu_timing, "warm_up", lambda *_: None)
    monkeypatch.setattr(gpu_timing, "measure", measure)
    monkeypatch.setattr(gpu_timing, "answers", lambda _: alive[0])
    cases = [Case("interact", "dense", "forward", 1, n, n, 0, "hard") for n in (8, 9, 10)]

    def again():
        made = worker()
        made.device = torch.device("cuda")
        return made, made.run(cases)

    made, status = again()
    assert status == gpu_timing.LOST and statuses(made) == ["failed"]
    made, status = again()
    # Their times count, and that they need a graph is still said.
    assert status == 1 and statuses(made) == ["failed"] * 3 and tried == [True, False, False]
    assert [row["device_ms"] for row in files.read_rows(made.output)] == ["2"] * 3
    made.output.unlink()
    alive[0] = False
    made, status = again()
    assert status == gpu_timing.LOST and made.mark.read_text() == str(cases[0])


def test_no_case_begins_too_late(worker):
    made = worker(until=time.time() - 1.0)
    assert made.run(interactions(8, 9)) == INCOMPLETE
    assert statuses(made) == ["left out", "left out"]


def test_pairs_and_slots():
    from gpu_cases import Case, amount, slots

    assert amount(Case("interact", "dense", "forward", 2, 4, 4)) == ("pairs", 20.0)
    assert amount(Case("interact", "dense", "forward", 1, 3, 5)) == ("pairs", 12.0)
    assert amount(Case("evolve", "dense", "forward", 1, 4, 4, steps=3)) == ("pairs", 60.0)
    assert amount(Case("interact", "dense", "forward", 2, 1, 128, 4)) == ("bytes", 6144.0)
    assert slots(Case("interact", "dense", "keys", width=4, score="hard")) == 13
    assert slots(Case("interact", "dense", "both", width=4, score="hard")) is None
    assert slots(Case("interact", "sweep", "forward", score="hard")) is None


@pytest.mark.parametrize(
    ("built", "capability", "expected"),
    [
        (["sm_80", "sm_90", "compute_100"], (9, 0), True),
        (["sm_80", "sm_90", "compute_100"], (8, 6), True),
        (["sm_80", "sm_90", "compute_100"], (12, 0), True),
        (["sm_80", "sm_90", "compute_100"], (7, 5), False),
        (["sm_90"], (8, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_90"], (10, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["compute_80"], (9, 0), True),
        (["compute_90"], (8, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_an_object_serves(built, capability, expected):
    assert gpu_object.serves(built, capability) is expected


def test_an_object_of_another_tree_does_not_serve(tmp_path):
    assert gpu_object.from_elsewhere(tmp_path / "qflux_kernels" / "_C.abi3.so", tmp_path) is None
    reason = gpu_object.from_elsewhere("/elsewhere/_C.abi3.so", tmp_path)
    assert reason == f"/elsewhere/_C.abi3.so is not of this tree, {tmp_path}"


SETUP = """
import json, os, sys
names = ("MAX_JOBS", "QFLUX_CUDA", "TORCH_CUDA_ARCH_LIST", "NVCC_APPEND_FLAGS")
with open("built.json", "w") as file:
    json.dump([sys.argv[1:], {name: os.environ.get(name) for name in names}], file)
sys.exit("QFLUX_FAIL" in os.environ)
"""


@pytest.mark.parametrize("capability", [(9, 0), None], ids=str)
def test_the_build_in_place(tmp_path, monkeypatch, capability):
    for name in ("TORCH_CUDA_ARCH_LIST", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "setup.py").write_text(SETUP)
    assert gpu_object.build(tmp_path, capability)
    words, environment = json.loads((tmp_path / "built.json").read_text())
    assert words == ["-q", "build_ext", "--inplace"]
    assert environment == {
        "MAX_JOBS": str(min(16, os.cpu_count())),
        "QFLUX_CUDA": "1" if capability else "0",
        "TORCH_CUDA_ARCH_LIST": "9.0" if capability else None,
        "NVCC_APPEND_FLAGS": "-lineinfo" if capability else None,
    }
    monkeypatch.setenv("QFLUX_FAIL", "1")
    assert not gpu_object.build(tmp_path, capability)


@pytest.mark.parametrize("cured", [True, False])
def test_an_object_that_does_not_serve_is_built_anew(tmp_path, monkeypatch, cured):
    states = [
        {"why_not": "it has code for sm_80", "capability": [9, 0]},
        {"why_not": None if cured else "interact gave NaN"},
    ]
    built = []
    monkeypatch.setattr(gpu_object, "inspect_afresh", lambda name: states.pop(0))
    monkeypatch.setattr(gpu_object, "build", lambda root, capability: built.append(capability) or 1)
    monkeypatch.setattr(sys, "argv", ["gpu_object.py", "--facts", str(tmp_path / "facts.json")])
    assert gpu_object.main() == (0 if cured else 1)
    assert built == [[9, 0]] and states == []
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["the object was"] == "built in place"


def test_an_object_that_ends_its_process(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu_object.inspect_afresh("cpu") == {
        "why_not": "a process that loaded it ended with status 1"
    }


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_needs_no_environment(tmp_path):
    """PYTHON is taken as it is; without it the environment that exists, or else python3."""

    def command(*words):
        # Without what a make that runs the tests hands on.
        given = ("PYTHON", "VENV", "GPU_CHECK_ARGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
        environment = {name: v for name, v in os.environ.items() if name not in given}
        done = subprocess.run(
            ["make", "-n", "gpu-check", *words], cwd=ROOT, env=environment, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        [line] = done.stdout.splitlines()
        assert line.startswith(f"PYTHONPATH={ROOT} ")
        return line.split(" ", 1)[1].rstrip()

    there = tmp_path / "there" / "bin" / "python"
    there.parent.mkdir(parents=True)
    there.touch()
    assert command("VENV=/nowhere") == "python3 benchmarks/gpu_check.py"
    assert command(f"VENV={tmp_path}/there") == f"{there} benchmarks/gpu_check.py"
    words = (f"VENV={tmp_path}/there", "PYTHON=/x/python", "GPU_CHECK_ARGS=--minutes 5")
    assert command(*words) == "/x/python benchmarks/gpu_check.py --minutes 5"


def measured(operator, provider, mode, milliseconds, **columns):
    import gpu_timing

    row = dict.fromkeys(gpu_timing.COLUMNS, "")
    row |= {"batch": "1", "width": "0", "steps": "0", "dtype": "float32", "score": "hard"}
    row |= {"operator": operator, "provider": provider, "mode": mode, "status": "ok"}
    row |= {"device_ms": str(milliseconds), "host_ms": "9", "timing": "graph"}
    row |= {name: str(value) for name, value in columns.items()}
    return row | {"keys": row["rows"]}


def test_goals_beside_what_was_measured():
    rows = [
        measured("interact", "dense", "forward", 1.0, rows=65536, share=0.9),
        measured("interact", "dense", "rows", 1.0, rows=65536, share=0.5, score="soft"),
        measured("interact", "dense", "both", 2.0, rows=4096),
        measured("interact", "compile", "both", 9.0, rows=4096),
        measured("interact", "sweep", "forward", 4.0, rows=1 << 20),
        measured("interact", "dense", "both", 3.0, rows=1024, batch=384, width=4, score="soft"),
        measured("attention", "sdpa", "both", 6.0, rows=1024, batch=48, width=32, score=""),
    ]
    lines = [line.split(" | ") for line in gpu_report.goals(rows).splitlines() if " | " in line]
    found = {line[0].removeprefix("| "): (line[2], line[3].removesuffix(" |")) for line in lines}
    fma = "share of the FMA ceiling"
    assert found[f"forward at S = 65,536: {fma}"] == ("0.9", "reached")
    assert found[f"rows, soft, of the backward at S = 65,536: {fma}"] == ("0.5", "missed")
    assert found[f"keys of the backward at S = 65,536: {fma}"] == ("", "not measured")
    beside = "times as fast as torch.compile"
    assert found[f"forward and backward at S = 4,096: {beside}"] == ("4.5", "missed")
    assert found["sweep at S = 1,048,576, forward: 5 ms over its time"] == ("1.25", "reached")
    assert found["384 x 1,024, D = 4, soft, both: times as fast as SDPA"] == ("2", "reached")


def test_the_readme_lists_the_goals():
    """The one list of what waits for a GPU."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for name, least, _ in gpu_report.GOALS:
        assert f"| {name} | {least:g} |" in text


def test_cases_without_a_figure_are_named(tmp_path):
    rows = [
        measured("interact", "dense", "forward", "", rows=8, status="failed", note="no luck"),
        measured("interact", "dense", "forward", 1.0, rows=9),
    ]
    names = [gpu_report.case_of(row) for row in rows]
    third = names[1].replace("rows=9", "rows=10")
    (tmp_path / "operators.plan").write_text("\n".join([*names, third]))
    text = gpu_report.gaps(rows, tmp_path)
    assert f"failed, 1:\n\n- {names[0]}: no luck\n" in text
    assert f"not begun, 1:\n\n- {third}\n" in text and names[1] not in text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_ceiling_is_multiply_adds(run_python, tmp_path):
    """Its loop compiles to as many multiply-adds as it is credited with, and nothing like them."""
    program = """
import re, sys
sys.path.insert(0, PATH)
import gpu_fma
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
kernel = gpu_fma.chains
signature = {"target": "*fp32", "a": "fp32", "b": "fp32", "rounds": "i32"}
signature |= {"BLOCK": "constexpr", "UNROLLED": "constexpr"}
fixed = {(4,): gpu_fma.BLOCK, (5,): gpu_fma.UNROLLED}
source = ASTSource(kernel, signature, fixed)
built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": gpu_fma.WARPS})
ptx = built.asm["ptx"]
threads = 32 * gpu_fma.WARPS
print(len(re.findall(r"fma.rn.f32", ptx)) * threads == gpu_fma.BLOCK * gpu_fma.UNROLLED)
print(len(re.findall(r"(?:mul|add|sub)[.a-z]*.f32", ptx)))
""".replace("PATH", repr(str(ROOT / "benchmarks")))
    result = run_python(program, TRITON_CACHE_DIR=str(tmp_path / "cache"), TRITON_INTERPRET="0")
    assert result.stdout.split() == ["True", "0"]
