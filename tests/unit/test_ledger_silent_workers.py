"""Workers of which nothing is heard, and workers that do not answer."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import Fence, Forget
from sharedpool.broker.core.recalls import ANSWER_LIMIT_S
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.messages import (
    Ack,
    Acquire,
    Deny,
    Grant,
    Recall,
    Reject,
    ReleaseReason,
    Withdraw,
)
from sharedpool.wire.values import Phase, PoolSpec, Token
from tests.unit.ledger_driver import EPOCH, TTL_S, Broker, Worker

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


def test_silence_while_the_broker_itself_did_not_run_does_not_count() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    a.lend()
    b = broker.worker("b")
    b.ask(wait_s=600)
    broker.now += 3 * TTL_S
    broker.ledger.process_was_suspended(broker.now)
    broker.pass_time(0.0)
    assert broker.all(Fence) == []
    assert broker.ledger.report(broker.now)[0][0].suspect == 0


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
