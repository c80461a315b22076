"""Modules that are called, and modules whose weights may be taken without a call."""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its kind and its parameters tell, and nothing else.

    An adapter or a quantised layer in its place, hooks, a replaced `forward` and tensors that are
    more than numbers, such as quantised or distributed ones, do more.
    """
    of_all = nn.modules.module
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or of_all._global_forward_hooks
            or of_all._global_forward_pre_hooks
            or of_all._global_backward_hooks
            or of_all._global_backward_pre_hooks
        )
        and not any(map(is_traceable_wrapper_subclass, module._parameters.values()))
    )
