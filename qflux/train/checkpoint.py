"""Models on disk: complete files or none."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..models.base import CausalLM
from ..models.config import ModelConfig
from ..models.presets import config_from_json, make_model
from ..text.files import check_path
from ..text.vocabulary import Vocabulary, check_vocabulary_size, vocabulary_from_json

CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocabulary.json"
MODEL_FILE = "model.safetensors"


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace the file at `path`: whatever happens, it holds the old content or all of the new.

    The content goes to a temporary name in the same folder, is flushed to the disk and renamed.

    Raises:
        OSError: it cannot be written, on a full disk say; names the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def first_line(error: Exception) -> str:
    """What an error says, on one line; its kind if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is no such device, or this PyTorch cannot use it.
    """
    try:
        found = torch.zeros(1, device=device)
        # A device without memory, "meta" say, has no values to read.
        found.item()
        return found.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device must be one that this PyTorch can use, such as 'cpu' or 'cuda', "
            f"got {str(device)!r}: {first_line(error)}"
        ) from None


def save_model(
    folder: str | Path,
    model: CausalLM,
    vocabulary: Vocabulary,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write `config.json`, `vocabulary.json` and `model.safetensors` into `folder`.

    `weights` are those of the whole model by name, on the CPU; default: the model has them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, model.config.to_json().encode())
    write_atomically(folder / VOCABULARY_FILE, vocabulary.to_json().encode())
    if weights is None:
        weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_atomically(folder / MODEL_FILE, safetensors.torch.save(weights))


def read_config(folder: Path) -> ModelConfig:
    """The configuration in `config.json` of a folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is broken, or has a bad value; names the file.
    """
    path = folder / CONFIG_FILE
    try:
        return config_from_json(path.read_text(encoding="utf-8"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in `vocabulary.json` of a folder.

    Raises:
        OSError: it cannot be read.
        ImportError: it needs a package that is not installed.
        ValueError: it is broken; names the file.
    """
    path = folder / VOCABULARY_FILE
    try:
        return vocabulary_from_json(path.read_text(encoding="utf-8"))
    except (OSError, ImportError):
        raise
    except KeyError as error:
        raise ValueError(f"{str(path)!r} lacks {error}") from None
    # The package tokenizers raises nothing more specific.
    except Exception as error:
        raise ValueError(f"{str(path)!r} is not a vocabulary: {error}") from None


def load_model(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[CausalLM, Vocabulary]:
    """Read what `save_model` wrote; the model is in evaluation mode.

    Its backend is "auto", whatever it was trained with: it may have come from another machine.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a broken file (named), weights or a vocabulary that do not belong to the
            configuration, or no such device.
    """
    folder, device = check_path("model_path", folder), usable_device(device)
    for name in (CONFIG_FILE, VOCABULARY_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model folder {str(folder)!r} has no {name}")
    config = replace(read_config(folder), backend="auto")
    vocabulary = read_vocabulary(folder)
    check_vocabulary_size(vocabulary, config.vocab_size, str(folder / VOCABULARY_FILE))
    model = make_model(config)
    try:
        model.load_state_dict(safetensors.torch.load((folder / MODEL_FILE).read_bytes()))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{str(folder / MODEL_FILE)!r} does not fit {CONFIG_FILE} beside it: {error}"
        ) from None
    return model.to(device).eval(), vocabulary


def check_same_model(state: dict[str, Any], config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Raise unless a training state is of this configuration and this vocabulary.

    The backend may differ: it says how the model is computed, and not what it is.

    Raises:
        ValueError: what differs.
    """
    saved = json.loads(config_from_json(state["config"]).to_json())
    wanted = json.loads(config.to_json())
    different = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in wanted.items()
        if saved.get(name) != value and name != "backend"
    ]
    if different:
        raise ValueError(f"cannot resume with another configuration: {', '.join(different)}")
    if state["vocabulary"] != vocabulary.to_json():
        raise ValueError("cannot resume with another vocabulary: the text or its kind has changed")
