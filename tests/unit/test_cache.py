"""The worker's cache: what one process holds, and whom of its threads it serves."""

from __future__ import annotations

import pytest

from sharedpool.errors import SharedPoolError
from sharedpool.wire.messages import (
    Acquire,
    Confirm,
    Deny,
    DenyReason,
    FailoverSign,
    Grant,
    Recall,
    Release,
    ReleaseReason,
    Renew,
    ToBroker,
    Withdraw,
)
from sharedpool.wire.values import NO_TOKEN, Backend, Phase, Token
from sharedpool.worker.core.broker_messages import BrokerMessages
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.dropped_leases import dropped, unfinished
from sharedpool.worker.core.lease import (
    CLOSING_LIMIT_S,
    HANDING_OUT_LIMIT_S,
    Closing,
    Lease,
    Waiter,
)


class Conn:
    """A connection, as far as the cache looks."""


class Rig:
    """A cache, a clock that stands still unless moved, and the broker's side of the line."""

    def __init__(self, expiration_s: float = 60.0, *, slice_s: float = 0.0) -> None:
        self.cache = Cache(expiration_s, slice_s=slice_s)
        self.messages = BrokerMessages(self.cache)
        self.now = 100.0
        self.messages.welcomed(1, 1, self.now)
        self.serial = 0
        self.news = 0
        self.kept: list[object] = []

    def want(self, wait_s: float = 5.0) -> Waiter:
        waiter = Waiter(lambda: None, self.now)
        self.cache.waiters.enqueue(waiter, wait_s)
        return waiter

    def grant(
        self, request: int, *, returns_due: int = 0, serial: int | None = None
    ) -> Waiter | None:
        self.serial += 1
        self.news += 1
        return self.messages.granted(
            Grant(request, Token(1, serial or self.serial), self.news, returns_due), self.now
        )

    def recall(
        self, take: int = 0, returns_due: int = 0, *, expired: bool = False, answer: bool = True
    ) -> list[Closing]:
        self.news += 1
        return self.messages.recalled(
            Recall(self.news, take, returns_due, expired, answer), self.now, {}
        )

    def lend(self, retire_at: float = float("inf")) -> tuple[Lease, Conn]:
        """Check out a new connection."""
        waiter = self.want()
        assert self.grant(waiter.request) is waiter
        lease, conn = waiter.lease, Conn()
        assert lease is not None
        self.cache.opened(lease, Backend(lease.token.serial), retire_at, conn, self.now)
        self.kept += [waiter, conn]
        return lease, conn

    def idle(self, retire_at: float = float("inf")) -> Lease:
        lease, conn = self.lend(retire_at)
        assert self.cache.checkin(lease, conn, self.now, None) is None
        self.now += 1
        return lease

    def sent(self) -> list[ToBroker]:
        out = list(self.cache.outbox)
        self.cache.outbox.clear()
        return out


@pytest.fixture
def rig() -> Rig:
    return Rig()


class Interrupt(BaseException):
    """What a signal handler raises."""


def interrupt(*_: object) -> None:
    raise Interrupt


def reason_of(outcome: Closing | Waiter | None) -> ReleaseReason:
    assert isinstance(outcome, Closing)
    return outcome.reason


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


# --- recalls and returns due


def test_a_recall_takes_the_longest_idle_and_answers_with_the_rest(rig: Rig) -> None:
    oldest, middle, newest = rig.idle(), rig.idle(), rig.idle()
    rig.sent()
    assert [each.lease for each in rig.recall(take=2)] == [oldest, middle]
    (answer,) = rig.sent()
    assert isinstance(answer, Renew)
    assert answer.answers == rig.news
    assert [lease.phase for lease in answer.leases] == [Phase.CLOSING, Phase.CLOSING, Phase.IDLE]
    assert list(rig.cache.idle) == [newest]


def test_a_recall_of_more_than_there_is_takes_what_there_is(rig: Rig) -> None:
    rig.idle()
    rig.lend()
    assert len(rig.recall(take=5)) == 1


def test_a_recall_of_the_expired_closes_only_those(rig: Rig) -> None:
    older = rig.idle()
    rig.now += 59
    rig.idle()
    assert rig.recall(expired=True) == [Closing(older, ReleaseReason.EXPIRED)]


