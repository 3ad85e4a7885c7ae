"""Syncs whose outcomes come late, or never, and brokers that do not know yet what they hold."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sharedpool.broker.core.commands import LeaveShare, SyncShare
from sharedpool.broker.core.host_presence import CUT_S, Listed, Presence
from sharedpool.broker.core.share_sync import BACK_S, OLD_S, SyncDecision, decide_sync, look_every_s
from sharedpool.broker.core.share_terms import (
    Failed,
    LimitRow,
    ShareKey,
    SyncFailure,
    SyncResult,
)
from sharedpool.broker.core.shares import Claim, Division
from sharedpool.wire.application_name import tag_of
from sharedpool.wire.messages import Deny, DenyReason, Release, ReleaseReason
from tests.unit.ledger_driver import TTL_S
from tests.unit.restarts import journal_of
from tests.unit.sharing_driver import OTHER, SharingBroker, with_share

# --- when the next sync is, and how old the server's list may be then


@pytest.mark.parametrize(("lacking", "soon"), [(2, True), (0, False)])
def test_a_sync_follows_as_soon_as_a_host_may_be_found_gone_if_slots_are_short(
    lacking: int, soon: bool
) -> None:
    broker, _ = with_share(4, in_use=1)
    before = broker.sync_again()
    broker.answer(before, held=4, lacking=lacking, again_s=0.25)
    broker.pass_time(0.24)
    assert broker.order is before
    broker.pass_time(0.02)
    assert (broker.order is not before) is soon


def test_the_hosts_of_a_contended_limit_look_at_the_server_in_turns() -> None:
    def every_s(hosts: int, **division: Any) -> float:
        others = (OTHER,) * (hosts - 1)
        return look_every_s(SyncResult(10, False, Division(2, **division), others))

    assert look_every_s(None) == OLD_S
    assert every_s(1, alone=True) == math.inf
    assert every_s(3) == OLD_S
    assert every_s(3, lacking=1) == every_s(1000, lacking=1) == every_s(3, contended=True) == 0.2
    looks_a_second = [hosts / every_s(hosts, contended=True) for hosts in (3, 10, 39)]
    assert looks_a_second == pytest.approx([15, 20, 20])
    assert every_s(1000, contended=True) == OLD_S


# --- which outcome counts


def test_nothing_is_granted_before_the_first_outcome() -> None:
    broker = SharingBroker()
    worker = broker.worker("a", max_conn=10)
    request = worker.ask(60.0)
    assert worker.outcome(request) is None
    broker.answer(broker.order, held=10)
    assert worker.granted(request)


def test_after_a_pause_of_the_process_nothing_is_granted_before_the_next_sync() -> None:
    """Other hosts may have taken this one for gone meanwhile."""
    broker, worker = with_share(4, in_use=1)
    broker.ledger.sharing.trust.suspended(broker.now)
    request = worker.ask(60.0)
    assert worker.outcome(request) is None
    order = broker.order if broker.order.claim.wanted == 2 else broker.sync_again()
    assert order.claim.least == 1
    broker.answer(order, held=4)
    assert worker.granted(request)


def test_a_slot_that_is_free_after_a_pause_is_not_granted_before_the_next_sync() -> None:
    """Its connection may have been ended by another host, which has taken the slot."""
    broker, worker = with_share(2, in_use=2)
    request = worker.ask(60.0)
    before = broker.order
    broker.ledger.sharing.trust.suspended(broker.now)
    worker.release(next(iter(worker.held)), ReleaseReason.BROKEN)
    assert worker.outcome(request) is None
    broker.answer(broker.order if broker.order is not before else broker.sync_again(), held=2)
    assert worker.granted(request)


def test_who_waits_while_the_brokers_own_login_is_refused_is_told_so() -> None:
    broker, worker = with_share(4)
    refused = SyncFailure(Failed.REFUSED, "password authentication failed")
    broker.take_in(broker.ledger.sharing.failed(broker.order.key, refused, broker.now))
    request = worker.ask(2.0)
    broker.pass_time(2.5)
    denial = worker.outcome(request)
    assert isinstance(denial, Deny)
    assert denial.reason is DenyReason.WAITING
    assert "password authentication failed" in denial.error


def test_the_outcome_of_an_order_before_the_sessions_loss_does_not_count() -> None:
    """It is carried out in the next session; by then there is a newer order, with another claim."""
    broker, _ = with_share(2, in_use=1)
    before = broker.sync_again()
    broker.fail(before)  # the loss is reported while that order waits
    broker.answer(before, held=10)
    assert broker.pool.allowed == 1
    broker.sync_again()
    broker.answer(before, held=10)
    assert broker.pool.allowed == 1
    broker.answer(broker.order, held=4)
    assert broker.pool.allowed == 4


def test_the_failure_of_such_an_order_does_not_count_either() -> None:
    broker, _ = with_share(in_use=1)
    before = broker.sync_again()
    broker.fail(before)
    broker.sync_again()
    broker.fail(before, before.serial)
    broker.answer(broker.order, held=4)
    assert broker.pool.allowed == 4


def test_the_outcome_for_a_pool_that_has_gone_does_not_count_for_the_next_of_its_name() -> None:
    """Its row has been deleted in between."""
    broker = SharingBroker()
    worker = broker.worker("a", max_conn=10)
    before = broker.order
    broker.take_in(broker.ledger.session_died(worker.id, broker.now))
    assert broker.all(LeaveShare)
    broker.worker("b", max_conn=10)
    assert broker.order.serial > before.serial
    broker.answer(before, held=10)
    assert broker.pool.allowed == 0


def test_the_outcome_of_a_sync_before_a_pause_does_not_count() -> None:
    """The process did not run: others may have taken its host for gone since that sync."""
    broker, _ = with_share(in_use=2)
    before = broker.sync_again()
    broker.now += 10.0
    broker.ledger.sharing.trust.suspended(broker.now)
    broker.answer(before, held=10)
    assert broker.pool.allowed == 2
    assert broker.order.serial > before.serial
    broker.answer(broker.order, held=10)
    assert broker.pool.allowed == 10


# --- a share that was given back


def test_a_share_that_was_given_back_is_not_synced_before_somebody_uses_it() -> None:
    broker, worker = with_share(in_use=1)
    (token,) = worker.held
    worker.release(token)
    for _ in range(100):
        broker.pass_time(0.1)
        worker.beat()
        if broker.all(LeaveShare):
            break
    assert broker.all(LeaveShare)
    last = broker.order
    broker.wake()
    broker.fail(last)
    for _ in range(20):
        broker.pass_time(1.0)
        worker.beat()
    assert broker.order is last
    request = worker.ask(60.0)
    assert broker.order.serial > last.serial
    broker.answer(broker.order, held=10)
    assert worker.granted(request)


def test_a_share_that_is_used_now_and_then_is_not_given_back() -> None:
    """It is unused for a moment, two seconds after it was so before: a new session would cost the
    next request some ten milliseconds."""
    broker, worker = with_share()
    for _ in range(10):
        worker.release(worker.lend())
        broker.pass_time(1.0)
        if broker.order.serial == broker.ledger.sharing.shares[broker.order.key].pending:
            broker.answer(broker.order, held=10)
    assert not broker.all(LeaveShare)


def test_a_share_that_was_given_back_in_a_backoff_is_asked_for_anew() -> None:
    """Else the next request would get the error of long ago, and so would every later one."""
    broker, worker = with_share()
    token = worker.granted(worker.ask(60.0))
    failed = Release(token, True, ReleaseReason.FAILED, error="refused", unreachable=True)
    broker.send(worker.id, failed)
    assert broker.pool.backoff.active
    for _ in range(100):
        broker.pass_time(0.1)
        worker.beat()
        if broker.all(LeaveShare):
            break
    last = broker.order
    request = worker.ask(60.0)
    assert broker.order.serial > last.serial
    broker.answer(broker.order, held=10)
    assert worker.granted(request)


def test_questions_that_are_counted_anew_are_answered_once() -> None:
    """All hosts had given their shares back, and with the limit's row its number was gone."""
    broker, worker = with_share(in_use=1)
    serial = broker.order.serial
    broker.wake(asked=7)
    worker.answer()
    for _ in range(50):
        if broker.order.serial > serial:
            serial = broker.order.serial
            broker.answer(broker.order, held=10)
        broker.pass_time(0.1)
        worker.answer()
    assert len([x for x in broker.all(SyncShare) if x.claim.checked]) <= 2


