"""The pages of the documentation: their programs run, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("analysis", "derivations", "tutorial")


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run(page, tmp_path, monkeypatch):
    """One after another in one namespace, as a reader types them."""
    pytest.importorskip("matplotlib", reason='pip install "qflux[analysis]" for figures')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text(), re.M | re.S
    )
    assert len(blocks) >= 2
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), space)


def test_the_table_of_counts_is_the_functions():
    """What docs/analysis.md prints of the documents' counts."""
    from qflux.analysis.counts import document_counts

    table = document_counts()
    rows = {
        (d, w): (f, c)
        for d, w, _, f, c, _ in zip(*(column.tolist() for column in table.values()), strict=True)
    }
    text = (ROOT / "docs" / "analysis.md").read_text()
    for key, printed in (
        (("flux", "transformer: total"), ("{:.2f} G", 1e9)),
        (("flux", "flux: total"), ("{:.1f} M", 1e6)),
        (("flux", "ratio of the layers"), ("{:.2f} %", 1e-2)),
        (("qfnn", "ratio of the operations"), ("{:,.0f}", 1)),
        (("qfnn", "ratio of the parameters"), ("{:,.0f}", 1)),
    ):
        form, unit = printed
        for number in rows[key]:
            assert form.format(number / unit) in text, (key, number)


def test_the_site_builds(tmp_path):
    """mkdocs is strict: a link that leads nowhere, or a name that is not there, is an error."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason='pip install "qflux[docs]" builds the site')
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("qflux_kernels.interact", "qflux.analysis.tables.layer_table"):
        assert f'id="{name}"' in api
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in tmp_path.glob("*.html")}
    # The reader's browser asks nobody else for anything.
    for path in tmp_path.glob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', path.read_text("utf-8")
        )
        assert fetched == [], path.name
