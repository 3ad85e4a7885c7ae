"""Which hosts are gone: on the server's word only, and never while something of them may come."""

from __future__ import annotations

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

NOTHING: list[tuple[int, int, str]] = []
BROKER = (10, 1, SESSION_NAME + "x")
WORKER = (20, 1, "sharedpool p [x]")


def row(
    *, instance: str = "x", started_us: int = 1, cut: bool = False, silent_s: float = 0.0
) -> Listed:
    return Listed(instance, "host", 10, started_us, 4, 4, 0, cut, silent_s)


class Observer:
    """A broker that looks at the server, and judges one limit."""

    def __init__(self) -> None:
        self.presence = Presence()

    def look(
        self, now: float, *sessions: tuple[int, int, str], starting: tuple[int, ...] = ()
    ) -> None:
        self.presence.seen(frozenset(starting), sessions, now)

    def judge(self, now: float, *rows: Listed, scope: str = "p") -> Judgement:
        return self.presence.judge(scope, rows or (row(),), now)

    def is_gone(self, now: float, *rows: Listed, scope: str = "p") -> bool:
        return bool(self.judge(now, *rows, scope=scope).gone)


@pytest.fixture
def observer() -> Observer:
    return Observer()


def test_nothing_is_judged_before_the_first_look(observer: Observer) -> None:
    assert observer.judge(1000.0, row(silent_s=1e6)) == Judgement(
        frozenset(), frozenset(), frozenset(), ()
    )


def test_a_host_with_its_brokers_session_is_connected(observer: Observer) -> None:
    observer.look(0.0, BROKER)
    judgement = observer.judge(0.0)
    assert judgement.connected == {"x"}
    assert not judgement.gone
    assert not judgement.silent


def test_a_host_with_only_a_backend_stays_for_as_long_as_that_lives(observer: Observer) -> None:
    for now in (0.0, 10.0, 1000.0):
        observer.look(now, WORKER)
        assert not observer.judge(now).connected
        assert not observer.is_gone(now)


def test_a_host_without_any_session_is_gone_after_a_moment(observer: Observer) -> None:
    observer.look(0.0)
    assert not observer.is_gone(0.0)
    observer.look(GONE_S - 0.1)
    assert not observer.is_gone(GONE_S - 0.1)
    observer.look(GONE_S)
    judgement = observer.judge(GONE_S)
    assert judgement.gone == {"x"}
    assert "host (x) is gone, its 4 slots are free" in judgement.events[0]


def test_time_counts_only_as_far_as_the_server_was_looked_at(observer: Observer) -> None:
    observer.look(0.0)
    assert not observer.is_gone(0.0)
    assert not observer.is_gone(100.0), "nobody has looked since"


def test_a_control_connection_is_no_sign_of_the_host(observer: Observer) -> None:
    for now in (0.0, GONE_S):
        observer.look(now, (11, 1, "sharedpool broker x"))
    assert not observer.judge(GONE_S).connected


def test_a_session_of_another_start_is_not_the_rows(observer: Observer) -> None:
    """Its pid was given to another one; the host's own backends count all the same."""
    observer.look(0.0, (10, 2, SESSION_NAME + "y"))
    assert not observer.judge(0.0).connected
    observer.look(GONE_S, (10, 2, SESSION_NAME + "y"))
    assert observer.is_gone(GONE_S)


def test_the_next_session_of_a_host_begins_anew(observer: Observer) -> None:
    observer.look(0.0)
    observer.is_gone(0.0)
    observer.look(GONE_S)
    assert not observer.is_gone(GONE_S, row(started_us=7))


def test_what_is_seen_between_two_judgements_counts(observer: Observer) -> None:
    """One look serves all limits of a database."""
    observer.look(0.0)
    observer.is_gone(0.0)
    observer.look(0.5, WORKER)
    observer.is_gone(0.5, scope="another limit")
    observer.look(GONE_S)
    assert not observer.is_gone(GONE_S)
    observer.look(2 * GONE_S)
    assert observer.is_gone(2 * GONE_S)


@pytest.mark.parametrize("name", ["broker p", "shares p"])
def test_a_pools_backends_are_its_hosts_whatever_it_is_called(
    observer: Observer, name: str
) -> None:
    for now in (0.0, GONE_S, 2 * GONE_S):
        observer.look(now, (20, 1, tag_of(name, "x")))
        assert not observer.is_gone(now)


# --- connects that are under way


def test_a_connect_in_start_up_may_be_the_hosts(observer: Observer) -> None:
    for now in (0.0, GONE_S, 5 * GONE_S):
        observer.look(now, starting=(30,))
        assert not observer.is_gone(now)
    observer.look(6 * GONE_S)
    assert observer.is_gone(6 * GONE_S)


def test_so_may_one_that_has_begun_since(observer: Observer) -> None:
    """It was in the kernel's queue when the host's sessions ended, or on its way to the server."""
    observer.look(0.0)
    assert not observer.is_gone(0.0)
    for now in (GONE_S, 2 * GONE_S):
        observer.look(now, starting=(30,))
        assert not observer.is_gone(now)
    observer.look(3 * GONE_S, WORKER)
    assert not observer.is_gone(3 * GONE_S), "there it is"


def test_one_that_begins_later_is_another_hosts(observer: Observer) -> None:
    """On a busy server there is always some backend in start-up."""
    observer.look(0.0, starting=(30,))
    observer.is_gone(0.0)
    observer.look(GONE_S, starting=(31,))
    assert not observer.is_gone(GONE_S)
    observer.look(GONE_S + 0.4, starting=(32,))
    assert observer.is_gone(GONE_S + 0.4)


# --- silence


def test_a_silent_host_is_one_with_sessions_that_does_not_speak(observer: Observer) -> None:
    observer.look(0.0, BROKER, WORKER)
    assert not observer.judge(0.0, row(silent_s=SILENT_S)).silent
    judgement = observer.judge(0.0, row(silent_s=SILENT_S + 0.1))
    assert judgement.silent == {"x"}
    assert not judgement.gone
    assert set(observer.presence.sessions_of(["x"])) == {(10, 1), (20, 1)}


def test_a_host_stops_opening_before_others_call_it_silent() -> None:
    assert SILENT_S > TRUST_S


def test_the_share_of_a_host_that_was_cut_waits_for_connects_that_may_still_arrive(
    observer: Observer,
) -> None:
    observer.look(0.0)
    observer.is_gone(0.0, row(cut=True))
    observer.look(CUT_S - 1.0)
    assert not observer.is_gone(CUT_S - 1.0, row(cut=True, silent_s=SILENT_S))
    observer.look(CUT_S)
    assert observer.is_gone(CUT_S, row(cut=True, silent_s=SILENT_S))


def test_a_host_of_which_nothing_is_left_for_that_long_is_gone_at_the_first_look(
    observer: Observer,
) -> None:
    observer.look(0.0)
    assert observer.is_gone(0.0, row(cut=True, silent_s=CUT_S))
    assert CUT_S >= TRUST_S + 15.0 + START_UP_LIMIT_S


def test_hosts_are_judged_one_by_one(observer: Observer) -> None:
    rows = (row(), row(instance="y"))
    for now in (0.0, GONE_S):
        observer.look(now, (21, 1, "sharedpool p [y]"))
        judgement = observer.judge(now, *rows)
    assert judgement.gone == {"x"}
