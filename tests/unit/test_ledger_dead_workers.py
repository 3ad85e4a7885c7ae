"""A worker's end, and its connections': when their slots are free again."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import Fence, Forget
from sharedpool.wire.messages import START_UP_LIMIT_S, Bye, Gone, Recall, ReleaseReason, Welcome
from sharedpool.wire.values import Token
from tests.unit.ledger_driver import TTL_S, Broker


def test_a_dead_workers_unconnected_lease_waits_for_the_servers_limit_if_nobody_can_look() -> None:
    """It may have been killed in the middle of its connect: the server has a backend in start-up
    then."""
    broker = Broker(has_control_connection=False)
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    a.ask()
    request = b.ask(wait_s=600)
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    for _ in range(12):  # 60 s is authentication_timeout
        broker.pass_time(5)
        b.beat()
    assert b.outcome(request) is None
    broker.pass_time(6)
    assert isinstance(b.outcome(request), Token)
    assert broker.all(Fence) == []


def test_a_dead_workers_connection_is_fenced_and_free_only_when_confirmed_gone(
    broker: Broker,
) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    request = b.ask(wait_s=60)
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    (fence,) = broker.all(Fence)
    assert (fence.token, fence.backend, fence.pool) == (token, a.backend(token), "p")
    for _ in range(6):
        broker.pass_time(TTL_S / 3)
        b.beat()
    assert b.outcome(request) is None
    assert broker.ledger.leases == 1
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert isinstance(b.outcome(request), Token)
    assert Forget(a.id) in broker.commands


def test_a_backend_that_ended_by_itself_frees_its_slot_and_its_worker_is_told(
    broker: Broker,
) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    request = b.ask(wait_s=60)
    broker.take_in(broker.ledger.backend_gone(Token(9, 9), broker.now))
    assert b.outcome(request) is None
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert isinstance(b.outcome(request), Token)
    assert a.last(Gone).tokens == [token]
    broker.take_in(broker.ledger.backend_gone(token, broker.now))  # twice: nothing
    a.release(token, ReleaseReason.BROKEN)  # the worker's own word comes too late
    assert broker.ledger.leases == 1


@pytest.mark.parametrize("state", ["checked out", "being fenced", "worker dead"])
def test_a_connection_that_broke_is_verified_before_its_slot_is_free(
    broker: Broker, state: str
) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))
    if state == "worker dead":
        broker.take_in(broker.ledger.session_died(a.id, broker.now))
    elif state == "being fenced":
        a.release(token, ReleaseReason.BROKEN, gone=False)
    request = b.ask(wait_s=60)
    orders = broker.take_in(broker.ledger.ended_without_proof(token, broker.now))
    assert [(f.token, f.backend) for f in orders if isinstance(f, Fence)] == [
        (token, a.backend(token))
    ]
    assert [gone.tokens for gone in a.sent(Gone)] == ([[token]] if state == "checked out" else [])
    assert b.outcome(request) is None
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert isinstance(b.outcome(request), Token)
    broker.take_in(
        broker.ledger.ended_without_proof(token, broker.now)
    )  # nobody's any more: nothing
    assert broker.ledger.leases == 1


@pytest.mark.parametrize("verifies", [True, False])
def test_a_connection_that_broke_before_it_was_confirmed_is_looked_for_if_somebody_can(
    verifies: bool,
) -> None:
    broker = Broker(has_control_connection=verifies)
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))
    broker.take_in(broker.ledger.ended_without_proof(token, broker.now))
    assert broker.ledger.leases == 1
    if verifies:
        broker.show_nothing()
    else:
        broker.pass_time(START_UP_LIMIT_S + 1)  # it has logged in: that limit is not its
    assert broker.ledger.leases == (0 if verifies else 1)


def test_a_release_after_its_backend_was_seen_to_end_still_settles_what_was_owed(
    broker: Broker,
) -> None:
    """Else the broker would count on a checkin that has been."""
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    b.ask(wait_s=60)
    assert a.last(Recall).returns_due == 1
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    a.release(token, ReleaseReason.RETURN_DUE)
    assert broker.ledger.report(broker.now)[0][0].recalls == 1


def test_a_dead_workers_waiters_are_forgotten(broker: Broker) -> None:
    a, b, c = (broker.worker(name, max_conn=1) for name in "abc")
    token = a.lend()
    b.ask(wait_s=60)
    request = c.ask(wait_s=60)
    broker.take_in(broker.ledger.session_died(b.id, broker.now))
    a.release(token, ReleaseReason.RETURN_DUE)
    assert isinstance(c.outcome(request), Token)


def test_a_dead_workers_last_words_do_not_revive_it_but_a_release_is_evidence(
    broker: Broker,
) -> None:
    a = broker.worker("a")
    token = a.lend()
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    a.beat()
    a.ask()
    a.hello()
    assert broker.ledger.leases == 1
    assert broker.ledger.sessions == 0
    a.release(token)
    assert broker.ledger.leases == 0
    assert broker.ledger.report(broker.now) == ([], [])


def test_a_worker_that_dies_after_its_ttl_loses_an_unconnected_lease_too() -> None:
    """It was GRANTED, then SUSPECT: with no backend known nothing would ever confirm its end."""
    broker = Broker(has_control_connection=False)
    a = broker.worker("a")
    a.ask()
    broker.pass_time(TTL_S)
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    broker.pass_time(66)
    assert broker.ledger.leases == 0


def test_bye_fences_what_was_not_returned(broker: Broker) -> None:
    a = broker.worker("a")
    kept, returned = a.lend(), a.lend()
    a.release(returned)
    broker.send(a.id, Bye())
    assert [fence.token for fence in broker.all(Fence)] == [kept]
    assert broker.ledger.leases == 1


def test_bye_frees_a_grant_that_was_on_its_way_and_withdraws_requests(broker: Broker) -> None:
    """Who says BYE holds nothing and takes nothing; its process may live on for ever."""
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    a.ask(wait_s=60)
    a.ask(wait_s=60)
    request = b.ask(wait_s=60)
    broker.send(a.id, Bye())
    assert isinstance(b.outcome(request), Token)
    assert broker.ledger.leases == 1


def test_a_pool_that_nobody_uses_is_forgotten_with_its_limit(broker: Broker) -> None:
    a = broker.worker("a", max_conn=1)
    broker.send(a.id, Bye())
    b = broker.worker("b", max_conn=7)
    assert b.last(Welcome).max_conn == 7


def test_a_release_without_a_confirmed_close_is_verified_first(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    request = b.ask(wait_s=60)
    a.release(token, ReleaseReason.BROKEN, gone=False)
    assert b.outcome(request) is None
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert isinstance(b.outcome(request), Token)
