"""A pool's connections: open one, see that it is alive and clean. (`closing.py` closes it and sees it gone.)

Every connection keeps a duplicate of its socket, the *witness*. PostgreSQL holds its end open until the backend has
exited (`socket_close` in its pqcomm.c), so the end of file on the witness proves that the slot is free, if it was the
server that sent it (`postgres/peer_closed.py`, `postgres/route.py`); a plain `close()` only asks for it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, cast

import psycopg2
from psycopg2 import extensions

from sharedpool.descriptors.owned import identity, is_still
from sharedpool.errors import SharedPoolError
from sharedpool.postgres.conninfo import ConnInfo
from sharedpool.postgres.libpq import parameter_statuses, socket_of, socket_of_failed
from sharedpool.postgres.peer_closed import borrow
from sharedpool.postgres.route import is_direct
from sharedpool.wire.messages import Backend, Phase
from sharedpool.worker import greenlets
from sharedpool.worker.connection import closed_flag, server_facts, wrapper
from sharedpool.worker.connection.closing import (
    PEER_CLOSED,
    close_confirmed,
    close_witness,
    descriptor_of,
    disown,
    keep_forever,
    owns_descriptor,
    register,
    unregister,
    unregister_all,
)
from sharedpool.worker.connection.pooled import PooledConnection

PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_EPOCH, _MICROSECOND = datetime.fromtimestamp(0, UTC), timedelta(microseconds=1)
CHECK_AFTER_S = (
    0.5  # idle, or lent out, for longer than this: look whether the server is still there
)
# What tells whether a server is a primary one.
ROLE_PARAMETERS = ("in_hot_standby", "default_transaction_read_only")
_ROLE_PARAMETERS_C = tuple(name.encode() for name in ROLE_PARAMETERS)
# libpq waits for ever by default; a pool must not.
CONNECT_LIMIT_S = 10

# Times as text: what a new backend must look up for the arithmetic is a fifth of what all this costs it.
_DESCRIBE_SQL = """
SELECT a.pid, a.backend_start::text, pg_postmaster_start_time()::text,
       host(inet_client_addr()), inet_client_port(), host(inet_server_addr()), inet_server_port(), application_name
