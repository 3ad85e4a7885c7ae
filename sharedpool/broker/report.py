"""What `sharedpool status` shows: every pool and session as the books have them."""

from __future__ import annotations

from sharedpool.broker.records import Books, Pool, Session, SlotState
from sharedpool.wire.messages import PoolReport, SessionReport


def report(books: Books, now: float) -> tuple[list[PoolReport], list[SessionReport]]:
    """Return the state of every pool and session."""
    pools = [report_pool(pool) for pool in books.pools.values()]
    return pools, [_report_session(session, now) for session in books.sessions.values()]


def report_pool(pool: Pool) -> PoolReport:
    """Return the state of one pool."""
    states = [lease.state for lease in pool.leases.values()]
    idle = sum(lease.idle_since is not None for lease in pool.leases.values())
    return PoolReport(
        name=pool.name,
        server=pool.spec.server,
        max_conn=pool.max_conn,
        sessions=len(pool.sessions),
        leases=len(states),
        granted=states.count(SlotState.GRANTED),
        in_use=states.count(SlotState.OPEN) - idle,
        idle=idle,
        closing=states.count(SlotState.CLOSING),
        suspect=states.count(SlotState.SUSPECT),
        fencing=states.count(SlotState.FENCING),
        waiting=len(pool.waiters),
        grants=pool.grants,
        waits=pool.waits,
        denials=pool.denials,
        timeouts=pool.timeouts,
        recalls=pool.recalls,
        fences=pool.fences,
        quarantined=sum(x.state is SlotState.FENCING and not x.findable for x in pool.leases.values()),
        generation=pool.generation,
        error=pool.backoff.error,
        handovers=pool.handovers,
        parked=len(pool.parked),
    )


def _report_session(session: Session, now: float) -> SessionReport:
    idle = sum(lease.idle_since is not None for lease in session.leases.values())
    return SessionReport(
        pid=session.pid,
        host=session.host,
        title=session.title,
        pool=session.pool.name,
        leases=len(session.leases),
        in_use=len(session.leases) - idle,
        idle=idle,
        waiting=len(session.waiters),
        silent_ms=int((now - session.heard) * 1000),
        suspect=session.suspect,
    )
