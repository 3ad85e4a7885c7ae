"""What the ledger believes when something is between the workers and the server, message by
message."""

from __future__ import annotations

from typing import Any

import pytest

from sharedpool.broker.core.commands import Fence, Log, Record, SurveyServer
from sharedpool.broker.core.leases import QUEUE_LIMIT_S
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.wire.messages import (
    Confirm,
    Deny,
    DenyReason,
    Recall,
    Release,
    ReleaseReason,
    Renew,
    Stale,
)
from sharedpool.wire.values import Backend, LeaseReport, Phase, Token
from tests.unit.ledger_driver import EPOCH, TTL_S, Broker, Worker


def proxied_broker(**options: Any) -> Broker:
    broker = Broker(**options)
    if options.get("has_control_connection", True):
        broker.take_in(broker.ledger.control.reached(broker.now, direct=False, fault=""))
    return broker


def backend(serial: int, *, pooled: str | None = None, direct: bool = False) -> Backend:
    return Backend(2000 + serial, 1, 1, direct, pooled)


def lend(worker: Worker, found: Backend) -> Token:
    token = worker.granted(worker.ask())
    worker.broker.send(worker.id, Confirm(token, found))
    return token


def deposit(broker: Broker, token: Token) -> None:
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))


def die_connecting(worker: Worker) -> None:
    worker.granted(worker.ask())
    worker.broker.take_in(worker.broker.ledger.session_died(worker.id, worker.broker.now))


# --- the end of a socket


def test_the_end_of_a_direct_connection_is_its_backends() -> None:
    broker = proxied_broker()
    token = lend(broker.worker("a"), backend(1, direct=True))
    assert broker.ledger.believes(token)


def test_the_end_of_a_connection_through_a_proxy_has_the_server_asked() -> None:
    broker = proxied_broker()
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = lend(a, backend(1))
    deposit(broker, token)
    assert not broker.ledger.believes(token)
    request = b.ask(wait_s=60)
    broker.take_in(broker.ledger.ended_without_proof(token, broker.now, peer_closed=True))
    assert [fence.backend for fence in broker.all(Fence)] == [backend(1)]
    a.broker.send(
        a.id, Release(token, False, ReleaseReason.CLOSED, backend(1))
    )  # its worker's word comes later
    assert len(broker.all(Fence)) == 1
    assert b.outcome(request) is None
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert isinstance(b.outcome(request), Token)


def test_a_fence_under_way_is_not_ordered_again_when_the_proxy_closes_too() -> None:
    broker = proxied_broker()
    a = broker.worker("a", max_conn=1)
    token = lend(a, backend(1))
    deposit(broker, token)
    a.broker.send(a.id, Release(token, False, ReleaseReason.CLOSED, backend(1)))
    broker.take_in(broker.ledger.ended_without_proof(token, broker.now, peer_closed=True))
    assert [fence.backend for fence in broker.all(Fence)] == [backend(1)]


def test_a_connection_that_nobody_has_described_is_judged_by_the_others_of_its_pool() -> None:
    broker = proxied_broker()
    a = broker.worker("a", max_conn=5)
    first = a.granted(a.ask())
    assert not broker.ledger.believes(first)
    lend(a, backend(1, direct=True))
    assert broker.ledger.believes(first)
    lend(a, backend(2))  # some go by a proxy
    assert not broker.ledger.believes(first)


def test_a_control_connection_that_goes_the_same_way_tells_of_the_first() -> None:
    broker = Broker()
    a = broker.worker("a")
    assert broker.ledger.believes(a.granted(a.ask()))
    elsewhere = Broker(server="@far:5432/")  # type: ignore[arg-type]
    b = elsewhere.worker("b")
    assert not elsewhere.ledger.believes(b.granted(b.ask()))


def test_a_successor_knows_how_its_predecessors_workers_went() -> None:
    broker = proxied_broker()
    token = lend(broker.worker("a", max_conn=5), backend(1, direct=True))
    entries = {record.entry.token: record.entry for record in broker.all(Record)}
    after = proxied_broker(epoch=EPOCH + 1, journal_complete=True)
    after.take_in(after.ledger.takeover.restore(entries.values(), after.now))
    assert after.ledger.believes(token)
    b = after.worker("b", max_conn=5)
    assert after.ledger.believes(b.granted(b.ask()))


