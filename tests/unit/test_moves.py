"""The ledger's side of the lane: when connections move past the broker, and what it makes of what
the board says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sharedpool.broker.core.commands import (
    Admit,
    CancelBackend,
    CloseLane,
    Dismiss,
    Fence,
    GiveInLane,
    HaltMoves,
    InviteToLane,
    JoinQueue,
    Member,
    OpenLane,
    Record,
    Send,
    StartMoves,
)
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.handover import SHARED_S
from sharedpool.broker.core.lane_members import ARRIVAL_S
from sharedpool.broker.core.recalls import ANSWER_LIMIT_S
from sharedpool.broker.core.records import Lease, Pool
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.board import BROKER_PLACE, BROKER_REQUEST, MOVES, PLACES, SESSIONS, SHELF
from sharedpool.wire.buckets import BUCKETS
from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Bye,
    CancelQuery,
    Deny,
    DenyReason,
    Hello,
    Recall,
    Release,
    ReleaseReason,
    Renew,
    Stale,
    Welcome,
    Withdraw,
)
from sharedpool.wire.reports import PoolReport
from sharedpool.wire.values import Histogram, LeaseReport, Phase, PoolSpec, Timings, Token
from tests.unit.desk_driver import Desk
from tests.unit.ledger_driver import EPOCH, Broker, Worker
from tests.unit.restarts import journal_of, members_of, moved, successor

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
        self.board.set_holder(self.lease(token).cell, SHELF if to is None else self.number(to))
        if to is not None and arrives:
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


# --- a lane


def test_a_lane_is_made_for_the_first_waiter(rig: Rig) -> None:
    assert rig.broker.all(OpenLane) == []
    rig.workers[2].ask(9.0)
    assert rig.broker.all(OpenLane) == [OpenLane("p", 1)]
    rig.desk.ask(rig.workers[0], place=8)
    rig.desk.give(rig.workers[1], rig.tokens[1])
    assert rig.broker.all(OpenLane) == [OpenLane("p", 1)]  # it is ordered


def test_each_session_with_handover_joins_under_a_number_and_an_index_of_its_own(rig: Rig) -> None:
    rig.broker.worker("elsewhere")  # of the same pool
    rig.open_lane()
    late = rig.broker.worker("late")
    let_in = rig.broker.all(InviteToLane)
    assert [each.session for each in let_in] == [b"w0", b"w1", b"w2", b"elsewhere", late.id]
    assert [each.member_number for each in let_in] == [1, 2, 3, 4, 5]
    assert sorted(each.index for each in let_in) == [0, 1, 2, 3, 4]
    late.hello()
    assert rig.broker.all(InviteToLane) == let_in  # once


def test_a_session_without_handover_does_not_join() -> None:
    broker = Broker(handover=True)
    rig = Rig(broker, workers=3)
    rig.open_lane()
    stranger = Worker(broker, "s", PoolSpec("p", 2, 60_000, server="another"))
    stranger.hello()
    assert [each for each in broker.all(InviteToLane) if each.session == b"s"] == []


def test_an_index_is_used_again_a_number_never(rig: Rig) -> None:
    rig.open_lane()
    gone = next(each for each in rig.broker.all(InviteToLane) if each.session == b"w1")
    rig.board.take_place(gone.index * PLACES + 3, 77)
    rig.broker.take_in(rig.broker.ledger.session_died(b"w1", rig.broker.now))
    assert not rig.board.is_waiting_at(gone.index * PLACES + 3, 77)  # its ticket is stale
    rig.broker.worker("new")
    (let_in,) = [each for each in rig.broker.all(InviteToLane) if each.session == b"new"]
    assert let_in.index == gone.index
    assert let_in.member_number == 4


def test_the_last_index_is_the_brokers() -> None:
    assert BROKER_PLACE // PLACES == SESSIONS - 1
    broker = Broker(handover=True)
    rig = Rig(broker, workers=3)
    rig.open_lane()
    lane = broker.slots.pools["p"].lane
    assert lane is not None
    lane.indices |= set(range(SESSIONS - 1))
    broker.worker("late")
    assert [each for each in broker.all(InviteToLane) if each.session == b"late"] == []


def test_in_a_pool_with_max_waiting_the_broker_passes_connections_on() -> None:
    """Nobody counts who waits in the lane's own queue."""
    rig = Rig(workers=2, max_waiting=5)
    rig.open_lane()
    rig.contend()
    rig.answer_all()
    rig.contend(place=2)
    assert not rig.moving
    rig.desk.give(rig.workers[1], rig.tokens[1])
    assert len(rig.desk.passed()) == 2


def test_a_lane_of_a_discarded_pool_does_not_serve_a_new_pool_of_its_name(rig: Rig) -> None:
    rig.workers[2].ask(9.0)
    for worker in rig.workers:
        rig.broker.take_in(rig.broker.ledger.session_died(worker.id, rig.broker.now))
    for token in rig.fenced():
        rig.broker.take_in(rig.broker.ledger.backend_gone(token, rig.broker.now))
    a, b = (rig.broker.worker(name, max_conn=1) for name in "ab")
    a.lend()
    b.ask(9.0)
    assert rig.broker.all(OpenLane) == [OpenLane("p", 1), OpenLane("p", 2)]
    for serial in (1, 2):
        assert rig.pool.lane is None
        rig.broker.take_in(rig.broker.ledger.lanes.opened("p", serial, rig.board, rig.broker.now))
    assert rig.pool.lane is not None
    assert rig.broker.all(CloseLane) == []


def test_a_lane_ends_with_its_last_session(rig: Rig) -> None:
    rig.open_lane()
    for worker in rig.workers:
        for token in list(worker.held):
            worker.release(token)
        assert rig.broker.all(CloseLane) == []
        rig.broker.send(worker.id, Bye(worker.seen))
    assert rig.broker.all(CloseLane) == [CloseLane("p")]
    assert rig.broker.ledger.leases == 0
    rig.broker.commands.clear()
    Rig(rig.broker, workers=3).open_lane()  # in which nothing is left of the former


def test_a_lane_that_is_opened_after_its_pool_has_gone_is_closed(rig: Rig) -> None:
    rig.workers[2].ask(9.0)
    for worker in rig.workers:
        rig.broker.take_in(rig.broker.ledger.session_died(worker.id, rig.broker.now))
    for token in rig.fenced():
        rig.broker.take_in(rig.broker.ledger.backend_gone(token, rig.broker.now))
    rig.broker.take_in(rig.broker.ledger.lanes.opened("p", 1, rig.board, rig.broker.now))
    assert rig.broker.all(CloseLane) == [CloseLane("p")]


