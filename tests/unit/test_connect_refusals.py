"""Whose affair a failed connect is, and how often who was refused may try again."""

import itertools

import pytest

from sharedpool.broker.core.commands import Log
from sharedpool.broker.core.connect_refusals import RETRY_S, Refusal, Refusals, concerns_all
from sharedpool.broker.core.report import report
from sharedpool.wire.messages import Deny, DenyReason, Grant, Recall, Release, ReleaseReason
from sharedpool.wire.values import Token
from tests.unit.ledger_driver import Broker, Worker

LONGEST_RETRY_S = 8.0


@pytest.mark.parametrize("code", ["53300", "53200", "57P01", "57P02", "57P03", "58030"])
def test_a_servers_error_about_itself_concerns_every_process(code: str) -> None:
    assert concerns_all(code, unreachable=False)


@pytest.mark.parametrize(
    "code", ["28P01", "28000", "3D000", "42501", "55000", "57P04", "57014", "08P01", "XX000", ""]
)
def test_an_error_about_one_client_or_unknown_concerns_that_process(code: str) -> None:
    assert not concerns_all(code, unreachable=False)


def test_a_server_that_does_not_answer_concerns_everybody() -> None:
    assert concerns_all("", unreachable=True)


def test_repeated_refusals_lengthen_the_wait_up_to_a_limit() -> None:
    refusals, refusal, now = Refusals(lambda: 0.0), None, 100.0
    refusal = refusals.failed(b"a", refusal, "28P01", "no", now)
    assert refusals.blocked_until(b"a", refusal, now) is None  # its password may be another by now
    waits = []
    for _ in range(6):
        refusals.note_try(b"a", refusal, now)
        refusal = refusals.failed(b"a", refusal, "28P01", "no", now)
        until = refusals.blocked_until(b"a", refusal, now)
        assert until is not None
        assert refusals.blocked_until(b"a", refusal, until) is None
        waits.append(until - now)
        now = until
    assert waits[0] == pytest.approx(RETRY_S)
    assert waits == sorted(waits)
    assert waits[-1] == waits[-2] <= LONGEST_RETRY_S


def test_another_refusal_begins_anew() -> None:
    refusals = Refusals(lambda: 0.0)
    first = refusals.failed(b"a", None, "28P01", "no", 0.0)
    first = refusals.failed(b"a", first, "28P01", "no", 10.0)
    assert refusals.blocked_until(b"a", first, 10.0) is not None
    other = refusals.failed(b"a", first, "42704", "no such option", 20.0)
    assert refusals.blocked_until(b"a", other, 20.0) is None


def test_processes_refused_for_their_role_take_turns_and_none_is_left_out() -> None:
    refusals = Refusals(lambda: 0.5)
    names = [b"a", b"b", b"c"]
    held: dict[bytes, Refusal] = {
        name: refusals.failed(name, None, "28000", "no login", 0.0) for name in names
    }
    tried: list[tuple[float, bytes]] = []
    for tick in itertools.count():
        now = tick * 0.02
        if now > 20:
            break
        for name in names:  # who comes first would always have the turn
            if refusals.blocked_until(name, held[name], now) is None:
                refusals.note_try(name, held[name], now)
                held[name] = refusals.failed(name, held[name], "28000", "no login", now)
                tried.append((now, name))
    assert len(tried) <= 20 / RETRY_S
    assert {name for _, name in tried} >= {b"a", b"b"}
    assert all(one != other for (_, one), (_, other) in itertools.pairwise(tried))


def test_one_success_ends_the_wait_of_all_that_were_refused_alike() -> None:
    refusals = Refusals(lambda: 0.5)
    a, b = (refusals.failed(name, None, "28000", "no login", 0.0) for name in (b"a", b"b"))
    other = refusals.failed(b"c", None, "42501", "no right to it", 0.0)
    refusals.opened(a)
    assert refusals.blocked_until(b"b", b, 0.0) is None
    assert refusals.blocked_until(b"c", other, 0.0) is not None
    again = refusals.failed(b"b", b, "28000", "no login", 1.0)
    assert refusals.blocked_until(b"b", again, 1.0) is not None


# --- in the ledger


def refuse(worker: Worker, token: Token, code: str = "28P01", *, unreachable: bool = False) -> None:
    worker.held.pop(token, None)
    error = f"refused: {code}"
    release = Release(
        token, True, ReleaseReason.FAILED, error=error, code=code, unreachable=unreachable
    )
    worker.broker.send(worker.id, release)


def refuse_twice(worker: Worker) -> None:
    refuse(worker, worker.granted(worker.ask(wait_s=60)))
    refuse(worker, worker.granted(worker.ask(wait_s=60)))


