"""What other hosts may have in use: on the server's word, and never less than may still come."""

from __future__ import annotations

import math

import pytest

from sharedpool.broker.core.host_presence import (
    CUT_S,
    GONE_S,
    SESSION_NAME,
    SILENT_S,
    Judgement,
    Listed,
    Presence,
)
from sharedpool.broker.core.shares import TRUST_S
from sharedpool.wire.application_name import tag_of
from sharedpool.wire.messages import START_UP_LIMIT_S

BROKER = (10, 1, SESSION_NAME + "x")
WORKERS = ((20, 1, tag_of("p", "x")), (21, 1, tag_of("p", "x")))
Sessions = tuple[int, int, str]


def row(
    *,
    instance: str = "x",
    held: int = 4,
    started_us: int = 1,
    cut: bool = False,
    silent_s: float = 0.0,
    spare: int = 0,
    unnamed: str = "",
) -> Listed:
    return Listed(
        instance, "host", 10, started_us, held, 4, 0, cut, silent_s, spare=spare, unnamed=unnamed
    )


class Observer:
    """A broker that looks at the server, and judges limits by what it sees."""

    def __init__(self) -> None:
        self.presence = Presence()

    def look(self, now: float, *sessions: Sessions, starting: tuple[int, ...] = ()) -> None:
        self.presence.seen(frozenset(starting), sessions, now)

    def judge(
        self, *rows: Listed, scope: str = "p", mine: tuple[tuple[int, int], ...] = ()
    ) -> Judgement:
        return self.presence.judge(scope, rows or (row(),), frozenset(mine))

    def most(self, one: Listed | None = None, **options: object) -> int:
        """Return how many slots a host keeps; -1 if it is gone."""
        one = one or row()
        judgement = self.judge(one, **options)  # type: ignore[arg-type]
        return -1 if judgement.gone else judgement.lowered.get(one.instance, one.held)


@pytest.fixture
def observer() -> Observer:
    return Observer()


# --- hosts that speak


def test_nothing_is_judged_before_the_first_look(observer: Observer) -> None:
    nothing = Judgement(frozenset(), {}, frozenset(), frozenset(), ())
    assert observer.judge(row(silent_s=1e6)) == nothing


def test_a_host_with_its_brokers_session_keeps_its_share(observer: Observer) -> None:
    observer.look(0.0, BROKER)
    judgement = observer.judge()
    assert judgement.connected == {"x"}
    assert observer.most() == 4
    assert not judgement.silent


def test_a_host_that_has_come_since_the_last_look_is_not_gone(observer: Observer) -> None:
    """It holds nothing yet, and the list does not show it."""
    observer.look(0.0)
    assert observer.most(row(held=0)) == 0


def test_a_control_connection_is_no_sign_of_the_host(observer: Observer) -> None:
    for now in (0.0, GONE_S):
        observer.look(now, (11, 1, "sharedpool broker x"))
        judgement = observer.judge()
        assert not judgement.connected
    assert judgement.gone == {"x"}


# --- hosts that have gone


def test_a_host_without_any_session_is_gone_after_a_moment(observer: Observer) -> None:
    for now, most in ((0.0, 4), (GONE_S - 0.1, 4), (GONE_S, -1)):
        observer.look(now)
        assert observer.most() == most
    assert "host 'host' ('x') is gone, its 4 slots are free" in _event_at(observer, 2 * GONE_S)


def test_it_is_told_when_another_look_may_show_that_a_host_is_gone(observer: Observer) -> None:
    for now, again_s in ((0.0, GONE_S), (0.25, GONE_S - 0.25)):
        observer.look(now)
        assert observer.judge().again_s == again_s
    observer.look(GONE_S, starting=(7,))
    assert 0 < observer.judge().again_s < GONE_S
    observer.look(GONE_S + 0.5)
    judgement = observer.judge()
    assert judgement.gone == {"x"}
    assert judgement.again_s == math.inf


