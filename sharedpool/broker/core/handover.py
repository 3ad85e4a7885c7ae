"""Pass live connections on: from who gives one to the first who waits, or keep it *parked* until somebody asks.

A lease that is given ends, and its heir, with a token of its own, is sent to the waiter's place in the lane: the slot
stays occupied all along, by the same backend, whose socket is in custody. A waiter that has no place there cannot take
one in: for it the connection is ended, as every connection is that must not go on (of an older generation, with a
cancel under way).

While connections move between processes the pool is *shared*: what is passed comes with the wish to have it back at the
next checkin, and nobody has to be asked for it. When one process has been alone for a while, it keeps what it has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

from sharedpool.broker.core.commands import CancelBackend, PassOn, Send, TransferCustody
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.records import Lease, Pool, Session, SlotState, Waiter
from sharedpool.broker.core.scheduler import Scheduler
from sharedpool.wire.desk import Give, Live, Moved, Passed
from sharedpool.wire.messages import CancelQuery, Phase, Reject, ReleaseReason

# A pool is shared for so long after a connection has last changed hands.
SHARED_S = 1.0
# A trial that could not be made is made again after so long. It costs its caller a second, and the connection.
TRY_AGAIN_S = 30.0
# A holder that has been pressed for so long, with others waiting, is asked whether it still uses what it keeps; then
# after twice the time, and so on.
NUDGE_S = 0.01
NUDGE_LIMIT_S = 1.0
_MOST_NUDGED = 64


class MovesPort(Protocol):
    """The lanes, as the hand-over sees them (`moves.Moves`)."""

    def reaches(self, waiter: Waiter) -> bool:
        """Say whether a connection can be sent to a waiter."""

    def may_reach(self, waiter: Waiter, pool: Pool, now: float) -> bool:
        """Say whether that may be possible in a moment, with one of this pool: it is being let into the lane."""

    def give(self, lease: Lease, live: Live, now: float) -> None:
        """Give in the lane what was given to the broker, for which nobody waits at the broker."""

    def on_shelf(self, pool: Pool) -> int:
        """Return how many lie on a pool's shelf, and will be taken from there in a moment."""


