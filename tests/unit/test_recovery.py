"""A broker after another's end, the quarantine, the server's trouble, the drain: the ledger,
message by message."""

from __future__ import annotations

import msgspec
import pytest

from sharedpool.broker.core.backoff import PROBE_EVERY_S
from sharedpool.broker.core.commands import (
    Erase,
    Fence,
    MarkJournalComplete,
    Process,
    Record,
    Send,
    SurveyResult,
    SurveyServer,
    VerifyServer,
    Watch,
)
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.wire.admin import Done, Order, OrderKind
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    START_UP_LIMIT_S,
    Ack,
    Acquire,
    Bye,
    Confirm,
    Deny,
    DenyReason,
    FailoverSign,
    Gone,
    Grant,
    Hello,
    Recall,
    Reject,
    Release,
    ReleaseReason,
    Renew,
    Stale,
    Welcome,
)
from sharedpool.wire.values import Backend, LeaseReport, Phase, PoolSpec, Token
from tests.unit.ledger_driver import EPOCH, TTL_S, Broker, Worker
from tests.unit.restarts import journal_of, moved, successor

TAG = "sharedpool p [inst]"


# --- after a crash


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


def grace_over(after: Broker, listed: dict[Backend, str], *starting: set[int]) -> None:
    """Two looks end it; `starting` is what the second and later ones show in start-up."""
    for number, pids in enumerate([set(), *starting, set()]):
        look = after.all(SurveyServer)[-1]
        assert look == SurveyServer(0, barrier=number == 0)
        after.take_in(
            after.ledger.control.surveyed(SurveyResult(0, frozenset(pids), listed), after.now)
        )
        after.pass_time(SETTLE_S * 1.01)


def test_while_another_broker_counts_nothing_is_granted_and_nothing_vouched_for() -> None:
    broker = Broker(journal_complete=True)
    broker.ledger.takeover.claim()
    broker.take_in(broker.ledger.takeover.outranked(broker.now, "another broker"))
    a = broker.worker("a", max_conn=1)
    request, impatient = a.ask(wait_s=60), a.ask()
    assert a.outcome(request) is None
    assert a.outcome(impatient) is None
    assert broker.ledger.state == "waiting"
    broker.take_in(broker.ledger.takeover.leads(broker.now, after_another=False))
    assert isinstance(a.outcome(request), Token)
    assert broker.ledger.state == "serving"


def test_a_broker_that_follows_another_first_hears_what_its_workers_hold() -> None:
    """It has a journal of its own, intact, which knows nothing of them."""
    broker = Broker(journal_complete=True)
    broker.ledger.takeover.claim()
    broker.take_in(broker.ledger.takeover.outranked(broker.now, "another broker"))
    a = broker.worker("a", max_conn=1)
    request = a.ask(wait_s=600)
    broker.take_in(broker.ledger.takeover.leads(broker.now, after_another=True))
    assert a.outcome(request) is None
    theirs = LeaseReport(Token(EPOCH - 1, 7), Phase.IN_USE, 0, backend=Backend(77, 7, 1))
    spec = PoolSpec("p", 1, 60_000)
    broker.send(b"theirs", Hello(PROTOCOL_VERSION, 5, "", "theirs", spec, [theirs], theirs.token))
    assert broker.ledger.leases == 1
    for _ in range(3):
        broker.pass_time(TTL_S * 0.34)
        a.beat()
    grace_over(broker, {})
    assert broker.ledger.state == "serving"
    assert broker.ledger.leases == 1
    assert a.outcome(request) is None
    broker.send(b"theirs", Release(theirs.token, True, ReleaseReason.CLOSED))
    assert isinstance(a.outcome(request), Token)


def test_a_grace_period_that_begins_anew_lasts_its_whole_time() -> None:
    broker = Broker(journal_complete=False)
    broker.take_in(broker.ledger.takeover.begin_grace_period(TTL_S, broker.now))
    broker.pass_time(TTL_S * 0.9)
    broker.ledger.takeover.claim()
    broker.take_in(broker.ledger.takeover.outranked(broker.now, "another broker"))
    broker.take_in(broker.ledger.takeover.leads(broker.now, after_another=True))
    broker.pass_time(TTL_S * 0.9)
    assert broker.all(SurveyServer) == []
    broker.pass_time(TTL_S * 0.2)
    grace_over(broker, {})
    assert broker.ledger.state == "serving"


