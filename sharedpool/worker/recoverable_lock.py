"""A lock that is never left locked: an interrupt may fall between its acquisition and whatever would release it."""

from __future__ import annotations

import threading
import time
import weakref

_LOOK_EVERY_S = 0.05  # for a turn that was dropped, which wakes nobody


class Turn:
    """One call's turn. It ends with `end()`, or when it is dropped."""

    __slots__ = ("__weakref__", "ended", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.ended = threading.Lock()
        self.ended.acquire()

    def end(self) -> None:
        """Let the next one have it."""
        self.ended.release()


class Turns:
    """What one thread at a time may do; it may come back to it while it is at it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._whose: weakref.ref[Turn] | None = None

    @property
    def busy(self) -> bool:
        """Whether it is somebody's turn."""
        turn = None if self._whose is None else self._whose()
        return turn is not None and turn.ended.locked()

    def take(self, limit_s: float) -> Turn | None:
        """Return a turn, or None when another thread's lasts longer than `limit_s` seconds. Blocks until then."""
        deadline = time.monotonic() + limit_s
        mine = Turn()
        while True:
            with self._lock:
                turn = None if self._whose is None else self._whose()
                if turn is None or not turn.ended.locked():
                    self._whose = weakref.ref(mine)
                    return mine
            if turn.thread == mine.thread:
                return mine  # within its other one, which lasts longer
            ended, turn = turn.ended, None
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            if ended.acquire(timeout=min(left_s, _LOOK_EVERY_S)):
                ended.release()  # for others who wait, too
