"""The list of features is complete, and what it points at exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