def _event_at(observer: Observer, now: float) -> str:
    for when in (now, now + GONE_S):
        observer.look(when)
        events = observer.judge().events
    return events[0]


def test_time_counts_only_as_far_as_the_server_was_looked_at(observer: Observer) -> None:
    observer.look(0.0)
    for _ in range(3):
        assert observer.most() == 4


def test_a_list_that_was_forgotten_proves_nothing(observer: Observer) -> None:
    observer.look(0.0)
    observer.most()
    observer.presence = Presence()
    assert observer.most(row(silent_s=1e6)) == 4
    observer.look(GONE_S)
    assert observer.most() == 4


def test_a_session_of_another_start_is_not_the_rows(observer: Observer) -> None:
    """Its pid was given to another one."""
    for now in (0.0, GONE_S):
        observer.look(now, (10, 2, SESSION_NAME + "y"))
        judgement = observer.judge()
        assert not judgement.connected
    assert judgement.gone == {"x"}


def test_the_next_session_of_a_host_begins_anew(observer: Observer) -> None:
    observer.look(0.0)
    observer.most()
    observer.look(GONE_S)
    assert observer.most(row(started_us=7)) == 4


def test_what_is_seen_between_two_judgements_counts(observer: Observer) -> None:
    """One look serves all limits of a database."""
    observer.look(0.0)
    observer.most()
    observer.look(0.5, BROKER)
    observer.most(scope="another limit")
    observer.look(GONE_S)
    assert observer.most() == 4
    observer.look(2 * GONE_S)
    assert observer.most() == -1


def test_hosts_are_judged_one_by_one(observer: Observer) -> None:
    for now in (0.0, GONE_S):
        observer.look(now, (11, 1, SESSION_NAME + "y"))
        judgement = observer.judge(row(), row(instance="y"))
    assert judgement.gone == {"x"}
    assert not judgement.lowered


# --- brokers that have gone, and workers that live


@pytest.mark.parametrize("name", ["p", "broker p", "shares p"])
def test_what_a_dead_brokers_workers_do_not_use_is_free_when_no_grant_lasts(
    observer: Observer, name: str
) -> None:
    worker = (20, 1, tag_of(name, "x"))
    for now, most in (
        (0.0, 4),
        (row().orphaned_s - 1.0, 4),
        (row().orphaned_s, 1),
        (10 * row().orphaned_s, 1),
    ):
        observer.look(now, worker)
        assert observer.most() == most
    assert row().orphaned_s >= TRUST_S + START_UP_LIMIT_S


def test_it_is_free_at_once_if_this_broker_counts_them(observer: Observer) -> None:
    for now in (0.0, GONE_S):
        observer.look(now, *WORKERS)
        most = observer.most(mine=((20, 1),))
    assert most == 1
    observer.look(2 * GONE_S, *WORKERS)
    assert observer.most(mine=((20, 1), (21, 1))) == -1


def test_backends_that_have_another_name_count_by_the_row(observer: Observer) -> None:
    for now in (0.0, row().orphaned_s):
        observer.look(now, (30, 5, "psql"))
        most = observer.most(row(unnamed="30:5 31:5 nonsense 7"))
    assert most == 1


def test_a_broker_tells_which_of_its_backends_have_another_name(observer: Observer) -> None:
    observer.look(0.0, *WORKERS, (30, 5, "psql"))
    backends = [(20, 1), (30, 5), (40, 1)]  # the last one has ended
    assert observer.presence.unnamed("x", backends) == "30:5"


# --- connects that are under way


def test_a_connect_in_start_up_may_be_the_hosts(observer: Observer) -> None:
    for now in (0.0, GONE_S, 5 * GONE_S):
        observer.look(now, starting=(30,))
        assert observer.most() == 4
    observer.look(6 * GONE_S)
    assert observer.most() == -1


def test_so_may_one_that_has_begun_since(observer: Observer) -> None:
    """It was in the kernel's queue when the host's sessions ended, or on its way to the server."""
    observer.look(0.0)
    observer.most()
    for now in (GONE_S, 2 * GONE_S):
        observer.look(now, starting=(30,))
        assert observer.most() == 4
    observer.look(3 * GONE_S, WORKERS[0])
    assert observer.most() == 4, "there it is"