# --- a broker that does not know what is held


def test_nothing_is_given_back_before_the_grace_period_is_over() -> None:
    """Without a journal: the row may count leases of workers that have not spoken yet."""
    broker = SharingBroker()
    broker.take_in(broker.ledger.takeover.begin_grace_period(TTL_S, broker.now))
    broker.worker("a", max_conn=10)
    row = Listed("me", "host", 1, 1, 8, 8, 0, False, 0.0)
    other = Listed("b", "host", 2, 2, 2, 10, 0, False, 0.0)
    decision = decide_sync("me", broker.order, LimitRow(10), [row, other], Presence())
    assert decision.result.division.held == 8


def test_a_broker_with_a_journal_claims_what_is_in_it() -> None:
    broker, _ = with_share(in_use=3)
    after = SharingBroker(6, journal_complete=True)
    after.take_in(after.ledger.takeover.restore(journal_of(broker), after.now))
    assert after.order.claim.least == 3


# --- a table that was emptied


def decided(order: SyncShare, *rows: Listed) -> tuple[int, bool]:
    result = decide_sync("me", order, LimitRow(10), rows, Presence()).result
    return result.division.held, result.bounded


def test_a_host_takes_no_more_than_it_had_before_the_others_are_back() -> None:
    """The server was restarted: workers of the other host may connect under grants of before."""
    broker, worker = with_share(6, in_use=2)
    for _ in range(9):
        worker.ask(60.0)
    broker.fail(broker.order)
    order = broker.sync_again()
    assert decided(order) == (order.most, True)
    assert 2 <= order.most <= 6
    broker.answer(order, held=order.most, bounded=True, lacking=4)
    order = broker.sync_again()
    mine = Listed("me", "host", 1, 1, order.most, 9, 0, False, 0.0)
    assert decided(order, mine) == (order.most, True), "its own row proves nothing any more"
    other = Listed("b", "host", 2, 2, 1, 1, 0, False, 0.0)
    assert decided(order, mine, other) == (9, False)


