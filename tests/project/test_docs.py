"""What the pages point at exists, the list of features is complete, sources have their names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"])
TEXTS = (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".yml")
PAPERS = re.compile(
    r"\bSPEC\b|(?i:\b(?:first|second|both|either|two)[\s#/*]+seeds?\b|\bseed's\b|\bseeds')"
)


def rows():
    text = (ROOT / "docs" / "features.md").read_text()
    return re.findall(r"^\| (\d+) \| (.+?) \| (\w+) \| (.+) \|$", text, re.MULTILINE)


def test_every_item_is_done_with_a_place_or_declined_with_a_reason():
    assert [int(number) for number, *_ in rows()] == list(range(1, 111))
    assert {status for _, _, status, _ in rows()} == {"done", "declined"}
    assert all(len(where) >= 5 for *_, where in rows())


def test_every_file_and_test_it_names_exists():
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    for number, _, _, where in rows():
        for path in re.findall(r"`([\w/]+\.(?:py|md|cff))`", where):
            assert (ROOT / path).exists(), (number, path)
        named = re.findall(r"\btest_\w+(?!\w*\.py)", re.sub(r"`tests/[\w/]+\.py`", "", where))
        assert set(named) <= tests, (number, set(named) - tests)
        # A test stands behind the file that it is in.
        for path, name in re.findall(r"`(tests/[\w/]+\.py)` (test_\w+)", where):
            assert f"def {name}(" in (ROOT / path).read_text(), (number, path, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    """Paths and links, a test behind its file, and a name of the code behind its file."""
    text = page.read_text()
    code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", code):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    folders = "tests|docs|qflux|qflux_kernels|csrc|benchmarks|examples"
    path = rf"(?:{folders})/[\w/.-]+\.(?:py|h|cpp|cu|cuh|md|csv|svg)"
    for named in re.findall(rf"`({path})`", code):
        assert (ROOT / named).exists(), f"{page.name} names {named}"
    behind = r"`((?:tests|qflux|qflux_kernels)/[\w/]+\.py)(?:::|`(?:,)? )(\w+)"
    for named, name in re.findall(behind, code):
        # An ordinary word may follow a path, too.
        if "_" in name or re.search("[a-z][A-Z]", name) or name.startswith("test"):
            found = re.search(rf"\b{name}\b", (ROOT / named).read_text())
            assert found, f"{page.name} names {name} of {named}"


def test_the_documents_have_their_names():
    """They are the Flux document and the QFNN document; a seed is one of random numbers."""
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for folder in ("csrc", "qflux", "qflux_kernels", "benchmarks", "examples", "docs", "tests")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in TEXTS and path != Path(__file__).resolve()
        for match in PAPERS.finditer(path.read_text())
    ]
    found += [page.name for page in ROOT.glob("*.md") if PAPERS.search(page.read_text())]
    assert found == []
