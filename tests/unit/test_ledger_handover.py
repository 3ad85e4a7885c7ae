"""The ledger's side of the hand-over: who gives, who gets, what is parked, and what
must not go on."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import (
    CancelBackend,
    Fence,
    Log,
    OpenLane,
    TransferCustody,
)
from sharedpool.broker.core.handover import NUDGE_S, SHARED_S, TRY_AGAIN_S
from sharedpool.broker.core.lane_members import ARRIVAL_S, JOIN_S
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.board import PLACES
from sharedpool.wire.desk import Moved, Passed
from sharedpool.wire.messages import (
    Ack,
    Acquire,
    CancelQuery,
    Grant,
    Recall,
    Reject,
    ReleaseReason,
    Renew,
    Welcome,
    Withdraw,
)
from sharedpool.wire.values import Phase, Token
from tests.unit.desk_driver import Desk
from tests.unit.ledger_driver import TTL_S, Broker, Worker


def passed_with(moved: Moved) -> Passed:
    assert moved.passed is not None
    return moved.passed


@pytest.fixture
def broker() -> Broker:
    return Broker(handover=True)


@pytest.fixture
def desk(broker: Broker) -> Desk:
    return Desk(broker)


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


@pytest.mark.parametrize("why", ["an older generation", "a cancel under way", "not in custody"])
def test_a_connection_that_must_not_go_on_is_ended(broker: Broker, desk: Desk, why: str) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = a.lend() if why == "not in custody" else desk.lend(a)
    if why == "a cancel under way":
        broker.send(a.id, CancelQuery(token))
        assert broker.all(CancelBackend) == [CancelBackend(token, a.backend(token))]
    if why == "an older generation":
        desk.generation = 0
    desk.ask(b)
    desk.give(a, token)
    assert desk.passed() == []
    assert [fence.token for fence in broker.all(Fence)] == [token]
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert len(b.sent(Grant)) == 1  # the slot, instead


def test_after_the_cancel_it_may_go_on(broker: Broker, desk: Desk) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    broker.send(a.id, CancelQuery(token))
    (order,) = broker.all(CancelBackend)
    broker.take_in(broker.ledger.control.query_cancelled(order, True, broker.now))
    desk.ask(b)
    desk.give(a, token)
    assert len(desk.passed()) == 1


def tried(broker: Broker, desk: Desk, sent: bool | None, pause_s: float) -> list[bool]:
    """Move a connection twice, each time with a trial's cancel of that outcome; say which was to be
    a trial."""
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    for giver, taker in ((a, b), (b, a)):
        desk.ask(taker)
        desk.give(giver, token)
        token = desk.passed()[-1][1].token
        broker.send(taker.id, CancelQuery(token, trial=True))
        broker.take_in(
            broker.ledger.control.query_cancelled(broker.all(CancelBackend)[-1], sent, broker.now)
        )
        broker.now += pause_s
    return [passed_with(moved).trial for _, moved in desk.passed()]


def test_a_cancel_is_tried_once(broker: Broker, desk: Desk) -> None:
    assert tried(broker, desk, True, TRY_AGAIN_S) == [True, False]


@pytest.mark.parametrize(("pause_s", "again"), [(0.0, False), (TRY_AGAIN_S, True)])
def test_a_cancel_that_could_not_be_sent_is_tried_again_a_while_later(
    broker: Broker, desk: Desk, pause_s: float, again: bool
) -> None:
    assert tried(broker, desk, None, pause_s) == [True, again]


def test_while_a_trials_cancel_is_under_way_it_may_go_on(broker: Broker, desk: Desk) -> None:
    """Its worker gives it only when the cancel has hit: the broker hears of that later."""
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    broker.send(a.id, CancelQuery(token, trial=True))
    desk.ask(b)
    desk.give(a, token)
    assert len(desk.passed()) == 1


def test_a_users_cancel_is_no_trial(broker: Broker, desk: Desk) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    broker.send(a.id, CancelQuery(token))
    broker.take_in(
        broker.ledger.control.query_cancelled(broker.all(CancelBackend)[-1], False, broker.now)
    )
    desk.ask(b)
    desk.give(a, token)
    assert [passed_with(moved).trial for _, moved in desk.passed()] == [True]


def test_where_the_broker_may_not_cancel_nothing_is_passed_on_any_more() -> None:
    broker = Broker(handover=True)
    desk = Desk(broker)
    a, b, c = (broker.worker(name, max_conn=3) for name in "abc")
    first, second, parked = (desk.lend(a) for _ in range(3))
    desk.give(a, parked)
    desk.ask(b)
    passed = desk.passed()[0][1].token
    desk.give(a, second)  # parked
    broker.send(b.id, CancelQuery(passed, trial=True))
    broker.take_in(
        broker.ledger.control.query_cancelled(broker.all(CancelBackend)[-1], False, broker.now)
    )
    assert [fence.token for fence in broker.all(Fence)] == [second]  # that, too
    assert any("cannot cancel" in log.text for log in broker.all(Log))
    desk.give(a, first)
    assert [fence.token for fence in broker.all(Fence)] == [second, first]
    assert broker.worker("late", max_conn=3).sent(Welcome)[-1].handover is False
    assert c.sent(Welcome)[-1].handover is True


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
