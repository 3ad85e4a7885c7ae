"""Returns: ask holders to give back their next checkins instead of caching them.

`Session.returns_due` is how many. Leases that are in use cannot be taken, so this is how they come
to waiters: a worker told of returns sends each such lease back at its checkin.
"""

from __future__ import annotations

from sharedpool.broker.core.context import Context
from sharedpool.broker.core.demand import excess, first_patient, returns_wanted, slots_wanted
from sharedpool.broker.core.fences import Fences
from sharedpool.broker.core.handover import Handover
from sharedpool.broker.core.recalls import Recalls
from sharedpool.broker.core.records import Pool, Session


class Returns:
    """What holders are asked to give back, for waiters or by an operator's order."""

    def __init__(
        self, context: Context, recalls: Recalls, fences: Fences, handover: Handover
    ) -> None:
        self._slots = context.slots
        self._recalls = recalls
        self._fences = fences
        self._handover = handover

    # --- for waiters

    def request(self, pool: Pool, now: float) -> None:
        """Ask the holders of a pool that were not asked before for the checkins that are wanted.

        Where connections move past the broker, it waits in the lane for its own waiters instead.
        """
        if pool.moving or not slots_wanted(self._slots, pool):
            return
        for session in list(pool.not_asked_to_return.values()):
            returns_due = min(len(session.leases), returns_wanted(self._slots, pool, session))
            if returns_due:
                self._slots.mark_returns_due(session, returns_due)
                self._recalls.send(session, now)

    def ask_what_is_idle(self, pool: Pool, newest: int, now: float) -> None:
        """Ask the holders of a more important pool what is idle, once for each new waiter.

        `newest` is the newest waiter's number. Afterwards heartbeats tell of it.
        """
        for session in pool.holders:
            if session.inquired < newest:
                session.inquired = newest
                self._recalls.send(session, now)

    def cancel(self, now: float) -> None:
        """Tell holders that nothing is due: nobody waits, or their own waiter is the first.

        A pool that is shared goes on: what comes back unasked for is parked, ready for the next
        request.
        """
        for pool in self._slots.pools.values():
            if not pool.asked_to_return or now < pool.shared_until:
                continue
            for session in self._no_longer_asked(pool):
                before = session.returns_due
                still_due = min(before, excess(self._slots, pool))
                self._slots.mark_returns_due(session, still_due)
                if session.returns_due != before:
                    self._recalls.announce_returns(session)

    def _no_longer_asked(self, pool: Pool) -> list[Session]:
        if not slots_wanted(self._slots, pool):
            return list(pool.asked_to_return.values())
        first = first_patient(self._slots, pool)
        if first is not None and first.session.id in pool.asked_to_return:
            return [first.session]
        return []

    # --- by an operator's order

    def shrink(self, now: float) -> None:
        """Take back what an operator's order left in excess: of paused pools, of lowered limits."""
        slots = self._slots
        for pool in list(slots.shrinking.values()):
            if (too_many := excess(slots, pool)) > 0:
                too_many -= self._handover.end_parked([pool], too_many, now)
                too_many -= self._recalls.take_idle([pool], too_many, now)
                too_many -= self._fences.fence_suspects([pool], too_many, now)
                for session in pool.holders:
                    self._raise_due(
                        session, min(len(session.leases) - session.taking, too_many), now
                    )
            del slots.shrinking[pool.name]
            slots.shrink(pool)  # entered again until all of it has come back

    def drain(self, now: float) -> None:
        """Ask for everything: idle leases at once, all others at their checkins."""
        for pool in self._slots.pools.values():
            self._handover.end_parked([pool], len(pool.parked), now)
            self._recalls.take_idle([pool], len(pool.idle), now)
            for session in pool.holders:
                self._raise_due(session, len(session.leases), now)

    def _raise_due(self, session: Session, returns_due: int, now: float) -> None:
        if session.returns_due < returns_due:
            self._slots.mark_returns_due(session, returns_due)
            self._recalls.send(session, now)
