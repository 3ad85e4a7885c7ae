"""A worker's HELLO: versions, servers, and leases from before a restart."""

from __future__ import annotations

from sharedpool.broker.core.commands import Fence, Log
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Acquire,
    Bye,
    Confirm,
    Grant,
    Hello,
    Reject,
    Welcome,
)
from sharedpool.wire.values import Backend, LeaseReport, Phase, PoolSpec, Token
from tests.unit.ledger_driver import EPOCH, Broker, Worker


def test_another_protocol_version_is_refused_for_good(broker: Broker) -> None:
    a = Worker(broker, "a", PoolSpec("p", 1, 1000))
    a.hello(version=PROTOCOL_VERSION + 1)
    reject = a.last(Reject)
    assert reject.fatal
    assert str(PROTOCOL_VERSION + 1) in reject.reason
    assert broker.ledger.sessions == 0


def test_a_session_that_was_never_registered_is_told_to_say_hello(broker: Broker) -> None:
    broker.send(b"x", Acquire(1, 0))
    (reject,) = broker.all(Reject)
    assert not reject.fatal
    assert broker.send(b"x", Bye()) == []


def test_another_server_under_the_same_pool_name_is_warned_of(broker: Broker) -> None:
    broker.worker("a")
    Worker(broker, "b", PoolSpec("p", 1, 1000, 0, "elsewhere")).hello()
    (log,) = broker.all(Log)
    assert "elsewhere" in log.text


def old(serial: int) -> Token:
    return Token(EPOCH - 1, serial)


def restart_with(broker: Broker, name: str, held: dict[Token, Phase], max_conn: int = 2) -> Worker:
    worker = Worker(broker, name, PoolSpec("p", max_conn, 60_000))
    worker.held, worker.seen = held, Token(EPOCH - 1, 500)
    worker.hello()
    return worker


def test_leases_from_before_a_restart_are_counted_even_above_the_limit(broker: Broker) -> None:
    a = restart_with(broker, "a", {old(n): Phase.IN_USE for n in range(4)})
    assert a.last(Welcome).revoked == []
    assert broker.ledger.leases == 4
    request = a.ask(wait_s=60)
    for n in range(3):
        assert a.outcome(request) is None
        a.release(old(n))
    assert isinstance(a.outcome(request), Token)


def test_a_lease_from_before_a_restart_belongs_to_the_first_who_claims_it(broker: Broker) -> None:
    restart_with(broker, "a", {old(1): Phase.IN_USE})
    assert restart_with(broker, "b", {old(1): Phase.IN_USE}).last(Welcome).revoked == [old(1)]
    assert broker.ledger.leases == 1


def test_a_lease_that_was_being_connected_can_be_claimed(broker: Broker) -> None:
    report = LeaseReport(old(1), Phase.CONNECTING, 0)
    broker.send(b"a", Hello(PROTOCOL_VERSION, 1, "", "a", PoolSpec("p", 2, 1000), [report], old(1)))
    assert broker.ledger.report(broker.now)[0][0].granted == 1
    broker.send(b"a", Confirm(old(1), Backend(1)))
    assert broker.ledger.report(broker.now)[0][0].in_use == 1


def test_a_claimed_lease_that_was_given_back_cannot_be_claimed_again(broker: Broker) -> None:
    """A late HELLO, or a worker that slept while its lease was fenced: the slot is another's by
    now."""
    a = restart_with(broker, "a", {old(1): Phase.IN_USE})
    a.release(old(1))
    a.held = {old(1): Phase.IN_USE}
    a.hello()
    assert a.last(Welcome).revoked == [old(1)]
    assert broker.ledger.leases == 0


def test_unknown_leases_of_this_epoch_are_revoked_not_admitted(broker: Broker) -> None:
    a = broker.worker("a")
    a.held = {Token(EPOCH, 77): Phase.IN_USE, Token(EPOCH, 78): Phase.IDLE}
    a.hello()
    assert a.last(Welcome).revoked == list(a.held)
    a.beat()
    assert a.last(Ack).revoked == list(a.held)
    assert broker.ledger.leases == 0


def test_a_former_brokers_leases_count_though_its_number_was_higher(broker: Broker) -> None:
    """Its clock was ahead, and its files are lost.

    Numbers of different brokers say nothing of what came first.
    """
    a = broker.worker("a", max_conn=3)
    theirs = Token(EPOCH + 1, 9)
    a.held, a.seen = {theirs: Phase.IN_USE}, theirs
    a.hello()
    assert a.last(Welcome).revoked == []
    assert broker.ledger.leases == 1
    request = a.ask(wait_s=5)
    # its heartbeat was written before our WELCOME came: it knows of nothing that we have granted
    a.beat()
    assert isinstance(a.outcome(request), Token)
    assert len(a.sent(Grant)) == 2  # sent again
    assert broker.ledger.leases == 2
    broker.send(a.id, Bye(theirs))
    assert {fence.token for fence in broker.all(Fence)} == {theirs}
    assert broker.ledger.leases == 1  # what was granted and never seen is free


def test_leases_from_before_a_restart_are_admitted_by_hello_only(broker: Broker) -> None:
    a = broker.worker("a")
    a.held = {old(1): Phase.IN_USE}
    a.beat()
    assert a.last(Ack).revoked == [old(1)]


def test_a_pools_other_servers_are_each_told_of_once(broker: Broker) -> None:
    """Whoever comes and goes must not fill the log."""
    broker.worker("a")
    for number in range(50):
        worker = Worker(
            broker, f"b{number}", PoolSpec("p", 2, 1000, server=f"elsewhere{number % 2}")
        )
        worker.hello()
        broker.send(worker.id, Bye())
    said = [each.text for each in broker.all(Log) if "the pool's first process" in each.text]
    assert len(said) == 2
