"""Open the pools' lanes, and let workers in. Pure: no I/O, no clock.

1. A thread waits in a pool whose connections can be passed on: the broker makes a lane
   (`OpenLane`).
2. The lane is open: each session that can hand connections over gets a number and an index there,
   and an invitation with the lane's descriptors (`InviteToLane`).
3. The session answers that it takes part. From then on connections can be sent to its threads.

Each step may take a moment, in which a waiting thread is not beyond reach: `may_reach`. One that
has not arrived after `JOIN_S` is served in the old way, by closing and opening.
"""

from __future__ import annotations

import math
from collections import deque

from sharedpool.broker.core.commands import CloseLane, Dismiss, InviteToLane, OpenLane
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.former_lanes import FormerLanes
from sharedpool.broker.core.records import Lane, Pool, Session, Waiter
from sharedpool.wire.board import CELLS, PLACES, SESSIONS, Board

# How long a receiver may take to confirm a connection.
ARRIVAL_S = 0.25
# How long a session may take to enter a lane. Only its own threads wait for that, and on a busy
# machine a new process needs more than a moment.
JOIN_S = 1.0
_FEWEST_CELLS = 64


class LaneMembers:
    """The lanes of all pools, and the sessions in them."""

    def __init__(self, context: Context, former: FormerLanes) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._former = former
        self.pools: dict[str, Pool] = {}  # the pools that have a lane, by name
        self._requested: dict[str, int] = {}  # serial of the OpenLane under way, by pool
        self._newest_request = 0

    def request_lane(self, pool: Pool, now: float) -> None:
        """Have a lane made for a pool with waiters, if connections can be passed on there.

        No earlier than that: a worker keeps the descriptors of a lane for as long as it lives.
        """
        if pool.hands_over and pool.movable and pool.name not in self._requested:
            self._newest_request += 1
            self._requested[pool.name] = self._newest_request
            pool.opens_by = now + JOIN_S
            self._arm(pool.opens_by, _no_longer_awaited, pool)
            self._emit(OpenLane(pool.name, self._newest_request))

    def opened(self, pool_name: str, serial: int, board: Board, now: float) -> None:
        """Use a pool's new lane, and let its workers in.

        A lane that was made for a former pool of this name is closed, unless it was replaced.
        """
        if self._requested.get(pool_name) != serial:
            if pool_name not in self._requested and pool_name not in self.pools:
                self._emit(CloseLane(pool_name))
            return
        del self._requested[pool_name]
        pool = self._slots.pools[pool_name]
        cells = min(CELLS, max(_FEWEST_CELLS, 2 * pool.max_conn))
        pool.lane = Lane(board, deque(range(cells)), cells)
        self.pools[pool.name] = pool
        for session in list(pool.sessions.values()):
            self.let_in(session, now)

    def let_in(self, session: Session, now: float) -> None:
        """Invite a session into its pool's lane, if there is one and the session can use it."""
        session.pool.hands_over |= session.hands_over
        lane = session.pool.lane
        if lane is None or session.shelf or session.ended or session.member_number:
            return
        lane.outside[session.id] = session
        if not session.hands_over or len(lane.indices) == SESSIONS - 1:
            return
        lane.newest += 1
        session.member_number = lane.newest
        session.index = next(index for index in range(SESSIONS) if index not in lane.indices)
        lane.indices.add(session.index)
        lane.board.clear_session(session.index)
        lane.members[session.member_number] = session
        session.joins_by = now + JOIN_S
        self._arm(session.joins_by, _no_longer_awaited, session.pool)
        self._former.admit(session)
        self._emit(
            InviteToLane(session.pool.name, session.id, session.member_number, session.index)
        )

    @staticmethod
    def joined(session: Session, *, takes_part: bool) -> None:
        """Handle a session's answer to its invitation. If it declines, nothing is kept for it."""
        if not takes_part:
            session.joins_by = -math.inf
        elif session.member_number and session.pool.lane is not None:
            session.joined = True
            session.pool.lane.outside.pop(session.id, None)

    def session_ended(self, session: Session) -> None:
        """Take an ended session out of its lane, with the places where its threads waited."""
        lane = session.pool.lane
        if lane is None or session.shelf:
            return
        lane.outside.pop(session.id, None)
        if session.member_number:
            lane.board.clear_session(session.index)
            lane.indices.discard(session.index)
            del lane.members[session.member_number]
            if session.ended:  # else it may go on, and receive in this lane after our end
                self._emit(Dismiss(session.id))
            session.member_number, session.index = 0, -1
            session.joined, session.joins_by = False, -math.inf

    def pool_discarded(self, pool: Pool) -> None:
        """Close the lane of a pool that no worker uses any more."""
        self._requested.pop(pool.name, None)
        if self.pools.pop(pool.name, None) is not None:
            pool.lane = None
            self._emit(CloseLane(pool.name))


def reaches(waiter: Waiter) -> bool:
    """Return True if a connection can be sent to a waiter."""
    session = waiter.session
    return (
        waiter.lane_place >= 0 and session.joined and waiter.lane_place // PLACES == session.index
    )


def may_reach(waiter: Waiter, pool: Pool, now: float) -> bool:
    """Return True if `reaches` may change in a moment: the waiter's session is being let in."""
    session = waiter.session
    if session.pool is not pool or waiter.lane_place >= 0 or not session.hands_over:
        return False
    return now < (pool.opens_by if pool.lane is None else session.joins_by)


def _no_longer_awaited(pool: Pool, now: float) -> None:
    """Do nothing: after an alarm the scheduler runs, and the lane is not waited for any more."""
