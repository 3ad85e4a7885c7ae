"""What the core and `broker/postgres` tell each other of shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from sharedpool.broker.core.shares import Division, HostShare


class ShareKey(NamedTuple):
    """A limit that hosts share: the database that has the table of its shares, and its name."""

    database: str  # empty: that of the broker's connection string
    scope: str


class LimitRow(NamedTuple):
    """What the table of the limits says of one limit."""

    max_conn: int
    asked: int = 0  # the newest question of any host
    paused: bool = False
    hosts: tuple[str, ...] = ()  # instances that have shares; those of before, if they were lost
    lost_s: float | None = None  # since it was seen that the table of the shares had been emptied


class HostRow(NamedTuple):
    """What the table of the shares says of another host."""

    host: str
    instance: str
    held: int
    wanted: int
    silent_s: float  # since its last sync, by the server's clock
    connected: bool  # its broker has a session
    pid: int = 0  # of its broker's session


class Wakeup(NamedTuple):
    """What another broker tells with a sync that concerns this one."""

    asked: int  # the newest question of any host
    host: HostShare  # its own row
    pid: int  # of the session that has sent it, by the server

    def is_of(self, row: HostRow) -> bool:
        """Return True if the broker of a row has sent this: anybody may send anything."""
        return row.pid == self.pid and row.instance == self.host.instance


@dataclass(frozen=True, slots=True)
class ShareChange:
    """What an operator orders for all hosts."""

    max_conn: int = 0  # the new limit; 0: as it is
    paused: bool | None = None  # None: as it is


NO_CHANGE = ShareChange()


class SyncResult(NamedTuple):
    """The outcome of a sync."""

    max_conn: int  # the limit of all hosts together
    paused: bool  # by an operator, on all hosts
    division: Division
    others: tuple[HostRow, ...]
    events: tuple[str, ...] = ()  # what is worth a line in the log, such as a host that is gone
    bounded: bool = False  # the order's `most` was applied
    missing: tuple[str, ...] = ()  # hosts whose shares were lost, and that are waited for
    again_s: float = math.inf  # after which another sync may find that a host is gone


class Failed(Enum):
    """How a sync has failed."""

    LOST = "lost"  # the session has ended, or its query has failed: try again
    UNREACHABLE = "unreachable"  # no server answers: nobody on this host can connect
    REFUSED = "refused"  # the server refuses the broker's session, and perhaps only that
    UNSHARED = "unshared"  # this server or role does not allow a limit to be shared


class SyncFailure(NamedTuple):
    """A sync that has failed."""

    how: Failed
    why: str
