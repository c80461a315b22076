"""The comparison of two commits, on tiny sizes, in a repository made for it."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import compare
import compare_worker
import pytest

import qflux_kernels

ROOT = Path(__file__).resolve().parents[2]
OBJECT = Path(qflux_kernels.__file__).with_name("_C.abi3.so")
SETUP = """
import pathlib, shutil, sys
assert "build_ext" in sys.argv
target = pathlib.Path(__file__).with_name("qflux_kernels") / "_C.abi3.so"
shutil.copy({object!r}, target)
"""
TEST = """
import pytest

@pytest.fixture
def math_module(): ...

def test_it(math_module): assert False
"""
OTHER_TEST = "assert False, 'compare.py sets up only what is compiled'\n"


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", *identity, *words],
        cwd=folder,
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def environment(**more):
    """Without what a git hook that runs the tests would hand on."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return own | more


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Packages and benchmarks in three commits: one that cannot be built, one older, one as here.

    `broken` has no working setup.py. In `older` the training step has its old name, and
    project_norm does not exist yet. A build copies the object that these tests run on.
    """
    if shutil.which("git") is None:
        pytest.skip("compare.py checks commits out with git, which is not here")
    if not OBJECT.exists():
        pytest.skip("there is no compiled object to measure")
    folder = tmp_path_factory.mktemp("compare") / "repository"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", "*.xz")
    for name in ("benchmarks", "qflux", "qflux_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / ".gitignore").write_text("*.so\n__pycache__/\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text(TEST)
    (folder / "tests" / "test_other.py").write_text(OTHER_TEST)
    setup, exports = folder / "setup.py", folder / "qflux_kernels" / "__init__.py"
    setup.write_text("import sys\n\nsys.exit('no compiler here')\n")
    git(folder, "init", "-q")

    def commit(name):
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", name)
        git(folder, "tag", name)

    commit("broken")
    setup.write_text(SETUP.format(object=str(OBJECT)))
    today = exports.read_text()
    exports.write_text(today + "\ndel project_norm\n")
    commit("older")
    exports.write_text(today)
    commit("today")
    return folder


def run(repository, *words):
    """The exit status and output of compare.py; it must leave nothing behind."""
    temporary = repository.with_name("temporary")
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "benchmarks/compare.py", "--quick", "--threads", "1", *words],
        cwd=repository,
        env=environment(PYTHONPATH=str(ROOT), TMPDIR=str(temporary)),
        capture_output=True,
        text=True,
    )
    left = [path.name for path in temporary.iterdir() if path.name.startswith("qflux-compare")]
    assert left == []
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    return done.returncode, done.stdout + done.stderr


def test_a_tree_beside_itself(repository, tmp_path):
    output = tmp_path / "rows.csv"
    status, text = run(repository, "--base", "today", "--output", str(output))
    assert status == 0, text
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == compare.COLUMNS
    found = {}
    for row in rows:
        found.setdefault((row["part"], row["case"]), []).append(row["mode"])
        assert float(row["ratio"]) > 0 and row["rounds"] == "1"
        # The same numbers, to the bit, and a row that says what was measured where.
        assert row["difference"] == ("" if row["part"] == "build" else "0.0e+00")
        assert all(row[name] for name in ("torch", "base", "commit", "device", "machine"))
    expected = {("build", "object"): ["build"], ("build", "test suite"): ["build"]}
    expected |= {
        (part, case): ["step"] if part == "step" else ["forward", "backward", "both"]
        for part, cases in compare_worker.PARTS.items()
        for case in cases
    }
    assert found == expected


def test_what_is_missing_is_named(repository):
    status, text = run(repository, "--base", "older", "--only", "kernels")
    assert status == 1, text
    named = [line for line in text.splitlines() if line.startswith("not measured")]
    absent = [case for case in compare_worker.PARTS["kernels"] if case.startswith("project_norm")]
    assert len(named) == len(absent) == 3
    for line, case in zip(named, absent, strict=True):
        assert line.startswith(f"not measured: kernels, {case}: base: AttributeError")
    assert "\ninteract 1,024 " in text and "\nproject_norm" not in text


def test_a_base_that_cannot_be_built(repository):
    status, text = run(repository, "--base", "broken", "--only", "step")
    assert status == 1
    assert "not measured: build, object: base: setup.py -q build_ext failed: no compiler" in text
    for case in compare_worker.PARTS["step"]:
        assert f"not measured: step, {case}: there is no object to measure" in text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--base", "nowhere"], "git rev-parse: "),
        (["--base", "today", "--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--base", "today", "--only", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_bad_arguments(repository, words, reason):
    status, text = run(repository, *words)
    assert status == 2 and reason in text


def test_ratios_are_paired():
    """The machine halves its speed from one round to the next; the ratio does not notice."""
    measured = compare.Measured()
    for slowness, ratio in ((1, 1.5), (2, 2.0), (4, 1.0), (8, 1.5), (16, 1.25)):
        seconds = {"base": {"forward": slowness}, "new": {"forward": slowness * ratio}}
        measured.add("kernels", "a", seconds)
    measured.values["kernels", "a"] = {"base": -2.0, "new": -1.0}
    [row] = measured.rows()
    assert (row["base_ms"], row["new_ms"]) == ("4000", "4000")
    assert (row["ratio_p25"], row["ratio"], row["ratio_p75"]) == ("1.2500", "1.5000", "1.5000")
    assert (row["rounds"], row["difference"]) == (5, "5.0e-01")


def test_the_order_alternates():
    assert [compare.in_turn(n) for n in range(3)] == [
        ("base", "new"),
        ("new", "base"),
        ("base", "new"),
    ]


def test_older_names_are_tried_after_todays(monkeypatch):
    assert compare_worker.soft_threshold(0.7).shrinkage == "soft"
    monkeypatch.setattr(compare_worker, "Threshold", lambda sigma, weight: (sigma, weight))
    assert compare_worker.soft_threshold(0.7) == (0.7, "excess")
    with pytest.raises(compare_worker.NotHereError, match=r"'Absent'.*no_such_module"):
        compare_worker.first(
            lambda: compare_worker.attribute("torch", "Absent"),
            lambda: compare_worker.attribute("no_such_module", "Absent"),
        )


def test_a_short_measurement_has_five_calls_and_none_that_warms_up():
    taken = iter([9.0, 1.0, 3.0, 2.0, 8.0, 7.0])
    workload = compare_worker.Workload(lambda: {"forward": next(taken)}, 0.0)
    assert compare_worker.measure(workload, 0.1) == {"forward": 3.0}
    taken = iter([9.0, 1.0])
    assert compare_worker.measure(workload, 0.0) == {"forward": 1.0}
