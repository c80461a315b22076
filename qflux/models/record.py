"""What configurations share: checks that name the argument, and JSON."""

from __future__ import annotations

import json
import math
import numbers
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


class Record:
    """The base of a frozen dataclass of hyperparameters.

    `architecture` tells the files of one kind of model from those of another.
    """

    architecture: ClassVar[str]

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")

    def _check_flag(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")

    def _check_integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer >= {minimum}, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be >= {minimum}, got {value!r}")

    def _check_real(
        self,
        name: str,
        *,
        minimum: float = -math.inf,
        above: float = -math.inf,
        below: float = math.inf,
        why: str = "",
    ) -> None:
        value = getattr(self, name)
        limits = [
            text
            for text, given in (
                (f">= {minimum}{why}", minimum > -math.inf),
                (f"> {above}", above > -math.inf),
                (f"< {below}", below < math.inf),
            )
            if given
        ]
        allowed = " and ".join(["finite", *limits])
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a real number, {allowed}, got {value!r}")
        if not (math.isfinite(value) and value >= minimum and above < value < below):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")

    def to_json(self) -> str:
        """The configuration as a JSON object, one key a line."""
        return json.dumps({"architecture": self.architecture, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; absent keys take their defaults.

        Raises:
            ValueError: not a JSON object, unknown or missing keys (named), or a bad value.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the configuration is not valid JSON: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"the configuration must be a JSON object, got {type(given).__name__}")
        architecture = given.pop("architecture", cls.architecture)
        if architecture != cls.architecture:
            raise ValueError(f"architecture must be {cls.architecture!r}, got {architecture!r}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"unknown configuration keys {', '.join(unknown)}; allowed: {', '.join(known)}"
            )
        if "vocab_size" not in given:
            raise ValueError("the configuration lacks vocab_size")
        return cls(**given)
