"""The broker's core, message by message."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from sharedpool.broker.core.backoff import Backoff
from sharedpool.broker.core.commands import (
    Fence,
    Forget,
    Log,
    Send,
    Watch,
)
from sharedpool.broker.core.ledger import Ledger
from sharedpool.broker.core.recalls import ANSWER_LIMIT_S
from sharedpool.broker.core.records import Lease as Slot
from sharedpool.broker.core.records import Pool, Session
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.broker.core.slots import Slots
from sharedpool.wire.codec import encode
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    START_UP_LIMIT_S,
    Ack,
    Acquire,
    Bye,
    Confirm,
    Deny,
    DenyReason,
    Gone,
    Grant,
    Hello,
    Recall,
    Reject,
    Release,
    ReleaseReason,
    Renew,
    Welcome,
    Withdraw,
)
from sharedpool.wire.values import Backend, Holder, LeaseReport, Phase, PoolSpec, Token
from tests.unit.ledger_driver import EPOCH, TTL_S, Broker, Worker


@pytest.fixture
def broker() -> Broker:
    return Broker()


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


# --- doubles


def test_a_doubled_acquire_is_answered_once_while_it_waits(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    broker.send(b.id, Acquire(b.ask(wait_s=60), 60_000))
    a.release(token)
    assert len(b.sent(Grant)) == 1
    assert broker.ledger.leases == 1


def test_a_doubled_acquire_after_the_grant_gets_the_same_lease(broker: Broker) -> None:
    a = broker.worker("a")
    broker.send(a.id, Acquire(a.ask(), 0))
    assert [grant.token for grant in a.sent(Grant)] == [Token(EPOCH, 1)] * 2
    assert broker.ledger.leases == 1


def test_a_doubled_release_frees_one_slot(broker: Broker) -> None:
    a, b = broker.worker("a"), broker.worker("b")
    token = a.lend()
    b.lend()
    a.release(token)
    a.release(token)
    assert broker.ledger.leases == 1


def test_a_doubled_hello_changes_nothing(broker: Broker) -> None:
    a = broker.worker("a")
    a.lend()
    request = a.ask()
    a.hello()
    assert broker.ledger.leases == 2
    assert broker.ledger.sessions == 1
    assert len(broker.all(Watch)) == 1
    assert isinstance(a.outcome(request), Token)


def test_a_doubled_confirm_changes_nothing(broker: Broker) -> None:
    a = broker.worker("a")
    token = a.lend()
    broker.send(a.id, Confirm(token, a.backend(token)))
    assert broker.ledger.leases == 1


# --- dead workers


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


# --- silent workers


def test_a_silent_workers_leases_are_suspect_counted_and_come_back_with_renew(
    broker: Broker,
) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    broker.pass_time(TTL_S / 2)
    b.beat()
    broker.pass_time(TTL_S / 2)
    assert broker.ledger.report(broker.now)[0][0].suspect == 1
    assert broker.all(Fence) == []
    a.beat()
    assert broker.ledger.report(broker.now)[0][0].suspect == 0
    assert broker.ledger.leases == 1
    a.release(token)
    assert broker.ledger.leases == 0


def freeze_and_wait(broker: Broker, a: Worker, b: Worker) -> int:
    """Let `a` be silent for its TTL, then have `b` wait for its slot."""
    broker.pass_time(TTL_S / 2)
    b.beat()
    broker.pass_time(TTL_S / 2)
    return b.ask(wait_s=60)


def test_a_silent_worker_is_fenced_when_somebody_patient_waits(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    request = freeze_and_wait(broker, a, b)
    assert [fence.token for fence in broker.all(Fence)] == [token]
    assert b.outcome(request) is None
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert isinstance(b.outcome(request), Token)


@pytest.mark.parametrize("pool", ["p", "q"], ids=["own limit", "cap over all pools"])
def test_a_caller_who_does_not_wait_is_refused_and_has_a_silent_worker_fenced_for_the_next(
    pool: str,
) -> None:
    """Else a pool whose callers all have timeout=0, the default, would never see
    that slot again."""
    broker = Broker(max_conn=1)
    a, b = broker.worker("a"), broker.worker("b", pool)
    token = a.lend()
    broker.pass_time(TTL_S / 2)
    b.beat()
    broker.pass_time(TTL_S / 2)
    assert isinstance(b.outcome(b.ask()), Deny)
    assert [fence.token for fence in broker.all(Fence)] == [token]
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert isinstance(b.outcome(b.ask()), Token)


def test_a_request_blocked_by_its_own_pools_limit_recalls_nothing_from_other_pools() -> None:
    """Not even when claims have gone beyond the cap over all pools."""
    broker = Broker(max_conn=1)
    a, b = broker.worker("a", max_conn=1), Worker(broker, "b", PoolSpec("q", 2, 60_000))
    a.lend()
    b.held = dict.fromkeys((Token(EPOCH - 1, 1), Token(EPOCH - 1, 2)), Phase.IDLE)
    b.hello()
    a.ask(wait_s=9.0)
    assert b.sent(Recall) == []


def test_requests_without_a_wait_fence_no_more_suspects_than_were_refused(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=3), broker.worker("b")
    for _ in range(3):
        a.lend()
    broker.pass_time(TTL_S / 2)
    b.beat()
    broker.pass_time(TTL_S / 2)
    assert isinstance(b.outcome(b.ask()), Deny)
    assert len(broker.all(Fence)) == 1


def test_no_more_suspects_are_fenced_than_there_are_waiters(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=3), broker.worker("b")
    for _ in range(3):
        a.lend()
    freeze_and_wait(broker, a, b)
    for _ in range(5):  # more messages while the fence is under way
        b.beat()
    assert len(broker.all(Fence)) == 1


def test_a_fence_that_takes_long_is_not_waited_for_alone(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=2), broker.worker("b")
    a.lend()
    a.lend()
    freeze_and_wait(broker, a, b)
    broker.pass_time(ANSWER_LIMIT_S)
    assert len(broker.all(Fence)) == 2


def test_a_resumed_worker_is_told_that_its_lease_was_fenced(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    freeze_and_wait(broker, a, b)
    a.beat()
    assert a.last(Ack).revoked == [token]
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    a.beat()
    assert a.last(Ack).revoked == [token]
    assert broker.ledger.leases == 1  # b's


def test_an_unconnected_lease_of_a_silent_worker_is_not_fenced(broker: Broker) -> None:
    """There is nothing to look for, and its worker may connect when it resumes; then it must still
    be counted."""
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    mine = a.ask()
    request = freeze_and_wait(broker, a, b)
    assert broker.all(Fence) == []
    token = a.open(mine)
    a.beat()
    assert a.last(Ack).revoked == []
    a.release(token, ReleaseReason.RETURN_DUE)
    assert isinstance(b.outcome(request), Token)


def test_a_resumed_worker_that_asks_again_for_a_grant_on_its_way_gets_that_one(
    broker: Broker,
) -> None:
    """A second request in its name would stand in the queue for nobody, and keep it from being
    pressed."""
    a = broker.worker("a")
    request = a.ask(wait_s=600)
    broker.pass_time(TTL_S)
    a.hello()
    broker.send(a.id, Acquire(request, 600_000))
    assert {grant.token for grant in a.sent(Grant)} == {Token(EPOCH, 1)}
    assert broker.ledger.report(broker.now)[0][0].waiting == 0


def test_a_resumed_worker_whose_requests_were_dropped_is_told_to_ask_again(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    b.lend()
    a.ask(wait_s=600)
    broker.pass_time(TTL_S / 2)
    b.beat()
    broker.pass_time(TTL_S / 2)
    a.hello()  # it was forgotten: it holds nothing
    a.beat()
    assert not a.last(Reject).fatal


def test_a_silent_worker_without_leases_is_forgotten_and_no_longer_watched(broker: Broker) -> None:
    a = broker.worker("a")
    broker.pass_time(TTL_S)
    assert broker.ledger.report(broker.now) == ([], [])
    assert broker.all(Forget) == [Forget(a.id)]
    a.beat()
    assert isinstance(a.last(Reject), Reject)


# --- mute workers


def test_a_mute_worker_does_not_keep_a_waiter_from_other_idle_leases(broker: Broker) -> None:
    a, b, c = (broker.worker(name, max_conn=4) for name in "abc")
    for _ in range(3):
        a.checkin(a.lend())
    token = b.lend()
    b.checkin(token)
    a.beat()
    b.beat()
    request = c.ask(wait_s=60)
    assert b.sent(Recall) == []  # the idle ones of `a` came first, and `a` does not answer
    broker.pass_time(ANSWER_LIMIT_S)
    assert b.last(Recall).take == 1
    b.answer()
    b.release(token)
    assert isinstance(c.outcome(request), Token)


def test_a_mute_worker_does_not_hold_up_a_denial_for_longer_than_the_limit(broker: Broker) -> None:
    a, b, c = (broker.worker(name, max_conn=2) for name in "abc")
    a.lend()
    b.lend()
    first = c.ask()
    b.answer()
    broker.pass_time(ANSWER_LIMIT_S)
    assert isinstance(c.outcome(first), Deny)
    second = c.ask()
    b.answer()
    assert isinstance(c.outcome(second), Deny)  # `a` is not asked again


def test_a_mute_worker_that_owes_does_not_block_later_denials(broker: Broker) -> None:
    a, b, c = (broker.worker(name, max_conn=1) for name in "abc")
    a.lend()
    b.ask(wait_s=60)
    broker.pass_time(ANSWER_LIMIT_S)
    assert isinstance(c.outcome(c.ask()), Deny)


def test_a_mute_workers_idle_leases_count_again_when_it_speaks(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    a.checkin(token)
    a.beat()
    b.ask(wait_s=60)
    broker.pass_time(ANSWER_LIMIT_S)
    mark = len(broker.commands)
    broker.send(a.id, Withdraw(99))
    assert [recall.take for recall in a.sent(Recall, since=mark)] == [1]


def test_a_busy_worker_is_not_mute_because_its_newest_question_is_young(broker: Broker) -> None:
    a, c = broker.worker("a", max_conn=1), broker.worker("c")
    a.lend()
    c.ask()
    a.answer()
    broker.pass_time(ANSWER_LIMIT_S * 0.99)
    request = c.ask()
    broker.pass_time(
        ANSWER_LIMIT_S * 0.02
    )  # the first question's time is over, and it was answered
    assert c.outcome(request) is None


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


# --- time


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


def test_deadlines_of_requests_that_are_over_wake_nobody(broker: Broker) -> None:
    """A wait without end would else be more than a selector can wait for."""
    a = broker.worker("a")
    a.ask(wait_s=2**40)
    broker.send(a.id, Bye())
    assert broker.ledger.next_deadline() is None


def test_a_request_granted_at_once_leaves_no_deadline(broker: Broker) -> None:
    a = broker.worker("a")
    deadlines = len(broker.ledger._timers)
    a.granted(a.ask(wait_s=3600))
    assert len(broker.ledger._timers) == deadlines


def test_one_deadline_serves_all_sessions_that_are_heard(broker: Broker) -> None:
    """Its alarm is for the one who was unheard for longest: all others are heard meanwhile, as a
    rule."""
    a, b = broker.worker("a"), broker.worker("b")
    broker.pass_time(5)
    assert broker.ledger.next_deadline() == 1000.0 + TTL_S
    a.beat()
    broker.pass_time(5)
    b.beat()
    assert len(broker.ledger._timers) == 1
    broker.pass_time(5)
    assert broker.ledger.sessions == 2
    assert broker.ledger.next_deadline() == 1005.0 + TTL_S


def test_each_falls_silent_at_its_own_time(broker: Broker) -> None:
    a, b, c = broker.worker("a"), broker.worker("b"), broker.worker("c")
    held = [each.lend() for each in (a, b)]
    broker.pass_time(5)
    b.beat()
    c.beat()
    broker.pass_time(10)
    assert [state_of(broker, token) for token in held] == [SlotState.SUSPECT, SlotState.OPEN]
    a.beat()  # it was but late
    c.beat()
    assert state_of(broker, held[0]) is SlotState.OPEN
    broker.pass_time(5)
    assert [state_of(broker, token) for token in held] == [SlotState.OPEN, SlotState.SUSPECT]
    broker.pass_time(9)
    assert broker.ledger.sessions == 2
    broker.pass_time(1)
    assert broker.ledger.sessions == 0
    assert [state_of(broker, token) for token in held] == [SlotState.SUSPECT, SlotState.SUSPECT]


def state_of(broker: Broker, token: Token) -> SlotState:
    return broker.slots.leases[token].state


def test_deadlines_of_requests_that_are_over_do_not_pile_up(broker: Broker) -> None:
    a = broker.worker("a")
    for _ in range(2000):
        a.release(a.granted(a.ask(wait_s=3600)), ReleaseReason.UNUSED)
    assert len(broker.ledger._timers) < 1000


# --- registration


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


# --- lost messages


def test_a_lost_grant_is_sent_again_at_the_heartbeat(broker: Broker) -> None:
    a = broker.worker("a")
    a.ask()
    a.beat()
    assert [grant.token for grant in a.sent(Grant)] == [Token(EPOCH, 1)] * 2


def test_a_grant_that_a_newer_one_overtook_is_freed(broker: Broker) -> None:
    a = broker.worker("a")
    a.ask()
    a.open(a.ask())
    a.pending.clear()
    a.beat()
    broker.show_nothing()
    assert broker.ledger.leases == 1


def test_a_lost_acquire_is_asked_for_again_at_the_heartbeat(broker: Broker) -> None:
    a = broker.worker("a")
    a.pending.append(9)
    a.beat()
    assert not a.last(Reject).fatal


def test_a_lost_cancel_is_made_good_by_the_heartbeat(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    token = a.lend()
    request = b.ask(wait_s=60)
    b.pending.clear()
    b.beat()
    a.release(token)
    assert b.outcome(request) is None


def test_a_lost_release_does_not_free_a_slot_unverified(broker: Broker) -> None:
    """It may have said that the close was not seen to end."""
    a = broker.worker("a")
    token = a.lend()
    del a.held[token]
    a.beat()
    assert [fence.token for fence in broker.all(Fence)] == [token]
    assert broker.ledger.leases == 1
    a.release(token)  # late after all, and good evidence
    assert broker.ledger.leases == 0


def test_a_late_report_does_not_take_a_connection_back_to_unconnected(broker: Broker) -> None:
    a = broker.worker("a")
    token = a.granted(a.ask())
    broker.send(a.id, Renew([LeaseReport(token, Phase.CLOSING, 0)], token))
    broker.send(a.id, Renew([LeaseReport(token, Phase.CONNECTING, 0)], token))
    assert broker.ledger.report(broker.now)[0][0].closing == 1


def test_words_about_other_peoples_leases_are_ignored(broker: Broker) -> None:
    a, b = broker.worker("a"), broker.worker("b")
    token = a.lend()
    broker.send(b.id, Release(token, True, ReleaseReason.TAKEN))
    broker.send(b.id, Confirm(token, Backend(1)))
    b.held = {token: Phase.IDLE}
    b.beat()
    assert b.last(Ack).revoked == [token]
    assert broker.ledger.leases == 1


# --- the slots, and their cost


def test_an_unknown_transition_is_a_bug() -> None:
    slots = Slots(None, lambda command: None)
    pool = Pool(PoolSpec("p", 1, 1000), 1, Backoff(lambda: 0.5))
    session = Session(b"s", 1, "", "s", pool, 60.0, 0.0)
    lease = Slot(Token(1, 1), session, pool)
    with pytest.raises(AssertionError, match="bug: lease 1-1: free -> closing"):
        slots.move(lease, SlotState.CLOSING, "test")


class CountingTrace:
    """Counts the calls and lines of the broker's core."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()

    def __call__(self, frame: object, event: str, arg: object) -> CountingTrace:
        if event == "line":
            self.lines["all"] += 1
        return self