def test_a_host_that_does_not_come_back_is_waited_for_as_long_as_its_grants_last() -> None:
    broker, worker = with_share(6, in_use=2)
    broker.fail(broker.order)
    since = broker.now
    while True:
        order = broker.sync_again()
        if not decided(order)[1]:
            break
        broker.answer(order, held=order.most, bounded=True, lacking=4)
        worker.beat()
    assert CUT_S <= broker.now - since <= CUT_S + 10.0


def lost(order: SyncShare, *rows: Listed, lost_s: float | None = None) -> SyncDecision:
    """Decide on a table of which the shares of "a" and "b" were lost with the server."""
    return decide_sync("me", order, LimitRow(10, hosts=("a", "b"), lost_s=lost_s), rows, Presence())


def test_a_broker_that_knows_nothing_waits_for_the_hosts_that_the_limit_names() -> None:
    """Its own memory went with its process, and the shares with the server."""
    order = SyncShare(broker_key(), 10, Claim(9, 0), 0, serial=1)
    decision = lost(order)
    assert decision.result.division.held == 0
    assert not decision.result.division.alone
    assert (decision.hosts, decision.lost) == (("a", "b", "me"), True)
    assert "their hosts are waited for: a, b" in decision.result.events[0]
    a, b = (Listed(name, "host", 2, 2, 1, 1, 0, False, 0.0) for name in "ab")
    assert lost(order, a, lost_s=1.0).result.division.held == 0
    assert not lost(order, a, lost_s=1.0).result.events, "it was said before"
    back = lost(order, a, b, lost_s=2.0)
    assert back.result.division.held == 8
    assert (back.hosts, back.lost) == (("a", "b", "me"), False)


