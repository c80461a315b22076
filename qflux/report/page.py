"""The page of a report: one HTML file with its style, its programs and its data inside."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from ..analysis import interactive
from ..analysis.picture import Picture
from ..optional import require
from .files import plain
from .study import Study

# Nothing is fetched: the browser refuses what is not in the file.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; worker-src blob:"
)


def render(study: Study, title: str) -> bytes:
    """The page, UTF-8.

    Args:
        study: what it shows.
        title: of the page.

    Raises:
        ImportError: plotly is missing; says how to install it.
    """
    offline = require("plotly.offline", "the report", extra="analysis")
    assets = resources.files("qflux.report") / "assets"
    style, program, frame = (
        (assets / name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js", "report.html")
    )
    parts = {
        "title": html.escape(title),
        "policy": POLICY,
        "style": style,
        "summary": _summary(study),
        "notes": _notes(study.notes),
        "contents": _contents(study.pictures),
        "pictures": "\n".join(map(_section, study.pictures)),
        "tables": _tables(study),
        "figures": _json(_figures(study.pictures)),
        "explorer": _json(encode_arrays(study.explorer)),
        "plotly": offline.get_plotlyjs().replace("</script", "<\\/script"),
        "program": program,
    }
    before, *rest = frame.split("{{")
    made = [before]
    for piece in rest:
        name, after = piece.split("}}", 1)
        made += [parts[name], after]
    return "".join(made).encode()


def encode_arrays(value: Any) -> Any:
    """Plain values for JSON; arrays of float32 as base64 of their bytes, with their shape."""
    if isinstance(value, dict):
        return {name: encode_arrays(part) for name, part in value.items()}
    if isinstance(value, list):
        return [encode_arrays(part) for part in value]
    if isinstance(value, np.ndarray):
        content = np.ascontiguousarray(value, dtype="<f4")
        return {
            "shape": list(content.shape),
            "float32": base64.b64encode(content.tobytes()).decode(),
        }
    return plain(value)


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _figures(pictures: Sequence[Picture]) -> dict[str, list[Any]]:
    return {
        picture.name: [figure.to_plotly_json() for figure in interactive.draw(picture)]
        for picture in pictures
    }


def _section(picture: Picture) -> str:
    name, title, caption = (
        html.escape(text) for text in (picture.name, picture.title, picture.caption)
    )
    plots = "".join(
        f'<div class="plot" data-picture="{name}" data-panel="{number}" role="img" '
        f'aria-label="{html.escape(panel.title or picture.title)}"></div>'
        for number, panel in enumerate(picture.panels)
    )
    files = [f"figures/{picture.name}.{kind}" for kind in ("png", "svg")]
    files += [f"data/{file}" for file in picture.data]
    links = ", ".join(f'<a href="{file}">{file}</a>' for file in map(html.escape, files))
    return (
        f'<section id="{name}"><h2>{title}</h2><p>{caption}</p>'
        f'<div class="panels">{plots}</div><p class="files">{links}</p></section>'
    )


def _contents(pictures: Sequence[Picture]) -> str:
    entries = [("explorer", "Who hears whom"), *((p.name, p.title) for p in pictures)]
    entries.append(("numbers", "Numbers"))
    return "".join(
        f'<li><a href="#{html.escape(name)}">{html.escape(title)}</a></li>'
        for name, title in entries
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return "<p>Nothing was left out.</p>"
    return f"<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>"


def _number(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _summary(study: Study) -> str:
    """The most important numbers, as a list of terms."""
    model, text = study.summary["model"], study.summary["text"]
    rows = [
        ("family", model["architecture"]),
        ("parameters", model["parameters"]),
        ("layers", model["num_layers"]),
        ("cylinders", model["num_cylinders"]),
        ("score", model["score"]),
        ("tokens", text["tokens"]),
        ("nats per token", text["nats_per_token"]),
        ("operations of a forward pass", model["forward_flops"]),
        ("rank of the logits", study.summary["logits"]["rank"]),
    ]
    layers = study.summary.get("layers", {})
    names = {
        "density": "kept / visible pairs",
        "entropy_bits": "entropy of a row, bits",
        "coherence": "phase coherence",
        "radius_mean": "mean radius",
    }
    rows += [(names[name], value) for name, value in layers.items()]
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_number(value))}</dd></div>"
        for name, value in rows
    )


def _tables(study: Study) -> str:
    """The tables that a reader wants as text: layers, parameters and operations."""
    made = []
    for file, title in (
        ("layers.csv", "Layers and cylinders"),
        ("parameters.csv", "Parameters"),
        ("operations.csv", "Operations of a forward pass"),
    ):
        table = study.tables.get(file)
        if table is None:
            continue
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table)
        rows = zip(*(column.tolist() for column in table.values()), strict=True)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_number(v))}</td>" for v in row) + "</tr>"
            for row in rows
        )
        made.append(
            f'<details><summary>{title}</summary><div class="scroll"><table>'
            f"<caption>{title}: data/{file}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div></details>"
        )
    return "".join(made)
