"""Snapshots of the records, for the metrics and the status page."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sharedpool.broker.core.histograms import Histograms
from sharedpool.broker.core.report import lease_lines, report_pool
from sharedpool.broker.core.slots import Slots
from sharedpool.wire.reports import MOST_LISTED, LeaseLine, PoolReport, Report

_KEPT = 360


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The broker at one moment; `pools` includes those that nobody uses any more."""

    report: Report
    pools: list[tuple[PoolReport, Histograms]]
    leases: list[LeaseLine]


def take_snapshot(slots: Slots, report: Report, now: float) -> Snapshot:
    """Return a copy of the records; O(n) in sessions and leases."""
    pools = [*slots.pools.values(), *slots.former_pools.values()]
    return Snapshot(
        report,
        [(report_pool(pool), pool.counters.totals.copy()) for pool in pools],
        lease_lines(slots, MOST_LISTED, now),
    )


class History:
    """How each pool was used lately: at most `_KEPT` points for each, the newest at the end."""

    def __init__(self) -> None:
        self._points: dict[str, deque[tuple[float, int, int, int, int]]] = {}

    def add(self, snapshot: Snapshot, now: float) -> None:
        """Record the pools as they are now."""
        for pool, _ in snapshot.pools:
            points = self._points.setdefault(pool.name, deque(maxlen=_KEPT))
            points.append((now, pool.in_use, pool.leases, pool.waiting, pool.max_conn))
        for name in self._points.keys() - {pool.name for pool, _ in snapshot.pools}:
            del self._points[name]

    def ages(self, now: float) -> dict[str, list[tuple[float, int, int, int, int]]]:
        """Return the points of each pool: age in seconds, in use, leases, waiting, the limit."""
        return {
            name: [(round(now - point[0], 1), *point[1:]) for point in points]
            for name, points in self._points.items()
        }
