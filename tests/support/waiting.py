"""Wait for a condition instead of sleeping."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    predicate: Callable[..., T | None], timeout_s: float = 10, what: str = "the condition"
) -> T:
    """Call `predicate` until it returns something true, and return that.

    Raise AssertionError with `what` and the last value after `timeout_s`.
    """
    began = time.monotonic()
    while not (value := predicate()):
        waited = time.monotonic() - began
        if waited > timeout_s:
            raise AssertionError(
                f"waited {timeout_s:g} s in vain for {what}; last value: {value!r}"
            )
        # Longer pauses later on: a busy loop would slow down the process that is waited for.
        time.sleep(0.005 if waited < 1 else 0.025)
    return value
