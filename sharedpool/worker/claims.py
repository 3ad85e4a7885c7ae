"""A checkin's claim on a connection: is it this pool's, and is it checked out?"""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import cast

from psycopg2 import extensions

from sharedpool.errors import PoolClosed, SharedPoolError
from sharedpool.wire.messages import ReleaseReason
from sharedpool.worker.connection.closed_flag import SHUT
from sharedpool.worker.connection.closing import close_confirmed
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.wrapper import unwrap
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.local_pool import LocalPool


def own(local: LocalPool, conn: extensions.connection) -> PooledConnection:
    """Return the pool's own connection in `conn`; raise `SharedPoolError` if there is none."""
    pooled = unwrap(conn)
    owner = None if pooled is None else pooled.sharedpool_local
    if pooled is not None and owner is local:
        return pooled
    if owner is not None and owner.pid != os.getpid():
        raise SharedPoolError(
            f"pool {local.config.name!r}: this connection belongs to process {owner.pid},"
            " which opened it"
        )
    raise SharedPoolError(
        f"pool {local.config.name!r}: put_conn() of a connection that it did not lend out: {conn!r}"
    )


def refuse_late(local: LocalPool, conn: PooledConnection) -> None:
    """Close a connection that comes back to a pool that is disposed of, and raise `PoolClosed`."""
    if not local.disposed:
        return
    lease = take_lease(conn)
    if lease is None:
        close_confirmed([conn])
    else:
        local.discard(lease, conn, ReleaseReason.CLOSED)
    raise PoolClosed(f"pool {local.config.name!r} is disposed: the connection was closed")


def take(local: LocalPool, conn: PooledConnection, key: Hashable) -> Lease:
    """Take the lease off a checked-out connection, so that no second checkin finds one.

    Raise `SharedPoolError` if the connection is not checked out, or not with this key.
    """
    lease = cast("Lease | None", conn.sharedpool_lease)
    if lease is not None and key is not None and lease.key != key:
        raise SharedPoolError(
            f"pool {local.config.name!r}: the connection was checked out with key {lease.key!r},"
            f" not {key!r}"
        )
    if lease is None or take_lease(conn) is None:
        raise SharedPoolError(f"pool {local.config.name!r}: this connection was already put back")
    return lease


def defer(conn: extensions.connection) -> None:
    """Have the link's thread check a connection in. For finalizers: no lock, no I/O."""
    pooled = unwrap(conn)
    if pooled is None or pooled.sharedpool_lease is None or is_being_collected(pooled):
        return  # if it is being collected too, its own finalizer brings it back
    if pooled.sharedpool_pid == os.getpid() and pooled.sharedpool_local is not None:
        pooled.sharedpool_closed_flag = SHUT
        pooled.sharedpool_local.dropped.append(pooled)
        pooled.sharedpool_local.wake_link()


def is_being_collected(conn: extensions.connection) -> bool:
    """Return True if the garbage collector is about to run this connection's finalizer.

    By then the collector has cleared all weak references to the connection.
    """
    lease = cast("Lease | None", getattr(conn, "sharedpool_lease", None))
    return lease is not None and lease.ref is not None and lease.ref() is None
