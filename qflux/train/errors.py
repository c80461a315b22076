"""Errors of a machine that say what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.exc import TorchDynamoException

from .checkpoint import first_line
from .options import TrainingOptions


@contextmanager
def plain_errors(options: TrainingOptions) -> Iterator[None]:
    """Errors for want of memory or of a compiler say what helps."""
    try:
        yield
    except TorchDynamoException as error:
        raise ValueError(
            f"torch.compile does not work here ({first_line(error)}): leave out compile"
        ) from error
    except (MemoryError, RuntimeError) as error:
        message = first_line(error)
        texts = ("out of memory", "can't allocate memory", "not enough memory")
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(text in message.lower() for text in texts):
            raise
        raise MemoryError(
            f"{options.device} has not enough memory ({message}): lower "
            f"batch_size ({options.batch_size}) or the context_length, raise accumulation "
            f"({options.accumulation}), or give gradient_checkpointing"
        ) from error
