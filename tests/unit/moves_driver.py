"""A contended pool whose connections may move past the broker, driven event by event."""

from __future__ import annotations

from typing import Any

import pytest

from sharedpool.broker.core.commands import Fence
from sharedpool.broker.core.records import Lease, Pool
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.board import SHELF
from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.messages import PROTOCOL_VERSION, Hello, Recall, Withdraw
from sharedpool.wire.reports import PoolReport
from sharedpool.wire.values import LeaseReport, Phase, Token
from tests.unit.desk_driver import Desk
from tests.unit.ledger_driver import Broker, Worker
from tests.unit.restarts import moved, successor

VERSION = PROTOCOL_VERSION
NOTHING = Order(VERSION, OrderKind.RESUME, "nobody's")
QUIET_S = 1.0  # nobody has asked for so long


class Rig:
    """A pool of some workers, each with a connection, that is contended; its lane's board; what is
    in its wait sockets.
    """

    def __init__(
        self, broker: Broker | None = None, *, workers: int = 2, max_conn: int = 2, **spec: Any
    ) -> None:
        self.broker = broker or Broker(handover=True)
        self.desk = Desk(self.broker)
        self.workers = [
            self.broker.worker(f"w{n}", max_conn=max_conn, **spec) for n in range(workers)
        ]
        self.board = self.desk.board()
        self.tokens = [self.desk.lend(each) for each in self.workers[:max_conn]]

    @property
    def pool(self) -> Pool:
        return self.broker.slots.pools["p"]

    def lease(self, token: Token) -> Lease:
        return self.broker.slots.leases[token]

    def state(self, token: Token) -> SlotState:
        return self.desk.state(token)

    def number(self, worker: Worker) -> int:
        return self.broker.slots.sessions[worker.id].member_number

    def holder_of(self, token: Token) -> str:
        """Return the name of who holds a lease by the records, "shelf" for nobody."""
        session = self.lease(token).session
        return "shelf" if session.shelf else session.id.decode()

    def cancels_work(self) -> None:
        """Have a cancel seen to work: else nothing may move."""
        self.broker.slots.pools["p"].cancel_works = True

    def open_lane(self) -> None:
        """Let everybody in, and have a connection passed on by the broker, for which a cancel is
        seen to work."""
        for worker in self.workers:
            self.desk.join(worker)
        giver, taker = self.workers[0], self.workers[-1]
        self.desk.ask(taker, place=0)
        self.desk.give(giver, self.tokens[0])
        self.cancels_work()
        heir = self.desk.passed()[-1][1].token
        self.tokens[0] = heir
        taker.held[heir] = Phase.IN_USE
        taker.seen = max(taker.seen, heir)
        for worker in self.workers:
            worker.beat()

    def join(self, worker: Worker) -> None:
        self.broker.take_in(self.broker.ledger.lanes.joined(worker.id, self.broker.now))

    def contend(self, worker: Worker | None = None, *, place: int = 1) -> int:
        return self.desk.ask(worker or self.workers[0], place=place, wait_s=500.0)

    def give_up(self) -> None:
        """Have nobody wait at the broker any more."""
        for worker in self.workers:
            worker.beat()  # what has come is not waited for
            while worker.pending:
                self.broker.send(worker.id, Withdraw(worker.pending.pop()))

    def proceed(self) -> None:
        """Let connections move."""
        self.open_lane()
        self.contend()
        if not self.moving:  # holders are asked first, whether something lies idle
            self.answer_all()
            self.contend(place=2)
        assert self.moving

    def answer_all(self) -> None:
        for worker in self.workers:
            if worker.sent(Recall):
                worker.answer()

    @property
    def moving(self) -> bool:
        return self.board.moving

    def moves_itself(self, token: Token, to: Worker | None, *, arrives: bool = True) -> None:
        """Have a connection move past the broker: to a worker, or to the shelf."""
        for worker in self.workers:
            worker.held.pop(token, None)
        holder = SHELF if to is None else self.number(to)
        moves = self.board.set_holder(self.lease(token).cell, holder)
        if to is not None:
            to.moves[token] = moves
            if arrives:
                to.held[token] = Phase.IN_USE

    def sync(self) -> None:
        self.broker.ledger.report(self.broker.now)

    def halt(self) -> None:
        """Have them halt, with those who wait at the broker waiting on."""
        self.pool.cancel_works = None
        self.broker.take_in(self.broker.ledger.order(NOTHING, self.broker.now)[1])
        assert not self.moving

    def take_from_shelf(self, token: Token) -> None:
        """Have the broker find what lies on the shelf."""
        cell = self.lease(token).cell
        moves = self.board.set_holder(cell, SHELF)
        lain = Moved(0, token, cell, moves, self.live(token))
        self.broker.take_in(self.broker.ledger.lanes.found_on_shelf("p", lain, self.broker.now))

    def passed_by_broker(self, giver: Worker, token: Token) -> Token:
        """Give a connection to the broker, which passes it on; return the name of it then."""
        self.halt()
        self.desk.give(giver, token)
        return self.desk.passed()[-1][1].token

    def report(self) -> PoolReport:
        return self.broker.ledger.report(self.broker.now)[0][0]

    def live(self, token: Token) -> Live:
        return Live(Worker.backend(token), self.board.generation, b"parameters")

    def beat_all(self) -> None:
        for worker in self.workers:
            worker.beat()

    def fenced(self) -> list[Token]:
        return [fence.token for fence in self.broker.all(Fence)]


@pytest.fixture
def rig() -> Rig:
    return Rig(workers=3)


def restarted(rig: Rig) -> Rig:
    """Let another broker take over, with the journal of the one that was killed."""
    after = object.__new__(Rig)
    after.broker = successor(rig.broker)
    after.desk, after.board, after.tokens = Desk(after.broker), rig.board, rig.tokens
    after.workers = [moved(worker, after.broker) for worker in rig.workers]
    return after


def say_hello(rig: Rig, worker: Worker, moves: dict[Token, int]) -> None:
    """Register, saying how often what is held has moved."""
    reports = [
        LeaseReport(token, phase, 0, "T1", worker.backend(token), moves=moves.get(token, 0))
        for token, phase in worker.held.items()
    ]
    rig.broker.send(
        worker.id, Hello(VERSION, 100, "", worker.name, worker.spec, reports, worker.seen)
    )
