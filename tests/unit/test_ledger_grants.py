"""Who is granted a slot, and who is told that there is none: in one pool, and under the cap of all
pools."""

from __future__ import annotations

from sharedpool.broker.core.commands import Send
from sharedpool.wire.messages import (
    Acquire,
    Deny,
    DenyReason,
    Grant,
    Recall,
    ReleaseReason,
    Welcome,
    Withdraw,
)
from sharedpool.wire.values import Holder, PoolSpec, Token
from tests.unit.ledger_driver import EPOCH, Broker, Worker

# --- grants


def test_free_slots_are_granted_at_once_up_to_the_limit(broker: Broker) -> None:
    a, b = broker.worker("a"), broker.worker("b")
    assert a.granted(a.ask()) == Token(EPOCH, 1)
    assert b.granted(b.ask()) == Token(EPOCH, 2)
    assert broker.ledger.leases == 2
    assert broker.all(Recall) == []


def newcomer(broker: Broker, name: str = "new") -> Worker:
    """A worker that says along with its HELLO that it waits for a connection."""
    worker = Worker(broker, name, PoolSpec("p", 2, 60_000))
    worker.hello(first=Acquire(1, 9000))
    return worker


def test_a_free_slot_is_granted_with_the_welcome(broker: Broker) -> None:
    new = newcomer(broker)
    assert new.last(Welcome).served == 1
    kinds = [
        type(each.message)
        for each in broker.commands
        if isinstance(each, Send) and each.session == new.id
    ]
    assert kinds == [Welcome, Grant]  # before it is welcome a worker takes in nothing
    token = new.last(Grant).token  # which is on its way
    new.hello(first=Acquire(1, 9000))
    assert (new.last(Welcome).served, new.last(Grant).token, broker.ledger.leases) == (1, token, 1)


def test_a_request_within_a_hello_is_answered_at_once(broker: Broker) -> None:
    """Who has to wait does so at the desk; and nobody is overtaken."""
    a = broker.worker("a")
    token, _ = a.lend(), a.lend()
    new = newcomer(broker)
    assert new.last(Welcome).served == 0
    a.release(token)
    assert new.sent(Grant) == []
    waiting = [a.ask(9.0), a.ask(9.0)]
    assert newcomer(broker, "newer").last(Welcome).served == 0
    assert [isinstance(a.outcome(request), Token) for request in waiting] == [True, False]


def test_a_request_within_a_hello_is_ignored_while_the_broker_grants_nothing(
    broker: Broker,
) -> None:
    broker.take_in(broker.ledger.takeover.begin_grace_period(5.0, broker.now))
    new = newcomer(broker)
    assert (new.last(Welcome).served, new.sent(Grant), new.sent(Deny)) == (0, [], [])


def test_exhaustion_is_told_at_once_when_only_the_asker_holds(broker: Broker) -> None:
    a = broker.worker("a")
    a.lend()
    a.lend()
    denial = a.outcome(a.ask())
    assert isinstance(denial, Deny)
    assert (denial.reason, denial.max_conn) == (DenyReason.EXHAUSTED, 2)
    assert broker.all(Recall) == []


def test_exhaustion_is_told_only_after_every_holder_has_answered(broker: Broker) -> None:
    a, b, c = (broker.worker(name) for name in "abc")
    a.lend()
    b.lend()
    request = c.ask()
    assert c.outcome(request) is None
    a.answer()
    assert c.outcome(request) is None
    b.answer()
    assert isinstance(c.outcome(request), Deny)


def test_an_answer_from_before_the_request_does_not_count(broker: Broker) -> None:
    a, c = broker.worker("a", max_conn=1), broker.worker("c")
    a.lend()
    request = c.ask()
    a.beat()
    assert c.outcome(request) is None


def test_a_later_request_gets_a_round_of_its_own(broker: Broker) -> None:
    a, c = broker.worker("a", max_conn=1), broker.worker("c")
    token = a.lend()
    first, second = c.ask(), c.ask()
    a.answer()
    assert isinstance(c.outcome(first), Deny)
    assert c.outcome(second) is None
    a.checkin(token)
    a.answer()
    a.answer()
    a.release(token)
    assert isinstance(c.outcome(second), Token)


def test_holders_who_owe_a_checkin_are_asked_too_before_a_denial(broker: Broker) -> None:
    """Of three checkins at once one return was due: the two others lie idle, and only the holder
    knows."""
    a, b, c = (broker.worker(name, max_conn=3) for name in "abc")
    tokens = [a.lend() for _ in range(3)]
    b.ask(wait_s=60)
    a.answer()
    assert a.last(Recall).returns_due == 1
    for token in tokens[1:]:
        a.checkin(token)
    request = c.ask()
    assert c.outcome(request) is None
    a.answer()
    a.answer()
    for token in tokens[1:]:
        a.release(token)
    assert isinstance(c.outcome(request), Token)


