"""Requests for leases, as they come from workers: grant, queue or refuse each, or drop it again."""

from __future__ import annotations

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.demand import grants_at_once
from sharedpool.broker.core.denials import Denials
from sharedpool.broker.core.records import Session, Waiter
from sharedpool.broker.core.routes import Routes
from sharedpool.broker.core.scheduler import Scheduler
from sharedpool.wire.messages import Acquire, DenyReason, Withdraw

# More threads than any process has: whoever asks for more is no worker.
_MOST_REQUESTS = 10_000


class Requests:
    """The requests of all sessions."""

    def __init__(
        self, context: Context, routes: Routes, scheduler: Scheduler, denials: Denials
    ) -> None:
        self._slots = context.slots
        self._arm = context.timers.arm
        self._routes = routes
        self._scheduler = scheduler
        self._denials = denials
        self._newest = 0  # the number of the newest request

    def acquire(self, session: Session, acquire: Acquire, now: float) -> None:
        """Grant a request at once if nobody waits, else put it into the queue."""
        known = acquire.request in session.granted
        if (
            not known
            and grants_at_once(self._slots, session)
            and not self._routes.unsuitable(session.pool)
        ):
            self._scheduler.grant(session, acquire.request, now, now)
        else:
            self.enqueue(session, acquire, now)

    def enqueue(self, session: Session, acquire: Acquire, now: float) -> None:
        """Put a request into the queue, or refuse it; answer a repeated one again."""
        if (waiter := session.waiters.get(acquire.request)) is not None:
            waiter.lane_place = acquire.lane_place
            return
        if acquire.request in session.granted:
            self._scheduler.send_grant(session.granted[acquire.request])  # the first one was lost
            return
        self._newest += 1
        nowait = acquire.wait_ms <= 0
        place = acquire.lane_place
        waiter = Waiter(session, acquire.request, self._newest, now, nowait, lane_place=place)
        refusal = self._refusal(waiter)
        self._scheduler.add(waiter)
        if refusal is not None:
            self._denials.deny(waiter, refusal, now)
        elif not nowait:
            self._arm(now + acquire.wait_ms / 1000, self._denials.time_out, waiter)

    def _refusal(self, waiter: Waiter) -> DenyReason | None:
        """Return why a new request is refused at once, if it is."""
        session, pool = waiter.session, waiter.session.pool
        if 0 < pool.spec.max_waiting <= len(pool.waiters) or len(session.waiters) >= _MOST_REQUESTS:
            return DenyReason.CROWDED
        if waiter.nowait and (reason := self._denials.reason_for_no_grants(pool)) is not None:
            return reason
        return DenyReason.UNSUITABLE if self._routes.unsuitable(pool) else None

    def withdraw(self, session: Session, withdraw: Withdraw) -> None:
        """Drop a request that its worker does not want served any more."""
        if (waiter := session.waiters.get(withdraw.request)) is not None:
            self._slots.dequeue(waiter)
