"""The cache's side of the lane: checkouts and checkins while connections move past the broker."""

from __future__ import annotations

import pytest

from sharedpool.wire.desk import Live, Moved
from sharedpool.wire.messages import Acquire, Release, ReleaseReason, Renew, Withdraw
from sharedpool.wire.values import Backend, LeaseReport, Phase, Token
from sharedpool.worker.core.lease import Lease, Waiter
from tests.unit.cache_driver import Conn, Rig, reason_of
from tests.unit.cache_handover_driver import rig

__all__ = ["rig"]  # pytest finds it here


def want_in_lane(rig: Rig) -> Waiter:
    waiter = Waiter(lambda: None, rig.now)
    rig.cache.waiters.enqueue(waiter, 5.0, waits_for_move=True)
    return waiter


def come(rig: Rig, request: int = 0, *, moves: int = 3) -> tuple[Waiter | None, Lease, Conn]:
    """Have a connection come in the lane."""
    rig.serial += 1
    moved, conn = (
        Moved(request, Token(1, rig.serial), 9, moves, Live(Backend(rig.serial), 1, b"")),
        Conn(),
    )
    waiter = rig.messages.received(moved, conn, float("inf"), rig.now)
    rig.kept += [conn]
    return waiter, rig.cache.leases[moved.token], conn


@pytest.fixture
def moving(rig: Rig) -> Rig:
    rig.cache.enter_lane(memoryview(b"\1"))
    return rig


def test_while_connections_move_a_checkin_gives(moving: Rig) -> None:
    lease, conn = moving.lend()
    lease.movable = True
    assert reason_of(moving.cache.checkin(lease, conn, moving.now, None)) is ReleaseReason.SHARED
    assert not moving.cache.idle


def test_while_connections_move_what_cannot_is_closed(moving: Rig) -> None:
    """Its slot is another's then."""
    lease, conn = moving.lend()
    assert reason_of(moving.cache.checkin(lease, conn, moving.now, None)) is ReleaseReason.CLOSED


def test_when_they_move_no_more_a_checkin_keeps(rig: Rig) -> None:
    lease, conn = rig.lend()
    lease.movable = True
    assert rig.cache.checkin(lease, conn, rig.now, None) is None
    assert list(rig.cache.idle) == [lease]


def test_a_connection_checked_in_by_the_fast_path_is_given_too(moving: Rig) -> None:
    """Its thread has seen only afterwards that they move."""
    board = bytearray(b"\0")
    moving.cache.enter_lane(memoryview(board))
    lease = moving.idle()
    lease.movable, board[0] = True, 1
    assert reason_of(moving.cache.reconsider_idle(lease, moving.now)) is ReleaseReason.SHARED
    assert not moving.cache.idle


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("stale", ReleaseReason.STALE),
        ("old", ReleaseReason.RETIRED),
        ("returns_due", ReleaseReason.RETURN_DUE),
        ("taken away", ReleaseReason.BROKEN),
    ],
)
def test_a_connection_that_must_not_go_on_does_not_move(
    moving: Rig, case: str, reason: ReleaseReason
) -> None:
    lease, conn = moving.lend(retire_at=moving.now + (0.5 if case == "old" else 100))
    lease.movable = True
    if case == "stale":
        moving.messages.renew_generation(2, moving.now)
    elif case == "returns_due":
        moving.recall(returns_due=1)
    elif case == "taken away":
        moving.cache.forget(lease.token)
    moving.now += 1
    assert reason_of(moving.cache.checkin(lease, conn, moving.now, None)) is reason


def test_a_thread_in_the_lane_is_not_served_before_its_turn(moving: Rig) -> None:
    """Threads of other processes may come first in the lane; at the broker, none can."""
    lease, conn = moving.lend()
    lease.movable = True
    in_lane, at_broker = want_in_lane(moving), moving.want()
    moving.sent()
    assert moving.cache.checkin(lease, conn, moving.now, None) is at_broker
    assert moving.sent() == [Withdraw(at_broker.request)]
    assert list(moving.cache.waiting.values()) == [in_lane]
    other, conn = moving.lend()
    other.movable = True
    assert reason_of(moving.cache.checkin(other, conn, moving.now, None)) is ReleaseReason.SHARED


