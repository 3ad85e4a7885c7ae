"""What an operator orders, as the ledger carries it out."""

from __future__ import annotations

from sharedpool.broker.core.commands import Fence
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.wire.admin import OrderKind
from sharedpool.wire.messages import Ack, Deny, DenyReason, Recall, ReleaseReason, Stale
from sharedpool.wire.values import Token
from tests.unit.desk_driver import Desk
from tests.unit.ledger_driver import Broker, give_up_idle, order

# --- pause and resume


def test_a_paused_pool_gets_everything_back_and_lends_nothing(broker: Broker) -> None:
    a, b = broker.worker("a"), broker.worker("b")
    idle, busy = a.lend(), b.lend()
    a.checkin(idle)
    a.beat()
    done = order(broker, OrderKind.PAUSE, "p")
    assert done.said == ["pool 'p' paused: 2 connections to come back, 0 waiting"]
    assert a.last(Recall).take == 1
    assert b.last(Recall).returns_due == 1
    give_up_idle(a)
    b.release(busy, ReleaseReason.RETURN_DUE)
    assert broker.ledger.leases == 0
    request = a.ask(wait_s=5)
    assert a.outcome(request) is None
    order(broker, OrderKind.RESUME, "p")
    assert isinstance(a.outcome(request), Token)


def test_a_refusal_or_timeout_says_that_the_pool_is_paused(broker: Broker) -> None:
    a = broker.worker("a")
    order(broker, OrderKind.PAUSE)
    patient, hasty = a.ask(wait_s=5), a.ask()
    refused = a.outcome(hasty)
    assert isinstance(refused, Deny)
    assert refused.reason is DenyReason.PAUSED
    broker.pass_time(5.1)
    refused = a.outcome(patient)
    assert isinstance(refused, Deny)
    assert refused.reason is DenyReason.PAUSED


