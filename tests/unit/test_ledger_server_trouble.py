"""Connects that fail, and a server that fails over."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.backoff import PROBE_EVERY_S
from sharedpool.broker.core.commands import Fence, VerifyServer
from sharedpool.wire.messages import (
    Ack,
    Confirm,
    Deny,
    DenyReason,
    FailoverSign,
    Recall,
    Release,
    ReleaseReason,
    Stale,
)
from sharedpool.wire.values import Token
from tests.unit.ledger_driver import TTL_S, Broker, Worker


def fail(worker: Worker, token: Token, error: str = "the database system is starting up") -> None:
    worker.held.pop(token, None)
    worker.broker.send(
        worker.id, Release(token, True, ReleaseReason.FAILED, error=error, code="57P03")
    )


def test_while_connects_fail_one_is_tried_and_everybody_else_is_told_why() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=5), broker.worker("b")
    fail(a, a.granted(a.ask()))
    request = b.ask(wait_s=60)
    denial = b.outcome(request)
    assert isinstance(denial, Deny)
    assert (denial.reason, denial.error) == (
        DenyReason.FAILING,
        "the database system is starting up",
    )
    assert 0 < denial.retry_ms <= 1000
    broker.pass_time(2 * PROBE_EVERY_S)
    probe = b.granted(b.ask())
    assert isinstance(a.outcome(a.ask(wait_s=60)), Deny)  # one at a time
    broker.send(b.id, Release(probe, True, ReleaseReason.FAILED, error="still", unreachable=True))
    denial = a.outcome(a.ask())
    assert isinstance(denial, Deny)
    assert denial.error == "still"


def test_while_connects_fail_who_does_not_wait_has_a_silent_worker_fenced_as_well() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=2), broker.worker("b")
    token = a.lend()
    broker.pass_time(TTL_S / 2)
    b.beat()
    broker.pass_time(TTL_S / 2)
    fail(b, b.granted(b.ask()))
    denial = b.outcome(b.ask())
    assert isinstance(denial, Deny)
    assert denial.reason is DenyReason.FAILING
    assert [fence.token for fence in broker.all(Fence)] == [token]


def test_when_the_server_is_back_the_pool_is_whole_again_one_by_one() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=3)
    fail(a, a.granted(a.ask()))
    broker.pass_time(2 * PROBE_EVERY_S)
    for _ in range(3):
        a.open(a.ask(wait_s=60))  # no time passes
    assert broker.ledger.report(broker.now)[0][0].error == ""


def test_a_full_server_keeps_what_there_is_in_use() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=5), broker.worker("b")
    token = a.lend()
    fail(b, b.granted(b.ask()), "too many clients")
    request = b.ask(wait_s=60)
    assert b.outcome(request) is None  # it waits for what there is
    assert a.last(Recall).returns_due == 1
    a.release(token, ReleaseReason.RETURN_DUE)
    assert isinstance(b.outcome(request), Token)


def test_while_a_probe_is_under_way_a_full_server_is_not_taken_for_one_that_is_down() -> None:
    """The last connections are closed just then: whoever waits will have the next."""
    broker = Broker()
    a, b, c = (broker.worker(name, max_conn=5) for name in "abc")
    token = a.lend()
    fail(b, b.granted(b.ask()), "too many clients")
    broker.pass_time(2 * PROBE_EVERY_S)
    probe = b.granted(b.ask(wait_s=60))
    request = c.ask(wait_s=60)
    a.release(token, ReleaseReason.CLOSED)
    assert c.outcome(request) is None
    broker.send(b.id, Confirm(probe, b.backend(probe)))
    assert isinstance(c.outcome(request), Token)


def test_one_sign_of_a_failover_makes_every_worker_replace_its_connections_once() -> None:
    broker = Broker()
    a, b = broker.worker("a"), broker.worker("b")
    a.lend()
    for worker in (a, b):
        broker.send(worker.id, FailoverSign(1, "25006"))
    assert [len(worker.sent(Stale)) for worker in (a, b)] == [1, 1]
    assert a.last(Stale).generation == 2
    a.beat()
    assert a.last(Ack).generation == 2  # should the message have been lost


@pytest.mark.parametrize("same", [True, False])
def test_a_dead_connection_alone_is_no_failover_if_the_server_says_so(same: bool) -> None:
    broker = Broker()
    a = broker.worker("a")
    broker.send(a.id, FailoverSign(1, "57P01"))
    broker.send(a.id, FailoverSign(1, ""))
    (doubt,) = broker.all(VerifyServer)
    assert a.sent(Stale) == []
    broker.take_in(
        broker.ledger.control.server_verified(doubt.pool, doubt.generation, same, broker.now)
    )
    assert len(a.sent(Stale)) == (0 if same else 1)


def test_without_a_control_connection_every_sign_counts() -> None:
    broker = Broker(has_control_connection=False)
    a = broker.worker("a")
    broker.send(a.id, FailoverSign(1, ""))
    assert a.last(Stale).generation == 2
