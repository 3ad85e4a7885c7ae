"""A lock that an interrupt cannot leave locked.

With a plain lock, an exception of a signal handler may come between its acquisition and the `try`
that would release it. Here the lock is free again once the holder's `Hold` object is gone.
"""

from __future__ import annotations

import threading
import time
import weakref

_CHECK_EVERY_S = 0.05  # a `Hold` that was dropped wakes no waiting thread


class Hold:
    """One call's hold of the lock. It ends with `release()`, or when it is dropped."""

    __slots__ = ("__weakref__", "ended", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.ended = threading.Lock()
        self.ended.acquire()

    def release(self) -> None:
        """Release the lock."""
        self.ended.release()


class RecoverableLock:
    """A reentrant lock that is released when its holder is dropped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: weakref.ref[Hold] | None = None

    @property
    def locked(self) -> bool:
        """Whether a thread holds the lock."""
        hold = None if self._holder is None else self._holder()
        return hold is not None and hold.ended.locked()

    def acquire(self, limit_s: float) -> Hold | None:
        """Return a hold; None if another thread's lasts longer than `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        mine = Hold()
        while True:
            with self._lock:
                hold = None if self._holder is None else self._holder()
                if hold is None or not hold.ended.locked():
                    self._holder = weakref.ref(mine)
                    return mine
            if hold.thread == mine.thread:
                return mine  # reentered: the outer hold keeps the lock
            ended, hold = hold.ended, None
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            if ended.acquire(timeout=min(left_s, _CHECK_EVERY_S)):
                ended.release()  # other threads may wait for the same end
