"""Leases that move from worker to worker without the broker: who has each one? Pure.

The giver writes the receiver's number on the pool's board before it sends the socket. `sync` copies
the board into the records. From then on the lease is *unconfirmed*, until its new holder lists it:

1. The holder lists it in a heartbeat: it has arrived.
2. The holder, asked by a recall, does not list it: it is asked once more after `ARRIVAL_S`. If it
   still does not list it, the lease was lost on its way (its giver or receiver has died, or was
   stopped), and is fenced. A holder that is not sure, because a thread of its may have the
   connection in its hands, is asked again as often as it takes.
3. The holder is the shelf: when moves are halted the broker reads the shelf, and a lease that is
   not there `ARRIVAL_S` later is fenced.
4. The holder has ended: the giver may be about to find that out and give again, so the lease is
   fenced only if the board still says so after `ARRIVAL_S`.

The second half answers questions about a former broker's lanes, whose moves its journal does not
tell (`former_lanes.py`).
"""

from __future__ import annotations

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.former_lanes import FormerLanes
from sharedpool.broker.core.lane_members import ARRIVAL_S, LaneMembers
from sharedpool.broker.core.leases import Leases
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import Lane, Lease, Pool, Session
from sharedpool.broker.core.shelves import Shelves
from sharedpool.broker.core.slot_states import FENCING, FREE, OPEN, SUSPECT
from sharedpool.wire.board import MOVES, SHELF
from sharedpool.wire.messages import Release
from sharedpool.wire.values import LeaseReport, Phase, Token


