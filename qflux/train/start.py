"""Weights, network and vocabulary of a model to start from: a run's folder, or an exported one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..models.base import CausalLM
from ..models.config import ModelConfig
from ..models.presets import config_from_json
from ..optional import require
from ..text.files import check_path
from ..text.vocabulary import (
    BpeVocabulary,
    ByteVocabulary,
    CharacterVocabulary,
    Vocabulary,
    bytes_to_letters,
    check_vocabulary_size,
)
from .checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    VOCABULARY_FILE,
    read_config,
    read_vocabulary,
)

TOKENIZER_FILE = "tokenizer.json"
# The exported model holds ours under this name.
PREFIX = "model."


def read_start(folder: str | Path) -> tuple[ModelConfig, Vocabulary]:
    """Network and vocabulary of the model in `folder`, which training or export wrote.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ImportError: the vocabulary needs the package tokenizers.
        ValueError: a file is broken or of another kind of model; names it.
    """
    folder = check_path("init_from", folder)
    _require_files(folder, CONFIG_FILE, MODEL_FILE)
    exported = _exported_model(folder)
    if exported is None:
        _require_files(folder, VOCABULARY_FILE)
        config, vocabulary = read_config(folder), read_vocabulary(folder)
    else:
        try:
            config = config_from_json(json.dumps(exported))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(folder / CONFIG_FILE)!r}: {error}") from None
        if (folder / VOCABULARY_FILE).is_file():
            vocabulary = read_vocabulary(folder)
        else:
            _require_files(folder, TOKENIZER_FILE)
            vocabulary = _exported_vocabulary(folder / TOKENIZER_FILE, config.vocab_size)
    check_vocabulary_size(vocabulary, config.vocab_size, f"the vocabulary in {str(folder)!r}")
    return replace(config, backend="auto"), vocabulary


def load_start(model: CausalLM, folder: str | Path) -> None:
    """Copy the weights of the model in `folder` into `model`.

    Raises:
        FileNotFoundError: the folder or its weights are missing.
        ValueError: weights of another network; says what differs.
    """
    path = Path(folder) / MODEL_FILE
    _require_files(path.parent, MODEL_FILE)
    try:
        weights = safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a file of weights: {error}") from None
    if _exported_model(path.parent) is not None:
        weights = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    _check_shapes(weights, model, path)
    model.load_state_dict(weights)


def _check_shapes(weights: dict[str, Tensor], model: CausalLM, path: Path) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    different = [
        f"{name} {found.get(name, 'missing')} -> {wanted.get(name, 'missing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"init_from {str(path.parent)!r} has weights of another network: "
            f"{', '.join(different[:3])}{more}"
        )


def _require_files(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"init_from must be the folder of a model, got "
                                    f"{str(folder)!r}, which has no {name}")  # fmt: skip


def _exported_model(folder: Path) -> object | None:
    """The network in the configuration of an exported model; None if it is none."""
    path = folder / CONFIG_FILE
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(given, dict) or "model_type" not in given:
        return None
    if given["model_type"] != "qflux" or not isinstance(given.get("model"), dict):
        raise ValueError(
            f"{str(path)!r} must be of a model of qflux, got model_type {given['model_type']!r}"
        )
    return given["model"]


def _exported_vocabulary(path: Path, size: int) -> Vocabulary:
    """The vocabulary behind a tokenizer that export wrote: its first `size` ids."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        model = given["model"]
        ids = {token: i for token, i in model["vocab"].items() if i < size}
        if model["type"] == "WordLevel":
            vocabulary = CharacterVocabulary(ids)
            if "".join(sorted(ids, key=ids.__getitem__)) != vocabulary.characters:
                raise ValueError("its ids are not those of characters in their order")
            return vocabulary
        if ids == bytes_to_letters() and not model["merges"]:
            return ByteVocabulary()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a tokenizer of qflux: {error}") from None
    # The tokens that export added, and what adds them to a text, are not the model's.
    given["added_tokens"] = [row for row in given.get("added_tokens", ()) if row["id"] < size]
    given.update(post_processor=None, truncation=None, padding=None)
    library = require("tokenizers", "a BPE vocabulary", extra="bpe")
    try:
        return BpeVocabulary(library.Tokenizer.from_str(json.dumps(given)))
    # The package raises nothing more specific.
    except Exception as error:
        raise ValueError(f"{str(path)!r} is not a tokenizer: {error}") from None
