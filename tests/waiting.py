"""Wait for a condition instead of sleeping."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout_s: float = 10, what: str = "the condition") -> T:
    """Call `predicate` every 5 ms until it returns something true, and return that.

    Raises AssertionError with `what` and the last value when `timeout_s` have passed.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}; last value: {value!r}")
        time.sleep(0.005)
    return value
