"""Checkouts with a key: the same key gives the same connection until it is returned."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

from psycopg2 import extensions

from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.waiting import ANSWER_LIMIT_S


def lent(local: LocalPool, key: Hashable) -> PooledConnection | None:
    """Return the connection that is checked out with a key."""
    local.reclaim(ANSWER_LIMIT_S)  # else a connection that its user has dropped might be found
    with local.lock:
        return _find(local, key)


def record(local: LocalPool, key: Hashable, conn: extensions.connection) -> PooledConnection | None:
    """Record the key of a checkout; if another thread was first, return its connection instead."""
    lease: Lease = cast(Any, conn).sharedpool_lease
    with local.lock:
        other = _find(local, key)
        if other is None:
            local.keys[key] = lease
            lease.key, lease.fast_checkin = key, False
        return other


def _find(local: LocalPool, key: Hashable) -> PooledConnection | None:
    """Return the connection that is checked out with a key. The lock must be held."""
    lease = local.keys.get(key)
    if lease is None or lease.ref is None:
        return None
    conn = cast("PooledConnection | None", lease.ref())
    if conn is None or conn.sharedpool_finalized or conn.sharedpool_lease is not lease:
        return None
    return conn