def test_one_that_begins_later_is_another_hosts(observer: Observer) -> None:
    """On a busy server there is always some backend in start-up."""
    observer.look(0.0, starting=(30,))
    observer.most()
    observer.look(GONE_S, starting=(31,))
    assert observer.most() == 4
    observer.look(GONE_S + 0.4, starting=(32,))
    assert observer.most() == -1


# --- silence


def test_a_host_is_silent_later_than_it_has_stopped_to_open(observer: Observer) -> None:
    observer.look(0.0, BROKER, *WORKERS)
    assert not observer.judge(row(silent_s=SILENT_S)).silent
    assert observer.judge(row(silent_s=SILENT_S + 0.1)).silent == {"x"}
    assert observer.most(row(silent_s=SILENT_S + 0.1)) == 4
    assert SILENT_S > TRUST_S


def test_all_its_sessions_are_ended(observer: Observer) -> None:
    observer.look(0.0, BROKER, *WORKERS, (30, 5, "psql"), (31, 5, "psql"))
    sessions = observer.presence.sessions_of(row(unnamed="30:5"))
    assert sessions == {(10, 1), (20, 1), (21, 1), (30, 5)}


def test_a_host_that_was_cut_keeps_what_may_still_arrive(observer: Observer) -> None:
    cut = row(cut=True, spare=1, silent_s=SILENT_S)
    for now, sessions, most in ((0.0, WORKERS, 4), (0.4, WORKERS, 3), (0.8, WORKERS[:1], 2)):
        observer.look(now, *sessions)
        assert observer.most(cut) == most
    observer.look(1.2)
    assert observer.most(cut) == 1
    assert observer.most(cut._replace(silent_s=CUT_S)) == -1
    assert CUT_S >= TRUST_S + 15.0 + START_UP_LIMIT_S


def test_its_backends_may_be_newer_than_a_list_from_before_it_was_cut(observer: Observer) -> None:
    """Who ended the sessions had a newer list, in which they were in use, and not spare."""
    observer.look(0.0, BROKER)
    assert observer.most(row(cut=True, silent_s=SILENT_S)) == 4
    observer.look(0.4, *WORKERS)
    assert observer.most(row(cut=True, silent_s=SILENT_S)) == 2


def test_a_host_that_speaks_again_and_is_cut_again_begins_anew(observer: Observer) -> None:
    observer.look(0.0, BROKER)
    observer.most(row(cut=True))
    observer.most(row())
    observer.look(0.4, BROKER)
    assert observer.most(row(cut=True)) == 4


def test_backends_of_brokers_without_a_row_are_counted(observer: Observer) -> None:
    """The server was restarted: they were opened under grants of before."""
    other = (30, 1, tag_of("p", "y"))
    observer.look(0.0, *WORKERS, other, (31, 1, tag_of("another pool", "y")))
    count = observer.presence.strangers
    assert count("p", "db", [], frozenset()) == 3
    assert count("p", "db", ["x"], frozenset()) == 1
    assert count("p", "db", ["x"], frozenset({(30, 1)})) == 0  # it has come to this broker
    assert count("another pool", "db", ["x"], frozenset()) == 1
    observer.presence.seen(frozenset(), [other], 1.0, {(30, 1): "db"})
    assert count("p", "db", [], frozenset()) == 1
    assert count("p", "another", [], frozenset()) == 0


def test_a_host_with_a_longer_ttl_is_waited_for_as_much_longer(observer: Observer) -> None:
    slow = row(cut=True, silent_s=CUT_S + 1, spare=2)._replace(ttl_s=60.0)
    for now in (0.0, 1.0):
        observer.look(now)
        most = observer.most(slow)
    assert most == 2  # a worker may still connect under a grant of then
    assert observer.most(slow._replace(silent_s=CUT_S + 46)) == -1
