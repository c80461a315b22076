"""Numbers that a module computes from its configuration, and that no file has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def initial(values: Tensor) -> Tensor:
    """Values computed in float64, in the default dtype: where a parameter starts."""
    return values.to(torch.get_default_device(), torch.get_default_dtype())


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, if its precision is lower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class WithConstants(nn.Module):
    """A module with constants: buffers that follow from its configuration and are in no state.

    They are in float32, or in float64 where the module is, whatever the default dtype was when it
    was built, and no cast takes digits from them. What moves, casts or empties the module's memory
    fills them again, so `to_empty` before `load_state_dict` is harmless.
    """

    @abstractmethod
    def constants(self) -> dict[str, Tensor]:
        """The constants by name, in float64 on the CPU."""

    def register_constants(self) -> None:
        """Make the buffers, on the default device."""
        for name, value in self.constants().items():
            self.register_buffer(name, at_least_float32(initial(value)), persistent=False)
        self.fill_constants()

    @torch.no_grad()
    def fill_constants(self, device: torch.device | None = None) -> None:
        """Write the constants where their buffers are, or on another device."""
        for name, value in self.constants().items():
            buffer = at_least_float32(getattr(self, name))
            if device is not None and device != buffer.device:
                buffer = torch.empty_like(buffer, device=device)
            setattr(self, name, buffer.copy_(value))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.fill_constants()
        return self


def fill_after_loading(model: nn.Module, _keys: Any) -> None:
    """A hook of `load_state_dict`: constants on "meta" follow the parameters that left it."""
    for module in model.modules():
        if isinstance(module, WithConstants):
            tensors = (*model.parameters(), *model.buffers())
            real = next((t.device for t in tensors if not t.is_meta), None)
            if real is not None and any(getattr(module, n).is_meta for n in module.constants()):
                module.fill_constants(real)
