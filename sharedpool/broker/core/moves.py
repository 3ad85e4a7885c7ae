"""Connections that move past the broker: the lane's side of the ledger. Pure: no I/O, no clock.

While many want a pool's connections, and there is nothing for the broker to do but to pass them on, it lets them *move*
from worker to worker without it (`sharedpool/lane/lane.py`), and reads on the pool's board who holds which lease. As
soon as there is something else (a slot is free, a connection lies idle in a process, an operator wants something,
another pool shares the limit) it halts that: who waits asks the broker again, and what lies on the shelf is the
broker's to pass on.

A lease that has moved is *unspoken* of until its new holder lists it. If that one does not, asked for it, the lease was
lost on its way (its giver or its receiver has died, or was stopped), and is fenced.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable

from sharedpool.broker.core.commands import (
    CloseLane,
    Dismiss,
    GiveInLane,
    HaltMoves,
    InviteToLane,
    JoinQueue,
    Member,
    OpenLane,
    StartMoves,
)
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.former_lanes import FormerLanes
from sharedpool.broker.core.leases import LONGEST_MS, Leases
from sharedpool.broker.core.records import (
    FENCING,
    FREE,
    OPEN,
    SUSPECT,
    Lane,
    Lease,
    Pool,
    Session,
    Waiter,
)
from sharedpool.broker.core.scheduler import Scheduler
from sharedpool.wire.board import (
    BROKER_PLACE,
    BROKER_REQUEST,
    CELLS,
    MOVES,
    PLACES,
    SESSIONS,
    SHELF,
    Board,
)
from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.messages import LeaseReport, Phase, Release, Token

# Connections move past the broker for so long after somebody has last asked for one.
_QUIET_S = 1.0
# A receiver has so long to take in what was passed to it, and to speak of it when it is asked.
ARRIVAL_S = 0.25
_FEWEST_CELLS = 64
LOST_WITH_THE_BROKER = "nobody has it since the former broker's end"


class Moves:
    """The lanes of all pools."""

    def __init__(
        self,
        context: Context,
        scheduler: Scheduler,
        leases: Leases,
        *,
        expiration_s: float,
        remembers: bool,
    ) -> None:
        self._slots = context.slots
        self._scheduler = scheduler
        self._leases = leases
        self._emit = context.emit
        self._arm = context.timers.arm
        self._expiration_s = expiration_s
        self._pools: dict[str, Pool] = {}  # that have a lane
        self._shelves: dict[str, Pool] = {}  # that have a shelf session
        self._requested: dict[
            str, int
        ] = {}  # by the name of the pool for which it is to be made: the order's number
        self._lane_requests = 0
        self._former = FormerLanes(context, scheduler.send_recall, complete=remembers)

    # --- lanes

    def _request_lane(self, pool: Pool, now: float) -> None:
        """Have a lane made for a pool in which somebody waits, if connections can be passed on there.

        That is known once one is open. A worker keeps descriptors of a lane for as long as it lives.
        """
        if pool.hands_over and pool.movable and pool.name not in self._requested:
            self._lane_requests += 1
            self._requested[pool.name] = self._lane_requests
            pool.opens_by = now + ARRIVAL_S
            self._arm(pool.opens_by, _no_longer_awaited, pool)
            self._emit(OpenLane(pool.name, self._lane_requests))

    def opened(self, pool_name: str, serial: int, board: Board, now: float) -> None:
        """Take in a pool's lane, and let its workers in; unless it was ordered for a pool that is over."""
        if self._requested.get(pool_name) != serial:
            if pool_name not in self._requested and pool_name not in self._pools:
                self._emit(CloseLane(pool_name))
            return
        del self._requested[pool_name]
        pool = self._slots.pools[pool_name]
        cells = min(CELLS, max(_FEWEST_CELLS, 2 * pool.max_conn))
        pool.lane = Lane(board, deque(range(cells)), cells)
        self._pools[pool.name] = pool
        for session in list(pool.sessions.values()):
            self._let_in(session, now)

    def session_registered(self, session: Session, now: float) -> None:
        """Ask a session for what is on its way to it, and let it in if it can hand connections over."""
        for lease in session.leases.values():
            if lease.unconfirmed and lease.state is not FENCING:
                self._ask_holder(lease, now)
        self._former.registered(session, now)
        self._let_in(session, now)

    def _let_in(self, session: Session, now: float) -> None:
        session.pool.hands_over |= session.hands_over
        lane = session.pool.lane
        if lane is None or session.shelf or session.ended or session.number:
            return
        lane.outside[session.id] = session
        if not session.hands_over or len(lane.indices) == SESSIONS - 1:
            return
        lane.newest += 1
        session.number = lane.newest
        session.index = next(index for index in range(SESSIONS) if index not in lane.indices)
        lane.indices.add(session.index)
        lane.board.clear_session(session.index)
        lane.members[session.number] = session
        session.joins_by = now + ARRIVAL_S
        self._arm(session.joins_by, _no_longer_awaited, session.pool)
        self._former.admit(session)
        self._emit(InviteToLane(session.pool.name, session.id, session.number, session.index))

    def joined(self, session: Session, *, takes_part: bool) -> None:
        """Take in that a session uses the lane, or will not: nothing is kept for it any longer."""
        if not takes_part:
            session.joins_by = -math.inf
        elif session.number and session.pool.lane is not None:
            session.joined = True
            session.pool.lane.outside.pop(session.id, None)

    @staticmethod
    def reaches(waiter: Waiter) -> bool:
        """Say whether a connection can be sent to a waiter."""
        return (
            waiter.lane_place >= 0
            and waiter.session.joined
            and waiter.lane_place // PLACES == waiter.session.index
        )

    @staticmethod
    def may_reach(waiter: Waiter, pool: Pool, now: float) -> bool:
        """Say whether that may be possible in a moment, with one of this pool: it is being let into the lane."""
        session = waiter.session
        if session.pool is not pool or waiter.lane_place >= 0 or not session.hands_over:
            return False
        return now < (pool.opens_by if pool.lane is None else session.joins_by)

    def session_ended(self, session: Session) -> None:
        """Take in that a session is over: nobody waits there any more."""
        self._former.gone(session.id)
        lane = session.pool.lane
        if lane is None or session.shelf:
            return
        lane.outside.pop(session.id, None)
        if session.number:
            lane.board.clear_session(session.index)
            lane.indices.discard(session.index)
            del lane.members[session.number]
            self._emit(Dismiss(session.id))
            session.number, session.index, session.joined, session.joins_by = (
                0,
                -1,
                False,
                -math.inf,
            )

    def pool_discarded(self, pool: Pool) -> None:
        """Take in that nobody uses a pool any more."""
        self._requested.pop(pool.name, None)
        self._shelves.pop(pool.name, None)
        self._former.discarded(pool)
        if self._pools.pop(pool.name, None) is not None:
            pool.lane = None
            self._emit(CloseLane(pool.name))

    def _shelf(self, pool: Pool) -> Session:
        """Return the session for which is counted what is in nobody's hands."""
        if pool.shelf is None:
            expiration_s = min(self._expiration_s, min(pool.spec.expiration_ms, LONGEST_MS) / 1000)
            shelf = Session(
                b"shelf:" + pool.name.encode(), 0, "", "", pool, expiration_s, 0.0, shelf=True
            )
            self._slots.sessions[shelf.id] = pool.sessions[shelf.id] = pool.shelf = shelf
            self._shelves[pool.name] = pool
        return pool.shelf

    # --- what the board says

    def sync(self, now: float) -> None:
        """Bring the books in line with the boards. Costs a comparison where nothing has moved."""
        for pool in self._pools.values():
            lane = pool.lane
            assert lane is not None
            if lane.used and (seen := lane.board.snapshot(lane.cells)) != lane.last_snapshot:
                lane.last_snapshot = seen
                for lease in list(pool.leases.values()):
                    if lease.cell >= 0:
                        self._follow(lane, lease, now)

    def _follow(self, lane: Lane, lease: Lease, now: float) -> None:
        holder, moves = lane.board.holding(lease.cell)
        if moves == lease.moves:
            return
        lease.pool.handovers += (moves - lease.moves) % MOVES
        lease.moves = moves
        session = self._shelf(lease.pool) if holder == SHELF else lane.members.get(holder)
        if session is None:  # one that is over; or somebody has written nonsense
            session = self._shelf(lease.pool)
            self._arm(
                now + ARRIVAL_S, self.receiver_due, lease
            )  # its giver may be about to find out
        self._slots.transfer(lease, session)
        lease.unconfirmed, lease.unconfirmed_since, lease.confirm_recall = True, now, 0
        # Whatever was said of it before: who gave it was alive, and who has got it may be stopped.
        state = SUSPECT if session.suspect else OPEN
        if lease.state is not state:
            self._slots.move(lease, state, "moved")
        if state is OPEN:
            self._leases.note(lease, Phase.IDLE if session.shelf else Phase.IN_USE, now, "")
        if session.shelf:
            lease.pool.idle.pop(lease.token, None)
            if not lane.moving:  # who has laid it there may have been stopped before he did
                self._arm(now + ARRIVAL_S, self.arrival_due, lease)

    # --- what workers say

    def claims(self, session: Session, report: LeaseReport) -> Lease | None:
        """Return the lease that a session rightly says to hold, though the books say that another does.

        That is one of a former broker's lane: how often it has moved tells who had it last.
        """
        lease = self._slots.leases.get(report.token)
        if (
            lease is None
            or lease.pool is not session.pool
            or lease.cell >= 0
            or lease.state is FENCING
        ):
            return None
        newer = (
            0 < (report.moves - lease.moves) % MOVES < MOVES // 2
        )  # the number begins anew after weeks
        if lease.moves < 0 or not newer or report.backend != lease.backend:
            return None
        self._slots.transfer(lease, session)
        lease.moves = report.moves
        return lease

    def closed_in_transit(self, session: Session, release: Release) -> Lease | None:
        """Return the lease that a session has closed, though by the books it is in nobody's hands.

        Whoever gives a lease back had its connection, and closed it: no other can have it by then.
        """
        lease = self._slots.leases.get(release.token)
        if lease is None or lease.pool is not session.pool or lease.live is not None:
            return None
        if not (
            lease.session.shelf or lease.session.restored
        ):  # whom a former broker knew to have it, perhaps
            return None
        return lease if lease.backend is not None and lease.backend == release.backend else None

    def has_moved_on(self, token: Token) -> bool:
        """Say whether a lease that a session says to hold is another's by now: it was said before."""
        lease = self._slots.leases.get(token)
        return lease is not None and lease.moves >= 0 and lease.state is not FENCING

    def not_listed(self, lease: Lease, known_recall: int, now: float, *, unsure: bool) -> None:
        """Take in that a lease's new holder does not list it, and knows recall number `known_recall`.

        `unsure`: one of its threads may have it in its hands. Of many threads each may be held up for long.
        """
        if (
            known_recall < lease.confirm_recall <= lease.session.answered
        ):  # nobody expects that answer any more: it was lost
            lease.confirm_recall = 0
        if 0 < lease.confirm_recall <= known_recall:
            if now - lease.unconfirmed_since >= ARRIVAL_S and not unsure:
                self._leases.fence(lease, "it was passed on and has not arrived", now)
                return
            lease.confirm_recall = (
                -1
            )  # not asked again before: two such leases would have a session answer all the time
            self._arm(
                max(lease.unconfirmed_since, now if unsure else 0.0) + ARRIVAL_S,
                self.arrival_due,
                lease,
            )
        elif not lease.confirm_recall:
            self._ask_holder(lease, now)

    def _ask_holder(self, lease: Lease, now: float) -> None:
        if not lease.session.silent:
            self._scheduler.send_recall(lease.session, now)
            lease.confirm_recall = lease.session.asked

    def arrival_due(self, lease: Lease, now: float) -> None:
        """Ask once more for what has not arrived; of what lies on no shelf there is nobody to ask."""
        if not lease.unconfirmed or lease.state in (FENCING, FREE):
            return
        if lease.session.shelf:
            if (
                lease.live is None
                and not lease.pool.moving
                and now - lease.unconfirmed_since >= ARRIVAL_S
            ):
                self._leases.fence(lease, "it is on nobody's shelf", now)
        elif lease.confirm_recall <= 0:
            lease.confirm_recall = 0
            self._ask_holder(lease, now)

    def receiver_due(self, lease: Lease, now: float) -> None:
        """End what was passed on to a worker that is gone, and has not been passed on to another since."""
        lane = lease.pool.lane
        if lane is None or lease.cell < 0:
            return
        holder = lane.board.holding(lease.cell).holder
        if holder != SHELF and holder not in lane.members:
            self._leases.fence(lease, "it was passed on to a worker that is gone", now)

    def check_unconfirmed(self, pool: Pool, now: float) -> None:
        """Find out about all that nobody has spoken of since it has moved: it may never have been sent."""
        unspoken = [
            lease for lease in pool.leases.values() if lease.unconfirmed and lease.live is None
        ]
        for lease in unspoken:
            if lease.session.shelf:
                lease.unconfirmed_since = now
                self._arm(now + ARRIVAL_S, self.arrival_due, lease)
            elif not lease.confirm_recall:
                self._ask_holder(lease, now)
        if pool.moving and any(lease.session.shelf for lease in unspoken):
            self.halt_moves(pool, now)  # what really lies there is told by that

    def may_have_moved(self, lease: Lease, session: Session, spared_until: float) -> bool:
        """Take in that a lease of a former broker's is not held by whom its journal names; say whether it may have
        moved on since: then somebody else will claim it.
        """
        if lease.moves < 0 or lease.cell >= 0 or self._former.has_all_of(session.pool):
            return False
        shelf = self._shelf(session.pool)
        shelf.spared_until = max(shelf.spared_until, spared_until)
        if lease.state is not SUSPECT:  # it was there when its holder said HELLO
            self._slots.move(lease, SUSPECT, "it may have moved on")
        self._slots.transfer(lease, shelf)
        return True

    # --- a former broker's lanes

    def restore(self, members: Iterable[Member]) -> None:
        """Take over who was let into a former broker's lanes."""
        self._former.restore(members, self._slots.find)

    def answered(self, session: Session, serial: int, now: float, *, unsure: bool) -> None:
        """Take in that a session has listed what it holds, knowing recall `serial`; `unsure`: there may be more."""
        if not session.pool.former:
            return
        if unsure:
            if 0 < session.pool.former.get(session.id, 0) <= serial:
                self._arm(now + ARRIVAL_S, self.former_due, session)
        else:
            self._former.answered(session, serial)

    def former_due(self, session: Session, now: float) -> None:
        """Ask once more a session that was not sure what it holds."""
        if not session.silent:
            self._former.registered(session, now)

    def former_gone(self, session_id: bytes) -> None:
        """Take in that a member's process is over, which has not been heard of since."""
        self._former.gone(session_id)

    def _end_wandering(self, pool: Pool, now: float) -> None:
        """End what no member of a former broker's lane has listed, now that nobody else can have it."""
        for lease in [] if pool.shelf is None else list(pool.shelf.leases.values()):
            if lease.state is SUSPECT and lease.cell < 0:
                self._leases.fence(lease, LOST_WITH_THE_BROKER, now)

    # --- moving

    def update_modes(self, now: float) -> bool:
        """Let connections move, or halt them, as things are now; return whether any were halted."""
        halted = False
        while self._former.complete_pools:
            self._end_wandering(self._former.complete_pools.pop(), now)
        for pool in self._slots.contended.values():
            if pool.lane is None:
                self._request_lane(pool, now)
        for pool in list(self._shelves.values()):
            if all(
                session.ended or session.shelf for session in pool.sessions.values()
            ) and self._is_over(pool, now):
                self._end_all(pool, now)
        for pool in list(self._pools.values()):
            lane = pool.lane
            assert lane is not None
            if lane.moving:
                if not self._may_move(pool):
                    self.halt_moves(pool, now)
                    halted = True
                    continue
                if pool.idle:
                    self._scheduler.recall_all_idle(pool, now)
                lane.board.generation = pool.generation
                self._join_queue(lane, pool)
                self._enter(lane, pool)
            elif (
                pool.name in self._slots.contended
                and self._may_move(pool)
                and self._is_exhausted(pool)
            ):
                self._start_moves(pool, now)
        return halted

    @staticmethod
    def _is_over(pool: Pool, now: float) -> bool:
        """Say whether nobody is to come any more who was in a former broker's lane."""
        return not pool.former or pool.shelf is None or now >= pool.shelf.spared_until

    def _end_all(self, pool: Pool, now: float) -> None:
        """End what lies on the shelf of a pool whose last worker has left."""
        if pool.moving:
            self.halt_moves(pool, now)
        assert pool.shelf is not None
        for lease in [x for x in pool.shelf.leases.values() if x.state is not FENCING]:
            lease.live = None
            pool.parked.pop(lease.token, None)
            self._leases.fence(lease, "nobody uses its pool any more", now, level=logging.DEBUG)

    @staticmethod
    def _is_exhausted(pool: Pool) -> bool:
        """Say whether nothing lies idle, everybody was asked for it, and nothing is on the shelf by the books which
        has not been found there since the last halt.
        """
        if pool.idle or pool.not_asked_to_return:
            return False
        return pool.shelf is None or not any(
            lease.state is OPEN for lease in pool.shelf.leases.values()
        )

    def _may_move(self, pool: Pool) -> bool:
        """Say whether there is nothing for the broker to do but to pass connections on."""
        scheduler, slots, lane = self._scheduler, self._slots, pool.lane
        if (
            lane is None
            or pool.cancel_works is not True
            or scheduler.holding_back
            or scheduler.draining
        ):
            return False
        if pool.paused or pool.name in slots.shrinking or slots.groups or pool.spec.max_waiting:
            return False
        if len(pool.leases) > lane.cells or (slots.max_conn is not None and len(slots.pools) > 1):
            return False
        if (
            pool.room > 0
            or pool.parked
            or pool.suspects
            or pool.backoff.ceiling is not None
            or pool.unsuitable
        ):
            return False
        return not any(session.leases for session in lane.outside.values())

    def _start_moves(self, pool: Pool, now: float) -> None:
        lane = pool.lane
        assert lane is not None
        lane.moving = True
        pool.shared_until = now  # what is asked for from now on is asked for by somebody who waits
        self._enter(lane, pool)
        self._emit(StartMoves(pool.name))
        lane.requests, lane.board.generation = lane.board.requests, pool.generation
        lane.board.take_place(BROKER_PLACE, BROKER_REQUEST)
        lane.queued = 0
        lane.board.moving = True
        self._join_queue(lane, pool)
        if not lane.armed:
            lane.armed = True
            self._arm(now + _QUIET_S, self.quiet_due, pool)

    def _join_queue(self, lane: Lane, pool: Pool) -> None:
        """Wait in the lane for all who wait at the broker: so they have their turn among the others.

        Those who do not want to wait are given what lies on the shelf.
        """
        missing = max(0, len(pool.waiters) - len(pool.nowaits) - lane.queued)
        # Who came to the broker has not looked at the shelf himself. It is looked at after the tickets are written: by
        # the books nothing lies there yet, perhaps.
        most_from_shelf = missing + min(len(pool.waiters), self.on_shelf(pool))
        if most_from_shelf:
            lane.queued += missing
            self._emit(JoinQueue(pool.name, missing, most_from_shelf))

    @staticmethod
    def on_shelf(pool: Pool) -> int:
        """How many connections lie on a pool's shelf, by the books: as good as idle.

        What was there by the books when the broker last found nothing is lost, or on its way.
        """
        if pool.shelf is None or pool.lane is None:
            return 0
        emptied = pool.lane.emptied_at
        return sum(
            x.state is OPEN and x.live is None and x.unconfirmed_since > emptied
            for x in pool.shelf.leases.values()
        )

    @staticmethod
    def shelf_empty(pool: Pool, now: float) -> None:
        """Take in that nothing was left on a pool's shelf."""
        if pool.lane is not None:
            pool.lane.emptied_at = now

    def _enter(self, lane: Lane, pool: Pool) -> None:
        """Put all leases on the board that may move."""
        if lane.used == len(pool.leases):
            return
        for lease in pool.leases.values():
            session = lease.session
            fit = (
                lease.state is OPEN
                and lease.custody
                and lease.backend is not None
                and not lease.cancels
            )
            fit = fit and min(lease.token) > 0  # a worker may have said it: anything
            if fit and lease.cell < 0 and session.joined and lease.live is None and lane.free:
                self._slots.enter_on_board(lease)

    def halt_moves(self, pool: Pool, now: float) -> None:
        """Pass connections on by the broker again."""
        lane = pool.lane
        assert lane is not None
        lane.moving = lane.board.moving = False
        lane.board.leave_place(BROKER_PLACE)
        self._emit(HaltMoves(pool.name))
        for lease in pool.leases.values():
            if lease.session.shelf and lease.live is None:
                lease.unconfirmed_since = now
                self._arm(now + ARRIVAL_S, self.arrival_due, lease)

    def quiet_due(self, pool: Pool, now: float) -> None:
        """Halt where nobody has asked for a while."""
        if (lane := pool.lane) is None:
            return  # nobody uses the pool any more
        lane.armed = False
        if not lane.moving:
            return
        asked, lane.requests = lane.requests, lane.board.requests
        if asked == lane.requests and not pool.waiters:
            self.halt_moves(pool, now)
            return
        lane.queued = 0  # who was to serve a ticket may have died with it
        lain = [
            x
            for x in pool.leases.values()
            if x.session.shelf and now - x.unconfirmed_since > 2 * _QUIET_S
        ]
        if lain:  # others have asked meanwhile, and were not given it
            self.halt_moves(pool, now)
        lane.armed = True
        self._arm(now + _QUIET_S, self.quiet_due, pool)

    # --- the broker gives, and is given

    def give(self, lease: Lease, live: Live, now: float) -> None:
        """Give in the lane what was given to the broker, for which nobody waits at the broker."""
        lane = lease.pool.lane
        assert lane is not None
        self._slots.transfer(lease, self._shelf(lease.pool))
        lease.unconfirmed, lease.unconfirmed_since = True, now
        if lease.cell < 0:
            self._slots.enter_on_board(lease)
        self._emit(GiveInLane(lease.pool.name, lease.token, lease.cell, live))

    def received(self, pool: Pool) -> None:
        """Take in that the broker was given something in the lane."""
        if pool.lane is not None and pool.lane.queued:
            pool.lane.queued -= 1

    def found_on_shelf(self, pool: Pool, moved: Moved) -> Lease | None:
        """Take in what lay on a shelf; return its lease if it is to be passed on."""
        lease = pool.leases.get(moved.token)
        if (
            lease is None
            or lease.state is not OPEN
            or not lease.session.shelf
            or lease.live is not None
        ):
            return None
        lease.unconfirmed = False
        return lease


def _no_longer_awaited(pool: Pool, now: float) -> None:
    """Do nothing: the alarm has the scheduler look again, as nobody waits for the lane any longer."""
