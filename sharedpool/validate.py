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
    argument: str,
    value: object,
    *,
    least: float = 0,
    above: bool = False,
    whole: bool = False,
    optional: bool = False,
    infinite: bool = False,
) -> None:
    """Raise `ConfigError` unless `value` is a number from `least` to `LARGEST`.

    `above`: it must be more than `least`. `whole`: it must be an int. `optional`: it may also be
    None, `infinite`: also `math.inf`. The error's text names `argument`.
    """
    if (optional and value is None) or (infinite and value == math.inf):
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        in_range = least < value <= LARGEST if above else least <= value <= LARGEST  # NaN: false
        if in_range and not (whole and isinstance(value, float)):
            return
    kind = "whole number" if whole else "number"
    bound = f"above {least:g}" if above else f"of at least {least:g}"
    raise ConfigError(
        f"{argument}: must be a {kind} {bound} (and at most {LARGEST:g}), not {value!r}"
    )
