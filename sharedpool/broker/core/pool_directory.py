"""Find the pool that a session, a journal or a backend's tag means; make it if there is none.

Sessions name their pools. A backend that nobody has claimed shows only its `application_name`, in
which the pool's name may be shortened: its pool is *unnamed* until a session says the name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from msgspec import structs

from sharedpool.broker.core.backoff import Backoff
from sharedpool.broker.core.connect_refusals import Refusals
from sharedpool.broker.core.context import Context
from sharedpool.broker.core.records import Pool
from sharedpool.broker.core.sharing import Sharing
from sharedpool.wire.application_name import shown
from sharedpool.wire.values import PoolSpec


class PoolDirectory:
    """The pools of one broker, by their names.

    `instance` is part of the tags. `by_database`: pools of one name in two databases are two pools.
    """

    def __init__(
        self,
        context: Context,
        instance: str,
        random: Callable[[], float],
        sharing: Sharing,
        *,
        by_database: bool,
    ) -> None:
        self._slots = context.slots
        self._instance = instance
        self._random = random
        self._sharing = sharing
        self._by_database = by_database

    def get(self, spec: PoolSpec) -> Pool:
        """Return the pool that a session or a journal describes; make it if there is none."""
        slots = self._slots
        if not self._by_database:
            spec = structs.replace(spec, database="")
        pool = slots.find(spec) or self._find_unnamed(spec)
        if pool is not None and not pool.unnamed:
            return pool
        if pool is None:
            refusals = Refusals(self._random)
            pool = Pool(spec, spec.max_conn, Backoff(self._random), refusals)
            self._enter(pool)
            if (former := slots.former_pools.pop(pool.name, None)) is not None:
                pool.counters = former.counters
        else:
            self._rename(pool, spec)
        pool.max_conn = slots.limit(pool.name, spec)
        slots.assign(pool)
        if slots.paused_pools:
            slots.shrink(pool)
        self._sharing.opened(pool)
        return pool

    def _find_unnamed(self, spec: PoolSpec) -> Pool | None:
        """Return the pool that was known by its backends' tags alone, if this is its name."""
        pool = self._slots.find(structs.replace(spec, name=shown(spec.name, self._instance)))
        return pool if pool is not None and pool.unnamed else None

    def find_tagged(self, alias: str, database: str) -> Pool | None:
        """Return the pool of that name, or whose tags show that name."""
        if not self._by_database:
            database = ""
        for pool in self._slots.pools.values():
            names = (pool.spec.name, shown(pool.spec.name, self._instance))
            if pool.spec.database == database and alias in names:
                return pool
        return None

    def _enter(self, pool: Pool) -> None:
        """Enter a new pool, by a name that no other pool has."""
        pools = self._slots.pools
        pool.known_as = next(name for name in _names(pool.spec) if name not in pools)
        pools[pool.name] = pool

    def _rename(self, pool: Pool, spec: PoolSpec) -> None:
        """Give an unnamed pool the name that its first session says."""
        del self._slots.pools[pool.name]
        shrinks = self._slots.shrinking.pop(pool.name, None) is not None
        pool.spec, pool.unnamed = spec, False
        self._enter(pool)
        if shrinks:
            self._slots.shrinking[pool.name] = pool


def _names(spec: PoolSpec) -> Iterator[str]:
    """Yield the names that a pool may have, best first: its own, then with its database's."""
    yield spec.name
    yield f"{spec.name}/{spec.database}"
    # Another pool may really be called that.
    yield from (f"{spec.name}/{spec.database}/{number}" for number in itertools.count(2))