def test_while_connections_move_the_workers_report_the_waits(rig: Rig) -> None:
    rig.proceed()
    a = rig.workers[0]
    nothing = Histogram([0] * BUCKETS, 0)
    many = Histogram([0, 0, 0, 0, 200] + [0] * (BUCKETS - 5), 0)
    times = Timings(1, nothing, many, nothing)
    rig.broker.send(a.id, Renew(a.reports(), a.seen, pending=list(a.pending), times=times))
    assert 5000 < rig.report().wait_p50_us < rig.report().wait_p99_us <= 10_000


# --- when connections move


def test_connections_move_while_a_thread_waits_and_the_broker_has_nothing_else_to_do(
    rig: Rig,
) -> None:
    rig.open_lane()
    assert not rig.moving
    rig.contend()
    rig.answer_all()
    rig.contend(place=2)
    assert rig.moving
    assert rig.broker.all(StartMoves) == [StartMoves("p")]
    assert [rig.board.find(token) >= 0 for token in rig.tokens] == [True, True]
    assert [rig.board.holding(rig.lease(t).cell).holder for t in rig.tokens] == [
        rig.number(rig.workers[2]),
        rig.number(rig.workers[1]),
    ]


def test_the_generation_is_on_the_board(rig: Rig) -> None:
    rig.proceed()
    assert rig.board.generation == 1
    rig.broker.take_in(
        rig.broker.ledger.order(Order(VERSION, OrderKind.RECONNECT, "p"), rig.broker.now)[1]
    )
    assert rig.workers[1].last(Stale).generation == 2
    assert rig.board.generation == 2


def test_a_request_at_the_broker_takes_its_turn_in_the_lane(rig: Rig) -> None:
    rig.open_lane()
    rig.contend(place=1)
    rig.answer_all()
    rig.contend(rig.workers[1], place=2)
    assert rig.moving
    assert rig.board.is_waiting_at(BROKER_PLACE, BROKER_REQUEST)
    assert sum(each.times for each in rig.broker.all(JoinQueue)) == 2
    rig.contend(rig.workers[1], place=3)
    assert sum(each.times for each in rig.broker.all(JoinQueue)) == 3


def test_the_broker_passes_a_given_connection_to_its_first_waiter(rig: Rig) -> None:
    rig.proceed()
    queued = sum(each.times for each in rig.broker.all(JoinQueue))
    token = rig.tokens[0]
    rig.moves_itself(token, None)
    passed = len(rig.desk.passed())
    cell = rig.lease(token).cell
    came = Moved(BROKER_REQUEST, token, cell, rig.board.holding(cell).moves, rig.live(token))
    rig.broker.take_in(rig.broker.ledger.lanes.received("p", came, rig.broker.now))
    assert [name for name, _ in rig.desk.passed()[passed:]] == ["w0"]
    assert rig.state(token) is SlotState.FREE  # its heir has it
    assert queued - sum(each.times for each in rig.broker.all(JoinQueue)) == 0


