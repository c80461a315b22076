"""What is built and shipped: the object's symbols, life without it, sdist, metadata, README."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from importlib import metadata
from pathlib import Path

import pytest

import qflux_kernels

ROOT = Path(__file__).resolve().parents[2]
OBJECT = Path(qflux_kernels.__file__).parent / "_C.abi3.so"


def symbols(*options: str) -> set[str]:
    """The dynamic symbols of the object, without their versions."""
    listed = subprocess.run(
        ["nm", "-D", *options, str(OBJECT)], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def test_the_object_has_the_stable_name():
    assert OBJECT.exists()
    assert qflux_kernels.diagnostics()["object"] == str(OBJECT)
    assert [path.name for path in OBJECT.parent.glob("*.so")] == ["_C.abi3.so"]


def test_no_symbol_of_torch_cpp():
    """A C++ symbol of torch would tie the object to one version of it."""
    undefined = symbols("--undefined-only")
    assert any(name.startswith("aoti_torch_") for name in undefined), "nm shows no torch at all"
    unstable = [name for name in undefined if re.search(r"N[KVRO]*(2at|3c10|5torch)\d", name)]
    assert not unstable, unstable


def test_no_python_symbol_beyond_the_limited_api():
    used = {name for name in symbols("--undefined-only") if re.match(r"_?Py", name)}
    assert used == {"PyModule_Create2"}
    assert "PyInit__C" in symbols("--defined-only")


USE_WITHOUT_OBJECT = """
import importlib.util
import os
import sys

# An editable installation would find the object that was left out.
sys.meta_path = [
    finder
    for finder in sys.meta_path
    if not getattr(finder, "__module__", "").startswith("__editable__")
]
import torch
import qflux_kernels
from qflux_kernels import BackendUnavailableError, diagnostics, evolve, interact, scores

assert qflux_kernels.__file__.startswith({package!r}), qflux_kernels.__file__
x = torch.randn(5, 2)
messages = []
for call in (lambda: interact(x), lambda: evolve(x, 0.1), lambda: interact(x, backend="cpu")):
    try:
        call()
    except BackendUnavailableError as error:
        messages.append(str(error))
assert len(messages) == 3 and len(set(messages)) == 1
assert interact(x, backend="reference").context.shape == (5, 2)
assert evolve(x, 0.1, backend="reference").states.shape == (5, 2)
assert scores(x).shape == (5, 5)
# Triton needs no object, only a GPU or its interpreter.
runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
triton = ["triton"] if runs and importlib.util.find_spec("triton") else []
assert diagnostics()["backends"] == ["reference", *triton]
assert diagnostics()["load_error"] == messages[0]
print(messages[0])
"""


@pytest.fixture(params=["missing", "broken"])
def without_object(request, tmp_path):
    package = tmp_path / "elsewhere" / "qflux_kernels"
    shutil.copytree(OBJECT.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if request.param == "broken":
        (package / "_C.abi3.so").write_bytes(b"not an object")
    return package, request.param


def test_the_reference_works_without_the_object(without_object, run_python):
    package, state = without_object
    program = USE_WITHOUT_OBJECT.format(package=str(package))
    result = run_python(program, path=package.parent)
    assert "_C.abi3.so" in result.stdout and "backend='reference'" in result.stdout
    assert {"missing": "missing", "broken": "does not load"}[state] in result.stdout
    assert not result.stderr, "importing must be silent"


def test_diagnostics_print(without_object, tmp_path):
    package, _ = without_object
    for path in (package.parent, OBJECT.parent.parent):
        shown = subprocess.run(
            [sys.executable, "-m", "qflux_kernels"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        names = [line.split()[0] for line in shown.splitlines()]
        assert {"qflux_kernels", "object", "backends", "torch", "threads"} <= set(names)


def test_another_copy_in_a_process_says_so(tmp_path, run_python):
    """torch ends a process that registers an op twice; the same copy may be imported again."""
    shutil.copytree(OBJECT.parent, tmp_path / "other" / "qflux_kernels")
    run_python(f"""
import sys
import torch
import qflux_kernels

def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "qflux_kernels"]:
        del sys.modules[name]

