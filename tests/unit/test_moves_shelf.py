"""What lies on the shelf, or should, and of which nobody speaks."""

from __future__ import annotations

from sharedpool.broker.core.commands import CloseLane, Send
from sharedpool.broker.core.lane_members import ARRIVAL_S
from sharedpool.wire.admin import Order, OrderKind
from tests.unit.moves_driver import QUIET_S, VERSION, Rig, rig

__all__ = ["rig"]  # pytest finds it here


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
