"""The tools agree: one version of each, workflows that parse, and the oldest versions tested."""

from __future__ import annotations

import re
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest

import qflux_kernels

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PIN = re.compile(r"([\w-]+)(?:\[\w+\])?==([\w.]+)")


@pytest.fixture(scope="module")
def parse():
    yaml = pytest.importorskip("yaml", reason="workflows are YAML")
    return lambda path: yaml.safe_load(path.read_text())


def one(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text, re.MULTILINE)
    return found


def jobs(parse) -> dict[str, dict]:
    return {name: job for path in WORKFLOWS for name, job in parse(path)["jobs"].items()}


def test_a_tool_has_one_version():
    found = defaultdict(set)
    for path in (ROOT / "Makefile", ROOT / "pyproject.toml", HOOKS, *WORKFLOWS):
        for tool, version in PIN.findall(path.read_text()):
            found[tool].add(version)
    # The oldest torch is tested beside the one to develop with.
    assert found.pop("torch") == {"2.10.0", one(r"^TORCH \?= torch==(\S+)", MAKEFILE)}
    assert {"ruff", "clang-format", "pyright", "cibuildwheel", "triton"} <= set(found)
    assert {tool: versions for tool, versions in found.items() if len(versions) > 1} == {}


def test_hooks_run_the_pinned_tools(parse):
    (repository,) = parse(HOOKS)["repos"]
    hooks = {hook["id"]: hook["additional_dependencies"] for hook in repository["hooks"]}
    pins = dict(re.findall(r"^(\w+) := (\S+==\S+)$", MAKEFILE, re.MULTILINE))
    assert hooks == {
        "ruff": [pins["RUFF"]],
        "ruff-format": [pins["RUFF"]],
        "clang-format": [pins["CLANG_FORMAT"]],
    }


def test_workflows_run_targets_that_exist(parse):
    targets = set(one(r"^\.PHONY: (.+)$", MAKEFILE).split())
    named = set()
    assert {"lint", "test", "more", "wheel", "sdist"} == set(jobs(parse))
    for job in jobs(parse).values():
        assert job["timeout-minutes"] <= 120
        named |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            named |= set(re.findall(r"^make ([\w-]+)", step.get("run", "")))
    more = {"sanitize", "sanitize-threads", "compiler", "wheel-check"}
    assert named == {"lint", "test"} | more <= targets


def test_the_tests_that_targets_run_exist():
    named = re.findall(r"tests/[\w/]+(?:\.\w+)?", MAKEFILE)
    assert {"tests/emulator", "tests/cpp/threads.cpp", "tests/wheel.py"} <= set(named)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_oldest_and_the_newest_are_tested(parse):
    python = one(r'^requires-python = ">=(.+)"', PYPROJECT)
    torch = one(r'^dependencies = \["torch>=([\d.]+)"', PYPROJECT)
    tested = {
        (m["python"], m["torch"]) for m in jobs(parse)["test"]["strategy"]["matrix"]["include"]
    }
    newest = max((version for version, _ in tested), key=lambda v: tuple(map(int, v.split("."))))
    pinned, free = f"torch=={torch}.0", "torch"
    assert tested == {(v, t) for v in (python, newest) for t in (pinned, free)}
    major, minor = python.split(".")
    assert python != newest
    # The object and the tools are told the same.
    setup = (ROOT / "setup.py").read_text()
    assert one(r'^PYTHON_TARGET = "(\w+)"', setup) == f"0x{int(major):02x}{int(minor):02x}0000"
    assert int(one(r'^TORCH_TARGET = "(\w+)"', setup), 16) >> 48 == 2 << 8 | int(
        torch.split(".")[1]
    )
    assert f'"py_limited_api": "cp{major}{minor}"' in setup
    assert one(r'^build = "(.+)"', PYPROJECT) == f"cp{major}{minor}-manylinux_*"
    assert one(r'^target-version = "(.+)"', PYPROJECT) == f"py{major}{minor}"
    assert one(r'^pythonVersion = "(.+)"', PYPROJECT) == python
    assert f'"torch>={torch}"' in one(r"^requires = (.+)$", PYPROJECT)


def test_the_version_is_stated_once():
    version = qflux_kernels.__version__
    stated = [
        str(path.relative_to(ROOT))
        for folder in ("qflux", "qflux_kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if f'"{version}"' in path.read_text()
    ]
    assert stated == ["qflux_kernels/version.py"]
    assert metadata.version("qflux") == version and f'"{version}"' not in PYPROJECT
    assert one(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text()) == version
    assert one(r"^## (\S+) \(unreleased\)", (ROOT / "CHANGELOG.md").read_text()) == version


def test_a_bug_report_has_the_diagnostics(parse):
    (form,) = FORMS
    fields = {field["id"]: field for field in parse(form)["body"]}
    assert {"what", "program", "diagnostics"} == set(fields)
    assert "`python -m qflux_kernels`" in fields["diagnostics"]["attributes"]["label"]
    assert all(field["validations"]["required"] for field in fields.values())


def test_ci_runs_what_a_person_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^(?:exec )?make (\w+)$", script, re.MULTILINE) == ["lint", "test"]
