"""A process's leases as a whole: what a heartbeat says of them, and which of them nobody can bring back. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from sharedpool.wire.messages import LeaseReport, Phase, ReleaseReason
from sharedpool.worker.core.callsite import shown_stack
from sharedpool.worker.core.lease import CLOSING_LIMIT_S, HANDING_OUT_LIMIT_S, Closing, Lease

_MOST_STACKS = 200  # in one packet, in full


def reports(leases: Collection[Lease], now: float, threads: Mapping[int, str]) -> list[LeaseReport]:
    """Return every lease as the broker should see it; `threads` names threads by identifier."""
    deepest = None if len(leases) <= _MOST_STACKS else 1  # a frame is not endless
    return [
        LeaseReport(
            lease.token,
            lease.phase,
            max(0, int((now - lease.since) * 1000)),
            threads.get(lease.thread, "") if lease.phase is Phase.IN_USE else "",
            lease.backend,
            shown_stack(lease.stack[:deepest]) if lease.phase is Phase.IN_USE else [],
            lease.moves,
        )
        for lease in leases
    ]


def lost(
    leases: Iterable[Lease],
    idle: set[Lease],
    now: float,
    in_hand: Callable[[], set[Lease] | None] = lambda: None,
) -> list[Lease]:
    """Return leases nobody can bring back: their thread was interrupted, or their connection was collected.

    Each must look so at two heartbeats: a finalizer, or the thread that reclaims it, may be bringing it back.
    `in_hand` tells which leases threads are handling just now, if that can be told.
    """
    found = []
    handled: set[Lease] | None = None
    for lease in leases:
        missing = _ownerless(lease, idle)
        if missing and not _is_dropped(lease):
            # Between the deque and its user a thread needs a few microseconds; none is slower than the limit.
            if handled is None:
                handled = in_hand()
            missing = (
                now - lease.since > HANDING_OUT_LIMIT_S if handled is None else lease not in handled
            )
        if missing and lease.looked_lost_since == lease.since:
            found.append(lease)
        lease.looked_lost_since = lease.since if missing else None
    return found


def unfinished(leases: Iterable[Lease], now: float) -> list[Closing]:
    """Return closes that were begun long ago: whoever was at them was interrupted."""
    return [
        Closing(lease, ReleaseReason.CLOSED)
        for lease in leases
        if lease.phase is Phase.CLOSING
        and lease.conn is not None
        and now - lease.since >= CLOSING_LIMIT_S
    ]


def _is_dropped(lease: Lease) -> bool:
    """Say whether a lease's connection was collected, or its thread is gone that was to open one, or was never told."""
    if lease.phase is Phase.CONNECTING:
        return lease.conn is not None if lease.waiter is None else lease.waiter() is None
    return (
        lease.phase is not Phase.IDLE
        and lease.conn is None
        and lease.ref is not None
        and lease.ref() is None
    )


def _ownerless(lease: Lease, idle: set[Lease]) -> bool:
    if lease.conn is None or lease.phase is Phase.CONNECTING:
        return _is_dropped(lease)
    if lease.phase is Phase.IN_USE:
        return lease.conn is not None if lease.waiter is None else lease.waiter() is None
    return lease.phase is Phase.IDLE and lease not in idle
