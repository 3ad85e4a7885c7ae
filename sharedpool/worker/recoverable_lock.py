"""A lock that is never left locked: an interrupt may fall between its acquisition and whatever would release it."""

from __future__ import annotations

import threading
import time
import weakref

_CHECK_EVERY_S = 0.05  # for a turn that was dropped, which wakes nobody


class Hold:
    """One call's turn. It ends with `release()`, or when it is dropped."""

    __slots__ = ("__weakref__", "ended", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.ended = threading.Lock()
        self.ended.acquire()

    def release(self) -> None:
        """Let the next one have it."""
        self.ended.release()


class RecoverableLock:
    """What one thread at a time may do; it may come back to it while it is at it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: weakref.ref[Hold] | None = None

    @property
    def locked(self) -> bool:
        """Whether it is somebody's turn."""
        hold = None if self._holder is None else self._holder()
        return hold is not None and hold.ended.locked()

    def acquire(self, limit_s: float) -> Hold | None:
        """Return a turn, or None when another thread's lasts longer than `limit_s` seconds. Blocks until then."""
        deadline = time.monotonic() + limit_s
        mine = Hold()
        while True:
            with self._lock:
                hold = None if self._holder is None else self._holder()
                if hold is None or not hold.ended.locked():
                    self._holder = weakref.ref(mine)
                    return mine
            if hold.thread == mine.thread:
                return mine  # within its other one, which lasts longer
            ended, hold = hold.ended, None
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            if ended.acquire(timeout=min(left_s, _CHECK_EVERY_S)):
                ended.release()  # for others who wait, too