def test_the_end_of_the_grace_period_does_not_overrule_another_broker() -> None:
    broker = Broker(journal_complete=False)
    broker.take_in(broker.ledger.takeover.begin_grace_period(TTL_S, broker.now))
    broker.ledger.takeover.claim()
    broker.take_in(broker.ledger.takeover.outranked(broker.now, "another broker"))
    broker.pass_time(TTL_S * 1.01)
    grace_over(broker, {})
    assert broker.ledger.state == "waiting"
    assert broker.all(MarkJournalComplete) == []
    broker.take_in(broker.ledger.takeover.leads(broker.now, after_another=False))
    assert broker.ledger.state == "serving"
    assert broker.all(MarkJournalComplete) == [MarkJournalComplete()]


@pytest.mark.parametrize("name", ["p", "b\u00e9"])  # the second is shown otherwise in a tag
def test_an_operators_order_for_a_pool_without_a_name_holds_once_it_has_one(
    name: str,
) -> None:
    after = Broker(journal_complete=False)
    after.take_in(after.ledger.takeover.begin_grace_period(TTL_S, after.now))
    after.pass_time(TTL_S * 1.01)
    unclaimed = Backend(1, 1, 1)
    tag = "sharedpool " + name.encode("ascii", "backslashreplace").decode()
    grace_over(after, {unclaimed: f"{tag} [inst]"})
    assert after.ledger.leases == 1
    after.take_in(after.ledger.order(Order(0, OrderKind.PAUSE), after.now)[1])
    assert [fence.backend for fence in after.all(Fence)] == [unclaimed]
    b = Worker(after, "b", PoolSpec(name, 1, 60_000))
    b.hello()
    request = b.ask(wait_s=600)
    after.take_in(after.ledger.backend_gone(after.all(Fence)[0].token, after.now))
    assert b.outcome(request) is None
    after.take_in(after.ledger.order(Order(0, OrderKind.RESUME), after.now)[1])
    assert isinstance(b.outcome(request), Token)


def test_without_a_journal_nothing_is_granted_in_the_grace_period() -> None:
    after = Broker(journal_complete=False)
    after.take_in(after.ledger.takeover.begin_grace_period(TTL_S, after.now))
    b = after.worker("b", max_conn=3)
    request, impatient = b.ask(wait_s=600), b.ask()
    after.pass_time(TTL_S / 2)
    b.beat()
    assert b.outcome(request) is None
    assert b.outcome(impatient) is None
    after.pass_time(TTL_S / 2)
    assert b.outcome(request) is None  # until the server was asked
    grace_over(after, {})
    assert isinstance(b.outcome(request), Token)


def test_the_grace_period_lasts_until_every_start_up_has_come_to_an_end() -> None:
    after = Broker(journal_complete=False)
    after.take_in(after.ledger.takeover.begin_grace_period(TTL_S, after.now))
    b = after.worker("b", max_conn=1)
    request = b.ask(wait_s=600)
    after.pass_time(TTL_S / 2)
    b.beat()
    after.pass_time(TTL_S / 2)
    grace_over(after, {Backend(42, 5, 1): TAG}, {42}, {42, 43})
    assert (
        b.outcome(request) is None
    )  # what was in start-up is a dead worker's, and has its tag by now
    assert after.ledger.state == "serving"
    assert after.ledger.leases == 1


def test_backends_that_nobody_claims_are_ended_for_waiters_of_a_group_in_which_they_count() -> None:
    """No worker of that pool may ever come, which would say whose they are."""
    groups = {"jobs": GroupTerms(max_conn=2)}
    after = Broker(journal_complete=False, max_conn=9, groups=groups)  # type: ignore[arg-type]
    after.take_in(after.ledger.takeover.begin_grace_period(TTL_S, after.now))
    after.pass_time(TTL_S * 1.01)
    unclaimed = [Backend(1, 1, 1), Backend(2, 1, 1)]
    grace_over(after, dict.fromkeys(unclaimed, "sharedpool gone [inst]"))
    jobs = Worker(after, "jobs", PoolSpec("default@jobs", 99, 60_000, group="jobs"))
    jobs.hello()
    request = jobs.ask(wait_s=9)
    (fence,) = after.all(Fence)
    assert fence.backend in unclaimed
    after.take_in(after.ledger.backend_gone(fence.token, after.now))
    assert isinstance(jobs.outcome(request), Token)


