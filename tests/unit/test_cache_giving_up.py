"""Threads that stop waiting, in every phase."""

from __future__ import annotations

import pytest

from sharedpool.wire.messages import Release, ReleaseReason, Renew, Withdraw
from sharedpool.wire.values import Backend, Phase, Token
from sharedpool.worker.core.lease import Waiter
from tests.unit.cache_driver import Conn, Interrupt, Rig, interrupt, rig

__all__ = ["rig"]  # pytest finds it here


def test_giving_up_while_waiting_cancels(rig: Rig) -> None:
    waiter = rig.want()
    rig.sent()
    assert rig.cache.give_up(waiter, rig.now) is None
    assert rig.sent() == [Withdraw(waiter.request)]
    assert not rig.cache.waiting


def test_giving_up_before_anything_was_asked_does_nothing(rig: Rig) -> None:
    assert rig.cache.give_up(Waiter(lambda: None, rig.now), rig.now) is None
    assert rig.sent() == []


def test_giving_up_while_asking_was_interrupted_leaves_nothing_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiter = Waiter(lambda: None, rig.now)
    with monkeypatch.context() as patch:
        patch.setattr("sharedpool.worker.core.waiters.Acquire", interrupt)
        with pytest.raises(Interrupt):
            rig.cache.waiters.enqueue(waiter, 5.0)
    assert rig.cache.give_up(waiter, rig.now) is None
    assert not rig.cache.waiting


def test_giving_up_a_granted_lease_passes_it_on(rig: Rig) -> None:
    first, second = rig.want(), rig.want()
    rig.grant(first.request)
    lease = first.lease
    assert rig.cache.give_up(first, rig.now) is second
    assert second.lease is lease
    assert first.lease is None


def test_giving_up_a_granted_lease_with_nobody_waiting_gives_it_back(rig: Rig) -> None:
    waiter = rig.want()
    rig.grant(waiter.request)
    rig.sent()
    assert rig.cache.give_up(waiter, rig.now) is None
    assert rig.sent() == [Release(Token(1, 1), True, ReleaseReason.UNUSED)]


def test_giving_up_a_handed_on_connection_caches_it(rig: Rig) -> None:
    lease, conn = rig.lend()
    waiter = rig.want()
    rig.cache.checkin(lease, conn, rig.now, None)
    rig.sent()
    assert rig.cache.give_up(waiter, rig.now) is None
    assert list(rig.cache.idle) == [lease]
    assert lease.conn is conn
    assert rig.sent() == []


def test_giving_up_a_handed_on_connection_while_others_wait_tells_the_broker_at_once(
    rig: Rig,
) -> None:
    lease, conn = rig.lend()
    waiter = rig.want()
    rig.cache.checkin(lease, conn, rig.now, None)
    rig.recall(returns_due=1)
    rig.sent()
    rig.cache.give_up(waiter, rig.now)
    (renew,) = rig.sent()
    assert isinstance(renew, Renew)
    assert [report.phase for report in renew.leases] == [Phase.IDLE]


def test_giving_up_after_the_connection_is_open_changes_nothing(rig: Rig) -> None:
    waiter = rig.want()
    rig.grant(waiter.request)
    lease = waiter.lease
    assert lease is not None
    rig.cache.opened(lease, Backend(1), float("inf"), Conn(), rig.now)
    rig.sent()
    assert rig.cache.give_up(waiter, rig.now) is None
    assert rig.sent() == []
    assert lease.phase is Phase.IN_USE


def test_giving_up_twice_does_nothing_the_second_time(rig: Rig) -> None:
    waiter = rig.want()
    rig.grant(waiter.request)
    rig.cache.give_up(waiter, rig.now)
    rig.sent()
    assert rig.cache.give_up(waiter, rig.now) is None
    assert rig.sent() == []


def test_fail_ends_every_wait_with_the_error(rig: Rig) -> None:
    waiters = [rig.want(), rig.want()]
    error = RuntimeError("no broker")
    assert rig.cache.waiters.fail(error) == waiters
    assert [waiter.error for waiter in waiters] == [error, error]
    assert not rig.cache.waiting
