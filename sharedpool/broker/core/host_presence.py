"""Which other hosts are gone, and which are silent: judged by the server's own list of sessions.

A host's share is free for others only when nothing of the host is left on the server: its broker's
session is gone, no backend has its broker's tag, and every connect that was under way has come to
its end. How long that must have been so depends on how the host went:

1. Its sessions have ended by themselves: its processes are gone, or closed them. A connect that was
   under way then shows itself within `GONE_S`.
2. The host was silent while it had sessions: its network is cut, or it is frozen. Other brokers end
   its sessions once somebody needs the slots, and mark its row as `cut`. A connect of that time may
   still arrive, until no worker would use it any more (`CUT_S`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sharedpool.broker.core.shares import TRUST_S
from sharedpool.wire.messages import START_UP_LIMIT_S

GONE_S = 1.0
# A worker connects within the TTL of its grant, and gives up after `START_UP_LIMIT_S`.
CUT_S = TRUST_S + 15.0 + START_UP_LIMIT_S
# Later than the host itself has stopped to open connections.
SILENT_S = TRUST_S + 2.0

# The application_name of a session that shares limits, up to the broker's instance.
SESSION_NAME = "sharedpool shares "


class Listed(NamedTuple):
    """A row of the table of the shares."""

    instance: str
    host: str
    pid: int  # of its broker's session
    started_us: int
    held: int
    wanted: int
    answered: int
    cut: bool
    silent_s: float  # since its last sync, by the server's clock


class Judgement(NamedTuple):
    """What is known of the other hosts of one limit."""

    gone: frozenset[str]
    silent: frozenset[str]  # they have sessions, and do not speak
    connected: frozenset[str]
    events: tuple[str, ...]  # for the log


@dataclass(slots=True)
class Absence:
    """A host of which nothing is on the server."""

    since: float
    # Backends in start-up that may be its own: those of the first look at which every connect of
    # the host must have reached the server, as far as they have not finished since.
    starting: frozenset[int] | None = None


class Presence:
    """What this broker has seen of the other hosts' sessions."""

    def __init__(self) -> None:
        self._brokers: set[tuple[int, int]] = set()
        self._backends: dict[str, list[tuple[int, int]]] = {}  # by instance, brokers' included
        self._starting: frozenset[int] = frozenset()
        self._seen_at = float("-inf")
        self._absent: dict[tuple[str, str, int, int], Absence] = {}

    def seen(
        self, starting: frozenset[int], sessions: Iterable[tuple[int, int, str]], now: float
    ) -> None:
        """Record the server's list: backends in start-up, and sessions (pid, start, name)."""
        self._brokers.clear()
        self._backends.clear()
        for pid, start_us, name in sessions:
            if name.endswith("]"):  # a worker's, whatever its pool is called
                instance = name.rpartition(" [")[2].removesuffix("]")
            elif name.startswith(SESSION_NAME):
                self._brokers.add((pid, start_us))
                instance = name.removeprefix(SESSION_NAME)
            else:
                continue  # a control connection
            self._backends.setdefault(instance, []).append((pid, start_us))
        for key in [key for key in self._absent if key[1] in self._backends]:
            del self._absent[key]
        self._starting, self._seen_at = starting, now

    def sessions_of(self, instances: Iterable[str]) -> list[tuple[int, int]]:
        """Return the sessions of these brokers and their workers, as (pid, start)."""
        return [each for name in instances for each in self._backends.get(name, ())]

    def judge(self, scope: str, rows: Sequence[Listed], now: float) -> Judgement:
        """Say which hosts of a limit are gone or silent, by what was seen last."""
        if self._seen_at == float("-inf"):
            return Judgement(frozenset(), frozenset(), frozenset(), ())
        gone, silent, connected, events = set(), set(), set(), []
        for row in rows:
            if (row.pid, row.started_us) in self._brokers:
                connected.add(row.instance)
            if self._backends.get(row.instance):
                if row.silent_s > SILENT_S:
                    silent.add(row.instance)
            elif why := self._why_gone(scope, row):
                gone.add(row.instance)
                self._absent.pop(_key(scope, row), None)
                events.append(
                    f"host {row.host} ({row.instance}) is gone, its {row.held} slots are free: {why}"
                )
        return Judgement(frozenset(gone), frozenset(silent), frozenset(connected), tuple(events))

    def _why_gone(self, scope: str, row: Listed) -> str:
        """Return why a host without any session is gone; empty if that is not certain yet."""
        now = self._seen_at
        absence = self._absent.setdefault(_key(scope, row), Absence(now))
        quiet_s = now - absence.since
        if row.silent_s >= CUT_S:
            return f"no session on the server, and not heard of for {row.silent_s:.0f} s"
        if quiet_s < (CUT_S if row.cut else GONE_S):
            return ""
        starting = self._starting if absence.starting is None else absence.starting
        absence.starting = starting & self._starting
        return "" if absence.starting else f"no session on the server for {quiet_s:.1f} s"


def _key(scope: str, row: Listed) -> tuple[str, str, int, int]:
    return (scope, row.instance, row.pid, row.started_us)