def test_backends_that_nobody_claims_after_a_lost_journal_stay_counted() -> None:
    after = Broker(journal_complete=False)
    after.take_in(after.ledger.takeover.begin_grace_period(TTL_S, after.now))
    a = Worker(after, "a", PoolSpec("p", 2, 60_000))
    a.held = {Token(EPOCH - 1, 5): Phase.IN_USE}
    a.hello()
    after.pass_time(TTL_S / 2)
    a.beat()
    after.pass_time(TTL_S / 2)
    orphan = Backend(4711, 5, 1)
    listed = {a.backend(Token(EPOCH - 1, 5)): TAG, orphan: TAG}
    grace_over(after, listed)
    assert after.ledger.leases == 2
    b = after.worker("b")
    b.ask(wait_s=60)
    (fence,) = after.all(Fence)
    assert fence.backend == orphan


def test_a_late_worker_claims_its_orphan_unless_that_is_being_ended() -> None:
    after = Broker(journal_complete=False)
    after.take_in(after.ledger.takeover.begin_grace_period(TTL_S, after.now))
    after.pass_time(TTL_S)
    token = Token(EPOCH - 1, 5)
    backend = Worker.backend(token)
    grace_over(after, {backend: TAG})
    assert after.ledger.leases == 1
    late = Worker(after, "late", PoolSpec("p", 4, 60_000))
    late.held = {token: Phase.IDLE}
    late.hello()
    assert late.last(Welcome).revoked == []
    assert late.last(Welcome).max_conn == 4  # the first session names the pool, not the orphan
    assert after.ledger.leases == 1


# --- custody and quarantine


def test_a_dead_workers_deposited_connection_can_be_fenced_before_it_is_confirmed() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    assert broker.ledger.desk.expects(a.id, token)
    assert not broker.ledger.desk.expects(b"other", token)
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    (fence,) = broker.all(Fence)
    assert (fence.token, fence.backend) == (token, None)


def test_a_worker_killed_in_its_connect_keeps_its_slot_until_the_server_shows_nothing() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=1), broker.worker("b")
    a.ask()
    request = b.ask(wait_s=60)
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    for starting in ({42}, {42}, set()):
        assert b.outcome(request) is None
        look = broker.all(SurveyServer)[-1]
        broker.take_in(
            broker.ledger.control.surveyed(
                SurveyResult(look.serial, frozenset(starting), {}), broker.now
            )
        )
        broker.pass_time(SETTLE_S * 1.01)
    assert isinstance(b.outcome(request), Token)
    assert [look.barrier for look in broker.all(SurveyServer)] == [True, False, False]


def test_a_deposit_that_was_on_its_way_ends_the_quarantine() -> None:
    broker = Broker()
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    broker.take_in(broker.ledger.session_died(a.id, broker.now))
    assert broker.all(Fence) == []
    broker.take_in(broker.ledger.desk.deposited(token, broker.now))
    assert [fence.token for fence in broker.all(Fence)] == [token]
    broker.take_in(broker.ledger.backend_gone(token, broker.now))
    assert broker.ledger.leases == 0


def test_a_connect_that_timed_out_is_verified_or_waits_for_the_servers_limit() -> None:
    for verifies in (True, False):
        broker = Broker(has_control_connection=verifies)
        a = broker.worker("a", max_conn=1)
        token = a.granted(a.ask())
        broker.send(a.id, Release(token, False, ReleaseReason.FAILED))
        broker.pass_time(60)
        a.beat()
        assert broker.ledger.leases == 1
        assert bool(broker.all(SurveyServer)) == verifies
        broker.pass_time(6)
        assert broker.ledger.leases == (1 if verifies else 0)


# --- the server's trouble


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


# --- bounds and the end


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


