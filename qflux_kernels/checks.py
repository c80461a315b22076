"""The checks of arguments, in one style: the argument, what is allowed, what came."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from typing import TypeGuard


def check_choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """Return `value` if it is one of `allowed`, else raise."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {tuple(allowed)}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
    return value


def check_flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False, else raise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Return `value` if it is an integer in [minimum, maximum], else raise."""
    allowed = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
    if isinstance(value, bool) or not isinstance(value, int):
        if is_traced_size(value):
            return value
        raise TypeError(
            f"{name} must be an integer {allowed}, got {value!r} ({type(value).__name__})"
        )
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")
    return value


def is_traced_size(value: object) -> TypeGuard[int]:
    """Whether the value is a size that stands for any number in a traced program."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.SymInt)


def check_real(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    finite: bool = True,
    why: str = "",
) -> float:
    """Return `value` if it is a real number within the limits, else raise; NaN is never allowed.

    `why` is appended to the minimum: what it stands for, such as " = sigma_min".
    """
    real = isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)
    number = cast("float", value)  # numbers.Real has no order that type checkers know
    if real:
        inside = minimum <= number <= maximum
        if above > -math.inf:
            inside = inside and number > above
        if below < math.inf:
            inside = inside and number < below
        if inside and (not finite or math.isfinite(number)):
            return number
    limits = [
        text
        for text, given in (
            (f">= {minimum}{why}", minimum > -math.inf),
            (f"> {above}", above > -math.inf),
            (f"<= {maximum}", maximum < math.inf),
            (f"< {below}", below < math.inf),
        )
        if given
    ]
    kind = "a finite real number" if finite else "a real number"
    allowed = f"{kind} {' and '.join(limits)}" if limits else kind
    if not real:
        raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__})")
    raise ValueError(f"{name} must be {allowed}, got {value!r}")
