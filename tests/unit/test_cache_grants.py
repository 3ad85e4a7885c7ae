"""What the broker grants to a worker, and whom of its threads that serves."""

from __future__ import annotations

from sharedpool.wire.messages import (
    Acquire,
    Deny,
    DenyReason,
    FailoverSign,
    Grant,
    Release,
    ReleaseReason,
    Withdraw,
)
from sharedpool.wire.values import Token
from tests.unit.cache_driver import Rig, reason_of, rig

__all__ = ["rig"]  # pytest finds it here


# --- grants


def test_a_grant_goes_to_the_waiter_that_asked(rig: Rig) -> None:
    first, second = rig.want(), rig.want()
    assert rig.grant(second.request) is second
    assert list(rig.cache.waiting.values()) == [first]


def test_a_late_grant_serves_the_next_waiter_which_withdraws_its_request(rig: Rig) -> None:
    gone, waiting = rig.want(), rig.want()
    rig.cache.give_up(gone, rig.now)
    rig.sent()
    assert rig.grant(gone.request) is waiting
    assert rig.sent() == [Withdraw(waiting.request)]


def test_a_late_grant_that_nobody_wants_is_given_back_unused(rig: Rig) -> None:
    waiter = rig.want()
    rig.cache.give_up(waiter, rig.now)
    rig.sent()
    assert rig.grant(waiter.request) is None
    assert rig.sent() == [Release(Token(1, 1), True, ReleaseReason.UNUSED)]
    assert not rig.cache.leases


def test_a_double_grant_is_ignored_also_after_the_lease_was_given_back(rig: Rig) -> None:
    lease, _ = rig.lend()
    other = rig.want()
    assert rig.grant(other.request, serial=1) is None
    rig.cache.closed(lease, ReleaseReason.BROKEN, gone=True)
    assert rig.grant(other.request, serial=1) is None
    assert not rig.cache.leases


def test_a_grant_overtaken_by_a_newer_one_is_not_used(rig: Rig) -> None:
    """The broker has learnt from `seen` that it did not arrive, and may have freed it."""
    first, second = rig.want(), rig.want()
    assert rig.grant(second.request, serial=2) is second
    assert rig.grant(first.request, serial=1) is None
    assert rig.cache.reporter.renewal(rig.now, {}).newest_grant == Token(1, 2)


def test_a_grant_of_a_new_epoch_counts_from_the_start(rig: Rig) -> None:
    rig.lend()
    rig.lend()
    rig.messages.welcomed(2, 1, rig.now)
    waiter = rig.want()
    assert rig.messages.granted(Grant(waiter.request, Token(2, 1), 99), rig.now) is waiter


def test_a_former_brokers_grant_is_not_taken_in(rig: Rig) -> None:
    """The new one has heard from our HELLO what is held: that grant was not among it."""
    waiter = rig.want()
    rig.messages.welcomed(2, 1, rig.now)
    assert rig.messages.granted(Grant(waiter.request, Token(1, 7), 99), rig.now) is None
    assert not rig.cache.leases
    assert rig.messages.granted(Grant(waiter.request, Token(2, 1), 1), rig.now) is waiter


def test_a_lease_granted_along_with_a_welcome_is_as_old_as_the_hello(rig: Rig) -> None:
    """This process may have been frozen in between: its slot may be another's by now."""
    rig.cache.set_terms(60.0, 10.0, hands_over=False)
    waiter = rig.want()
    for _ in range(2):  # the first may be what is answered
        *_, first = rig.messages.register(rig.now, {})
        assert first is not None
        rig.now += 6
    rig.messages.welcomed(2, 1, rig.now, waiter.request)
    assert rig.messages.granted(Grant(waiter.request, Token(2, 1), 1), rig.now) is None
    assert not rig.cache.leases


def test_a_newer_generation_takes_out_what_is_idle_at_once_and_the_rest_at_its_checkin(
    rig: Rig,
) -> None:
    idle = rig.idle()
    busy, conn = rig.lend()
    assert [c.lease for c in rig.messages.renew_generation(2, rig.now)] == [idle]
    assert rig.messages.renew_generation(2, rig.now) == []
    assert reason_of(rig.cache.checkin(busy, conn, rig.now, None)) is ReleaseReason.STALE
    fresh, conn = rig.lend()
    assert rig.cache.checkin(fresh, conn, rig.now, None) is None


