"""What wraps `psycopg2.connect`, as an agent does that traces statements.

Such a wrapper returns an object of its own around the connection, or sets a cursor class on it. Its user gets what it
returned: the *wrapper* of a connection. Everything inside the pool has the connection itself, which refers to its
wrapper only while it is not checked out: dropped by its user, a wrapper takes the connection with it.
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
    """Say whether somebody has put something of his own in the place of `psycopg2.connect`."""
    return psycopg2.connect is not _OWN and not _is_function_of_psycopg2()


def unwrap(conn: extensions.connection) -> PooledConnection | None:
    """Return the pool's connection that `conn` is, or wraps; None when it is no pool's."""
    return getattr(conn, "sharedpool_self", None)


def attach(conn: PooledConnection, returned: object) -> None:
    """Note what `psycopg2.connect` returned for a connection.

    Raise `SharedPoolError` when the connection cannot be reached through it: it could not be put back.
    """
    conn.sharedpool_connect = psycopg2.connect
    conn.sharedpool_wrapper = conn.sharedpool_wrapper_ref = None
    if returned is conn:
        return
    if unwrap(cast(Any, returned)) is not conn:
        raise SharedPoolError(
            f"psycopg2.connect() is wrapped, and returned {type(returned)!r}, which does not pass on the attributes of"
            " the connection that connection_factory= has made: a pool cannot lend it out"
        )
    note_wrapper(conn, returned)


def note_wrapper(conn: PooledConnection, returned: object) -> None:
    """Note the wrapper with which a connection comes back; where it comes without, it is the one that it went with."""
    if returned is conn:
        if (ref := conn.sharedpool_wrapper_ref) is not None:
            conn.sharedpool_wrapper = ref()
        return
    conn.sharedpool_wrapper = returned
    try:
        conn.sharedpool_wrapper_ref = weakref.ref(returned)
    except TypeError:  # it is made anew where it is needed
        conn.sharedpool_wrapper_ref = _lost


def as_user_sees(conn: PooledConnection) -> extensions.connection:
    """Return what stands for a connection before its user's eyes: its wrapper, if it has one at hand."""
    wrapper = conn.sharedpool_wrapper
    if wrapper is None and (ref := conn.sharedpool_wrapper_ref) is not None:
        wrapper = ref()
    return conn if wrapper is None else wrapper


def detach(conn: PooledConnection) -> extensions.connection:
    """Return what the user gets; from here on the connection does not refer to it."""
    user_s = as_user_sees(conn)
    conn.sharedpool_wrapper = None
    return user_s


def has_lost_wrapper(conn: PooledConnection) -> bool:
    """Say whether a connection that had a wrapper has come back without, and its user has let go of that."""
    return conn.sharedpool_wrapper_ref is not None and as_user_sees(conn) is conn


def is_as_opened(conn: PooledConnection) -> bool:
    """Say whether a connection from another process has what `psycopg2.connect`, as it is now, would give it."""
    if conn.sharedpool_connect is None:
        return not is_wrapped()
    return conn.sharedpool_connect is psycopg2.connect and not has_lost_wrapper(conn)


def wrap(conn: PooledConnection, conninfo: ConnInfo) -> None:
    """Have an open connection wrapped as if it had been opened here just now. Raise what the wrapping raises.

    It is no connect, and is not to be traced as one: it happens in a thread, and a context, in which nothing is traced.
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
                returned.close()  # it has not heeded connection_factory=
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
    """Stand for a reference to a wrapper that cannot be referred to weakly."""
