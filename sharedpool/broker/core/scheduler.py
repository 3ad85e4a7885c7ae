"""Match waiters with slots: grant what is free, recall what is idle, and ask users to return more.

Decisions only, over the records; nothing here does I/O or reads a clock. `schedule` runs after
every change:

1. Grant free slots to the oldest waiters, over all pools.
2. Fail: while connections cannot be opened and a pool has none, its waiters get the server's error
   at once. So does a request whose session was refused by the server and may not try again yet
   (`connect_refusals.py`).
3. Recall, if slots are short: end parked connections, recall idle leases (longest idle first),
   fence suspect leases, then ask for the next checkins of those in use (`returns.py`).
4. Refuse requests that do not want to wait, once every holder has said that it has nothing idle
   (`rounds.py`).
5. Take back what an operator's order left in excess, in the same ways.

While the broker holds back (it does not know yet what is held), requests only queue. While it
drains, it asks for everything: a successor serves the waiters, if one comes in time.
"""

from __future__ import annotations

from sharedpool.broker.core.commands import Send
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.demand import (
    only_checkins_help,
    patient,
    returns_wanted,
    shortage,
    shortage_of_cap,
)
from sharedpool.broker.core.denials import Denials
from sharedpool.broker.core.fences import Fences
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import Lease, Pool, Session, Waiter
from sharedpool.broker.core.returns import Returns
from sharedpool.broker.core.rounds import Rounds
from sharedpool.broker.core.routes import Routes
from sharedpool.broker.core.slot_states import GRANTED
from sharedpool.wire.messages import DenyReason, Grant


