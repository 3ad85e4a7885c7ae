"""Who may still have what a former broker's lane has moved. Pure: no I/O, no clock.

A lane goes on without its broker. So a lease that its journal knows to be a worker's may be another's by now, or be on
its way, until all who were in that lane have left it: each leaves when it is WELCOME at the next broker, and takes in
what it finds there. What it lists when it is asked after that is all that it has. Once each member of that lane has
answered, or has died, what none of them has listed is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sharedpool.broker.core.commands import Admit, Dismiss, Member, Watch
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import Pool, Session
from sharedpool.wire.messages import PoolSpec


class FormerLanes:
    """The members of former brokers' lanes: by pool, in `Pool.former`, with the recall that each is to answer.

    `complete`: all of them are known. `ask(session, now)` asks a session for what it holds. `complete_pools` are pools
    of which the last member has just answered.
    """

    def __init__(
        self,
        context: Context,
        ask: Callable[[Session, float], None],
        *,
        complete: bool,
    ) -> None:
        self._slots = context.slots
        self._emit = context.emit
        self._ask = ask
        self.complete = complete
        self._pools: dict[bytes, Pool] = {}  # by session
        self.complete_pools: list[Pool] = []

    def restore(self, members: Iterable[Member], find: Callable[[PoolSpec], Pool | None]) -> None:
        """Take over who was let into a former broker's lanes. Where no lease is left, none can be underway."""
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
        """Say whether nobody can have a lease of this pool's that he has not listed."""
        return self.complete and not pool.former

    def registered(self, session: Session, now: float) -> None:
        """Ask a member who has left the former lane, or will have when the question comes."""
        if session.id in session.pool.former:
            self._ask(session, now)
            session.pool.former[session.id] = session.asked

    def answered(self, session: Session, serial: int) -> None:
        """Take in that a session has told all that it holds, knowing recall `serial`."""
        if 0 < session.pool.former.get(session.id, 0) <= serial:
            self.gone(session.id, stays=session.number > 0)

    def gone(self, session_id: bytes, *, stays: bool = False) -> None:
        """Take in that a session has nothing of a former lane any more. `stays`: it is in one of this broker's."""
        if (pool := self._pools.pop(session_id, None)) is None:
            return
        del pool.former[session_id]
        if not stays:
            self._emit(Dismiss(session_id))
        if self.has_all_of(pool):
            self.complete_pools.append(pool)

    def discarded(self, pool: Pool) -> None:
        """Take in that nobody uses a pool any more."""
        for session_id in list(pool.former):
            self.gone(session_id)

    def admit(self, session: Session) -> None:
        """Have a later broker know that a session is let into its pool's lane."""
        self._emit(Admit(Member(session.id, session.process, session.pool.spec)))
