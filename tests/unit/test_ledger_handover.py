"""The ledger's side of the hand-over: who gives, who gets, what is parked."""

from __future__ import annotations

from sharedpool.broker.core.commands import Fence, TransferCustody
from sharedpool.broker.core.lane_members import ARRIVAL_S
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.messages import Ack, Acquire, Grant, Recall, Reject, Renew, Welcome, Withdraw
from sharedpool.wire.values import Phase
from tests.unit.desk_driver import Desk, broker, passed_with
from tests.unit.ledger_driver import TTL_S, Broker, Worker

__all__ = ["broker"]  # pytest finds it here


def test_a_connection_goes_to_who_has_waited_longest(broker: Broker, desk: Desk) -> None:
    a, b, c = (broker.worker(name, max_conn=1) for name in "abc")
    token = desk.lend(a)
    first, second = desk.ask(b), desk.ask(c)
    desk.give(a, token)
    ((name, message),) = desk.passed()
    assert (name, message.request) == ("b", first)
    assert message.token > token
    assert message.live.backend == a.backend(token)
    assert passed_with(message).returns_due == 1  # c waits
    assert broker.all(TransferCustody) == [TransferCustody(token, message.token)]
    assert (desk.state(token), desk.state(message.token)) == (SlotState.FREE, SlotState.OPEN)
    assert broker.ledger.leases == 1
    desk.give(b, message.token)
    assert desk.passed()[1][0] == "c"
    assert desk.passed()[1][1].request == second


def test_a_connection_without_a_waiter_is_parked_and_passed_to_the_next_request(
    broker: Broker, desk: Desk
) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    desk.give(a, token)
    assert desk.passed() == []
    pools, _ = broker.ledger.report(broker.now)
    assert (pools[0].parked, pools[0].idle, pools[0].leases) == (1, 1, 1)
    before = len(broker.all(Recall))
    desk.ask(b)
    assert [name for name, _ in desk.passed()] == ["b"]
    assert len(broker.all(Recall)) == before  # nobody was asked


def test_a_new_request_is_sent_to_the_desk_for_a_parked_connection(
    broker: Broker, desk: Desk
) -> None:
    """It costs less than to open one, though a slot is free."""
    giver = broker.worker("a")
    desk.give(giver, desk.lend(giver))
    new = Worker(broker, "b", giver.spec)
    new.hello(first=Acquire(1, 9000))
    assert (new.last(Welcome).served, new.sent(Grant)) == (0, [])


def test_a_parked_connection_is_no_longer_its_givers(broker: Broker, desk: Desk) -> None:
    """Heartbeats of before and after the giving change nothing."""
    a = broker.worker("a", max_conn=1)
    token = desk.lend(a)
    before = Renew(a.reports(), a.seen)
    desk.give(a, token)
    broker.send(a.id, before)
    a.beat()
    assert desk.state(token) is SlotState.OPEN
    assert a.last(Ack).revoked == []
    pools, _ = broker.ledger.report(broker.now)
    assert pools[0].parked == 1


def test_a_connection_on_its_way_is_not_taken_for_lost(broker: Broker, desk: Desk) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    request = desk.ask(b)
    desk.give(a, token)
    heir = desk.passed()[0][1].token
    b.seen = heir
    b.beat()  # it was said before the packet was read
    assert desk.state(heir) is SlotState.OPEN
    assert broker.all(Fence) == []
    b.held[heir] = Phase.IN_USE
    b.beat()
    del b.held[heir]  # known now, and not held any more: that is a loss
    b.beat()
    assert desk.state(heir) is SlotState.FENCING
    assert request


def test_a_request_that_was_withdrawn_gets_nothing(broker: Broker, desk: Desk) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    request = desk.ask(b)
    broker.send(b.id, Withdraw(request))
    desk.give(a, token)
    assert desk.passed() == []


def test_a_heartbeat_does_not_withdraw_what_waits_at_the_desk(broker: Broker, desk: Desk) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    desk.ask(b)
    b.beat()
    desk.give(a, token)
    assert [name for name, _ in desk.passed()] == ["b"]


def test_for_a_waiter_without_a_line_the_connection_is_ended(broker: Broker, desk: Desk) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    desk.give(a, token)  # parked
    b.ask(9.0)
    assert [fence.token for fence in broker.all(Fence)] == [token]
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert len(b.sent(Grant)) == 1


def test_a_parked_connection_ends_with_its_idle_time(broker: Broker, desk: Desk) -> None:
    a = broker.worker("a", max_conn=1, expiration_ms=1000)
    token = desk.lend(a)
    desk.give(a, token)
    broker.pass_time(0.9)
    a.beat()
    assert broker.all(Fence) == []
    broker.pass_time(0.2)
    assert [fence.token for fence in broker.all(Fence)] == [token]


def test_a_parked_connection_ends_with_its_givers_session(broker: Broker, desk: Desk) -> None:
    a = broker.worker("a", max_conn=1)
    token = desk.lend(a)
    desk.give(a, token)
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    assert [fence.token for fence in broker.all(Fence)] == [token]


def test_a_request_that_waited_at_the_desk_through_a_long_silence_is_sent_again(
    broker: Broker, desk: Desk
) -> None:
    """Frozen for longer than the TTL, the worker has lost its place: its line tells it nothing of
    that."""
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    desk.lend(a)
    request = desk.ask(b, wait_s=600.0)
    broker.pass_time(TTL_S * 0.7)
    a.beat()
    broker.pass_time(TTL_S * 0.7)
    b.pending.append(request)  # it has waited for long
    b.beat()
    assert len(b.sent(Reject)) == 1


def test_a_connection_on_its_way_is_an_answer(broker: Broker, desk: Desk) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    desk.ask(b)
    desk.give(a, token)
    b.beat()
    assert b.sent(Reject) == []
    broker.now += ARRIVAL_S
    b.answer()  # it does not arrive
    assert [fence.token for fence in broker.all(Fence)] == [desk.passed()[0][1].token]
    b.beat()
    assert len(b.sent(Reject)) == 1


def test_a_receiver_whose_connection_could_not_be_sent_asks_again(
    broker: Broker, desk: Desk
) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    desk.ask(b)
    desk.give(a, token)
    ((_, message),) = desk.passed()
    broker.take_in(broker.ledger.lanes.not_delivered(message, broker.now))
    assert [fence.token for fence in broker.all(Fence)] == [message.token]
    assert len(b.sent(Reject)) == 1
    b.hello()
    b.ask(9.0)
    broker.take_in(broker.ledger.backend_gone(message.token, broker.now))
    assert len(b.sent(Grant)) == 1


def test_a_connection_that_could_not_be_sent_to_a_dead_receiver_is_ended_once(
    broker: Broker, desk: Desk
) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    desk.ask(b)
    desk.give(a, token)
    ((_, message),) = desk.passed()
    broker.take_in(broker.ledger.session_died(b.id, broker.now))
    broker.take_in(broker.ledger.lanes.not_delivered(message, broker.now))
    assert [fence.token for fence in broker.all(Fence)] == [message.token]
    assert b.sent(Reject) == []
