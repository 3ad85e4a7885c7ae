"""Denials: refuse a request, and say why in terms that help the caller's user."""

from __future__ import annotations

import heapq

from sharedpool.broker.core.commands import Send
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import Pool, Session, Waiter
from sharedpool.broker.core.routes import Routes
from sharedpool.broker.core.share_reports import ShareReports
from sharedpool.wire.messages import Deny, DenyReason
from sharedpool.wire.values import Holder

_HOLDERS_NAMED = 3


class Denials:
    """Refuses requests; each is taken out of its queue and answered."""

    def __init__(self, context: Context, routes: Routes, share_reports: ShareReports) -> None:
        self._share_reports = share_reports
        self._slots = context.slots
        self._emit = context.emit
        self._routes = routes

    def deny(self, waiter: Waiter, reason: DenyReason, now: float) -> None:
        """Refuse a request, and count it as refused."""
        waiter.session.pool.counters.denials += 1
        self._send(waiter, reason, now)

    def time_out(self, waiter: Waiter, now: float) -> None:
        """Refuse a request whose deadline has passed."""
        waiter.session.pool.counters.timeouts += 1
        self._send(waiter, self._reason_for_timeout(waiter), now)

    def _reason_for_timeout(self, waiter: Waiter) -> DenyReason:
        if (reason := self.reason_for_no_grants(waiter.session.pool)) is not None:
            return reason
        if self._slots.grant_stop.holding_back or self._share_reports.why_unknown(
            waiter.session.pool
        ):
            return DenyReason.WAITING
        # A session that the server refuses was not served because of that.
        return DenyReason.TIMEOUT if waiter.session.refusal is None else DenyReason.REFUSED

    def reason_for_no_grants(self, pool: Pool) -> DenyReason | None:
        """Return why nothing is granted in a pool for a long time, or None if that is not so."""
        if self._slots.grant_stop.draining:
            return DenyReason.DRAINING
        return DenyReason.PAUSED if pool.paused else None

    def deny_unsuitable(self, pool: Pool, now: float) -> None:
        """Refuse all waiters of a pool whose server does not do what a pool needs, if so."""
        if self._routes.unsuitable(pool):
            for waiter in list(pool.waiters.values()):
                self.deny(waiter, DenyReason.UNSUITABLE, now)

    def _send(self, waiter: Waiter, reason: DenyReason, now: float) -> None:
        """Answer with the limit that is reached, who holds most of it, and the server's error."""
        slots, pool = self._slots, waiter.session.pool
        slots.dequeue(waiter)
        # The pool's own limit would allow one more slot: the limit over all pools is reached.
        capped = pool.own_room > 0 and slots.max_conn is not None
        limit = slots.max_conn if capped and slots.max_conn is not None else pool.max_conn
        group, reserved = "", 0
        if pool.group is not None:
            reserved = slots.groups.reserved - pool.group.terms.reserved if capped else 0
            if pool.group.room <= 0 and pool.group.terms.max_conn is not None:
                group, limit = pool.group.name, pool.group.terms.max_conn
        error, retry_at = self._error(waiter, reason, now)
        denial = Deny(
            request=waiter.request,
            reason=reason,
            max_conn=limit,
            holders=self._holders(pool, now, capped=capped),
            capped=capped,
            error=error,
            retry_ms=max(0, int((retry_at - now) * 1000)),
            group=group,
            reserved=reserved,
        )
        self._emit(Send(waiter.session.id, denial))

    def _error(self, waiter: Waiter, reason: DenyReason, now: float) -> tuple[str, float]:
        """Return what keeps connections from being opened, and when the next connect is allowed."""
        session, pool = waiter.session, waiter.session.pool
        if reason is DenyReason.REFUSED and session.refusal is not None:
            blocked_until = pool.refusals.blocked_until(session.id, session.refusal, now)
            return session.refusal.error, blocked_until or now
        if reason is DenyReason.UNSUITABLE:
            error = self._routes.unsuitable(pool)
        elif self._slots.grant_stop.holding_back:
            error = self._slots.grant_stop.because
        elif reason is DenyReason.WAITING:
            error = self._share_reports.why_unknown(pool)
        else:
            error = pool.backoff.error
        return error, pool.backoff.probe_at

    def _holders(self, pool: Pool, now: float, *, capped: bool) -> list[Holder]:
        leases = self._slots.leases if capped else pool.leases
        sessions = {x.session.id: x.session for x in leases.values() if not x.session.shelf}
        most = heapq.nlargest(_HOLDERS_NAMED, sessions.values(), key=lambda x: len(x.leases))
        here = [_holder(x, f" in {x.pool.name!r}" if capped else "", now) for x in most]
        everywhere = [*here, *self._share_reports.other_holders(pool)]
        return heapq.nlargest(_HOLDERS_NAMED, everywhere, key=lambda holder: holder.count)


def _holder(session: Session, where: str, now: float) -> Holder:
    """Return how much a session holds, and which of its checkouts has lasted longest."""
    since, stack = min(
        ((x.used_since, x.stack) for x in session.leases.values() if x.used_since is not None),
        key=lambda used: used[0],
        default=(now, ()),
    )
    return Holder(
        session.label + where,
        len(session.leases),
        int((now - since) * 1000),
        stack[0] if stack else "",
    )
