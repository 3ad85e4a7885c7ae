"""A world for the real ledger and the real caches: processes, a network, a PostgreSQL server and a clock, all pure.

`Worker` plays what `worker/holdings.py`, `checkout.py` and `link.py` do around a cache; every step that blocks in a
real process (waiting, connecting, closing) is a step of its own here, so that anything can happen in between.

Two things are taken for granted, as in the real broker: a backend whose CONFIRM has not reached the broker when its
process dies ends with it (it is in start-up, or idle), and a worker says BYE only when it holds nothing and takes
nothing any more, so that a grant still on its way will not be used.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

from sharedpool.broker.commands import Command, Fence, Forget, Send, Watch
from sharedpool.broker.ledger import Ledger
from sharedpool.wire.codec import decode_to_broker, decode_to_worker, encode
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Acquire,
    Backend,
    Bye,
    Confirm,
    Deny,
    Grant,
    Hello,
    Phase,
    PoolSpec,
    Recall,
    Reject,
    ReleaseReason,
    Renew,
    ToBroker,
    Token,
    ToWorker,
    Welcome,
)
from sharedpool.worker.cache import Cache, Closing, Lease, Ticket

TTL_S = 15.0
BEAT_S = 5.0
EXPIRATION_S = 40.0
LIMITS = {"a": 3, "b": 2}


class Conn:
    """A connection as its user sees it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.lease: Lease | None = None  # set while it is checked out


@dataclass(eq=False, repr=False)
class Worker:
    """One process with one pool, any number of threads, and a link."""

    id: bytes
    pool: str
    cache: Cache = field(default_factory=lambda: Cache(EXPIRATION_S))
    established: bool = False
    epoch: int | None = None
    frozen: bool = False
    up: deque[ToBroker] = field(default_factory=deque)
    down: deque[ToWorker] = field(default_factory=deque)
    tickets: list[Ticket] = field(default_factory=list)
    connecting: list[Lease] = field(default_factory=list)
    opening: list[tuple[Lease, Conn]] = field(default_factory=list)  # there is a backend, the pool does not know it yet
    users: list[Conn] = field(default_factory=list)
    closing: list[tuple[Closing, Conn]] = field(default_factory=list)
    patience: dict[int, bool] = field(default_factory=dict)
    beat_at: float = 0.0
    denied: int = 0

    def __repr__(self) -> str:
        return f"<{self.id.decode()} of pool {self.pool}{', frozen' if self.frozen else ''}>"


