"""What the records tell an operator: leases by age, how long requests waited, slots in use over
time."""

from __future__ import annotations

from typing import Any

from sharedpool.broker.core.commands import Log
from sharedpool.wire.codec import encode
from sharedpool.wire.messages import Deny, Renew, ReportNow, Welcome
from sharedpool.wire.reports import MOST_LISTED, PoolReport
from sharedpool.wire.values import LeaseReport, Phase
from tests.unit.ledger_driver import Broker


def pool_of(broker: Broker) -> PoolReport:
    (pool,) = broker.ledger.report(broker.now)[0]
    return pool


def test_the_longest_in_use_come_first_then_the_longest_idle(broker: Broker) -> None:
    a = broker.worker("a", max_conn=4)
    young, idle, old, long_idle = (a.lend() for _ in range(4))
    a.held[idle] = a.held[long_idle] = Phase.IDLE
    a.ages = {young: 1000, idle: 2000, old: 3000, long_idle: 9000}
    a.beat()
    broker.now += 1
    seen = broker.ledger.oldest_leases(10, broker.now)
    assert [line.token for line in seen] == [old, young, long_idle, idle]
    assert [(line.state, line.age_ms) for line in seen] == [
        ("in use", 4000), ("in use", 2000), ("idle", 10_000), ("idle", 3000),
    ]  # fmt: skip
    assert [line.thread for line in seen[:2]] == ["T1", "T1"]
    assert {(line.title, line.pid) for line in seen} == {("a", 100 + ord("a"))}
    assert seen[0].backend == a.backend(old)
    assert [line.token for line in broker.ledger.oldest_leases(2, broker.now)] == [old, young]
    assert broker.ledger.oldest_leases(-1, broker.now) == []


def test_a_connecting_lease_has_an_age_and_no_backend(broker: Broker) -> None:
    a = broker.worker("a")
    a.granted(a.ask())
    broker.now += 2.5
    (line,) = broker.ledger.oldest_leases(10, broker.now)
    assert (line.state, line.age_ms, line.backend) == ("connecting", 2500, None)


def test_a_silent_workers_lease_keeps_its_age(broker: Broker) -> None:
    a = broker.worker("a")
    a.lend()
    broker.pass_time(20)
    (line,) = broker.ledger.oldest_leases(10, broker.now)
    assert (line.state, line.age_ms) == ("suspect", 20_000)


def test_no_more_are_listed_than_fit_into_a_frame(broker: Broker) -> None:
    a = broker.worker("a", max_conn=MOST_LISTED + 1)
    for _ in range(MOST_LISTED + 1):
        a.lend()
    assert len(broker.ledger.oldest_leases(10**9, broker.now)) == MOST_LISTED


def test_a_refusal_names_the_line_that_checked_the_oldest_out(broker: Broker) -> None:
    a, b = broker.worker("a"), broker.worker("b")
    first, second = a.lend(), a.lend()
    stacks = {first: ["views.py:3 in show", "app.py:1 in <module>"], second: ["jobs.py:9 in run"]}
    reports = [
        LeaseReport(first, Phase.IN_USE, 5000, "T1", a.backend(first), stacks[first]),
        LeaseReport(second, Phase.IN_USE, 1000, "T1", a.backend(second), stacks[second]),
    ]
    broker.send(a.id, Renew(reports, a.seen))
    assert [line.stack for line in broker.ledger.oldest_leases(2, broker.now)] == list(
        stacks.values()
    )
    request = b.ask(wait_s=1)
    broker.pass_time(1.1)
    denial = b.outcome(request)
    assert isinstance(denial, Deny)
    (holder,) = denial.holders
    assert (holder.count, holder.longest_ms, holder.site) == (2, 6100, "views.py:3 in show")


def test_a_stack_ends_with_its_checkout(broker: Broker) -> None:
    a = broker.worker("a")
    token = a.lend()
    broker.send(
        a.id,
        Renew(
            [LeaseReport(token, Phase.IN_USE, 0, "T1", a.backend(token), ["x.py:1 in f"])], a.seen
        ),
    )
    a.held[token] = Phase.IDLE
    a.beat()
    (line,) = broker.ledger.oldest_leases(1, broker.now)
    assert (line.state, line.stack) == ("idle", [])


def test_the_report_of_a_long_checkout_carries_its_stack(broker: Broker) -> None:
    a = broker.worker("a", max_checkout_ms=5000)
    token = a.lend()
    stack = ["views.py:3 in show", "app.py:1 in <module>"]
    broker.send(
        a.id, Renew([LeaseReport(token, Phase.IN_USE, 0, "T1", a.backend(token), stack)], a.seen)
    )
    broker.pass_time(5.1)
    broker.pass_time(1.1)  # its worker was asked
    (log,) = broker.all(Log)
    assert "at views.py:3 in show < app.py:1 in <module>" in log.text
    assert "\n" not in log.text
    assert log.fields == {
        "epoch": broker.ledger.epoch,
        "pool": "p",
        "lease": str(token),
        "session": f"a[{100 + ord('a')}]",
        "reason": "max_checkout",
    }


def test_waits_are_from_the_request_to_the_grant(broker: Broker) -> None:
    a, b = broker.worker("a", max_conn=1), broker.worker("b", max_conn=1)
    assert (pool_of(broker).wait_p50_us, pool_of(broker).wait_p99_us) == (-1, -1)
    for wait_s in [0.0] * 50 + [0.25] * 49 + [2.0]:
        token = a.lend()
        request = b.ask(wait_s=10)
        broker.now += wait_s
        a.release(token)
        b.release(b.granted(request))
    # Half of all requests, the holders' own, found a free slot.
    assert (pool_of(broker).wait_p50_us, pool_of(broker).wait_p99_us) == (0, 250_000)


def test_only_the_latest_waits_count(broker: Broker) -> None:
    a = broker.worker("a")
    for _ in range(2000):
        a.release(a.granted(a.ask()))
    (pool,) = broker.slots.pools.values()
    assert len(pool.waited) == 500


def test_samples_tell_how_many_slots_are_in_use(broker: Broker) -> None:
    a = broker.worker("a")
    broker.ledger.sample()
    token = a.lend()
    broker.ledger.sample()
    a.lend()
    broker.ledger.sample()
    a.held[token] = Phase.IDLE
    a.beat()
    broker.ledger.sample()
    assert pool_of(broker).history == [0, 1, 2, 1]
    for _ in range(100):
        broker.ledger.sample()
    assert len(pool_of(broker).history) == 60


def test_only_workers_that_hold_something_and_are_heard_are_asked_to_tell(broker: Broker) -> None:
    a, b, c = broker.worker("a"), broker.worker("b", "q"), broker.worker("c", "r")
    a.lend()
    c.lend()
    broker.pass_time(10)
    for worker in (a, b):
        worker.beat()
    broker.pass_time(6)  # c is suspect
    broker.take_in(broker.ledger.fresh_reports.request())
    assert [len(worker.sent(ReportNow)) for worker in (a, b, c)] == [1, 0, 0]
    assert broker.ledger.fresh_reports.awaited == {a.id}
    a.beat()
    assert not broker.ledger.fresh_reports.awaited


def test_a_great_many_workers_are_left_in_peace(broker: Broker) -> None:
    broker.checks = False  # 1,500 steps with 500 leases
    for i in range(501):
        broker.worker(f"w{i}", f"p{i}").lend()
    broker.take_in(broker.ledger.fresh_reports.request())
    assert broker.all(ReportNow) == []
    assert not broker.ledger.fresh_reports.awaited


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
