"""Log dropped messages at a limited rate.

Any process that can write to the broker's sockets could fill the disk otherwise.
"""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("sharedpool.broker")

_LINES = 5
_WINDOW_S = 10.0


class DropLog:
    """Warnings about dropped messages: a few in ten seconds, the others are only counted."""

    def __init__(self) -> None:
        self._until = 0.0
        self._lines = self._suppressed = 0

    def dropped(self, text: str, *args: object, **fields: object) -> None:
        """Warn, or count; `fields` tell programs which session or process it concerns."""
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