def lines_run(work: Callable[[], object]) -> int:
    trace, before = CountingTrace(), sys.gettrace()
    gc.disable()  # a finalizer of what other tests have left behind would be counted
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return trace.lines["all"]


def cost_with(sessions: int) -> dict[str, int]:
    """Count the lines run for one request of each kind, with so many other sessions, one connection
    each."""
    ledger = Ledger(EPOCH, ttl_s=TTL_S)
    spec = PoolSpec("p", sessions + 1, 60_000)
    for number in range(sessions + 1):
        name = b"%d" % number
        ledger.handle(name, Hello(PROTOCOL_VERSION, number + 1, "", "w", spec), 0.0)
        if number < sessions:
            ledger.handle(name, Acquire(1, 0), 0.0)
            ledger.handle(name, Confirm(Token(EPOCH, number + 1), Backend(number + 1)), 0.0)
            idle = LeaseReport(Token(EPOCH, number + 1), Phase.IDLE, 0)
            ledger.handle(name, Renew([idle], idle.token), 0.0)
    asker, token = b"%d" % sessions, Token(EPOCH, sessions + 1)
    steps: dict[str, Callable[[], object]] = {
        "grant": lambda: ledger.handle(asker, Acquire(1, 0), 1.0),
        "confirm": lambda: ledger.handle(asker, Confirm(token, Backend(1)), 1.0),
        "renew": lambda: ledger.handle(
            asker, Renew([LeaseReport(token, Phase.IN_USE, 0)], token), 1.0
        ),
        "tick": lambda: ledger.tick(1.0),
        "wait and recall": lambda: ledger.handle(asker, Acquire(2, 60_000), 1.0),
        "cancel": lambda: ledger.handle(asker, Withdraw(2), 1.0),
        "release": lambda: ledger.handle(asker, Release(token, True, ReleaseReason.CLOSED), 1.0),
    }
    return {name: lines_run(step) for name, step in steps.items()}


