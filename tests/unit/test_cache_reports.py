"""A worker's words to the broker: what it holds, asks for and has released."""

from __future__ import annotations

from sharedpool.wire.messages import (
    Acquire,
    Deny,
    DenyReason,
    Recall,
    Release,
    ReleaseReason,
    Renew,
)
from sharedpool.wire.values import NO_TOKEN, Backend, Phase, Token
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.dropped_leases import unfinished
from sharedpool.worker.core.lease import CLOSING_LIMIT_S, Waiter
from tests.unit.cache_driver import Rig, rig

__all__ = ["rig"]  # pytest finds it here


def test_a_renewal_lists_everything_held_and_asked_for(rig: Rig) -> None:
    idle = rig.idle()
    used, _ = rig.lend()
    used.thread = 7
    waiter = rig.want()
    rig.now += 2
    renew = rig.cache.reporter.renewal(rig.now, {7: "Thread-7"})
    assert [
        (report.token, report.phase, report.age_ms, report.thread) for report in renew.leases
    ] == [
        (idle.token, Phase.IDLE, 3000, ""),
        (used.token, Phase.IN_USE, 2000, "Thread-7"),
    ]
    assert (renew.newest_grant, renew.answers, renew.pending) == (Token(1, 2), 0, [waiter.request])


def test_the_first_registration_of_all_has_nothing_to_clear_up() -> None:
    cache = Cache(60.0)
    messages = BrokerMessages(cache)
    waiter = Waiter(lambda: None, 1.0)
    cache.waiters.enqueue(waiter, 2.5)
    assert messages.register(1.0, {}) == ([], NO_TOKEN, Acquire(waiter.request, 2500))
    assert list(cache.outbox) == [Acquire(waiter.request, 2500)]
    messages.register(2.0, {})  # the first was lost, or heard
    assert [type(each) for each in cache.outbox] == [Acquire, Renew]


def test_registering_again_replaces_what_was_not_sent_and_asks_again(rig: Rig) -> None:
    lease, _ = rig.lend()
    waiter = rig.want(2.5)
    gone = rig.want()
    rig.cache.give_up(gone, rig.now)
    rig.recall(returns_due=1)
    leases, seen, _ = rig.messages.register(rig.now, {})
    assert [report.token for report in leases] == [lease.token]
    assert (seen, rig.cache.returns_due) == (Token(1, 1), 0)
    assert rig.sent() == [Acquire(waiter.request, 2500), Renew(leases, seen, 0, [waiter.request])]


def test_registering_again_keeps_unsent_releases_and_says_that_they_close(rig: Rig) -> None:
    """A HELLO without them would free the slot of a backend that was not seen to end."""
    lease, _ = rig.lend()
    rig.cache.closed(lease, ReleaseReason.BROKEN, gone=False)
    leases, *_ = rig.messages.register(rig.now, {})
    assert [(report.token, report.phase, report.backend) for report in leases] == [
        (lease.token, Phase.CLOSING, Backend(1))
    ]
    release = Release(lease.token, False, ReleaseReason.BROKEN, Backend(1))
    assert rig.sent() == [release, Renew([], Token(1, 1), unproven=[release])]


def test_recalls_of_a_new_broker_start_over(rig: Rig) -> None:
    rig.lend()
    rig.recall(returns_due=1)
    rig.messages.register(rig.now, {})
    rig.messages.recalled(Recall(1, 0, 1), rig.now, {})
    assert rig.cache.returns_due == 1


def test_a_request_sent_twice_may_be_answered_twice(rig: Rig) -> None:
    """The link has registered again meanwhile; nobody would read a free wait socket."""
    slow = rig.want(9.0)
    rig.messages.register(rig.now, {})
    quick = rig.want(9.0)
    for waiter in (slow, quick):
        assert not waiter.broker_is_done
        assert rig.cache.waiters.denied(Deny(waiter.request, DenyReason.CROWDED, 1)) is waiter
    assert quick.broker_is_done
    assert not slow.broker_is_done


def test_a_connection_that_is_being_given_is_its_threads_alone(rig: Rig) -> None:
    """A broker without a journal would count it twice, and end it where it is in use by then."""
    lease, conn = rig.lend()
    rig.cache.close(lease, conn, ReleaseReason.RETURN_DUE, rig.now)
    rig.cache.giving(lease)
    rig.now += 10 * CLOSING_LIMIT_S
    assert unfinished(rig.cache.leases.values(), rig.now) == []
    assert [report.token for report in rig.cache.reporter.renewal(rig.now, {}).leases] == [
        lease.token
    ]
    leases, *_ = rig.messages.register(rig.now, {})
    assert leases == []
    rig.cache.given(lease)
    assert rig.cache.leases == {}


def test_a_release_is_repeated_until_it_is_acknowledged(rig: Rig) -> None:
    lease, _ = rig.lend()
    rig.cache.closed(lease, ReleaseReason.CLOSED, gone=True)
    unseen, _ = rig.lend()
    rig.cache.closed(unseen, ReleaseReason.CLOSED, gone=False)
    assert rig.cache.reporter.renewal(rig.now, {}).gone == [lease.token]
    rig.cache.reporter.acknowledged([lease.token])
    assert rig.cache.reporter.renewal(rig.now, {}).gone == []


def test_a_release_with_its_backend_unseen_is_repeated_until_the_broker_knows(
    rig: Rig,
) -> None:
    """Of a connection that had been passed nothing else would tell: its RELEASE may be lost with a
    line."""
    lease, _ = rig.lend()
    rig.cache.closed(lease, ReleaseReason.BROKEN, gone=False)
    release = Release(lease.token, False, ReleaseReason.BROKEN, lease.backend)
    for _ in range(2):
        assert rig.cache.reporter.renewal(rig.now, {}).unproven == [release]
    rig.cache.reporter.acknowledged([lease.token])
    assert rig.cache.reporter.renewal(rig.now, {}).unproven == []
