"""Checkouts that last longer than their pool allows."""

from __future__ import annotations

import logging

import pytest

from sharedpool.broker.core.commands import Fence, Log
from sharedpool.wire.messages import Ack, Recall
from tests.unit.ledger_driver import Broker


def test_a_checkout_that_lasts_too_long_is_reported_once_with_its_holder_and_thread(
    broker: Broker,
) -> None:
    a = broker.worker("a", max_checkout_ms=5000)
    token = a.lend()
    for _ in range(4):
        broker.pass_time(3)
        a.ages[token] = int((broker.now - 1000) * 1000)
        a.beat()
        broker.pass_time(0)
    (log,) = broker.all(Log)
    assert log.level == logging.WARNING
    assert broker.ledger.report(broker.now)[0][0].overdue == 1
    for part in (f"a[{100 + ord('a')}]", "'T1'", str(token), "max_checkout 5.0 s", "1001"):
        assert part in log.text


def test_a_worker_is_asked_before_its_checkout_is_called_too_long(broker: Broker) -> None:
    """It may have checked in and out since without a word."""
    a = broker.worker("a", max_checkout_ms=5000)
    token = a.lend()
    broker.pass_time(5)
    assert (a.last(Recall).take, a.last(Recall).returns_due) == (0, 0)
    a.ages[token] = 100
    a.answer()
    broker.pass_time(1.1)
    assert broker.all(Log) == []
    broker.pass_time(4)
    broker.pass_time(1.1)  # no answer this time: it is what is known
    assert len(broker.all(Log)) == 1


@pytest.mark.parametrize("word", ["answer", "older word", "none"])
def test_a_checkout_that_is_too_long_is_ended_if_its_pool_wants_that_and_it_is_certain(
    broker: Broker, word: str
) -> None:
    """A heartbeat that was under way when the worker was asked does not tell what has happened
    since."""
    a = broker.worker("a", max_checkout_ms=5000, end_overdue=True)
    token = a.lend()
    broker.pass_time(5)
    a.ages[token] = 5000
    if word != "none":
        a.answer() if word == "answer" else a.beat()
    broker.pass_time(1.1)
    said = [log for log in broker.all(Log) if log.fields["reason"] == "max_checkout"]
    ended = [log for log in broker.all(Log) if "ending backend" in log.text]
    assert (len(said), len(ended)) == (1, word == "answer")
    assert [fence.token for fence in broker.all(Fence)] == ([token] if word == "answer" else [])
    assert [ack.revoked for ack in a.sent(Ack) if ack.revoked] == (
        [[token]] if word == "answer" else []
    )


def test_the_next_long_checkout_of_the_same_lease_is_reported_too(broker: Broker) -> None:
    a = broker.worker("a", max_checkout_ms=5000)
    token = a.lend()
    broker.pass_time(5)
    broker.pass_time(5)
    a.ages[token] = 1000  # in between it was back for a moment, which no heartbeat showed
    a.beat()
    broker.pass_time(4.1)
    broker.pass_time(1.1)
    assert len(broker.all(Log)) == 2
