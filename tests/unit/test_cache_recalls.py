"""What the broker wants back of a worker's cache: recalls, and returns that are due."""

from __future__ import annotations

from sharedpool.wire.messages import Recall, Release, ReleaseReason, Renew
from sharedpool.wire.values import Phase
from sharedpool.worker.core.lease import Closing
from tests.unit.cache_driver import Rig, reason_of, rig

__all__ = ["rig"]  # pytest finds it here


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
