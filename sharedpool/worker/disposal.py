"""The end of a pool in one process: `release_all`."""

from __future__ import annotations

from threading import get_ident
from time import monotonic
from typing import cast

from psycopg2 import extensions

from sharedpool.errors import PoolClosed
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker.connection.closing import cut
from sharedpool.worker.connection.connection import take_lease
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.waiting import ANSWER_LIMIT_S


def dispose(local: LocalPool) -> None:
    """Close every connection of this process, fail its waiters, and end the registration.

    Blocks until the backends are gone, at most some seconds. Raise `PoolClosed` the second time.
    """
    name = local.config.name
    with local.lock:
        if local.disposed:
            raise PoolClosed(f"pool {name!r} is already disposed")
        local.fast_path.clear()
        local.disposed = True
        local.cache.stop_keeping()  # a checkin that is under way closes its connection too
        link, registration = local.link, local.registration
        waiters = local.cache.waiters.fail(
            PoolClosed(f"pool {name!r} was disposed of while waiting")
        )
        closing = local.cache.take_all_idle(monotonic())
        in_use = [lease for lease in local.cache.leases.values() if lease.phase is Phase.IN_USE]
    for waiter in waiters:
        waiter.wake()
    if (wait_sockets := local.membership.wait_sockets) is not None:
        wait_sockets.wake_all()
    local.reclaim(ANSWER_LIMIT_S)
    local.close(closing)
    _end_checkouts(local, in_use)
    if link is not None and registration is not None:
        link.leave(registration)


def _end_checkouts(local: LocalPool, leases: list[Lease]) -> None:
    """End connections in use.

    This thread's own are closed in order. Another thread may be in the middle of a call on its own,
    so these are cut by their sockets.
    """
    cutting: list[tuple[Lease, PooledConnection]] = []
    for lease in leases:
        conn = cast("PooledConnection | None", lease.ref() if lease.ref else None)
        if conn is None or take_lease(conn) is None:
            continue  # another thread is returning it
        mine = lease.thread == get_ident()
        if conn.closed or (
            mine and conn.get_transaction_status() != extensions.TRANSACTION_STATUS_ACTIVE
        ):
            local.discard(lease, conn, ReleaseReason.CLOSED)
        else:
            cutting.append((lease, conn))
    cut(conn for _, conn in cutting)
    for lease, conn in cutting:
        local.give_back(lease, ReleaseReason.CLOSED, gone=conn.sharedpool_gone)