def test_a_connection_whose_end_comes_before_its_description_is_ended_all_the_same() -> None:
    """The two come by different ways."""
    broker = proxied_broker()
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    deposit(broker, token)
    broker.take_in(broker.ledger.ended_without_proof(token, broker.now, peer_closed=True))
    assert broker.ledger.leases == 1
    a.broker.send(a.id, Confirm(token, backend(1)))
    assert [fence.backend for fence in broker.all(Fence)] == [backend(1)]


@pytest.mark.parametrize("direct", [True, False])
def test_without_a_control_connection_an_end_proves_nothing_until_its_route_is_known(
    direct: bool,
) -> None:
    broker = Broker(has_control_connection=False)
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    deposit(broker, token)
    broker.take_in(broker.ledger.ended_without_proof(token, broker.now, peer_closed=True))
    assert broker.ledger.leases == 1
    a.broker.send(a.id, Confirm(token, backend(1, direct=direct)))
    assert broker.ledger.leases == (0 if direct else 1)
    said = [log.text for log in broker.all(Log) if "may go through a proxy" in log.text]
    assert len(said) == (0 if direct else 1)


def test_without_a_control_connection_another_workers_tells_what_a_dead_ones_end_proved() -> None:
    broker = Broker(has_control_connection=False)
    a, b = broker.worker("a", max_conn=2), broker.worker("b")
    token = a.granted(a.ask())
    deposit(broker, token)
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    broker.take_in(broker.ledger.ended_without_proof(token, broker.now, peer_closed=True))
    assert broker.ledger.leases == 1
    lend(b, backend(1, direct=True))
    assert broker.ledger.leases == 1  # b's own


# --- connects that fail


@pytest.mark.parametrize("verifies", [True, False])
@pytest.mark.parametrize("met", ["a proxy", "nobody", "none yet"])
def test_a_connect_that_the_other_side_has_closed_is_over_if_that_is_the_server(
    verifies: bool, met: str
) -> None:
    broker = proxied_broker(has_control_connection=verifies)
    a = broker.worker("a", max_conn=5)
    if met != "none yet":
        lend(a, backend(1, direct=met == "nobody"))
    before = broker.ledger.leases
    token = a.granted(a.ask())
    a.broker.send(a.id, Release(token, False, ReleaseReason.FAILED, peer_closed=True))
    believed = met == "nobody" or (met == "none yet" and not verifies)
    assert broker.ledger.leases == before + (not believed)
    if verifies and not believed:
        broker.show_nothing()  # at once: it is in no queue any more
        assert broker.ledger.leases == before


def test_a_connect_may_be_in_a_proxys_queue_for_a_while() -> None:
    broker = proxied_broker()
    a = broker.worker("a", max_conn=1)
    die_connecting(a)
    broker.pass_time(QUEUE_LIMIT_S - 1)
    assert broker.all(SurveyServer) == []
    broker.pass_time(1)
    broker.show_nothing()
    assert broker.ledger.leases == 0


def test_where_nobody_turns_out_to_be_in_between_there_is_no_queue() -> None:
    broker = proxied_broker()
    a, b = broker.worker("a", max_conn=2), broker.worker("b")
    die_connecting(a)
    assert broker.all(SurveyServer) == []
    lend(b, backend(1, direct=True))
    broker.show_nothing()
    assert broker.ledger.leases == 1


@pytest.mark.parametrize(("server", "straight"), [("", True), ("@far:5432/", False)])
def test_a_control_connection_that_goes_straight_to_the_same_server_tells_a_new_broker_too(
    server: str, straight: bool
) -> None:
    """Which has found a former one's workers dead before it was connected."""
    before = Broker()
    a = before.worker("a", max_conn=1)
    a.granted(a.ask())
    after = proxied_broker(epoch=EPOCH + 1, journal_complete=True, server=server)
    entries = [record.entry for record in before.all(Record)]
    after.take_in(after.ledger.takeover.restore(entries, after.now))
    after.take_in(after.ledger.session_died(a.id, after.now))
    assert after.all(SurveyServer) == []
    after.take_in(after.ledger.control.reached(after.now, direct=True, fault=""))
    assert bool(after.all(SurveyServer)) is straight
    if straight:
        after.show_nothing()
    assert after.ledger.leases == (0 if straight else 1)