def test_a_process_with_many_threads_keeps_no_connection_for_ever(moving: Rig) -> None:
    """Its threads without a wait socket wait at the broker; those of other processes are to have
    their turn."""
    lease, conn = moving.lend()
    lease.movable = True
    served = 0
    while (
        isinstance(waiter := moving.cache.checkin(lease, conn, moving.now, None), Waiter)
        or not served
    ):
        served += 1
        assert served < 100
        moving.kept.append(moving.want())
        moving.now += 0.001
    assert reason_of(waiter) is ReleaseReason.SHARED
    assert 5 < served < 15


def test_a_connection_that_cannot_move_is_put_back_and_reported(moving: Rig) -> None:
    """The broker is to ask for it: whoever waits does so in the lane."""
    lease, conn = moving.lend()
    lease.movable = True
    moving.cache.checkin(lease, conn, moving.now, None)
    moving.sent()
    moving.cache.keep_after_all(lease, conn, moving.now)
    assert (lease.phase, lease.conn, list(moving.cache.idle)) == (Phase.IDLE, conn, [lease])
    (renew,) = moving.sent()
    assert isinstance(renew, Renew)
    assert [(report.token, report.phase) for report in renew.leases] == [(lease.token, Phase.IDLE)]
    (closing,) = moving.recall(take=1)
    assert (closing.lease, closing.reason) == (lease, ReleaseReason.TAKEN)


def test_a_connection_taken_away_meanwhile_is_not_put_back(moving: Rig) -> None:
    lease, conn = moving.lend()
    moving.cache.forget(lease.token)
    moving.sent()
    moving.cache.keep_after_all(lease, conn, moving.now)
    assert (list(moving.cache.idle), moving.sent()) == ([], [])


def test_a_thread_in_the_lane_asks_the_broker_for_nothing(moving: Rig) -> None:
    waiter = want_in_lane(moving)
    assert moving.sent() == []
    assert moving.cache.reporter.heartbeat(moving.now, {}, moving.cache.hits).pending == []
    assert moving.cache.give_up(waiter, moving.now) is None
    assert moving.sent() == []  # nor need it be told that it waits no more
    assert not moving.cache.waiting
    assert not waiter.waits_for_move


def test_a_connection_from_the_lane_serves_its_request(moving: Rig) -> None:
    other, mine = want_in_lane(moving), want_in_lane(moving)
    waiter, lease, conn = come(moving, mine.request)
    assert waiter is mine
    assert mine.lease is lease
    assert (lease.conn, lease.cell, lease.moves, lease.movable, lease.needs_configure) == (
        conn,
        9,
        3,
        True,
        True,
    )
    assert mine.is_done
    assert list(moving.cache.waiting.values()) == [other]
    assert moving.sent() == []


def test_a_connection_for_a_request_that_is_over_serves_the_next(moving: Rig) -> None:
    gone, next_one = want_in_lane(moving), want_in_lane(moving)
    moving.cache.give_up(gone, moving.now)
    waiter, lease, _ = come(moving, gone.request)
    assert (waiter, next_one.lease) == (next_one, lease)
    assert moving.sent() == []


def test_a_connection_without_a_waiter_is_idle(moving: Rig) -> None:
    waiter, lease, _ = come(moving)
    assert (waiter, list(moving.cache.idle)) == (None, [lease])


def test_a_connection_from_the_shelf_ends_at_its_lifetime(moving: Rig) -> None:
    moving.serial += 1
    moved = Moved(0, Token(1, moving.serial), 9, 1, Live(Backend(1), 1, b""))
    moving.messages.received(moved, Conn(), moving.now + 1, moving.now)
    (closing,) = moving.cache.expire(moving.now + 1)
    assert closing.reason is ReleaseReason.RETIRED


def test_a_thread_in_a_former_brokers_lane_asks_the_later_broker(moving: Rig) -> None:
    waiter = want_in_lane(moving)
    *_, first = moving.messages.register(moving.now, {})
    assert first == Acquire(waiter.request, 5000)
    moving.cache.waiters.registered(0, moving.now)
    assert [each for each in moving.sent() if isinstance(each, Acquire)] == [first]
    assert not waiter.waits_for_move