x = torch.randn(5, 2)
first, wanted = qflux_kernels, qflux_kernels.interact(x).context
forget()
import qflux_kernels
assert qflux_kernels is not first and qflux_kernels.diagnostics()["load_error"] is None
assert torch.equal(qflux_kernels.interact(x).context, wanted)
forget()
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__edit")]
sys.path.insert(0, {str(tmp_path / "other")!r})
import qflux_kernels
assert qflux_kernels.__file__.startswith({str(tmp_path)!r})
error = qflux_kernels.diagnostics()["load_error"]
assert "another copy" in error and {str(OBJECT.parent)!r} in error and {str(tmp_path)!r} in error
try:
    qflux_kernels.interact(x)
except qflux_kernels.BackendUnavailableError as refused:
    assert str(refused) == error
else:
    raise AssertionError("the second copy computes")
reference = qflux_kernels.interact(x, backend="reference").context
torch.testing.assert_close(reference, wanted)
assert torch.equal(first.interact(x).context, wanted)
""")


def test_a_source_tree_that_hides_an_installation_says_so(tmp_path, run_python):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(OBJECT.parent, tmp_path / "checkout" / "qflux_kernels", ignore=ignored)
    program = """
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__edit")]
import qflux_kernels
print(qflux_kernels.diagnostics()["load_error"])
"""
    checkout, installed = str(tmp_path / "checkout"), str(OBJECT.parent.parent)
    shown = run_python(program, path=os.pathsep.join((checkout, installed))).stdout
    assert f"An installation that has them, in {OBJECT.parent}" in shown
    assert f"start Python outside of {checkout}" in shown
    assert "An installation" not in run_python(program, path=checkout, PYTHONSAFEPATH="1").stdout


def test_it_imports_where_tensors_have_no_numbers(run_python):
    run_python("""
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    import qflux_kernels
    assert qflux_kernels.diagnostics()["load_error"] is None
    assert qflux_kernels.diagnostics()["instruction_set"]
import torch
with torch.device("meta"):
    assert qflux_kernels.diagnostics()["instruction_set"]
