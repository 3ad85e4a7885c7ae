"""A pool's connections: open one, see that it is alive and clean. (`ending.py` closes it and sees it gone.)

Every connection keeps a duplicate of its socket, the *witness*. PostgreSQL holds its end open until the backend has
exited (`socket_close` in its pqcomm.c), so the end of file on the witness proves that the slot is free, if it was the
server that sent it (`hangup.py`); a plain `close()` only asks for it.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import psycopg2
from psycopg2 import extensions

from sharedpool.conninfo import ConnInfo
from sharedpool.libpq import socket_of_failed
from sharedpool.owned import Identity, identity, is_still
from sharedpool.wire.messages import Backend, Phase
from sharedpool.worker import green
from sharedpool.worker.ending import (
    HUNG_UP,
    close_confirmed,
    close_witness,
    disown,
    forsake,
    holds_own,
    register_witness,
    see_off,
)

CHECK_AFTER_S = 0.5  # idle, or lent out, for longer than this: look whether the server is still there
# libpq waits for ever by default; a pool must not.
CONNECT_LIMIT_S = 10

# What one worker alone may be to blame for: others need not hold back. (libpq gives no SQLSTATE of a failed connect.)
_ONES_OWN = re.compile(
    r"authentication|pg_hba|password|does not exist|not permitted|permission denied|certificate|no such user"
    r"|invalid|unsupported|unrecognized|SSL|GSS",
    re.IGNORECASE,
)

# client_connection_check_interval (PostgreSQL 14+): a dead worker's backend notices even in the middle of a query.
_DESCRIBE_SQL = """
SELECT a.pid, (extract(epoch FROM a.backend_start) * 1000000)::bigint,
       (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint
FROM pg_stat_get_activity(pg_backend_pid()) AS a
"""
_CHECK_INTERVAL_SQL = """
SELECT set_config('client_connection_check_interval', '2s', false)
WHERE current_setting('client_connection_check_interval') = '0';
"""


class PooledConnection(extensions.connection):
    """A psycopg2 connection that a pool lends out; in all else a plain one."""

    # Set while it is checked out, taken off by the first checkin: a second one finds nothing.
    sharedpool_lease: Any = None
    sharedpool_holdings: Any = None
    sharedpool_returned: Any = None  # the lease in which its user's `close()` checked it in last
    # A bare descriptor: a socket object in one garbage cycle with us would be closed before our own finalizer ran.
    sharedpool_witness = -1
    # What libpq's descriptor and the witness are, and what they were before: a number may become somebody else's.
    sharedpool_known: tuple[Identity, ...] = ()
    sharedpool_session: tuple[Any, ...] = ()
    sharedpool_pid = 0
    sharedpool_gone = False
    sharedpool_finalized = False
    sharedpool_erred = False  # its last transaction failed
    sharedpool_started = 0.0  # when its connect began
    sharedpool_timeout_s: float | None = None  # libpq's own, if it is known
    sharedpool_server: tuple[str | None, ...] = ()  # what it was when we connected: see `turned_read_only`
    sharedpool_touched = False  # its user has set what a checkin restores
    # For the hand-over (`handover.py`).
    sharedpool_movable = False
    sharedpool_encoding = ""
    sharedpool_parameters: bytes | None = None
    sharedpool_native = True  # libpq itself has opened the session that it is on
    sharedpool_adopted: Backend | None = None  # the backend, if it has not

    def close(self) -> None:
        """Close the connection and wait (at most a second) until its backend has exited.

        One that `Pool.connect` has returned is checked in instead; closing it again does nothing.
        """
        lease, returned = self.sharedpool_lease, self.sharedpool_returned
        if self.sharedpool_pid not in (0, os.getpid()):
            disown(self)  # inherited by a fork that Python did not see: the session is the parent's
        elif lease is not None and lease.at_close is not None:
            self.sharedpool_returned = lease
            lease.at_close(self)
            return
        elif lease is None and returned is not None and returned.phase is Phase.IDLE:
            return  # it is the pool's, for the next user
        close_confirmed([self])

    def sharedpool_close(self) -> None:
        """Close it as psycopg2 does, which only asks its backend to leave, if its descriptor is still its own."""
        if holds_own(self):
            super().close()
        else:
            forsake(self)

    def set_session(self, *args: Any, **kwargs: Any) -> None:
        """Set the session's characteristics: see psycopg2."""
        self.sharedpool_touched = True
        super().set_session(*args, **kwargs)

    def set_isolation_level(self, level: int | None) -> None:
        """Set the isolation level: see psycopg2."""
        self.sharedpool_touched = True
        super().set_isolation_level(level)

    def reset(self) -> None:
        """Return to the session's defaults: see psycopg2."""
        self.sharedpool_touched = True
        super().reset()

    def get_backend_pid(self) -> int:
        """Return the process id of the server's process for this session."""
        return super().get_backend_pid() if self.sharedpool_adopted is None else self.sharedpool_adopted.pid

    @property
    def info(self) -> extensions.ConnectionInfo:
        """What psycopg2 knows of the connection."""
        return super().info if self.sharedpool_adopted is None else AdoptedInfo(self)

    def cancel(self) -> None:
        """Cancel what the session is executing. For a connection that came from another process the broker does it.

        Raise `psycopg2.InterfaceError` when the connection is not checked out: another may be using the session.
        """
        if self.sharedpool_native:
            super().cancel()
        elif self.sharedpool_lease is None:
            raise psycopg2.InterfaceError("cannot cancel: the connection was returned to its pool")
        else:
            self.sharedpool_holdings.cancel(self.sharedpool_lease.token)

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:  # at the interpreter's end `os` may be gone
        # Dropped while checked out: no lock may be taken here, so the link's thread brings it back.
        if self.sharedpool_pid != getpid():
            return  # never opened, or inherited
        if self.sharedpool_lease is None:
            close_witness(self)
            if not holds_own(self):
                forsake(self)
        else:
            self.sharedpool_finalized = True  # Python calls this once in an object's life: it is not lent out again
            self.sharedpool_holdings.orphans.append(self)
            self.sharedpool_holdings.signal()


def _watched(name: str) -> property:
    """Return psycopg2's attribute of that name; setting it is noticed, so that most checkins need not look."""

    def get(conn: PooledConnection) -> Any:
        return getattr(super(PooledConnection, conn), name)

    def set_(conn: PooledConnection, value: object) -> None:
        conn.sharedpool_touched = True
        _inherited(cast(Any, type(conn)), name).__set__(conn, value)

    return property(get, set_, doc=getattr(extensions.connection, name).__doc__)


@lru_cache(maxsize=128)
def _inherited(kind: type[PooledConnection], name: str) -> Any:
    """Return the attribute that `PooledConnection`'s stands before: psycopg2's, or a user's own class's."""
    after = kind.__mro__[kind.__mro__.index(PooledConnection) + 1 :]
    return next(cls.__dict__[name] for cls in after if name in cls.__dict__)


for _name in ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory"):
    setattr(PooledConnection, _name, _watched(_name))


class AdoptedInfo(extensions.ConnectionInfo):
    """What psycopg2 knows of a connection whose session another process has opened."""

    def __init__(self, conn: PooledConnection) -> None:
        super().__init__(conn)
        self._conn = conn

    @property
    def backend_pid(self) -> int:
        """The process id of the server's process for this session."""
        return self._conn.get_backend_pid()


@lru_cache(maxsize=32)
def pooled_class(factory: type[extensions.connection] | None) -> type[PooledConnection]:
    """Return the class of a pool's connections: `PooledConnection`, mixed into the user's connection factory."""
    if factory is None or factory is extensions.connection:
        return PooledConnection
    return cast(type[PooledConnection], type(f"Pooled{factory.__name__}", (PooledConnection, factory), {}))


def connect(
    conninfo: ConnInfo, application_name: str, timeout_s: float | None, made: list[PooledConnection]
) -> PooledConnection:
    """Open a connection; blocks for its `connect_timeout`, by default `timeout_s` or 10 s. Raise what psycopg2 raises,
    and what a function raises that is asked for the password.

    The connection is in `made` even before it is connected: an interrupt anywhere does not lose it.
    """
    keywords = dict(conninfo.python_kwargs)
    factory = pooled_class(keywords.pop("connection_factory", None))
    keywords.setdefault("fallback_application_name", application_name)
    dsn = conninfo.current()
    parameters = extensions.parse_dsn(dsn)
    if "connect_timeout" not in parameters and "PGCONNECT_TIMEOUT" not in os.environ:
        limit = CONNECT_LIMIT_S if timeout_s is None else min(CONNECT_LIMIT_S, timeout_s)
        keywords["connect_timeout"] = max(1, round(limit))
    limit_s = _number(
        keywords.get("connect_timeout") or parameters.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT")
    )
    started = time.monotonic()
    if "fallback_application_name" in parameters:
        del keywords["fallback_application_name"]

    def make(dsn: str, **options: Any) -> PooledConnection:
        conn = factory.__new__(factory)
        made.append(conn)
        conn.sharedpool_started = started
        conn.sharedpool_timeout_s = limit_s
        conn.__init__(dsn, **options)  # type: ignore[misc] # connects
        return conn

    with green.connect_limit(limit_s):
        psycopg2.connect(dsn, connection_factory=make, **keywords)
    return bear_witness(made[0])


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def failure(conn: PooledConnection, error: BaseException) -> tuple[bool, str]:
    """Say of a connect that failed whether its backend is known to be gone, or never was, and whom it concerns.

    The text is empty when the fault may be this worker's alone (a wrong password, no such database).
    """
    text = " ".join(str(error).split())[:500] if isinstance(error, psycopg2.Error) else ""
    if _ONES_OWN.search(text):
        text = ""
    fd = socket_of_failed(conn)
    if fd is None:
        return False, text
    if fd >= 0:  # the server has refused, and leaves
        # libpq's own is open as long as `conn` lives; a duplicate might not be had.
        see_off(conn, fd)
        return conn.sharedpool_gone, text
    # Never connected, unless libpq gave up waiting, or has tried several hosts.
    took_s, limit_s = time.monotonic() - conn.sharedpool_started, conn.sharedpool_timeout_s
    timed_out = "timeout expired" in text or (limit_s is not None and 0 < limit_s <= took_s + 0.1)
    several = "," in extensions.parse_dsn(conn.dsn).get("host", "")
    return not timed_out and not several, text


def bear_witness(conn: PooledConnection) -> PooledConnection:
    """Duplicate a connection's socket, once."""
    if conn.sharedpool_witness < 0:
        conn.sharedpool_pid = os.getpid()
        conn.sharedpool_known = (identity(conn.fileno()),)
        conn.sharedpool_witness = os.dup(conn.fileno())
        register_witness(conn)
    return conn


def describe(conn: PooledConnection) -> Backend:
    """Ask the server which backend this is. Where it will not say (a proxy in between) only the pid is known."""
    conn.autocommit = True
    try:
        with conn.cursor(cursor_factory=extensions.cursor) as cursor:
            prefix = _CHECK_INTERVAL_SQL if conn.server_version >= 140000 else ""
            # Whoever finds a connection that was never used sees whose statement its last one was.
            cursor.execute("/* sharedpool */" + prefix + _DESCRIBE_SQL)
            row = cast("tuple[int, int, int] | None", cursor.fetchone())
            return Backend(*row) if row else Backend(conn.info.backend_pid)
    except (psycopg2.ProgrammingError, psycopg2.NotSupportedError, psycopg2.DataError):
        return Backend(conn.info.backend_pid)
    finally:
        if not conn.closed:
            conn.autocommit = False


def session_of(conn: PooledConnection) -> tuple[Any, ...]:
    """Return the client-side session settings that a checkin restores."""
    return (conn.autocommit, conn.isolation_level, conn.readonly, conn.deferrable, conn.cursor_factory)


def server_of(conn: PooledConnection) -> tuple[str | None, ...]:
    """Return what the server reports by itself of its role (PostgreSQL 14+)."""
    status = conn.get_parameter_status
    return (status("in_hot_standby"), status("default_transaction_read_only"))


def turned_read_only(conn: PooledConnection) -> bool:
    """Say whether the server has become read-only since the connection was opened. No query."""
    return server_of(conn) != conn.sharedpool_server and "on" in server_of(conn)


def is_alive(conn: PooledConnection) -> bool:
    """Say whether an idle connection's socket is quiet: a server that closed it, or said so, shows as readable.

    So does one whose descriptor has become somebody else's. Two system calls, about two microseconds; no query.
    """
    if conn.closed or conn.sharedpool_witness < 0 or not is_still(fd := conn.fileno(), conn.sharedpool_known):
        return False
    poller = green.poller()
    poller.register(fd, select.POLLIN)
    return not poller.poll(0)


def settle(conn: PooledConnection) -> None:
    """Have psycopg2 know that no transaction is open: it does not see a COMMIT or ROLLBACK that was sent as SQL.

    Else it would send no BEGIN for the next user, who could roll nothing back. One round trip, and only then.
    """
    if conn.status != extensions.STATUS_READY:
        conn.rollback()


def has_hung_up(conn: PooledConnection) -> bool:
    """Say whether the server has closed its end; unlike `is_alive`, what it has said meanwhile does not matter."""
    if not HUNG_UP:
        return not is_alive(conn)
    if conn.closed or conn.sharedpool_witness < 0 or not is_still(fd := conn.fileno(), conn.sharedpool_known):
        return True
    poller = green.poller()
    poller.register(fd, HUNG_UP)
    return bool(poller.poll(0))


def clean(conn: PooledConnection) -> bool:
    """Roll back what its user left open and restore its session settings; return False when it is broken."""
    if conn.closed or not holds_own(conn):
        return False
    status = conn.get_transaction_status()
    try:
        if status == extensions.TRANSACTION_STATUS_UNKNOWN:
            return False
        if status != extensions.TRANSACTION_STATUS_IDLE:
            conn.sharedpool_erred = status == extensions.TRANSACTION_STATUS_INERROR
            conn.rollback()
        settle(conn)
        if conn.sharedpool_touched and session_of(conn) != conn.sharedpool_session:
            autocommit, isolation_level, readonly, deferrable, conn.cursor_factory = conn.sharedpool_session
            conn.set_session(isolation_level or "default", _or_default(readonly), _or_default(deferrable), autocommit)
        conn.sharedpool_touched = False
    except psycopg2.Error:
        return False
    return not conn.closed and conn.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE


def _or_default(value: object) -> Any:
    return "default" if value is None else value
