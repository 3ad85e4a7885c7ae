"""Open a connection, and find out which backend it reaches.

Every connection keeps a duplicate of its socket, the *witness*. PostgreSQL keeps its end of the
connection open until the backend has exited (`socket_close` in its pqcomm.c). So an end of file on
the witness proves that the slot is free, if the server itself has sent it
(`postgres/peer_closed.py`, `postgres/route.py`). A plain `close()` only asks the backend to exit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg2
from psycopg2 import extensions

from sharedpool.descriptors.owned import identity
from sharedpool.errors import SharedPoolError
from sharedpool.postgres.conninfo import ConnInfo
from sharedpool.postgres.route import is_direct
from sharedpool.wire.values import Backend
from sharedpool.worker import greenlets
from sharedpool.worker.connection import wrapper
from sharedpool.worker.connection.closing import register
from sharedpool.worker.connection.connection import pooled_class
from sharedpool.worker.connection.pooled import PooledConnection

# libpq waits without limit by default; a pool must not.
CONNECT_LIMIT_S = 10
_EPOCH, _MICROSECOND = datetime.fromtimestamp(0, UTC), timedelta(microseconds=1)

# The times are read as text. Arithmetic on them would cost a new backend a fifth more, for the
# functions that it has to look up.
_DESCRIBE_SQL = """
SELECT a.pid, a.backend_start::text, pg_postmaster_start_time()::text,
       host(inet_client_addr()), inet_client_port(), host(inet_server_addr()), inet_server_port(),
       application_name
FROM pg_stat_get_activity(pg_backend_pid()) AS a
"""
# With it (PostgreSQL 14+) the backend of a dead worker notices even while it executes a query.
_CHECK_INTERVAL_SQL = """
SELECT set_config('client_connection_check_interval', '2s', false)
WHERE current_setting('client_connection_check_interval') = '0';
"""


def connect(
    conninfo: ConnInfo, application_name: str, timeout_s: float | None, made: list[PooledConnection]
) -> PooledConnection:
    """Open a connection. Blocks for its `connect_timeout` (10 s by default) or for `timeout_s`.

    The connection object is appended to `made` before it connects, so that no interrupt loses it.
    Raise psycopg2's errors, and those of a function that is asked for the password.
    """
    dsn = conninfo.current()
    given, named = conninfo.arguments(dsn)
    keywords = {**conninfo.python_kwargs, **named}
    factory = pooled_class(keywords.pop("connection_factory", None))
    parameters = extensions.parse_dsn(dsn)
    limit_s = _limit_connect(keywords, parameters, timeout_s)
    started = time.monotonic()
    if "fallback_application_name" not in parameters:
        keywords["fallback_application_name"] = application_name

    def make(dsn: str, **options: Any) -> PooledConnection:
        if made:  # a wrapper of psycopg2.connect tries again, or connects twice
            if failed:
                raise failed[0]
            raise SharedPoolError(
                "psycopg2.connect() is wrapped by code that connects twice; a pool has to count"
                " every connection"
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
        # Until it knows the client's encoding, the server writes its messages in its own encoding,
        # which psycopg2 does not expect.
        raise psycopg2.OperationalError(error.object.decode("utf-8", "replace").strip()) from None
    finally:
        failed.clear()  # the error refers to this frame
    if not made:
        returned.close()
        raise SharedPoolError(
            "psycopg2.connect() is wrapped by code that ignores connection_factory= and returned"
            f" {type(returned)!r}; a pool cannot lend out such a connection"
        )
    wrapper.attach(take_duplicate(made[0]), returned)
    return made[0]


def _limit_connect(
    keywords: dict[str, Any], parameters: Mapping[str, str], timeout_s: float | None
) -> float | None:
    """Set `connect_timeout` in `keywords` if libpq's own would differ; return the limit."""
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
    return limit_s


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def take_duplicate(conn: PooledConnection) -> PooledConnection:
    """Make a connection's witness, unless it has one."""
    if conn.sharedpool_witness < 0:
        conn.sharedpool_pid = os.getpid()
        conn.sharedpool_known = (identity(conn.fileno()),)
        register(conn, conn.fileno())
        conn.sharedpool_witness = os.dup(conn.fileno())
        register(conn, conn.sharedpool_witness)
    return conn


def describe(conn: PooledConnection) -> Backend:
    """Ask the server which backend this is, and find out whether a proxy is in between.

    If the server does not answer the query, only the pid is known. The query goes by psycopg2's own
    class: a user's class may need to be set up first, or may record what is executed.
    """
    plain = cast(Any, extensions.connection)
    plain.autocommit.__set__(conn, True)
    try:
        with plain.cursor(conn, cursor_factory=extensions.cursor) as cursor:
            prefix = _CHECK_INTERVAL_SQL if conn.server_version >= 140000 else ""
            # The comment tells a reader of pg_stat_activity whose last statement this was.
            cursor.execute("/* sharedpool */" + prefix + _DESCRIBE_SQL)
            row = cursor.fetchone()
            if row is None:
                return _unknown(conn)
            pid, start, boot, client, client_port, server, server_port, name = row
            start_us, boot_us = _microseconds(start or ""), _microseconds(boot or "")
            # A pooler invents the pid for cancel requests: it may change the session's backend.
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
    """Return the microseconds since 1970 of a timestamptz in ISO style, as psycopg2 requests it.

    They are as exact as `(extract(epoch FROM moment) * 1000000)::bigint`, by which the broker knows
    a backend. Raise ValueError.
    """
    return (datetime.fromisoformat(moment) - _EPOCH) // _MICROSECOND


def _unknown(conn: PooledConnection) -> Backend:
    conn.sharedpool_direct = False
    return Backend(conn.info.backend_pid)
