"""The log of what was dropped: whoever can write to the broker's sockets must not be able to fill the disk."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("sharedpool.broker")

_LINES = 5
_WINDOW_S = 10.0


class DropLog:
    """Warnings about what is not worth an answer: a few in every ten seconds, the others only counted."""

    def __init__(self) -> None:
        self._until = 0.0
        self._lines = self._suppressed = 0

    def dropped(self, text: str, *args: object, **fields: object) -> None:
        """Warn, or count; `fields` say for programs whom it concerns."""
        now = time.monotonic()
        if now >= self._until:
            if self._suppressed:
                logger.warning("dropped %d more like these", self._suppressed)
            self._until, self._lines, self._suppressed = now + _WINDOW_S, 0, 0
        if self._lines < _LINES:
            self._lines += 1
            logger.warning(text, *args, extra={"sharedpool": fields})
        else:
            self._suppressed += 1
