"""`qflux analyze`: a model folder and a text file in, a folder with the report out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qflux_kernels.checks import check_choice, check_flag, check_integer

from ..analysis import static
from ..inference.session import STANDARD_INPUT
from ..inference.text import UNKNOWN
from ..models.base import CausalLM
from ..optional import require
from ..text.files import check_path, read_pieces
from ..text.vocabulary import Vocabulary
from ..train.checkpoint import load_model
from ..train.metrics import METRICS_FILE
from .files import check_target, csv_bytes, json_bytes, tensor_bytes, write_folder
from .page import render
from .study import Study, study, take_excerpt

# No vocabulary has many tokens that are longer.
CHARACTERS_A_TOKEN = 32


@dataclass(frozen=True)
class AnalysisOptions:
    """What to look at, and where to write it.

    Args:
        model_path: folder that training wrote.
        input_file: file with the text, UTF-8, compressed or not.
        output_dir: folder for the report, a new or an empty one.
        first_token: the first token of the text that is studied, >= 0.
        max_tokens: tokens that are studied at most, >= 1, and never more than the model's context.
        layer: layer of the pictures that show one, >= 0; None: the last.
        cylinder: cylinder of the pictures that show one, >= 0.
        unknown: what becomes of characters that the vocabulary does not have: "refuse", "replace"
            by a space, or "drop". The report says what was done.
        overwrite: replace what has the same names in a folder that is not empty; the model's own
            folder is never written to.
        device: where to run, as PyTorch names it, such as cpu, cuda or cuda:1.

    Raises:
        TypeError, ValueError: naming the option, its value and the allowed values.
    """

    model_path: str
    input_file: str
    output_dir: str
    first_token: int = 0
    max_tokens: int = 512
    layer: int | None = None
    cylinder: int = 0
    unknown: str = "replace"
    overwrite: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("model_path", "input_file", "output_dir"):
            check_path(name, getattr(self, name))
        check_integer("first_token", self.first_token, 0)
        check_integer("max_tokens", self.max_tokens, 1)
        check_integer("cylinder", self.cylinder, 0)
        if self.layer is not None:
            check_integer("layer", self.layer, 0)
        check_choice("unknown", self.unknown, UNKNOWN)
        check_flag("overwrite", self.overwrite)


def check_packages() -> None:
    """Raise unless everything that a report needs is installed.

    Raises:
        ImportError: a package is missing; says how to install it.
    """
    for package in ("matplotlib", "plotly", "networkx"):
        require(package, "the report", extra="analysis")


def analyze_file(options: AnalysisOptions) -> tuple[Path, list[str]]:
    """Write the report of a text file; returns the page, and what it leaves out.

    Raises:
        OSError, ValueError, ImportError: what cannot be read, studied or written, on one line;
            nothing is written then.
    """
    check_packages()
    target, folder = Path(options.output_dir), Path(options.model_path)
    check_target(target, options.overwrite, folder)
    model, vocabulary = load_model(folder, options.device)
    length = min(options.max_tokens, model.config.context_length)
    enough = (options.first_token + length) * CHARACTERS_A_TOKEN
    text, more = read_start(Path(options.input_file), enough)
    if not text:
        raise ValueError(f"input_file {options.input_file!r} is empty")
    return analyze_text(text, model, vocabulary, options, more=more)


def read_start(file: Path, enough: int) -> tuple[str, bool]:
    """The beginning of a text file, at least `enough` characters; and whether it goes on.

    Raises:
        OSError, ValueError: as `read_pieces`.
    """
    pieces: list[str] = []
    iterator: Iterator[str] = read_pieces(file)
    for piece in iterator:
        pieces.append(piece)
        if sum(map(len, pieces)) > enough:
            return "".join(pieces), next(iterator, None) is not None
    return "".join(pieces), False


def analyze_text(
    text: str,
    model: CausalLM,
    vocabulary: Vocabulary,
    options: AnalysisOptions,
    more: bool = False,
) -> tuple[Path, list[str]]:
    """Write the report of a text, whose file is not read; returns the page and what it leaves out.

    Args:
        text: what to study.
        model, vocabulary: of `options.model_path`.
        options: where to write, and which part.
        more: whether the text goes on.

    Raises:
        OSError, ValueError, ImportError: as `analyze_file`.
    """
    target, folder = Path(options.output_dir), Path(options.model_path)
    check_target(target, options.overwrite, folder)
    length = min(options.max_tokens, model.config.context_length)
    with tqdm(unit="step", delay=1, disable=None, leave=False) as bar:

        def progress(step: str) -> None:
            bar.set_description_str(step)
            bar.update()

        name = "the text"
        if options.input_file != STANDARD_INPUT:
            name = f"input_file {options.input_file!r}"
        excerpt = take_excerpt(
            text, vocabulary, length, options.first_token, options.unknown, more, name
        )
        found = study(
            model, vocabulary, excerpt, layer=options.layer, cylinder=options.cylinder,
            metrics=folder / METRICS_FILE, progress=progress,
        )  # fmt: skip
        files: dict[str, bytes] = {}
        lacking = []
        for picture in found.pictures:
            progress(picture.name)
            figure = static.draw(picture)
            whole = True
            for kind in ("png", "svg"):
                files[f"figures/{picture.name}.{kind}"], glyphs = static.save(figure, kind)
                whole = whole and glyphs
            lacking += [] if whole else [picture.name]
        if lacking:
            found.notes.append("The font of the figures in files lacks characters of the text, in: "
                               f"{', '.join(lacking)}.")  # fmt: skip
        progress("the page")
        files |= data_files(found)
        files["report.html"] = render(found, f"{folder.name}: what it does with a text")
        progress("files")
        write_folder(target, files)
    return target / "report.html", found.notes


def data_files(found: Study) -> dict[str, bytes]:
    """The data of a study by the names of their files."""
    made = {f"data/{name}": csv_bytes(table) for name, table in found.tables.items()}
    made |= {f"data/{name}": tensor_bytes(part) for name, part in found.tensors.items()}
    return {**made, "data/summary.json": json_bytes(found.summary)}
