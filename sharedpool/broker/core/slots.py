"""The books: all records of one broker, and the one function that changes a slot's state.

    FREE ──► GRANTED ──► OPEN ──► CLOSING ──► FREE        a slot's life on a good day
    any occupied state ──► SUSPECT ──► FENCING ──► FREE   its worker is silent, dead or unsure

FREE is not stored: a slot without a lease is free. Pure: no I/O, no clock; times are whatever the caller's clock says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from sharedpool.broker.core.commands import Command, Entry, Erase, Record
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.groups import Groups
from sharedpool.broker.core.histograms import waits
from sharedpool.broker.core.records import (
    CLOSING,
    FENCING,
    FREE,
    GRANTED,
    OPEN,
    SUSPECT,
    WAITS_KEPT,
    GrantStop,
    Lease,
    Pool,
    Session,
    SlotState,
    Waiter,
)
from sharedpool.wire.board import SHELF
from sharedpool.wire.messages import Backend, Phase, PoolSpec, Timings, Token

_MOST_PAST = 100  # unused pools of which the counts are kept

TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    # OPEN: claimed by HELLO after a broker restart; SUSPECT: known from before it.
    FREE: frozenset({GRANTED, OPEN, SUSPECT}),
    GRANTED: frozenset({OPEN, FREE, SUSPECT}),
    OPEN: frozenset({CLOSING, FREE, SUSPECT}),
    CLOSING: frozenset({OPEN, FREE, SUSPECT}),
    SUSPECT: frozenset({GRANTED, OPEN, CLOSING, FREE, FENCING}),
    FENCING: frozenset({FREE}),
}


class Slots:
    """All records of one broker, kept consistent by `move`. `emit` gets what must outlive the broker."""

    def __init__(
        self, max_conn: int | None, emit: Callable[[Command], None], epoch: int = 1
    ) -> None:
        self.max_conn = max_conn
        self._epoch = epoch
        self._newest_lease = 0
        self._emit = emit
        self.pools: dict[str, Pool] = {}
        self.former_pools: dict[str, Pool] = {}  # that nobody uses any more, for what was counted
        self.sessions: dict[bytes, Session] = {}
        self.leases: dict[Token, Lease] = {}
        self.contended: dict[str, Pool] = {}  # pools with waiters
        # Pools of which an operator wants connections back, whether or not anybody waits.
        self.shrinking: dict[str, Pool] = {}
        # What operators have said, also of pools that nobody uses at the moment ("" in `paused_pools`: of all).
        self.paused_pools: set[str] = set()
        self.limits: dict[str, int] = {}
        self.groups = Groups()
        self.grant_stop = GrantStop()
        self.orphans: dict[Backend, Lease] = {}  # counted for no known worker
        self.restored: dict[Backend, Lease] = {}  # held when the former broker ended

    def new_token(self) -> Token:
        """Return a name for a new lease; no lease of any broker has ever had it."""
        self._newest_lease += 1
        return Token(self._epoch, self._newest_lease)

    def is_over(self, record: object) -> bool:
        """Return True for a lease, a request, a session or a pool that is in the books no longer."""
        match record:
            case Lease():
                return record.state is FREE
            case Waiter():
                return record.session.waiters.get(record.request) is not record
            case Session():
                return self.sessions.get(record.id) is not record
            case Pool():
                return self.pools.get(record.name) is not record
        return False

    @property
    def room(self) -> int:
        """Free slots under the cap over all pools; practically endless without one."""
        return (1 << 30 if self.max_conn is None else self.max_conn) - len(self.leases)

    @property
    def overdrawn(self) -> int:
        """Slots in use that the cap over all pools, or what is reserved of it, does not allow: it was lowered."""
        if self.max_conn is None:
            return 0
        return max(
            0,
            self.groups.beyond + self.groups.reserved - self.max_conn
            if self.groups
            else -self.room,
        )

    def available(self, pool: Pool) -> int:
        """Free slots under the cap over all pools that this one may have: what others have reserved is not."""
        if pool.group is None or self.max_conn is None:
            return self.room
        return min(self.room, self.groups.available(pool.group, self.max_conn))

    def serves(self, pool: Pool, other: Pool) -> bool:
        """Say whether a slot that this pool gives up is the other's to have, when that is kept waiting by others.

        What others are is the cap over all pools, or a group's limit. A slot of a reservation is kept for its group.
        """
        if pool is other or other.paused or other.own_room <= 0:
            return False
        if pool.group is not None and pool.group is other.group:
            return other.group.room <= 0 or self.available(other) <= 0
        if self.max_conn is None or other.room <= 0 or self.available(other) > 0:
            return False
        return self.is_beyond_reservation(pool)

    @staticmethod
    def is_beyond_reservation(pool: Pool) -> bool:
        """Return True if other groups may want a slot of this pool back."""
        return pool.group is None or pool.group.beyond > 0

    @staticmethod
    def rank(waiter: Waiter) -> tuple[int, int]:
        """Return a waiter's place among all: by its group's priority, then first come first served."""
        return (-waiter.session.pool.priority, waiter.seq)

    def configure(self, terms: dict[str, GroupTerms]) -> None:
        """Have groups, or others, or none. What a group has too much comes back."""
        self.groups.configure(terms)
        for pool in self.pools.values():
            self.assign(pool)
        for pool in self.pools.values():  # only now all that is in use counts
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

    def discard(self, pool: Pool) -> None:
        """Forget a pool that nobody uses, but for what was counted."""
        del self.pools[pool.name]
        self.shrinking.pop(pool.name, None)
        self._leave_group(pool)
        self.former_pools[pool.name] = pool
        if len(self.former_pools) > _MOST_PAST:
            del self.former_pools[next(iter(self.former_pools))]

    def find(self, spec: PoolSpec) -> Pool | None:
        """Return the pool that a session means, if there is one."""
        pool = self.pools.get(spec.name)
        if pool is not None and pool.spec.is_pool_of(spec):
            return pool
        return next((pool for pool in self.pools.values() if pool.spec.is_pool_of(spec)), None)

    def add(self, pool: Pool) -> None:
        """Take in a pool that `find` does not know, by a name that no other has."""
        pool.known_as = next(name for name in _names(pool.spec) if name not in self.pools)
        self.pools[pool.name] = pool

    def name(self, pool: Pool, spec: PoolSpec) -> None:
        """Know a pool, whose backends alone were known so far, by the name that its first session says."""
        del self.pools[pool.name]
        wanted_back = self.shrinking.pop(pool.name, None)
        pool.spec, pool.unnamed = spec, False
        self.add(pool)
        if wanted_back is not None:
            self.shrinking[pool.name] = pool

    def limit(self, pool_name: str, spec: PoolSpec) -> int:
        """Return what a pool's own limit is to be."""
        limit = self.limits.get(pool_name, spec.max_conn)
        return limit if self.max_conn is None else min(self.max_conn, limit)

    def shrink(self, pool: Pool) -> None:
        """Bring a pool in line with what an operator has said of it; what is too much is to come back."""
        pool.paused = not self.paused_pools.isdisjoint(("", pool.name))
        group = pool.group
        wanted_back = (
            pool.paused,
            len(pool.leases) > pool.target,
            group is not None and group.room < 0,
            self.overdrawn > 0 and self.is_beyond_reservation(pool),
            any(session.draining for session in pool.sessions.values()),
        )
        if any(wanted_back):
            self.shrinking[pool.name] = pool

    def move(self, lease: Lease, new: SlotState, reason: str) -> None:
        """Change a slot's state: the only place that does. Keeps every index right.

        Raise `AssertionError` for a transition that the design does not know.
        """
        old = lease.state
        if new not in TRANSITIONS[old]:
            raise AssertionError(f"bug: lease {lease.token}: {old.value} -> {new.value} ({reason})")
        session, pool, token = lease.session, lease.pool, lease.token
        lease.state = new
        if old is FREE:
            self.leases[token] = pool.leases[token] = session.leases[token] = lease
            self.mark_returns_due(session, session.returns_due)
            self._record(lease)
        elif old in (CLOSING, FENCING):
            pool.incoming.pop(token, None)
        elif old is SUSPECT:
            del pool.suspects[token]
        elif old is OPEN and new is not OPEN:
            self.mark_phase(lease, Phase.CONNECTING, None)
            lease.live = None
            pool.parked.pop(token, None)
        if lease.cell >= 0 and new in (FENCING, FREE):
            self._remove_from_board(lease)
        if new is GRANTED:
            session.granted[lease.request] = lease
        elif new is not SUSPECT and session.granted.get(lease.request) is lease:
            del session.granted[lease.request]  # a suspect one may still be on its way
        if new is CLOSING:
            pool.incoming[token] = lease
        elif new is SUSPECT:
            pool.suspects[token] = lease
            pool.backoff.ended(token)  # if it is the probe, its outcome may never be told
        elif new is FREE:
            del self.leases[token], pool.leases[token], session.leases[token]
            session.draining.discard(token)
            for index in (self.orphans, self.restored):
                if index and lease.backend is not None and index.get(lease.backend) is lease:
                    del index[lease.backend]
            self.mark_returns_due(session, session.returns_due)
            pool.backoff.ended(token)
            self._emit(Erase(token))

    @staticmethod
    def _remove_from_board(lease: Lease) -> None:
        """Let a lease move no more."""
        lane = lease.pool.lane
        assert lane is not None
        lane.board.remove(lease.cell)
        lane.free.append(lease.cell)
        lane.used -= 1
        lease.cell = -1

    def transfer(self, lease: Lease, session: Session) -> None:
        """Note that another session of the pool holds a lease."""
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
        if not session.shelf:  # of which a later broker could make nothing
            self._record(lease)

    @staticmethod
    def unpark(lease: Lease) -> None:
        """Record that a lease is parked at the broker no longer."""
        lease.live = None
        lease.pool.parked.pop(lease.token, None)

    def enter_on_board(self, lease: Lease) -> None:
        """Put a lease on its pool's board, on which there is room. That it may move outlives this broker."""
        lane, session = lease.pool.lane, lease.session
        assert lane is not None
        lease.cell = lane.free.popleft()
        lane.used += 1
        if lease.moves < 0:
            lease.moves = 0
            self._record(lease)
        lane.board.enter(
            lease.cell, lease.token, SHELF if session.shelf else session.number, lease.moves
        )

    def identify(self, lease: Lease, backend: Backend) -> None:
        """Note which backend a lease's connection is on."""
        known = lease.backend
        if known is None or backend != known or backend.direct is not known.direct:
            lease.backend = backend
            self._record(lease)

    def _record(self, lease: Lease) -> None:
        session, pool = lease.session, lease.pool
        self._emit(
            Record(
                Entry(
                    lease.token, session.id, session.process, session.pid, session.host, session.title,
                    pool.spec, pool.max_conn, session.expiration_s, lease.backend, lease.moves,
                )
            )
        )  # fmt: skip

    def strangers(self, backends: Iterable[Backend]) -> list[Backend]:
        """Return those that no lease is known to be on. Start time 0 (not ours to see) makes a pid alone count."""
        known = [lease.backend for lease in self.leases.values() if lease.backend is not None]
        pids, exact = {b.pid for b in known}, {(b.pid, b.start_us) for b in known}
        unsure = {b.pid for b in known if not b.start_us}
        return [
            backend
            for backend in backends
            if (
                backend.pid not in pids
                if not backend.start_us
                else (backend.pid, backend.start_us) not in exact
            )
            and backend.pid not in unsure
        ]

    def note_timings(self, session: Session, times: Timings | None) -> None:
        """Add what a session tells of its times to its pool's."""
        if times is not None and session.pool.totals.note(session.timings, times):
            if session.pool.moving:  # else the broker has seen them itself
                session.pool.waited.extend(waits(session.timings, times, WAITS_KEPT))
            session.timings = times

    def mark_phase(self, lease: Lease, phase: Phase, since: float | None) -> None:
        """Note whether an OPEN lease lies idle or is in use, since when."""
        lease.idle_since = since if phase is Phase.IDLE else None
        lease.used_since = since if phase is Phase.IN_USE else None
        if phase is Phase.IDLE:
            lease.pool.idle.setdefault(lease.token, lease)
        else:
            lease.pool.idle.pop(lease.token, None)

    def mark_returns_due(self, session: Session, returns_due: int) -> None:
        """Note what a session owes (nothing when it holds nothing or is silent) and file it as pressed or not."""
        pool, session_id = session.pool, session.id
        holds = session.leases and not session.silent
        if not holds:
            returns_due = 0
        elif session.draining:
            returns_due = max(returns_due, len(session.draining))
        session.returns_due = returns_due
        if holds and not returns_due and session_id in pool.not_asked_to_return:
            return  # as it is with nearly every lease while nobody waits
        pool.asked_to_return.pop(session_id, None)  # one that stays goes to the end
        pool.not_asked_to_return.pop(session_id, None)
        if returns_due:
            pool.asked_to_return[session_id] = session
        elif holds:
            pool.not_asked_to_return[session_id] = session

    def mark_unresponsive(self, session: Session) -> None:
        """Note that a session does not answer: what it has idle, or owes, is not counted on until it speaks."""
        session.unresponsive = True
        for token in session.leases:
            session.pool.idle.pop(token, None)
        self.mark_returns_due(session, session.returns_due)

    def mark_heard(self, session: Session) -> None:
        """Note that a silent session speaks again; it is asked anew for what it may have missed."""
        session.unresponsive = session.suspect = False
        for token, lease in session.leases.items():
            if lease.idle_since is not None and lease.live is None:
                session.pool.idle.setdefault(token, lease)
        self.mark_returns_due(session, session.returns_due)

    def mark_taking(self, session: Session, taking: int) -> None:
        """Note how many idle leases a session has been asked for and has not answered about."""
        session.pool.taking += taking - session.taking
        session.taking = taking

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

    def check_invariants(self) -> None:
        """Raise `AssertionError` when the records contradict each other."""
        for token, lease in self.leases.items():
            assert lease.token == token
            assert lease.state is not FREE, lease
            assert lease.pool.leases[token] is lease.session.leases[token] is lease
            assert lease.session.pool is lease.pool
        assert len(self.leases) == sum(len(pool.leases) for pool in self.pools.values())
        assert len(self.leases) == sum(len(session.leases) for session in self.sessions.values())
        for pool in self.pools.values():
            assert pool.taking == sum(session.taking for session in pool.sessions.values())
            assert all(lease.state is OPEN for lease in pool.idle.values())
            returning = (CLOSING, FENCING)
            assert all(
                lease.state in returning and pool.leases[t] is lease
                for t, lease in pool.incoming.items()
            )
            assert all(lease.state is SUSPECT for lease in pool.suspects.values())
            assert all(
                lease.idle_since is not None and not lease.session.silent
                for lease in pool.idle.values()
            )
            for session in pool.sessions.values():
                assert self.sessions[session.id] is session
                early = (GRANTED, SUSPECT)
                assert all(x.state in early and x.backend is None for x in session.granted.values())
                assert session.silent or session.awaited or session.answered >= session.asked, (
                    session.label
                )
                assert not session.taking or session.awaited, session.label
            suspects = {t for t, lease in pool.leases.items() if lease.state is SUSPECT}
            assert suspects == set(pool.suspects)
            holders = {s.id for s in pool.sessions.values() if s.leases}
            assert all(s.returns_due > 0 for s in pool.asked_to_return.values())
            assert all(s.returns_due == 0 for s in pool.not_asked_to_return.values())
            assert not set(pool.asked_to_return) & set(pool.not_asked_to_return)
            silent = {s.id for s in pool.sessions.values() if s.silent}
            assert holders - silent == set(pool.asked_to_return) | set(pool.not_asked_to_return)
            assert (pool.name in self.contended) == bool(pool.waiters)
            assert pool.name in self.shrinking or not pool.paused
            assert all(s.draining <= set(s.leases) for s in pool.sessions.values())
            self._check_lane(pool)
            assert set(pool.nowaits) == {
                seq for seq, waiter in pool.waiters.items() if waiter.nowait
            }
            for seq, waiter in pool.waiters.items():
                assert waiter.seq == seq
                assert self.sessions[waiter.session.id].waiters[waiter.request] is waiter

    @staticmethod
    def _check_lane(pool: Pool) -> None:
        celled = [lease for lease in pool.leases.values() if lease.cell >= 0]
        if pool.lane is None:
            assert not celled
            return
        assert pool.lane.used == len(celled) == len({lease.cell for lease in celled})
        assert not set(pool.lane.free) & {lease.cell for lease in celled}
        assert all(pool.lane.board.has(lease.cell, lease.token) for lease in celled)
        assert all(session.number == number for number, session in pool.lane.members.items())
        assert pool.lane.moving == pool.lane.board.moving


def _names(spec: PoolSpec) -> Iterator[str]:
    """Yield the names that a pool may have, the first choice first: its own, then with its database's."""
    yield spec.name
    yield f"{spec.name}/{spec.database}"
    # Another pool may really be called so.
    yield from (f"{spec.name}/{spec.database}/{number}" for number in itertools.count(2))
