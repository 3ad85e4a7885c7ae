"""What the metrics and the status page are made of: the books at one moment, copied. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from sharedpool.broker.records import Books, Lease, SlotState
from sharedpool.broker.report import report_pool
from sharedpool.broker.totals import Totals
from sharedpool.wire.messages import PoolReport, Report


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
    if lease.state is SlotState.OPEN:
        return ("idle", lease.idle_since) if lease.idle_since is not None else ("in use", lease.used_since)
    return {SlotState.GRANTED: "connecting"}.get(lease.state, lease.state.value), None
