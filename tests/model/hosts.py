"""Many hosts that share one limit: brokers with the real ledger, plain workers, and one server.

A sync runs the product's own decision (`share_sync.py`). What is simulated is what surrounds it:
the transaction, which may be lost before or after its commit, the sessions, NOTIFYs, and time.

The rest of the worker and of the channel has a model of its own (`worker.py`); here messages
between a worker and its broker arrive at once.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass

from sharedpool.broker.core.commands import (
    ClaimLeadership,
    Command,
    Entry,
    Erase,
    Fence,
    LeaveShare,
    MarkJournalComplete,
    Record,
    ResignLeadership,
    Send,
    SurveyResult,
    SurveyServer,
    SyncShare,
    VerifyServer,
)
from sharedpool.broker.core.host_presence import (
    GONE_S,
    SESSION_NAME,
    SILENT_S,
    Listed,
    Presence,
)
from sharedpool.broker.core.ledger import Ledger, LedgerCall
from sharedpool.broker.core.share_sync import SyncDecision, decide_sync
from sharedpool.broker.core.share_terms import Failed, LimitRow, ShareKey, SyncFailure, Wakeup
from sharedpool.broker.core.shares import HostShare
from sharedpool.wire.application_name import tag_of
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    START_UP_LIMIT_S,
    Ack,
    Acquire,
    Confirm,
    Deny,
    Gone,
    Grant,
    Hello,
    Recall,
    Reject,
    Release,
    ReleaseReason,
    Renew,
    ToBroker,
    ToWorker,
    Welcome,
    Withdraw,
)
from sharedpool.wire.values import NO_TOKEN, Backend, LeaseReport, Phase, PoolSpec, Token

TTL_S = 15.0
BEAT_S = 5.0
LOOK_EVERY_S, OLD_S = 0.4, 2.0  # as `share_sessions.py`
# A worker's connect reaches the server so soon after its broker's session has ended, or not at all:
# the product's assumption about hosts that go without a word (`host_presence.py`).
REACH_S = GONE_S - 0.1
POOL, DATABASE = "p", "app"


# --- the server


@dataclass(eq=False, slots=True)
class Proc:
    """A backend: of a broker's session, or of a worker's connection."""

    pid: int
    boot: int
    host: str
    tag: str
    is_broker: bool
    starting: bool = True
    left: bool = False  # its client has closed its end
    dead: bool = False

    @property
    def backend(self) -> Backend:
        return Backend(self.pid, self.pid, self.boot, direct=True)

    def __repr__(self) -> str:
        state = "dead" if self.dead else "starting" if self.starting else "open"
        return f"<{self.tag or 'nameless'} of {self.host}, pid {self.pid}, {state}>"


@dataclass(slots=True)
class Row:
    """A host's row, with the server's time."""

    host: str
    pid: int
    started_us: int
    held: int
    wanted: int
    answered: int
    told_at: float
    boot: int  # of the server then
    unnamed: str = ""
    cut: bool = False
    spare: int = 0


class Server:
    """PostgreSQL and the table of one limit. `limit` is what the row of the limit says."""

    def __init__(self) -> None:
        self.up = True
        self.boot, self.boot_at = 1, 0.0
        self.procs: list[Proc] = []
        self.limit: int | None = None
        self.asked, self.paused = 0, False
        self.hosts: tuple[str, ...] = ()  # that have rows, or had them before they were lost
        self.lost_at: float | None = None
        self.rows: dict[str, Row] = {}
        self._pids = itertools.count(1)

    def connect(self, host: str, tag: str, *, is_broker: bool = False) -> Proc:
        proc = Proc(next(self._pids), self.boot, host, tag, is_broker, starting=not is_broker)
        self.procs.append(proc)
        return proc

    def end(self, proc: Proc) -> None:
        if not proc.dead:
            proc.dead = True
            self.procs.remove(proc)

    @property
    def connections(self) -> list[Proc]:
        """Every backend that counts to the limit."""
        return [proc for proc in self.procs if not proc.is_broker]

    def stop(self) -> None:
        self.up = False
        for proc in list(self.procs):
            self.end(proc)

    def start(self, now: float, *, crashed: bool) -> None:
        self.up = True
        self.boot, self.boot_at = self.boot + 1, now
        if crashed:
            self.rows.clear()

    def sessions(self) -> tuple[frozenset[int], list[tuple[int, int, str]]]:
        """What a survey shows: those in start-up, and those with a tag."""
        starting = frozenset(proc.pid for proc in self.procs if proc.starting)
        return starting, [(p.pid, p.pid, p.tag) for p in self.procs if not p.starting]

    def listed(self, now: float) -> list[Listed]:
        return [
            Listed(
                name, row.host, row.pid, row.started_us, row.held, row.wanted, row.answered,
                row.cut, max(0.0, now - row.told_at), row.spare, row.unnamed,
            )
            for name, row in self.rows.items()
        ]  # fmt: skip

    def commit(self, host: Host, order: SyncShare, decision: SyncDecision, now: float) -> None:
        """Write a sync."""
        for name in decision.gone:
            del self.rows[name]
        for name, most in decision.lowered.items():
            self.rows[name].held = min(self.rows[name].held, most)
        division = decision.result.division
        self.rows[host.instance] = Row(
            host.name, host.pid, host.pid, division.held, order.claim.wanted, division.answered,
            now, self.boot, decision.unnamed,
        )  # fmt: skip
        self.limit, self.asked = decision.result.max_conn, decision.asked
        self.paused, self.hosts = decision.result.paused, decision.hosts
        self.lost_at = (self.lost_at or now) if decision.lost else None

    def limit_row(self, now: float) -> LimitRow:
        assert self.limit is not None
        lost_s = None if self.lost_at is None else now - self.lost_at
        return LimitRow(self.limit, self.asked, self.paused, self.hosts, lost_s)


# --- workers


@dataclass(eq=False, slots=True)
class Held:
    """A worker's lease. `proc` is None before its connect has reached the server."""

    token: Token
    granted_at: float
    proc: Proc | None = None
    phase: Phase = Phase.CONNECTING
    began_at: float = math.inf  # when its connect began that has not arrived yet
    doomed: bool = False  # its connect will never arrive

    @property
    def backend(self) -> Backend | None:
        """What the worker knows of it."""
        return None if self.proc is None or self.proc.starting else self.proc.backend


