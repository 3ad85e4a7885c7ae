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
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

from sharedpool.broker.core.commands import Command, Entrust, Interfere, PassOn, Send
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.records import Lease, Pool, Session, SlotState, Waiter
from sharedpool.broker.core.scheduler import Demand
from sharedpool.broker.core.slots import Books
from sharedpool.wire.desk import Give, Live, Moved, Passed
from sharedpool.wire.messages import Interrupt, Phase, Reject, ReleaseReason

# A pool is shared for so long after a connection has last changed hands.
SHARED_S = 1.0
# A trial that could not be made is made again after so long. It costs its caller a second, and the connection.
TRY_AGAIN_S = 30.0
# A holder that has been pressed for so long, with others waiting, is asked whether it still uses what it keeps; then
# after twice the time, and so on.
NUDGE_S = 0.01
NUDGE_LIMIT_S = 1.0
_MOST_NUDGED = 64


class Movers(Protocol):
    """The lanes, as the hand-over sees them (`moves.Moves`)."""

    def reaches(self, waiter: Waiter) -> bool:
        """Say whether a connection can be sent to a waiter."""

    def may_reach(self, waiter: Waiter, pool: Pool, now: float) -> bool:
        """Say whether that may be possible in a moment, with one of this pool: it is being let into the lane."""

    def give(self, lease: Lease, live: Live, now: float) -> None:
        """Give in the lane what was given to the broker, for which nobody waits at the broker."""

    def lying(self, pool: Pool) -> int:
        """Return how many lie on a pool's shelf, and will be taken from there in a moment."""


