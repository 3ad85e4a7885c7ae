"""The worker's cache: what one process holds, and whom of its threads it serves."""

from __future__ import annotations

import pytest

from sharedpool.wire.messages import Acquire, Confirm, Release, ReleaseReason, Withdraw
from sharedpool.wire.values import Backend, Phase, Token
from sharedpool.worker.core.lease import Closing
from tests.unit.cache_driver import Conn, Rig, reason_of, rig

__all__ = ["rig"]  # pytest finds it here


# --- checkout and checkin


def test_the_most_recently_used_connection_is_handed_out_first(rig: Rig) -> None:
    older, newer = rig.idle(), rig.idle()
    assert rig.cache.take(rig.now) is newer
    assert rig.cache.take(rig.now) is older
    assert rig.cache.take(rig.now) is None


def test_take_tells_how_long_the_connection_lay_idle(rig: Rig) -> None:
    rig.idle()
    rig.now += 6
    lease = rig.cache.take(rig.now)
    assert lease is not None
    assert (lease.phase, lease.idle_s, lease.since) == (Phase.IN_USE, 7.0, rig.now)


def test_a_cache_hit_tells_the_broker_nothing(rig: Rig) -> None:
    rig.idle()
    rig.sent()
    lease = rig.cache.take(rig.now)
    assert lease is not None
    rig.cache.checkin(lease, Conn(), rig.now, None)
    assert rig.sent() == []


def test_want_asks_the_broker_in_whole_milliseconds(rig: Rig) -> None:
    for wait_s in (0.0, 0.0001, 1.5, float("inf")):
        rig.want(wait_s)
    assert rig.sent() == [Acquire(1, 0), Acquire(2, 1), Acquire(3, 1500), Acquire(4, 2**52)]


def test_an_opened_lease_is_confirmed(rig: Rig) -> None:
    rig.lend()
    assert rig.sent() == [Acquire(1, 5000), Confirm(Token(1, 1), Backend(1))]


def test_a_checkin_is_handed_on_to_a_waiting_waiter_which_withdraws_its_request(rig: Rig) -> None:
    lease, conn = rig.lend()
    first, second = rig.want(), rig.want()
    rig.sent()
    assert rig.cache.checkin(lease, conn, rig.now, None) is first
    assert first.lease is lease
    assert lease.conn is conn
    assert rig.sent() == [Withdraw(first.request)]
    assert list(rig.cache.waiting.values()) == [second]


@pytest.mark.parametrize("verdict", [ReleaseReason.BROKEN, ReleaseReason.CLOSED])
def test_a_rejected_connection_is_closed_even_while_somebody_waits(
    rig: Rig, verdict: ReleaseReason
) -> None:
    lease, conn = rig.lend()
    rig.want()
    assert reason_of(rig.cache.checkin(lease, conn, rig.now, verdict)) is verdict
    assert lease.phase is Phase.CLOSING


def test_an_aged_connection_is_closed_at_checkin(rig: Rig) -> None:
    lease, conn = rig.lend(retire_at=rig.now + 1)
    assert reason_of(rig.cache.checkin(lease, conn, rig.now + 1, None)) is ReleaseReason.RETIRED


def test_what_keeps_nothing_closes_at_checkin_but_still_serves_a_waiting_waiter(rig: Rig) -> None:
    rig.cache.stop_keeping()
    lease, conn = rig.lend()
    waiter = rig.want()
    assert rig.cache.checkin(lease, conn, rig.now, None) is waiter
    other, conn = rig.lend()
    assert reason_of(rig.cache.checkin(other, conn, rig.now, None)) is ReleaseReason.CLOSED


def test_closed_gives_the_lease_back_once(rig: Rig) -> None:
    lease, _ = rig.lend()
    rig.sent()
    rig.cache.closed(lease, ReleaseReason.BROKEN, gone=False)
    rig.cache.closed(lease, ReleaseReason.CLOSED, gone=True)
    assert rig.sent() == [Release(lease.token, False, ReleaseReason.BROKEN, Backend(1))]
    assert not rig.cache.leases


# --- expiry


def test_the_idle_clock_starts_at_checkin_not_at_checkout(rig: Rig) -> None:
    lease, conn = rig.lend()
    rig.now += 1000
    rig.cache.checkin(lease, conn, rig.now, None)
    assert rig.cache.expire(rig.now + 59.9) == []
    assert rig.cache.expire(rig.now + 60) == [Closing(lease, ReleaseReason.EXPIRED)]


def test_expire_takes_the_longest_idle_and_leaves_the_rest(rig: Rig) -> None:
    older = rig.idle()
    rig.now += 30
    newer = rig.idle()
    assert [each.lease for each in rig.cache.expire(rig.now + 30)] == [older]
    assert list(rig.cache.idle) == [newer]


def test_expire_takes_an_aged_connection_from_the_middle(rig: Rig) -> None:
    first, aged, last = rig.idle(), rig.idle(retire_at=rig.now + 10), rig.idle()
    assert rig.cache.expire(rig.now + 5) == []
    assert rig.cache.expire(rig.now + 10) == [Closing(aged, ReleaseReason.RETIRED)]
    assert list(rig.cache.idle) == [first, last]


def test_drain_takes_out_everything_idle(rig: Rig) -> None:
    rig.idle()
    rig.idle()
    assert [each.reason for each in rig.cache.take_all_idle(rig.now)] == [ReleaseReason.CLOSED] * 2
    assert not rig.cache.idle
