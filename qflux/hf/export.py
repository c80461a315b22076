"""A trained model as a folder that transformers reads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from ..models.base import CausalLM
from ..text.files import check_path
from ..train.checkpoint import load_model
from ..train.folder import check_free
from .modeling import QFluxConfig, QFluxForCausalLM
from .tokenizer import make_tokenizer, unknown_cost


def from_model(
    model: CausalLM, stand_in: int = 0, unknown_cost: float | None = None
) -> QFluxForCausalLM:
    """A Hugging Face model with the weights of `model`, which it shares.

    Args:
        model: the language model.
        stand_in, unknown_cost: as in `QFluxConfig`.
    """
    config = QFluxConfig(
        model=json.loads(model.config.to_json()), stand_in=stand_in, unknown_cost=unknown_cost
    )
    wrapped = QFluxForCausalLM(config)
    wrapped.model = model
    return wrapped.train(model.training)


def export(
    model_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write the model that `qflux train` left in `model_path` as a Hugging Face folder.

    The files are made in a folder of their own beside `output_dir` and then renamed: a failure on
    the way leaves `output_dir` as it was.

    Args:
        model_path: folder that training wrote; it is only read.
        output_dir: folder to write; new or empty, unless `overwrite`.
        overwrite: replace files in a folder that has some. Those that have other names stay.

    Raises:
        FileNotFoundError, ValueError: as `qflux.load_model`.
        FileExistsError: `output_dir` is not empty, or is a file.
        ValueError: an empty name, or `output_dir` is the model's own folder, which is never
            overwritten.
    """
    model_path = check_path("model_path", os.fspath(model_path))
    target = check_path("output_dir", os.fspath(output_dir))
    _check_target(model_path, target, overwrite)
    model, vocabulary = load_model(model_path)
    tokenizer = make_tokenizer(vocabulary, model.config.context_length)
    breaks = tokenizer("\n").input_ids + tokenizer(" ").input_ids
    known = [i for i in breaks if i < vocabulary.size]
    wrapped = from_model(model, known[0] if known else 0, unknown_cost(vocabulary))
    for settings in (wrapped.config, wrapped.generation_config):
        settings.bos_token_id = settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    if wrapped.config.unknown_cost is not None:
        # They have a price, and no text.
        wrapped.generation_config.suppress_tokens = [
            tokenizer.eos_token_id,
            tokenizer.unk_token_id,
        ]
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        with _no_progress_bar():
            wrapped.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if target.exists():
            for file in sorted(made.iterdir()):
                os.replace(file, target / file.name)
        else:
            # A folder for temporary files is closed to others, a new one is as the user has it.
            target.mkdir()
            made.chmod(target.stat().st_mode & 0o777)
            target.rmdir()
            made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Meanwhile transformers draws none: a model of this kind is one small file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_target(model_path: Path, target: Path, overwrite: bool) -> None:
    """Raise unless the export may be written to `target`."""
    if target.exists() and model_path.exists() and os.path.samefile(target, model_path):
        raise ValueError(
            f"output_dir must not be the model's own folder {str(model_path)!r}: "
            "the export would destroy the model"
        )
    check_free(target, overwrite)
