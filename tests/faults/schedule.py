"""Time as a part of the fault: how long a load or a fault lasts. Nothing is synchronised by it."""

import time
from collections.abc import Callable


def let_pass(seconds: float, meanwhile: Callable[[], object] | None = None) -> None:
    """Let a load or a fault last for so long; with `meanwhile`, call it four times a second."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if meanwhile is not None:
            meanwhile()
        time.sleep(min(left, 0.25))
