"""Wait for a condition instead of sleeping."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    predicate: Callable[..., T | None], timeout_s: float = 10, what: str = "the condition"
) -> T:
    """Call `predicate` every 5 ms, after a second every 25 ms, until it returns something true, and return that.

    Raises AssertionError with `what` and the last value when `timeout_s` have passed.
    """
    began = time.monotonic()
    while not (value := predicate()):
        waited = time.monotonic() - began
        if waited > timeout_s:
            raise AssertionError(
                f"waited {timeout_s:g} s in vain for {what}; last value: {value!r}"
            )
        time.sleep(
            0.005 if waited < 1 else 0.025
        )  # what asks all the time keeps who is waited for from its work
    return value