class InTransit:
    """The leases that have moved, and are to be confirmed by their new holders."""

    def __init__(
        self,
        context: Context,
        recalls: Recalls,
        leases: Leases,
        members: LaneMembers,
        shelves: Shelves,
        former: FormerLanes,
    ) -> None:
        self._slots = context.slots
        self._arm = context.timers.arm
        self._recalls = recalls
        self._leases = leases
        self._members = members
        self._shelves = shelves
        self._former = former

    # --- the board

    def sync(self, now: float) -> None:
        """Copy the boards into the records. Costs one comparison where nothing has moved."""
        for pool in self._members.pools.values():
            lane = pool.lane
            assert lane is not None
            if lane.used and (seen := lane.board.snapshot(lane.cells)) != lane.last_snapshot:
                lane.last_snapshot = seen
                for lease in list(pool.leases.values()):
                    if lease.cell >= 0:
                        self._follow(lane, lease, now)

    def _follow(self, lane: Lane, lease: Lease, now: float) -> None:
        """Bring one lease in line with its cell of the board."""
        holder, moves = lane.board.holding(lease.cell)
        if moves == lease.moves:
            return
        lease.pool.counters.handovers += (moves - lease.moves) % MOVES
        lease.moves = moves
        session = self._shelves.of(lease.pool) if holder == SHELF else lane.members.get(holder)
        if session is None:  # it has ended, or the board holds an invalid number
            session = self._shelves.of(lease.pool)
            self._arm(now + ARRIVAL_S, self.receiver_due, lease)
        self._slots.transfer(lease, session)
        lease.unconfirmed, lease.unconfirmed_since, lease.confirm_recall = True, now, 0
        # Whatever the lease's state was: its giver was alive, and its receiver may be stopped.
        state = SUSPECT if session.suspect else OPEN
        if lease.state is not state:
            self._slots.move(lease, state, "moved")
        if state is OPEN:
            self._leases.record_phase(lease, Phase.IDLE if session.shelf else Phase.IN_USE, now, "")
        if session.shelf:
            lease.pool.idle.pop(lease.token, None)
            if not lane.moving:  # its giver may have been stopped before the socket was there
                self._arm(now + ARRIVAL_S, self.arrival_due, lease)

    # --- confirmation by the new holder

    def ask_holder(self, lease: Lease, now: float) -> None:
        """Ask a lease's holder whether it has the connection."""
        if not lease.session.silent:
            self._recalls.send(lease.session, now)
            lease.confirm_recall = lease.session.asked

    def session_registered(self, session: Session, now: float) -> None:
        """Ask a new session for the leases that are on their way to it."""
        for lease in session.leases.values():
            if lease.unconfirmed and lease.state is not FENCING:
                self.ask_holder(lease, now)

    def ask_for_unconfirmed(self, pool: Pool, now: float) -> bool:
        """Ask for all leases of a pool that have moved and are unconfirmed; a holder has ended.

        Return True if one of them is on the shelf by the records: only a halt tells what is there.
        """
        unconfirmed = [x for x in pool.leases.values() if x.unconfirmed and x.live is None]
        for lease in unconfirmed:
            if lease.session.shelf:
                self.await_arrival(lease, now)
            elif not lease.confirm_recall:
                self.ask_holder(lease, now)
        return any(lease.session.shelf for lease in unconfirmed)

    def await_arrival(self, lease: Lease, now: float) -> None:
        """Give a lease on the shelf `ARRIVAL_S` to be found there."""
        lease.unconfirmed_since = now
        self._arm(now + ARRIVAL_S, self.arrival_due, lease)

    def not_listed(self, lease: Lease, known_recall: int, now: float, *, unsure: bool) -> None:
        """Handle a heartbeat in which a lease's new holder, at recall `known_recall`, lacks it.

        `unsure`: one of the holder's threads may have the connection in its hands. Each of many
        threads may be held up for long.
        """
        if known_recall < lease.confirm_recall <= lease.session.answered:
            lease.confirm_recall = 0  # the answer was lost, and is not expected any more
        if 0 < lease.confirm_recall <= known_recall:
            if now - lease.unconfirmed_since >= ARRIVAL_S and not unsure:
                self._leases.fence(lease, "it was passed on and has not arrived", now)
                return
            # Only the alarm asks again: otherwise two such leases kept the session answering.
            lease.confirm_recall = -1
            since = max(lease.unconfirmed_since, now if unsure else 0.0)
            self._arm(since + ARRIVAL_S, self.arrival_due, lease)
        elif not lease.confirm_recall:
            self.ask_holder(lease, now)

    def arrival_due(self, lease: Lease, now: float) -> None:
        """Ask once more for a lease that has not arrived; fence one that is not on its shelf."""
        if not lease.unconfirmed or lease.state in (FENCING, FREE):
            return
        if lease.session.shelf:
            waited = now - lease.unconfirmed_since >= ARRIVAL_S
            if waited and lease.live is None and not lease.pool.moving:
                self._leases.fence(lease, "it is not on its pool's shelf", now)
        elif lease.confirm_recall <= 0:
            lease.confirm_recall = 0
            self.ask_holder(lease, now)

    def receiver_due(self, lease: Lease, now: float) -> None:
        """Fence a lease whose receiver has ended, unless it has been passed to another since."""
        lane = lease.pool.lane
        if lane is None or lease.cell < 0:
            return
        holder = lane.board.holding(lease.cell).holder
        if holder != SHELF and holder not in lane.members:
            self._leases.fence(lease, "it was passed on to a worker that is gone", now)

    # --- a session's word against the records

    def claims(self, session: Session, report: LeaseReport) -> Lease | None:
        """Return the lease that a session rightly claims although the records name another holder.

        Only a lease of a former broker's lane can be claimed. Its number of moves tells who had it
        last: the higher one is newer, modulo `MOVES` (the number begins again after weeks). If
        nobody has it by the records, the number there is its last known holder's: it had not listed
        the connection, which was on its way, and does now.
        """
        lease = self._slots.leases.get(report.token)
        if lease is None or lease.pool is not session.pool or lease.state is FENCING:
            return None
        if lease.cell >= 0:
            return None
        least = 0 if lease.session.shelf else 1
        newer = least <= (report.moves - lease.moves) % MOVES < MOVES // 2
        if lease.moves < 0 or not newer or report.backend != lease.backend:
            return None
        self._slots.transfer(lease, session)
        lease.moves = report.moves
        return lease

    def has_moved_on(self, token: Token) -> bool:
        """Return True if a lease that a session lists is another's by now: the heartbeat is old."""
        lease = self._slots.leases.get(token)
        return lease is not None and lease.moves >= 0 and lease.state is not FENCING

    def closed_in_transit(self, session: Session, release: Release) -> Lease | None:
        """Return the lease that a session has closed although nobody has it by the records.

        The session had the connection when it closed it, so nobody else can have it by now.
        """
        lease = self._slots.leases.get(release.token)
        if lease is None or lease.pool is not session.pool or lease.live is not None:
            return None
        # A restored session had it by a former broker's journal; it may have moved since.
        if not (lease.session.shelf or lease.session.restored):
            return None
        return lease if lease.backend is not None and lease.backend == release.backend else None

    def may_have_moved(self, lease: Lease, session: Session, spared_until: float) -> bool:
        """Handle a restored lease that its holder by the journal does not have.

        Return True if it may have moved since: then it is on the shelf until its holder claims it.
        """
        if lease.moves < 0 or lease.cell >= 0 or self._former.has_all_of(session.pool):
            return False
        shelf = self._shelves.of(session.pool)
        shelf.spared_until = max(shelf.spared_until, spared_until)
        if lease.state is not SUSPECT:  # it was listed when its holder said HELLO
            self._slots.move(lease, SUSPECT, "it may have moved on")
        self._slots.transfer(lease, shelf)
        return True
