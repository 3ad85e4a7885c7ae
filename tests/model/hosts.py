"""Many hosts that share one limit: brokers with the real ledger, plain workers, and one server.

A sync runs the product's own decision (`share_sync.py`). What is simulated is what surrounds it:
the transaction, which may be lost before or after its commit, the sessions, NOTIFYs, and time.

The rest of the worker and of the channel has a model of its own (`worker.py`); here messages
between a worker and its broker arrive at once.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

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
from sharedpool.broker.core.share_sync import OLD_S, decide_sync, look_every_s
from sharedpool.broker.core.share_terms import Failed, ShareKey, SyncFailure, SyncResult, Wakeup
from sharedpool.broker.core.shares import HostShare
from sharedpool.wire.application_name import tag_of
from sharedpool.wire.messages import (
    START_UP_LIMIT_S,
    ToBroker,
)
from sharedpool.wire.values import Token
from tests.model.hosts_server import Proc
from tests.model.hosts_worker import DATABASE, POOL, TTL_S, Held, Worker

if TYPE_CHECKING:
    from tests.model.hosts_world import World

# A worker's connect reaches the server so soon after its broker's session has ended, or not at all:
# the product's assumption about hosts that go without a word (`host_presence.py`).
REACH_S = GONE_S - 0.1


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
        self.results: dict[ShareKey, SyncResult] = {}  # of the last syncs in this session
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
        result, presence = self.results.get(key), self.presence
        age_s, again_s = now - self.looked_at, math.inf if result is None else result.again_s
        if age_s > look_every_s(result) or age_s >= again_s:
            presence.seen(*server.sessions(), now)
            self.looked_at = now
        elif age_s > OLD_S:
            presence = Presence()
        if server.limit is None:
            server.limit, server.asked = order.max_conn, 0
        rows = server.listed(now)
        before = server.hosts
        decision = decide_sync(self.instance, order, server.limit_row(now), rows, presence)
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
        result = self.results[key] = decision.result
        self.known[key] = tuple(host.instance for host in result.others)
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
        self.results = {}
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
