"""Decide when connections move from worker to worker without the broker. Pure: no I/O, no clock.

While many threads want a pool's connections, and passing them on is all that the broker has to do,
it lets them *move* past it (`sharedpool/lane/lane.py`) and reads on the pool's board who holds each
lease (`in_transit.py`). As soon as there is something else to do it halts the moves: a slot is
free, a connection is idle in a process, an operator gives an order, or another pool waits for a
slot of their common limit. Then the waiting threads ask the broker again, and it passes on what is
on the shelf.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sharedpool.broker.core.commands import HaltMoves, JoinQueue, Member, StartMoves
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.former_lanes import FormerLanes
from sharedpool.broker.core.in_transit import InTransit
from sharedpool.broker.core.lane_members import LaneMembers
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import Lane, Lease, Pool, Session
from sharedpool.broker.core.shelves import Shelves, on_shelf
from sharedpool.broker.core.slot_states import FENCING, OPEN, SUSPECT
from sharedpool.wire.board import BROKER_PLACE, BROKER_REQUEST, Board
from sharedpool.wire.desk import Moved

# Moves go on for so long after the last request.
_QUIET_S = 1.0
UNCLAIMED = "no worker has it since the former broker's end"


class Moves:
    """The lanes of all pools: when connections move, and what happens to those who take part."""

    def __init__(
        self,
        context: Context,
        recalls: Recalls,
        leases: Leases,
        shelves: Shelves,
        *,
        journal_complete: bool,
    ) -> None:
        """`journal_complete`: the journal names every member of a former broker's lanes."""
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._recalls = recalls
        self._leases = leases
        self._shelves = shelves
        self.former = FormerLanes(context, recalls.send, journal_complete=journal_complete)
        self._members = LaneMembers(context, self.former)
        self.transit = InTransit(context, recalls, leases, self._members, shelves, self.former)

    # --- sessions and pools

    def opened(self, pool_name: str, serial: int, board: Board, now: float) -> None:
        """Use a pool's new lane, and let its workers in."""
        self._members.opened(pool_name, serial, board, now)

    def session_registered(self, session: Session, now: float) -> None:
        """Ask a session for what is on its way to it, and let it into its pool's lane."""
        self.transit.session_registered(session, now)
        self.former.registered(session, now)
        self._members.let_in(session, now)

    def joined(self, session: Session, *, takes_part: bool) -> None:
        """Handle a session's answer to its invitation into the lane."""
        self._members.joined(session, takes_part=takes_part)

    def session_ended(self, session: Session) -> None:
        """Take a session that has ended, or that is silent without leases, out of its lanes.

        A silent one may still have a connection of a former broker's lane: it is waited for.
        """
        if session.ended:
            self.former.ended(session.id)
        self._members.session_ended(session)

    def check_unconfirmed(self, pool: Pool, now: float) -> None:
        """Ask for all unconfirmed leases of a pool: an ended session may not have sent them."""
        if self.transit.ask_for_unconfirmed(pool, now) and pool.moving:
            self.halt_moves(pool, now)

    def pool_discarded(self, pool: Pool) -> None:
        """Forget a pool that no worker uses any more."""
        self._shelves.pool_discarded(pool)
        self.former.discarded(pool)
        self._members.pool_discarded(pool)

    def restore(self, members: Iterable[Member]) -> None:
        """Restore who was let into a former broker's lanes."""
        self.former.restore(members, self._slots.find)

    def former_ended(self, session_id: bytes) -> None:
        """Handle the end of a former lane's member that has not registered at this broker."""
        self.former.ended(session_id)

    # --- when connections move

    def update_modes(self, now: float) -> bool:
        """Start or halt the moves of each pool, as is due; return True if any were halted."""
        while self.former.complete_pools:
            self._fence_unclaimed(self.former.complete_pools.pop(), now)
        for pool in self._slots.contended.values():
            if pool.lane is None:
                self._members.request_lane(pool, now)
        for pool in self._shelves.pools():
            if self._is_over(pool, now):
                self._clear_shelf(pool, now)
        halted = False
        for pool in list(self._members.pools.values()):
            lane = pool.lane
            assert lane is not None
            if lane.moving:
                if self._may_move(pool):
                    self._go_on(lane, pool, now)
                else:
                    self.halt_moves(pool, now)
                    halted = True
            elif pool.name in self._slots.contended and self._may_start(pool):
                self._start_moves(lane, pool, now)
        return halted

    def _may_move(self, pool: Pool) -> bool:
        """Return True if the broker has nothing to do for a pool but to pass connections on."""
        slots, lane = self._slots, pool.lane
        # 1. The lane is open, queries on moved connections can be cancelled, slots are granted.
        if lane is None or pool.cancel_works is not True:
            return False
        if slots.grant_stop.active:
            return False
        # 2. Nobody but the pool's own waiters decides who is next.
        if pool.paused or pool.name in slots.shrinking or slots.groups or pool.spec.max_waiting:
            return False
        if self._is_wanted_elsewhere(pool):
            return False
        # 3. The board has a cell for every lease.
        if len(pool.leases) > lane.cells:
            return False
        # 4. No slot is to be granted, watched or freed.
        if pool.room > 0 or pool.parked or pool.suspects or pool.backoff.active or pool.unsuitable:
            return False
        # 5. No worker outside the lane holds a lease: it could neither give nor be asked there.
        return not any(session.leases for session in lane.outside.values())

    def _is_wanted_elsewhere(self, pool: Pool) -> bool:
        """Return True if only the cap over all pools keeps a waiter of another pool from a slot.

        Then the broker decides whose the next checkin is. Moves within a pool change no count.
        """
        slots = self._slots
        if slots.max_conn is None or slots.room > 0:
            return False
        return any(other is not pool and other.room > 0 for other in slots.contended.values())

    def _may_start(self, pool: Pool) -> bool:
        """Return True if only moves can bring connections to the waiters of a pool."""
        return self._may_move(pool) and self._is_exhausted(pool)

    @staticmethod
    def _is_exhausted(pool: Pool) -> bool:
        """Return True if no connection is idle, in a worker or on the shelf, by the records.

        A lease that is on the shelf by the records: either the broker found it there after the last
        halt, or it has not looked yet.
        """
        if pool.idle or pool.not_asked_to_return:
            return False
        return pool.shelf is None or not any(
            lease.state is OPEN for lease in pool.shelf.leases.values()
        )

    def _start_moves(self, lane: Lane, pool: Pool, now: float) -> None:
        lane.moving = True
        pool.shared_until = now  # from here on a returned connection is wanted by a waiting thread
        self._enter_leases(lane, pool)
        self._emit(StartMoves(pool.name))
        lane.requests, lane.board.generation = lane.board.requests, pool.generation
        lane.board.take_place(BROKER_PLACE, BROKER_REQUEST)
        lane.queued = 0
        # Last: from here on workers read the rest of the board.
        lane.board.moving = True
        self._join_queue(lane, pool)
        if not lane.armed:
            lane.armed = True
            self._arm(now + _QUIET_S, self.quiet_due, pool)

    def _go_on(self, lane: Lane, pool: Pool, now: float) -> None:
        """Keep a lane up to date whose connections go on moving."""
        if pool.idle:
            self._recalls.take_idle([pool], len(pool.idle), now)
        lane.board.generation = pool.generation
        self._join_queue(lane, pool)
        self._enter_leases(lane, pool)

    def _join_queue(self, lane: Lane, pool: Pool) -> None:
        """Queue in the lane for the requests that wait at the broker, so that they have their turn.

        Requests that must not wait (`timeout=0`) are given what is on the shelf. The shelf is read
        after the tickets are written: a connection may get there in between, and a request at the
        broker has not looked there itself.
        """
        missing = max(0, len(pool.waiters) - len(pool.nowaits) - lane.queued)
        most_from_shelf = missing + min(len(pool.waiters), on_shelf(pool))
        if most_from_shelf:
            lane.queued += missing
            self._emit(JoinQueue(pool.name, missing, most_from_shelf))

    def _enter_leases(self, lane: Lane, pool: Pool) -> None:
        """Put all leases on the board that may move."""
        if lane.used == len(pool.leases):
            return
        for lease in pool.leases.values():
            if lane.free and lease.cell < 0 and _can_move(lease):
                self._slots.enter_on_board(lease)

    def halt_moves(self, pool: Pool, now: float) -> None:
        """Have the broker pass connections on again."""
        lane = pool.lane
        assert lane is not None
        lane.moving = lane.board.moving = False
        lane.board.leave_place(BROKER_PLACE)
        self._emit(HaltMoves(pool.name))
        for lease in pool.leases.values():
            if lease.session.shelf and lease.live is None:
                self.transit.await_arrival(lease, now)

    def quiet_due(self, pool: Pool, now: float) -> None:
        """Halt the moves if no thread has asked for a while, or if a connection is forgotten.

        If a connection lies on the shelf for two quiet periods while threads ask, then a process
        that took one of their tickets has died with it.
        """
        if (lane := pool.lane) is None:
            return  # no worker uses the pool any more
        lane.armed = False
        if not lane.moving:
            return
        before, lane.requests = lane.requests, lane.board.requests
        if before == lane.requests and not pool.waiters:
            self.halt_moves(pool, now)
            return
        lane.queued = 0  # the broker's own tickets may be lost in the same way
        if any(
            lease.session.shelf and now - lease.unconfirmed_since > 2 * _QUIET_S
            for lease in pool.leases.values()
        ):
            self.halt_moves(pool, now)
        lane.armed = True
        self._arm(now + _QUIET_S, self.quiet_due, pool)

    @staticmethod
    def received(pool: Pool) -> None:
        """Record that the broker was given a connection in the lane: one of its tickets is used."""
        if pool.lane is not None and pool.lane.queued:
            pool.lane.queued -= 1

    def found_on_shelf(self, pool: Pool, moved: Moved) -> Lease | None:
        """Return the lease of a connection found on the shelf, None if it must not be passed on."""
        return self._shelves.found(pool, moved)

    def shelf_empty(self, pool: Pool, now: float) -> None:
        """Record that the broker has found nothing more on a pool's shelf."""
        self._shelves.emptied(pool, now)

    # --- leases that nobody has

    def _fence_unclaimed(self, pool: Pool, now: float) -> None:
        """Fence what no member of a former broker's lane has listed: all of them have answered."""
        for lease in [] if pool.shelf is None else list(pool.shelf.leases.values()):
            if lease.state is SUSPECT and lease.cell < 0:
                self._leases.fence(lease, UNCLAIMED, now)

    @staticmethod
    def _is_over(pool: Pool, now: float) -> bool:
        """Return True if a pool with a shelf has no worker left, and none is to come.

        Members of a former broker's lane have their time to register before that.
        """
        if not all(session.ended or session.shelf for session in pool.sessions.values()):
            return False
        return not pool.former or pool.shelf is None or now >= pool.shelf.spared_until

    def _clear_shelf(self, pool: Pool, now: float) -> None:
        """Fence what is on the shelf of a pool whose last worker has left."""
        if pool.moving:
            self.halt_moves(pool, now)
        assert pool.shelf is not None
        for lease in [x for x in pool.shelf.leases.values() if x.state is not FENCING]:
            self._slots.unpark(lease)
            self._leases.fence(lease, "nobody uses its pool any more", now, level=logging.DEBUG)


def _can_move(lease: Lease) -> bool:
    """Return True if a lease is open and its connection can be sent to another worker."""
    if lease.state is not OPEN or not lease.session.joined or lease.live is not None:
        return False
    if not lease.custody or lease.backend is None or lease.cancels:
        return False
    # A token that a worker has claimed may contain 0, which the board cannot store.
    return min(lease.token) > 0