def test_a_denial_names_who_holds_most_and_since_when(broker: Broker) -> None:
    a, b, c = (broker.worker(name, max_conn=3) for name in "abc")
    b.lend()
    broker.now += 2
    a.lend()
    a.lend()
    broker.now += 3
    request = c.ask(wait_s=1)
    broker.pass_time(1)
    denial = c.outcome(request)
    assert isinstance(denial, Deny)
    assert denial.reason is DenyReason.TIMEOUT
    assert denial.holders == [
        Holder(f"a[{100 + ord('a')}]", 2, 4000),
        Holder(f"b[{100 + ord('b')}]", 1, 6000),
    ]


def test_first_come_first_served_over_all_workers(broker: Broker) -> None:
    a = broker.worker("a")
    tokens = [a.lend(), a.lend()]
    others = [broker.worker(name) for name in "bcd"]
    requests = [other.ask(wait_s=60) for other in others]
    for token in tokens:
        a.release(token, ReleaseReason.RETURN_DUE)
    assert [
        type(other.outcome(request)) for other, request in zip(others, requests, strict=True)
    ] == [
        Token,
        Token,
        type(None),
    ]


def test_a_patient_request_is_refused_at_its_deadline_and_not_before(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    a.lend()
    request = b.ask(wait_s=5)
    a.answer()
    broker.pass_time(4.9)
    assert b.outcome(request) is None
    broker.pass_time(0.2)
    assert isinstance(b.outcome(request), Deny)


def test_a_cancelled_request_is_not_granted(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    request = b.ask(wait_s=5)
    broker.send(b.id, Withdraw(request))
    a.release(token)
    assert b.outcome(request) is None
    assert broker.ledger.leases == 0


def test_cancelling_a_granted_request_changes_nothing(broker: Broker) -> None:
    a = broker.worker("a")
    request = a.ask()
    broker.send(a.id, Withdraw(request))
    broker.send(a.id, Withdraw(77))
    assert broker.ledger.leases == 1


def test_no_more_may_wait_than_the_pool_allows() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1, max_waiting=2)
    b = broker.worker("b", max_conn=1)
    a.lend()
    waiting = [b.ask(wait_s=60) for _ in range(2)]
    denial = b.outcome(b.ask(wait_s=60))
    assert isinstance(denial, Deny)
    assert denial.reason is DenyReason.CROWDED
    assert [b.outcome(request) for request in waiting] == [None, None]


def test_a_grant_tells_for_how_long_its_request_had_waited_also_when_it_is_sent_again() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    request = b.ask(wait_s=600)
    broker.pass_time(2.5)
    a.release(token)
    broker.pass_time(4.0)
    b.beat()  # it says that the grant has not come
    assert [(grant.request, grant.waited_ms) for grant in b.sent(Grant)] == [(request, 2500)] * 2


# --- the cap over all pools


def test_the_cap_counts_all_pools_and_recalls_what_is_idle_in_another() -> None:
    broker = Broker(max_conn=2)
    a, b = broker.worker("a", "one"), broker.worker("b", "two")
    tokens = [a.lend(), a.lend()]
    for token in tokens:
        a.checkin(token)
    a.beat()
    request = b.ask()
    assert a.last(Recall).take == 1
    a.answer()
    a.release(tokens[0])
    assert isinstance(b.outcome(request), Token)
    assert broker.ledger.leases == 2


def test_the_cap_presses_holders_of_another_pool() -> None:
    broker = Broker(max_conn=1)
    a, b = broker.worker("a", "one"), broker.worker("b", "two")
    token = a.lend()
    request = b.ask(wait_s=60)
    a.answer()
    assert a.last(Recall).returns_due == 1
    a.release(token, ReleaseReason.RETURN_DUE)
    assert isinstance(b.outcome(request), Token)


def test_under_the_cap_an_older_waiter_of_another_pool_is_not_starved_by_the_holders_own() -> None:
    broker = Broker(max_conn=1)
    a, b = broker.worker("a", "one"), broker.worker("b", "two")
    a.lend()
    b.ask(wait_s=60)
    a.ask(wait_s=60)
    assert a.last(Recall).returns_due == 1


def test_under_the_cap_waiters_of_a_pool_full_by_its_own_limit_do_not_press_others() -> None:
    broker = Broker(max_conn=3)
    a, b = broker.worker("a", "one"), broker.worker("b", "two", max_conn=1)
    a.lend()
    a.lend()
    b.lend()
    broker.worker("c", "two").ask(wait_s=60)
    assert a.sent(Recall) == []
    assert b.last(Recall).returns_due == 1
    broker.worker("d", "three").ask(wait_s=60)
    assert a.last(Recall).returns_due == 1


def test_a_pools_limit_is_set_by_its_first_hello_and_never_above_the_cap() -> None:
    broker = Broker(max_conn=10)
    assert broker.worker("a", max_conn=4).last(Welcome).max_conn == 4
    assert broker.worker("b", max_conn=9).last(Welcome).max_conn == 4
    assert broker.worker("c", "other", max_conn=99).last(Welcome).max_conn == 10
