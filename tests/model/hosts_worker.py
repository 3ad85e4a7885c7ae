"""One process on one of several hosts: it speaks to its broker at once, and connects."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from tests.model.hosts_server import Proc

if TYPE_CHECKING:
    from tests.model.hosts import Host

TTL_S = 15.0
POOL, DATABASE = "p", "app"


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