def test_a_look_for_one_slot_says_nothing_of_another_whose_connect_may_be_queued() -> None:
    broker = proxied_broker()
    a, b = broker.worker("a", max_conn=2), broker.worker("b")
    die_connecting(a)
    refused = b.granted(b.ask())
    b.broker.send(b.id, Release(refused, False, ReleaseReason.FAILED, peer_closed=True))
    broker.show_nothing()
    assert broker.ledger.leases == 1
    broker.pass_time(SETTLE_S * 10)
    assert broker.ledger.leases == 1


# --- poolers


def test_a_backend_that_a_pooler_lends_again_frees_the_slot_it_was_in() -> None:
    broker = proxied_broker()
    a, b = broker.worker("a", max_conn=2), broker.worker("b")
    token = lend(a, backend(1, pooled="p"))
    a.broker.send(a.id, Release(token, False, ReleaseReason.CLOSED, backend(1, pooled="p")))
    assert broker.ledger.leases == 1
    lend(b, backend(1, pooled="p"))
    assert broker.ledger.leases == 1


def test_a_slot_whose_backend_is_anothers_by_now_needs_no_fence() -> None:
    broker = proxied_broker()
    a, b = broker.worker("a", max_conn=2), broker.worker("b")
    token = lend(a, backend(1, pooled="p"))
    lend(b, backend(1, pooled="p"))  # the news of a's close is on its way
    a.broker.send(a.id, Release(token, False, ReleaseReason.CLOSED, backend(1, pooled="p")))
    assert broker.all(Fence) == []
    assert broker.ledger.leases == 1


def _twins(broker: Broker) -> tuple[Worker, Worker, list[LeaseReport], list[LeaseReport]]:
    a, b = broker.worker("a", max_conn=4), broker.worker("b")
    found = backend(1, pooled="p")
    one, other = lend(a, found), lend(b, found)
    return (
        a,
        b,
        [LeaseReport(one, Phase.IN_USE, 0, "", found)],
        [LeaseReport(other, Phase.IN_USE, 0, "", found)],
    )


def _answer(worker: Worker, reports: list[LeaseReport]) -> None:
    serial = worker.last(Recall).serial
    worker.broker.send(worker.id, Renew(reports, worker.seen, serial, list(worker.pending)))


def test_two_open_connections_on_one_backend_make_a_pool_unsuitable() -> None:
    broker = proxied_broker()
    a, b, ones, others = _twins(broker)
    waiting = a.ask(wait_s=60)
    assert isinstance(a.outcome(waiting), Token)  # not yet: one may have been closed meanwhile
    _answer(a, ones)
    assert a.sent(Stale) == []
    _answer(b, others)
    assert a.sent(Stale)
    denial = b.outcome(b.ask(wait_s=60))
    assert isinstance(denial, Deny)
    assert denial.reason is DenyReason.UNSUITABLE
    assert "does not keep sessions" in denial.error
    assert "2001" in denial.error


def test_a_connection_closed_before_the_other_was_opened_is_no_proof() -> None:
    broker = proxied_broker()
    a, b, ones, others = _twins(broker)
    closing = [LeaseReport(ones[0].token, Phase.CLOSING, 0, "", ones[0].backend)]
    _answer(a, closing)
    _answer(b, others)
    assert a.sent(Stale) == b.sent(Stale) == []
    assert isinstance(b.outcome(b.ask(wait_s=60)), Token)


def test_an_unsuitable_way_is_refused_at_once_and_taken_when_it_is_mended() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    a.lend()
    request = a.ask(wait_s=60)
    broker.take_in(
        broker.ledger.control.reached(broker.now, direct=False, fault="it keeps nothing")
    )
    denial = a.outcome(request)
    assert isinstance(denial, Deny)
    assert (denial.reason, denial.error) == (DenyReason.UNSUITABLE, "it keeps nothing")
    b = broker.worker("b", pool="q")
    assert isinstance(b.outcome(b.ask()), Deny)
    broker.take_in(broker.ledger.control.reached(broker.now, direct=True, fault=""))
    assert isinstance(b.outcome(b.ask()), Token)


def test_a_silent_worker_is_not_asked_about_its_backend() -> None:
    broker = proxied_broker()
    a, b = broker.worker("a", max_conn=4), broker.worker("b")
    found = backend(1, pooled="p")
    lend(a, found)
    broker.pass_time(TTL_S + 1)
    b.hello()
    lend(b, found)
    broker.pass_time(1)
    assert isinstance(b.outcome(b.ask(wait_s=60)), Token)
