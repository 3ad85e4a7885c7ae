"""Find out who has the leases that a former broker's lanes have moved. Pure: no I/O, no clock.

A lane goes on without its broker. So a lease that the journal knows to be one worker's may be
another's by now, or be on its way. It becomes certain in three steps:

1. The journal names all members of the former lanes (`restore`).
2. A member registers at this broker. With WELCOME it leaves the former lane, and keeps what it
   finds there. It is asked for its leases after that, so its answer lists all that it has.
3. Each member has answered or died: a lease that none of them has listed is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sharedpool.broker.core.commands import Admit, Dismiss, Member, Watch
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import Pool, Session
from sharedpool.wire.values import PoolSpec

_ASK_AGAIN_S = 0.25  # a session that was not sure what it holds


class FormerLanes:
    """The members of former brokers' lanes.

    `Pool.former` has them by session, with the serial of the recall that each is to answer (0:
    none yet). `ask(session, now)` asks a session for what it holds.
    """

    def __init__(
        self,
        context: Context,
        ask: Callable[[Session, float], None],
        *,
        journal_complete: bool,
    ) -> None:
        """`journal_complete`: the journal names all members."""
        self._slots = context.slots
        self._emit = context.emit
        self._arm = context.timers.arm
        self._ask = ask
        self._journal_complete = journal_complete
        self._pools: dict[bytes, Pool] = {}  # by session
        self.complete_pools: list[Pool] = []  # whose last member has answered just now

    def restore(self, members: Iterable[Member], find: Callable[[PoolSpec], Pool | None]) -> None:
        """Restore the members; a pool without a lease can have none under way."""
        for member in members:
            pool = find(member.pool)
            if pool is None:
                self._emit(Dismiss(member.session))
                continue
            pool.former[member.session] = 0
            self._pools[member.session] = pool
            if member.session not in self._slots.sessions:
                self._emit(Watch(member.session, member.process))

    def has_all_of(self, pool: Pool) -> bool:
        """Return True if every session has listed all leases of this pool that it may have."""
        return self._journal_complete and not pool.former

    def registered(self, session: Session, now: float) -> None:
        """Ask a member for its leases: it leaves the former lane before the question comes."""
        if session.id in session.pool.former:
            self._ask(session, now)
            session.pool.former[session.id] = session.asked

    def session_answered(self, session: Session, serial: int, now: float, *, unsure: bool) -> None:
        """Handle a session's list of leases, which answers recall `serial`.

        `unsure`: the session may have more.
        """
        asked = session.pool.former.get(session.id, 0)
        if not 0 < asked <= serial:
            return
        if unsure:
            self._arm(now + _ASK_AGAIN_S, self._ask_again, session)
        else:
            self.ended(session.id, stays=session.member_number > 0)

    def _ask_again(self, session: Session, now: float) -> None:
        if not session.silent:
            self.registered(session, now)

    def ended(self, session_id: bytes, *, stays: bool = False) -> None:
        """Record that a session has nothing of a former lane any more.

        `stays`: it is a member of a lane of this broker, so that the journal still names it.
        """
        if (pool := self._pools.pop(session_id, None)) is None:
            return
        del pool.former[session_id]
        if not stays:
            self._emit(Dismiss(session_id))
        if self.has_all_of(pool):
            self.complete_pools.append(pool)

    def discarded(self, pool: Pool) -> None:
        """Forget a pool that no worker uses any more."""
        for session_id in list(pool.former):
            self.ended(session_id)

    def admit(self, session: Session) -> None:
        """Have the journal remember that a session is let into its pool's lane."""
        self._emit(Admit(Member(session.id, session.process, session.pool.spec)))