def test_a_request_without_a_wait_is_refused_when_the_pause_begins(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    a.lend()
    request = b.ask()
    assert b.outcome(request) is None  # a is asked first
    order(broker, OrderKind.PAUSE, "p")
    refused = b.outcome(request)
    assert isinstance(refused, Deny)
    assert refused.reason is DenyReason.PAUSED


def test_pause_and_resume_twice_say_that_there_was_nothing_to_do(broker: Broker) -> None:
    broker.worker("a")
    order(broker, OrderKind.PAUSE, "p")
    assert order(broker, OrderKind.PAUSE, "p").said == [
        "pool 'p' was paused already: 0 connections to come back, 0 waiting"
    ]
    assert order(broker, OrderKind.RESUME, "p").said == ["pool 'p' resumed: 0 waiting"]
    assert order(broker, OrderKind.RESUME, "p").said == ["it was not paused"]


def test_a_pause_of_all_pools_holds_for_those_to_come(broker: Broker) -> None:
    order(broker, OrderKind.PAUSE)
    a = broker.worker("a")
    request = a.ask(wait_s=5)
    assert a.outcome(request) is None
    assert "all pools are paused" in order(broker, OrderKind.RESUME, "p").error
    order(broker, OrderKind.RESUME)
    assert isinstance(a.outcome(request), Token)


def test_a_pause_outlives_the_pools_last_session(broker: Broker) -> None:
    a = broker.worker("a")
    order(broker, OrderKind.PAUSE, "p")
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    b = broker.worker("b")
    assert b.outcome(b.ask(wait_s=5)) is None
    broker.take_in(broker.ledger.session_died(b.id, broker.now))
    assert order(broker, OrderKind.RESUME, "p").said == ["resumed, and not in use"]


def test_a_connection_given_to_a_paused_pool_is_ended_not_parked_or_passed(
    broker: Broker, desk: Desk
) -> None:
    a, b = (broker.worker(name, max_conn=2) for name in "ab")
    first, second = desk.lend(a), desk.lend(a)
    desk.give(a, first)  # parked
    order(broker, OrderKind.PAUSE, "p")
    desk.ask(b)
    desk.give(a, second)
    assert desk.passed() == []
    assert [fence.token for fence in broker.all(Fence)] == [first, second]


def test_another_pools_pause_does_not_touch_this_one(broker: Broker) -> None:
    a, b = broker.worker("a", "p"), broker.worker("b", "q")
    token = a.lend()
    order(broker, OrderKind.PAUSE, "q")
    assert a.sent(Recall) == []
    a.release(token)
    assert isinstance(a.outcome(a.ask()), Token)
    assert isinstance(b.outcome(b.ask()), Deny)


def test_a_paused_pools_waiters_take_nothing_from_others_under_a_cap() -> None:
    broker = Broker(max_conn=1)
    a, b = broker.worker("a", "p"), broker.worker("b", "q")
    token = a.lend()
    order(broker, OrderKind.PAUSE, "q")
    b.ask(wait_s=60)
    a.checkin(token)
    a.beat()
    assert a.sent(Recall) == []


# --- limits


def test_a_limit_is_lowered_by_recall_and_holds_at_once(broker: Broker) -> None:
    a = broker.worker("a", max_conn=4)
    tokens = [a.lend() for _ in range(4)]
    done = order(broker, OrderKind.LIMIT, "p", 2)
    assert done.said == ["pool 'p': limit 4 before, 2 now, 4 in use"]
    assert a.last(Recall).returns_due == 2
    for token in tokens[:2]:
        a.release(token, ReleaseReason.RETURN_DUE)
    assert broker.ledger.leases == 2
    assert a.outcome(a.ask(wait_s=9)) is None
    a.beat()
    assert a.last(Ack).max_conn == 2


def test_a_limit_is_raised_for_who_waits(broker: Broker) -> None:
    a = broker.worker("a", max_conn=1)
    a.lend()
    request = a.ask(wait_s=9)
    order(broker, OrderKind.LIMIT, "p", 2)
    assert isinstance(a.outcome(request), Token)


def test_a_pools_limit_is_remembered_while_nobody_uses_it(broker: Broker) -> None:
    a = broker.worker("a", max_conn=9)
    order(broker, OrderKind.LIMIT, "p", 1)
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    b = broker.worker("b", max_conn=9)
    b.lend()
    assert b.outcome(b.ask(wait_s=9)) is None
    broker.take_in(broker.ledger.session_died(b.id, broker.now))
    for fence in broker.all(Fence):
        broker.take_in(broker.ledger.backend_gone(fence.token, broker.now))
    assert order(broker, OrderKind.LIMIT, "p", 2).said == [
        "pool 'p': limit 2 when it is used again"
    ]
    c = broker.worker("c", max_conn=9)
    c.lend()
    c.lend()


def test_the_limit_over_all_pools() -> None:
    broker = Broker(max_conn=3)
    a, b = broker.worker("a", "p", max_conn=9), broker.worker("b", "q", max_conn=9)
    tokens = [a.lend(), a.lend()]
    b.lend()
    assert order(broker, OrderKind.LIMIT, "", 2).said == [
        "limit over all pools: 3 before, 2 now, 3 in use"
    ]
    assert a.last(Recall).returns_due == 1
    assert b.last(Recall).returns_due == 1
    a.release(tokens[0], ReleaseReason.RETURN_DUE)
    assert b.last(Recall).returns_due == 0  # that was enough
    request = b.ask(wait_s=9)
    assert b.outcome(request) is None
    order(broker, OrderKind.LIMIT, "", 9)
    assert isinstance(b.outcome(request), Token)
    assert [pool.max_conn for pool in broker.ledger.report(broker.now)[0]] == [9, 9]


def test_a_broker_without_a_limit_over_all_pools_wants_a_pools_name(broker: Broker) -> None:
    broker.worker("a")
    assert "--pool" in order(broker, OrderKind.LIMIT, "", 5).error
    assert (
        "no pool 'x' at this broker; there are: 'p'" in order(broker, OrderKind.LIMIT, "x", 5).error
    )


# --- one process


def test_a_process_gives_back_what_it_holds_and_may_ask_again(broker: Broker) -> None:
    a = broker.worker("a", max_conn=3)
    idle, busy = a.lend(), a.lend()
    a.checkin(idle)
    a.beat()
    pid = 100 + sum(a.id)
    assert order(broker, OrderKind.DRAIN, number=pid).said == [
        f"a[{pid}] in pool 'p': 2 to come back"
    ]
    assert (a.last(Recall).take, a.last(Recall).returns_due) == (1, 2)
    give_up_idle(a)
    broker.pass_time(5.0)
    a.beat()
    assert broker.ledger.leases == 1
    newer = a.lend()
    a.release(busy, ReleaseReason.RETURN_DUE)
    recalls = len(a.sent(Recall))
    a.checkin(newer)  # what it was lent since is its own
    a.beat()
    assert len(a.sent(Recall)) == recalls
    assert broker.slots.shrinking == {}


def test_a_drained_process_does_not_own_the_connections_it_has_given(
    broker: Broker, desk: Desk
) -> None:
    a = broker.worker("a", max_conn=3)
    first, second = desk.lend(a), desk.lend(a)
    order(broker, OrderKind.DRAIN, number=100 + sum(a.id))
    desk.give(a, first)  # parked: the pool keeps it
    assert a.last(Recall).returns_due == 2
    assert [(s.leases, s.in_use) for s in broker.ledger.report(broker.now)[1]] == [(1, 1)]
    desk.give(a, second)
    assert broker.slots.sessions[a.id].draining == set()
    assert broker.slots.shrinking == {}


def test_a_process_that_nobody_knows_cannot_be_drained(broker: Broker) -> None:
    assert "no process 7" in order(broker, OrderKind.DRAIN, number=7).error


# --- one lease


def test_a_lease_is_ended_and_its_worker_told(broker: Broker, desk: Desk) -> None:
    a = broker.worker("a")
    token = desk.lend(a)
    done = order(broker, OrderKind.KILL, token=token)
    assert "is being ended" in done.said[0]
    assert [fence.token for fence in broker.all(Fence)] == [token]
    assert a.last(Ack).revoked == [token]
    assert "already" in order(broker, OrderKind.KILL, token=token).said[0]
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert broker.ledger.leases == 0
    assert order(broker, OrderKind.KILL, token=token).said == [f"lease {token} is over"]


def test_a_parked_connection_can_be_ended(broker: Broker, desk: Desk) -> None:
    a = broker.worker("a")
    token = desk.lend(a)
    desk.give(a, token)
    order(broker, OrderKind.KILL, token=token)
    assert desk.state(token) is SlotState.FENCING


def test_a_lease_that_cannot_be_ended_from_here_is_not_touched() -> None:
    broker = Broker(has_control_connection=False)
    a = broker.worker("a")
    token = a.lend()
    assert "no control connection" in order(broker, OrderKind.KILL, token=token).error
    assert broker.all(Fence) == []


# --- new connections


def test_reconnect_begins_a_new_generation_of_one_pool_or_of_all(
    broker: Broker, desk: Desk
) -> None:
    a = broker.worker("a", "p")
    token = desk.lend(a)
    broker.worker("b", "q")
    replaced = "connections are replaced at their next checkout or checkin"
    assert order(broker, OrderKind.RECONNECT, "p").said == [f"pool 'p': generation 2: 1 {replaced}"]
    assert a.last(Stale).generation == 2
    assert order(broker, OrderKind.RECONNECT).said == [
        f"pool 'p': generation 3: 1 {replaced}",
        f"pool 'q': generation 2: 0 {replaced}",
    ]
    desk.generation = 3
    desk.give(a, token)  # parked
    order(broker, OrderKind.RECONNECT, "p")
    assert desk.state(token) is SlotState.FENCING
    assert "no pool 'x'" in order(broker, OrderKind.RECONNECT, "x").error