def test_the_work_for_a_request_does_not_grow_with_the_number_of_sessions() -> None:
    assert cost_with(10_000) == cost_with(10)


def test_times_that_no_clock_shows_can_be_told_to_others(broker: Broker) -> None:
    """They are any 64 bits on the wire, and go on as seconds and back."""
    most = 2**64 - 1
    a, b = (
        broker.worker("a", max_conn=1, expiration_ms=most),
        broker.worker("b", expiration_ms=most),
    )
    token = a.lend()
    a.ages[token] = most
    a.beat()
    request = b.ask()
    a.answer()
    denial = b.outcome(request)
    assert isinstance(denial, Deny)
    encode(denial)
    for session in (a, b):
        for welcome in session.sent(Welcome):
            encode(welcome)
    reports: list[Any] = [
        *broker.ledger.report(broker.now),
        broker.ledger.oldest_leases(9, broker.now),
    ]
    for report in reports:
        for each in report:
            encode(each)


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


@pytest.mark.parametrize(("ttl_s", "least_s"), [(2.0, 2.5 * 2.0 / 3 + 1.0), (15.0, 15.0)])
def test_after_another_broker_nothing_is_granted_before_its_workers_have_noticed(
    ttl_s: float, least_s: float
) -> None:
    """With a short TTL they do so later than one TTL: see `Link._beat`."""
    ledger = Ledger(1, ttl_s=ttl_s, has_control_connection=False)
    ledger.takeover.claim()
    ledger.takeover.outranked(100.0, "another one")
    ledger.takeover.leads(100.0, after_another=True)
    ledger.tick(100.0 + least_s - 0.01)
    assert ledger.state == "waiting"
    for _ in range(3):
        if (due := ledger.next_deadline()) is not None:
            ledger.tick(due)
    assert ledger.state == "serving"
