"""The cache's side of the hand-over: for how long a connection that others want is kept."""

from __future__ import annotations

import pytest
from test_cache import Conn, Rig, reason_of

from sharedpool.wire.desk import Live, Pass
from sharedpool.wire.messages import Acquire, Backend, Recall, ReleaseReason, Renew, Token
from sharedpool.worker.lease import Closing, Lease, Ticket
from sharedpool.worker.slices import STEADY_GAP_S

SLICE_S = 0.002


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.cache.slices.slice_s, rig.cache.slices.hands_over = SLICE_S, True
    return rig


def pass_on(rig: Rig, *, owed: int, pressed: bool) -> tuple[Lease, Conn]:
    """Have a thread that asks again at once get a connection from another process."""
    rig.cache.slices.parted(rig.now)
    ticket = rig.want()
    rig.serial += 1
    rig.news += 1
    conn = Conn()
    live = Live(Backend(rig.serial), 1, b"")
    message = Pass(ticket.request, Token(1, rig.serial), rig.news, owed, pressed, live)
    assert rig.cache.passed(message, conn, float("inf"), rig.now) is ticket
    assert ticket.lease is not None
    rig.kept += [ticket, conn]
    return ticket.lease, conn


def use(rig: Rig, lease: Lease, conn: Conn, for_s: float, gap_s: float = 0.0) -> Closing | Ticket | None:
    """Use a connection again and again, with pauses, until `for_s` seconds after it came; return its last checkin's."""
    outcome = None
    while outcome is None and rig.now - lease.arrived < for_s:
        rig.now += 0.0003
        outcome = rig.cache.checkin(lease, conn, rig.now, None)
        if outcome is None:
            rig.now += gap_s
            assert rig.cache.take(rig.now) is lease
    return outcome


def test_while_others_wait_a_worker_in_steady_use_has_one_slice(rig: Rig) -> None:
    lease, conn = pass_on(rig, owed=1, pressed=True)
    assert use(rig, lease, conn, for_s=SLICE_S - 0.0004) is None
    assert reason_of(use(rig, lease, conn, for_s=SLICE_S + 0.0004)) is ReleaseReason.OWED


def test_while_nobody_is_known_to_wait_it_has_many_until_it_is_asked(rig: Rig) -> None:
    lease, conn = pass_on(rig, owed=1, pressed=False)
    assert use(rig, lease, conn, for_s=5 * SLICE_S) is None
    rig.recall(owed=1)
    assert reason_of(use(rig, lease, conn, for_s=6 * SLICE_S)) is ReleaseReason.OWED


def test_in_the_end_it_is_given_all_the_same(rig: Rig) -> None:
    lease, conn = pass_on(rig, owed=1, pressed=False)
    assert reason_of(use(rig, lease, conn, for_s=11 * SLICE_S)) is ReleaseReason.OWED


@pytest.mark.parametrize("pressed", [True, False])
def test_who_pauses_gives_at_the_next_checkin(rig: Rig, pressed: bool) -> None:
    lease, conn = pass_on(rig, owed=1, pressed=pressed)
    outcome = use(rig, lease, conn, for_s=SLICE_S, gap_s=STEADY_GAP_S * 1.2)
    assert reason_of(outcome) is ReleaseReason.OWED
    assert rig.now - lease.arrived < SLICE_S


def test_who_waits_by_link_can_be_moved_to_the_desk_unnoticed(rig: Rig) -> None:
    """What says so to the broker must not have it missed in the next heartbeat."""
    patient, impatient = rig.want(), rig.want(wait_s=0)
    rig.cache.register(rig.now, {})
    assert rig.cache.tickets.registered(0, hands_over=True) == [patient]
    assert (patient.at_desk, impatient.at_desk) == (True, False)
    sent = rig.sent()
    assert [each.request for each in sent if isinstance(each, Acquire)] == [impatient.request]
    assert [each.pending for each in sent if isinstance(each, Renew)] == [[impatient.request]]
    assert rig.cache.tickets.registered(0, hands_over=True) == []


def test_what_a_hello_has_asked_along_is_neither_asked_again_nor_moved(rig: Rig) -> None:
    served, other = rig.want(), rig.want()
    *_, first = rig.cache.register(rig.now, {})
    assert first == Acquire(served.request, served.wait_ms)
    assert rig.cache.tickets.registered(served.request, hands_over=True) == [other]
    assert (served.at_desk, other.at_desk) == (False, True)
    assert [each for each in rig.sent() if isinstance(each, Acquire)] == []


def test_what_is_answered_without_a_desk_is_not_asked_again_either(rig: Rig) -> None:
    served, other = rig.want(), rig.want()
    rig.cache.register(rig.now, {})
    assert rig.cache.tickets.registered(served.request, hands_over=False) == []
    assert [each.request for each in rig.sent() if isinstance(each, Acquire)] == [other.request]


def test_a_recall_that_a_passed_connection_has_overtaken_is_obeyed_and_answered(rig: Rig) -> None:
    """They come on two lines. Else the broker would count on an idle connection that nobody gives."""
    idle = rig.idle()
    rig.news += 1
    late = Recall(rig.news, take=1, owed=0, expired=False, answer=True)
    pass_on(rig, owed=1, pressed=True)
    rig.sent()
    (closing,) = rig.cache.recalled(late, rig.now, {})
    assert (closing.lease, closing.reason) == (idle, ReleaseReason.TAKEN)
    assert [each.answers for each in rig.sent() if isinstance(each, Renew)] == [late.serial]
    assert rig.cache.owed == 1  # what the later word says
    assert rig.cache.recalled(late, rig.now, {}) == []


def test_what_is_kept_for_a_user_who_does_not_come_is_given_when_the_broker_asks_again(rig: Rig) -> None:
    lease, conn = pass_on(rig, owed=1, pressed=True)
    assert rig.cache.checkin(lease, conn, rig.now + 0.0001, None) is None
    rig.now += STEADY_GAP_S * 1.5
    (closing,) = rig.recall(owed=1)
    assert (closing.lease, closing.reason) == (lease, ReleaseReason.OWED)


def test_where_it_must_be_opened_the_slice_begins_when_that_is_done(rig: Rig) -> None:
    rig.cache.slices.parted(rig.now)
    ticket = rig.want()
    rig.grant(ticket.request, owed=1)
    assert ticket.lease is not None
    rig.now += 5 * SLICE_S
    conn = Conn()
    rig.cache.opened(ticket.lease, Backend(1), float("inf"), conn, rig.now)
    assert use(rig, ticket.lease, conn, for_s=9 * SLICE_S) is None  # it cannot move: a close and a connect cost more
    assert reason_of(use(rig, ticket.lease, conn, for_s=11 * SLICE_S)) is ReleaseReason.OWED


def test_what_was_asked_for_twice_is_not_over_with_one_answer(rig: Rig) -> None:
    """The broker may have queued it anew while the first answer was on its way: its line is to be settled first."""
    ticket = Ticket(lambda: None, rig.now)
    rig.cache.tickets.want(ticket, 5.0, at_desk=True)
    rig.cache.register(rig.now, {})
    assert rig.cache.tickets.registered(0, hands_over=True) == [ticket]
    assert ticket.to_ask
    live = Live(Backend(1), 1, b"")
    rig.cache.passed(Pass(ticket.request, Token(1, 1), 1, 0, False, live), Conn(), float("inf"), rig.now)
    assert ticket.settled
    assert not ticket.finished
