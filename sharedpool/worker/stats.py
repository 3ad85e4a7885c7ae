"""What one process's part of a pool has done so far."""

from __future__ import annotations

from dataclasses import dataclass

from sharedpool.wire.messages import Phase, ReleaseReason
from sharedpool.worker.local_pool import Holdings


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A snapshot of one pool in this process; counters count since the process (or its fork) made the pool.

    `max_conn` is over all processes, all else is of this one. `hits` are checkouts served from the cache, `handed_on`
    those served by another thread's checkin, `connects` those that opened a connection. `adopted` connections came from
    another process, open. `released` leases were given back; of these `recalled` because others waited (`given` with
    their connection), `expired` by idle time or age.
    """

    name: str
    max_conn: int
    idle: int
    in_use: int
    waiting: int
    hits: int
    handed_on: int
    adopted: int
    connects: int
    released: int
    recalled: int
    given: int
    expired: int
    discarded: int
    errors: int


def stats_of(holdings: Holdings) -> PoolStats:
    """Return a snapshot. Takes the lock for a moment."""
    cache, released = holdings.cache, holdings.released
    with holdings.lock:
        return PoolStats(
            name=holdings.config.name,
            max_conn=holdings.limit,
            idle=len(cache.idle),
            in_use=sum(lease.phase in (Phase.IN_USE, Phase.CONNECTING) for lease in cache.leases.values()),
            waiting=len(cache.waiting),
            hits=holdings.hits + cache.hits,
            handed_on=holdings.handed_on,
            adopted=holdings.adopted,
            connects=holdings.connects,
            released=sum(released.values()),
            recalled=released[ReleaseReason.TAKEN] + released[ReleaseReason.OWED],
            given=holdings.given,
            expired=released[ReleaseReason.EXPIRED] + released[ReleaseReason.RETIRED],
            discarded=holdings.discarded,
            errors=holdings.errors,
        )
