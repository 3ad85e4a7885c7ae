"""Open a connection for a lease, or make one that has moved here this pool's own.

When a connect fails, the lease goes back with all that is known of the backend: whether it is gone,
never was, or may be left on the server.
"""

from __future__ import annotations

import random
import time

import psycopg2
from msgspec import structs

from sharedpool.descriptors.available import FOR_A_CONNECTION, require
from sharedpool.errors import PoolClosed, PoolError
from sharedpool.wire.messages import START_UP_LIMIT_S, ReleaseReason
from sharedpool.wire.values import Phase
from sharedpool.worker import callbacks
from sharedpool.worker.connection.closing import abort
from sharedpool.worker.connection.handover import can_move, parameters
from sharedpool.worker.connection.opening import connect, describe, take_duplicate
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.state import record_settings, role_of_server
from sharedpool.worker.connection.wrapper import is_as_opened, wrap
from sharedpool.worker.core.lease import Lease
from sharedpool.worker.local_pool import LocalPool
from sharedpool.worker.settings import Callback


def run_callback(
    local: LocalPool, callback: Callback, lease: Lease, conn: PooledConnection, name: str
) -> None:
    """Run a user's callback at a checkout.

    The connection is discarded if the callback raises or leaves a transaction open.
    """
    try:
        callbacks.run(local.config.name, name, callback, conn)
    except BaseException:
        local.discarded += 1
        local.discard(lease, conn, ReleaseReason.BROKEN)
        raise


def open_connection(local: LocalPool, lease: Lease, deadline: float | None) -> PooledConnection:
    """Connect for a lease, and run `configure`. If that fails, the lease is given back."""
    made: list[PooledConnection] = []
    try:
        began = time.monotonic()
        timeout_s = None if deadline is None else max(0.0, deadline - began)
        require(FOR_A_CONNECTION, f"pool {local.config.name!r}: a connection")
        conn = connect(local.config.conninfo, local.tag, timeout_s, made)
        conn.sharedpool_local = local
        local.deposit(lease, conn)
        movable = _confirm(local, lease, conn, began)
        local.connects += 1
        lease.conn = conn
        lease.allow_fast_checkout(conn.sharedpool_wrapper is None)
        if local.config.configure:
            run_callback(local, local.config.configure, lease, conn, "configure")
        _record_settings(conn)
        conn.sharedpool_server = role_of_server(conn)
        conn.sharedpool_movable = lease.movable = movable
        return conn
    except BaseException as error:
        if lease.phase is not Phase.CLOSING:  # else `run_callback` has discarded the connection
            _give_back(local, lease, made[0] if made else None, error, deadline)
        raise


def _confirm(local: LocalPool, lease: Lease, conn: PooledConnection, began: float) -> bool:
    """Tell the broker which backend the connection has; return True if the connection can move.

    Raise `PoolError` if the slot may be in use elsewhere by now.
    """
    config = local.config
    backend = describe(conn)
    # Not behind a pooler: the reset would clear the name by which fencing finds the backend
    # (`broker/postgres/fencing.py`).
    movable = local.handover_enabled and backend.pooled is None and can_move(conn)
    if not movable:
        backend = structs.replace(backend, fixed=True)
    local.name_backend(lease, backend)
    conn.sharedpool_made_with = parameters(conn)
    now = time.monotonic()
    if now > lease.connect_by + START_UP_LIMIT_S:
        raise PoolError(
            f"pool {config.name!r}: connecting took too long:"
            " the slot may be in use elsewhere by now"
        )
    # With jitter: connections that were opened together are not replaced together.
    lifetime = config.max_lifetime
    retire_at = now + lifetime * random.uniform(0.9, 1.1) if lifetime else float("inf")
    with local.lock:
        if local.disposed:
            raise PoolClosed(f"pool {config.name!r} was disposed of while connecting")
        local.cache.opened(lease, backend, retire_at, conn, now)
        local.cache.timings.created.add(now - began)
    local.wake_link()
    return movable


def _give_back(
    local: LocalPool,
    lease: Lease,
    conn: PooledConnection | None,
    error: BaseException,
    deadline: float | None,
) -> None:
    """Give back a lease whose connect has failed or was interrupted; `conn` is how far it came."""
    reason = ReleaseReason.FAILED if isinstance(error, psycopg2.Error) else ReleaseReason.CLOSED
    if conn is None or (conn.sharedpool_witness < 0 and not conn.dsn):
        # 1. libpq was not called: there is no backend.
        local.give_back(lease, reason)
    elif conn.sharedpool_witness >= 0:
        # 2. The connection was open, even if it broke since: close it, and see the backend gone.
        local.discard(lease, conn, reason)
    elif conn.closed:
        # 3. libpq failed. The diagnosis tells whether a backend may be left.
        conn.sharedpool_direct = lease.reached_directly or None  # None: unknown
        failure = local.diagnosis.of(conn, error, deadline, lease.refused_with)
        local.not_opened(lease, reason, failure)
    elif not isinstance(error, OSError):
        # 4. Interrupted after libpq had connected: as 2, with the witness that is still missing.
        local.discard(lease, take_duplicate(conn), reason)
    else:
        # 5. No descriptor was free for the witness: the broker has to see the backend gone.
        abort(conn)
        local.give_back(lease, reason, gone=False, peer_closed=conn.sharedpool_peer_closed)


def configure_received(local: LocalPool, lease: Lease, conn: PooledConnection) -> None:
    """Make a connection that came from another process this pool's own."""
    if not is_as_opened(conn):
        wrap(conn, local.config.conninfo)
    lease.needs_configure = False
    lease.allow_fast_checkout(conn.sharedpool_wrapper is None)
    if local.config.configure:
        run_callback(local, local.config.configure, lease, conn, "configure")
    if local.config.configure or conn.sharedpool_touched:
        _record_settings(conn)


def _record_settings(conn: PooledConnection) -> None:
    """Record the settings that a checkin restores, and the encoding that a move must keep."""
    record_settings(conn)
    conn.sharedpool_encoding = conn.get_parameter_status("client_encoding") or ""
