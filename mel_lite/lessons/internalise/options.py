"""Checks of the options of an internalization. Each raises ConfigError with the option, its value and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mel_lite.errors import ConfigError, check_choice

FIELD = "internalisation_options"


def check_option(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of `choices`."""
    check_choice(f"{FIELD}.{name}", value, choices)


def check_flag(name: str, value: object) -> None:
    """Refuse a value that is no bool; a text such as "false" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{FIELD}.{name}={value!r} is a {type(value).__name__}. Set it to true or false.")


def check_number(name: str, value: object, *, least: float, most: float = math.inf, above: bool = False) -> None:
    """Refuse a value that is no finite number in [least, most], or in (least, most] if `above`."""
    wanted = f"above {least}" if above else f"{least} or more" if most == math.inf else f"in [{least}, {most}]"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and least <= value <= most and not (above and value == least)):  # type: ignore[operator]
        raise ConfigError(f"{FIELD}.{name}={value!r} must be a number {wanted}. Set {FIELD}.{name}.")


__all__ = ["check_flag", "check_number", "check_option"]