def test_a_lease_whose_backend_has_ended_is_dropped_unless_it_is_being_closed(rig: Rig) -> None:
    idle, (busy, conn) = rig.idle(), rig.lend()
    assert rig.cache.ended(idle.token) is idle
    assert not rig.cache.idle
    assert rig.cache.ended(busy.token) is busy
    assert reason_of(rig.cache.checkin(busy, conn, rig.now, None)) is ReleaseReason.BROKEN
    closing, conn = rig.lend()
    rig.cache.close(closing, conn, ReleaseReason.CLOSED, rig.now)
    assert rig.cache.ended(closing.token) is None


def test_trouble_of_an_older_generation_is_old_news(rig: Rig) -> None:
    lease, _ = rig.lend()
    rig.sent()
    rig.cache.report_failover_sign(lease, "25006")
    assert rig.sent() == [FailoverSign(1, "25006")]
    rig.messages.renew_generation(2, rig.now)
    rig.cache.report_failover_sign(lease, "25006")
    assert rig.sent() == []


def test_a_refusal_ends_the_wait_once(rig: Rig) -> None:
    waiter = rig.want(0)
    deny = Deny(waiter.request, DenyReason.EXHAUSTED, 5)
    assert rig.cache.waiters.denied(deny) is waiter
    assert waiter.denial == deny
    assert rig.cache.waiters.denied(deny) is None


# --- grants that are old


def test_a_grant_is_as_old_as_its_request_less_the_time_it_had_waited(rig: Rig) -> None:
    """Clocks of two hosts are never compared."""
    rig.cache.set_terms(60.0, 15.0, hands_over=False)
    asked_at = rig.now
    waiter = rig.want(600.0)
    rig.now += 100  # of which it was in the broker's queue for 90 s; then the grant was on its way
    rig.messages.granted(Grant(waiter.request, Token(1, 1), 1, waited_ms=90_000), rig.now)
    assert waiter.lease is not None
    assert waiter.lease.connect_by == asked_at + 90 + 15


def test_a_grant_that_came_at_once_counts_from_now(rig: Rig) -> None:
    rig.cache.set_terms(60.0, 15.0, hands_over=False)
    waiter = rig.want()
    rig.messages.granted(
        Grant(waiter.request, Token(1, 1), 1, waited_ms=3_000), rig.now
    )  # its clock runs faster
    assert waiter.lease is not None
    assert waiter.lease.connect_by == rig.now + 15


def test_a_grant_for_a_request_that_was_given_up_keeps_its_age(rig: Rig) -> None:
    rig.cache.set_terms(60.0, 15.0, hands_over=False)
    gone, waits = rig.want(), rig.want()
    asked_at = rig.now
    rig.cache.give_up(gone, rig.now)
    rig.now += 10
    rig.messages.granted(Grant(gone.request, Token(1, 1), 1, waited_ms=4_000), rig.now)
    assert waits.lease is not None
    assert waits.lease.connect_by == asked_at + 4 + 15


def test_a_grant_that_is_too_old_is_given_back_and_asked_for_again(rig: Rig) -> None:
    rig.cache.set_terms(60.0, 15.0, hands_over=False)
    waiter = rig.want(600.0)
    rig.now += 100
    assert (
        rig.messages.granted(Grant(waiter.request, Token(1, 1), 1, waited_ms=1_000), rig.now)
        is None
    )
    assert not waiter.is_done
    assert not rig.cache.leases
    *_, released, asked = rig.cache.outbox
    assert (released, asked) == (
        Release(Token(1, 1), True, ReleaseReason.UNUSED),
        Acquire(waiter.request, 500_000),
    )
    rig.now += 1
    rig.messages.granted(Grant(waiter.request, Token(1, 2), 2, waited_ms=500), rig.now)
    assert waiter.lease is not None


def test_another_brokers_grants_count_from_its_welcome(rig: Rig) -> None:
    """What waited in a former broker's queue says nothing of how long this one's grant was on its
    way."""
    rig.cache.set_terms(60.0, 15.0, hands_over=False)
    waiter = rig.want(600.0)
    rig.now += 60
    rig.messages.welcomed(2, 1, rig.now)
    rig.now += 2
    rig.messages.granted(Grant(waiter.request, Token(2, 1), 1, waited_ms=1_000), rig.now)
    assert waiter.lease is not None
    assert waiter.lease.connect_by == rig.now - 1 + 15