qflux_kernels.interact(torch.randn(3, 2))
""")


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy to build in, so that no build leaves anything beside the sources."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    unwanted = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "results", "*.egg-info", "*.so", "__pycache__"
    )
    shutil.copytree(ROOT, tree, ignore=unwanted)
    return tree


def run_hook(tree: Path, hook: str, **environment: str) -> None:
    """Call a PEP 517 hook as an installer does, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{hook}"],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_sdist(source_tree, tmp_path):
    run_hook(source_tree, f"build_sdist({str(tmp_path)!r})")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    for folder in ("csrc", "qflux", "qflux_kernels", "tests"):
        files = {
            str(path.relative_to(source_tree))
            for path in (source_tree / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        assert files and files <= names, sorted(files - names)
    texts = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.py"}
    assert texts <= names, sorted(texts - names)
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_the_packages_ship_their_data(source_tree, tmp_path):
    """What a wheel holds beside the object: every module and every text."""
    subprocess.run(
        [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=source_tree,
        check=True,
        capture_output=True,
    )
    for package in ("qflux", "qflux_kernels"):
        files = {
            path.relative_to(source_tree)
            for path in (source_tree / package).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        shipped = {p.relative_to(tmp_path / "lib") for p in (tmp_path / "lib").rglob("*")}
        assert files and files <= shipped, sorted(map(str, files - shipped))


def imported(*packages: str) -> set[str]:
    """The names of other distributions' packages that a package imports, at its top or later."""
    found = set()
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    return {
        name.replace("_", "-") for name in found - {"qflux", "qflux_kernels", "__future__"}
        if name not in sys.stdlib_module_names
    }  # fmt: skip


def test_every_dependency_is_declared_and_used():
    requirements = metadata.requires("qflux")
    names = {text: re.match(r"[\w-]+", text).group().lower() for text in requirements}
    extras = {name for text, name in names.items() if "extra ==" in text}
    needed = {name for text, name in names.items() if "extra ==" not in text}
    used = imported("qflux", "qflux_kernels") | {"numpy"}  # safetensors.torch saves through it
    assert needed <= used, f"declared and not imported: {needed - used}"
    assert used <= needed | extras, f"imported and not declared: {used - needed - extras}"


COMPILER = """#!{python}
import sys
from pathlib import Path

arguments = sys.argv[1:]
Path(arguments[arguments.index("-o") + 1]).write_bytes(b"")
if "-c" in arguments:
    source = arguments[arguments.index("-c") + 1]
    dependencies = arguments[arguments.index("-MF") + 1]
    Path(dependencies).write_text(f"{{arguments[arguments.index('-o') + 1]}}: {{source}}")
    with open({log!r}, "a") as log:
        print(source, file=log)
"""


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | {"QFLUX_CUDA": "0", "CCACHE_DISABLE": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_a_second_build_compiles_only_what_changed(source_tree, tmp_path):
    """Editable, in place or for a wheel: the units of a tree are compiled once, seen by a compiler
    that only writes down what it is asked for."""
    pytest.importorskip("ninja", reason="ninja knows what has changed")
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(log)))
    compiler.chmod(0o755)

    def compiled(*command: str) -> list[str]:
        log.write_text("")
        subprocess.run(
            [sys.executable, "setup.py", "-q", *command],
            cwd=source_tree,
            env=os.environ | {"CXX": str(compiler), "QFLUX_CUDA": "0", "CCACHE_DISABLE": "1"},
            check=True,
            capture_output=True,
        )
        return [Path(line).name for line in log.read_text().splitlines()]

    try:
        first = compiled("build_ext", "--build-temp", str(tmp_path / "1"), "--inplace")
        assert "ops.cpp" in first and len(first) >= 4
        wheel = ["bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "2")]
        assert compiled(*wheel) == []
        later = time.time() + 10
        os.utime(source_tree / "csrc" / "cpu" / "device.cpp", (later, later))
        assert compiled("build_ext", "--build-temp", str(tmp_path / "3"), "--inplace") == [
            "device.cpp"
        ]
        assert sorted(compiled("build_ext", "--inplace", "--force")) == sorted(first)
    finally:
        shutil.rmtree(source_tree / "build")
        (source_tree / "qflux_kernels" / "_C.abi3.so").unlink()


def test_a_tree_and_a_compiler_may_lie_anywhere(source_tree, tmp_path):
    """In folders with what a shell, ninja or a list of dependencies reads as more than letters."""
    pytest.importorskip("ninja", reason="without it no command passes through a shell")
    tree, log = tmp_path / "a b'c\"(d)&;$HOME:#%e", tmp_path / "log"
    shutil.copytree(source_tree, tree)
    compiler = tree / "my compiler"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(log)))
    compiler.chmod(0o755)
    options = {"CXX": f"{shlex.quote(str(compiler))} -O1", "CXXFLAGS": "-O0 '-DA=b c'"}
    result = build(tree, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ops.cpp" in log.read_text()
    (rules,) = tree.glob("build/*/build.ninja")
    commands = re.findall(r"^  command = (.+)$", rules.read_text(), re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        assert "-O0 '-DA=b c' -c " in command, "CXXFLAGS come last"
    log.write_text("")
    later = time.time() + 10
    os.utime(tree / "csrc" / "cpu" / "device.cpp", (later, later))
    assert build(tree, **options).returncode == 0
    assert [Path(line).name for line in log.read_text().splitlines()] == ["device.cpp"]


@pytest.mark.parametrize(
    "name, value", [("MAX_JOBS", "foo"), ("MAX_JOBS", "0"), ("QFLUX_CUDA", "yes")]
)
def test_bad_settings_of_a_build_are_one_line(source_tree, name, value):
    result = build(source_tree, **{name: value})
    assert result.returncode == 1
    assert name in result.stderr and repr(value) in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_metadata_asks_no_compiler(source_tree, tmp_path):
    """Installers ask for metadata where there is no toolkit, or a broken one."""
    tools, called = tmp_path / "cuda" / "bin", tmp_path / "called"
    tools.mkdir(parents=True)
    for name in ("nvcc", "c++", "g++", "gcc", "cc"):
        tool = tools / name
        tool.write_text(f"#!/bin/sh\necho {name} >> {called}\nexit 1\n")
        tool.chmod(0o755)
    run_hook(
        source_tree,
        f"prepare_metadata_for_build_wheel({str(tmp_path)!r})",
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
        CUDA_HOME=str(tools.parent),
    )
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert re.search(r"^Name: qflux$", metadata.read_text(), re.MULTILINE)
    assert not called.exists(), called.read_text()


def test_the_readme_runs(run_python):
    """Its Python blocks, in order, in one session."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks, "README.md has no Python block"
    run_python("\n".join(blocks), path=OBJECT.parent.parent)