class Scheduler:
    """Serves the queue of one broker."""

    def __init__(
        self,
        context: Context,
        routes: Routes,
        recalls: Recalls,
        fences: Fences,
        handover: Handover,
        denials: Denials,
    ) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._routes = routes
        self._recalls = recalls
        self._fences = fences
        self._handover = handover
        self._denials = denials
        self._returns = Returns(context, recalls, fences, handover)
        self._rounds = Rounds(context, recalls, fences, handover, denials)
        self._newcomers: list[Waiter] = []  # new requests of sessions that the server has refused

    def add(self, waiter: Waiter) -> None:
        """Queue a request."""
        self._slots.enqueue(waiter)
        if waiter.session.refusal is not None:
            self._newcomers.append(waiter)
        if waiter.nowait:
            self._rounds.note_arrival()

    def schedule(self, now: float) -> None:
        """Do all that can be done for the waiters after a change."""
        slots = self._slots
        if slots.grant_stop.draining:
            self._returns.drain(now)
            return
        if slots.grant_stop.holding_back:
            return
        if self._newcomers:
            self._deny_newcomers(now)
        if slots.shrinking:
            self._returns.shrink(now)
        if slots.contended and not self._only_checkins_help():
            self._handover.serve(now)
            self._serve(now)
            self._fail(now)
            if slots.contended and not self._only_checkins_help():
                self._recall(now)
                self._rounds.run(now)
        self._returns.cancel(now)

    def _only_checkins_help(self) -> bool:
        pools = self._slots.pools
        return len(pools) == 1 and only_checkins_help(self._slots, next(iter(pools.values())))

    # --- 1. grant

    def _serve(self, now: float) -> None:
        slots = self._slots
        while slots.room > 0:
            servable = [
                pool
                for pool in slots.contended.values()
                if pool.room > 0 and slots.available(pool) > 0
            ]
            if not servable:
                return
            heads = (next(iter(pool.waiters.values())) for pool in servable)
            waiter = min(heads, key=slots.rank)
            if not self._deny_refused(waiter, now):
                slots.dequeue(waiter)
                self.grant(waiter.session, waiter.request, waiter.since, now)

    def grant(self, session: Session, request: int, since: float, now: float) -> None:
        """Grant a slot to a request that arrived at `since`."""
        slots, pool = self._slots, session.pool
        lease = Lease(
            slots.new_token(),
            session,
            pool,
            request=request,
            granted_at=now,
            waited_s=now - since,
            since=now,
        )
        slots.move(lease, GRANTED, "granted")
        if session.refusal is not None:
            pool.refusals.note_try(session.id, session.refusal, now)
        if pool.backoff.granted(lease.token, len(pool.leases) - 1, now):
            self._arm(pool.backoff.probe_at, _probe_due, pool)
        pool.counters.grants += 1
        session.passes += 1
        pool.record_wait(now - since)
        if (wanted := returns_wanted(slots, pool, session)) or session.returns_due:
            slots.mark_returns_due(session, min(len(session.leases), wanted))
        self.send_grant(lease)

    def send_grant(self, lease: Lease) -> None:
        """Send a grant, or send it again for a repeated request."""
        grant = Grant(
            lease.request,
            lease.token,
            self._recalls.next_serial(),
            lease.session.returns_due,
            int(lease.waited_s * 1000),
            self._routes.believes_refusal(lease),
            lease.pool.backoff.code,
        )
        self._emit(Send(lease.session.id, grant))

    # --- 2. fail

    def _deny_newcomers(self, now: float) -> None:
        """Deny new requests of sessions that may not connect yet.

        Others would give up a connection for such a request, and it could not open one in its
        place. A request that waits in the lane stays: an open connection may be passed to it.
        """
        newcomers, self._newcomers = self._newcomers, []
        for waiter in newcomers:
            if waiter.lane_place < 0 and not self._slots.is_over(waiter):
                self._deny_refused(waiter, now)

    def _deny_refused(self, waiter: Waiter, now: float) -> bool:
        """Deny a request whose session was refused and may not try again yet; return True if so."""
        session, pool = waiter.session, waiter.session.pool
        if pool.refusals.blocked_until(session.id, session.refusal, now) is None:
            return False
        self._denials.deny(waiter, DenyReason.REFUSED, now)
        return True

    def _fail(self, now: float) -> None:
        for pool in list(self._slots.contended.values()):
            if self._is_hopeless(pool):
                # These waiters wanted slots. Without this, suspect leases would fill the pool for
                # ever, because no waiter stays long enough to have them fenced.
                self._fences.fence_suspects([pool], len(pool.waiters), now)
                for waiter in list(pool.waiters.values()):
                    self._denials.deny(waiter, DenyReason.FAILING, now)

    @staticmethod
    def _is_hopeless(pool: Pool) -> bool:
        """Return True if no connection of a pool is open and none can be opened.

        There is hope if the backoff's ceiling is above 0 (the server is full: the pool had to make
        way for its probe), and if an operator has paused the pool, perhaps for this very failover.
        """
        return (
            pool.backoff.active
            and pool.backoff.ceiling == 0
            and pool.own_room <= 0
            and not pool.has_connections
            and not pool.paused
        )

    # --- 3. recall

    def _recall(self, now: float) -> None:
        slots = self._slots
        for pool in list(slots.contended.values()):
            if (short := shortage(pool)) > 0:
                self._recall_in_pool(pool, short, now)
        if slots.groups:
            self._recall_for_groups(now)
        elif slots.max_conn is not None and (short := shortage_of_cap(slots)) > 0:
            self._recall_under_cap(short, now)

    def _recall_in_pool(self, pool: Pool, short: int, now: float) -> None:
        """Get up to `short` slots back for a pool's waiters from the pool itself."""
        if pool.parked:
            # Parked connections are passed on in a moment, or else ended for their slots.
            promised = min(short, self._handover.promised(pool, now))
            short -= promised or self._handover.end_parked([pool], short, now)
        if pool.idle:
            short -= self._recalls.take_idle([pool], short, now)
        if pool.suspects:
            short -= self._fences.fence_suspects([pool], min(short, patient(pool)), now)
        if short > 0 and pool.not_asked_to_return:
            self._returns.request(pool, now)

    def _recall_under_cap(self, short: int, now: float) -> None:
        """Get up to `short` slots back where the cap keeps waiters waiting: any pool's will do."""
        pools = sorted(self._slots.pools.values(), key=lambda pool: len(pool.waiters))
        if short > self._recall_unused(pools, short, sum(map(patient, pools)), now):
            for pool in pools:
                self._returns.request(pool, now)

    def _recall_unused(
        self, pools: list[Pool], short: int, patient_waiters: int, now: float
    ) -> int:
        """Get up to `short` slots back that nobody uses; return how many are coming.

        Suspect leases are fenced for patient waiters only.
        """
        found = self._handover.end_parked(pools, short, now)
        found += self._recalls.take_idle(pools, short - found, now)
        return found + self._fences.fence_suspects(pools, min(short - found, patient_waiters), now)

    def _recall_for_groups(self, now: float) -> None:
        """Do the same for each pool that others keep waiting, by the cap or by its group's limit.

        Slots on their way back are set off against the most important waiters first.
        """
        slots = self._slots
        coming = sum(pool.coming for pool in slots.pools.values())
        by_rank = sorted(
            slots.contended.values(), key=lambda pool: slots.rank(next(iter(pool.waiters.values())))
        )
        for waiting in by_rank:
            givers = [pool for pool in slots.pools.values() if slots.serves(pool, waiting)]
            short = min(len(waiting.waiters), waiting.own_room) - coming
            if short > self._recall_unused_for(waiting, givers, short, now):
                self._request_returns_for(waiting, givers, now)
            coming = max(0, coming - len(waiting.waiters))

    def _recall_unused_for(self, waiting: Pool, givers: list[Pool], short: int, now: float) -> int:
        """Get up to `short` unused slots for one pool; return how many are coming.

        The least important group gives first; no group gives what is reserved for it.
        """
        found = 0
        for pool in sorted(givers, key=lambda pool: (pool.priority, len(pool.waiters))):
            most = short - found
            if pool.group is not None and pool.group is not waiting.group:
                most = min(most, pool.group.spare)
            if most > 0:
                found += self._recall_unused([pool], most, patient(waiting), now)
        return found

    def _request_returns_for(self, waiting: Pool, givers: list[Pool], now: float) -> None:
        """Ask users for their next checkins; those of a more important group only what is idle."""
        for pool in givers:
            if pool.priority <= waiting.priority:
                self._returns.request(pool, now)
            else:
                self._returns.ask_what_is_idle(pool, next(reversed(waiting.waiters)), now)

    # --- checks

    def check_invariants(self) -> None:
        """Raise `AssertionError` if waiters are left without anything being done for them."""
        slots = self._slots
        if slots.grant_stop.active:
            return
        for pool in slots.contended.values():
            free = pool.room > 0 and slots.available(pool) > 0
            assert not free, f"{pool.name}: a free slot and a waiter"
            if shortage(pool) > len(pool.parked):
                assert not pool.idle, f"{pool.name}: an idle lease nobody recalled"
                keep = [s for s in pool.not_asked_to_return.values() if len(s.leases) > s.taking]
                wanted = any(returns_wanted(slots, pool, session) for session in keep)
                assert pool.moving or not wanted, pool.name
        if slots.contended and not slots.groups and shortage_of_cap(slots) > 0:
            idle = any(pool.idle for pool in slots.pools.values())
            assert not idle, "an idle lease nobody recalled"


def _probe_due(pool: Pool, now: float) -> None:
    pool.backoff.elapsed(now)
