"""Checks of numbers that users give."""

from __future__ import annotations

import math

from sharedpool.errors import ConfigError

LARGEST = 1_000_000_000  # seconds or connections: more is a mistake, and less than what the wire can carry


def check_number(
    argument: str, value: object, *, least: float = 0, above: bool = False, whole: bool = False
) -> None:
    """Raise `ConfigError` naming `argument` unless `value` is a number from (`above`) `least` to `LARGEST`."""
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if good and isinstance(value, int | float) and not math.isnan(value):
        good = (least < value if above else least <= value) and value <= LARGEST
    else:
        good = False
    if not good:
        kind = "whole number" if whole else "number"
        bound = f"above {least:g}" if above else f"of at least {least:g}"
        raise ConfigError(
            f"{argument}: must be a {kind} {bound} (and at most {LARGEST:g}), not {value!r}"
        )