FROM pg_stat_get_activity(pg_backend_pid()) AS a
"""
# client_connection_check_interval (PostgreSQL 14+): a dead worker's backend notices even in the middle of a query.
_CHECK_INTERVAL_SQL = """
SELECT set_config('client_connection_check_interval', '2s', false)
WHERE current_setting('client_connection_check_interval') = '0';
"""


class Connection(PooledConnection):
    """A psycopg2 connection that a pool lends out; in all else a plain one."""

    # By these agents know what database it is, and name its methods.
    __module__, __qualname__ = extensions.connection.__module__, extensions.connection.__qualname__

    sharedpool_closed_flag: int = closed_flag.MEMBER

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
        elif lease is None and (
            self.closed == closed_flag.SHUT
            or (returned is not None and returned.phase is Phase.IDLE)
        ):
            return  # it is the pool's, for the next user
        close_confirmed([self])

    def sharedpool_close(self) -> None:
        """Close it as psycopg2 does, which only asks its backend to leave, if its descriptor is still its own."""
        self.sharedpool_wrapper = None  # it refers to us
        if owns_descriptor(self):
            number = socket_of_failed(self) or -1
            closed_flag.mark_broken(self)
            super().close()
            unregister(number)
        else:
            keep_forever(self)

    def sharedpool_touch(self) -> None:
        """Note that its user sets what a checkin restores. Raise `psycopg2.InterfaceError` when it is another's."""
        if self.closed == closed_flag.SHUT and self.sharedpool_local is not None:
            raise psycopg2.InterfaceError("connection already closed")
        self.sharedpool_touched = True
        if self.sharedpool_lease is not None:
            self.sharedpool_lease.fast_checkin = False

    def set_session(self, *args: Any, **kwargs: Any) -> None:
        """Set the session's characteristics: see psycopg2."""
        self.sharedpool_touch()
        super().set_session(*args, **kwargs)

    def set_isolation_level(self, level: int | None) -> None:
        """Set the isolation level: see psycopg2."""
        self.sharedpool_touch()
        super().set_isolation_level(level)

    def set_client_encoding(self, encoding: str) -> None:
        """Change the encoding of what is sent and received: see psycopg2."""
        self.sharedpool_touch()
        super().set_client_encoding(encoding)

    def reset(self) -> None:
        """Return to the session's defaults: see psycopg2."""
        self.sharedpool_touch()
        super().reset()

    def get_backend_pid(self) -> int:
        """Return the process id of the server's process for this session."""
        return (
            super().get_backend_pid()
            if self.sharedpool_adopted is None
            else self.sharedpool_adopted.pid
        )

    def _adopted_names(self) -> server_facts.ServerFacts | None:
        encoded = None if self.sharedpool_adopted is None else self.sharedpool_names
        return None if encoded is None else server_facts.decode(encoded)

    @property
    def info(self) -> extensions.ConnectionInfo:
        """What psycopg2 knows of the connection."""
        known = self._adopted_names()
        return super().info if known is None else server_facts.AdoptedInfo(self, known)

    @property
    def dsn(self) -> str:
        """The connection string, without the password."""
        known = self._adopted_names()
        return super().dsn if known is None else known.dsn

    def get_dsn_parameters(self) -> dict[str, str]:
        """Return the parameters of the connection, defaults included: see psycopg2."""
        known = self._adopted_names()
        return (
            super().get_dsn_parameters() if known is None or self.closed else dict(known.parameters)
        )

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.sharedpool_adopted is None else text.replace(super().dsn, self.dsn)

    def cancel(self) -> None:
        """Cancel what the session is executing. For a connection that came from another process the broker does it.

        Raise `psycopg2.InterfaceError` when the connection is not checked out: another may be using the session.
        """
        if self.sharedpool_native:
            super().cancel()
            return
        server_facts.refuse_cancel(self)
        if self.sharedpool_lease is None:
            raise psycopg2.InterfaceError("cannot cancel: the connection was returned to its pool")
        self.sharedpool_local.cancel_query(self.sharedpool_lease.token)

    def __del__(
        self, getpid: Callable[[], int] = os.getpid
    ) -> None:  # at the interpreter's end `os` may be gone
        # Dropped while checked out: no lock may be taken here, so the link's thread brings it back.
        if self.sharedpool_pid != getpid():
            return  # never opened, or inherited
        if self.sharedpool_lease is None:
            close_witness(self)
            if owns_descriptor(self):
                closed_flag.mark_broken(
                    self
                )  # else psycopg2 takes it for closed, and leaves the descriptor open
            else:
                keep_forever(self)
            unregister_all(self)
        else:
            unregister_all(self)
            self.sharedpool_finalized = (
                True  # Python calls this once in an object's life: it is not lent out again
            )
            self.sharedpool_local.orphans.append(self)
            self.sharedpool_local.wake_link()


def _watched(name: str) -> property:
    """Return psycopg2's attribute of that name; setting it is noticed, so that most checkins need not look."""

    def get(conn: Connection) -> Any:
        return getattr(super(Connection, conn), name)

    def set_(conn: Connection, value: object) -> None:
        conn.sharedpool_touch()
        _inherited(cast(Any, type(conn)), name).__set__(conn, value)

    return property(get, set_, doc=getattr(extensions.connection, name).__doc__)


@lru_cache(maxsize=128)
def _inherited(kind: type[PooledConnection], name: str) -> Any:
    """Return the attribute that `Connection`'s stands before: psycopg2's, or a user's own class's."""
    after = kind.__mro__[kind.__mro__.index(Connection) + 1 :]
    return next(cls.__dict__[name] for cls in after if name in cls.__dict__)


for _name in ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory"):
    setattr(Connection, _name, _watched(_name))


@lru_cache(maxsize=32)
def pooled_class(factory: type[extensions.connection] | None) -> type[PooledConnection]:
    """Return the class of a pool's connections: `Connection`, mixed into the user's connection factory."""
    factory = factory or extensions.connection
    bases = (Connection,) if factory is extensions.connection else (Connection, factory)
    members = {
        "__module__": factory.__module__,
        "__qualname__": factory.__qualname__,
        "__slots__": ("sharedpool_lent",),
    }
    return cast(type[PooledConnection], type(f"Pooled{factory.__name__}", bases, members))


