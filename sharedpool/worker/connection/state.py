"""The state of an open connection: is it open still, unused, and as its next user expects it?"""

from __future__ import annotations

import socket
from typing import Any

import psycopg2
from psycopg2 import extensions

from sharedpool.descriptors.owned import is_still
from sharedpool.postgres.libpq import parameter_statuses, socket_of
from sharedpool.postgres.peer_closed import borrow
from sharedpool.worker import greenlets
from sharedpool.worker.connection import closed_flag, wrapper
from sharedpool.worker.connection.closing import PEER_CLOSED, descriptor_of, owns_descriptor
from sharedpool.worker.connection.pooled import PooledConnection

PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
# A connection that was idle, or checked out, for longer is checked for a closed socket.
CHECK_AFTER_S = 0.5
# Parameters by which a server reports whether it is a primary.
ROLE_PARAMETERS = ("in_hot_standby", "default_transaction_read_only")
_ROLE_PARAMETERS_C = tuple(name.encode() for name in ROLE_PARAMETERS)


def _settings_of(conn: PooledConnection) -> tuple[Any, ...]:
    """Return the client-side session settings that a checkin restores."""
    settings = (conn.autocommit, conn.isolation_level, conn.readonly, conn.deferrable)
    return (*settings, conn.cursor_factory, conn.encoding)


def record_settings(conn: PooledConnection) -> None:
    """Have each checkin restore the settings that a connection has now."""
    conn.sharedpool_session, conn.sharedpool_touched = _settings_of(conn), False


def role_of_server(conn: PooledConnection) -> tuple[bytes | None, ...]:
    """Return what the server reports of its role (PostgreSQL 14+). No query."""
    return parameter_statuses(conn, _ROLE_PARAMETERS_C)


def turned_read_only(conn: PooledConnection) -> bool:
    """Return True if the server has become read-only since the connection was opened. No query."""
    return role_of_server(conn) != conn.sharedpool_server and b"on" in role_of_server(conn)


def has_no_input(conn: PooledConnection) -> bool:
    """Return True if nothing has arrived on an idle connection's socket.

    A server that has closed the connection, or has said so, makes the socket readable. Return False
    also if the descriptor's number belongs to something else by now. Takes two system calls, about
    two microseconds, and no query.
    """
    if conn.sharedpool_witness < 0 or closed_flag.is_closed_for_good(conn):
        return False
    if not is_still(fd := descriptor_of(conn), conn.sharedpool_known):
        return False
    try:
        borrow(fd).recv(1, PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def is_unused(conn: PooledConnection) -> bool:
    """Return True if no thread uses a connection and no transaction is open. No system call."""
    return (
        conn.status == extensions.STATUS_READY
        and not conn.get_transaction_status()
        and not closed_flag.is_locked(conn)
    )


def sync_transaction_status(conn: PooledConnection) -> None:
    """Tell psycopg2 that no transaction is open, if it thinks otherwise. Takes one round trip then.

    psycopg2 does not see a COMMIT or ROLLBACK that was sent as SQL. It would send no BEGIN for the
    next user, who could then roll nothing back.
    """
    if conn.status != extensions.STATUS_READY:
        conn.rollback()


def peer_has_closed(conn: PooledConnection) -> bool:
    """Return True if the server has closed its end. Unlike `has_no_input`, ignore unread data."""
    if not PEER_CLOSED:
        return not has_no_input(conn)
    if conn.sharedpool_witness < 0 or closed_flag.is_closed_for_good(conn):
        return True
    if not is_still(fd := socket_of(conn), conn.sharedpool_known):
        return True
    poller = greenlets.poller()
    poller.register(fd, PEER_CLOSED)
    return bool(poller.poll(0))


def clean(conn: PooledConnection) -> bool:
    """Roll back an open transaction and restore the session's settings; return False if broken."""
    if conn.closed or not owns_descriptor(conn):
        return False
    status = conn.get_transaction_status()
    try:
        if status == extensions.TRANSACTION_STATUS_UNKNOWN or closed_flag.is_busy(conn):
            return False
        if status != extensions.TRANSACTION_STATUS_IDLE:
            conn.sharedpool_erred = status == extensions.TRANSACTION_STATUS_INERROR
            # By the user's wrapper, as psycopg2.pool does it: an agent sees the rollback.
            wrapper.as_user_sees(conn).rollback()
        sync_transaction_status(conn)
        if conn.sharedpool_touched and _settings_of(conn) != conn.sharedpool_session:
            autocommit, isolation, readonly, deferrable, factory, encoding = conn.sharedpool_session
            conn.cursor_factory = factory
            conn.set_client_encoding(encoding)
            conn.set_session(
                isolation or "default",
                _or_default(readonly),
                _or_default(deferrable),
                autocommit,
            )
        conn.sharedpool_touched = False
    except psycopg2.Error:
        return False
    return not conn.closed and conn.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE


def _or_default(value: object) -> Any:
    return "default" if value is None else value
