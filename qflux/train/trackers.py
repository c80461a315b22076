"""Services that show metrics while a model trains: TensorBoard and Weights & Biases, optional."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..models.config import ModelConfig
from ..optional import require
from .checkpoint import write_atomically
from .options import TrackerName

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The names of the training program that the Flux document describes.
NAMES = {
    "train_loss": "train/loss",
    "val_loss": "val/loss",
    "learning_rate": "train/lr",
    "gradient_norm": "train/gradient_norm",
    "window_length": "train/window_length",
    "epoch": "train/epoch",
    "tokens_per_second": "performance/tokens_per_second",
    "peak_memory_mb": "performance/peak_memory_mb",
    "elapsed_seconds": "performance/elapsed_seconds",
}


class Tracker(Protocol):
    """Takes a line of `metrics.jsonl` after a step, and figures of that step."""

    def log(self, step: int, line: dict[str, Any]) -> None: ...

    def log_figure(self, step: int, name: str, figure: Figure) -> None: ...

    def close(self) -> None: ...


def named_scalars(line: dict[str, Any]) -> dict[str, float]:
    """A line of `metrics.jsonl` as scalars in folders, perplexities added.

    Losses are in nats a token, so a perplexity is exp(loss). What layers did becomes
    "layer0/density" and so on.
    """
    scalars = {name: line[key] for key, name in NAMES.items() if key in line}
    for part in ("train", "val"):
        if f"{part}_loss" in line:
            # A float ends at exp(709).
            scalars[f"{part}/perplexity"] = math.exp(min(line[f"{part}_loss"], 700.0))
    for key, value in line.items():
        if isinstance(value, list):
            scalars |= {f"layer{i}/{key}": number for i, number in enumerate(value)}
    return scalars


class TensorBoardTracker:
    """Event files in `folder/tensorboard`; needs the package tensorboard.

    What earlier files have of steps after `step` is hidden, since they are taken again.
    """

    def __init__(self, folder: Path, config: ModelConfig, step: int = 0) -> None:
        require("tensorboard", "tracking with TensorBoard", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", f"```json\n{config.to_json()}```")

    def log(self, step: int, line: dict[str, Any]) -> None:
        """Write the scalars of a line."""
        for name, value in named_scalars(line).items():
            self.writer.add_scalar(name, value, step)

    def log_figure(self, step: int, name: str, figure: Figure) -> None:
        """Write a figure as an image."""
        self.writer.add_figure(name, figure, step)

    def close(self) -> None:
        """Flush and close the files."""
        self.writer.close()


class WandbTracker:
    """A Weights & Biases run named after the folder; needs the package wandb.

    A resumed run continues the one whose id `folder/wandb_id` holds. Project, mode
    (`WANDB_MODE=offline`) and the like come from wandb's environment variables.

    Raises:
        ValueError: wandb does not start, for want of a login say.
    """

    def __init__(self, folder: Path, config: ModelConfig, step: int = 0) -> None:
        wandb = require("wandb", "tracking with Weights & Biases", extra="wandb")
        self.image = wandb.Image
        file = folder / "wandb_id"
        if not file.exists():
            write_atomically(file, uuid.uuid4().hex[:8].encode())
        try:
            self.run = wandb.init(
                name=folder.name,
                id=file.read_text(),
                resume="allow",
                dir=str(folder),
                config=json.loads(config.to_json()),
            )
        # Its errors have no base of their own.
        except Exception as error:
            raise ValueError(
                f"Weights & Biases does not start: {error}; log in with `wandb login`, "
                f"set WANDB_MODE=offline, or leave out the tracker"
            ) from error

    def log(self, step: int, line: dict[str, Any]) -> None:
        """Send the scalars of a line."""
        self.run.log(named_scalars(line), step=step)

    def log_figure(self, step: int, name: str, figure: Figure) -> None:
        """Send a figure as an image."""
        self.run.log({name: self.image(figure)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


CLASSES: dict[TrackerName, Callable[[Path, ModelConfig, int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


@contextmanager
def open_trackers(
    names: Sequence[TrackerName], folder: Path, config: ModelConfig, step: int = 0
) -> Iterator[list[Tracker]]:
    """The trackers of these names for a run in `folder` after `step`, closed at the end.

    Raises:
        ImportError: a package is missing; the message says which and how to install it.
        ValueError: a service does not start.
    """
    with ExitStack() as stack:
        trackers = []
        for name in names:
            trackers.append(CLASSES[name](folder, config, step))
            stack.callback(trackers[-1].close)
        yield trackers