def test_a_recall_that_wants_no_answer_gets_none(rig: Rig) -> None:
    rig.lend()
    rig.sent()
    assert rig.recall(answer=False) == []
    assert rig.sent() == []


def test_a_double_or_late_recall_is_ignored(rig: Rig) -> None:
    rig.idle()
    rig.recall(returns_due=2)
    rig.sent()
    for serial in (rig.news, rig.news - 1):
        assert rig.messages.recalled(Recall(serial, 1, 0), rig.now, {}) == []
    assert rig.cache.returns_due == 2
    assert rig.sent() == []


def test_returns_due_checkins_are_given_back_and_the_next_one_is_cached(rig: Rig) -> None:
    leases = [rig.lend() for _ in range(3)]
    rig.recall(returns_due=2)
    outcomes = [rig.cache.checkin(lease, conn, rig.now, None) for lease, conn in leases]
    assert [reason_of(each) for each in outcomes[:2]] == [ReleaseReason.RETURN_DUE] * 2
    assert outcomes[2] is None
    assert rig.cache.returns_due == 0


def test_returns_due_is_absolute_a_newer_word_replaces_it(rig: Rig) -> None:
    rig.lend()
    rig.recall(returns_due=3)
    rig.recall(returns_due=1)
    assert rig.cache.returns_due == 1
    rig.recall(returns_due=0, answer=False)
    assert rig.cache.returns_due == 0


def test_returns_that_are_due_go_before_the_local_queue(rig: Rig) -> None:
    lease, conn = rig.lend()
    rig.want()
    rig.recall(returns_due=1)
    assert reason_of(rig.cache.checkin(lease, conn, rig.now, None)) is ReleaseReason.RETURN_DUE


def test_a_broken_checkin_does_not_count_as_returns_due(rig: Rig) -> None:
    lease, conn = rig.lend()
    rig.recall(returns_due=1)
    rig.cache.checkin(lease, conn, rig.now, ReleaseReason.BROKEN)
    assert rig.cache.returns_due == 1


def test_an_idle_connection_is_owned_up_to_when_a_grant_says_that_others_wait(rig: Rig) -> None:
    """The grant of a waiter served meanwhile: nothing else would tell the broker before the next
    heartbeat."""
    idle = rig.idle()
    rig.sent()
    assert rig.grant(99, returns_due=1) is None
    renew, release = rig.sent()
    assert isinstance(renew, Renew)
    assert [(lease.token, lease.phase) for lease in renew.leases] == [(idle.token, Phase.IDLE)]
    assert isinstance(release, Release)


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
    assert [c.lease for c in rig.cache.renew_generation(2, rig.now)] == [idle]
    assert rig.cache.renew_generation(2, rig.now) == []
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


def test_a_release_is_repeated_until_it_is_acknowledged(rig: Rig) -> None:
    lease, _ = rig.lend()
    rig.cache.closed(lease, ReleaseReason.CLOSED, gone=True)
    unseen, _ = rig.lend()
    rig.cache.closed(unseen, ReleaseReason.CLOSED, gone=False)
    assert rig.cache.reporter.renewal(rig.now, {}).gone == [lease.token]
    rig.cache.reporter.acknowledged([lease.token])
    assert rig.cache.reporter.renewal(rig.now, {}).gone == []


def test_trouble_of_an_older_generation_is_old_news(rig: Rig) -> None:
    lease, _ = rig.lend()
    rig.sent()
    rig.cache.report_failover_sign(lease, "25006")
    assert rig.sent() == [FailoverSign(1, "25006")]
    rig.cache.renew_generation(2, rig.now)
    rig.cache.report_failover_sign(lease, "25006")
    assert rig.sent() == []


def test_a_refusal_ends_the_wait_once(rig: Rig) -> None:
    waiter = rig.want(0)
    deny = Deny(waiter.request, DenyReason.EXHAUSTED, 5)
    assert rig.cache.waiters.denied(deny) is waiter
    assert waiter.denial == deny
    assert rig.cache.waiters.denied(deny) is None


# --- giving up, in every phase


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


# --- words to the broker


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
