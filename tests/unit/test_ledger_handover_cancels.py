"""The ledger's side of the hand-over: what must not go on, since a cancel may be under way."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import CancelBackend, Fence, Log
from sharedpool.broker.core.handover import TRY_AGAIN_S
from sharedpool.wire.messages import CancelQuery, Grant, Welcome
from tests.unit.desk_driver import Desk, broker, passed_with
from tests.unit.ledger_driver import Broker

__all__ = ["broker"]  # pytest finds it here


@pytest.mark.parametrize("why", ["an older generation", "a cancel under way", "not in custody"])
def test_a_connection_that_must_not_go_on_is_ended(broker: Broker, desk: Desk, why: str) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = a.lend() if why == "not in custody" else desk.lend(a)
    if why == "a cancel under way":
        broker.send(a.id, CancelQuery(token))
        assert broker.all(CancelBackend) == [CancelBackend("p", token, a.backend(token))]
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


def test_a_trial_counts_though_its_connection_was_passed_on_meanwhile(
    broker: Broker, desk: Desk
) -> None:
    a, b = (broker.worker(name, max_conn=1) for name in "ab")
    token = desk.lend(a)
    for giver, taker in ((a, b), (b, a), (a, b)):
        desk.ask(taker)
        desk.give(giver, token)
        token = desk.passed()[-1][1].token
        if giver is b:  # the outcome comes only now
            (order,) = broker.all(CancelBackend)
            broker.take_in(broker.ledger.control.query_cancelled(order, True, broker.now))
            broker.now += TRY_AGAIN_S
        elif not broker.all(CancelBackend):
            broker.send(b.id, CancelQuery(token, trial=True))
    assert [passed_with(moved).trial for _, moved in desk.passed()] == [True, False, False]


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
