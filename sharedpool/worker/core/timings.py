"""Histograms of how long connects, waits and uses took in one process. Pure: no clock.

Checkouts and checkins by the fast path (`worker/pool.py`) are not timed, as that would slow them
down. They are accounted for like this:

- A fast checkout takes no time. The cache counts them (`hits`), and `news` adds them to the first
  bucket.
- The time of use is sampled. Every `SAMPLE_S` at most one checkout is chosen before it begins, and
  comes back by the slow path. Its time counts for all uses that have come back by the fast path
  since the last sample.

The caller holds the pool's lock around every method.
"""

from __future__ import annotations

from bisect import bisect_left

from sharedpool.wire import values
from sharedpool.wire.buckets import BOUNDS_S, BUCKETS

SAMPLE_S = 0.02


class Histogram:
    """Counts by bucket, and the sum of all values."""

    __slots__ = ("counts", "total_us")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total_us = 0

    def add(self, seconds: float, weight: int = 1) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += weight
        self.total_us += round(seconds * 1e6) * weight


class Timings:
    """The timings of one cache."""

    def __init__(self) -> None:
        self.created, self.waited, self.used = Histogram(), Histogram(), Histogram()
        self.due_at = float("-inf")  # when the next use may be chosen as a sample
        # Counts since the start.
        self._checkouts = 0  # by the slow path
        self._hits = 0  # by the fast path
        self._told = 0  # uses that `used` stands for
        self._serial = 0  # of the registration with the broker, for `values.Timings`
        nothing = values.Histogram([0] * BUCKETS, 0)
        self._base = self._last = values.Timings(0, nothing, nothing, nothing)

    def checked_out(self, seconds: float) -> None:
        """Record how long a checkout by the slow path took."""
        self.waited.add(seconds)
        self._checkouts += 1

    def choose(self, now: float) -> bool:
        """Return True if the next use is to be timed."""
        if now < self.due_at:
            return False
        self.due_at = now + SAMPLE_S
        return True

    def checked_in(self, seconds: float, hits: int, out: int, *, typical: bool) -> None:
        """Record how long a connection was used.

        `hits` are the checkouts by the fast path, `out` those that have not come back. `typical`
        means that only the timing has kept this checkin from the fast path, so that it stands for
        others.
        """
        self._hits = max(self._hits, hits)  # `hits` is counted without a lock and may step back
        weight = max(1, self._checkouts + self._hits - out - self._told) if typical else 1
        self.used.add(seconds, weight)
        self._told += weight

    def registered(self) -> None:
        """Count from the last report on: the broker may be new, or have forgotten this session."""
        self._serial += 1
        self._base = self._last

    def news(self, hits: int) -> values.Timings | None:
        """Return the timings since the registration; None if nothing is new since the last call."""
        self._hits = max(self._hits, hits)
        waited = _copy(self.waited)
        waited.counts[0] += self._hits
        total = values.Timings(self._serial, _copy(self.created), waited, _copy(self.used))
        if (total.created, total.waited, total.used) == (
            self._last.created,
            self._last.waited,
            self._last.used,
        ):
            return None
        self._last = total
        return values.Timings(
            self._serial,
            _since(self._base.created, total.created),
            _since(self._base.waited, total.waited),
            _since(self._base.used, total.used),
        )


def _copy(histogram: Histogram) -> values.Histogram:
    return values.Histogram(histogram.counts[:], histogram.total_us)


def _since(base: values.Histogram, total: values.Histogram) -> values.Histogram:
    counts = [now - then for then, now in zip(base.counts, total.counts, strict=True)]
    return values.Histogram(counts, total.total_us - base.total_us)
