"""What `sharedpool status`, `who` and `top` show: every pool, session and lease on record."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from sharedpool.broker.core.demand import waiting_in_lane
from sharedpool.broker.core.records import Lease, Pool, Session
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.broker.core.slots import Slots
from sharedpool.wire.reports import MOST_LISTED, LeaseLine, PoolReport, SessionReport

_STATE_NAMES = {
    SlotState.GRANTED: "connecting",
    SlotState.OPEN: "in use",
    SlotState.CLOSING: "closing",
    SlotState.SUSPECT: "suspect",
    SlotState.FENCING: "being ended",
}


def report(slots: Slots, now: float) -> tuple[list[PoolReport], list[SessionReport]]:
    """Return the state of every pool and session."""
    workers = [session for session in slots.sessions.values() if not session.shelf]
    return (
        [report_pool(pool) for pool in slots.pools.values()],
        [_report_session(session, now) for session in workers],
    )


# --- leases


def lease_lines(slots: Slots, most: int, now: float) -> list[LeaseLine]:
    """Return up to `most` leases: first those in use, then the others, the oldest first."""

    def age(lease: Lease) -> tuple[bool, float]:
        return lease.idle_since is not None, now if lease.since is None else lease.since

    most = max(0, min(most, MOST_LISTED))
    return [_line(lease, now) for lease in heapq.nsmallest(most, slots.leases.values(), key=age)]


def _line(lease: Lease, now: float) -> LeaseLine:
    session = lease.session
    return LeaseLine(
        token=lease.token,
        pool=lease.pool.name,
        pid=session.pid,
        host=session.host,
        title=session.title,
        thread=lease.thread,
        state=_state_name(lease),
        age_ms=-1 if lease.since is None else max(0, int((now - lease.since) * 1000)),
        backend=lease.backend,
        stack=list(lease.stack),
    )


def _state_name(lease: Lease) -> str:
    if lease.live is not None or lease.session.shelf:
        return "parked"
    return "idle" if lease.idle_since is not None else _STATE_NAMES[lease.state]


# --- pools


def report_pool(pool: Pool) -> PoolReport:
    """Return the state of one pool."""
    waited = sorted(pool.waited)
    leases = pool.leases.values()
    states = [lease.state for lease in leases]
    idle = sum(lease.idle_since is not None for lease in leases)
    quarantined = [x for x in leases if x.state is SlotState.FENCING and not x.findable]
    counters = pool.counters
    return PoolReport(
        name=pool.name,
        server=pool.spec.server,
        max_conn=pool.limit,
        sessions=len(pool.sessions) - (pool.shelf is not None),
        leases=len(states),
        granted=states.count(SlotState.GRANTED),
        in_use=states.count(SlotState.OPEN) - idle,
        idle=idle,
        closing=states.count(SlotState.CLOSING),
        suspect=states.count(SlotState.SUSPECT),
        fencing=states.count(SlotState.FENCING),
        waiting=len(pool.waiters) + waiting_in_lane(pool),
        grants=counters.grants,
        waits=counters.waits,
        denials=counters.denials,
        timeouts=counters.timeouts,
        recalls=counters.recalls,
        fences=counters.fences,
        quarantined=len(quarantined),
        generation=pool.generation,
        error=pool.backoff.error or _shared_refusal(pool),
        handovers=counters.handovers,
        parked=len(pool.parked) + _on_shelf(pool),
        paused=pool.paused,
        overdue=counters.overdue,
        wait_p50_us=_percentile_us(waited, 0.5),
        wait_p99_us=_percentile_us(waited, 0.99),
        history=list(pool.history),
    )


def _percentile_us(waited: Sequence[float], share: float) -> int:
    """Return the wait that `share` of those sorted waits did not exceed; -1 without any."""
    return round(waited[min(len(waited) - 1, int(share * len(waited)))] * 1e6) if waited else -1


def _on_shelf(pool: Pool) -> int:
    """Return how many connections are on the pool's shelf and not parked at the broker besides."""
    if pool.shelf is None:
        return 0
    return sum(lease.live is None for lease in pool.shelf.leases.values())


def _shared_refusal(pool: Pool) -> str:
    """Return the error with which the server refuses all of a pool's workers, if it does.

    The refusal must concern the role or the database, and all processes must connect to the same
    server. No connect may have succeeded since.
    """
    if pool.strangers:
        return ""
    for session in pool.sessions.values():
        if (refusal := session.refusal) is None:
            continue
        shared = refusal.turns is pool.refusals.shared.get(refusal.code)
        if shared and refusal.turns.refused_at > pool.opened_at:
            return refusal.error
    return ""


# --- sessions


def _report_session(session: Session, now: float) -> SessionReport:
    held = [lease for lease in session.leases.values() if lease.live is None]  # not parked here
    idle = sum(lease.idle_since is not None for lease in held)
    return SessionReport(
        pid=session.pid,
        host=session.host,
        title=session.title,
        pool=session.pool.name,
        leases=len(held),
        in_use=len(held) - idle,
        idle=idle,
        waiting=len(session.waiters) + _threads_in_lane(session),
        silent_ms=int((now - session.heard_at) * 1000),
        suspect=session.suspect,
    )


def _threads_in_lane(session: Session) -> int:
    lane = session.pool.lane
    return 0 if lane is None or session.index < 0 else lane.board.waiting([session.index])
