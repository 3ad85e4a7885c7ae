"""Statistics of one process's part of a pool."""

from __future__ import annotations

from msgspec import Struct

from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.local_pool import LocalPool


class PoolStats(Struct, frozen=True):
    """A snapshot of one pool in this process.

    Counters count from when the process (or its fork) made the pool.
    """

    name: str
    max_conn: int  # over all processes; everything else is of this process
    idle: int
    in_use: int
    waiting: int
    hits: int  # checkouts served from the cache
    handed_on: int  # checkouts served by another thread's checkin
    adopted: int  # open connections that came from another process
    connects: int  # connections that were opened
    released: int  # leases that were given back
    recalled: int  # of these: because others waited
    given: int  # of these: with their open connection
    expired: int  # of the released: by idle time or age
    discarded: int
    errors: int


def stats_of(local: LocalPool) -> PoolStats:
    """Return a snapshot. Takes the lock for a moment."""
    cache, released = local.cache, local.released
    with local.lock:
        return PoolStats(
            name=local.config.name,
            max_conn=local.limit,
            idle=len(cache.idle),
            in_use=sum(
                lease.phase in (Phase.IN_USE, Phase.CONNECTING) for lease in cache.leases.values()
            ),
            waiting=len(cache.waiting),
            hits=local.hits + cache.hits,
            handed_on=local.handed_on,
            adopted=local.adopted,
            connects=local.connects,
            released=sum(released.values()),
            recalled=released[ReleaseReason.TAKEN] + released[ReleaseReason.RETURN_DUE],
            given=local.given,
            expired=released[ReleaseReason.EXPIRED] + released[ReleaseReason.RETIRED],
            discarded=local.discarded,
            errors=local.errors,
        )
