"""What a host remembers of the table of the shares, in case the table is emptied.

A restart or crash of the server, or a failover, empties it, and ends all connections. But grants
outlive that: a worker of another host may connect to the new server before its host has a row
again. So a host takes no more than it had before, until all hosts that it knew are back, or until
no worker would use such a grant any more. A host that was silent before may have lost its share to
others meanwhile: it takes nothing until then.

Brokers that have just started have no such memory. The table of the limits names the hosts to them
(`LimitRow.hosts`), and they wait for a few seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharedpool.broker.core.host_presence import CUT_S
from sharedpool.broker.core.share_terms import SyncResult


@dataclass(slots=True)
class TableMemory:
    """One share's; `SyncShare` tells it."""

    most: int = 0  # what the host's row has said at least
    missed: tuple[str, ...] = ()  # the other hosts
    unsure: bool = False  # of some sync since then the outcome is not known
    until: float = math.inf  # when the grants of before are over, if that has begun to count

    def silent(self) -> None:
        """Record that other hosts may have changed this one's row."""
        self.most = 0

    def missed_at(self, now: float) -> tuple[str, ...]:
        """Return the hosts that must be back before this one may take more than it had."""
        return self.missed if now < self.until else ()

    def ordered(self, least: int) -> None:
        """Record that a sync was ordered, by which the row may be lowered to `least`."""
        self.most, self.unsure = min(self.most, least), True

    def synced(self, result: SyncResult, now: float) -> None:
        """Record a sync's outcome: the table as it is now, unless hosts of before are missing."""
        if result.bounded:
            self.until = min(self.until, now + CUT_S)
            self.most = min(self.most, result.division.held)
        else:
            self.most, self.unsure, self.until = result.division.held, False, math.inf
            self.missed = tuple(host.instance for host in result.others)
