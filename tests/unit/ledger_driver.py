"""A real ledger, driven message by message with a clock of its own, and workers as the wire sees
them."""

from __future__ import annotations

from typing import Any, TypeVar

from sharedpool.broker.core.commands import Command, PassOn, Send, SurveyResult, SurveyServer
from sharedpool.broker.core.ledger import Ledger
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.broker.core.slots import Slots
from sharedpool.wire.admin import Done, Order, OrderKind
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Acquire,
    Confirm,
    Deny,
    Grant,
    Hello,
    Recall,
    Release,
    ReleaseReason,
    Renew,
    ToBroker,
)
from sharedpool.wire.values import NO_TOKEN, Backend, LeaseReport, Phase, PoolSpec, Token

M = TypeVar("M")
TTL_S = 15.0
EPOCH = 5


class Broker:
    """A ledger with a clock, and the commands that it has returned so far."""

    checks = True  # of the ledger's invariants, after every step

    def __init__(self, epoch: int = EPOCH, **options: float) -> None:
        options.setdefault("ttl_s", TTL_S)
        self.ledger = Ledger(epoch, **options)  # type: ignore[arg-type]
        self.now = 1000.0
        self.commands: list[Command] = []
        if options.get("has_control_connection", True):
            self.take_in(self.ledger.control.reached(self.now, direct=True, fault=""))

    @property
    def slots(self) -> Slots:
        """The ledger's records: its pools, sessions and leases."""
        return self.ledger._slots

    def take_in(self, commands: list[Command]) -> list[Command]:
        if self.checks:
            self.ledger.check_invariants()
        self.commands += commands
        return commands

    def send(self, session: bytes, message: ToBroker) -> list[Command]:
        return self.take_in(self.ledger.handle(session, message, self.now))

    def pass_time(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.take_in(self.ledger.tick(self.now))

    def show_nothing(self) -> None:
        """Let the server be looked at until nothing of what is in quarantine can be left."""
        for _ in range(2):
            look = self.all(SurveyServer)[-1]
            self.take_in(
                self.ledger.control.surveyed(SurveyResult(look.serial, frozenset(), {}), self.now)
            )
            self.pass_time(SETTLE_S * 1.01)

    def all(self, kind: type[M]) -> list[M]:
        """Every command, or message sent, of this type."""
        messages = [each.message if isinstance(each, Send) else each for each in self.commands]
        return [each for each in messages if isinstance(each, kind)]

    def worker(self, name: str, pool: str = "p", *, max_conn: int = 2, **spec: Any) -> Worker:
        worker = Worker(
            self, name, PoolSpec(pool, max_conn, spec.pop("expiration_ms", 60_000), **spec)
        )
        worker.hello()
        return worker


class Worker:
    """One session, as the wire sees it: it holds what it says it holds."""

    def __init__(self, broker: Broker, name: str, spec: PoolSpec) -> None:
        self.broker, self.name, self.spec = broker, name, spec
        self.id = name.encode()
        self.requests = 0
        self.seen = NO_TOKEN
        self.held: dict[Token, Phase] = {}
        self.ages: dict[Token, int] = {}
        self.moves: dict[Token, int] = {}  # of each lease, when it came
        self.pending: list[int] = []

    def sent(self, kind: type[M], *, since: int = 0) -> list[M]:
        return [
            each.message
            for each in self.broker.commands[since:]
            if isinstance(each, Send) and each.session == self.id and isinstance(each.message, kind)
        ]

    def last(self, kind: type[M]) -> M:
        return self.sent(kind)[-1]

    def reports(self) -> list[LeaseReport]:
        return [
            LeaseReport(
                token,
                phase,
                self.ages.get(token, 0),
                "T1",
                self.backend(token),
                moves=self.moves.get(token, 0),
            )
            for token, phase in self.held.items()
        ]

    @staticmethod
    def backend(token: Token) -> Backend:
        return Backend(1000 + token.serial, 1, 1, direct=True)

    def hello(self, version: int = PROTOCOL_VERSION, first: Acquire | None = None) -> list[Command]:
        pid = 100 + sum(self.id)
        hello = Hello(
            version, pid, "", self.name, self.spec, self.reports(), self.seen, first=first
        )
        return self.broker.send(self.id, hello)

    def ask(self, wait_s: float = 0.0) -> int:
        self.requests += 1
        self.pending.append(self.requests)
        self.broker.send(self.id, Acquire(self.requests, int(wait_s * 1000)))
        return self.requests

    def outcome(self, request: int) -> Token | Deny | None:
        """Return the newest answer to a request: the lease's token, the denial, or None."""
        for each in reversed(self.broker.commands):
            if not isinstance(each, Send) or each.session != self.id:
                continue
            message = each.message
            if isinstance(message, Grant | Deny) and message.request == request:
                if request in self.pending:
                    self.pending.remove(request)
                return message.token if isinstance(message, Grant) else message
        return None

    def granted(self, request: int) -> Token:
        token = self.outcome(request)
        assert isinstance(token, Token), token
        self.seen = max(self.seen, token)
        return token

    def open(self, request: int) -> Token:
        token = self.granted(request)
        self.broker.send(self.id, Confirm(token, self.backend(token)))
        self.held[token] = Phase.IN_USE
        return token

    def lend(self) -> Token:
        return self.open(self.ask())

    def checkin(self, token: Token) -> None:
        """Into the cache: the broker is told nothing."""
        self.held[token] = Phase.IDLE

    def beat(self, answers: int = 0) -> list[Command]:
        came = {
            each.message.request
            for each in self.broker.all(PassOn)
            if each.message.token in self.held
        }
        self.pending = [request for request in self.pending if request not in came]
        return self.broker.send(
            self.id, Renew(self.reports(), self.seen, answers, list(self.pending))
        )

    def answer(self) -> list[Command]:
        """Answer the newest recall, giving up idle leases (the oldest first) as it asks."""
        recall = self.last(Recall)
        for token in [token for token, phase in self.held.items() if phase is Phase.IDLE][
            : recall.take
        ]:
            self.held[token] = Phase.CLOSING
        return self.beat(recall.serial)

    def release(
        self, token: Token, reason: ReleaseReason = ReleaseReason.TAKEN, *, gone: bool = True
    ) -> None:
        self.held.pop(token, None)
        self.broker.send(self.id, Release(token, gone, reason, self.backend(token)))


def order(
    broker: Broker, kind: OrderKind, pool: str = "", number: int = 0, token: Token = NO_TOKEN
) -> Done:
    done, commands = broker.ledger.order(
        Order(PROTOCOL_VERSION, kind, pool, number, token), broker.now
    )
    broker.take_in(commands)
    return done


def give_up_idle(worker: Worker) -> None:
    """Answer the newest recall, and give back what it takes."""
    worker.answer()
    for token in [token for token, phase in worker.held.items() if phase is Phase.CLOSING]:
        worker.release(token)
