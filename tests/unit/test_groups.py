"""Groups: reservations, limits and priorities under the cap over all pools."""

from __future__ import annotations

import pytest

from sharedpool.broker.core.backoff import Backoff
from sharedpool.broker.core.group_terms import GroupTerms, check_terms
from sharedpool.broker.core.records import Lease as Slot
from sharedpool.broker.core.records import Pool, Session
from sharedpool.broker.core.slot_states import SlotState
from sharedpool.broker.core.slots import Slots
from sharedpool.errors import ConfigError
from sharedpool.wire.admin import OrderKind
from sharedpool.wire.messages import Ack, Deny, Recall, ReleaseReason, Welcome
from sharedpool.wire.values import PoolSpec, Token
from tests.unit.ledger_driver import Broker, Worker, give_up_idle, order


def grouped(cap: int, **terms: GroupTerms) -> Broker:
    return Broker(max_conn=cap, groups=terms)  # type: ignore[arg-type]


def member(broker: Broker, name: str, group: str, pool: str = "") -> Worker:
    worker = Worker(broker, name, PoolSpec(pool or f"default@{group}", 99, 60_000, group=group))
    worker.hello()
    return worker


def test_a_reservation_is_kept_free_for_its_group() -> None:
    broker = grouped(3, web=GroupTerms(reserved=2))
    web, jobs = member(broker, "web", "web"), member(broker, "jobs", "jobs")
    jobs.lend()
    denial = jobs.outcome(jobs.ask())
    assert isinstance(denial, Deny)
    assert (denial.max_conn, denial.capped, denial.reserved) == (3, True, 2)
    web.lend()
    web.lend()
    assert jobs.sent(Recall) == []  # nothing was taken from it for that


def test_a_group_has_no_more_than_its_limit_over_all_its_pools() -> None:
    broker = grouped(9, jobs=GroupTerms(max_conn=2))
    one, other = member(broker, "one", "jobs", "p"), member(broker, "other", "jobs", "q")
    assert [pool.max_conn for pool in broker.ledger.report(broker.now)[0]] == [2, 2]
    assert one.last(Welcome).max_conn == 2
    one.beat()
    assert one.last(Ack).max_conn == 2
    one.lend()
    other.lend()
    request = one.ask()
    assert one.outcome(request) is None  # the other is asked whether it has one idle
    other.answer()
    refused = one.outcome(request)
    assert isinstance(refused, Deny)
    assert (refused.group, refused.max_conn) == ("jobs", 2)
    rest = member(broker, "rest", "")
    assert isinstance(rest.outcome(rest.ask()), Token)


def test_an_idle_connection_in_another_pool_of_a_full_group_is_taken() -> None:
    broker = grouped(9, jobs=GroupTerms(max_conn=1))
    one, other = member(broker, "one", "jobs", "p"), member(broker, "other", "jobs", "q")
    token = one.lend()
    one.checkin(token)
    request = other.ask(wait_s=9)
    one.answer()
    give_up_idle(one)
    assert isinstance(other.outcome(request), Token)


def test_a_free_slot_goes_to_the_most_important_waiter() -> None:
    broker = grouped(1, web=GroupTerms(priority=5), reports=GroupTerms(priority=-5))
    holder = member(broker, "holder", "jobs")
    web, reports = member(broker, "web", "web"), member(broker, "reports", "reports")
    token = holder.lend()
    first, second, third = reports.ask(wait_s=9), holder.ask(wait_s=9), web.ask(wait_s=9)
    holder.release(token, ReleaseReason.RETURN_DUE)
    granted = web.open(third)
    assert (reports.outcome(first), holder.outcome(second)) == (None, None)
    web.release(granted)
    granted = holder.open(second)
    holder.release(granted, ReleaseReason.RETURN_DUE)
    assert isinstance(reports.outcome(first), Token)


def test_idle_leases_are_taken_from_the_least_important_first_and_not_from_a_reservation() -> None:
    broker = grouped(3, web=GroupTerms(reserved=1, priority=5), reports=GroupTerms(priority=-5))
    web, jobs, reports = (member(broker, name, name) for name in ("web", "jobs", "reports"))
    for worker in (web, jobs, reports):
        worker.checkin(worker.lend())
        worker.beat()
    jobs.ask(wait_s=9)
    assert reports.last(Recall).take == 1
    give_up_idle(reports)
    reports.ask(wait_s=9)  # less important, but what lies idle may be had, for now
    give_up_idle(jobs)
    assert web.sent(Recall) == []


