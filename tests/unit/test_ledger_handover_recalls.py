"""While connections change hands: which holders are asked for theirs, and how often."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import Fence, OpenLane
from sharedpool.broker.core.handover import NUDGE_S, SHARED_S
from sharedpool.broker.core.lane_members import JOIN_S
from sharedpool.wire.board import PLACES
from sharedpool.wire.messages import Acquire, Grant, Recall, ReleaseReason
from sharedpool.wire.values import Phase, Token
from tests.unit.desk_driver import Desk, broker, passed_with
from tests.unit.ledger_driver import Broker

__all__ = ["broker"]  # pytest finds it here


def test_while_connections_change_hands_they_are_wanted_back_and_later_kept(
    broker: Broker, desk: Desk
) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    desk.give(a, desk.lend(a))
    desk.ask(b)
    heir = desk.passed()[-1][1]
    assert passed_with(heir).returns_due == 1  # it came from another process
    desk.give(b, heir.token)
    broker.pass_time(SHARED_S * 1.1)
    desk.ask(b)
    assert passed_with(desk.passed()[-1][1]).returns_due == 0  # b has been alone with it


def test_a_holder_that_keeps_a_wanted_connection_is_asked_again(broker: Broker, desk: Desk) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    desk.ask(b)
    a.answer()
    asked = len(a.sent(Recall))
    broker.pass_time(NUDGE_S * 1.1)
    assert len(a.sent(Recall)) == asked + 1
    assert a.last(Recall).returns_due == 1
    assert token


def test_a_holder_with_a_long_transaction_is_asked_less_and_less(
    broker: Broker, desk: Desk
) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    desk.lend(a)
    desk.ask(b)
    a.answer()
    asked = len(a.sent(Recall))
    for _ in range(100):
        broker.pass_time(NUDGE_S * 1.01)
        if (recall := a.last(Recall)).serial > broker.slots.sessions[a.id].answered:
            a.beat(recall.serial)
    assert 5 <= len(a.sent(Recall)) - asked <= 8  # of a hundred times


def test_under_the_cap_of_all_pools_another_pools_waiter_gets_the_slot() -> None:
    broker = Broker(max_conn=1, handover=True)
    desk = Desk(broker)
    a, other = broker.worker("a", max_conn=1), broker.worker("o", "other", max_conn=1)
    token = desk.lend(a)
    desk.ask(other)
    desk.give(a, token)
    assert desk.passed() == []
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert len(other.sent(Grant)) == 1


def test_a_giver_is_asked_for_the_rest_while_others_wait(broker: Broker, desk: Desk) -> None:
    """Nothing else need happen for that: else the next waiter would wait for a heartbeat."""
    a, b, c = (broker.worker(name, max_conn=2) for name in "abc")
    first, second = desk.lend(a), desk.lend(a)
    desk.ask(b)
    assert a.last(Recall).returns_due == 1
    a.answer()
    request = desk.ask(c)
    desk.give(a, first)
    assert [name for name, _ in desk.passed()] == ["b"]
    assert a.last(Recall).returns_due == 1
    assert len(a.sent(Recall)) == 2
    desk.give(a, second)
    assert desk.passed()[1][1].request == request


def test_a_waiter_that_is_being_let_into_the_lane_is_worth_a_moment(
    broker: Broker, desk: Desk
) -> None:
    """The first time that connections are passed on, and each process's first: a close and a
    connect take longer."""
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    request = b.ask(9.0)
    assert broker.all(OpenLane) == [OpenLane("p", 1)]
    desk.give(a, token)
    assert broker.all(Fence) == []
    desk.join(b)
    assert desk.passed() == []  # it has yet to say where it waits
    broker.send(b.id, Acquire(request, 9000, broker.slots.sessions[b.id].index * PLACES))
    assert [(name, moved.request) for name, moved in desk.passed()] == [("b", request)]


def test_more_may_be_promised_than_is_asked_for(broker: Broker, desk: Desk) -> None:
    """One more slot is coming as well: nothing that lies idle need be asked for."""
    a, b = (broker.worker(name, max_conn=4) for name in "ab")
    first, second, idle, closing = (desk.lend(a) for _ in range(4))
    desk.give(a, first)
    desk.give(a, second)  # both are parked
    a.checkin(idle)
    a.held[closing] = Phase.CLOSING
    a.beat()
    for _ in range(2):
        b.ask(9.0)
    assert broker.all(Recall) == []
    assert broker.all(Fence) == []


@pytest.mark.parametrize("wait_s", [9.0, 0.0])
def test_a_waiter_that_does_not_come_into_the_lane_gets_the_slot(
    broker: Broker, desk: Desk, wait_s: float
) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    a.checkin(token)
    request = b.ask(wait_s)
    a.held[token] = Phase.CLOSING
    a.answer()
    desk.give(a, token, ReleaseReason.TAKEN)
    assert broker.all(Fence) == []
    broker.pass_time(JOIN_S * 1.1)
    assert [fence.token for fence in broker.all(Fence)] == [token]
    assert b.outcome(request) is None
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert isinstance(b.outcome(request), Token)


def test_a_holder_that_keeps_what_another_pools_waiter_needs_is_asked_again() -> None:
    """Under a cap over all pools; what is kept idle for its slice is not reported by itself."""
    broker = Broker(max_conn=1, handover=True)
    desk = Desk(broker)
    a, other = broker.worker("a", max_conn=1), broker.worker("o", "other", max_conn=1)
    desk.lend(a)
    desk.ask(other)
    a.answer()
    asked = len(a.sent(Recall))
    broker.pass_time(NUDGE_S * 1.1)
    assert len(a.sent(Recall)) == asked + 1


def test_a_slot_that_did_not_come_after_all_is_looked_for_elsewhere() -> None:
    """Under a cap: what its worker said it closes was counted on for another pool's waiter; then it
    was given."""
    broker = Broker(max_conn=3, handover=True)
    desk = Desk(broker)
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    o, x = (broker.worker(name, "other", max_conn=3) for name in "ox")
    token, idle, _ = desk.lend(a), desk.lend(o), desk.lend(o)
    desk.ask(b)
    desk.ask(x)
    a.held[token] = Phase.CLOSING
    a.answer()
    o.checkin(idle)
    o.beat()
    assert o.last(Recall).take == 0
    desk.give(a, token)
    assert [name for name, _ in desk.passed()] == ["b"]
    assert o.last(Recall).take == 1
