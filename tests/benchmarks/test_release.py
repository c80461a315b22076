"""release.py: what it would run exists, and what it ran is kept, joined and not half replaced."""

import csv
import sys

import pytest
import release

JOBS = [*release.timings(), *release.trainings()]


def test_jobs_have_names_of_their_own_that_fit_a_file():
    names = [job.name for job in JOBS]
    assert len(set(names)) == len(names) and max(map(len, names)) < 240
    assert not any("/" in name for name in names)


@pytest.mark.parametrize("script", sorted({job.command[0] for job in JOBS} - {"-m"}))
def test_a_script_has_the_options_it_is_given(script):
    text = (release.FOLDER / script).read_text()
    text += (release.FOLDER / "arguments.py").read_text() if "add_training" in text else ""
    for job in JOBS:
        if job.command[0] == script:
            given = {word for word in job.command if word.startswith("--")}
            given |= {job.option} if job.option else set()
            given |= {"--curves"} if job.curves else set()
            given |= {"--plot"} if job.plot else set()
            assert not [word for word in given if f'"{word}"' not in text], job.name


def test_a_part_has_the_jobs_that_it_needs(tmp_path, capsys):
    for job in JOBS:
        words = zip(job.command, job.command[1:], strict=False)
        reads = [word for option, word in words if option != "--output-dir" and "{build}" in word]
        assert bool(reads) == (job.needs is not None), job.name
    release.main(["--data", str(tmp_path), "--list", "--only", "sparsemax-cpu"])
    files = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert files == ["sparsemax-cpu", "model", *["sparsemax-cpu"] * 3]


def test_files_have_one_form():
    """A file is all rows or all print, and a figure has one job."""
    for name in {job.file for job in JOBS}:
        assert len({job.option is None for job in JOBS if job.file == name}) == 1, name
    plots = [job.plot for job in JOBS if job.plot]
    assert len(set(plots)) == len(plots)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A folder of scripts, and main() with jobs that are calls of them."""
    scripts = tmp_path / "benchmarks"
    scripts.mkdir()
    (scripts / "rows.py").write_text(
        "import sys\n"
        "name, _, path = sys.argv[1:4]\n"
        "if name == 'bad': sys.exit(3)\n"
        "open(path, 'w').write(f'who,number\\n{name},1\\n')\n"
        "open(__file__ + '.calls', 'a').write(name + ' ')\n"
    )
    (scripts / "prints.py").write_text(
        "import sys\n"
        "print('step 1,010 of 2,000 (50 %), 00:03 left: loss 1')\n"
        "print('7 ms into', sys.argv[1])\n"
    )
    for text in release.TEXTS:
        (tmp_path / text).write_text("")
    monkeypatch.setattr(release, "FOLDER", scripts)
    monkeypatch.setattr(release, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(release, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(release, "commit", lambda: "abc")

    def run(*names, alone=True):
        jobs = [release.Job("rows", ("rows.py", name), alone=alone) for name in names]
        jobs.append(release.Job("printed", ("prints.py", "{build}/run"), option=None))
        monkeypatch.setattr(release, "timings", lambda: iter(jobs))
        monkeypatch.setattr(release, "trainings", lambda: iter(()))
        release.main(["--data", str(tmp_path)])

    return run


@pytest.mark.parametrize("alone", [True, False])
def test_rows_of_all_jobs_are_joined_in_their_order(measured, tmp_path, alone):
    measured("b", "a", alone=alone)
    with (tmp_path / "results" / "rows.csv").open(newline="") as file:
        assert [row["who"] for row in csv.DictReader(file)] == ["b", "a"]
    about, printed = (tmp_path / "results" / "printed.txt").read_text().split("\n\n")
    assert about.startswith("commit abc, ")
    assert printed == "$ prints.py '{build}/run'\n7 ms into {build}/run\n"


@pytest.mark.parametrize("alone", [True, False])
def test_a_job_that_fails_replaces_nothing_and_what_is_done_is_not_done_again(
    measured, tmp_path, alone
):
    with pytest.raises(SystemExit, match=r"bad.*exit 3"):
        measured("a", "bad", alone=alone)
    assert not (tmp_path / "results").exists()
    measured("a", "b", alone=alone)
    assert (tmp_path / "benchmarks" / "rows.py.calls").read_text() == "a b "
    assert (tmp_path / "results" / "rows.csv").exists()


def test_curves_are_replaced_only_by_those_of_all_their_jobs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(release, "FOLDER", tmp_path)
    (tmp_path / "curves.py").write_text(
        "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])"
    )
    build, results, figures = folders = [tmp_path / name for name in ("build", "csv", "svg")]
    for folder in folders:
        folder.mkdir()
    jobs = [release.Job("rows", (name,), curves="curves") for name in "ab"]
    for job in jobs:
        for ending in ("csv", "curves"):
            (build / f"{job.name}.{ending}").write_text(f"who\n{job.command[0]}\n")
    curves, figure = results / "curves.csv", figures / "curves.svg"
    curves.write_text("as it was")
    assert release.collect(jobs[:1], jobs, build, results, figures) == [results / "rows.csv"]
    assert str(results / "curves") in capsys.readouterr().out
    assert curves.read_text() == "as it was" and not figure.exists()
    files = release.collect(jobs, jobs, build, results, figures)
    assert files == [results / "rows.csv", curves, figure]
    assert figure.read_text().split() == ["who", "a", "b"]


def test_rows_with_other_columns_are_not_joined(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"{name}\n1\n")
    with pytest.raises(ValueError, match=r"\['b'\].*\['a'\]"):
        release.join(tmp_path / "all.csv", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "all.csv").exists()


@pytest.mark.parametrize(
    "line, said",
    [
        (["--only", "lm-times", "nothing"], "nothing"),
        (["--at-once", "0"], "at-once must be >= 1, got 0"),
        ([], "has no ['tinyshakespeare.txt', 'enwiki6.txt', 'shakespeare']"),
    ],
)
def test_bad_options_end_before_anything_is_measured(tmp_path, capsys, line, said):
    with pytest.raises(SystemExit) as stop:
        release.main(["--data", str(tmp_path), *line])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_what_is_not_committed_is_not_measured(tmp_path, capsys, monkeypatch):
    for text in release.TEXTS:
        (tmp_path / text).write_text("")
    monkeypatch.setattr(release, "commit", lambda: "abc-dirty")
    for jobs in ("timings", "trainings"):
        monkeypatch.setattr(release, jobs, lambda: iter(()))
    with pytest.raises(SystemExit) as stop:
        release.main(["--data", str(tmp_path)])
    assert stop.value.code == 2 and "committed" in capsys.readouterr().err


def test_the_list_names_every_job(tmp_path, capsys):
    release.main(["--data", str(tmp_path), "--list"])
    assert len(capsys.readouterr().out.splitlines()) == len(JOBS)
    assert sys.executable not in capsys.readouterr().out


def test_results_of_several_commits_and_missing_ones_are_named(measured, tmp_path, capsys):
    measured("a", "b")
    results = tmp_path / "results"
    rows = results / "rows.csv"
    rows.write_text("who,commit\na,abc\nb,abc\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        release.main(["--check"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "abc: printed.txt rows.csv\n"
    rows.write_text("who,commit\na,abc\nb,older\n")
    (results / "printed.txt").unlink()
    with pytest.raises(SystemExit) as ended:
        release.main(["--check"])
    assert ended.value.code == 1
    assert capsys.readouterr().out == ("none: printed.txt\nabc: rows.csv\nolder: rows.csv\n")