class Handover:
    """The hand-over's side of the ledger. `arm(when, kind, subject)` asks for a timer. `moves` is set once made."""

    moves: Movers

    def __init__(
        self,
        books: Books,
        demand: Demand,
        leases: Leases,
        emit: Callable[[Command], None],
        arm: Callable[[float, str, object], None],
    ) -> None:
        self._books = books
        self._demand = demand
        self._leases = leases
        self._emit = emit
        self._arm = arm

    # --- giving and passing

    def given(self, session: Session, give: Give, now: float) -> bool:
        """Take in a connection that its worker does not use any more; return whether all is done with that."""
        lease = session.leases.get(give.token)
        if lease is None or lease.live is not None or lease.state is SlotState.FENCING:
            return False
        session.debts.discard(lease.token)
        if give.reason is ReleaseReason.OWED:
            lease.pool.recalls += 1
            if session.owed:
                self._books.mark_owed(session, session.owed - 1)
        lease.unspoken = False
        self._leases.identify(lease, give.live.backend, now)
        return self._find_user(lease, give.live, now)

    def shelved(self, lease: Lease, live: Live, now: float) -> None:
        """Take in a connection that lay on its pool's shelf."""
        self._find_user(lease, live, now)

    def _find_user(self, lease: Lease, live: Live, now: float) -> bool:
        """Pass a connection to the first who waits, or keep it; return whether all is done with that."""
        pool = lease.pool
        stays = lease.custody and not lease.interrupts and live.generation == pool.generation
        stays = stays and pool.cancels is not False
        if not stays or self._demand.draining or self._demand.excess(pool) > 0:
            self._leases.fence(lease, "given, but not fit to go on", now, level=logging.DEBUG)
        elif (waiter := self._first(pool)) is not None:
            if self.moves.reaches(waiter):
                self._pass(lease, live, waiter, now)
                # Who gave all that was asked of him may have more; a lease that was closing is not coming any more.
                return bool(pool.waiters) and self._demand.at_rest(pool)
            if self.moves.may_reach(waiter, pool, now):
                self.park(lease, live, now)
                return False
            self._leases.fence(lease, "given, but it cannot be passed to who waits", now, level=logging.DEBUG)
        elif pool.moving:
            self.moves.give(lease, live, now)
        else:
            self.park(lease, live, now)
            return not (self._books.contended or self._books.shrinking)
        return False

    def _first(self, pool: Pool) -> Waiter | None:
        """Return the waiter who is to have a slot of this pool, of another pool under an exhausted cap."""
        books = self._books
        heads = [next(iter(pool.waiters.values()))] if pool.waiters and not pool.held else []
        if books.groups:
            heads += [next(iter(p.waiters.values())) for p in books.contended.values() if books.serves(pool, p)]
        elif books.max_conn is not None and books.room <= 0:
            heads += [next(iter(p.waiters.values())) for p in books.contended.values() if p is not pool and p.room > 0]
        waiter = min(heads, key=books.rank, default=None)
        if waiter is not None and waiter.session.pool is not pool:  # it has no place in this pool's lane
            waiter = Waiter(waiter.session, waiter.request, waiter.seq, waiter.since, waiter.nowait)
        return waiter

    def _pass(self, lease: Lease, live: Live, waiter: Waiter, now: float) -> None:
        books, pool, session = self._books, lease.pool, waiter.session
        if (waiter.since < now or session is not lease.session) and not pool.moving:
            pool.shared_until = now + SHARED_S
        self._unpark(lease)
        books.dequeue(waiter)
        heir = Lease(
            self._demand.new_token(), session, pool,
            request=waiter.request, backend=lease.backend, custody=True, moves=lease.moves, unspoken=True, noticed=now,
        )  # fmt: skip
        books.move(heir, SlotState.OPEN, "handed over")
        self._emit(Entrust(lease.token, heir.token))
        self._leases.free(lease, "handed over")
        self._leases.note(heir, Phase.IN_USE, now, "")
        pool.handovers += 1
        pool.waits += now > waiter.since
        pool.waited.append(now - waiter.since)
        pressure = self._demand.pressure(pool, session)
        books.mark_owed(session, min(len(session.leases), pressure or int(now < pool.shared_until)))
        session.passes += 1
        trial = pool.cancels is None and now >= pool.try_at
        passed = Passed(self._demand.next_serial(), session.owed, pressure > 0, trial)
        moved = Moved(waiter.request, heir.token, -1, max(0, lease.moves), live, passed)
        self._emit(PassOn(pool.name, session.number, waiter.place, moved))

    def not_passed(self, moved: Moved, now: float) -> None:
        """Take in that a connection could not be sent to who was to have it: his seat is gone, or full."""
        lease = self._books.leases.get(moved.token)
        if lease is None or lease.state is SlotState.FENCING:
            return
        session = lease.session
        self._leases.fence(lease, "it could not be passed on", now, level=logging.DEBUG)
        if not session.ended:  # it waits for what nobody will answer
            self._emit(Send(session.id, Reject("a connection could not be sent to who waits: ask again")))

    # --- parking

    def park(self, lease: Lease, live: Live, now: float) -> None:
        """Keep a connection until somebody asks for one."""
        lease.live = live
        if lease.state is not SlotState.OPEN:
            self._books.move(lease, SlotState.OPEN, "parked")
        self._leases.note(lease, Phase.IDLE, now, "")
        lease.pool.idle.pop(lease.token, None)  # its worker need not be asked for it
        lease.pool.parked[lease.token] = lease

    @staticmethod
    def _unpark(lease: Lease) -> None:
        lease.live = None
        lease.pool.parked.pop(lease.token, None)

    def serve(self, now: float) -> None:
        """Give what is parked to who waits."""
        for pool in list(self._books.contended.values()):
            while pool.parked and pool.waiters and not pool.held:
                lease = pool.parked[next(reversed(pool.parked))]  # the most recently used
                waiter = next(iter(pool.waiters.values()))
                live = lease.live
                assert live is not None
                if live.generation != pool.generation:
                    self.end([pool], 1, now)
                elif self.moves.reaches(waiter):
                    self._pass(lease, live, waiter, now)
                else:
                    break

    def promised(self, pool: Pool, now: float) -> int:
        """Return how many parked connections the waiters will be given in a moment, once they are in the lane."""
        if not (pool.parked and pool.waiters) or pool.held:
            return 0
        first = next(iter(pool.waiters.values()))
        return min(len(pool.parked), len(pool.waiters)) if self.moves.may_reach(first, pool, now) else 0

    def lying(self, pool: Pool) -> int:
        """Return how many connections lie in the lane, and will be given to the waiters in a moment."""
        return 0 if pool.held else self.moves.lying(pool)

    def end(self, pools: Iterable[Pool], most: int, now: float) -> int:
        """End up to `most` parked connections, longest parked first; return how many."""
        chosen = [lease for pool in pools for lease in islice(pool.parked.values(), max(0, most))][:most]
        for lease in chosen:
            self._unpark(lease)
            self._leases.fence(lease, "parked, and its slot is wanted", now, level=logging.DEBUG)
        return len(chosen)

    def expire(self, lease: Lease, now: float) -> None:
        """End a parked connection that nobody has asked for."""
        self._unpark(lease)
        self._leases.fence(lease, "parked for too long", now, level=logging.DEBUG)

    # --- holders that keep what others wait for

    def watch(self, now: float) -> None:
        """Have those looked at who keep connections while others wait: under a cap over all pools, in any pool."""
        books = self._books
        contended = books.contended if not books.shrinking else books.contended | books.shrinking
        for pool in contended.values() if books.max_conn is None else books.pools.values():
            if pool.pressed and not pool.nudging:
                pool.nudging = True
                pool.nudged = {session.id: session.passes for session in islice(pool.pressed.values(), _MOST_NUDGED)}
                self._arm(now + NUDGE_S, "nudge", pool)

    def nudge_due(self, pool: Pool, now: float) -> None:
        """Ask those who were pressed before, and have given nothing since."""
        pool.nudging = False
        if not self._demand.wanted(pool) and pool.name not in self._books.shrinking:
            return
        for session_id, passes in pool.nudged.items():
            session = pool.pressed.get(session_id)
            if session is None or session.passes != passes or session.answered < session.asked:
                continue
            if session.nudged != passes:
                session.nudged, session.nudge_s = passes, NUDGE_S
            elif now >= session.nudge_at:  # it may have used it then, and have kept it for its slice since
                session.nudge_s = min(2 * session.nudge_s, NUDGE_LIMIT_S)
            else:
                continue
            session.nudge_at = now + session.nudge_s
            self._demand.ask(session, now)

    # --- cancels

    def interrupt(self, session: Session, interrupt: Interrupt) -> None:
        """Have what a lease's connection is executing cancelled; until that is done it is passed to nobody.

        But for a trial: its worker sees the cancel hit, or does not give that connection.
        """
        lease = session.leases.get(interrupt.token)
        if lease is not None and lease.backend is not None and lease.live is None:
            lease.interrupts += not interrupt.trial
            self._emit(Interfere(lease.token, lease.backend, interrupt.trial))

    def interrupted(self, order: Interfere, sent: bool | None, now: float) -> Pool | None:
        """Take in that a cancel was sent, must not be, or (None) was not needed, or not possible just now.

        Where a trial's must not be nothing is passed on from now on: nobody could cancel what is executed on a
        connection that has moved. Return the pool of which that has just become known.
        """
        lease = self._books.leases.get(order.token)
        if lease is None:
            return None
        pool = lease.pool
        if not order.trial:
            lease.interrupts -= 1
            return None
        if sent is None:  # the control connection is away, perhaps: not every caller is to pay for that
            pool.try_at = now + TRY_AGAIN_S
        if sent is None or pool.cancels is not None:
            return None
        pool.cancels = sent
        if sent:
            return None
        self.end([pool], len(pool.parked), now)
        return pool

    def check_invariants(self) -> None:
        """Raise `AssertionError` when the records contradict each other."""
        for pool in self._books.pools.values():
            for token, lease in pool.parked.items():
                assert pool.leases[token] is lease
                assert lease.live is not None
                assert lease.state is SlotState.OPEN, lease
                assert token not in pool.idle
            if pool.parked and pool.waiters and not (pool.held or self._demand.paused or self._demand.draining):
                assert not self.moves.reaches(next(iter(pool.waiters.values()))), f"{pool.name}: parked, and a waiter"