def test_a_pool_of_higher_priority_is_asked_but_not_pressed() -> None:
    broker = grouped(2, web=GroupTerms(priority=5))
    web, jobs = member(broker, "web", "web"), member(broker, "jobs", "jobs")
    busy, idle = web.lend(), web.lend()
    request = jobs.ask(wait_s=9)
    assert (web.last(Recall).take, web.last(Recall).returns_due) == (0, 0)
    web.answer()
    asked = len(web.sent(Recall))
    web.beat()
    assert len(web.sent(Recall)) == asked  # once for each waiter
    web.checkin(idle)
    web.beat()  # with its next heartbeat it tells
    give_up_idle(web)
    assert isinstance(jobs.outcome(request), Token)
    assert busy in web.held


def test_a_pool_of_lower_priority_is_pressed() -> None:
    broker = grouped(1, web=GroupTerms(priority=5))
    web, jobs = member(broker, "web", "web"), member(broker, "jobs", "jobs")
    jobs.lend()
    web.ask(wait_s=9)
    assert jobs.last(Recall).returns_due == 1


def test_a_lower_limit_makes_room_for_what_is_reserved() -> None:
    broker = grouped(4, web=GroupTerms(reserved=1))
    jobs = member(broker, "jobs", "jobs")
    tokens = [jobs.lend() for _ in range(3)]
    order(broker, OrderKind.LIMIT, "", 3)
    assert jobs.last(Recall).returns_due == 1
    jobs.release(tokens[0], ReleaseReason.RETURN_DUE)
    assert broker.slots.shrinking == {}
    web = member(broker, "web", "web")
    web.lend()


def test_groups_that_come_with_a_reload_make_room_for_what_is_reserved() -> None:
    """Whatever the order in which the pools were known."""
    broker = Broker(max_conn=4)
    jobs, reports = member(broker, "jobs", "jobs"), member(broker, "reports", "reports")
    busy = [jobs.lend(), jobs.lend(), reports.lend(), reports.lend()]
    broker.take_in(broker.ledger.configure(4, {"web": GroupTerms(reserved=1)}, {}, broker.now))
    assert jobs.last(Recall).returns_due == 1
    assert reports.last(Recall).returns_due == 1
    jobs.release(busy[0], ReleaseReason.RETURN_DUE)
    member(broker, "web", "web").lend()


def test_connections_of_an_unknown_group_count_in_every_one() -> None:
    """Known by their backends alone, after a journal was lost: they may be the group's that is
    nearly full."""
    slots = Slots(9, lambda command: None)
    slots.configure({"jobs": GroupTerms(max_conn=2)})
    jobs = slots.pools["p"] = Pool(PoolSpec("p", 9, 0, group="jobs"), 9, Backoff(lambda: 0.5))
    stranger = slots.pools["q"] = Pool(PoolSpec("q", 1, 0), 1, Backoff(lambda: 0.5), unnamed=True)
    slots.assign(jobs)
    slots.assign(stranger)
    session = Session(b"s", 0, "", "?", stranger, 0.0, 0.0)
    slots.sessions[b"s"] = stranger.sessions[b"s"] = session
    slots.move(Slot(Token(1, 1), session, stranger), SlotState.SUSPECT, "claimed by nobody")
    assert jobs.room == 1
    stranger.spec, stranger.unnamed = PoolSpec("q", 1, 0, group="web"), False
    slots.assign(stranger)  # its first session has said whose it is
    assert jobs.room == 2


def test_the_limit_over_all_pools_cannot_go_below_what_is_reserved() -> None:
    broker = grouped(5, web=GroupTerms(reserved=3))
    assert "3 connections are reserved" in order(broker, OrderKind.LIMIT, "", 2).error


@pytest.mark.parametrize(
    ("terms", "cap", "text"),
    [
        ({"web": GroupTerms(3, 2)}, 9, "groups.web: min 3 is more than max 2"),
        (
            {"web": GroupTerms(3), "jobs": GroupTerms(3)},
            5,
            "6 connections are reserved (min), of 5 in all",
        ),
        ({"web": GroupTerms(1)}, None, "there is none (max-conn)"),
    ],
)
def test_terms_that_cannot_be_kept_are_refused(
    terms: dict[str, GroupTerms], cap: int | None, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_terms(terms, cap)
    assert text in str(caught.value)
