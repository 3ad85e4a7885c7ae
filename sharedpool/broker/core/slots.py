"""The broker's records, and the functions that change the states of slots and sessions.

Every index over leases, sessions and waiters is kept here. The rest of the core reads them freely,
and changes them by these methods alone.
"""

from __future__ import annotations

from collections.abc import Callable

from sharedpool.broker.core.commands import Command, Entry, Erase, Record
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.groups import Groups
from sharedpool.broker.core.records import UNSHARED, GrantStop, Lease, Pool, Session, Waiter
from sharedpool.broker.core.session_states import LIVE, SESSION_TRANSITIONS, SessionState
from sharedpool.broker.core.slot_states import (
    CLOSING,
    FENCING,
    FREE,
    GRANTED,
    OPEN,
    SUSPECT,
    TRANSITIONS,
    SlotState,
)
from sharedpool.wire.board import SHELF
from sharedpool.wire.values import Backend, Phase, PoolSpec, Token

_MOST_FORMER = 100  # unused pools whose counters are kept


class Slots:
    """All records of one broker; `emit` gets the commands that make them outlive it."""

    def __init__(
        self, max_conn: int | None, emit: Callable[[Command], None], epoch: int = 1
    ) -> None:
        self.max_conn = max_conn  # the cap over all pools
        self.allowed = UNSHARED  # how many of the cap's slots are this host's (`sharing.py`)
        self._emit = emit
        self._epoch = epoch
        self._newest_lease = 0
        self.leases: dict[Token, Lease] = {}
        self.sessions: dict[bytes, Session] = {}
        self.pools: dict[str, Pool] = {}
        self.former_pools: dict[str, Pool] = {}  # used no longer, kept for their counters
        self.contended: dict[str, Pool] = {}  # pools with waiters
        # Pools of which an operator wants connections back, whether or not anybody waits.
        self.shrinking: dict[str, Pool] = {}
        self.emptied: list[Pool] = []  # pools whose last lease has ended, for `sharing.py`
        # Operators' orders, also for pools that nobody uses at present; "" stands for all pools.
        self.paused_pools: set[str] = set()
        self.limits: dict[str, int] = {}
        self.groups = Groups()
        self.grant_stop = GrantStop()
        # Leases of a backend that have no known worker, and those held when a former broker ended.
        self.orphans: dict[Backend, Lease] = {}
        self.restored: dict[Backend, Lease] = {}

    def new_token(self) -> Token:
        """Return a name for a new lease; no lease of any broker has ever had it."""
        self._newest_lease += 1
        return Token(self._epoch, self._newest_lease)

    def is_over(self, record: object) -> bool:
        """Return True for a request, lease, session or pool that is not in the records any more."""
        match record:
            case Waiter():
                return record.session.waiters.get(record.request) is not record
            case Lease():
                return record.state is FREE
            case Session():
                return self.sessions.get(record.id) is not record
            case Pool():
                return self.pools.get(record.name) is not record
        return False

    # --- how many slots

    @property
    def cap(self) -> int | None:
        """This host's part of the cap over all pools; None: there is no cap."""
        return None if self.max_conn is None else min(self.max_conn, self.allowed)

    @property
    def room(self) -> int:
        """Free slots under the cap over all pools; practically endless without one."""
        return (UNSHARED if self.max_conn is None else self.cap or 0) - len(self.leases)

    @property
    def overdrawn(self) -> int:
        """Slots in use that the cap, or what is reserved of it, does not allow: it was lowered."""
        if (cap := self.cap) is None:
            return 0
        if self.groups:
            return max(0, self.groups.beyond + self.groups.reserved - cap)
        return max(0, -self.room)

    def available(self, pool: Pool) -> int:
        """Free slots under the cap that this pool may have: not those reserved for other groups."""
        if pool.group is None or (cap := self.cap) is None:
            return self.room
        return min(self.room, self.groups.available(pool.group, cap))

    def serves(self, pool: Pool, other: Pool) -> bool:
        """Return True if a slot freed by `pool` could serve a waiter of `other`.

        That is, `other` is blocked by the cap over all pools or by its group's limit, and not by
        its own limit. A slot of a reservation is kept for its group.
        """
        if pool is other or other.paused or other.own_room <= 0:
            return False
        if pool.group is not None and pool.group is other.group:
            return other.group.room <= 0 or self.available(other) <= 0
        if pool.unnamed and other.group is not None and other.group.room <= 0:
            return True  # it counts in every group
        if self.max_conn is None or other.room <= 0 or self.available(other) > 0:
            return False
        return self.is_beyond_reservation(pool)

    @staticmethod
    def is_beyond_reservation(pool: Pool) -> bool:
        """Return True if other groups may want a slot of this pool back."""
        return pool.group is None or pool.group.beyond > 0

    def limit(self, pool_name: str, spec: PoolSpec) -> int:
        """Return a pool's own limit: an operator's, or its users', but at most the cap."""
        limit = self.limits.get(pool_name, spec.max_conn)
        return limit if self.max_conn is None else min(self.max_conn, limit)

    # --- pools and groups

    def find(self, spec: PoolSpec) -> Pool | None:
        """Return the pool that a session means, if there is one."""
        pool = self.pools.get(spec.name)
        if pool is not None and pool.spec.is_pool_of(spec):
            return pool
        return next((pool for pool in self.pools.values() if pool.spec.is_pool_of(spec)), None)

    def discard(self, pool: Pool) -> None:
        """Forget a pool that nobody uses, except for its counters."""
        del self.pools[pool.name]
        self.shrinking.pop(pool.name, None)
        self._leave_group(pool)
        self.former_pools[pool.name] = pool
        if len(self.former_pools) > _MOST_FORMER:
            del self.former_pools[next(iter(self.former_pools))]

    def configure(self, terms: dict[str, GroupTerms]) -> None:
        """Replace the groups' terms. What a group has in excess comes back."""
        self.groups.configure(terms)
        for pool in self.pools.values():
            self.assign(pool)
        for pool in self.pools.values():  # not before all pools count for their groups
            self.shrink(pool)

    def assign(self, pool: Pool) -> None:
        """Put a pool into its group."""
        self._leave_group(pool)
        pool.group = self.groups.of(pool.spec.group)
        if pool.group is not None:
            pool.group.pools.append(pool)
        if pool.unnamed:
            self.groups.unknown.append(pool)

    def _leave_group(self, pool: Pool) -> None:
        if pool.group is not None:
            pool.group.pools.remove(pool)
            pool.group = None
        if pool in self.groups.unknown:
            self.groups.unknown.remove(pool)

    def shrink(self, pool: Pool) -> None:
        """Pause or resume a pool as operators have ordered; mark it if slots are to come back."""
        pool.paused = not self.paused_pools.isdisjoint(("", pool.name))
        if (
            pool.paused
            or len(pool.leases) > pool.target
            or (pool.group is not None and pool.group.room < 0)
            or (self.overdrawn > 0 and self.is_beyond_reservation(pool))
            or any(session.draining for session in pool.sessions.values())
        ):
            self.shrinking[pool.name] = pool

    # --- a slot's state

    def move(self, lease: Lease, new: SlotState, reason: str) -> None:
        """Change a slot's state, and bring every index in line. Nothing else changes it.

        Raise `AssertionError` for a transition that is not in `TRANSITIONS`.
        """
        old = lease.state
        if new not in TRANSITIONS[old]:
            raise AssertionError(f"bug: lease {lease.token}: {old.value} -> {new.value} ({reason})")
        lease.state = new
        if old is FREE:
            self._occupy(lease)
        else:
            self._leave(lease, old)
        self._enter(lease, new)

    def _occupy(self, lease: Lease) -> None:
        """Count a slot as occupied, in memory and in the journal."""
        session, pool, token = lease.session, lease.pool, lease.token
        self.leases[token] = pool.leases[token] = session.leases[token] = lease
        self.mark_returns_due(session, session.returns_due)
        self._record(lease)

    def _leave(self, lease: Lease, old: SlotState) -> None:
        """Take a lease out of the indexes of its old state."""
        if old is OPEN:
            self.mark_phase(lease, Phase.CONNECTING, None)
            self.unpark(lease)
        elif old is SUSPECT:
            del lease.pool.suspects[lease.token]
        else:
            lease.pool.incoming.pop(lease.token, None)

    def _enter(self, lease: Lease, new: SlotState) -> None:
        """Put a lease into the indexes of its new state."""
        session, pool, token = lease.session, lease.pool, lease.token
        if lease.cell >= 0 and new in (FENCING, FREE):
            self._remove_from_board(lease)
        if new is GRANTED:
            session.granted[lease.request] = lease
        elif new is not SUSPECT and session.granted.get(lease.request) is lease:
            del session.granted[lease.request]  # the grant of a suspect lease may still arrive
        if new is CLOSING:
            pool.incoming[token] = lease
        elif new is SUSPECT:
            pool.suspects[token] = lease
            pool.backoff.ended(token)  # if it is the probe, its outcome may never be told
        elif new is FREE:
            self._vacate(lease)

    def _vacate(self, lease: Lease) -> None:
        """Count a slot as free, in memory and in the journal."""
        session, pool, token = lease.session, lease.pool, lease.token
        del self.leases[token], pool.leases[token], session.leases[token]
        session.draining.discard(token)
        if not pool.leases:
            self.emptied.append(pool)
        for index in (self.orphans, self.restored):
            if index and lease.backend is not None and index.get(lease.backend) is lease:
                del index[lease.backend]
        self.mark_returns_due(session, session.returns_due)
        pool.backoff.ended(token)
        self._emit(Erase(token))

    def _record(self, lease: Lease) -> None:
        session, pool = lease.session, lease.pool
        entry = Entry(
            lease.token,
            session.id,
            session.process,
            session.pid,
            session.host,
            session.title,
            pool.spec,
            pool.max_conn,
            session.expiration_s,
            lease.backend,
            lease.moves,
        )
        self._emit(Record(entry))

    # --- a lease's backend, phase and place

    def identify(self, lease: Lease, backend: Backend) -> None:
        """Record which backend a lease's connection has."""
        known = lease.backend
        if known is None or backend != known or backend.direct is not known.direct:
            lease.backend = backend
            self._record(lease)

    def mark_phase(self, lease: Lease, phase: Phase, since: float | None) -> None:
        """Record whether an OPEN lease is idle or in use, and since when."""
        lease.idle_since = since if phase is Phase.IDLE else None
        lease.used_since = since if phase is Phase.IN_USE else None
        if phase is Phase.IDLE:
            lease.pool.idle.setdefault(lease.token, lease)
        else:
            lease.pool.idle.pop(lease.token, None)

    @staticmethod
    def unpark(lease: Lease) -> None:
        """Record that a lease is parked at the broker no longer."""
        lease.live = None
        lease.pool.parked.pop(lease.token, None)

    def transfer(self, lease: Lease, session: Session) -> None:
        """Record that another session of the pool holds a lease."""
        former, token = lease.session, lease.token
        if former is session:
            return
        del former.leases[token]
        former.draining.discard(token)
        if former.granted.get(lease.request) is lease:
            del former.granted[lease.request]
        lease.session, lease.request = session, 0
        session.leases[token] = lease
        self.mark_returns_due(former, former.returns_due)
        self.mark_returns_due(session, session.returns_due)
        lease.pool.idle.pop(token, None)
        if not session.shelf:  # a later broker can do nothing with a shelf
            self._record(lease)

    def enter_on_board(self, lease: Lease) -> None:
        """Put a lease on its pool's board, which has room: from now on it may move.

        A later broker is told so by the journal.
        """
        lane, session = lease.pool.lane, lease.session
        assert lane is not None
        lease.cell = lane.free.popleft()
        lane.used += 1
        if lease.moves < 0:
            lease.moves = 0
            self._record(lease)
        holder = SHELF if session.shelf else session.member_number
        lane.board.enter(lease.cell, lease.token, holder, lease.moves)

    @staticmethod
    def _remove_from_board(lease: Lease) -> None:
        """Take a lease off its pool's board: it may not move any more."""
        lane = lease.pool.lane
        assert lane is not None
        lane.board.remove(lease.cell)
        lane.free.append(lease.cell)
        lane.used -= 1
        lease.cell = -1

    # --- sessions

    def mark_returns_due(self, session: Session, returns_due: int) -> None:
        """Record how many checkins a session was told to give back, and file it accordingly.

        None if it holds nothing or is silent; at least as many as an operator wants of it.
        """
        pool, session_id = session.pool, session.id
        is_holder = session.leases and not session.silent
        if not is_holder:
            returns_due = 0
        elif session.draining:
            returns_due = max(returns_due, len(session.draining))
        session.returns_due = returns_due
        if is_holder and not returns_due and session_id in pool.not_asked_to_return:
            return  # the usual case while nobody waits: its place in the index stays
        pool.asked_to_return.pop(session_id, None)  # one that stays goes to the end
        pool.not_asked_to_return.pop(session_id, None)
        if returns_due:
            pool.asked_to_return[session_id] = session
        elif is_holder:
            pool.not_asked_to_return[session_id] = session

    def mark_taking(self, session: Session, taking: int) -> None:
        """Record how many idle leases a session was asked for and has not answered about."""
        session.pool.taking += taking - session.taking
        session.taking = taking

    def move_session(self, session: Session, state: SessionState) -> None:
        """Change a session's state. What it holds is counted on only while it is LIVE."""
        if state not in SESSION_TRANSITIONS[session.state]:
            raise AssertionError(f"bug: session {session.label}: {session.state} to {state}")
        session.state = state
        for token, lease in session.leases.items():
            if state is not LIVE:
                session.pool.idle.pop(token, None)
            elif lease.idle_since is not None and lease.live is None:
                session.pool.idle.setdefault(token, lease)
        self.mark_returns_due(session, session.returns_due)

    # --- the queue

    @staticmethod
    def rank(waiter: Waiter) -> tuple[int, int]:
        """Return a waiter's rank: by its group's priority, then first come first served."""
        return (-waiter.session.pool.priority, waiter.seq)

    def enqueue(self, waiter: Waiter) -> None:
        """Put a request at the end of its pool's queue."""
        pool = waiter.session.pool
        waiter.session.waiters[waiter.request] = waiter
        pool.waiters[waiter.seq] = waiter
        if waiter.nowait:
            pool.nowaits[waiter.seq] = waiter
        self.contended[pool.name] = pool

    def dequeue(self, waiter: Waiter) -> None:
        """Take a request out of its queue, wherever it stands."""
        pool = waiter.session.pool
        del waiter.session.waiters[waiter.request]
        del pool.waiters[waiter.seq]
        pool.nowaits.pop(waiter.seq, None)
        if not pool.waiters:
            del self.contended[pool.name]