def test_the_hosts_that_the_limit_names_are_waited_for_for_a_moment() -> None:
    """A machine that was started anew has another broker: nobody comes back."""
    order = SyncShare(broker_key(), 10, Claim(9, 0), 0, serial=1)
    assert lost(order, lost_s=BACK_S - 0.5).result.division.held == 0
    decision = lost(order, lost_s=BACK_S)
    assert decision.result.division.held == 10
    assert (decision.hosts, decision.lost) == (("me",), False)


def test_a_session_that_was_lost_alone_costs_nothing() -> None:
    broker, _ = with_share(6, in_use=1)
    order = broker.sync_again()
    mine = Listed("me", "host", 1, 1, 6, 9, 0, False, 0.0)
    assert not decided(order, mine)[1]


def test_a_host_that_was_alone_takes_everything_at_once() -> None:
    broker = SharingBroker()
    worker = broker.worker("a", max_conn=10)
    broker.answer(broker.order, held=10, alone=True)
    worker.lend()
    broker.fail(broker.order)
    assert decided(broker.sync_again()) == (10, False)


def test_a_bound_takes_nothing_away_from_what_is_in_use() -> None:
    order = SyncShare(broker_key(), 10, Claim(6, 6), 0, serial=1, most=2, missed=("b",), sure=False)
    mine = Listed("me", "host", 1, 1, 6, 6, 0, False, 0.0)
    assert decided(order, mine) == (6, True)


def broker_key() -> ShareKey:
    return with_share()[0].order.key


def test_pools_of_one_name_in_two_databases_are_judged_apart() -> None:
    """One session serves both. What a look has shown of a host counts for a limit only if the host
    was marked in that limit's rows before."""
    presence = Presence()

    def held_by_the_other(database: str, *, cut: bool) -> int:
        order = SyncShare(ShareKey(database, "pool p"), 4, Claim(4, 0), 1, pool="p")
        other = Listed("other", "host", 7, 1, 3, 3, 0, cut, 30.0, spare=1)
        (row,) = decide_sync("me", order, LimitRow(4), [other], presence).result.others
        return row.held

    presence.seen(frozenset(), [], 0.0)
    assert held_by_the_other("a", cut=True) == 3
    presence.seen(frozenset(), [], 0.5)
    assert held_by_the_other("b", cut=True) == 3
    assert held_by_the_other("a", cut=True) == 1
    presence.seen(frozenset(), [], 1.0)
    assert held_by_the_other("b", cut=True) == 1


def test_a_request_is_not_refused_for_a_host_that_has_just_left() -> None:
    """Its backends are still in the list of sessions: they will be gone at the next look."""
    order = SyncShare(broker_key(), 3, Claim(3, 2), 1, pool="p")
    mine = Listed("me", "host", 1, 1, 2, 3, 0, False, 0.0)
    presence = Presence()
    presence.seen(frozenset(), [(7, 1, tag_of("p", "other"))], 0.0)
    division = decide_sync("me", order, LimitRow(3, asked=1), [mine], presence).result.division
    assert division.held == 2
    assert not division.exhausted
    presence.seen(frozenset(), [], 1.0)
    assert (
        decide_sync("me", order, LimitRow(3, asked=1), [mine], presence).result.division.held == 3
    )
