"""Leases that nobody can bring back, and leases that were taken away."""

from __future__ import annotations

import pytest

from sharedpool.errors import SharedPoolError
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Backend, Phase
from sharedpool.worker.core.dropped_leases import dropped
from sharedpool.worker.core.lease import HANDING_OUT_LIMIT_S, Lease
from tests.unit.cache_driver import Conn, Interrupt, Rig, interrupt, reason_of, rig

__all__ = ["rig"]  # pytest finds it here


# --- what nobody can bring back


def dropped_at_the_second_look(rig: Rig) -> list[Lease]:
    assert dropped(rig.cache.leases.values(), set(rig.cache.idle), rig.now) == []
    return dropped(rig.cache.leases.values(), set(rig.cache.idle), rig.now + 1)


def test_dropped_finds_a_lease_whose_thread_vanished_before_it_connected(rig: Rig) -> None:
    waiter = rig.want()
    rig.grant(waiter.request)
    lease = waiter.lease
    assert dropped_at_the_second_look(rig) == []
    del waiter
    assert dropped_at_the_second_look(rig) == [lease]


def test_dropped_finds_a_connection_that_was_collected(rig: Rig) -> None:
    lease, conn = rig.lend()
    assert dropped_at_the_second_look(rig) == []
    rig.kept.clear()
    del conn
    assert dropped_at_the_second_look(rig) == [lease]


def test_dropped_forgives_what_was_brought_back_between_two_looks(rig: Rig) -> None:
    lease, conn = rig.lend()
    rig.kept.clear()
    del conn
    assert dropped(rig.cache.leases.values(), set(rig.cache.idle), rig.now) == []
    rig.cache.checkin(lease, Conn(), rig.now + 1, None)
    assert dropped(rig.cache.leases.values(), set(rig.cache.idle), rig.now + 1) == []
    assert dropped(rig.cache.leases.values(), set(rig.cache.idle), rig.now + 2) == []


def test_dropped_finds_a_lease_whose_hand_out_was_interrupted(rig: Rig) -> None:
    lease = rig.idle()
    rig.cache.idle.clear()  # popped, and then a signal handler raised
    assert dropped(rig.cache.leases.values(), set(rig.cache.idle), rig.now) == []
    rig.now += HANDING_OUT_LIMIT_S + 1
    assert dropped_at_the_second_look(rig) == [lease]
    assert rig.cache.forget(lease.token) is lease


@pytest.mark.parametrize("laid", [False, True])
def test_dropped_finds_soon_what_an_interrupted_checkin_has_dropped(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, laid: bool
) -> None:
    """The connection is nobody's then but the interrupted thread's, which drops it."""
    lease, conn = rig.lend()
    if laid:  # the fast path
        rig.cache.checkin(lease, conn, rig.now, None)
    with monkeypatch.context() as patch:
        patch.setattr(rig.cache, "_holds", interrupt)
        with pytest.raises(Interrupt):
            rig.cache.reconsider_idle(lease, rig.now) if laid else rig.cache.checkin(
                lease, conn, rig.now, None
            )
    rig.kept.clear()
    del conn
    assert dropped_at_the_second_look(rig) == [lease]


def test_dropped_finds_what_was_passed_while_its_thread_was_interrupted(rig: Rig) -> None:
    """Nobody was told of the connection: it has no waiter yet."""
    rig.idle()
    lease = rig.cache.take(rig.now)
    assert lease is not None
    lease.phase = Phase.CONNECTING
    assert lease.conn is not None
    assert dropped_at_the_second_look(rig) == [lease]


def test_a_cached_lease_that_is_connected_again_is_not_lost(rig: Rig) -> None:
    """Its first waiter is long gone: the thread that replaces the connection has it from `take`."""
    rig.idle()
    rig.kept.clear()
    lease = rig.cache.take(rig.now)
    assert lease is not None
    lease.conn, lease.phase = None, Phase.CONNECTING
    assert dropped_at_the_second_look(rig) == []


# --- leases taken away


def test_a_forgotten_idle_lease_is_not_handed_out(rig: Rig) -> None:
    lease = rig.idle()
    assert rig.cache.forget(lease.token) is lease
    assert rig.cache.take(rig.now) is None
    assert rig.cache.forget(lease.token) is None


def test_a_forgotten_lease_is_closed_at_checkin_and_not_released(rig: Rig) -> None:
    lease, conn = rig.lend()
    rig.want()
    rig.cache.forget(lease.token)
    rig.sent()
    assert reason_of(rig.cache.checkin(lease, conn, rig.now, None)) is ReleaseReason.BROKEN
    rig.cache.closed(lease, ReleaseReason.BROKEN, gone=True)
    assert rig.sent() == []


def test_a_lease_forgotten_while_it_was_connected_cannot_be_opened(rig: Rig) -> None:
    waiter = rig.want()
    rig.grant(waiter.request)
    lease = waiter.lease
    assert lease is not None
    rig.cache.forget(lease.token)
    with pytest.raises(SharedPoolError, match="lease 1-1"):
        rig.cache.opened(lease, Backend(1), float("inf"), Conn(), rig.now)
