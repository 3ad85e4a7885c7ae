"""Pass live connections on: from the worker that gives one to the first waiter. Pure.

A given lease ends, and its *heir* begins: a lease with a token of its own, for the same backend,
whose socket is in custody. The slot stays occupied all along. The heir is sent to the waiter's
place in the pool's lane. What becomes of a given connection, in this order:

1. It must not go on (of an older generation, with a cancel under way, or the pool shrinks): it is
   ended.
2. A request waits: the connection is passed to it. If the waiter has no place in the lane yet but
   may have one in a moment, the connection is parked; if it cannot have one, it is ended.
3. No request waits and connections move past the broker: it is put on the lane's shelf.
4. Otherwise it is *parked*: the broker keeps it until somebody asks.

While connections change hands the pool is *shared*: each is passed with the order to return it at
the next checkin, so that its holder need not be asked. A process that has been alone for a while
keeps what it has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice

from sharedpool.broker.core.commands import CancelBackend, PassOn, Send, TransferCustody
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.demand import excess, only_checkins_help, returns_wanted, slots_wanted
from sharedpool.broker.core.lane_members import may_reach, reaches
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import Lease, Pool, Session, Waiter
from sharedpool.broker.core.shelves import Shelves, on_shelf
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.desk import Give, Live, Moved, Passed
from sharedpool.wire.messages import CancelQuery, Reject, ReleaseReason
from sharedpool.wire.values import Phase

# A pool is shared for so long after a connection has last changed hands.
SHARED_S = 1.0
# A cancel test that could not be made is repeated no sooner: it costs its caller a second, and
# the connection.
TRY_AGAIN_S = 30.0
# A *nudge* asks a holder that was told to return connections, and has returned none, whether it
# still uses them. The first one comes after this time, the next ones each after twice the time
# before, up to the limit.
NUDGE_S = 0.01
NUDGE_LIMIT_S = 1.0
_MOST_NUDGED = 64


class Handover:
    """The hand-over of connections through the broker."""

    def __init__(
        self, context: Context, recalls: Recalls, leases: Leases, shelves: Shelves
    ) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._recalls = recalls
        self._leases = leases
        self._shelves = shelves

    # --- giving and passing

    def given(self, session: Session, give: Give, now: float) -> bool:
        """Handle a connection that its worker gives; return True if nothing is left to schedule."""
        lease = session.leases.get(give.token)
        if lease is None or lease.live is not None or lease.state is SlotState.FENCING:
            return False
        session.draining.discard(lease.token)
        if give.reason is ReleaseReason.RETURN_DUE:
            lease.pool.counters.recalls += 1
            if session.returns_due:
                self._slots.mark_returns_due(session, session.returns_due - 1)
        lease.unconfirmed = False
        self._leases.identify(lease, give.live.backend, now)
        return self._pass_or_park(lease, give.live, now)

    def found_on_shelf(self, lease: Lease, live: Live, now: float) -> None:
        """Handle a connection that was on its pool's shelf."""
        self._pass_or_park(lease, live, now)

    def _pass_or_park(self, lease: Lease, live: Live, now: float) -> bool:
        """Pass a connection on, or keep it; return True if nothing is left to schedule."""
        pool = lease.pool
        if not self._may_go_on(lease, live):
            self._leases.fence(lease, "given, but not fit to go on", now, level=logging.DEBUG)
        elif (waiter := self._first_waiter(pool)) is not None:
            if reaches(waiter):
                self._pass_on(lease, live, waiter, now)
                # A pool without waiters may be owed returns that are not needed any more. Otherwise
                # the scheduler has to look again only if something else than a checkin can serve.
                return bool(pool.waiters) and only_checkins_help(self._slots, pool)
            if may_reach(waiter, pool, now):
                self.park(lease, live, now)
                return False
            text = "given, but it cannot be sent to the first waiter"
            self._leases.fence(lease, text, now, level=logging.DEBUG)
        elif pool.moving:
            self._shelves.give(lease, live, now)
        else:
            self.park(lease, live, now)
            return not (self._slots.contended or self._slots.shrinking)
        return False

    def _may_go_on(self, lease: Lease, live: Live) -> bool:
        """Return True if another worker may use a lease's connection."""
        pool = lease.pool
        fit = lease.custody and not lease.cancels and live.generation == pool.generation
        if not fit or pool.cancel_works is False:
            return False
        return not self._slots.grant_stop.draining and excess(self._slots, pool) <= 0

    def _first_waiter(self, pool: Pool) -> Waiter | None:
        """Return the waiter that is to have a slot of this pool.

        1. The pool's own first waiter.
        2. With groups: the first waiter of each pool that a slot of this one could serve.
        3. Without groups, under an exhausted cap: the first waiter of each pool below its limit.

        The first of these in the queue's order has the slot.
        """
        slots = self._slots
        heads = [next(iter(pool.waiters.values()))] if pool.waiters and not pool.paused else []
        if slots.groups:
            heads += [
                next(iter(other.waiters.values()))
                for other in slots.contended.values()
                if slots.serves(pool, other)
            ]
        elif slots.max_conn is not None and slots.room <= 0:
            heads += [
                next(iter(other.waiters.values()))
                for other in slots.contended.values()
                if other is not pool and other.room > 0
            ]
        waiter = min(heads, key=slots.rank, default=None)
        if waiter is not None and waiter.session.pool is not pool:
            # Its place is in another pool's lane: without one, `reaches` is False for it.
            waiter = Waiter(waiter.session, waiter.request, waiter.seq, waiter.since, waiter.nowait)
        return waiter

    def _pass_on(self, lease: Lease, live: Live, waiter: Waiter, now: float) -> None:
        """End a lease, and send its connection to a waiter as a new one."""
        slots, pool, session = self._slots, lease.pool, waiter.session
        if (waiter.since < now or session is not lease.session) and not pool.moving:
            pool.shared_until = now + SHARED_S
        slots.unpark(lease)
        slots.dequeue(waiter)
        heir = Lease(
            self._slots.new_token(),
            session,
            pool,
            request=waiter.request,
            backend=lease.backend,
            custody=True,
            moves=lease.moves,
            unconfirmed=True,
            unconfirmed_since=now,
        )
        slots.move(heir, SlotState.OPEN, "handed over")
        self._emit(TransferCustody(lease.token, heir.token))
        self._leases.free(lease, "handed over")
        self._leases.record_phase(heir, Phase.IN_USE, now, "")
        pool.counters.handovers += 1
        pool.record_wait(now - waiter.since)
        pressure = returns_wanted(slots, pool, session)
        returns = min(len(session.leases), pressure or int(now < pool.shared_until))
        slots.mark_returns_due(session, returns)
        session.passes += 1
        trial = pool.cancel_works is None and now >= pool.try_at
        passed = Passed(self._recalls.next_serial(), session.returns_due, pressure > 0, trial)
        moved = Moved(waiter.request, heir.token, -1, max(0, lease.moves), live, passed)
        self._emit(PassOn(pool.name, session.member_number, waiter.lane_place, moved))

    def not_delivered(self, moved: Moved, now: float) -> None:
        """Handle a connection that could not be sent: the waiter's socket is gone, or full."""
        lease = self._slots.leases.get(moved.token)
        if lease is None or lease.state is SlotState.FENCING:
            return
        session = lease.session
        self._leases.fence(lease, "it could not be passed on", now, level=logging.DEBUG)
        if not session.ended:  # its request has left the queue, and no answer comes
            text = "a connection could not be sent to its waiter: ask again"
            self._emit(Send(session.id, Reject(text)))

    # --- parking

    def park(self, lease: Lease, live: Live, now: float) -> None:
        """Keep a connection until somebody asks for one."""
        lease.live = live
        if lease.state is not SlotState.OPEN:
            self._slots.move(lease, SlotState.OPEN, "parked")
        self._leases.record_phase(lease, Phase.IDLE, now, "")
        lease.pool.idle.pop(lease.token, None)  # its worker need not be asked for it
        lease.pool.parked[lease.token] = lease

    def serve(self, now: float) -> None:
        """Pass parked connections to the waiters, the most recently used first."""
        for pool in list(self._slots.contended.values()):
            while pool.parked and pool.waiters and not pool.paused:
                lease = pool.parked[next(reversed(pool.parked))]
                waiter = next(iter(pool.waiters.values()))
                live = lease.live
                assert live is not None
                if live.generation != pool.generation:
                    self.end_parked([pool], 1, now)
                elif reaches(waiter):
                    self._pass_on(lease, live, waiter, now)
                else:
                    break

    def promised(self, pool: Pool, now: float) -> int:
        """Return how many parked connections the waiters will have once they are in the lane."""
        if not (pool.parked and pool.waiters) or pool.paused:
            return 0
        first = next(iter(pool.waiters.values()))
        return min(len(pool.parked), len(pool.waiters)) if may_reach(first, pool, now) else 0

    def on_shelf(self, pool: Pool) -> int:
        """Return how many connections on the shelf the waiters will have in a moment."""
        return 0 if pool.paused else on_shelf(pool)

    def end_parked(self, pools: Iterable[Pool], most: int, now: float) -> int:
        """End up to `most` parked connections, the longest parked first; return how many."""
        most = max(0, most)
        parked = (lease for pool in pools for lease in pool.parked.values())
        chosen = list(islice(parked, most))
        for lease in chosen:
            self._slots.unpark(lease)
            self._leases.fence(lease, "parked, and its slot is wanted", now, level=logging.DEBUG)
        return len(chosen)

    # --- holders that keep what others wait for

    def watch_keepers(self, now: float) -> None:
        """Have an alarm look at the holders that were asked for returns while others wait.

        Under a cap over all pools a holder in any pool may keep what a waiter needs.
        """
        slots = self._slots
        contended = slots.contended if not slots.shrinking else slots.contended | slots.shrinking
        for pool in contended.values() if slots.max_conn is None else slots.pools.values():
            if pool.asked_to_return and not pool.nudging:
                pool.nudging = True
                pool.nudged = {
                    session.id: session.passes
                    for session in islice(pool.asked_to_return.values(), _MOST_NUDGED)
                }
                self._arm(now + NUDGE_S, self.nudge_due, pool)

    def nudge_due(self, pool: Pool, now: float) -> None:
        """Ask the holders again that have given nothing since the alarm was set.

        `Session.passes` tells: it counts what the holder was given, so an unchanged count means the
        same connections. A holder has answered the last question before it is asked again.
        """
        pool.nudging = False
        if not slots_wanted(self._slots, pool) and pool.name not in self._slots.shrinking:
            return
        for session_id, passes in pool.nudged.items():
            session = pool.asked_to_return.get(session_id)
            if session is None or session.passes != passes or session.answered < session.asked:
                continue
            if session.nudged != passes:  # the first time for what it has now
                session.nudged, session.nudge_s = passes, NUDGE_S
            elif now >= session.nudge_at:
                # It may have used the connection then, and have kept it for its time slice since.
                session.nudge_s = min(2 * session.nudge_s, NUDGE_LIMIT_S)
            else:
                continue
            session.nudge_at = now + session.nudge_s
            self._recalls.send(session, now)

    # --- cancels

    def cancel_query(self, session: Session, interrupt: CancelQuery, now: float) -> None:
        """Have the query of a lease's connection cancelled.

        Until that is done the connection is not passed on: the cancel could hit its next user. A
        test's cancel needs no such care, as its worker gives the connection only after it was hit.
        """
        lease = session.leases.get(interrupt.token)
        if lease is not None and lease.backend is not None and lease.live is None:
            lease.cancels += not interrupt.trial
            if interrupt.trial:  # its outcome may come after the connection was passed on
                lease.pool.try_at = now + TRY_AGAIN_S
            self._emit(CancelBackend(lease.pool.name, lease.token, lease.backend, interrupt.trial))

    def query_cancelled(self, order: CancelBackend, sent: bool | None, now: float) -> Pool | None:
        """Handle the outcome of a cancel.

        `sent`: True if it was sent, False if the broker's role may not, None if it was not needed
        or is not possible just now.

        A test that fails for lack of rights stops the hand-over in its pool: no query could be
        cancelled on a connection that has moved. Return the pool for which that was found just now.
        """
        if not order.trial:
            if (lease := self._slots.leases.get(order.token)) is not None:
                lease.cancels -= 1
            return None
        # By name: the connection may have been passed on since, under another token.
        if (pool := self._slots.pools.get(order.pool)) is None:
            return None
        if sent is None:  # perhaps the control connection is away: not every caller is to wait
            pool.try_at = now + TRY_AGAIN_S
        if sent is None or pool.cancel_works is not None:
            return None
        pool.cancel_works = sent
        if sent:
            return None
        self.end_parked([pool], len(pool.parked), now)
        return pool

    def check_invariants(self) -> None:
        """Raise `AssertionError` when the records contradict each other."""
        serving = not self._slots.grant_stop.active
        for pool in self._slots.pools.values():
            for token, lease in pool.parked.items():
                assert pool.leases[token] is lease
                assert lease.live is not None
                assert lease.state is SlotState.OPEN, lease
                assert token not in pool.idle
            if pool.parked and pool.waiters and serving and not pool.paused:
                first = next(iter(pool.waiters.values()))
                assert not reaches(first), f"{pool.name}: parked, and a waiter"
