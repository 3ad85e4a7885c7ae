"""What lies idle at a worker: recalled for others, owed at checkin, and closed when it expires."""

from __future__ import annotations

import pytest

from sharedpool.wire.messages import Grant, Recall, ReleaseReason, Welcome
from sharedpool.wire.values import Phase, Token
from tests.unit.ledger_driver import Broker

# --- idle leases


def test_an_idle_lease_is_recalled_closed_and_granted_to_the_waiter(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    a.checkin(token)
    a.beat()
    request = b.ask()
    assert (a.last(Recall).take, a.last(Recall).returns_due) == (1, 0)
    a.answer()
    assert b.outcome(request) is None  # closing, not closed: it counts
    a.release(token)
    assert isinstance(b.outcome(request), Token)


@pytest.mark.parametrize("wait_s", [0.0, 60.0])
def test_an_idle_lease_the_broker_does_not_know_of_is_found_by_asking(
    broker: Broker, wait_s: float
) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    a.checkin(token)
    request = b.ask(wait_s)
    assert a.last(Recall).take == 0
    a.answer()
    assert a.last(Recall).take == 1
    a.answer()
    a.release(token)
    assert isinstance(b.outcome(request), Token)


def test_the_longest_idle_leases_are_recalled_and_only_as_many_as_wait(broker: Broker) -> None:
    workers = [broker.worker(name, max_conn=3) for name in "abc"]
    for worker in workers:
        worker.checkin(worker.lend())
        worker.beat()
        broker.now += 1
    d = broker.worker("d")
    d.ask()
    d.ask()
    assert [worker.sent(Recall) and worker.last(Recall).take for worker in workers[:2]] == [1, 1]
    assert all(recall.take == 0 for recall in workers[2].sent(Recall))


def test_a_lease_that_was_busy_after_all_is_owed_at_checkin(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    a.checkin(token)
    a.beat()
    request = b.ask(wait_s=60)
    a.held[token] = Phase.IN_USE  # checked out before the recall came
    a.answer()
    assert (a.last(Recall).take, a.last(Recall).returns_due) == (0, 1)
    a.answer()
    a.release(token, ReleaseReason.RETURN_DUE)
    assert isinstance(b.outcome(request), Token)


def test_a_heartbeat_that_crosses_a_recall_does_not_double_it(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    a.checkin(a.lend())
    a.beat()
    b.ask(wait_s=60)
    a.beat()  # written before the recall arrived
    assert sum(recall.take for recall in a.sent(Recall)) == 1


def test_holders_are_relieved_when_nobody_waits_any_more(broker: Broker) -> None:
    a, b, c = (broker.worker(name) for name in "abc")
    token = a.lend()
    b.lend()
    c.ask(wait_s=60)
    assert [a.last(Recall).returns_due, b.last(Recall).returns_due] == [1, 1]
    a.release(token, ReleaseReason.RETURN_DUE)
    assert (b.last(Recall).returns_due, b.last(Recall).answer) == (0, False)


def test_a_holder_whose_own_thread_is_first_in_line_is_not_pressed(broker: Broker) -> None:
    a, b = broker.worker("a"), broker.worker("b")
    a.lend()
    b.lend()
    a.ask(wait_s=60)
    b.ask(wait_s=60)
    assert a.sent(Recall) == []
    assert b.last(Recall).returns_due == 1


def test_a_grant_says_how_many_checkins_are_owed(broker: Broker) -> None:
    a, b, c = (broker.worker(name, max_conn=1) for name in "abc")
    token = a.lend()
    b.ask(wait_s=60)
    c.ask(wait_s=60)
    a.release(token, ReleaseReason.RETURN_DUE)
    assert b.last(Grant).returns_due == 1


def test_recalls_carry_growing_serials(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    for _ in range(3):
        token = a.lend()
        request = b.ask(wait_s=60)
        a.release(token, ReleaseReason.RETURN_DUE)
        b.release(b.open(request))
    serials = [message.serial for message in broker.all(Recall) + broker.all(Grant)]
    assert len(set(serials)) == len(serials)


# --- expiry


def test_an_idle_lease_that_has_expired_is_recalled_from_a_worker_that_does_nothing(
    broker: Broker,
) -> None:
    a = broker.worker("a", expiration_ms=10_000)
    token = a.lend()
    a.checkin(token)
    a.beat()
    broker.pass_time(9.9)
    assert a.sent(Recall) == []
    broker.pass_time(0.2)
    assert a.last(Recall).expired


def test_leases_that_expire_together_are_asked_for_once(broker: Broker) -> None:
    a = broker.worker("a", max_conn=50, expiration_ms=10_000)
    for _ in range(50):
        a.checkin(a.lend())
    a.beat()
    broker.pass_time(10)
    assert len(a.sent(Recall)) == 1


def test_the_broker_may_shorten_the_expiration() -> None:
    broker = Broker(expiration_s=3)
    assert broker.worker("a").last(Welcome).expiration_ms == 3000
