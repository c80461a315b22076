"""What holds for every script of benchmarks/."""

import ast
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("*.py"))


def patches(source: str) -> list[str]:
    """Imports of unittest, and assignments to attributes of imported modules."""
    found, modules = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.startswith("unittest")]
            modules |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").startswith("unittest") else []
            modules |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Assign | ast.AugAssign):
            for target in getattr(node, "targets", None) or [node.target]:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if root is not target and isinstance(root, ast.Name) and root.id in modules:
                    found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            found += [ast.unparse(node)] if ast.unparse(node.args[0]) in modules else []
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_benchmark_runs_the_package_as_it_is(path):
    """What is measured is what users run: no module is patched."""
    assert patches(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from unittest import mock",
        "import unittest.mock",
        "import qflux.models.layers\nqflux.models.layers.interact = print",
        "from qflux.models import layers\nsetattr(layers, 'interact', print)",
    ],
)
def test_patches_are_found(source):
    assert len(patches(source)) == 1