class World:
    """Everything; the steps are the methods, the promises are in `check`."""

    def __init__(self, cap: int | None) -> None:
        self.cap = cap
        self.now = 1000.0
        self.ledger = Ledger(7, max_conn=cap, ttl_s=TTL_S)
        self.workers: dict[bytes, Worker] = {}
        self.dead: dict[bytes, deque[ToBroker]] = {}  # sessions whose end the broker has not noticed: last words
        self.exited: set[bytes] = set()  # those of them whose process has ended too
        self.watched: set[bytes] = set()
        self.live: dict[Backend, Token] = {}  # the server: backends, and the lease each was opened under
        self.pool_of: dict[Backend, str] = {}
        self.owner: dict[Backend, bytes] = {}
        self.known: set[Backend] = set()  # to the broker
        self.fences: dict[Token, Fence] = {}
        self.granted: dict[Token, tuple[bytes, int]] = {}
        self.arrivals: dict[str, list[tuple[bytes, int]]] = {name: [] for name in LIMITS}
        self.in_order = True
        self._ids = itertools.count(1)

    # --- the broker

    def execute(self, commands: list[Command]) -> None:
        grants: list[tuple[bytes, Grant]] = []
        for command in commands:
            match command:
                case Send(session, message):
                    worker = self.workers.get(session)
                    if worker is not None:
                        worker.down.append(decode_to_worker(encode(message)))
                    if isinstance(message, Grant):
                        grants.append((session, message))
                case Watch(session):
                    self.watched.add(session)
                case Forget(session):
                    self.watched.discard(session)
                case Fence():
                    assert command.token not in self.fences, f"{command.token} is fenced twice"
                    self.fences[command.token] = command
        self.ledger.check_invariants()
        for session, grant in grants:
            self._check_grant(session, grant)

    def _check_grant(self, session: bytes, grant: Grant) -> None:
        receiver = self.granted.setdefault(grant.token, (session, grant.request))
        assert receiver == (session, grant.request), f"{grant.token} was granted twice"
        for arrivals in self.arrivals.values():
            if (session, grant.request) in arrivals:
                ahead = arrivals[: arrivals.index((session, grant.request))]
                overtaken = [each for each in ahead if self._queued(*each)]
                assert not (self.in_order and overtaken), f"{overtaken} came before {session!r}"
                arrivals.remove((session, grant.request))

    def _queued(self, session: bytes, request: int) -> bool:
        books = self.ledger._books.sessions.get(session)
        return books is not None and request in books.waiters

    def _to_ledger(self, session: bytes, message: ToBroker) -> None:
        match message:
            case Confirm(_, backend):
                self.known.add(backend)
            case Renew() | Hello():
                self.known.update(report.backend for report in message.leases if report.backend is not None)
            case Acquire(request, wait_ms) if wait_ms and not self._queued(session, request):
                if (books := self.ledger._books.sessions.get(session)) is not None and request not in books.granted:
                    arrivals = self.arrivals[books.pool.name]
                    if (session, request) in arrivals:
                        arrivals.remove((session, request))
                    arrivals.append((session, request))
        self.execute(self.ledger.handle(session, decode_to_broker(encode(message)), self.now))

    def notice_death(self, session: bytes) -> None:
        """The pidfd fires; the broker reads what is there first."""
        for message in self.dead.pop(session):
            self._to_ledger(session, message)
        if session in self.exited and session in self.watched:
            self.watched.discard(session)
            self.execute(self.ledger.session_died(session, self.now))

    def answer_fence(self, token: Token) -> None:
        """The control connection ends a backend and sees it gone. Without knowing which, it never answers."""
        fence = self.fences[token]
        if fence.backend is not None:
            del self.fences[token]
            self.end(fence.backend)
            self.execute(self.ledger.fenced(token, self.now))

    # --- the server

    def open(self, worker: Worker, lease: Lease) -> Conn:
        number = next(self._ids)
        backend = Backend(number, number, 1)
        self.live[backend] = lease.token
        self.pool_of[backend] = worker.pool
        self.owner[backend] = worker.id
        return Conn(backend)

    def end(self, backend: Backend) -> None:
        self.live.pop(backend, None)

    # --- the network

    def deliver_up(self, worker: Worker) -> None:
        self._to_ledger(worker.id, worker.up.popleft())

    def deliver_down(self, worker: Worker) -> None:
        self.receive(worker, worker.down.popleft())

    # --- the clock

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.execute(self.ledger.tick(self.now))
        for worker in self.awake():
            self.beat_if_due(worker)

    def pass_long(self, seconds: float) -> None:
        """Heartbeats are kept and messages arrive, except those of the frozen."""
        until = self.now + seconds
        while self.now < until:
            self.pass_time(min(BEAT_S, until - self.now))
            self.deliver_all()

    def awake(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if not worker.frozen]

    def deliver_all(self) -> None:
        moved = True
        while moved:
            moved = False
            for worker in self.awake():
                while worker.up:
                    self.deliver_up(worker)
                    moved = True
                while worker.down and worker.id in self.workers:
                    self.deliver_down(worker)
                    moved = True

    # --- processes

    def start(self, pool: str) -> Worker:
        worker = Worker(b"w%d" % next(self._ids), pool)
        self.workers[worker.id] = worker
        self.hello(worker)
        return worker

    def hello(self, worker: Worker) -> None:
        worker.established = False
        leases, seen = worker.cache.register(self.now, {})
        spec = PoolSpec(worker.pool, LIMITS[worker.pool], int(EXPIRATION_S * 1000))
        worker.up.append(Hello(PROTOCOL_VERSION, 1, "host", worker.id.decode(), spec, leases, seen))

    def flush(self, worker: Worker) -> None:
        while worker.established and worker.cache.out:
            worker.up.append(worker.cache.out.popleft())

    def receive(self, worker: Worker, message: ToWorker) -> None:
        match message:
            case Welcome():
                worker.established = True
                if worker.epoch not in (None, message.epoch):
                    worker.cache.new_epoch()
                worker.epoch = message.epoch
                self._revoke(worker, message.revoked)
            case Ack():
                self._revoke(worker, message.revoked)
            case Reject():
                assert not message.fatal
                self.hello(worker)
            case Grant():
                self._wake(worker, worker.cache.granted(message, self.now))
            case Deny():
                ticket = worker.cache.denied(message)
                if ticket is not None:
                    worker.tickets.remove(ticket)
                    worker.denied += 1
            case Recall():
                self._to_close(worker, worker.cache.recalled(message, self.now, {}))
        self.flush(worker)

    def _revoke(self, worker: Worker, tokens: list[Token]) -> None:
        for token in tokens:
            lease = worker.cache.forget(token)
            conn = lease and (lease.conn or (lease.ref and lease.ref()))
            if isinstance(conn, Conn):
                self.end(conn.backend)  # `cut`

    def _wake(self, worker: Worker, ticket: Ticket | None) -> None:
        if ticket is None:
            return
        lease = ticket.lease
        assert lease is not None
        assert ticket in worker.tickets
        if lease.conn is None and lease not in worker.connecting:
            # The thread goes on to connect; its ticket stays, since it can still be interrupted.
            worker.connecting.append(lease)

    def _to_close(self, worker: Worker, closing: list[Closing]) -> None:
        for each in closing:
            assert isinstance(each.lease.conn, Conn)
            worker.closing.append((each, each.lease.conn))

    def checkout(self, worker: Worker, wait_s: float) -> None:
        lease = worker.cache.take(self.now)
        while lease is not None:
            assert isinstance(lease.conn, Conn)
            if lease.conn.backend in self.live:
                self._hand_out(worker, lease, lease.conn)
                return
            # Dead (a fence, perhaps): the slot may not be ours any more, so it is not connected again.
            worker.cache.close(lease, lease.conn, ReleaseReason.BROKEN, self.now)
            worker.cache.closed(lease, ReleaseReason.BROKEN, gone=True)
            lease = worker.cache.take(self.now)
        ticket = Ticket(lambda: None, self.now)
        worker.tickets.append(ticket)
        if not wait_s and any(held.phase is Phase.CLOSING for held in worker.cache.leases.values()):
            worker.cache.out.append(worker.cache.renewal(self.now, {}))
        worker.cache.want(ticket, wait_s)
        worker.patience[ticket.request] = wait_s > 0
        self.flush(worker)

    def _hand_out(self, worker: Worker, lease: Lease, conn: Conn) -> None:
        assert conn.lease is None, "a connection in two checkouts"
        assert all(user is not conn for user in worker.users), "a connection in two checkouts"
        lease.phase, lease.conn, conn.lease = Phase.IN_USE, None, lease
        worker.users.append(conn)

    def collect(self, worker: Worker) -> None:
        """Threads that were handed a connection take it."""
        for ticket in list(worker.tickets):
            lease = ticket.lease
            if lease is not None and isinstance(lease.conn, Conn) and lease.phase is Phase.CONNECTING:
                worker.tickets.remove(ticket)
                self._hand_out(worker, lease, lease.conn)
                ticket.lease = None

    def give_up(self, worker: Worker, ticket: Ticket) -> None:
        """A thread is interrupted, or its time is over, before it connects."""
        worker.tickets.remove(ticket)
        if ticket.lease in worker.connecting:
            worker.connecting.remove(ticket.lease)
        self._wake(worker, worker.cache.give_up(ticket, self.now))
        self.flush(worker)

    def connect(self, worker: Worker, lease: Lease) -> None:
        worker.connecting.remove(lease)
        worker.opening.append((lease, self.open(worker, lease)))

    def fail_to_connect(self, worker: Worker, lease: Lease) -> None:
        worker.connecting.remove(lease)
        worker.cache.closed(lease, ReleaseReason.FAILED, gone=True)
        self._drop_ticket(worker, lease)
        self.flush(worker)

    def _drop_ticket(self, worker: Worker, lease: Lease) -> None:
        for ticket in [ticket for ticket in worker.tickets if ticket.lease is lease]:
            worker.tickets.remove(ticket)
            self._wake(worker, worker.cache.give_up(ticket, self.now))

    def opened(self, worker: Worker, lease: Lease, conn: Conn, *, well: bool) -> None:
        """The new connection can be used, or `configure` fails."""
        worker.opening.remove((lease, conn))
        if well:
            worker.cache.opened(lease, conn.backend, float("inf"), conn, self.now)
            self._hand_out(worker, lease, conn)
        else:
            self._to_close(worker, [worker.cache.close(lease, conn, ReleaseReason.FAILED, self.now)])
        for ticket in [ticket for ticket in worker.tickets if ticket.lease is lease]:
            worker.tickets.remove(ticket)
            ticket.lease = None
        self.flush(worker)

    def checkin(self, worker: Worker, conn: Conn, verdict: ReleaseReason | None = None) -> None:
        worker.users.remove(conn)
        lease, conn.lease = conn.lease, None
        assert lease is not None
        if conn.backend not in self.live:
            verdict = ReleaseReason.BROKEN
        outcome = worker.cache.checkin(lease, conn, self.now, verdict)
        if isinstance(outcome, Closing):
            worker.closing.append((outcome, conn))
        else:
            self._wake(worker, outcome)
        self._to_close(worker, worker.cache.expire(self.now))
        self.flush(worker)

    def finish_close(self, worker: Worker, closing: Closing, conn: Conn, *, seen: bool) -> None:
        """A close is over: the backend was seen to go, or it was not and lives on."""
        worker.closing.remove((closing, conn))
        if seen:
            self.end(conn.backend)
        worker.cache.closed(closing.lease, closing.reason, gone=seen)
        self.flush(worker)

    def beat_if_due(self, worker: Worker) -> None:
        if self.now - worker.beat_at >= BEAT_S:
            self.beat(worker)

    def beat(self, worker: Worker) -> None:
        worker.beat_at = self.now
        if worker.established:
            self._to_close(worker, worker.cache.expire(self.now))
            worker.cache.out.append(worker.cache.renewal(self.now, {}))
            self.flush(worker)

    def leave(self, worker: Worker, *, exits: bool) -> None:
        """`release_all`, when nothing is being connected: everything is closed, then BYE; the process may live on."""
        assert not worker.connecting
        assert not worker.opening
        worker.cache.fail(RuntimeError("disposed"))
        self._to_close(worker, worker.cache.drain(self.now))
        for conn in worker.users:
            assert conn.lease is not None
            worker.closing.append((worker.cache.close(conn.lease, conn, ReleaseReason.CLOSED, self.now), conn))
        worker.users.clear()
        for ticket in worker.tickets:
            if ticket.lease is not None and isinstance(ticket.lease.conn, Conn):  # handed on, not yet taken
                conn = ticket.lease.conn
                worker.closing.append((worker.cache.close(ticket.lease, conn, ReleaseReason.CLOSED, self.now), conn))
        for closing, conn in list(worker.closing):
            self.finish_close(worker, closing, conn, seen=True)
        assert not worker.cache.leases
        self.flush(worker)
        worker.up.append(Bye())
        self._end(worker, linger=False)
        if exits:
            self.exited.add(worker.id)

    def die(self, worker: Worker, *, linger: bool) -> None:
        """SIGKILL. Backends in the middle of a query may linger."""
        self._end(worker, linger=linger)
        self.exited.add(worker.id)

    def _end(self, worker: Worker, *, linger: bool) -> None:
        del self.workers[worker.id]
        self.dead[worker.id] = worker.up
        told = set(self.known)
        for backend in [backend for backend, owner in self.owner.items() if owner == worker.id]:
            if not linger or backend not in told:
                self.end(backend)

    # --- promises

    def check(self) -> None:
        """S1, S2, and that no slot is free while its backend lives."""
        for name, limit in LIMITS.items():
            count = sum(self.pool_of[backend] == name for backend in self.live)
            assert count <= limit, f"{count} backends in pool {name}, limit {limit}"
        if self.cap is not None:
            assert len(self.live) <= self.cap, f"{len(self.live)} backends, cap {self.cap}"
        for backend, token in self.live.items():
            assert token in self.ledger._books.leases, f"the slot of {backend} is free while it lives"
        for worker in self.workers.values():
            assert len({id(conn) for conn in worker.users}) == len(worker.users)
        assert len(self.live) == len(set(self.live.values())), "two backends on one lease"

    # --- peace

    def quiesce(self) -> None:
        """Everything under way arrives and ends, in no time; nobody checks anything in."""
        for session in list(self.dead):
            self.notice_death(session)
        while True:
            self.deliver_all()
            awake = self.awake()
            steps = False
            for token in list(self.fences):
                known = self.fences[token].backend is not None
                self.answer_fence(token)
                steps = steps or known
            for worker in awake:
                self.collect(worker)
                for closing, conn in list(worker.closing):
                    self.finish_close(worker, closing, conn, seen=True)
                    steps = True
                for lease in list(worker.connecting):
                    self.connect(worker, lease)
                for lease, conn in list(worker.opening):
                    self.opened(worker, lease, conn, well=True)
                    steps = True
            self.check()
            if not steps and not any(worker.up or worker.down for worker in awake):
                return

    def check_nobody_waits_in_vain(self) -> None:
        """L1, L4, in a quiet moment without frozen workers."""
        books = self.ledger._books
        for worker in self.workers.values():
            for ticket in worker.tickets:
                assert ticket.lease is None
                assert worker.patience[ticket.request], "a caller that does not wait has no answer"
                pool = books.pools[worker.pool]
                assert pool.room <= 0 or books.room <= 0, "a waiter and a free slot"
                capped = books.room <= 0
                for other in self.workers.values():
                    known = books.sessions.get(other.id)
                    if known is None or known.silent:
                        continue  # it has not spoken for longer than the TTL
                    if other.pool == worker.pool or (capped and pool.room > 0):
                        idle = [lease for lease in other.cache.idle if lease.token in books.leases]
                        assert not idle, "a waiter and an idle connection"

    def heal(self) -> None:
        """Faults stop: the frozen thaw, everybody beats and checks in, time passes."""
        for worker in self.workers.values():
            worker.frozen = False
        for _ in range(20 + sum(len(worker.tickets) for worker in self.workers.values())):
            for worker in list(self.workers.values()):
                self.beat(worker)
            self.quiesce()
            for worker in list(self.workers.values()):
                for conn in list(worker.users):
                    self.checkin(worker, conn)
            self.quiesce()
            if not any(worker.tickets or worker.users for worker in self.workers.values()):
                break
        else:
            waiting = {worker.id: len(worker.tickets) for worker in self.workers.values() if worker.tickets}
            raise AssertionError(f"still waiting although everything was checked in: {waiting}")

    def check_all_slots_can_be_had(self) -> None:
        """L5: one session gets every slot of its pool."""
        for name, limit in LIMITS.items():
            worker = self.start(name)
            count = limit if self.cap is None else min(limit, self.cap)
            for _ in range(count):
                self.checkout(worker, 60)
            self.quiesce()
            held = [(str(x.token), x.state.value, x.session.label) for x in self.ledger._books.leases.values()]
            assert len(worker.users) == count, f"{len(worker.users)} of {count} slots of {name} can be had: {held}"
            for conn in list(worker.users):
                self.checkin(worker, conn)
            self.quiesce()
