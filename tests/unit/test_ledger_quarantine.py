"""Slots of connects whose end nobody saw: custody, quarantine, and grants to who is silent."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import Fence, SurveyResult, SurveyServer
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.admin import Done, Order, OrderKind
from sharedpool.wire.desk import Opened
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    START_UP_LIMIT_S,
    Release,
    ReleaseReason,
    Welcome,
)
from sharedpool.wire.values import Phase, Token
from tests.unit.ledger_driver import TTL_S, Broker, Worker

# --- custody and quarantine


def test_a_dead_workers_deposited_connection_can_be_fenced_before_it_is_confirmed() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    assert broker.ledger.desk.expects(a.id, token)
    assert not broker.ledger.desk.expects(b"other", token)
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    (fence,) = broker.all(Fence)
    assert (fence.token, fence.backend) == (token, None)


def test_a_worker_killed_in_its_connect_keeps_its_slot_until_the_server_shows_nothing() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    a.ask()
    request = b.ask(wait_s=60)
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    for starting in ({42}, {42}, set()):
        assert b.outcome(request) is None
        look = broker.all(SurveyServer)[-1]
        broker.take_in(
            broker.ledger.control.surveyed(
                SurveyResult(look.serial, frozenset(starting), {}), broker.now
            )
        )
        broker.pass_time(SETTLE_S * 1.01)
    assert isinstance(b.outcome(request), Token)
    assert [look.barrier for look in broker.all(SurveyServer)] == [True, False, False]


def test_a_deposit_that_was_on_its_way_ends_the_quarantine() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    assert broker.all(Fence) == []
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))
    assert [fence.token for fence in broker.all(Fence)] == [token]
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert broker.ledger.leases == 0


@pytest.mark.parametrize("dies_first", [False, True])
def test_a_backend_that_was_named_at_the_desk_is_ended_without_a_confirm(dies_first: bool) -> None:
    """Its worker is killed right after the connect: the CONFIRM was never sent."""
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))
    opened = Opened(a.id, token, a.backend(token))
    if not dies_first:
        broker.take_in(broker.ledger.desk.opened(opened, broker.now))
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    if dies_first:  # the broker has seen the end before it read what came before
        broker.take_in(broker.ledger.desk.opened(opened, broker.now))
    assert broker.all(Fence)[-1].backend == a.backend(token)


def test_a_backend_that_is_named_late_or_by_a_stranger_changes_nothing() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=2), broker.worker("b")
    token = a.lend()
    a.checkin(token)
    a.beat()  # tells that it is idle
    before = broker.ledger.report(broker.now)
    for session in (a.id, b.id, b"nobody"):
        opened = Opened(session, token, a.backend(token))
        broker.take_in(broker.ledger.desk.opened(opened, broker.now))
    assert broker.ledger.report(broker.now) == before


def test_a_silent_worker_that_names_a_backend_is_heard() -> None:
    """Else its lease would be in use, and its session suspect."""
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))
    broker.pass_time(TTL_S * 1.1)
    assert broker.slots.sessions[a.id].suspect
    opened = Opened(a.id, token, a.backend(token))
    broker.take_in(broker.ledger.desk.opened(opened, broker.now))
    assert not broker.slots.sessions[a.id].suspect
    assert broker.slots.leases[token].state is SlotState.OPEN


def test_a_connect_that_timed_out_is_verified_or_waits_for_the_servers_limit() -> None:
    for verifies in (True, False):
        broker = Broker(has_control_connection=verifies)
        a = broker.worker("a", max_conn=1)
        token = a.granted(a.ask())
        broker.send(a.id, Release(token, False, ReleaseReason.FAILED))
        broker.pass_time(60)
        a.beat()
        assert broker.ledger.leases == 1
        assert bool(broker.all(SurveyServer)) == verifies
        broker.pass_time(6)
        assert broker.ledger.leases == (1 if verifies else 0)


# --- granted to who is silent


def silent_with_a_grant(broker: Broker) -> tuple[Worker, Token]:
    """A worker that nobody can watch was granted a slot, and has said nothing since; its TTL has
    passed."""
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    broker.pass_time(TTL_S + 0.1)
    assert broker.ledger.leases == 1
    return a, token


def test_a_slot_granted_to_who_is_silent_is_looked_for_once_no_connect_can_be_under_way() -> None:
    broker = Broker()
    a, token = silent_with_a_grant(broker)
    b = broker.worker("b")
    request = b.ask(wait_s=600)
    for _ in range(int(START_UP_LIMIT_S) - 1):
        broker.pass_time(1.0)
        b.beat()
    assert (
        broker.all(SurveyServer) == []
    )  # it may have begun to connect at the end of its TTL, and log in yet
    broker.pass_time(2.0)
    assert len(broker.all(SurveyServer)) == 1
    assert b.outcome(request) is None
    broker.show_nothing()
    assert isinstance(b.outcome(request), Token)
    a.held[token], a.seen = Phase.CONNECTING, token
    a.hello()
    assert a.last(Welcome).revoked == [token]


def test_a_session_that_speaks_again_in_time_keeps_its_leases() -> None:
    broker = Broker()
    a, token = silent_with_a_grant(broker)
    a.held[token], a.seen = Phase.CONNECTING, token
    for _ in range(int(START_UP_LIMIT_S) + 5):
        a.beat()
        broker.pass_time(1.0)
    assert broker.all(SurveyServer) == []
    assert broker.ledger.leases == 1


def test_without_a_control_connection_it_stays_counted_until_an_operator_says_otherwise() -> None:
    broker = Broker(has_control_connection=False)
    _, token = silent_with_a_grant(broker)
    for _ in range(10):
        broker.pass_time(START_UP_LIMIT_S)
    assert broker.ledger.leases == 1
    order = Order(PROTOCOL_VERSION, OrderKind.KILL, "", 0, token)
    done, _ = broker.ledger.order(order, broker.now)
    assert done == Done(
        [f"lease {token} of a[197] had no connection that is known of: its slot is free"]
    )
    assert broker.ledger.leases == 0


def test_with_one_the_server_is_looked_at_before_an_operators_word_frees_a_slot() -> None:
    """Its connect may be on its way to the server, or logging in there."""
    broker = Broker()
    _, token = silent_with_a_grant(broker)
    order = Order(PROTOCOL_VERSION, OrderKind.KILL, "", 0, token)
    for _ in range(2):
        done, commands = broker.ledger.order(order, broker.now)
        broker.take_in(commands)
        assert "once the server shows none either" in done.said[0]
        assert broker.ledger.leases == 1
    broker.show_nothing()
    broker.show_nothing()
    assert broker.ledger.leases == 0