def take_lease(conn: PooledConnection) -> Any:
    """Take its lease off a connection and return it; None when it has none. Of several threads only one gets it."""
    lease = conn.sharedpool_lease
    try:
        del conn.sharedpool_lent
    except AttributeError:
        return None
    return lease


def connect(
    conninfo: ConnInfo, application_name: str, timeout_s: float | None, made: list[PooledConnection]
) -> PooledConnection:
    """Open a connection; blocks for its `connect_timeout`, by default 10 s, or for `timeout_s` if that is shorter.

    Raise what psycopg2 raises, and what a function raises that is asked for the password.

    The connection is in `made` even before it is connected: an interrupt anywhere does not lose it.
    """
    dsn = conninfo.current()
    given, named = conninfo.arguments(dsn)
    keywords = {**conninfo.python_kwargs, **named}
    factory = pooled_class(keywords.pop("connection_factory", None))
    parameters = extensions.parse_dsn(dsn)
    asked = (
        keywords.get("connect_timeout")
        or parameters.get("connect_timeout")
        or os.environ.get("PGCONNECT_TIMEOUT")
    )
    limit_s = _number(asked) if asked is not None else CONNECT_LIMIT_S
    if timeout_s is not None and limit_s is not None and not 0 < limit_s <= timeout_s:
        limit_s = max(0.1, timeout_s)
    if limit_s is not None and limit_s != _number(asked):
        keywords["connect_timeout"] = max(1, round(limit_s))
    started = time.monotonic()
    if "fallback_application_name" not in parameters:
        keywords["fallback_application_name"] = application_name

    def make(dsn: str, **options: Any) -> PooledConnection:
        if made:  # by what tries again, or by what connects twice
            if failed:
                raise failed[0]
            raise SharedPoolError(
                "psycopg2.connect() is wrapped by what connects twice: a pool has to count each"
            )
        conn = factory.__new__(factory)
        made.append(conn)
        conn.sharedpool_started = started
        conn.sharedpool_timeout_s = limit_s
        try:
            with greenlets.connects_patiently(conn, limit_s):
                conn.__init__(dsn, **options)  # type: ignore[misc] # connects
        except BaseException as error:
            failed.append(error)
            raise
        return conn

    failed: list[BaseException] = []
    try:
        with greenlets.connect_limit(limit_s):
            returned = psycopg2.connect(given, connection_factory=make, **keywords)
    except UnicodeDecodeError as error:
        if not made or not made[0].closed:
            raise
        # What the server says before it knows the client's encoding comes in its own, which psycopg2 does not expect.
        raise psycopg2.OperationalError(error.object.decode("utf-8", "replace").strip()) from None
    finally:
        failed.clear()  # it refers to this very frame
    if not made:
        returned.close()
        raise SharedPoolError(
            f"psycopg2.connect() is wrapped by what does not heed connection_factory=, and returned {type(returned)!r}:"
            " a pool cannot lend it out"
        )
    wrapper.attach(take_duplicate(made[0]), returned)
    return made[0]


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def take_duplicate(conn: PooledConnection) -> PooledConnection:
    """Duplicate a connection's socket, once."""
    if conn.sharedpool_witness < 0:
        conn.sharedpool_pid = os.getpid()
        conn.sharedpool_known = (identity(conn.fileno()),)
        register(conn, conn.fileno())
        conn.sharedpool_witness = os.dup(conn.fileno())
        register(conn, conn.sharedpool_witness)
    return conn


def describe(conn: PooledConnection) -> Backend:
    """Ask the server which backend this is, and find out whether anybody is in between.

    Where it will not say only the pid is known. By psycopg2's own class: a user's may want to be set up first, or note
    what is executed.
    """
    plain = cast(Any, extensions.connection)
    plain.autocommit.__set__(conn, True)
    try:
        with plain.cursor(conn, cursor_factory=extensions.cursor) as cursor:
            prefix = _CHECK_INTERVAL_SQL if conn.server_version >= 140000 else ""
            # Whoever finds a connection that was never used sees whose statement its last one was.
            cursor.execute("/* sharedpool */" + prefix + _DESCRIBE_SQL)
            row = cursor.fetchone()
            if row is None:
                return _unknown(conn)
            pid, start, boot, client, client_port, server, server_port, name = row
            start_us, boot_us = _microseconds(start or ""), _microseconds(boot or "")
            # A pooler has its own key for the cancel of whatever it will have the session on.
            pooled = pid != conn.info.backend_pid
            ends = None if client is None else ((client, client_port), (server, server_port))
            conn.sharedpool_direct = not pooled and is_direct(conn.fileno(), pid, ends)
            return Backend(
                pid, start_us, boot_us, conn.sharedpool_direct, (name or "") if pooled else None
            )
    except (psycopg2.ProgrammingError, psycopg2.NotSupportedError, psycopg2.DataError, ValueError):
        return _unknown(conn)
    finally:
        if not conn.closed:
            plain.autocommit.__set__(conn, False)


