"""Check numbers that users give."""

from __future__ import annotations

import math

from sharedpool.errors import ConfigError

# Seconds or connections. More is surely a mistake, and the wire can carry this much.
LARGEST = 1_000_000_000


def parse_seconds(text: str) -> float:
    """Return a positive number of seconds, or raise `ValueError` with a text for users."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < LARGEST:
        raise ValueError(f"{text!r} is not a positive number of seconds")
    return seconds


def check_number(
    argument: str, value: object, *, least: float = 0, above: bool = False, whole: bool = False
) -> None:
    """Raise `ConfigError` unless `value` is a number from `least` to `LARGEST`.

    With `above` the number must be more than `least`, with `whole` an int. The text names
    `argument`.
    """
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
