"""Packages that only parts of the library need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str, purpose: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: its import name.
        purpose: what needs it, for the message.
        extra: the extra of this distribution that installs it.

    Raises:
        ImportError: it is not installed, or an import inside it fails; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {package!r}, which cannot be imported ({error}); "
            f'install it with: pip install "qflux[{extra}]"'
        ) from error