def test_a_thread_that_leaves_the_lane_asks_the_broker_and_is_served_by_either(moving: Rig) -> None:
    """A connection may still be on its way in the lane; then the broker is told to forget the
    request."""
    by_broker, in_lane = want_in_lane(moving), want_in_lane(moving)
    for waiter in (by_broker, in_lane):
        moving.cache.waiters.ask(waiter, moving.now)
    assert [type(each) for each in moving.sent()] == [Acquire, Acquire]
    come(moving, in_lane.request)
    assert in_lane.is_done
    assert not in_lane.broker_is_done
    assert moving.sent() == [Withdraw(in_lane.request)]
    moving.grant(by_broker.request)
    assert by_broker.broker_is_done
    assert moving.sent() == []


def test_a_thread_that_received_an_unusable_connection_asks_the_broker(moving: Rig) -> None:
    waiter = want_in_lane(moving)
    moved = Moved(waiter.request, Token(1, 70), 9, 1, Live(Backend(70), 1, b""))
    moving.messages.refuse(moved, moving.now)
    assert moving.sent() == [
        Release(moved.token, False, ReleaseReason.FAILED, Backend(70)),
        Acquire(waiter.request, 5000),
    ]
    assert not waiter.waits_for_move
    assert moving.cache.reporter.renewal(moving.now, {}).pending == [waiter.request]
    assert [x.token for x in moving.cache.reporter.renewal(moving.now, {}).unproven] == [
        moved.token
    ]  # until it is known


def arrival(serial: int, moves: int = 2) -> Moved:
    return Moved(4, Token(1, serial), 9, moves, Live(Backend(serial), 1, b""))


def test_a_connection_that_has_arrived_and_is_not_taken_in_is_listed(moving: Rig) -> None:
    """Else the broker would take it for lost."""
    lease, _ = moving.lend()
    in_hand, unread = arrival(50), arrival(51, moves=7)
    moving.cache.arriving[in_hand.token] = in_hand, lambda: moving
    moving.cache.reporter.unread = [unread]
    expected = [
        LeaseReport(in_hand.token, Phase.CONNECTING, 0, "", Backend(50), [], 2),
        LeaseReport(unread.token, Phase.CONNECTING, 0, "", Backend(51), [], 7),
    ]
    said = moving.cache.reporter.renewal(moving.now, {}).leases
    assert sorted(said, key=lambda report: report.token)[1:] == expected
    held, *_ = moving.messages.register(moving.now, {})
    assert sorted(held, key=lambda report: report.token)[1:] == expected
    assert lease.token < in_hand.token


def test_a_connection_dropped_before_it_was_received_is_no_longer_listed(moving: Rig) -> None:
    """By an interrupt in whatever line: else its slot would be this process's for ever."""
    kept, dropped = arrival(50), arrival(51)
    moving.cache.arriving.update(
        {
            kept.token: (kept, lambda: moving),
            dropped.token: (dropped, lambda: None),
        }
    )
    assert [report.token for report in moving.cache.reporter.renewal(moving.now, {}).leases] == [
        kept.token
    ]
    assert list(moving.cache.arriving) == [kept.token]


def test_a_lease_is_listed_once(moving: Rig) -> None:
    """Read between two looks; taken in between two others."""
    _, lease, _ = come(moving)
    both, taken_in = arrival(50), arrival(lease.token.serial)
    moving.cache.reporter.unread = [both, taken_in]
    moving.cache.arriving.update({each.token: (each, lambda: moving) for each in (both, taken_in)})
    tokens = [report.token for report in moving.cache.reporter.renewal(moving.now, {}).leases]
    assert sorted(tokens) == [lease.token, both.token]


def test_how_often_it_has_moved_is_said_of_what_is_held(moving: Rig) -> None:
    _, lease, _ = come(moving, moves=12)
    (report,) = moving.cache.reporter.renewal(moving.now, {}).leases
    assert (report.token, report.moves) == (lease.token, 12)


def test_a_lease_on_its_way_out_is_not_claimed(moving: Rig) -> None:
    """By the time a later broker hears of it, it is another process's."""
    _, lease, conn = come(moving)
    assert moving.cache.take(moving.now) is lease
    assert reason_of(moving.cache.checkin(lease, conn, moving.now, None)) is ReleaseReason.SHARED
    moving.cache.giving(lease)
    held, *_ = moving.messages.register(moving.now, {})
    assert held == []
    moving.cache.given(lease)
    assert not moving.cache.leases
