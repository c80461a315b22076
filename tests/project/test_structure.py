"""The tree: imports and includes without circles, in one direction; sizes; the map; the layers."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".h", ".cpp", ".cu", ".cuh")
CODE = (".py", *SOURCES, ".md")
FOLDERS = ("csrc", "qflux", "qflux_kernels", "benchmarks", "examples", "docs", "tests")
# Each may import those below it, and the helpers at the bottom; nothing points back up.
LAYERS = (
    {"qflux.__main__"},
    {"qflux.cli"},
    {"qflux.commands"},
    {"qflux.report"},
    {"qflux.hf"},
    {"qflux.train"},
    {"qflux.analysis"},
    {"qflux.models"},
    # It samples from any model that has logits, and the models' method calls it.
    {"qflux.inference"},
    {"qflux.text"},
    {"qflux.parallel"},
    {"qflux.optional"},
    {"qflux_kernels"},
)
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
Graph = dict[str, set[str]]


def files(*folders: str, suffixes: tuple[str, ...] = CODE) -> list[Path]:
    found = [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes and "__pycache__" not in path.parts
    ]
    assert found, folders
    return found


def circles(graph: Graph) -> list[list[str]]:
    """The strongly connected parts of several nodes, and the nodes that point at themselves."""
    order: list[str] = []

    def walk(node: str, edges: Graph, seen: set[str], out: list[str]) -> None:
        seen.add(node)
        for other in sorted(edges[node]):
            if other not in seen:
                walk(other, edges, seen, out)
        out.append(node)

    seen: set[str] = set()
    for node in sorted(graph):
        if node not in seen:
            walk(node, graph, seen, order)
    reverse: Graph = {node: set() for node in graph}
    for node, others in graph.items():
        for other in others:
            reverse[other].add(node)
    seen, found = set(), []
    for node in reversed(order):
        if node not in seen:
            part: list[str] = []
            walk(node, reverse, seen, part)
            if len(part) > 1 or node in graph[node]:
                found.append(sorted(part))
    return found


def modules(package: str) -> dict[str, Path]:
    """Module name to file. The scripts of `benchmarks` see one another as top-level modules."""
    found = {}
    for path in files(package, suffixes=(".py",)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if package == "benchmarks":
            parts = parts[1:]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Iterable[str]) -> Iterator[str]:
    """The known modules that a file imports: at its top, in functions and for type checkers.

    That importing `a.b` runs `a/__init__.py` first is no import of `a` in this sense.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".strip(".")
                if inner in known:
                    yield inner
                elif source in known:
                    yield source


def import_graph(*packages: str) -> Graph:
    known = {name: path for package in packages for name, path in modules(package).items()}
    return {name: set(imports(name, path, known)) for name, path in known.items()}


def room_of(module: str) -> tuple[int, str]:
    """How far up a module lies, and the entry of LAYERS that holds it."""
    for depth, names in enumerate(reversed(LAYERS)):
        for name in names:
            if module == name or module.startswith(f"{name}."):
                return depth, name
    raise AssertionError(f"{module} has no place in LAYERS")


