"""`run.json`: the options, the text, the vocabulary and the versions of a run."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qflux_kernels.version import __version__

from ..text.tokens import EncodedText
from ..text.vocabulary import Vocabulary
from .checkpoint import write_atomically
from .options import MAY_CHANGE, OF_THE_CALL, TrainingOptions

RUN_FILE = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """What a run was started with.

    options: those of `TrainingOptions` that belong to the run. text: what `EncodedText.describe`
    says, the digest of everything and the first works of each part. vocabulary: kind and
    size. source: where the text came from, as the caller said. versions: of qflux, PyTorch and
    Python.
    """

    options: dict[str, Any]
    text: dict[str, Any]
    vocabulary: dict[str, Any]
    source: dict[str, Any]
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Replace `run.json` in `folder`."""
        content = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / RUN_FILE, content.encode(errors="surrogatepass"))


def make_record(
    text: EncodedText,
    vocabulary: Vocabulary,
    options: TrainingOptions,
    source: Mapping[str, Any] | None = None,
) -> RunRecord:
    """The record of a run with this text, this vocabulary and these options."""
    return RunRecord(
        options=stored_options(options),
        text=text.describe(),
        vocabulary={"kind": vocabulary.kind, "size": vocabulary.size},
        source=dict(source or {}),
        versions={
            "qflux": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    )


def read_record(folder: Path) -> RunRecord | None:
    """The record in `folder`; None where there is none, as in runs of older versions.

    Raises:
        ValueError: the file is no such record; names it.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}; {_REMEDY}") from None
    names = [field.name for field in fields(RunRecord)]
    if not isinstance(given, dict) or not all(isinstance(given.get(name), dict) for name in names):
        raise ValueError(
            f"{str(path)!r} must be an object with the objects {', '.join(names)}; {_REMEDY}"
        )
    known = {field.name for field in fields(TrainingOptions)}
    unknown = sorted(set(given["options"]) - known)
    if unknown:
        raise ValueError(
            f"{str(path)!r} has options that this version does not know: {', '.join(unknown)}; "
            f"{_REMEDY}"
        )
    return RunRecord(**{name: given[name] for name in names})


_REMEDY = "without the file, resume with all the options of the run"


def stored_options(options: TrainingOptions) -> dict[str, Any]:
    """The options that belong to the run, as JSON has them."""
    values = {name: value for name, value in asdict(options).items() if name not in OF_THE_CALL}
    return json.loads(json.dumps(values, default=str))


def changed_options(record: RunRecord, options: TrainingOptions) -> dict[str, tuple[Any, Any]]:
    """The options that differ from the record: name to the stored value and the new one.

    Raises:
        ValueError: some that may not change; names them with the stored values.
    """
    now = stored_options(options)
    # A version with more options gives an older record their defaults.
    defaults = stored_options(TrainingOptions(""))
    stored = {name: record.options.get(name, defaults[name]) for name in now}
    changed = {name: (stored[name], now[name]) for name in now if stored[name] != now[name]}
    fixed = [
        f"{name} {old!r} -> {new!r}"
        for name, (old, new) in changed.items()
        if name not in MAY_CHANGE
    ]
    if fixed:
        raise ValueError(
            f"cannot resume with other options than the run was started with: {', '.join(fixed)}; "
            f"a resumed run may change {', '.join(MAY_CHANGE)}"
        )
    return changed


def check_same_text(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise unless two descriptions are of the same text.

    Raises:
        ValueError: what differs.
    """
    if stored.get("sha256") == now["sha256"]:
        return
    try:
        changes = list(_differences(stored, now))
    except (KeyError, TypeError, AttributeError):
        changes = []
    shown = changes[:3] + ([f"{len(changes) - 3} more"] if len(changes) > 3 else [])
    raise ValueError(
        f"cannot resume with another text: {', '.join(shown) or 'its digest has changed'}; "
        f"init_from starts a new run on it from this run's model"
    )


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for part, words in (("train", "training"), ("validation", "validation")):
        before, after = (
            {row["name"]: row for row in text[part]["first"]} for text in (stored, now)
        )
        for name in before.keys() - after.keys():
            yield f"the {words} work {name!r} is gone"
        for name in after.keys() - before.keys():
            yield f"the {words} work {name!r} is new"
        for name in before.keys() & after.keys():
            sizes = before[name]["characters"], after[name]["characters"]
            if sizes[0] != sizes[1]:
                yield f"the {words} work {name!r} had {sizes[0]:,} characters and has {sizes[1]:,}"
            elif before[name]["sha256"] != after[name]["sha256"]:
                yield f"the {words} work {name!r} has the same size and other characters"


def resume_command(folder: Path, processes: int = 1, division: str = "") -> str:
    """What to type to go on with the run in `folder`, in so many processes."""
    start = "" if processes == 1 else f"torchrun --nproc-per-node {processes} -m "
    return f"{start}qflux train --output-dir {shlex.quote(str(folder))} --resume{division}"
