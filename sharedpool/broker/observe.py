"""What the metrics and the status page are made of: the books at one moment, copied. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sharedpool.broker.records import Books, Lease, SlotState
from sharedpool.broker.report import report_pool
from sharedpool.broker.totals import Totals
from sharedpool.wire.reports import PoolReport, Report

_KEPT = 360


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """One lease, for the page's table; `for_ms` is how long it has been in use or idle, as far as is known."""

    pool: str
    process: str
    thread: str
    state: str
    for_ms: int | None
    backend: int | None
    lease: str


@dataclass(frozen=True, slots=True)
class Observation:
    """The broker at one moment. `pools` has also those that nobody uses any more, with what was counted for them."""

    report: Report
    pools: list[tuple[PoolReport, Totals]]
    leases: list[LeaseRow]


def observe(books: Books, report: Report, now: float) -> Observation:
    """Return a copy of the books; O(n) of sessions and leases."""
    pools = [*books.pools.values(), *books.past.values()]
    rows = [_row(lease, now) for lease in books.leases.values()]
    rows.sort(key=lambda row: (row.state != "in use", -(row.for_ms or 0)))
    return Observation(report, [(report_pool(pool), pool.totals.copy()) for pool in pools], rows)


def _row(lease: Lease, now: float) -> LeaseRow:
    state, since = _state(lease)
    return LeaseRow(
        lease.pool.name,
        lease.session.label,
        lease.thread,
        state,
        None if since is None else max(0, int((now - since) * 1000)),
        None if lease.backend is None else lease.backend.pid,
        str(lease.token),
    )


def _state(lease: Lease) -> tuple[str, float | None]:
    if lease.live is not None:
        return "parked", lease.idle_since
    if lease.state is SlotState.OPEN:
        return ("idle", lease.idle_since) if lease.idle_since is not None else ("in use", lease.used_since)
    return {SlotState.GRANTED: "connecting"}.get(lease.state, lease.state.value), None


class History:
    """How each pool was used over the last while: at most `_KEPT` points a pool, the newest at the end."""

    def __init__(self) -> None:
        self._points: dict[str, deque[tuple[float, int, int, int, int]]] = {}

    def add(self, seen: Observation, now: float) -> None:
        """Note the pools as they are now."""
        for pool, _ in seen.pools:
            points = self._points.setdefault(pool.name, deque(maxlen=_KEPT))
            points.append((now, pool.in_use, pool.leases, pool.waiting, pool.max_conn))
        for name in self._points.keys() - {pool.name for pool, _ in seen.pools}:
            del self._points[name]

    def ages(self, now: float) -> dict[str, list[tuple[float, int, int, int, int]]]:
        """Return by pool: how many seconds ago, in use, leases, waiting, the limit."""
        return {
            name: [(round(now - point[0], 1), *point[1:]) for point in points] for name, points in self._points.items()
        }
