"""Models and training states on disk: complete files or none."""

from __future__ import annotations

import io
import json
import os
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
STATE_FILE = "training_state.pt"


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace the file at `path`: whatever happens, it holds the old content or all of the new.

    The content goes to a temporary name in the same folder, is flushed to the disk and renamed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is no such device, or this PyTorch cannot use it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that this PyTorch can use, such as 'cpu' or 'cuda', "
            f"got {str(device)!r}: {reason}"
        ) from None


def save_model(folder: str | Path, model: CausalLM, vocabulary: Vocabulary) -> None:
    """Write `config.json`, `vocabulary.json` and `model.safetensors` into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, model.config.to_json().encode())
    write_atomically(folder / VOCABULARY_FILE, vocabulary.to_json().encode())
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_atomically(folder / MODEL_FILE, safetensors.torch.save(weights))


def load_model(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[CausalLM, Vocabulary]:
    """Read what `save_model` wrote; the model is in evaluation mode.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: weights or a vocabulary that do not belong to the configuration, or no such
            device.
    """
    folder, device = check_path("model_path", folder), usable_device(device)
    for name in (CONFIG_FILE, VOCABULARY_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model folder {str(folder)!r} has no {name}")
    config = config_from_json((folder / CONFIG_FILE).read_text())
    vocabulary = _read_vocabulary(folder / VOCABULARY_FILE, config.vocab_size)
    model = make_model(config)
    try:
        model.load_state_dict(safetensors.torch.load((folder / MODEL_FILE).read_bytes()))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{str(folder / MODEL_FILE)!r} does not fit {CONFIG_FILE} beside it: {error}"
        ) from None
    return model.to(device).eval(), vocabulary


def _read_vocabulary(path: Path, size: int) -> Vocabulary:
    """The vocabulary of a model with `size` tokens."""
    try:
        vocabulary = vocabulary_from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a vocabulary: {error}") from None
    check_vocabulary_size(vocabulary, size, str(path))
    return vocabulary


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write a training state of tensors and plain values into `folder`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(Path(folder) / STATE_FILE, buffer.getvalue())


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no training state in `folder`.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {str(folder)!r} has no {STATE_FILE}")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_same_model(state: dict[str, Any], config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Raise unless a training state is of this configuration and this vocabulary.

    Raises:
        ValueError: what differs.
    """
    saved = json.loads(config_from_json(state["config"]).to_json())
    wanted = json.loads(config.to_json())
    different = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]
    if different:
        raise ValueError(f"cannot resume with another configuration: {', '.join(different)}")
    if state["vocabulary"] != vocabulary.to_json():
        raise ValueError("cannot resume with another vocabulary: the text or its kind has changed")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the random numbers of the CPU and of a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