def test_circles_are_found():
    """The two tools of the tests below, on a small case."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set(), "f": {"f"}}
    assert sorted(circles(graph)) == [["a", "b", "c"], ["f"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_are_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import p.a\nfrom . import b\nfrom .c import thing\nfrom ..q import d, thing\n"
        "def f():\n    from .e import thing\nif TYPE_CHECKING:\n    from p.f import thing\n"
        "from p import g\nimport elsewhere\n"
    )
    known = {"p", "q", "p.a", "p.r.b", "p.r.c", "p.q.d", "p.q", "p.r.e", "p.f", "p.g"}
    found = set(imports("p.r.module", path, known))
    assert found == {"p.a", "p.r.b", "p.r.c", "p.q.d", "p.q", "p.r.e", "p.f", "p.g"}


@pytest.mark.parametrize("packages", [("qflux", "qflux_kernels"), ("benchmarks",)], ids="+".join)
def test_no_circle_of_imports(packages):
    """Imports in functions and under TYPE_CHECKING count: they point the same way."""
    assert circles(import_graph(*packages)) == []


def test_imports_point_down():
    graph = import_graph("qflux", "qflux_kernels")
    exports = graph.pop("qflux")  # it may name everything, and nothing below may import it
    assert exports
    wrong = []
    for module, others in graph.items():
        depth, room = room_of(module)
        for other in others:
            below, its_room = (depth, "") if other == "qflux" else room_of(other)
            if below >= depth and room != its_room:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_circle_of_includes():
    graph: Graph = {}
    for path in files("csrc", "tests/cpp", suffixes=SOURCES):
        found = set()
        for header in INCLUDE.findall(path.read_text()):
            places = [path.parent / header, ROOT / "csrc" / header]
            there = [place.resolve() for place in places if place.exists()]
            assert there, f"{path.relative_to(ROOT)} includes {header}, which does not exist"
            found.add(str(there[0].relative_to(ROOT)))
        graph[str(path.relative_to(ROOT))] = found
    assert circles(graph) == []


def test_headers_are_included_once():
    for path in files("csrc", suffixes=(".h", ".cuh")):
        assert len(re.findall(r"^#pragma once$", path.read_text(), re.MULTILINE)) == 1, path


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_no_file_is_long(folder):
    """A reader takes in one file at a time."""
    found = [p for p in ROOT.iterdir() if p.suffix in CODE] if folder == "." else files(folder)
    limit = 900 if folder == "tests" else 700
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in found}
    long = {name: lines for name, lines in lengths.items() if lines > limit}
    assert long == {}


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_a_folder_of_kernels_is_named_by_its_dispatch_key(key):
    """csrc/cpu serves the key CPU and csrc/cuda the key CUDA; neither knows the other."""
    own, other = key.lower(), {"CPU": "cuda", "CUDA": "cpu"}[key]
    sources = files("csrc", suffixes=SOURCES)
    registered = re.compile(rf"STABLE_TORCH_LIBRARY_IMPL\(\w+, {key},")
    assert any(registered.search(path.read_text()) for path in sources)
    namespace = re.compile(r"^namespace (qflux::\w+)", re.MULTILINE)
    served = [path for path in sources if path.is_relative_to(ROOT / "csrc" / own)]
    assert served
    for path in sources:
        opened = set(namespace.findall(path.read_text()))
        if path in served:
            assert opened <= {f"qflux::{own}"}, path
            assert not [name for name in INCLUDE.findall(path.read_text()) if f"{other}/" in name]
        else:
            assert f"qflux::{own}" not in opened, path


def entries_of_the_map() -> list[str]:
    """The paths that CONTRIBUTING.md shows: one to a line, indented below its folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if re.search(r"^csrc/", block, re.MULTILINE)]
    assert len(trees) == 1, "CONTRIBUTING.md needs one map: a fenced block with a line csrc/"
    found: list[str] = []
    parents = [""]
    for line in trees[0].splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        assert level < len(parents), f"the map's line {line!r} is indented below no folder"
        parents = parents[: level + 1]
        found.append(parents[-1] + line.split()[0])
        if found[-1].endswith("/"):
            parents.append(found[-1])
    return found


def test_the_map_is_the_tree():
    """It names every file. A folder without code may stand alone, for what it holds."""
    if not (ROOT / ".git").exists():
        pytest.skip("git knows the files, and this is no clone")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tree = {name for name in listed.splitlines() if (ROOT / name).exists()}
    folders = {f"{folder}/" for name in tree for folder in PurePath(name).parents[:-1]}
    named = entries_of_the_map()
    assert len(named) == len(set(named))
    gone = sorted(set(named) - tree - folders)
    assert not gone, f"the map in CONTRIBUTING.md names what is not there: {gone}"
    closed = tuple(
        folder
        for folder in named
        if folder.endswith("/")
        and not any(other.startswith(folder) and other != folder for other in named)
        and not any(n.startswith(folder) and n.endswith((*SOURCES, ".py")) for n in tree)
    )
    missing = sorted(n for n in tree - set(named) if not n.startswith(closed))
    assert not missing, f"the map in CONTRIBUTING.md lacks {missing}"
