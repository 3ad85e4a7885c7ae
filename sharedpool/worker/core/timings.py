"""How long connects, waits and uses took in one process, as histograms. Pure: no clock.

The caller holds the pool's lock around every method. A checkout or checkin that goes the fast path (`worker/pool.py`)
is not touched by any of this: that it took no time to be had is known from the cache's count of such checkouts, and how
long it was used from a sample. Each `SAMPLE_S` one checkout at most is chosen, before it begins, to come back by the
slow path; its time stands for all that came back by the fast path meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left

from sharedpool.wire import messages
from sharedpool.wire.buckets import BOUNDS_S, BUCKETS

SAMPLE_S = 0.02


class Histogram:
    """Counts by bucket, and the sum."""

    __slots__ = ("counts", "total_us")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total_us = 0

    def add(self, seconds: float, weight: int = 1) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += weight
        self.total_us += round(seconds * 1e6) * weight


class Timings:
    """One cache's. `due_at` is when the next checkout may be chosen."""

    def __init__(self) -> None:
        self.created, self.waited, self.used = Histogram(), Histogram(), Histogram()
        self.due_at = float("-inf")
        self._checkouts = 0  # by the slow path
        self._told = 0  # checkouts whose use has been told
        self._hits = 0
        self._serial = 0  # of the registration with the broker
        nothing = messages.Histogram([0] * BUCKETS, 0)
        self._base = self._last = messages.Timings(0, nothing, nothing, nothing)

    def checked_out(self, seconds: float) -> None:
        """Note how long a checkout took that did not go the fast path."""
        self.waited.add(seconds)
        self._checkouts += 1

    def choose(self, now: float) -> bool:
        """Say whether the next use is to be timed."""
        if now < self.due_at:
            return False
        self.due_at = now + SAMPLE_S
        return True

    def checked_in(self, seconds: float, hits: int, out: int, *, typical: bool) -> None:
        """Note how long a connection was used.

        `hits`: checkouts that went the fast path; `out`: those that are not over. `typical`: but for this, it would
        have come back the fast path too.
        """
        self._hits = max(self._hits, hits)  # counted without a lock: it may have stepped back
        weight = max(1, self._checkouts + self._hits - out - self._told) if typical else 1
        self.used.add(seconds, weight)
        self._told += weight

    def registered(self) -> None:
        """Begin to count from what was sent last: the broker may be another, or has forgotten this session."""
        self._serial += 1
        self._base = self._last

    def news(self, hits: int) -> messages.Timings | None:
        """Return what the heartbeat has to tell, counted since the registration; None when nothing has changed."""
        self._hits = max(self._hits, hits)
        waited = _copy(self.waited)
        waited.counts[0] += self._hits
        total = messages.Timings(self._serial, _copy(self.created), waited, _copy(self.used))
        if (total.created, total.waited, total.used) == (
            self._last.created,
            self._last.waited,
            self._last.used,
        ):
            return None
        self._last = total
        return messages.Timings(
            self._serial,
            _since(self._base.created, total.created),
            _since(self._base.waited, total.waited),
            _since(self._base.used, total.used),
        )


def _copy(histogram: Histogram) -> messages.Histogram:
    return messages.Histogram(histogram.counts[:], histogram.total_us)


def _since(base: messages.Histogram, total: messages.Histogram) -> messages.Histogram:
    counts = [now - then for then, now in zip(base.counts, total.counts, strict=True)]
    return messages.Histogram(counts, total.total_us - base.total_us)
