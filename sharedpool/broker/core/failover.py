"""What workers report about PostgreSQL itself: failed connects, and signs of a failover.

A failed connect holds back either all workers of a pool (`backoff.py`) or only the one that was
refused (`connect_refusals.py`). A failover begins a new *generation*: every older connection of the
pool is replaced.
"""

from __future__ import annotations

import logging

from sharedpool.broker.core.commands import Send, VerifyServer
from sharedpool.broker.core.connect_refusals import concerns_all
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import Lease, Pool, Session
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.messages import Confirm, FailoverSign, Release, Stale

# SQLSTATEs that prove a failover by themselves: the server is read-only, or shuts down.
_CERTAIN = frozenset({"25006", "57P02", "57P03"})
# The control connection, a new one that replaces it while it is still open, and the session by
# which hosts share the limit.
_OF_THE_BROKER = 3


class Failover:
    """One broker's view of its servers. A control connection, if there is one, settles doubts."""

    def __init__(self, context: Context) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._log = context.log
        self._has_control_connection = context.has_control_connection
        self._role = ""  # the control connection's
        self._limit: int | None = None  # that role's CONNECTION LIMIT
        self._compared = 0  # how many pools there were when the limit was last compared
        self._has_warned = False  # that the limit is too low

    # --- connects

    def failed(self, session: Session, release: Release, now: float) -> None:
        """Handle a failed connect: hold connects back, everybody's or only this session's.

        1. The server refuses this worker (a wrong password): only this session waits.
        2. This worker has found no server, but another one has connected since the connect began:
           its host or route is to blame, so only this session waits.
        3. Otherwise the pool keeps the connections that it has, and probes.
        """
        pool = session.pool
        lease = pool.leases.get(release.token)
        if not concerns_all(release.code, unreachable=release.unreachable):
            self._refused(session, release, now)
            return
        granted_at = None if lease is None or lease.state is not SlotState.GRANTED else lease.since
        if granted_at is not None and granted_at < pool.opened_at and pool.opener != session.id:
            session.is_elsewhere = session.is_elsewhere or release.unreachable
        if session.is_elsewhere and release.unreachable:
            self._refused(session, release, now)
            return
        counted = granted_at is not None and release.token != pool.backoff.probe
        others = pool.connected - counted
        if not pool.backoff.error:
            text = (
                "pool %r: %s cannot connect, so the pool keeps its %d connections and tries one"
                " at a time: %s"
            )
            fields = _fields(session, release)
            self._log(
                logging.WARNING, text, pool.name, session.label, others, release.error, **fields
            )
        pool.last_unreachable = session.id if release.unreachable else b""
        self._arm(
            pool.backoff.failed(release.token, others, release.error, now, release.code),
            self.probe_due,
            pool,
        )

    def _refused(self, session: Session, release: Release, now: float) -> None:
        """Hold back one session's connects, which fail for a reason of its own or of its role."""
        before = session.refusal
        session.refusal = session.pool.refusals.failed(
            session.id, before, release.code, release.error, now
        )
        if before is None or before.code != release.code:
            text = (
                "pool %r: %s is refused%s and may try only now and then, until it can connect: %s"
            )
            code = f" ({release.code})" if release.code else ""
            names = (session.pool.name, session.label, code)
            self._log(logging.WARNING, text, *names, release.error, **_fields(session, release))

    def opened(self, lease: Lease, confirm: Confirm, now: float) -> None:
        """Handle a successful connect: allow more."""
        pool, session = lease.pool, lease.session
        pool.opened_at, pool.opener = now, session.id
        session.is_elsewhere = False
        if session.refusal is not None:
            pool.refusals.opened(session.refusal)
            session.refusal = None
        if pool.backoff.probe == confirm.token:
            pool.backoff.opened(confirm.token, pool.connected + 1, pool.max_conn)
            if (
                pool.last_unreachable != session.id
                and (blamed := pool.sessions.get(pool.last_unreachable)) is not None
            ):
                # Perhaps that session alone finds no server. Its next success clears the flag.
                blamed.is_elsewhere = True
            pool.last_unreachable = b""

    def probe_due(self, pool: Pool, now: float) -> None:
        """Allow one connect."""
        pool.backoff.elapsed(now)

    def limited(self, role: str, limit: int | None) -> None:
        """Record the CONNECTION LIMIT of the control connection's role; None if it has none."""
        if (role, limit) != (self._role, self._limit):
            self._role, self._limit, self._compared, self._has_warned = role, limit, 0, False
            self.compare()

    def compare(self) -> None:
        """Warn once if the limit is too low for the pools whose workers log in as the same role."""
        pools = self._slots.pools
        if self._limit is None or self._has_warned or self._compared == len(pools):
            return
        self._compared = len(pools)
        most = sum(
            pool.limit for pool in pools.values() if pool.spec.server.startswith(f"{self._role}@")
        )
        most = most if self._slots.max_conn is None else min(most, self._slots.max_conn)
        if most and most + _OF_THE_BROKER > self._limit:
            text = (
                "role %r may have %d connections (CONNECTION LIMIT), and %d are needed: max_conn"
                " %d, and %d of the broker's own. PostgreSQL will refuse the rest: raise that"
                " limit, or lower max_conn"
            )
            needed = most + _OF_THE_BROKER
            self._log(
                logging.WARNING,
                text,
                self._role,
                self._limit,
                needed,
                most,
                _OF_THE_BROKER,
                reason="role limit",
            )
            self._has_warned = True

    # --- generations

    def failover_sign(self, session: Session, trouble: FailoverSign) -> None:
        """Handle a sign that the server fails over.

        A connection that was ended (57P01) or found dead may be that one alone: an administrator or
        a fence may have ended it. The control connection, if there is one, finds that out.
        """
        pool = session.pool
        if trouble.generation < pool.generation:
            return  # the connection belonged to an older generation
        if trouble.code in _CERTAIN or not self._has_control_connection:
            self.begin_generation(pool, trouble.code or "a dead connection")
        elif pool.doubted < pool.generation:
            pool.doubted = pool.generation
            self._emit(VerifyServer(pool.name, pool.generation))

    def server_verified(self, name: str, generation: int, same: bool) -> None:
        """Handle the answer whether the server is still the one it was."""
        pool = self._slots.pools.get(name)
        if pool is None or pool.generation != generation:
            return
        pool.doubted = 0
        if not same:
            self.begin_generation(pool, "the server was restarted or is unreachable")

    def begin_generation(self, pool: Pool, why: str) -> None:
        """Begin a new generation: have every worker replace its older connections."""
        pool.generation += 1
        text = "pool %r: generation %d: every older connection is replaced (%s)"
        self._log(
            logging.WARNING, text, pool.name, pool.generation, why, pool=pool.name, reason=why
        )
        for session in pool.sessions.values():
            if not session.shelf:
                self._emit(Send(session.id, Stale(pool.generation)))


def _fields(session: Session, release: Release) -> dict[str, str]:
    """Return the fields of a log line about a failed connect."""
    return {
        "pool": session.pool.name,
        "lease": str(release.token),
        "session": session.label,
        "reason": release.error,
    }