def _microseconds(moment: str) -> int:
    """Return the microseconds since 1970 of a timestamptz in ISO style, which psycopg2 sees to.

    As exact as `(extract(epoch FROM moment) * 1000000)::bigint`, by which the broker knows a backend. Raise ValueError.
    """
    return (datetime.fromisoformat(moment) - _EPOCH) // _MICROSECOND


def _unknown(conn: PooledConnection) -> Backend:
    conn.sharedpool_direct = False
    return Backend(conn.info.backend_pid)


def settings_of(conn: PooledConnection) -> tuple[Any, ...]:
    """Return the client-side session settings that a checkin restores."""
    settings = (conn.autocommit, conn.isolation_level, conn.readonly, conn.deferrable)
    return (*settings, conn.cursor_factory, conn.encoding)


def role_of_server(conn: PooledConnection) -> tuple[bytes | None, ...]:
    """Return what the server reports by itself of its role (PostgreSQL 14+)."""
    return parameter_statuses(conn, _ROLE_PARAMETERS_C)


def turned_read_only(conn: PooledConnection) -> bool:
    """Say whether the server has become read-only since the connection was opened. No query."""
    return role_of_server(conn) != conn.sharedpool_server and b"on" in role_of_server(conn)


def is_alive(conn: PooledConnection) -> bool:
    """Say whether an idle connection's socket is quiet: a server that closed it, or said so, shows as readable.

    So does one whose descriptor has become somebody else's. Two system calls, about two microseconds; no query.
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
    """Say whether nobody uses a connection, nor has left a transaction open on it. No system call."""
    return (
        conn.status == extensions.STATUS_READY
        and not conn.get_transaction_status()
        and not closed_flag.is_locked(conn)
    )


def sync_transaction_status(conn: PooledConnection) -> None:
    """Have psycopg2 know that no transaction is open: it does not see a COMMIT or ROLLBACK that was sent as SQL.

    Else it would send no BEGIN for the next user, who could roll nothing back. One round trip, and only then.
    """
    if conn.status != extensions.STATUS_READY:
        conn.rollback()


def peer_has_closed(conn: PooledConnection) -> bool:
    """Say whether the server has closed its end; unlike `is_alive`, what it has said meanwhile does not matter."""
    if not PEER_CLOSED:
        return not is_alive(conn)
    if conn.sharedpool_witness < 0 or closed_flag.is_closed_for_good(conn):
        return True
    if not is_still(fd := socket_of(conn), conn.sharedpool_known):
        return True
    poller = greenlets.poller()
    poller.register(fd, PEER_CLOSED)
    return bool(poller.poll(0))


def clean(conn: PooledConnection) -> bool:
    """Roll back what its user left open and restore its session settings; return False when it is broken."""
    if conn.closed or not owns_descriptor(conn):
        return False
    status = conn.get_transaction_status()
    try:
        if status == extensions.TRANSACTION_STATUS_UNKNOWN or closed_flag.is_busy(conn):
            return False
        if status != extensions.TRANSACTION_STATUS_IDLE:
            conn.sharedpool_erred = status == extensions.TRANSACTION_STATUS_INERROR
            wrapper.as_user_sees(
                conn
            ).rollback()  # its user's: psycopg2.pool does it so, and who traces that sees it
        sync_transaction_status(conn)
        if conn.sharedpool_touched and settings_of(conn) != conn.sharedpool_session:
            autocommit, isolation_level, readonly, deferrable, conn.cursor_factory, encoding = (
                conn.sharedpool_session
            )
            conn.set_client_encoding(encoding)
            conn.set_session(
                isolation_level or "default",
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
