"""The cache's side of the hand-over: for how long a connection that others want is kept."""

from __future__ import annotations

import pytest

from sharedpool.errors import SharedPoolError
from sharedpool.wire.desk import Live, Moved, Passed
from sharedpool.wire.messages import Acquire, Recall, ReleaseReason, Renew
from sharedpool.wire.values import Backend, Token
from sharedpool.worker.core.lease import Closing, Lease, Waiter
from sharedpool.worker.core.time_slice import STEADY_GAP_S
from tests.unit.cache_driver import Conn, Rig, reason_of
from tests.unit.cache_handover_driver import SLICE_S, rig

__all__ = ["rig"]  # pytest finds it here


def pass_on(rig: Rig, *, returns_due: int, others_wait: bool) -> tuple[Lease, Conn]:
    """Have a thread that asks again at once get a connection from another process."""
    rig.cache.time_slice.note_given(rig.now)
    waiter = rig.want()
    rig.serial += 1
    rig.news += 1
    conn = Conn()
    live = Live(Backend(rig.serial), 1, b"")
    message = Moved(
        waiter.request,
        Token(1, rig.serial),
        -1,
        0,
        live,
        Passed(rig.news, returns_due, others_wait),
    )
    assert rig.messages.received(message, conn, float("inf"), rig.now) is waiter
    assert waiter.lease is not None
    rig.kept += [waiter, conn]
    return waiter.lease, conn


def use(
    rig: Rig, lease: Lease, conn: Conn, for_s: float, gap_s: float = 0.0
) -> Closing | Waiter | None:
    """Use a connection again and again, with pauses, until `for_s` seconds after it came; return
    its last checkin's."""
    outcome = None
    while outcome is None and rig.now - lease.arrived_at < for_s:
        rig.now += 0.0003
        outcome = rig.cache.checkin(lease, conn, rig.now, None)
        if outcome is None:
            rig.now += gap_s
            assert rig.cache.take(rig.now) is lease
    return outcome


def test_while_others_wait_a_worker_in_steady_use_has_one_slice(rig: Rig) -> None:
    lease, conn = pass_on(rig, returns_due=1, others_wait=True)
    assert use(rig, lease, conn, for_s=SLICE_S - 0.0004) is None
    assert reason_of(use(rig, lease, conn, for_s=SLICE_S + 0.0004)) is ReleaseReason.RETURN_DUE


def test_while_nobody_is_known_to_wait_it_has_many_until_it_is_asked(rig: Rig) -> None:
    lease, conn = pass_on(rig, returns_due=1, others_wait=False)
    assert use(rig, lease, conn, for_s=5 * SLICE_S) is None
    rig.recall(returns_due=1)
    assert reason_of(use(rig, lease, conn, for_s=6 * SLICE_S)) is ReleaseReason.RETURN_DUE


def test_in_the_end_it_is_given_all_the_same(rig: Rig) -> None:
    lease, conn = pass_on(rig, returns_due=1, others_wait=False)
    assert reason_of(use(rig, lease, conn, for_s=11 * SLICE_S)) is ReleaseReason.RETURN_DUE


@pytest.mark.parametrize("others_wait", [True, False])
def test_a_thread_that_pauses_gives_at_the_next_checkin(rig: Rig, others_wait: bool) -> None:
    lease, conn = pass_on(rig, returns_due=1, others_wait=others_wait)
    outcome = use(rig, lease, conn, for_s=SLICE_S, gap_s=STEADY_GAP_S * 1.2)
    assert reason_of(outcome) is ReleaseReason.RETURN_DUE
    assert rig.now - lease.arrived_at < SLICE_S


def test_a_request_within_a_hello_is_not_sent_again(rig: Rig) -> None:
    served, other = rig.want(), rig.want()
    *_, first = rig.messages.register(rig.now, {})
    assert first == Acquire(served.request, 5000)
    rig.now += 2
    rig.cache.waiters.registered(served.request, rig.now)
    assert [each for each in rig.sent() if isinstance(each, Acquire)] == [
        Acquire(other.request, 3000)
    ]


def test_a_thread_that_takes_a_wait_socket_in_the_lane_tells_the_broker(rig: Rig) -> None:
    waiter = rig.want()
    rig.sent()
    rig.cache.waiters.change_place(waiter, 7, rig.now)
    assert rig.sent() == [Acquire(waiter.request, 5000, 7)]
    rig.cache.give_up(waiter, rig.now)
    rig.sent()
    rig.cache.waiters.change_place(waiter, 8, rig.now)  # too late
    assert rig.sent() == []


def test_a_recall_that_a_passed_connection_has_overtaken_is_obeyed_and_answered(rig: Rig) -> None:
    """They come on two lines.

    Else the broker would count on an idle connection that nobody gives.
    """
    idle = rig.idle()
    rig.news += 1
    late = Recall(rig.news, take=1, returns_due=0, expired=False, answer=True)
    pass_on(rig, returns_due=1, others_wait=True)
    rig.sent()
    (closing,) = rig.messages.recalled(late, rig.now, {})
    assert (closing.lease, closing.reason) == (idle, ReleaseReason.TAKEN)
    assert [each.answers for each in rig.sent() if isinstance(each, Renew)] == [late.serial]
    assert rig.cache.returns_due == 1  # what the later word says
    assert rig.messages.recalled(late, rig.now, {}) == []


def test_a_connection_kept_for_its_thread_in_vain_is_given_when_the_broker_asks_again(
    rig: Rig,
) -> None:
    lease, conn = pass_on(rig, returns_due=1, others_wait=True)
    assert rig.cache.checkin(lease, conn, rig.now + 0.0001, None) is None
    rig.now += STEADY_GAP_S * 1.5
    (closing,) = rig.recall(returns_due=1)
    assert (closing.lease, closing.reason) == (lease, ReleaseReason.RETURN_DUE)


def test_where_it_must_be_opened_the_slice_begins_when_that_is_done(rig: Rig) -> None:
    rig.cache.time_slice.note_given(rig.now)
    waiter = rig.want()
    rig.grant(waiter.request, returns_due=1)
    assert waiter.lease is not None
    rig.now += 5 * SLICE_S
    conn = Conn()
    rig.cache.opened(waiter.lease, Backend(1), float("inf"), conn, rig.now)
    assert (
        use(rig, waiter.lease, conn, for_s=9 * SLICE_S) is None
    )  # it cannot move: a close and a connect cost more
    assert reason_of(use(rig, waiter.lease, conn, for_s=11 * SLICE_S)) is ReleaseReason.RETURN_DUE


@pytest.mark.parametrize("asks", [1, 2])
def test_one_answer_does_not_end_a_request_that_was_sent_twice(rig: Rig, asks: int) -> None:
    """The broker may have queued it anew while the first answer was on its way: its wait socket is
    to be watched."""
    waiter = rig.want()
    if asks == 2:
        rig.messages.register(rig.now, {})
    message = Moved(
        waiter.request,
        Token(1, 1),
        -1,
        0,
        Live(Backend(1), 1, b""),
        Passed(1, 0, others_wait=False),
    )
    rig.messages.received(message, Conn(), float("inf"), rig.now)
    assert waiter.is_done
    assert waiter.broker_is_done is (asks == 1)


def test_a_connection_passed_by_a_former_broker_is_not_used(rig: Rig) -> None:
    message = Moved(
        1, Token(0, 1), -1, 0, Live(Backend(1), 1, b""), Passed(1, 0, others_wait=False)
    )
    with pytest.raises(SharedPoolError, match="former broker"):
        rig.messages.received(message, Conn(), float("inf"), rig.now)
    assert not rig.cache.leases
