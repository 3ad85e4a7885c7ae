"""What one process's part of a pool has done so far."""

from __future__ import annotations

from dataclasses import dataclass

from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.local_pool import LocalPool


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
