"""Wait for a condition instead of sleeping."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_SHARE, _LONGEST_S = 4, 0.1  # a pause is so many times as long as the look before, at most that


def wait_until(
    predicate: Callable[..., T | None], timeout_s: float = 10, what: str = "the condition"
) -> T:
    """Call `predicate` until it returns something true, and return that.

    Raise AssertionError with `what` and the last value after `timeout_s`.
    """
    began = looked_at = time.monotonic()
    while not (value := predicate()):
        now = time.monotonic()
        if now - began > timeout_s:
            raise AssertionError(
                f"waited {timeout_s:g} s in vain for {what}; last value: {value!r}"
            )
        # Longer pauses later on, and after a long look: a busy loop would slow down the process
        # that is waited for.
        shortest_s = 0.005 if now - began < 1 else 0.025
        time.sleep(max(shortest_s, min(_LONGEST_S, _SHARE * (now - looked_at))))
        looked_at = time.monotonic()
    return value