def test_the_broker_puts_a_given_connection_without_a_waiter_back_into_the_lane(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    token = rig.tokens[0]
    rig.moves_itself(token, None)
    cell = rig.lease(token).cell
    came = Moved(BROKER_REQUEST, token, cell, rig.board.holding(cell).moves, rig.live(token))
    rig.broker.take_in(rig.broker.ledger.lanes.received("p", came, rig.broker.now))
    assert rig.broker.all(GiveInLane) == [GiveInLane("p", token, cell, rig.live(token))]
    assert rig.holder_of(token) == "shelf"
    rig.broker.take_in(
        rig.broker.ledger.lanes.full("p", came, rig.broker.now)
    )  # there is no room in it
    rig.sync()
    assert rig.report().parked == 1


def test_a_request_without_a_wait_gets_the_connection_on_the_shelf(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    token = rig.tokens[0]
    rig.moves_itself(token, None)
    looks, passed = (
        sum(each.most_from_shelf for each in rig.broker.all(JoinQueue)),
        len(rig.desk.passed()),
    )
    worker = rig.workers[0]
    rig.desk.ask(worker, place=3, wait_s=0)
    rig.answer_all()
    assert worker.sent(Deny) == []
    assert sum(each.most_from_shelf for each in rig.broker.all(JoinQueue)) > looks
    rig.board.set_holder(rig.lease(token).cell, SHELF)  # which is the broker's own name
    there = Moved(0, token, rig.lease(token).cell, 0, rig.live(token))
    rig.broker.take_in(rig.broker.ledger.lanes.found_on_shelf("p", there, rig.broker.now))
    assert [name for name, _ in rig.desk.passed()[passed:]] == ["w0"]


def test_a_request_without_a_wait_is_refused_if_the_shelf_is_empty(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    rig.desk.ask(rig.workers[0], place=3, wait_s=0)
    rig.answer_all()
    assert [each.reason for each in rig.workers[0].sent(Deny)] == [DenyReason.EXHAUSTED]


def test_a_request_to_the_broker_has_the_shelf_looked_at(rig: Rig) -> None:
    rig.proceed()
    looks = sum(each.most_from_shelf for each in rig.broker.all(JoinQueue))
    rig.contend(rig.workers[1], place=3)
    assert sum(each.most_from_shelf for each in rig.broker.all(JoinQueue)) > looks


def test_a_place_that_waits_for_nobody_is_not_counted(rig: Rig) -> None:
    """Its ticket may have been lost with the giver; another is written a while later."""
    rig.proceed()
    queued = sum(each.times for each in rig.broker.all(JoinQueue))
    for _ in range(3):
        rig.board.count_request()
        rig.broker.pass_time(QUIET_S * 1.01)
        rig.beat_all()
    assert sum(each.times for each in rig.broker.all(JoinQueue)) > queued


def _suspect_a_silent_holder(rig: Rig) -> None:
    for _ in range(32):
        rig.board.count_request()
        rig.broker.pass_time(QUIET_S * 0.5)
        rig.workers[0].beat()
        rig.workers[2].beat()
        if not rig.moving:
            break
    assert rig.state(rig.tokens[1]) is SlotState.SUSPECT


def _reserve_in_a_group(rig: Rig) -> None:
    groups = {"g": GroupTerms(reserved=1)}
    rig.broker.take_in(rig.broker.ledger.configure(2, groups, {}, rig.broker.now))


def _order(kind: OrderKind, *target: str | int) -> Callable[[Rig], object]:
    def order(rig: Rig) -> None:
        message = Order(VERSION, kind, *target)  # type: ignore[arg-type]
        rig.broker.take_in(rig.broker.ledger.order(message, rig.broker.now)[1])

    return order


def _set(**attributes: object) -> Callable[[Rig], object]:
    """Set attributes of the pool, which the next heartbeat makes the ledger look at."""

    def set_(rig: Rig) -> None:
        for name, value in attributes.items():
            setattr(rig.pool, name, value)
        rig.workers[0].beat()

    return set_


def _hold_back_connects(rig: Rig) -> None:
    rig.pool.backoff.failed(Token(1, 99), 1, "down", rig.broker.now)
    rig.workers[0].beat()


HALTING: dict[str, Callable[[Rig], object]] = {
    "slot": lambda rig: rig.broker.take_in(
        rig.broker.ledger.backend_gone(rig.tokens[1], rig.broker.now)
    ),
    "suspect": _suspect_a_silent_holder,
    "paused": _order(OrderKind.PAUSE, "p"),
    "held": _order(OrderKind.PAUSE),
    "lowered": _order(OrderKind.LIMIT, "p", 1),
    "drain": lambda rig: rig.broker.take_in(rig.broker.ledger.drain(rig.broker.now)),
    "groups": _reserve_in_a_group,
    "cap": lambda rig: rig.broker.worker("o", "other").ask(9.0),
    "backoff": _hold_back_connects,
    "quiet": lambda rig: rig.broker.pass_time(QUIET_S * 1.01),
    "cancels": _set(cancel_works=None),
    "unsuitable": _set(unsuitable="its server loses sessions"),
}


@pytest.mark.parametrize("why", HALTING)
def test_moves_halt_as_soon_as_the_broker_has_something_else_to_do(why: str) -> None:
    cap = 2 if why in ("groups", "cap") else None
    broker = Broker(handover=True, **({} if cap is None else {"max_conn": cap}))
    rig = Rig(broker, workers=3)
    rig.proceed()
    if why in ("slot", "suspect", "quiet"):  # otherwise the broker would serve its own waiter
        rig.give_up()
        assert rig.moving
    HALTING[why](rig)
    assert not rig.moving
    assert broker.all(HaltMoves) == [HaltMoves("p")]
    assert not rig.board.is_waiting_at(BROKER_PLACE, BROKER_REQUEST)
    assert len(broker.all(StartMoves)) == 1


@pytest.mark.parametrize("why", ["outside", "cancels", "paused", "capped", "backoff"])
def test_moves_do_not_begin_while_the_broker_has_something_else_to_do(why: str) -> None:
    broker = Broker(handover=True, max_conn=2) if why == "capped" else Broker(handover=True)
    rig = Rig(broker, workers=3)
    rig.open_lane()
    if why == "outside":  # its connections would never be seen in the lane
        outsider = Worker(broker, "s", PoolSpec("p", 2, 60_000, server="another"))
        outsider.hello()
        broker.take_in(broker.ledger.backend_gone(rig.tokens[1], broker.now))
        outsider.lend()
    elif why == "cancels":
        rig.pool.cancel_works = None
    elif why == "paused":
        broker.take_in(broker.ledger.order(Order(VERSION, OrderKind.PAUSE, "p"), broker.now)[1])
    elif why == "capped":
        broker.worker("o", "other").ask(9.0)
    elif why == "backoff":
        rig.pool.backoff.failed(Token(1, 99), 1, "down", rig.broker.now)
    rig.contend()
    rig.answer_all()
    rig.contend(place=2)
    rig.answer_all()
    assert not rig.moving
    assert broker.all(StartMoves) == []


def test_under_a_cap_moves_go_on_beside_a_pool_that_wants_nothing_they_could_give() -> None:
    """A pool at its own limit, with slots left under the cap, or with nobody who waits."""
    broker = Broker(handover=True, max_conn=3)
    rig = Rig(broker, workers=3)
    other = broker.worker("o", "other", max_conn=1)
    other.lend()
    rig.proceed()
    other.ask(9.0)  # its own limit is what keeps it waiting
    assert rig.moving
    broker.take_in(broker.ledger.backend_gone(next(iter(other.held)), broker.now))
    assert rig.moving  # that slot was free for it
    assert broker.all(HaltMoves) == []


def test_under_a_cap_a_waiter_of_another_pool_halts_the_moves_and_gets_the_next_checkin() -> None:
    broker = Broker(handover=True, max_conn=2)
    rig = Rig(broker, workers=3)
    rig.proceed()
    rig.give_up()
    other = broker.worker("o", "other", max_conn=1)
    assert rig.moving
    request = other.ask(9.0)
    assert not rig.moving
    rig.answer_all()
    holder = next(worker for worker in rig.workers if rig.tokens[1] in worker.held)
    assert holder.last(Recall).returns_due == 1
    holder.release(rig.tokens[1], ReleaseReason.RETURN_DUE)
    assert isinstance(other.outcome(request), Token)


def test_under_a_cap_moves_begin_again_when_no_other_pool_waits() -> None:
    broker = Broker(handover=True, max_conn=2)
    rig = Rig(broker, workers=3)
    rig.proceed()
    other = broker.worker("o", "other", max_conn=1)
    request = other.ask(9.0)
    assert not rig.moving
    broker.send(other.id, Withdraw(request))
    rig.answer_all()
    rig.contend(place=3)
    rig.answer_all()
    assert rig.moving


def test_a_session_that_has_not_joined_delays_the_moves_until_it_joins(rig: Rig) -> None:
    rig.open_lane()
    late = rig.broker.worker("late")
    rig.broker.take_in(rig.broker.ledger.backend_gone(rig.tokens[1], rig.broker.now))
    token = rig.desk.lend(late)
    rig.contend()
    rig.answer_all()
    late.answer()
    rig.contend(place=2)
    assert not rig.moving
    rig.join(late)
    assert rig.moving
    assert rig.board.find(token) >= 0


def test_idle_connections_are_recalled_while_others_move(rig: Rig) -> None:
    rig.proceed()
    rig.workers[1].checkin(rig.tokens[1])
    rig.workers[1].beat()
    assert rig.workers[1].last(Recall).take == 1
    assert rig.moving


def test_moves_go_on_while_requests_come_now_and_then(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    for _ in range(5):
        rig.board.count_request()
        rig.broker.pass_time(QUIET_S * 1.01)
        rig.beat_all()
        assert rig.moving
    rig.broker.pass_time(QUIET_S * 1.01)
    assert not rig.moving


def test_moves_proceed_after_a_halt(rig: Rig) -> None:
    rig.proceed()
    rig.give_up()
    rig.broker.pass_time(QUIET_S * 1.01)
    assert not rig.moving
    rig.contend(place=3)
    rig.answer_all()
    rig.contend(place=4)
    assert rig.moving
    for _ in range(3):  # the watch for the end of it, too
        rig.broker.pass_time(QUIET_S * 1.01)
        rig.beat_all()
    rig.give_up()
    rig.broker.pass_time(QUIET_S * 1.01)
    assert not rig.moving


def test_when_moves_begin_the_waiters_decide_what_is_to_be_returned(rig: Rig) -> None:
    """Not by what was shared a while ago: no returns are due where others wait in the lane."""
    rig.proceed()
    assert rig.pool.shared_until <= rig.broker.now < rig.broker.now + SHARED_S


# --- what the board says


def test_a_lease_that_moves_is_its_receivers(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    handovers = rig.report().handovers
    rig.moves_itself(token, receiver)
    rig.moves_itself(token, rig.workers[2])
    rig.moves_itself(token, receiver)
    assert rig.report().handovers == handovers + 3  # also those that were not seen
    assert rig.holder_of(token) == "w0"
    _, sessions = rig.broker.ledger.report(rig.broker.now)
    assert [session.leases for session in sessions] == [1, 0, 1]
    (line,) = [x for x in rig.broker.ledger.oldest_leases(9, rig.broker.now) if x.token == token]
    assert (line.title, line.state) == ("w0", "in use")
    rig.broker.ledger.check_invariants()


def test_a_lease_on_the_shelf_is_nobodys_and_counts(rig: Rig) -> None:
    rig.proceed()
    rig.moves_itself(rig.tokens[1], None)
    pool = rig.report()
    assert (pool.leases, pool.idle) == (2, 1)
    assert rig.holder_of(rig.tokens[1]) == "shelf"
    _, sessions = rig.broker.ledger.report(rig.broker.now)
    assert [session.title for session in sessions] == ["w0", "w1", "w2"]  # the shelf is no worker
    assert rig.broker.ledger.sessions == 3
    rig.moves_itself(rig.tokens[1], rig.workers[0])
    rig.sync()
    assert rig.holder_of(rig.tokens[1]) == "w0"


def test_the_journal_has_the_next_holder_and_the_number_of_moves(rig: Rig) -> None:
    rig.proceed()
    rig.moves_itself(rig.tokens[1], rig.workers[0])
    rig.sync()
    rig.beat_all()
    entry = next(x for x in journal_of(rig.broker) if x.token == rig.tokens[1])
    assert (entry.session, entry.moves) == (b"w0", 1)
    assert entry.backend == Worker.backend(rig.tokens[1])


def test_the_journal_says_that_a_lease_may_move_before_it_moves(rig: Rig) -> None:
    """Else a later broker would take it from whoever has it by then, past this one."""
    rig.proceed()
    assert {entry.token: entry.moves for entry in journal_of(rig.broker)} == dict.fromkeys(
        rig.tokens, 0
    )


def test_without_a_move_nothing_is_journaled(rig: Rig) -> None:
    rig.proceed()
    before = len(rig.broker.all(Record))
    for _ in range(3):
        rig.sync()
        rig.beat_all()
    assert len(rig.broker.all(Record)) == before


def test_a_closing_lease_that_moved_is_open(rig: Rig) -> None:
    """The giver reports the lease as closing while its connection moves."""
    rig.proceed()
    token, giver = rig.tokens[1], rig.workers[1]
    giver.held[token] = Phase.CLOSING
    giver.beat()
    assert rig.state(token) is SlotState.CLOSING
    rig.moves_itself(token, rig.workers[0])
    rig.sync()
    assert rig.state(token) is SlotState.OPEN
    assert rig.pool.incoming == {}


def test_a_closing_lease_on_the_shelf_is_passed_on(rig: Rig) -> None:
    rig.proceed()
    token, giver = rig.tokens[1], rig.workers[1]
    giver.held[token] = Phase.CLOSING
    giver.beat()
    rig.moves_itself(token, None)
    rig.halt()
    passed = len(rig.desk.passed())
    rig.take_from_shelf(token)
    assert len(rig.desk.passed()) == passed + 1


def test_a_lease_given_by_a_silent_session_is_no_longer_suspect(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.give_up()
    for _ in range(31):
        rig.board.count_request()
        rig.broker.pass_time(0.5)
        rig.workers[0].beat()
        rig.workers[2].beat()
    assert rig.state(token) is SlotState.SUSPECT
    rig.moves_itself(token, rig.workers[0])  # the stopped worker goes on, and gives it
    rig.contend(rig.workers[2], place=3)
    assert rig.state(token) is SlotState.OPEN
    assert rig.fenced() == []


def test_a_lease_given_to_a_silent_session_is_suspect(rig: Rig) -> None:
    """The receiver was stopped while it waited, unseen by the giver.

    The next waiter gets the slot.
    """
    rig.proceed()
    token, stopped = rig.tokens[1], rig.workers[2]
    rig.give_up()
    for _ in range(31):
        rig.board.count_request()
        rig.broker.pass_time(0.5)
        rig.workers[0].beat()
        rig.workers[1].beat()
    assert rig.state(rig.tokens[0]) is SlotState.SUSPECT  # the stopped worker's own lease
    rig.moves_itself(token, stopped, arrives=False)
    rig.contend(rig.workers[0], place=3)
    rig.contend(rig.workers[0], place=4)
    assert set(rig.fenced()) == set(rig.tokens)


# --- what nobody speaks of


def test_a_receiver_that_confirms_keeps_the_lease(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver)
    receiver.beat()
    assert receiver.last(Ack).revoked == []
    assert not rig.lease(token).unconfirmed
    for _ in range(5):
        rig.broker.pass_time(ARRIVAL_S)
        rig.beat_all()
    assert rig.fenced() == []
    assert rig.holder_of(token) == "w0"


def test_a_connection_that_has_not_arrived_is_asked_for_and_ended_a_quarter_of_a_second_later(
    rig: Rig,
) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    asked = len(receiver.sent(Recall))
    receiver.beat()  # it may be on its way still
    assert len(receiver.sent(Recall)) == asked + 1
    assert rig.fenced() == []
    receiver.answer()
    assert rig.fenced() == []  # not before
    rig.broker.pass_time(ARRIVAL_S * 0.9)
    receiver.answer()
    assert rig.fenced() == []
    rig.broker.pass_time(ARRIVAL_S * 0.2)
    assert len(receiver.sent(Recall)) == asked + 2
    assert rig.fenced() == []
    receiver.answer()
    assert rig.fenced() == [token]


def test_a_connection_that_a_thread_may_be_receiving_is_not_ended(rig: Rig) -> None:
    """It has read it and not said so yet: of many threads each may be held up for long."""
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.beat()
    for _ in range(8):
        rig.broker.pass_time(ARRIVAL_S * 1.1)
        answers = receiver.last(Recall).serial
        renew = Renew(
            receiver.reports(), receiver.seen, answers, list(receiver.pending), unsure=True
        )
        rig.broker.send(receiver.id, renew)
    assert rig.fenced() == []
    for _ in range(2):
        rig.broker.pass_time(ARRIVAL_S * 1.1)
        receiver.answer()
    assert rig.fenced() == [token]


@pytest.mark.parametrize("asked", [False, True])
def test_an_arrived_connection_that_a_thread_is_receiving_is_not_ended(
    rig: Rig, asked: bool
) -> None:
    """It was listed while nobody had read it, and is listed again once it is taken in.

    Between the two it is not.
    """
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    if asked:
        receiver.beat()
    receiver.held[token] = Phase.CONNECTING
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    receiver.answer() if asked else receiver.beat()
    del receiver.held[token]
    rig.broker.send(
        receiver.id, Renew(receiver.reports(), receiver.seen, 0, list(receiver.pending))
    )
    assert rig.fenced() == []
    receiver.held[token] = Phase.IN_USE
    receiver.answer()
    assert rig.fenced() == []
    assert not rig.lease(token).unconfirmed


def test_an_arrived_connection_that_is_then_lost_is_ended(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.held[token] = Phase.CONNECTING
    receiver.beat()
    del receiver.held[token]
    receiver.beat()
    receiver.answer()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == []
    receiver.answer()
    assert rig.fenced() == [token]


def test_a_connection_that_arrives_late_but_in_time_is_not_ended(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.beat()
    receiver.answer()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    receiver.held[token] = Phase.IN_USE
    receiver.answer()
    assert rig.fenced() == []
    assert not rig.lease(token).unconfirmed


def test_a_question_that_was_lost_is_asked_again(rig: Rig) -> None:
    """A session that says HELLO again has forgotten the question."""
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.beat()
    asked = len(receiver.sent(Recall))
    receiver.hello()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    receiver.beat()
    assert len(receiver.sent(Recall)) == asked + 1
    receiver.answer()
    assert rig.fenced() == [token]


def test_a_session_that_did_not_answer_in_time_is_asked_again_when_it_speaks(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    receiver.beat()
    asked = len(receiver.sent(Recall))
    for _ in range(2):
        rig.board.count_request()
        rig.broker.pass_time(ANSWER_LIMIT_S * 1.1)
    receiver.beat()
    assert len(receiver.sent(Recall)) == asked + 1
    receiver.answer()
    assert rig.fenced() == [token]


def test_a_connection_that_never_reached_the_shelf_is_ended(rig: Rig) -> None:
    """The giver was stopped before it laid the connection on the shelf."""
    rig.proceed()
    rig.moves_itself(rig.tokens[1], None)
    rig.sync()
    rig.halt()
    assert rig.fenced() == []
    rig.broker.pass_time(ARRIVAL_S * 0.9)
    assert rig.fenced() == []
    rig.broker.pass_time(ARRIVAL_S * 0.2)
    assert rig.fenced() == [rig.tokens[1]]


def test_a_connection_that_never_reached_the_shelf_is_ended_after_a_halt(rig: Rig) -> None:
    """The giver had seen that connections move, and was stopped then."""
    rig.proceed()
    rig.halt()
    rig.broker.pass_time(ARRIVAL_S * 0.5)
    rig.moves_itself(rig.tokens[1], None)
    rig.beat_all()
    rig.broker.pass_time(ARRIVAL_S * 0.9)
    assert rig.fenced() == []
    rig.broker.pass_time(ARRIVAL_S * 0.2)
    assert rig.fenced() == [rig.tokens[1]]


def test_a_connection_on_the_shelf_is_passed_on_at_a_halt(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)
    passed = len(rig.desk.passed())
    rig.halt()
    rig.broker.pass_time(0.01)
    rig.take_from_shelf(token)
    assert len(rig.desk.passed()) == passed + 1
    rig.broker.pass_time(ARRIVAL_S * 2)
    assert rig.fenced() == []


def test_a_connection_from_the_shelf_without_a_waiter_is_parked(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.give_up()
    rig.moves_itself(token, None)
    rig.broker.pass_time(QUIET_S * 1.01)
    rig.take_from_shelf(token)
    rig.broker.pass_time(ARRIVAL_S * 2)
    assert (rig.report().parked, rig.fenced()) == (1, [])


def test_a_connection_on_the_shelf_that_no_request_takes_is_looked_for(rig: Rig) -> None:
    """It is on the shelf by the board, and was not found there."""
    rig.proceed()
    rig.give_up()
    rig.moves_itself(rig.tokens[1], None)
    for _ in range(5):
        rig.board.count_request()
        rig.broker.pass_time(QUIET_S * 1.01)
        rig.workers[0].beat()
        rig.workers[1].beat()
    assert not rig.moving
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == [rig.tokens[1]]


def test_when_a_giver_dies_its_receiver_is_asked(rig: Rig) -> None:
    rig.proceed()
    token, receiver = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, receiver, arrives=False)
    asked = len(receiver.sent(Recall))
    rig.broker.take_in(rig.broker.ledger.session_died(b"w1", rig.broker.now))
    assert len(receiver.sent(Recall)) == asked + 1
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    receiver.answer()
    assert rig.fenced() == [token]


def test_when_a_giver_dies_the_shelf_is_searched_for_its_connection(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)
    rig.broker.take_in(rig.broker.ledger.session_died(b"w1", rig.broker.now))
    assert not rig.moving
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == [token]


def test_a_dead_holders_lease_is_ended_at_once(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[0])
    rig.broker.take_in(rig.broker.ledger.session_died(b"w0", rig.broker.now))
    assert rig.fenced() == [token]


def test_a_lease_given_to_an_ended_session_is_ended(rig: Rig) -> None:
    rig.proceed()
    token, number = rig.tokens[1], rig.number(rig.workers[0])
    rig.broker.take_in(rig.broker.ledger.session_died(b"w0", rig.broker.now))
    rig.board.set_holder(rig.lease(token).cell, number)
    rig.sync()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == [token]
    assert rig.board.find(token) == -1


def test_a_lease_refused_by_an_ended_session_and_given_to_another_goes_on(rig: Rig) -> None:
    """The receiver's wait socket was gone; the giver saw it just after it had named
    the receiver."""
    rig.proceed()
    token, number, cell = rig.tokens[1], rig.number(rig.workers[0]), rig.lease(rig.tokens[1]).cell
    rig.broker.take_in(rig.broker.ledger.session_died(b"w0", rig.broker.now))
    rig.board.set_holder(cell, number)
    rig.sync()
    rig.moves_itself(token, rig.workers[2])
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    rig.beat_all()
    assert (rig.fenced(), rig.holder_of(token)) == ([], "w2")


@pytest.mark.parametrize("nonsense", [999, 0xFFFFFFFF])
def test_a_lease_given_to_a_number_that_never_was_is_ended(rig: Rig, nonsense: int) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.board.set_holder(rig.lease(token).cell, nonsense)
    rig.sync()
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    assert rig.fenced() == [token]


def test_a_session_that_is_forgotten_later_makes_no_other_suspect(rig: Rig) -> None:
    """By then its end is history: who speaks is asked as of now, and has the time to answer."""
    rig.proceed()
    receiver = rig.workers[0]
    rig.broker.take_in(rig.broker.ledger.session_died(b"w1", rig.broker.now))
    assert rig.fenced() == [rig.tokens[1]]
    for _ in range(8):
        rig.board.count_request()
        rig.broker.pass_time(0.5)
        receiver.beat()
        rig.workers[2].beat()
    rig.moves_itself(rig.tokens[0], receiver, arrives=False)
    rig.sync()
    rig.broker.take_in(rig.broker.ledger.backend_gone(rig.tokens[1], rig.broker.now))
    rig.broker.pass_time(0.001)
    assert not rig.broker.slots.sessions[b"w0"].silent
    assert rig.fenced() == [rig.tokens[1]]


def test_a_lease_that_is_no_longer_listed_is_lost(rig: Rig) -> None:
    """Though its name is newer than what its holder was granted last."""
    rig.proceed()
    token, holder = rig.tokens[1], rig.workers[0]
    rig.moves_itself(token, holder)
    holder.beat()
    assert holder.seen < token
    del holder.held[token]
    holder.beat()
    assert rig.fenced() == [token]


def test_an_event_of_a_pool_reports_nothing_of_its_shelf(rig: Rig) -> None:
    rig.proceed()
    rig.moves_itself(rig.tokens[1], None)
    rig.broker.take_in(
        rig.broker.ledger.order(Order(VERSION, OrderKind.RECONNECT, "p"), rig.broker.now)[1]
    )
    rig.broker.take_in(rig.broker.ledger.fresh_reports.request())
    rig.broker.take_in(rig.broker.ledger.drain(rig.broker.now))
    assert {each.session for each in rig.broker.commands if isinstance(each, Send)} == {
        b"w0",
        b"w1",
        b"w2",
    }


# --- words that come late


def test_a_former_holders_late_message_neither_revokes_nor_ends_a_lease(rig: Rig) -> None:
    rig.proceed()
    token, former = rig.tokens[1], rig.workers[1]
    late = Renew(former.reports(), former.seen)
    rig.moves_itself(token, rig.workers[0])
    rig.workers[0].beat()
    rig.broker.send(former.id, late)
    former.beat()
    assert all(not ack.revoked for ack in former.sent(Ack))
    assert rig.fenced() == []
    assert rig.holder_of(token) == "w0"
    assert rig.state(token) is SlotState.OPEN


def test_a_former_holders_late_message_does_not_count_for_the_next_holder(rig: Rig) -> None:
    rig.proceed()
    token, former = rig.tokens[1], rig.workers[1]
    late = Renew(former.reports(), former.seen)
    rig.moves_itself(token, rig.workers[0], arrives=False)
    rig.broker.send(former.id, late)
    assert rig.lease(token).unconfirmed


def test_a_lease_that_its_former_holder_no_longer_lists_is_not_lost(rig: Rig) -> None:
    rig.proceed()
    rig.moves_itself(rig.tokens[1], rig.workers[0])
    rig.workers[1].beat()
    assert rig.fenced() == []


def test_a_struck_cell_is_not_followed(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    cell = rig.lease(token).cell
    rig.broker.take_in(rig.broker.ledger.ended_without_proof(token, rig.broker.now))
    assert rig.board.find(token) == -1
    rig.board.set_holder(cell, rig.number(rig.workers[0]))  # whoever had looked before
    rig.beat_all()
    assert rig.holder_of(token) == "w1"
    rig.broker.take_in(rig.broker.ledger.backend_gone(token, rig.broker.now))
    assert cell in rig.pool.lane.free  # type: ignore[union-attr]


def test_a_lease_with_a_cancel_under_way_does_not_move_yet(rig: Rig) -> None:
    rig.open_lane()
    rig.broker.send(b"w1", CancelQuery(rig.tokens[1]))
    rig.contend()
    rig.answer_all()
    rig.contend(place=2)
    assert (rig.moving, rig.board.find(rig.tokens[1])) == (True, -1)
    rig.broker.take_in(
        rig.broker.ledger.control.query_cancelled(
            rig.broker.all(CancelBackend)[-1], True, rig.broker.now
        )
    )
    assert rig.board.find(rig.tokens[1]) >= 0


def test_a_token_too_large_for_the_board_is_not_entered() -> None:
    """A worker has said it; it must not stop the broker."""
    rig = Rig(workers=3, max_conn=3)
    odd = Token(-3, -4)
    rig.workers[2].held[odd] = Phase.IN_USE
    rig.workers[2].hello()
    rig.proceed()
    assert rig.board.find(rig.tokens[1]) >= 0


# --- the shelf's session


def test_a_connection_parked_for_the_shelf_expires_with_the_pools_idle_time() -> None:
    rig = Rig(workers=3, expiration_ms=3000)
    rig.proceed()
    token = rig.tokens[1]
    rig.give_up()
    rig.moves_itself(token, None)
    rig.broker.pass_time(QUIET_S * 1.01)
    rig.take_from_shelf(token)
    for _ in range(8):
        rig.broker.pass_time(0.5)
        rig.beat_all()
    assert rig.fenced() == [token]


def test_when_all_sessions_have_ended_no_lease_is_left(rig: Rig) -> None:
    rig.proceed()
    rig.moves_itself(rig.tokens[1], None)
    for worker in rig.workers:
        rig.broker.take_in(rig.broker.ledger.session_died(worker.id, rig.broker.now))
    rig.broker.pass_time(ARRIVAL_S * 1.1)
    for token in rig.fenced():
        rig.broker.take_in(rig.broker.ledger.backend_gone(token, rig.broker.now))
    assert rig.broker.ledger.leases == 0
    assert rig.broker.all(CloseLane) == [CloseLane("p")]
    assert rig.broker.ledger.report(rig.broker.now) == ([], [])


# --- after a restart


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


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_later_broker_takes_the_holder_with_the_most_moves(
    rig: Rig, order: tuple[int, int]
) -> None:
    """Whoever says HELLO first: the one of the journal, who has it no more, or the
    one who has it."""
    rig.proceed()
    token, holder, former = rig.tokens[1], rig.workers[0], rig.workers[1]
    assert rig.holder_of(token) == "w1"
    rig.moves_itself(token, holder)  # past the broker, which is dead
    after = restarted(rig)
    for n in order:
        say_hello(
            after, after.workers[n], {token: 1} if after.workers[n].name == holder.name else {}
        )
    assert after.holder_of(token) == "w0"
    assert after.state(token) is SlotState.OPEN
    assert all(
        welcome.revoked == [] for worker in after.workers for welcome in worker.sent(Welcome)
    )
    after.contend(after.workers[2])
    assert after.fenced() == []
    assert former.held == {}


def test_a_claim_after_fewer_moves_is_refused(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[2])
    rig.moves_itself(token, rig.workers[0])
    rig.sync()
    after = restarted(rig)
    after.workers[2].held[token] = Phase.IN_USE  # said before it has given it
    say_hello(after, after.workers[0], {token: 2})
    say_hello(after, after.workers[2], {token: 1})
    assert after.holder_of(token) == "w0"
    assert after.workers[2].last(Welcome).revoked == []
    assert after.fenced() == []


def test_an_unclaimed_lease_ends_when_a_worker_reports_its_close(rig: Rig) -> None:
    """It was taken from a former broker's lane, and was of no use: nobody else can have it."""
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)
    after = restarted(rig)
    for worker in after.workers[1:]:
        say_hello(after, worker, {})
    assert after.holder_of(token) == "shelf"
    after.broker.send(
        b"w2", Release(token, False, ReleaseReason.FAILED, Worker.backend(Token(5, 99)))
    )
    assert after.fenced() == []  # another connection
    after.broker.send(b"w2", Release(token, False, ReleaseReason.FAILED, Worker.backend(token)))
    assert after.fenced() == [token]


def test_the_number_of_moves_begins_anew_after_weeks(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[0])
    after = restarted(rig)
    after.lease(token).moves = MOVES - 1
    say_hello(after, after.workers[2], {token: MOVES - 2})
    assert after.holder_of(token) == "w1"  # as the journal says
    say_hello(after, after.workers[0], {token: 1})
    assert after.holder_of(token) == "w0"
    assert after.fenced() == []


def test_a_claim_with_another_backend_is_for_another_connection(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, rig.workers[0])
    after = restarted(rig)
    report = LeaseReport(token, Phase.IN_USE, 0, "T1", Worker.backend(Token(5, 99)), moves=1)
    worker = after.workers[0]
    after.broker.send(worker.id, Hello(VERSION, 100, "", "w0", worker.spec, [report], worker.seen))
    assert after.holder_of(token) == "w1"


def test_an_unclaimed_lease_is_ended_for_a_waiter(rig: Rig) -> None:
    """A member of that lane has not reported its leases yet, and is waited for."""
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)  # and whoever has taken it since has died
    after = restarted(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
    assert after.holder_of(token) == "shelf"
    after.contend(after.workers[0])
    assert after.fenced() == []
    for _ in range(31):  # for so long others may say HELLO
        after.broker.pass_time(0.5)
        for worker in after.workers:
            worker.beat()
    assert after.fenced() == [token]


def lost_with_the_broker(rig: Rig) -> tuple[Rig, Token]:
    """A broker dies while a connection is on its way, which does not arrive; another takes over."""
    rig.proceed()
    rig.moves_itself(rig.tokens[1], None)
    return restarted(rig), rig.tokens[1]


def listing(worker: Worker, moves: dict[Token, int], *, unsure: bool = False) -> None:
    """Answer the newest recall, saying how often what is held has moved."""
    reports = [
        LeaseReport(t, phase, 0, "T1", worker.backend(t), moves=moves.get(t, 0))
        for t, phase in worker.held.items()
    ]
    worker.broker.send(
        worker.id, Renew(reports, worker.seen, worker.last(Recall).serial, unsure=unsure)
    )


def test_an_unclaimed_lease_is_ended_once_all_members_have_reported(
    rig: Rig,
) -> None:
    after, token = lost_with_the_broker(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
        assert worker.sent(Recall)  # each has left that lane by then
        worker.beat()  # a heartbeat that was on its way
    for worker in after.workers:
        assert after.fenced() == []
        worker.answer()
    assert after.fenced() == [token]


def test_an_unclaimed_lease_is_not_ended_before_all_members_have_said_hello(rig: Rig) -> None:
    """One who held nothing when the former broker died, and whom only its journal knows as a
    member."""
    after, token = lost_with_the_broker(rig)
    assert b"w0" not in {entry.session for entry in journal_of(rig.broker)}
    for worker in after.workers[1:]:
        say_hello(after, worker, {})
        worker.answer()
    after.contend(after.workers[1])
    assert after.fenced() == []
    late = after.workers[0]
    late.held[token] = Phase.IN_USE  # the connection has arrived
    say_hello(after, late, {token: 2})
    listing(late, {token: 2})
    assert (after.holder_of(token), after.fenced()) == ("w0", [])


def test_a_lease_that_arrives_before_the_welcome_is_the_receivers(rig: Rig) -> None:
    after, token = lost_with_the_broker(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
    after.workers[0].held[token] = Phase.IN_USE
    after.workers[1].answer()
    after.workers[2].answer()
    assert after.fenced() == []
    listing(after.workers[0], {token: 2})
    assert (after.holder_of(token), after.fenced()) == ("w0", [])


def test_a_member_whose_thread_may_be_receiving_is_asked_once_more(rig: Rig) -> None:
    after, token = lost_with_the_broker(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
    for worker in after.workers[1:]:
        worker.answer()
    unsure = after.workers[0]
    listing(unsure, {}, unsure=True)
    assert after.fenced() == []
    asked = unsure.last(Recall)
    after.broker.pass_time(ARRIVAL_S)
    assert unsure.last(Recall).serial > asked.serial
    listing(unsure, {})
    assert after.fenced() == [token]


@pytest.mark.parametrize("known", [True, False], ids=["had said hello", "had not"])
def test_a_dead_member_holds_nothing(rig: Rig, known: bool) -> None:
    after, token = lost_with_the_broker(rig)
    for worker in after.workers if known else after.workers[1:]:
        say_hello(after, worker, {})
    for worker in after.workers[1:]:
        worker.answer()
    assert after.fenced() == []
    after.broker.take_in(after.broker.ledger.session_died(b"w0", after.broker.now))
    assert after.fenced() == [token]
    assert {member.session for member in members_of(after.broker)} <= {b"w1", b"w2"}


def test_a_dead_members_lease_may_have_moved_on(rig: Rig) -> None:
    """The member gave the connection after the former broker's death, and died; another uses it."""
    rig.proceed()
    token, holder = rig.tokens[1], rig.workers[0]
    assert rig.holder_of(token) == "w1"
    rig.moves_itself(token, holder)
    after = restarted(rig)
    after.broker.take_in(after.broker.ledger.session_died(b"w1", after.broker.now))
    assert (after.fenced(), after.holder_of(token)) == ([], "shelf")
    say_hello(after, after.workers[0], {token: 1})
    listing(after.workers[0], {token: 1})
    say_hello(after, after.workers[2], {})
    after.workers[2].answer()
    assert (after.fenced(), after.holder_of(token)) == ([], "w0")


def test_a_dead_members_lease_is_ended_once_no_other_member_can_have_it(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    after = restarted(rig)
    for worker in (after.workers[0], after.workers[2]):
        say_hello(after, worker, {})
        worker.answer()
    assert after.fenced() == []
    after.broker.take_in(after.broker.ledger.session_died(b"w1", after.broker.now))
    assert after.fenced() == [token]


def test_a_lease_reported_after_leaving_the_lane_is_ended_when_its_member_dies(
    rig: Rig,
) -> None:
    """Nobody else can have it, whoever has not told yet."""
    rig.proceed()
    after = restarted(rig)
    say_hello(after, after.workers[1], {})
    after.workers[1].answer()
    after.broker.take_in(after.broker.ledger.session_died(b"w1", after.broker.now))
    assert after.fenced() == [rig.tokens[1]]


def test_once_all_members_have_reported_an_unlisted_lease_is_nobodys(rig: Rig) -> None:
    rig.proceed()
    after = restarted(rig)
    for worker in after.workers:
        say_hello(after, worker, {})
        worker.answer()
    del after.workers[1].held[rig.tokens[1]]
    after.workers[1].beat()
    assert after.fenced() == [rig.tokens[1]]


def test_without_a_complete_journal_the_members_are_unknown(rig: Rig) -> None:
    rig.proceed()
    token = rig.tokens[1]
    rig.moves_itself(token, None)
    after = restarted(rig)
    after.broker = Broker(EPOCH + 1, journal_complete=False, handover=True)
    after.broker.take_in(
        after.broker.ledger.takeover.restore(journal_of(rig.broker), after.broker.now)
    )
    after.workers = [moved(worker, after.broker) for worker in rig.workers]
    for worker in after.workers:
        say_hello(after, worker, {})
    assert (after.fenced(), after.holder_of(token)) == ([], "shelf")


def test_a_member_is_journaled_before_it_joins(rig: Rig) -> None:
    rig.open_lane()
    for n, command in enumerate(rig.broker.commands):
        if isinstance(command, InviteToLane):
            assert (
                Admit(Member(command.session, None, rig.workers[0].spec)) in rig.broker.commands[:n]
            )
    assert {member.session for member in members_of(rig.broker)} == {b"w0", b"w1", b"w2"}
    rig.broker.send(b"w0", Bye())
    assert {member.session for member in members_of(rig.broker)} == {b"w1", b"w2"}
    after = restarted(rig)
    say_hello(after, after.workers[1], {})
    after.workers[1].answer()
    assert Dismiss(b"w1") in after.broker.commands  # there is no lane yet


def test_the_last_worker_to_leave_ends_nothing_that_another_member_may_have(rig: Rig) -> None:
    """That one has not said HELLO yet."""
    after, token = lost_with_the_broker(rig)
    for worker in after.workers[1:]:
        say_hello(after, worker, {})
        worker.answer()
        for held in list(worker.held):
            worker.release(held)
        after.broker.send(worker.id, Bye())
    assert (after.fenced(), after.holder_of(token)) == ([], "shelf")
    after.broker.take_in(after.broker.ledger.session_died(b"w0", after.broker.now))
    assert after.fenced() == [token]


def test_a_lease_that_could_not_move_and_is_not_listed_is_ended_at_once() -> None:
    rig = Rig(workers=2)
    token = rig.tokens[0]
    after = restarted(rig)
    del after.workers[0].held[token]
    say_hello(after, after.workers[0], {})
    assert after.fenced() == [token]


def test_a_lease_given_before_the_later_broker_knew_of_it_is_the_receivers(rig: Rig) -> None:
    """The giver has claimed the lease, and left that lane at its WELCOME."""
    rig.proceed()
    token = rig.tokens[1]
    after = restarted(rig)
    giver, receiver = after.workers[1], after.workers[0]
    say_hello(after, giver, {})
    assert after.state(token) is SlotState.OPEN
    receiver.held[token] = giver.held.pop(token)
    giver.beat()
    assert (after.fenced(), after.state(token)) == ([], SlotState.SUSPECT)
    say_hello(after, receiver, {token: 1})
    assert (after.holder_of(token), after.state(token)) == ("w0", SlotState.OPEN)
    assert after.fenced() == []


def test_a_lease_of_this_broker_is_never_unclaimed(rig: Rig) -> None:
    """It has moved, but not since: who says HELLO and does not list it has lost it."""
    rig.proceed()
    rig.moves_itself(rig.tokens[1], rig.workers[0])
    rig.workers[0].beat()
    heir = rig.passed_by_broker(rig.workers[0], rig.tokens[1])
    holder = rig.workers[0]
    assert rig.lease(heir).moves == 1
    holder.held[heir] = Phase.IN_USE
    holder.beat()
    del holder.held[heir]
    holder.seen = heir
    holder.hello()
    assert rig.fenced() == [heir]


def test_a_request_without_a_wait_is_refused_once_the_shelf_was_found_empty(rig: Rig) -> None:
    """By the records something lies there: it was lost on its way, or another was faster."""
    rig.proceed()
    rig.give_up()
    rig.moves_itself(rig.tokens[1], None)
    asker = rig.workers[2]
    request = asker.ask(0.0)
    rig.answer_all()
    assert rig.broker.all(JoinQueue)[-1].most_from_shelf == 1
    assert asker.outcome(request) is None
    rig.broker.take_in(rig.broker.ledger.lanes.shelf_empty("p", rig.broker.now))
    assert isinstance(asker.outcome(request), Deny)
