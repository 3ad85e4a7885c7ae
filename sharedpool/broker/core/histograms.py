"""The times that a pool's sessions have told, added up, those of ended sessions included.

A session tells totals since its last registration. So a message may be lost, doubled or late.
"""

from __future__ import annotations

from sharedpool.wire.buckets import BOUNDS_S, BUCKETS
from sharedpool.wire.values import Histogram, Timings

KINDS = ("created", "waited", "used")


class Histograms:
    """One pool's histograms, by kind: a count for each bucket, and the sum in microseconds."""

    __slots__ = ("counts", "total_us")

    def __init__(self) -> None:
        self.counts = {kind: [0] * BUCKETS for kind in KINDS}
        self.total_us = dict.fromkeys(KINDS, 0)

    def note(self, before: Timings | None, times: Timings) -> bool:
        """Add what is new in a session's totals since `before`; return False if they are older."""
        if before is not None and times.serial < before.serial:
            return False
        since = before if before is not None and before.serial == times.serial else None
        news = {
            kind: _news(None if since is None else getattr(since, kind), getattr(times, kind))
            for kind in KINDS
        }
        if any(count < 0 for counts, _ in news.values() for count in counts):
            return False
        for kind, (counts, total_us) in news.items():
            mine = self.counts[kind]
            for index, count in enumerate(counts):
                mine[index] += count
            self.total_us[kind] += total_us
        return True

    def copy(self) -> Histograms:
        """Return a copy."""
        other = Histograms()
        other.counts = {kind: counts[:] for kind, counts in self.counts.items()}
        other.total_us = dict(self.total_us)
        return other


def waits(before: Timings | None, times: Timings, most: int) -> list[float]:
    """Return up to `most` waits, in seconds, that a session tells of since `before`.

    Only their buckets are known: they are spread evenly over each. The first bucket is left out:
    its checkouts found a connection at once.
    """
    since = before if before is not None and before.serial == times.serial else None
    counts, _ = _news(None if since is None else since.waited, times.waited)
    share = min(1.0, most / max(1, sum(counts[1:])))
    found: list[float] = []
    for low, high, count in zip(
        BOUNDS_S, (*BOUNDS_S[1:], 2 * BOUNDS_S[-1]), counts[1:], strict=True
    ):
        many = round(count * share)
        found += [low + (high - low) * (number + 0.5) / many for number in range(many)]
    return found


def _news(before: Histogram | None, now: Histogram) -> tuple[list[int], int]:
    if before is None:
        return now.counts, now.total_us
    return [
        new - old for old, new in zip(before.counts, now.counts, strict=True)
    ], now.total_us - before.total_us
