"""A broker that does not know what is held grants nothing for a while: what it hears and finds
meanwhile."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.commands import Fence, MarkJournalComplete, SurveyResult, SurveyServer
from sharedpool.broker.core.group_terms import GroupTerms
from sharedpool.broker.core.ledger import Ledger
from sharedpool.broker.core.quarantine import SETTLE_S
from sharedpool.wire.admin import Order, OrderKind
from sharedpool.wire.messages import PROTOCOL_VERSION, Hello, Release, ReleaseReason, Welcome
from sharedpool.wire.values import Backend, LeaseReport, Phase, PoolSpec, Token
from tests.unit.ledger_driver import EPOCH, TTL_S, Broker, Worker

TAG = "sharedpool p [inst]"


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