class Worker:
    """One process with a pool: it has `demand` threads that want connections."""

    def __init__(self, host: Host, number: int) -> None:
        self.host = host
        self.id = f"{host.name}.{number}".encode()
        self.pid = 1000 + number
        self.epoch = 0  # of the broker that has said WELCOME
        self.inbox: deque[ToWorker] = deque()
        self.leases: dict[Token, Held] = {}
        self.pending: dict[int, int] = {}  # requests, and how long they wait (ms)
        self.newest = NO_TOKEN
        self.recall = self.returns_due = 0
        self.heard_at = -math.inf  # when it has last sent something
        self.denied = 0
        self._requests = itertools.count(1)

    @property
    def spec(self) -> PoolSpec:
        return PoolSpec(POOL, self.host.max_conn, 60_000, database=DATABASE)

    def of(self, phase: Phase) -> list[Held]:
        return [held for held in self.leases.values() if held.phase is phase]

    @property
    def busy(self) -> int:
        """How many connections it uses or wants."""
        return len(self.of(Phase.IN_USE)) + len(self.of(Phase.CONNECTING)) + len(self.pending)

    # --- messages

    def send(self, message: ToBroker) -> None:
        self.heard_at = self.host.world.now
        self.host.handle(self.id, message)

    def hello(self) -> None:
        self.epoch = 0
        self.send(
            Hello(PROTOCOL_VERSION, self.pid, "", "worker", self.spec, self._reports(), self.newest)
        )

    def beat(self, answers: int = 0) -> None:
        if not self.epoch:
            self.hello()
        else:
            self.send(Renew(self._reports(), self.newest, answers, list(self.pending)))

    def _reports(self) -> list[LeaseReport]:
        return [
            LeaseReport(held.token, held.phase, 0, "T", held.backend)
            for held in self.leases.values()
        ]

    def receive(self, message: ToWorker) -> None:
        match message:
            case Welcome():
                self._welcome(message)
            case Reject():
                self.epoch = 0
            case Grant() if self.epoch:
                self._granted(message)
            case Deny() if self.epoch:
                self.denied += self.pending.pop(message.request, None) is not None
            case Recall() if self.epoch and message.serial > self.recall:
                self._recalled(message)
            case Ack() if self.epoch:
                self._revoke(message.revoked)
            case Gone() if self.epoch:
                for token in message.tokens:
                    self.leases.pop(token, None)

    def _welcome(self, message: Welcome) -> None:
        self.epoch, self.recall, self.returns_due = message.epoch, 0, 0
        self._revoke(message.revoked)
        for request, wait_ms in list(self.pending.items()):
            self.send(Acquire(request, wait_ms))

    def _granted(self, grant: Grant) -> None:
        if grant.token.epoch != self.epoch or grant.token <= self.newest:
            return
        self.newest = grant.token
        if grant.serial > self.recall:
            self.recall, self.returns_due = grant.serial, grant.returns_due
        if self.pending.pop(grant.request, None) is None:
            self.send(Release(grant.token, True, ReleaseReason.UNUSED))
        else:
            self.leases[grant.token] = Held(grant.token, self.host.world.now)

    def _recalled(self, recall: Recall) -> None:
        self.recall, self.returns_due = recall.serial, recall.returns_due
        taken = self.of(Phase.IDLE)[: recall.take]
        if recall.expired:
            taken = self.of(Phase.IDLE)
        for held in taken:
            held.phase = Phase.CLOSING
        if recall.answer:
            self.beat(recall.serial)
        for held in taken:
            self.close(held, ReleaseReason.TAKEN)

    def _revoke(self, tokens: list[Token]) -> None:
        for token in tokens:
            if (held := self.leases.pop(token, None)) is not None:
                self._let_go(held)

    # --- connections

    def ask(self, wait_ms: int = 600_000) -> None:
        """A thread wants a connection: an idle one, or the broker's."""
        if idle := self.of(Phase.IDLE):
            idle[-1].phase = Phase.IN_USE
            return
        request = next(self._requests)
        self.pending[request] = wait_ms
        if not self.epoch:
            self.hello()
        else:
            self.send(Acquire(request, wait_ms))

    def withdraw(self) -> None:
        request, _ = self.pending.popitem()
        self.send(Withdraw(request))

    def connect(self, held: Held) -> None:
        """Its thread begins to connect, unless the grant is too old."""
        if self.host.world.now > held.granted_at + TTL_S:
            self._fail(held, ReleaseReason.UNUSED, gone=True)
        else:
            held.began_at = self.host.world.now
            self.arrive(held)

    def arrive(self, held: Held) -> None:
        """The connect reaches the server, if it can."""
        world, host = self.host.world, self.host
        if held.doomed or world.now > min(host.reach_by, held.began_at + START_UP_LIMIT_S):
            self._fail(held, ReleaseReason.FAILED, gone=True, error="timeout expired")
        elif not host.cut and world.server.up:
            held.proc = world.server.connect(host.name, tag_of(POOL, host.instance))
        elif not world.server.up and not host.cut:
            self._fail(held, ReleaseReason.FAILED, gone=True, error="connection refused")

    def opened(self, held: Held) -> None:
        """The server has let it in; or has ended it."""
        proc = held.proc
        assert proc is not None
        if proc.dead:
            self._fail(held, ReleaseReason.FAILED, gone=True, error="server closed the connection")
            return
        proc.starting = False
        held.phase = Phase.IN_USE
        self.send(Confirm(held.token, proc.backend))

    def _fail(self, held: Held, reason: ReleaseReason, *, gone: bool, error: str = "") -> None:
        del self.leases[held.token]
        lost = held.proc is None and bool(error)
        self.send(Release(held.token, gone, reason, error=error, unreachable=lost))

    def checkin(self, held: Held) -> None:
        held.phase = Phase.IDLE
        if self.pending and not self.returns_due:
            request = next(iter(self.pending))
            del self.pending[request]
            held.phase = Phase.IN_USE
            self.send(Withdraw(request))
        elif self.returns_due:
            self.returns_due -= 1
            self.close(held, ReleaseReason.RETURN_DUE)

    def close(self, held: Held, reason: ReleaseReason, *, seen: bool = True) -> None:
        """Close a connection; `seen`: the backend's end is seen."""
        proc = held.proc
        assert proc is not None
        self.leases.pop(held.token, None)
        seen = seen and not self.host.cut
        self._let_go(held)
        if seen:
            self.host.world.server.end(proc)
        self.send(Release(held.token, seen, reason, proc.backend))

    @staticmethod
    def _let_go(held: Held) -> None:
        if held.proc is not None:
            held.proc.left = True

    def notice_ends(self) -> None:
        """Its connections whose backends are gone show that."""
        for held in list(self.leases.values()):
            if held.proc is not None and held.proc.dead and held.phase is not Phase.CONNECTING:
                del self.leases[held.token]
                self.send(Release(held.token, True, ReleaseReason.BROKEN, held.proc.backend))


