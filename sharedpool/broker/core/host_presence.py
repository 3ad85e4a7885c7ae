"""What other hosts may still have in use: judged by the server's own list of sessions.

A host that is gone keeps its share until the server shows that nothing of it is left: its broker's
session is gone, no backend has its broker's tag, and every connect that was under way has come to
its end. How long that must have been so depends on how the host went:

1. Its sessions have ended by themselves: its processes are gone, or closed them. A connect that was
   under way then shows itself within `GONE_S`.
2. Its broker's session has ended, but backends of its workers are left. Its broker will be back
   soon, or is dead while the workers live: then what they do not use is free after `orphaned_s`. If
   the workers have moved to a new broker on their host, which counts their backends, it is free at
   once.
3. The host was silent while it had sessions: its network is cut, or it is frozen. Other brokers
   end its sessions once somebody needs the slots, and mark its row as `cut`. Each backend that has
   ended frees its slot. What was not in use then (`spare`) may have been granted to a worker just
   before: a connect of that time may still arrive, until no worker would use it any more (`cut_s`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sharedpool.broker.core.shares import TRUST_S
from sharedpool.wire.application_name import pool_of_tag, shown
from sharedpool.wire.messages import START_UP_LIMIT_S

GONE_S = 1.0
_STARTS_S = 0.2  # a backend in start-up is looked at again after that
# A worker connects within the TTL of its grant, and gives up after `START_UP_LIMIT_S`.
USUAL_TTL_S = 15.0
CUT_S = TRUST_S + USUAL_TTL_S + START_UP_LIMIT_S
# Later than the host itself has stopped to open connections.
SILENT_S = TRUST_S + 2.0

# The application_name of a session that shares limits, up to the broker's instance.
SESSION_NAME = "sharedpool-shares "


Session = tuple[int, int]  # pid, and start time in microseconds since 1970


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
    spare: int = 0  # of a host that was cut off: what it did not have in use then
    unnamed: str = ""  # its backends without its tag: their users have set a name of their own
    ttl_s: float = USUAL_TTL_S  # within which its workers begin a connect

    @property
    def orphaned_s(self) -> float:
        """How long a connect may take that was granted by a broker that has ended."""
        return self.ttl_s + START_UP_LIMIT_S

    @property
    def cut_s(self) -> float:
        """How long a connect may take that a silent broker has granted."""
        return TRUST_S + self.orphaned_s


class Judgement(NamedTuple):
    """What is known of the other hosts of one limit."""

    gone: frozenset[str]
    lowered: Mapping[str, int]  # hosts that can have no more than that in use any more
    silent: frozenset[str]  # they have not synced for too long, and may have sessions
    connected: frozenset[str]
    events: tuple[str, ...]  # for the log
    again_s: float = math.inf  # after which another look may show that a host is gone


@dataclass(slots=True)
class Absence:
    """A host whose broker has no session on the server."""

    since: float
    # Backends in start-up that may be its own: those of the first look at which every connect of
    # the host must have reached the server, as far as they have not finished since.
    starting: frozenset[int] | None = None


class Presence:
    """What this broker has seen of the other hosts' sessions."""

    def __init__(self) -> None:
        self._brokers: dict[str, set[Session]] = {}  # by instance
        # Of workers' backends: the pool by the tag, and the database, if that is known.
        self._pools: dict[Session, tuple[str, str | None]] = {}
        self._backends: dict[str, set[Session]] = {}
        self._all: frozenset[Session] = frozenset()
        self._starting: frozenset[int] = frozenset()
        self._seen_at = -math.inf
        self._absent: dict[tuple[str, str, int, int], Absence] = {}
        self._cut: dict[
            tuple[str, str, int, int], float
        ] = {}  # the last look before that was known
        self._again_s = math.inf  # see `Judgement`

    def seen(
        self,
        starting: frozenset[int],
        sessions: Iterable[tuple[int, int, str]],
        now: float,
        databases: Mapping[Session, str] | None = None,
    ) -> None:
        """Record the server's list: backends in start-up, and sessions (pid, start, name).

        `databases`: which one each session uses, as far as that is known.
        """
        self._pools.clear()
        self._brokers.clear()
        self._backends.clear()
        everything = set()
        for pid, start_us, name in sessions:
            everything.add((pid, start_us))
            if name.startswith("sharedpool ") and name.endswith("]"):  # a worker's
                instance = name.rpartition(" [")[2].removesuffix("]")
                self._backends.setdefault(instance, set()).add((pid, start_us))
                database = (databases or {}).get((pid, start_us))
                self._pools[(pid, start_us)] = pool_of_tag(name), database
            elif name.startswith(SESSION_NAME):
                instance = name.removeprefix(SESSION_NAME)
                self._brokers.setdefault(instance, set()).add((pid, start_us))
        for key in [key for key in self._absent if key[1] in self._brokers]:
            del self._absent[key]
        self._all, self._starting, self._seen_at = frozenset(everything), starting, now

    def strangers(
        self, pool: str, database: str, known: Iterable[str], mine: frozenset[Session]
    ) -> int:
        """Return how many backends a pool has of brokers that have no row (not `known`).

        The table was emptied by a restart of the server, and their brokers have not come back to
        it; or these do not share the limit.
        """
        rows = set(known)
        return sum(
            self._is_of(session, shown(pool, instance), database) and session not in mine
            for instance, sessions in self._backends.items()
            if instance not in rows
            for session in sessions
        )

    def _is_of(self, session: Session, pool: str, database: str) -> bool:
        known, used = self._pools.get(session, ("", None))
        return known == pool and used in (None, database)

    def unnamed(self, instance: str, backends: Iterable[Session]) -> str:
        """Return those of a broker's backends that do not have its tag, for its row."""
        if self._seen_at == -math.inf:
            return ""
        others = (set(backends) & self._all) - self._backends.get(instance, set())
        return " ".join(f"{pid}:{start_us}" for pid, start_us in sorted(others))

    def backends_of(self, row: Listed) -> set[Session]:
        """Return the backends of a host's workers."""
        return self._backends.get(row.instance, set()) | (_parsed(row.unnamed) & self._all)

    def sessions_of(self, row: Listed) -> set[Session]:
        """Return all sessions of a host."""
        return self._brokers.get(row.instance, set()) | self.backends_of(row)

    def judge(
        self, scope: str, rows: Sequence[Listed], mine: frozenset[Session] = frozenset()
    ) -> Judgement:
        """Say what the hosts of a limit may have in use, by what was seen last.

        `mine` are the backends that this broker counts itself.
        """
        gone, silent, connected, events = set(), set(), set(), []
        lowered: dict[str, int] = {}
        self._again_s = math.inf
        self._forget_others(scope, rows)
        for row in [] if self._seen_at == -math.inf else rows:
            if (row.pid, row.started_us) in self._brokers.get(row.instance, ()):
                connected.add(row.instance)
            if row.silent_s > SILENT_S:
                silent.add(row.instance)
            most, why = self._most(scope, row, mine)
            if why and most == 0 and not (self.sessions_of(row) - mine):
                gone.add(row.instance)
                self._absent.pop(_key(scope, row), None)
                who = f"host {row.host!a} ({row.instance!a})"
                events.append(f"{who} is gone, its {row.held} slots are free: {why}")
            elif most < row.held:
                lowered[row.instance] = most
        return Judgement(
            frozenset(gone),
            lowered,
            frozenset(silent),
            frozenset(connected),
            tuple(events),
            self._again_s,
        )

    def _forget_others(self, scope: str, rows: Sequence[Listed]) -> None:
        """Forget what was seen of hosts that have left a limit."""
        for seen in (self._absent, self._cut):
            if seen:
                known = {_key(scope, row) for row in rows}
                for key in [key for key in seen if key[0] == scope and key not in known]:
                    del seen[key]

    def _most(self, scope: str, row: Listed, mine: frozenset[Session]) -> tuple[int, str]:
        """Return how many slots a host may have in use, and why it is not all of its share."""
        is_here = row.instance in self._brokers
        if not row.cut:
            if self._cut:
                self._cut.pop(_key(scope, row), None)
            if is_here:
                return row.held, ""
        backends = self.backends_of(row)
        left = len(backends - mine)
        if row.silent_s >= row.cut_s and not is_here:
            return left, f"no session on the server, and not heard of for {row.silent_s:.0f} s"
        if row.cut and self._seen_at > self._cut.setdefault(_key(scope, row), self._seen_at):
            return row.spare + left, "its sessions were ended"
        if row.cut:
            return row.held, ""  # some of its backends may be newer than the list
        absence = self._absent.setdefault(_key(scope, row), Absence(self._seen_at))
        quiet_s = self._seen_at - absence.since
        needed_s = row.orphaned_s if backends and not backends & mine else GONE_S
        if quiet_s < needed_s:
            self._again_s = min(self._again_s, needed_s - quiet_s)
            return row.held, ""
        starting = self._starting if absence.starting is None else absence.starting
        absence.starting = starting & self._starting
        if absence.starting:
            self._again_s = min(self._again_s, _STARTS_S)
            return row.held, ""
        return left, f"its broker had no session on the server for {quiet_s:.1f} s"


def _parsed(unnamed: str) -> set[Session]:
    """Return the sessions in a row's text; anything else in it is passed over."""
    pairs = (each.partition(":")[::2] for each in unnamed.split())
    return {(int(pid), int(start)) for pid, start in pairs if pid.isdecimal() and start.isdecimal()}


def _key(scope: str, row: Listed) -> tuple[str, str, int, int]:
    return (scope, row.instance, row.pid, row.started_us)