def test_draining_recalls_what_is_idle_asks_for_the_rest_and_refuses_who_does_not_wait() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=3), broker.worker("b")
    busy, idle = a.lend(), a.lend()
    a.held[idle] = Phase.IDLE
    a.beat()
    b.lend()
    waits = b.ask(wait_s=60)
    broker.take_in(broker.ledger.drain(broker.now))
    denial = b.outcome(b.ask())
    assert isinstance(denial, Deny)
    assert denial.reason is DenyReason.DRAINING
    also_waits = b.ask(wait_s=30)
    recalls = a.sent(Recall)
    assert sum(recall.take for recall in recalls) == 1
    assert recalls[-1].returns_due == 2
    assert isinstance(a.outcome(a.ask()), Deny)
    a.release(idle, ReleaseReason.TAKEN)
    a.release(busy, ReleaseReason.RETURN_DUE)
    assert a.last(Recall).returns_due  # never relaxed while draining
    assert broker.ledger.leases == 1
    assert (b.outcome(waits), b.outcome(also_waits)) == (None, None)  # a successor may come
    for _ in range(31):
        b.beat()
        broker.pass_time(1.0)
    late = b.outcome(also_waits)
    assert isinstance(late, Deny)
    assert late.reason is DenyReason.DRAINING
    assert b.outcome(waits) is None


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


# --- granted to who is silent


def silent_with_a_grant(broker: Broker) -> tuple[Worker, Token]:
    """A worker that nobody can watch was granted a slot, and has said nothing since; its TTL has
    passed."""
    a = broker.worker("a", max_conn=1)
    token = a.granted(a.ask())
    broker.pass_time(TTL_S + 0.1)
    assert broker.ledger.leases == 1
    return a, token


def test_a_slot_granted_to_who_is_silent_is_looked_for_once_no_connect_can_be_under_way() -> None:
    broker = Broker()
    a, token = silent_with_a_grant(broker)
    b = broker.worker("b")
    request = b.ask(wait_s=600)
    for _ in range(int(START_UP_LIMIT_S) - 1):
        broker.pass_time(1.0)
        b.beat()
    assert (
        broker.all(SurveyServer) == []
    )  # it may have begun to connect at the end of its TTL, and log in yet
    broker.pass_time(2.0)
    assert len(broker.all(SurveyServer)) == 1
    assert b.outcome(request) is None
    broker.show_nothing()
    assert isinstance(b.outcome(request), Token)
    a.held[token], a.seen = Phase.CONNECTING, token
    a.hello()
    assert a.last(Welcome).revoked == [token]


def test_a_session_that_speaks_again_in_time_keeps_its_leases() -> None:
    broker = Broker()
    a, token = silent_with_a_grant(broker)
    a.held[token], a.seen = Phase.CONNECTING, token
    for _ in range(int(START_UP_LIMIT_S) + 5):
        a.beat()
        broker.pass_time(1.0)
    assert broker.all(SurveyServer) == []
    assert broker.ledger.leases == 1


def test_without_a_control_connection_it_stays_counted_until_an_operator_says_otherwise() -> None:
    broker = Broker(has_control_connection=False)
    _, token = silent_with_a_grant(broker)
    for _ in range(10):
        broker.pass_time(START_UP_LIMIT_S)
    assert broker.ledger.leases == 1
    order = Order(PROTOCOL_VERSION, OrderKind.KILL, "", 0, token)
    done, _ = broker.ledger.order(order, broker.now)
    assert done == Done(
        [f"lease {token} of a[197] had no connection that is known of: its slot is free"]
    )
    assert broker.ledger.leases == 0


def test_with_one_the_server_is_looked_at_before_an_operators_word_frees_a_slot() -> None:
    """Its connect may be on its way to the server, or logging in there."""
    broker = Broker()
    _, token = silent_with_a_grant(broker)
    order = Order(PROTOCOL_VERSION, OrderKind.KILL, "", 0, token)
    for _ in range(2):
        done, commands = broker.ledger.order(order, broker.now)
        broker.take_in(commands)
        assert "once the server shows none either" in done.said[0]
        assert broker.ledger.leases == 1
    broker.show_nothing()
    broker.show_nothing()
    assert broker.ledger.leases == 0


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
