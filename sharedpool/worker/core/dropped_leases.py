"""*Dropped* leases, which no thread can bring back any more, and closes that were interrupted.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.core.lease import CLOSING_LIMIT_S, HANDING_OUT_LIMIT_S, Closing, Lease


def dropped(
    leases: Iterable[Lease],
    idle: set[Lease],
    now: float,
    in_hand: Callable[[], set[Lease] | None] = lambda: None,
) -> list[Lease]:
    """Return leases that no thread can bring back.

    Their thread was interrupted, or their connection was collected.

    A lease counts only if it looks dropped at two heartbeats, with no change between: at the first,
    a finalizer or the thread that reclaims it may be bringing it back. `in_hand` returns the leases
    that threads are handling just now, or None if that cannot be found out.
    """
    found = []
    handled: set[Lease] | None = None
    for lease in leases:
        missing = _is_ownerless(lease, idle)
        if missing and not _is_collected(lease):
            # A thread needs some microseconds between taking a lease out of `idle` and handing its
            # connection to the user. No thread takes longer than HANDING_OUT_LIMIT_S.
            if handled is None:
                handled = in_hand()
            missing = (
                now - lease.since > HANDING_OUT_LIMIT_S if handled is None else lease not in handled
            )
        if missing and lease.looked_dropped_since == lease.since:
            found.append(lease)
        lease.looked_dropped_since = lease.since if missing else None
    return found


def unfinished(leases: Iterable[Lease], now: float) -> list[Closing]:
    """Return closes that have taken too long: the thread that began each was interrupted."""
    return [
        Closing(lease, ReleaseReason.CLOSED)
        for lease in leases
        if lease.phase is Phase.CLOSING
        and lease.conn is not None
        and now - lease.since >= CLOSING_LIMIT_S
    ]


def _is_collected(lease: Lease) -> bool:
    """Return True if a lease's connection, or the waiter it was for, was garbage collected."""
    if lease.phase is Phase.CONNECTING:
        return lease.conn is not None if lease.waiter is None else lease.waiter() is None
    return (
        lease.phase is not Phase.IDLE
        and lease.conn is None
        and lease.ref is not None
        and lease.ref() is None
    )


def _is_ownerless(lease: Lease, idle: set[Lease]) -> bool:
    """Return True if no thread seems to have a lease, though its phase says so."""
    if lease.conn is None or lease.phase is Phase.CONNECTING:
        return _is_collected(lease)
    if lease.phase is Phase.IN_USE:
        return lease.conn is not None if lease.waiter is None else lease.waiter() is None
    return lease.phase is Phase.IDLE and lease not in idle
