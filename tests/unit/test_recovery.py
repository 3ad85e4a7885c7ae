"""A broker after another's end: what the journal tells it, and what the workers say."""

from __future__ import annotations

import msgspec

from sharedpool.broker.core.commands import Erase, Fence, Process, Record, Send, Watch
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    START_UP_LIMIT_S,
    Ack,
    Acquire,
    Bye,
    Deny,
    Gone,
    Grant,
    Hello,
    Reject,
    Renew,
    Welcome,
)
from sharedpool.wire.values import LeaseReport, Phase, PoolSpec, Token
from tests.unit.ledger_driver import EPOCH, TTL_S, Broker, Worker
from tests.unit.restarts import journal_of, moved, successor


def test_a_lease_is_recorded_before_it_is_granted_and_erased_when_free() -> None:
    broker = Broker()
    a = broker.worker("a")
    token = a.lend()
    kinds = [type(c).__name__ for c in broker.commands if isinstance(c, Record | Erase)]
    grants = [c for c in broker.commands if isinstance(c, Send) and isinstance(c.message, Grant)]
    order = [c for c in broker.commands if isinstance(c, Record) or c in grants]
    assert isinstance(order[0], Record)
    assert kinds == ["Record", "Record"]  # granted, then with its backend
    assert journal_of(broker)[0].backend == a.backend(token)
    a.release(token)
    assert journal_of(broker) == []


def test_a_successor_counts_what_is_held_before_any_worker_has_spoken() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=2)
    a.lend()
    after = successor(broker)
    b = after.worker("b", max_conn=2)
    first, second = b.ask(wait_s=60), b.ask()
    assert isinstance(b.outcome(first), Token)  # certain: one of two is free
    assert isinstance(b.outcome(second), Deny)
    assert after.ledger.leases == 2


def test_workers_must_say_hello_to_a_successor_and_keep_what_they_hold() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=2)
    token = a.lend()
    after = successor(broker)
    again = moved(a, after)
    again.beat()
    assert not again.last(Reject).fatal
    again.hello()
    assert again.last(Welcome).revoked == []
    again.beat()
    assert again.last(Ack).revoked == []
    pool = after.ledger.report(after.now)[0][0]
    assert (pool.leases, pool.suspect) == (1, 0)
    again.release(token)
    assert after.ledger.leases == 0


def test_a_grant_lost_in_the_crash_is_looked_for_once_its_worker_has_said_hello() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    a.ask()  # granted; the message never arrived
    after = successor(broker)
    assert after.ledger.leases == 1
    moved(a, after).hello()
    after.show_nothing()
    assert after.ledger.leases == 0


def test_a_lease_that_the_former_broker_had_taken_away_is_never_admitted_again() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.lend()
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    after = successor(broker)
    again = moved(a, after)
    again.hello()
    assert again.last(Welcome).revoked == [token]
    assert after.ledger.leases == 0


def test_a_worker_that_died_with_the_former_broker_is_watched_and_fenced() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.lend()
    after = successor(broker)
    assert [watch.session for watch in after.all(Watch)] == [a.id]
    after.take_in(after.ledger.session_died(a.id, after.now))
    assert [fence.token for fence in after.all(Fence)] == [token]


def test_a_frozen_workers_lease_is_fenced_by_a_successor_after_a_ttl_when_somebody_waits() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.lend()
    after = successor(broker)
    after.pass_time(0.9 * TTL_S)
    b = after.worker("b", max_conn=1)
    b.ask(wait_s=60)
    assert after.all(Fence) == []  # it may be well, and not have noticed yet
    after.pass_time(0.2 * TTL_S)
    assert [fence.token for fence in after.all(Fence)] == [token]


def test_a_caller_who_does_not_wait_has_nothing_fenced_before_workers_could_say_hello() -> None:
    broker = Broker()
    token = broker.worker("a", max_conn=1).lend()
    after = successor(broker)
    after.pass_time(0.9 * TTL_S)
    b = after.worker("b", max_conn=1)
    assert isinstance(b.outcome(b.ask()), Deny)
    assert after.all(Fence) == []
    after.pass_time(0.2 * TTL_S)
    assert isinstance(b.outcome(b.ask()), Deny)
    assert [fence.token for fence in after.all(Fence)] == [token]


def test_a_lost_release_is_told_again_until_it_is_acknowledged() -> None:
    """Without a control connection nothing else would ever free the slot."""
    broker = Broker(has_control_connection=False)
    a = broker.worker("a", max_conn=1)
    token = a.lend()
    a.held.clear()  # released; the message was lost
    broker.send(a.id, Renew([], token, gone=[token]))
    assert broker.ledger.leases == 0
    assert a.last(Ack).gone == [token]


def test_a_sessions_process_is_recorded_for_the_successor_to_watch() -> None:
    broker = Broker()
    a = Worker(broker, "a", PoolSpec("p", 1, 1000))
    broker.take_in(
        broker.ledger.handle(
            a.id, Hello(PROTOCOL_VERSION, 5, "", "a", a.spec), broker.now, Process(55, 1234)
        )
    )
    broker.send(a.id, Acquire(1, 0))
    assert journal_of(broker)[0].process == Process(55, 1234)
    assert broker.all(Gone) == []
    broker.send(a.id, Bye())
    assert journal_of(broker) == []


def test_a_half_journaled_hand_over_restores_only_the_new_lease() -> None:
    """Its giver does not claim its lease any more; fenced for that, it would end the connection in
    its heir's hands."""
    before = Broker()
    a, b = (before.worker(name, max_conn=1) for name in "ab")
    a.lend()
    (entry,) = journal_of(before)
    heir = msgspec.structs.replace(entry, token=Token(EPOCH, 2), session=b.id)
    after = Broker(EPOCH + 1, journal_complete=True)
    after.take_in(after.ledger.takeover.restore([entry, heir], after.now))
    assert after.ledger.leases == 1
    assert after.all(Erase) == [Erase(entry.token)]
    a.held.clear()
    moved(a, after).hello()
    assert after.all(Fence) == []


def test_in_an_unjournaled_hand_over_the_claim_of_the_new_lease_counts() -> None:
    before = Broker()
    a, b = (before.worker(name, max_conn=1) for name in "ab")
    token = a.lend()
    (entry,) = journal_of(before)
    after = Broker(EPOCH + 1)
    after.take_in(after.ledger.takeover.restore([entry], after.now))
    after.take_in(after.ledger.takeover.begin_grace_period(TTL_S, after.now))
    heir = LeaseReport(Token(EPOCH, 2), Phase.IN_USE, 0, "", a.backend(token))
    after.send(b.id, Hello(PROTOCOL_VERSION, 2, "", "b", b.spec, [heir], heir.token))
    a.held.clear()
    moved(a, after).hello()
    assert after.all(Fence) == []
    assert after.ledger.leases == 1


def test_a_successor_looks_for_what_was_granted_to_who_never_says_hello() -> None:
    before = Broker()
    a = before.worker("a", max_conn=1)
    a.granted(a.ask())
    after = Broker(EPOCH + 1, journal_complete=True)
    after.take_in(after.ledger.takeover.restore(journal_of(before), after.now))
    b = after.worker("b")
    request = b.ask(wait_s=600)
    for _ in range(int(TTL_S + START_UP_LIMIT_S) + 1):
        after.pass_time(1.0)
        b.beat()
    after.show_nothing()
    assert isinstance(b.outcome(request), Token)