class Handover:
    """The hand-over's side of the ledger. `moves` is set once made."""

    moves: MovesPort

    def __init__(
        self,
        context: Context,
        scheduler: Scheduler,
        leases: Leases,
    ) -> None:
        self._slots = context.slots
        self._scheduler = scheduler
        self._leases = leases
        self._emit = context.emit
        self._arm = context.timers.arm

    # --- giving and passing

    def given(self, session: Session, give: Give, now: float) -> bool:
        """Take in a connection that its worker does not use any more; return whether all is done with that."""
        lease = session.leases.get(give.token)
        if lease is None or lease.live is not None or lease.state is SlotState.FENCING:
            return False
        session.draining.discard(lease.token)
        if give.reason is ReleaseReason.RETURN_DUE:
            lease.pool.recalls += 1
            if session.returns_due:
                self._slots.mark_returns_due(session, session.returns_due - 1)
        lease.unconfirmed = False
        self._leases.identify(lease, give.live.backend, now)
        return self._pass_or_park(lease, give.live, now)

    def found_on_shelf(self, lease: Lease, live: Live, now: float) -> None:
        """Take in a connection that lay on its pool's shelf."""
        self._pass_or_park(lease, live, now)

    def _pass_or_park(self, lease: Lease, live: Live, now: float) -> bool:
        """Pass a connection to the first who waits, or keep it; return whether all is done with that."""
        pool = lease.pool
        stays = lease.custody and not lease.cancels and live.generation == pool.generation
        stays = stays and pool.cancel_works is not False
        if not stays or self._scheduler.draining or self._scheduler.excess(pool) > 0:
            self._leases.fence(lease, "given, but not fit to go on", now, level=logging.DEBUG)
        elif (waiter := self._first_waiter(pool)) is not None:
            if self.moves.reaches(waiter):
                self._pass_on(lease, live, waiter, now)
                # Who gave all that was asked of him may have more; a lease that was closing is not coming any more.
                return bool(pool.waiters) and self._scheduler.nothing_to_schedule(pool)
            if self.moves.may_reach(waiter, pool, now):
                self.park(lease, live, now)
                return False
            self._leases.fence(
                lease, "given, but it cannot be passed to who waits", now, level=logging.DEBUG
            )
        elif pool.moving:
            self.moves.give(lease, live, now)
        else:
            self.park(lease, live, now)
            return not (self._slots.contended or self._slots.shrinking)
        return False

    def _first_waiter(self, pool: Pool) -> Waiter | None:
        """Return the waiter who is to have a slot of this pool, of another pool under an exhausted cap."""
        slots = self._slots
        heads = [next(iter(pool.waiters.values()))] if pool.waiters and not pool.paused else []
        if slots.groups:
            heads += [
                next(iter(p.waiters.values()))
                for p in slots.contended.values()
                if slots.serves(pool, p)
            ]
        elif slots.max_conn is not None and slots.room <= 0:
            heads += [
                next(iter(p.waiters.values()))
                for p in slots.contended.values()
                if p is not pool and p.room > 0
            ]
        waiter = min(heads, key=slots.rank, default=None)
        if (
            waiter is not None and waiter.session.pool is not pool
        ):  # it has no place in this pool's lane
            waiter = Waiter(waiter.session, waiter.request, waiter.seq, waiter.since, waiter.nowait)
        return waiter

    def _pass_on(self, lease: Lease, live: Live, waiter: Waiter, now: float) -> None:
        slots, pool, session = self._slots, lease.pool, waiter.session
        if (waiter.since < now or session is not lease.session) and not pool.moving:
            pool.shared_until = now + SHARED_S
        self._unpark(lease)
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
        self._leases.note(heir, Phase.IN_USE, now, "")
        pool.handovers += 1
        pool.waits += now > waiter.since
        pool.waited.append(now - waiter.since)
        pressure = self._scheduler.returns_wanted(pool, session)
        slots.mark_returns_due(
            session, min(len(session.leases), pressure or int(now < pool.shared_until))
        )
        session.passes += 1
        trial = pool.cancel_works is None and now >= pool.try_at
        passed = Passed(
            self._scheduler.next_recall_serial(), session.returns_due, pressure > 0, trial
        )
        moved = Moved(waiter.request, heir.token, -1, max(0, lease.moves), live, passed)
        self._emit(PassOn(pool.name, session.number, waiter.lane_place, moved))

    def not_delivered(self, moved: Moved, now: float) -> None:
        """Take in that a connection could not be sent to who was to have it: his wait socket is gone, or full."""
        lease = self._slots.leases.get(moved.token)
        if lease is None or lease.state is SlotState.FENCING:
            return
        session = lease.session
        self._leases.fence(lease, "it could not be passed on", now, level=logging.DEBUG)
        if not session.ended:  # it waits for what nobody will answer
            self._emit(
                Send(session.id, Reject("a connection could not be sent to who waits: ask again"))
            )

    # --- parking

    def park(self, lease: Lease, live: Live, now: float) -> None:
        """Keep a connection until somebody asks for one."""
        lease.live = live
        if lease.state is not SlotState.OPEN:
            self._slots.move(lease, SlotState.OPEN, "parked")
        self._leases.note(lease, Phase.IDLE, now, "")
        lease.pool.idle.pop(lease.token, None)  # its worker need not be asked for it
        lease.pool.parked[lease.token] = lease

    @staticmethod
    def _unpark(lease: Lease) -> None:
        lease.live = None
        lease.pool.parked.pop(lease.token, None)

    def serve(self, now: float) -> None:
        """Give what is parked to who waits."""
        for pool in list(self._slots.contended.values()):
            while pool.parked and pool.waiters and not pool.paused:
                lease = pool.parked[next(reversed(pool.parked))]  # the most recently used
                waiter = next(iter(pool.waiters.values()))
                live = lease.live
                assert live is not None
                if live.generation != pool.generation:
                    self.end_parked([pool], 1, now)
                elif self.moves.reaches(waiter):
                    self._pass_on(lease, live, waiter, now)
                else:
                    break

    def promised(self, pool: Pool, now: float) -> int:
        """Return how many parked connections the waiters will be given in a moment, once they are in the lane."""
        if not (pool.parked and pool.waiters) or pool.paused:
            return 0
        first = next(iter(pool.waiters.values()))
        return (
            min(len(pool.parked), len(pool.waiters))
            if self.moves.may_reach(first, pool, now)
            else 0
        )

    def on_shelf(self, pool: Pool) -> int:
        """Return how many connections lie in the lane, and will be given to the waiters in a moment."""
        return 0 if pool.paused else self.moves.on_shelf(pool)

    def end_parked(self, pools: Iterable[Pool], most: int, now: float) -> int:
        """End up to `most` parked connections, longest parked first; return how many."""
        chosen = [lease for pool in pools for lease in islice(pool.parked.values(), max(0, most))][
            :most
        ]
        for lease in chosen:
            self._unpark(lease)
            self._leases.fence(lease, "parked, and its slot is wanted", now, level=logging.DEBUG)
        return len(chosen)

    def expire(self, lease: Lease, now: float) -> None:
        """End a parked connection that nobody has asked for."""
        self._unpark(lease)
        self._leases.fence(lease, "parked for too long", now, level=logging.DEBUG)

    # --- holders that keep what others wait for

    def watch_keepers(self, now: float) -> None:
        """Have those looked at who keep connections while others wait: under a cap over all pools, in any pool."""
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
        """Ask those who were pressed before, and have given nothing since."""
        pool.nudging = False
        if not self._scheduler.slots_wanted(pool) and pool.name not in self._slots.shrinking:
            return
        for session_id, passes in pool.nudged.items():
            session = pool.asked_to_return.get(session_id)
            if session is None or session.passes != passes or session.answered < session.asked:
                continue
            if session.nudged != passes:
                session.nudged, session.nudge_s = passes, NUDGE_S
            elif (
                now >= session.nudge_at
            ):  # it may have used it then, and have kept it for its slice since
                session.nudge_s = min(2 * session.nudge_s, NUDGE_LIMIT_S)
            else:
                continue
            session.nudge_at = now + session.nudge_s
            self._scheduler.send_recall(session, now)

    # --- cancels

    def cancel_query(self, session: Session, interrupt: CancelQuery) -> None:
        """Have what a lease's connection is executing cancelled; until that is done it is passed to nobody.

        But for a trial: its worker sees the cancel hit, or does not give that connection.
        """
        lease = session.leases.get(interrupt.token)
        if lease is not None and lease.backend is not None and lease.live is None:
            lease.cancels += not interrupt.trial
            self._emit(CancelBackend(lease.token, lease.backend, interrupt.trial))

    def query_cancelled(self, order: CancelBackend, sent: bool | None, now: float) -> Pool | None:
        """Take in that a cancel was sent, must not be, or (None) was not needed, or not possible just now.

        Where a trial's must not be nothing is passed on from now on: nobody could cancel what is executed on a
        connection that has moved. Return the pool of which that has just become known.
        """
        lease = self._slots.leases.get(order.token)
        if lease is None:
            return None
        pool = lease.pool
        if not order.trial:
            lease.cancels -= 1
            return None
        if (
            sent is None
        ):  # the control connection is away, perhaps: not every caller is to pay for that
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
        for pool in self._slots.pools.values():
            for token, lease in pool.parked.items():
                assert pool.leases[token] is lease
                assert lease.live is not None
                assert lease.state is SlotState.OPEN, lease
                assert token not in pool.idle
            if (
                pool.parked
                and pool.waiters
                and not (pool.paused or self._scheduler.holding_back or self._scheduler.draining)
            ):
                assert not self.moves.reaches(next(iter(pool.waiters.values()))), (
                    f"{pool.name}: parked, and a waiter"
                )