# --- hosts


class Host:
    """One machine: a broker (`ledger`, None while it is dead) with its session, and workers."""

    def __init__(self, world: World, name: str, max_conn: int, workers: int) -> None:
        self.world = world
        self.name, self.instance = name, f"i{name}"
        self.max_conn = max_conn
        self.workers = [Worker(self, number) for number in range(workers)]
        self.frozen = self.cut = False
        self.dead = False  # the machine itself
        self.epoch = 6
        self.journal: dict[Token, Entry] = {}
        self.journal_intact = True
        self.lost_at: float | None = None  # when its session has ended on the server
        self.ledger: Ledger | None = None
        self.syncs: deque[float] = deque()  # when they were done
        self._reset()
        self.start_broker()

    def _reset(self) -> None:
        self.session: Proc | None = None
        self.pid = 0
        self.known: dict[ShareKey, tuple[str, ...]] = {}
        self.alone: set[ShareKey] = set()
        self.lacking: set[ShareKey] = set()
        self.presence = Presence()
        self.looked_at = -math.inf
        self.orders: deque[SyncShare | LeaveShare] = deque()
        self.words: deque[LedgerCall] = deque()
        self.fences: dict[Token, Fence] = {}
        self.surveys: deque[SurveyServer] = deque()
        self.notifies: deque[tuple[ShareKey, Wakeup]] = deque()

    @property
    def runs(self) -> bool:
        return not self.frozen and not self.dead

    @property
    def reach_by(self) -> float:
        """When a connect must have reached the server: see `REACH_S`."""
        return math.inf if self.lost_at is None else self.lost_at + REACH_S

    @property
    def free(self) -> int:
        """How many slots its broker may grant now, beyond those that are held."""
        if self.ledger is None or not self.runs or self.ledger.state == "waiting":
            return 0
        if self.world.now > self.reach_by:
            return 0
        shares = self.ledger.sharing.shares.values()
        return sum(
            max(0, share.pool.allowed - len(share.pool.leases))
            for share in shares
            if share.pool is not None and not share.frozen and share.trusted_until > self.world.now
        )

    @property
    def reaches_server(self) -> bool:
        return self.runs and not self.cut and self.world.server.up

    def unarrived(self) -> list[Held]:
        """Leases whose connects may still reach the server."""
        return [
            held
            for worker in self.workers
            for held in worker.leases.values()
            if held.proc is None
            and not held.doomed
            and self.world.now <= min(self.reach_by, held.began_at + START_UP_LIMIT_S)
            and (held.began_at < math.inf or self.world.now <= held.granted_at + TTL_S)
        ]

    # --- the broker

    def start_broker(self) -> None:
        if self.ledger is not None:
            return
        now = self.world.now
        self._reset()
        self.epoch += 1
        intact = self.journal_intact
        self.ledger = Ledger(
            self.epoch,
            ttl_s=TTL_S,
            journal_complete=intact,
            instance=self.instance,
            by_database=True,
            shared=True,
        )
        self.execute(self.ledger.control.reached(now, direct=True, fault=""))
        entries = list(self.journal.values())
        # In the order of `Server._take_over`.
        if not intact:
            grace_s = self.ledger.takeover.grace_s
            self.execute(self.ledger.takeover.begin_grace_period(grace_s, now))
        self.execute(self.ledger.takeover.restore(entries, now))

    def kill_broker(self, *, journal_lost: bool) -> None:
        if self.ledger is None:
            return
        self.ledger = None
        if journal_lost:
            self.journal, self.journal_intact = {}, False
        if self.session is not None:
            self.session.left = True
        self._reset()
        for worker in self.workers:
            worker.epoch = 0
            worker.inbox.clear()

    def handle(self, session: bytes, message: ToBroker) -> None:
        if self.ledger is not None:
            self.execute(self.ledger.handle(session, message, self.world.now))

    def tick(self) -> None:
        if self.ledger is not None and self.runs:
            self.execute(self.ledger.tick(self.world.now))

    def execute(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(session, message):
                    self._to_worker(session, message)
                case Record(entry):
                    self.journal[entry.token] = entry
                case Erase(token):
                    self.journal.pop(token, None)
                    self.fences.pop(token, None)
                case MarkJournalComplete():
                    self.journal_intact = True
                case Fence():
                    self.fences[command.token] = command
                case SurveyServer():
                    self.surveys.append(command)
                case VerifyServer(pool, generation):
                    self.words.append(_verified(pool, generation))
                case SyncShare() | LeaveShare():
                    self.orders.append(command)
                case ClaimLeadership() | ResignLeadership():
                    raise AssertionError("every limit can be shared here")
        assert self.ledger is not None
        if self.world.checks:
            self.ledger.check_invariants()
        self._deliver()

    def _to_worker(self, session: bytes, message: object) -> None:
        worker = next((worker for worker in self.workers if worker.id == session), None)
        if worker is not None:
            worker.inbox.append(message)  # type: ignore[arg-type]

    _delivering = False

    def _deliver(self) -> None:
        """Let the workers have their messages, and answer."""
        if self._delivering:
            return
        self._delivering = True
        try:
            while any(worker.inbox for worker in self.workers):
                for worker in self.workers:
                    while worker.inbox:
                        worker.receive(worker.inbox.popleft())
        finally:
            self._delivering = False

    def work(self) -> None:
        """The control connection does what it was told to."""
        if self.ledger is None or not self.reaches_server:
            return
        server = self.world.server
        for token, fence in list(self.fences.items()):
            del self.fences[token]
            for proc in server.connections:
                if proc.backend == fence.backend and not proc.starting:
                    server.end(proc)
            self.execute(self.ledger.backend_gone(token, self.world.now))
        for _ in range(len(self.surveys)):
            order = self.surveys.popleft()
            starting, _ = server.sessions()
            mine = {
                p.backend: p.tag
                for p in server.connections
                if not p.starting and p.tag == tag_of(POOL, self.instance)
            }
            databases = dict.fromkeys(mine, DATABASE)
            result = SurveyResult(order.serial, starting, mine, databases)
            self.execute(self.ledger.control.surveyed(result, self.world.now))

    # --- the session that shares, as `share_sessions.py`

    def run_order(self, fate: str = "done") -> None:
        """Carry out the next order: "done", or or its session is lost "before" or "after"."""
        if self.ledger is None or not self.reaches_server or not self.orders:
            return
        if self.session is not None and self.session.dead:
            self.notice_loss()  # the order is carried out all the same, in a new session
        order = self.orders.popleft()
        if isinstance(order, LeaveShare):
            self._leave(order.key, fate)
        else:
            self._sync(order, fate)

    def _sync(self, order: SyncShare, fate: str) -> None:
        world, server, key, now = self.world, self.world.server, order.key, self.world.now
        if self.session is None:
            self._open_session()
        if fate == "before":
            self._lose(key)
            return
        every_s = LOOK_EVERY_S if key in self.lacking else OLD_S
        if key not in self.alone and now - self.looked_at > every_s:
            self.presence.seen(*server.sessions(), now)
            self.looked_at = now
        elif now - self.looked_at > OLD_S:
            self.presence = Presence()
        if server.limit is None:
            server.limit, server.asked = order.max_conn, 0
        rows = server.listed(now)
        before = server.hosts
        decision = decide_sync(self.instance, order, server.limit_row(now), rows, self.presence)
        world.forget_early_grants(
            set(before) - set(decision.hosts) - {row.instance for row in rows}
        )
        server.commit(self, order, decision, now)
        self.lost_at = None
        self.syncs.append(now)
        self._notify(key, decision.to_wake, decision.asked, order.claim.wanted)
        if fate == "after":
            self._lose(key)
            return
        result = decision.result
        self.known[key] = tuple(host.instance for host in result.others)
        if result.division.alone:
            self.alone.add(key)
        else:
            self.alone.discard(key)
        self.lacking = {key} if result.division.lacking else set()
        self._end_silent(decision.silent)
        serial = order.serial
        self.words.append(
            lambda ledger, later: ledger.sharing.synced(key, serial, result, now, later)
        )

    def _notify(self, key: ShareKey, names: tuple[str, ...], asked: int, wanted: int) -> None:
        row = self.world.server.rows.get(self.instance)
        me = HostShare(self.instance, 0 if row is None else row.held, wanted)
        self.world.notify(key, names, Wakeup(asked, me, self.pid))

    def _open_session(self) -> None:
        server = self.world.server
        self.session = server.connect(self.name, SESSION_NAME + self.instance, is_broker=True)
        self.pid = self.session.pid
        self.presence, self.looked_at, self.known = Presence(), -math.inf, {}
        self.alone, self.lacking = set(), set()
        for name in [name for name, row in server.rows.items() if row.boot < server.boot]:
            del server.rows[name]

    def _end_silent(self, rows: tuple[Listed, ...]) -> None:
        server, now = self.world.server, self.world.now
        for listed in rows:
            row = server.rows.get(listed.instance)
            spoken = row is None or row.pid != listed.pid or now - row.told_at <= SILENT_S
            if row is not None and not spoken and not row.cut:
                row.cut = True
                row.spare = max(0, row.held - len(self.presence.backends_of(listed)))
            elif not listed.cut:
                continue
            sessions = self.presence.sessions_of(listed)
            for proc in list(server.procs):
                if (proc.pid, proc.pid) in sessions:
                    server.end(proc)

    def _leave(self, key: ShareKey, fate: str) -> None:
        server = self.world.server
        if self.session is None:
            return
        others = self.known.pop(key, ())
        if fate == "before":
            self._lose(None)
            return
        server.rows.pop(self.instance, None)
        server.hosts = tuple(each for each in server.hosts if each != self.instance)
        if not server.rows and not server.hosts:
            server.limit, server.asked, server.paused = None, 0, False
        self._notify(key, others, 0, 0)
        if fate == "after":
            self._lose(None)
            return
        self._close_session()

    def _close_session(self) -> None:
        assert self.session is not None
        self.world.server.end(self.session)
        self.session, self.known = None, {}

    def _lose(self, key: ShareKey | None) -> None:
        """The session breaks in the middle of an order, and both sides see that."""
        assert self.session is not None
        if not self.session.dead:
            self.world.server.end(self.session)
            self.lost_at = self.lost_at or self.world.now
        self.notice_loss(key)

    def notice_loss(self, key: ShareKey | None = None) -> None:
        """The thread sees that its session has ended."""
        failure = SyncFailure(Failed.LOST, "the session was lost")
        for each in dict.fromkeys([*self.known, *([] if key is None else [key])]):
            self.words.append(_failed(each, failure))
        self.session, self.known = None, {}
        self.notifies.clear()

    def hear(self) -> None:
        """The loop makes the calls that the thread has asked for."""
        if self.ledger is not None and self.runs and self.words:
            self.execute(self.words.popleft()(self.ledger, self.world.now))

    def listen(self) -> None:
        """The thread reads what has come in its session."""
        if self.ledger is None or not self.reaches_server:
            return
        if self.session is not None and self.session.dead:
            self.notice_loss()
        while self.notifies:
            self.words.append(_woken(*self.notifies.popleft()))


def _verified(pool: str, generation: int) -> LedgerCall:
    return lambda ledger, now: ledger.control.server_verified(pool, generation, True, now)


def _failed(key: ShareKey, failure: SyncFailure) -> LedgerCall:
    return lambda ledger, now: ledger.sharing.failed(key, failure, now)


def _woken(key: ShareKey, wakeup: Wakeup) -> LedgerCall:
    return lambda ledger, now: ledger.sharing.woken(key, wakeup, now)


class World:
    """All of it, and the clock."""

    def __init__(self, limits: list[int], workers: int) -> None:
        self.now = 1000.0
        self.checks = True  # of the ledgers' invariants, after every call
        self.server = Server()
        self.most = 0  # the highest limit under which something may have been opened
        self.hosts: list[Host] = []
        for number, max_conn in enumerate(limits):
            self.hosts.append(Host(self, f"h{number}", max_conn, workers))

    # --- what concerns all hosts

    def notify(self, key: ShareKey, instances: tuple[str, ...], wakeup: Wakeup) -> None:
        for host in self.hosts:
            if host.instance in instances and host.session is not None and not host.session.dead:
                host.notifies.append((key, wakeup))

    def forget_early_grants(self, instances: set[str]) -> None:
        """Hosts are not waited for any more whose shares were lost with the server.

        The product takes the risk that one of their workers connects under a grant of before.
        """
        for host in self.hosts:
            if host.instance in instances:
                for held in host.unarrived():
                    held.doomed = held.doomed or held.granted_at <= self.server.boot_at

    def in_use(self) -> int:
        """How many connections there are, or may be before any other sync."""
        on_the_way = sum(len(host.unarrived()) + host.free for host in self.hosts)
        return len(self.server.connections) + on_the_way

    def counted(self) -> int:
        """How many slots the brokers count, also of connections that have ended."""
        ledgers = [host.ledger for host in self.hosts if host.ledger is not None]
        return self.in_use() + sum(ledger.leases for ledger in ledgers)

    def server_notices(self) -> None:
        """Backends end whose clients have left."""
        for proc in list(self.server.procs):
            host = next(host for host in self.hosts if host.name == proc.host)
            if proc.left and not host.cut:
                self.server.end(proc)
                if proc.is_broker and (host.session is None or host.session.dead):
                    host.lost_at = host.lost_at or self.now

    # --- faults

    def lose_session(self, host: Host) -> None:
        """An administrator, or a middlebox, ends a broker's session."""
        if host.session is not None and not host.session.dead and not host.cut:
            self.server.end(host.session)
            host.lost_at = host.lost_at or self.now

    def thaw(self, host: Host) -> None:
        if host.frozen:
            host.frozen = False
            if host.ledger is not None:
                host.ledger.process_was_suspended(self.now)
                host.ledger.sharing.trust.suspended(self.now)

    def kill_host(self, host: Host) -> None:
        """All its processes end at once; its instance and journal are lost with it."""
        host.kill_broker(journal_lost=True)
        for worker in host.workers:
            for held in worker.leases.values():
                if held.proc is not None:
                    held.proc.left = True
            worker.leases.clear()
            worker.pending.clear()
        host.dead, host.frozen = True, False

    def start_host(self, host: Host) -> None:
        if host.dead:
            host.dead, host.journal_intact = False, True
            host.instance = f"{host.instance}'"
            host.lost_at = None
            host.start_broker()

    def restart_server(self, *, crashed: bool) -> None:
        if self.server.up:
            self.stop_server()
        self.server.start(self.now, crashed=crashed)

    def stop_server(self) -> None:
        self.server.stop()

    # --- time

    def pass_time(self, seconds: float, *, prompt: bool) -> None:
        """Let time pass. `prompt`: brokers and the server do everything as it falls due."""
        until = self.now + seconds
        while True:
            for host in self.hosts:
                if not host.cut:
                    self._notice_loss(host)
            if prompt:
                self.brokers_work()
            if self.now >= until:
                return
            deadlines = [
                deadline
                for host in self.hosts
                if host.ledger is not None
                and host.runs
                and (deadline := host.ledger.next_deadline()) is not None
            ]
            self.now = min(
                until, self.now + BEAT_S, max(self.now + 0.05, min(deadlines, default=until))
            )
            for host in self.hosts:
                host.tick()
                for worker in host.workers if host.runs else ():
                    if self.now - worker.heard_at >= BEAT_S:
                        worker.beat()

    @staticmethod
    def _notice_loss(host: Host) -> None:
        """The end of a session is seen at once, unless the network is cut."""
        if host.runs and host.session is not None and host.session.dead:
            host.notice_loss()
            while host.words:
                host.hear()

    def brokers_work(self) -> None:
        """All that is due now is done."""
        for _ in range(50):
            self.server_notices()
            busy = False
            for host in self.hosts:
                host.listen()
                busy |= bool(host.orders) and host.reaches_server
                host.run_order()
                while host.words and host.runs:
                    busy = True
                    host.hear()
                host.work()
            if not busy:
                return
        raise AssertionError("the brokers do not come to rest")

    def workers_work(self) -> bool:
        """Connects come to their ends; nobody checks anything in."""
        moved = False
        for host in self.hosts:
            for worker in host.workers if host.runs else ():
                if host.ledger is not None and not worker.epoch:
                    worker.hello()
                if not host.cut:
                    worker.notice_ends()
                for held in worker.of(Phase.CONNECTING):
                    if held.proc is not None:
                        worker.opened(held)
                    elif held.began_at < math.inf:
                        worker.arrive(held)
                    else:
                        worker.connect(held)
                    moved |= not host.cut
        return moved

    def settle(self) -> None:
        """Everything under way comes to its end, in no time."""
        for _ in range(50):
            self.brokers_work()
            if not self.workers_work():
                return
        raise AssertionError("no rest")
