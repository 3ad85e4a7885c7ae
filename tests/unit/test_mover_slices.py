"""Slices of time: for how long the fast path keeps a connection for the thread that has just had
it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import cast

import pytest

from sharedpool.descriptors.readable import readable
from sharedpool.descriptors.timer import Timer
from sharedpool.lane import lane as lanes
from sharedpool.worker.connection.handover import SUPPORTED
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.mover import Mover
from tests.unit.mover_driver import Rig

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and lanes.SUPPORTED), reason="connections cannot be handed over on this platform"
)


class Slicing(Rig):
    """A process that keeps a connection for its slice of time, as it asks again at once."""

    def __init__(self) -> None:
        super().__init__()
        self.timer = Timer()
        self.mover = Mover(self.local, self.wait_sockets, self.lane, self.timer)
        (
            self.local.membership.wait_sockets,
            self.local.membership.mover,
            self.local.hands_over,
        ) = (
            self.wait_sockets,
            self.mover,
            True,
        )
        self.local.cache.enter_lane(self.lane.board.moving_flag)

    def steady(self) -> PooledConnection:
        """Return a connection that was asked for as soon as the last one was gone, and has just
        come."""
        conn = self.take()
        assert conn is not None
        lease = self.lease(conn)
        lease.idle_s, lease.arrived_at = (
            0.0,
            time.monotonic() + 60.0,
        )  # however long the test is held up
        return conn

    def close(self) -> None:
        self.timer.close()
        super().close()


@pytest.fixture
def slicing() -> Iterator[Slicing]:
    rig = Slicing()
    yield rig
    rig.close()


def test_in_its_slice_it_is_kept_and_given_when_nobody_comes(slicing: Slicing) -> None:
    slicing.give()
    conn = slicing.steady()
    assert slicing.check_in(conn)
    assert len(slicing.local.cache.idle) == 1
    assert readable([slicing.timer], 5.0)
    slicing.timer.clear()
    slicing.local.give_kept()
    assert not slicing.local.cache.idle
    taken = slicing.other.take_from_shelf()
    assert taken is not None
    taken[1].close()


def test_a_thread_that_kept_one_in_vain_keeps_none_until_it_asks_at_once(slicing: Slicing) -> None:
    """Two processes that take turns: each asks again soon after it has given, and
    the other waits."""

    def keeps(idle_s: float) -> bool:
        slicing.give()
        conn = slicing.steady()
        slicing.lease(conn).idle_s = idle_s
        assert slicing.check_in(conn)
        kept = bool(slicing.local.cache.idle)
        if not kept:
            taken = slicing.other.take_from_shelf()
            assert taken is not None
            taken[1].close()
        return kept

    assert keeps(0.0005)
    (lease,) = slicing.local.cache.idle
    lease.since -= 60.0
    slicing.local.give_kept()
    taken = slicing.other.take_from_shelf()
    assert taken is not None
    taken[1].close()
    assert not keeps(0.0005)
    assert keeps(0.0)
    (lease,) = slicing.local.cache.idle
    lease.since = lease.arrived_at + 1.0  # it is asked for again
    conn = cast(PooledConnection, slicing.local.cache.idle.pop().conn)
    conn.sharedpool_lent = lease
    assert slicing.check_in(conn)
    assert keeps(0.0005)


def test_after_its_slice_it_is_given(slicing: Slicing) -> None:
    slicing.give()
    conn = slicing.steady()
    slicing.lease(conn).arrived_at -= 61.0
    assert slicing.check_in(conn)
    assert not slicing.local.cache.idle
    assert not slicing.timer.armed


@pytest.mark.parametrize(
    ("held_s", "used_s", "kept"),
    [(20.0, 20.0, True), (32.0, 12.0, True), (40.0, 1.0, False), (60.0, 60.0, False)],
)
def test_a_slice_has_room_for_three_uses_that_are_not_too_long(
    slicing: Slicing, held_s: float, used_s: float, kept: bool
) -> None:
    """A slice of ten seconds, so that the test may be held up."""
    slicing.mover._slice_s = 10.0
    slicing.give()
    conn = slicing.steady()
    lease = slicing.lease(conn)
    now = time.monotonic()
    lease.arrived_at, lease.since = now - held_s, now - used_s
    assert slicing.check_in(conn)
    assert bool(slicing.local.cache.idle) is kept


def test_while_one_is_kept_the_others_checkin_leaves_the_timer_set(slicing: Slicing) -> None:
    slicing.give()
    slicing.give(on_shelf=False)
    kept, given = slicing.steady(), slicing.steady()
    slicing.lease(given).arrived_at -= 61.0
    assert slicing.check_in(kept)
    assert slicing.check_in(given)
    assert len(slicing.local.cache.idle) == 1
    assert slicing.timer.armed


def test_a_connection_put_there_a_moment_ago_is_looked_at_again(slicing: Slicing) -> None:
    """The timer was set for another one, before."""
    slicing.give()
    conn = slicing.steady()
    assert slicing.check_in(conn)
    slicing.timer.clear()
    (lease,) = slicing.local.cache.idle
    lease.since = time.monotonic() + 1.0  # however long the test is held up
    slicing.local.give_kept()
    assert list(slicing.local.cache.idle) == [lease]
    assert slicing.timer.armed


def test_a_timer_that_fires_meanwhile_is_set_again(slicing: Slicing) -> None:
    slicing.give()
    conn = slicing.steady()

    class Idle(deque[Lease]):
        def append(self, lease: Lease) -> None:
            slicing.timer.clear()  # the link's thread, at this moment
            slicing.local.give_kept()
            super().append(lease)

    slicing.local.cache.idle = Idle()
    assert slicing.check_in(conn)
    assert slicing.timer.armed