def test_a_worker_with_a_wrong_password_holds_nobody_else_back_and_is_told_at_once() -> None:
    broker = Broker()
    good, bad = broker.worker("good", max_conn=4), broker.worker("bad")
    refuse_twice(bad)
    denial = bad.outcome(bad.ask(wait_s=60))
    assert isinstance(denial, Deny)
    assert (denial.reason, denial.error) == (DenyReason.REFUSED, "refused: 28P01")
    assert 0 < denial.retry_ms <= 1000
    tokens = [good.granted(good.ask(wait_s=60)) for _ in range(4)]
    assert len(set(tokens)) == 4
    assert [log for log in broker.all(Log) if "is refused (28P01)" in log.text]


def test_a_refused_process_tries_again_when_its_wait_is_over() -> None:
    broker = Broker()
    bad = broker.worker("bad", max_conn=4)
    refuse_twice(bad)
    broker.pass_time(RETRY_S * 1.5)
    trying = bad.ask(wait_s=60)
    assert isinstance(bad.outcome(bad.ask(wait_s=60)), Deny)  # one connect at a time
    bad.open(trying)
    assert {type(bad.outcome(bad.ask(wait_s=60))) for _ in range(3)} == {Token}


def test_threads_that_wait_beside_the_one_that_is_refused_are_told_instead_of_sent_after_it() -> (
    None
):
    broker = Broker()
    bad = broker.worker("bad", max_conn=1)
    first, second, third = (bad.ask(wait_s=60) for _ in range(3))
    refuse(bad, bad.granted(first))
    refuse(bad, bad.granted(second))
    denial = bad.outcome(third)
    assert isinstance(denial, Deny)
    assert denial.reason is DenyReason.REFUSED


def test_a_refused_process_has_no_connection_recalled() -> None:
    broker = Broker()
    good, bad = broker.worker("good", max_conn=1), broker.worker("bad")
    refuse_twice(bad)
    token = good.open(good.ask(wait_s=60))
    good.checkin(token)
    good.beat()
    assert isinstance(bad.outcome(bad.ask(wait_s=60)), Deny)
    assert not good.sent(Recall)


def test_a_worker_that_alone_finds_no_server_does_not_hold_the_others_back_for_long() -> None:
    broker = Broker()
    good, lost = broker.worker("good", max_conn=4), broker.worker("lost")
    refuse(lost, lost.granted(lost.ask(wait_s=60)), "", unreachable=True)
    assert isinstance(good.outcome(good.ask(wait_s=60)), Deny)  # it may well be down
    broker.pass_time(RETRY_S * 2)
    good.open(good.ask(wait_s=60))
    broker.pass_time(RETRY_S * 2)
    refuse(lost, lost.granted(lost.ask(wait_s=60)), "", unreachable=True)
    good.open(good.ask(wait_s=60))  # by now that is known to be its own affair
    assert good.granted(good.ask(wait_s=60))


@pytest.mark.parametrize(("code", "goes_on"), [("", True), ("53300", False)], ids=["down", "full"])
def test_a_server_that_another_process_reached_is_not_down_but_may_be_full(
    code: str, goes_on: bool
) -> None:
    broker = Broker()
    good, late = broker.worker("good", max_conn=4), broker.worker("late")
    trying = late.granted(late.ask(wait_s=60))
    broker.pass_time(0.1)
    good.open(good.ask(wait_s=60))
    broker.pass_time(0.1)
    refuse(late, trying, code, unreachable=not code)
    outcome = good.outcome(good.ask(wait_s=60))
    assert isinstance(outcome, Token) if goes_on else outcome is None  # it waits for what there is


def test_a_grant_says_with_what_the_server_refuses_everybody() -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=3), broker.worker("b", max_conn=3)
    token = a.granted(a.ask())
    assert a.last(Grant).code == ""
    broker.send(
        a.id, Release(token, True, ReleaseReason.FAILED, error="too many clients", code="53300")
    )
    broker.pass_time(2.0)
    b.granted(b.ask())
    assert b.last(Grant).code == "53300"


@pytest.mark.parametrize(("code", "is_told"), [("28000", True), ("42501", True), ("28P01", False)])
def test_a_refusal_of_every_process_of_a_role_is_reported_for_the_pool(
    code: str, is_told: bool
) -> None:
    broker = Broker()
    a, b = broker.worker("a", max_conn=4), broker.worker("b", max_conn=4)
    refuse(a, a.granted(a.ask(wait_s=60)), code)
    assert error_of(broker) == (f"refused: {code}" if is_told else "")
    broker.pass_time(1.0)
    b.open(b.ask(wait_s=60))  # it is let in, perhaps from another host
    assert error_of(broker) == ""


def test_a_process_that_connects_as_somebody_else_tells_nothing_of_the_pool() -> None:
    broker = Broker()
    broker.worker("a", max_conn=4, server="app@db:5432/app")
    other = broker.worker("b", max_conn=4, server="old@db:5432/app")
    refuse(other, other.granted(other.ask(wait_s=60)), "28000")
    assert error_of(broker) == ""


def error_of(broker: Broker) -> str:
    (pool,), _ = report(broker.slots, broker.now)
    return pool.error
