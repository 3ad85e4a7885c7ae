"""Connections wrapped by a replacement of `psycopg2.connect`, such as a tracing agent's.

The replacement returns its own object around the connection, or sets a cursor class on it. The
pool's user gets that object, the *wrapper*. Inside the pool everything works on the connection
itself. The connection refers to its wrapper only while it is not checked out. So a wrapper that its
user drops takes the connection with it.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from types import FunctionType
from typing import Any, cast

import psycopg2
from psycopg2 import extensions

from sharedpool.errors import SharedPoolError
from sharedpool.postgres.conninfo import ConnInfo
from sharedpool.worker.connection.pooled import PooledConnection


def _is_function_of_psycopg2() -> bool:
    connect = psycopg2.connect
    return type(connect) is FunctionType and connect.__globals__ is vars(psycopg2)


def is_wrapped() -> bool:
    """Return True if `psycopg2.connect` is not psycopg2's own function."""
    return psycopg2.connect is not _OWN and not _is_function_of_psycopg2()


def unwrap(conn: extensions.connection) -> PooledConnection | None:
    """Return the pooled connection that `conn` is or wraps; None if it is no pool's."""
    return getattr(conn, "sharedpool_self", None)


def attach(conn: PooledConnection, returned: object) -> None:
    """Record what `psycopg2.connect` returned for a connection.

    Raise `SharedPoolError` if the connection cannot be reached through it: it could not be checked
    in.
    """
    conn.sharedpool_connect = psycopg2.connect
    conn.sharedpool_wrapper = conn.sharedpool_wrapper_ref = None
    if returned is conn:
        return
    if unwrap(cast(Any, returned)) is not conn:
        raise SharedPoolError(
            f"psycopg2.connect() is wrapped and returned {type(returned)!r}, which does not pass on"
            " the attributes of the connection made by connection_factory=; a pool cannot use it"
        )
    note_wrapper(conn, returned)


def note_wrapper(conn: PooledConnection, returned: object) -> None:
    """Record the wrapper with which a connection comes back. With none, keep the former one."""
    if returned is conn:
        if (ref := conn.sharedpool_wrapper_ref) is not None:
            conn.sharedpool_wrapper = ref()
        return
    conn.sharedpool_wrapper = returned
    try:
        conn.sharedpool_wrapper_ref = weakref.ref(returned)
    except TypeError:  # no weak reference is possible: it is wrapped anew for the next user
        conn.sharedpool_wrapper_ref = _lost


def as_user_sees(conn: PooledConnection) -> extensions.connection:
    """Return the connection's wrapper, or the connection itself if it has none at hand."""
    wrapper = conn.sharedpool_wrapper
    if wrapper is None and (ref := conn.sharedpool_wrapper_ref) is not None:
        wrapper = ref()
    return conn if wrapper is None else wrapper


def detach(conn: PooledConnection) -> extensions.connection:
    """Return what the user gets, and drop the connection's reference to it."""
    user_s = as_user_sees(conn)
    conn.sharedpool_wrapper = None
    return user_s


def has_lost_wrapper(conn: PooledConnection) -> bool:
    """Return True if a connection came back without its wrapper, which the user has dropped."""
    return conn.sharedpool_wrapper_ref is not None and as_user_sees(conn) is conn


def is_as_opened(conn: PooledConnection) -> bool:
    """Return True if a connection is wrapped as the present `psycopg2.connect` would wrap it."""
    if conn.sharedpool_connect is None:
        return not is_wrapped()
    return conn.sharedpool_connect is psycopg2.connect and not has_lost_wrapper(conn)


def wrap(conn: PooledConnection, conninfo: ConnInfo) -> None:
    """Wrap an open connection as if it had been opened just now. Raise what the wrapping raises.

    It must not be traced as a connect. So it happens in a thread, and a context, in which nothing
    is traced.
    """
    dsn, keywords = conninfo.arguments(conninfo.dsn)
    cursor_factory = conninfo.python_kwargs.get("cursor_factory")
    ended: list[object] = []

    def run() -> None:
        try:
            returned = psycopg2.connect(
                dsn,
                connection_factory=lambda *_, **__: conn,
                cursor_factory=cursor_factory,
                **keywords,
            )
            if isinstance(returned, extensions.connection) and unwrap(returned) is None:
                returned.close()  # the replacement has ignored connection_factory=
            attach(conn, returned)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(
        target=contextvars.Context().run, args=(run,), name="sharedpool-wrap", daemon=True
    )
    thread.start()
    thread.join()
    if ended:
        raise cast(BaseException, ended[0])


_OWN = psycopg2.connect if _is_function_of_psycopg2() else None


def _lost() -> None:
    """Stand for a weak reference where the wrapper allows none."""
