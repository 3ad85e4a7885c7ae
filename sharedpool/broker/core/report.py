"""What `sharedpool status`, `who` and `top` show: every pool, session and lease as the books have them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from sharedpool.broker.core.records import Lease, Pool, Session, SlotState
from sharedpool.broker.core.slots import Slots
from sharedpool.wire.reports import MOST_LISTED, LeaseLine, PoolReport, SessionReport

_WORDS = {
    SlotState.GRANTED: "connecting",
    SlotState.OPEN: "in use",
    SlotState.CLOSING: "closing",
    SlotState.SUSPECT: "suspect",
    SlotState.FENCING: "being ended",
}


def report(slots: Slots, now: float) -> tuple[list[PoolReport], list[SessionReport]]:
    """Return the state of every pool and session."""
    pools = [report_pool(pool) for pool in slots.pools.values()]
    return pools, [
        _report_session(session, now) for session in slots.sessions.values() if not session.shelf
    ]


def lease_lines(slots: Slots, most: int, now: float) -> list[LeaseLine]:
    """Return up to `most` leases, the longest in use first, then the others, the oldest first."""
    chosen = heapq.nsmallest(
        max(0, min(most, MOST_LISTED)),
        slots.leases.values(),
        key=lambda lease: (
            lease.idle_since is not None,
            now if lease.since is None else lease.since,
        ),
    )
    return [_line(lease, now) for lease in chosen]


def _line(lease: Lease, now: float) -> LeaseLine:
    session = lease.session
    state = (
        "parked"
        if lease.live is not None or session.shelf
        else "idle"
        if lease.idle_since is not None
        else _WORDS[lease.state]
    )
    return LeaseLine(
        token=lease.token,
        pool=lease.pool.name,
        pid=session.pid,
        host=session.host,
        title=session.title,
        thread=lease.thread,
        state=state,
        age_ms=-1 if lease.since is None else max(0, int((now - lease.since) * 1000)),
        backend=lease.backend,
        stack=list(lease.stack),
    )


def _percentile_us(waited: Sequence[float], share: float) -> int:
    """Return the wait that `share` of those sorted waits did not exceed; -1 without any."""
    return round(waited[min(len(waited) - 1, int(share * len(waited)))] * 1e6) if waited else -1


def report_pool(pool: Pool) -> PoolReport:
    """Return the state of one pool."""
    waited = sorted(pool.waited)
    states = [lease.state for lease in pool.leases.values()]
    idle = sum(lease.idle_since is not None for lease in pool.leases.values())
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
        waiting=len(pool.waiters) + _waiting_in_lane(pool),
        grants=pool.grants,
        waits=pool.waits,
        denials=pool.denials,
        timeouts=pool.timeouts,
        recalls=pool.recalls,
        fences=pool.fences,
        quarantined=sum(
            x.state is SlotState.FENCING and not x.findable for x in pool.leases.values()
        ),
        generation=pool.generation,
        error=pool.backoff.error or _refused_for(pool),
        handovers=pool.handovers,
        parked=len(pool.parked) + sum(lease.live is None for lease in pool.shelf.leases.values())
        if pool.shelf is not None
        else len(pool.parked),
        paused=pool.paused,
        overdue=pool.overdue,
        wait_p50_us=_percentile_us(waited, 0.5),
        wait_p99_us=_percentile_us(waited, 0.99),
        history=list(pool.history),
    )


def _refused_for(pool: Pool) -> str:
    """Return what the server says to whoever connects as the pool's role to its database, if it refuses them all."""
    for session in pool.sessions.values():
        refusal = session.refusal
        shared = refusal is not None and refusal.turns is pool.refusals.shared.get(refusal.code)
        if (
            refusal is not None
            and shared
            and not pool.strangers
            and refusal.turns.refused_at > pool.opened_at
        ):
            return refusal.error
    return ""


def _waiting_in_lane(pool: Pool) -> int:
    return 0 if pool.lane is None else pool.lane.board.waiting(pool.lane.indices)


def _report_session(session: Session, now: float) -> SessionReport:
    held = [
        lease for lease in session.leases.values() if lease.live is None
    ]  # what is parked is nobody's
    idle, lane = sum(lease.idle_since is not None for lease in held), session.pool.lane
    return SessionReport(
        pid=session.pid,
        host=session.host,
        title=session.title,
        pool=session.pool.name,
        leases=len(held),
        in_use=len(held) - idle,
        idle=idle,
        waiting=len(session.waiters)
        + (0 if lane is None or session.index < 0 else lane.board.waiting([session.index])),
        silent_ms=int((now - session.heard_at) * 1000),
        suspect=session.suspect,
    )
