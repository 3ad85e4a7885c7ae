"""The SQL statements of the control connection, one function for each.

All functions block for a round trip or two, and raise psycopg2's errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import psycopg2
from psycopg2.extensions import connection, cursor, encodings

from sharedpool.postgres import libpq
from sharedpool.postgres.route import is_direct
from sharedpool.wire.reports import BackendActivity
from sharedpool.wire.values import Backend

_SERVER_SQL = """
SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,
       coalesce(host(inet_server_addr()) || ':' || inet_server_port(), '')
"""
# In one statement, lest a balancer sends its parts to two servers. A role may be kept from
# pg_control_system(), and what only resembles PostgreSQL does not have it.
_PRIMARY_SQL = """
SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,
       coalesce(host(inet_server_addr()) || ':' || inet_server_port(), ''),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN NOT pg_is_in_recovery()
            THEN substring(pg_walfile_name(pg_current_wal_lsn()) FOR 8) END
"""
_ROOM_SQL = """
SELECT sum(CASE name WHEN 'max_connections' THEN setting::int ELSE -setting::int END)
FROM pg_settings
WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')
"""
# A superuser's CONNECTION LIMIT is not enforced.
_ROLE_SQL = """
SELECT rolname, CASE WHEN rolconnlimit >= 0 AND NOT rolsuper THEN rolconnlimit END
FROM pg_roles WHERE rolname = session_user
"""
# Limits of the role or the server against misbehaving clients: each could end this session.
_LIMITS = (
    "idle_session_timeout",
    "idle_in_transaction_session_timeout",
    "statement_timeout",
    "lock_timeout",
    "transaction_timeout",
)
_UNLIMITED_SQL = (
    "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = ANY(%s) AND setting <> '0'"
)
# One statement, so that the pid cannot become another process's before the signal.
_FENCE_SQL = """
SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint, pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE (pid, coalesce((extract(epoch FROM backend_start) * 1000000)::bigint, 0)) IN
      (SELECT * FROM unnest(%s::int[], %s::bigint[]))
"""
# The same for a backend that a pooler may have given to another client: see `fencing.py`.
_FENCE_LENT_SQL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = %s AND (extract(epoch FROM backend_start) * 1000000)::bigint = %s
      AND application_name = %s
      AND coalesce((extract(epoch FROM query_start) * 1000000)::bigint, 0) <= %s
      AND (state <> 'idle' OR %s)
"""
_LISTED_SQL = """
SELECT pid, coalesce((extract(epoch FROM backend_start) * 1000000)::bigint, 0),
       coalesce(application_name, ''), coalesce(state = 'idle', false),
       coalesce((extract(epoch FROM query_start) * 1000000)::bigint, 0),
       (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
FROM pg_stat_activity WHERE pid = ANY(%s)
"""
_ENDS_SQL = """
SELECT pg_backend_pid(), host(inet_client_addr()), inet_client_port(),
       host(inet_server_addr()), inet_server_port()
"""
_ITSELF_SQL = b"SELECT pid || ' ' || backend_start FROM pg_stat_get_activity(pg_backend_pid())"
_ANSWER_LIMIT_S = 2.0
# No row: it has ended. (null, true): another backend has its pid. (null, false): this role cannot
# see when it was started.
_CANCEL_SQL = """
SELECT CASE coalesce((extract(epoch FROM backend_start) * 1000000)::bigint, 0)
       WHEN %s THEN pg_cancel_backend(pid) END,
       backend_start IS NOT NULL
FROM pg_stat_activity WHERE pid = %s
"""
# A backend holds the lock on its virtual transaction while it authenticates its client, before it
# is in pg_stat_activity (PostgreSQL's InitPostgres). Since PostgreSQL 18 it is listed there all
# along, without user and database until it is authenticated. The locks are read first, so that a
# backend that finishes its start in between is in the second answer.
_STARTING_SQL = "SELECT pid FROM pg_locks WHERE locktype = 'virtualxid' AND pid <> pg_backend_pid()"
_SURVEY_SQL = """
SELECT pid, coalesce((extract(epoch FROM backend_start) * 1000000)::bigint, 0),
       coalesce(application_name, ''), coalesce(application_name LIKE %s, false),
       datid IS NULL AND usesysid IS NULL, coalesce(datname, '')
FROM pg_stat_activity
"""
# Texts are fetched as bytes: in a database with another encoding they may be invalid in ours.
# `state` and `backend_start` are NULL unless the role has pg_read_all_stats, or is the backend's.
_ACTIVITY_SQL = """
SELECT pid, coalesce((extract(epoch FROM backend_start) * 1000000)::bigint, 0),
       textsend(coalesce(application_name, '')), state IS NOT NULL, coalesce(state, ''),
       coalesce(wait_event_type || ': ' || wait_event, ''),
       substring(textsend(coalesce(query, '')) FROM 1 FOR 400)
FROM pg_stat_activity WHERE pid = ANY(%s)
"""
_QUERY_SHOWN = 60  # characters


class ListedBackend(NamedTuple):
    """A row of pg_stat_activity. Times are microseconds since 1970, by the server's clock."""

    start_us: int  # when the backend was started; 0 if this role cannot see it
    name: str  # its application_name
    idle: bool  # outside a transaction
    query_us: int  # when its last query began
    now_us: int  # when the row was read


class ServerFacts(NamedTuple):
    """Which server a connection is on."""

    boot_us: int  # when it was started, in microseconds since 1970
    address: str  # its own; empty on a unix socket
    system: int | None = None  # a primary's identifier, which its replicas share; None if unknown
    timeline: int = 0  # a primary's, which each promotion raises
    is_replica: bool = False


def route_of(conn: connection) -> tuple[bool, bool]:
    """Return whether a connection is direct, and whether it goes through a pooler."""
    with conn.cursor() as cursor:
        cursor.execute(_ENDS_SQL)
        row = cursor.fetchone()
        assert row is not None
    pid, client, client_port, server, server_port = row
    if pid != conn.info.backend_pid:  # a pooler tells its clients a key of its own for cancels
        return False, True
    return is_direct(
        conn.fileno(),
        pid,
        None if client is None else ((client, client_port), (server, server_port)),
    ), False


def itself(conn: connection) -> bytes | None:
    """Return which backend a connection is on now; None if it gets none in two seconds."""
    return libpq.ask(conn, _ITSELF_SQL, _ANSWER_LIMIT_S)


def server_of(conn: connection) -> ServerFacts:
    """Return which server a connection is on."""
    with conn.cursor() as cursor:
        try:
            cursor.execute(_PRIMARY_SQL)
        except psycopg2.DatabaseError:
            if conn.closed:
                raise
            cursor.execute(_SERVER_SQL)
            row = (*_row_of(cursor), None, None)
        else:
            row = _row_of(cursor)
    boot_us, address, system, timeline = row
    if timeline is None:
        return ServerFacts(boot_us, address, is_replica=system is not None)
    return ServerFacts(boot_us, address, system, int(timeline, 16))


def _row_of(cursor: cursor) -> tuple[Any, ...]:
    row = cursor.fetchone()
    assert row is not None
    return row


def lift_limits(conn: connection) -> None:
    """Switch off the time limits that could end this session or its queries."""
    with conn.cursor() as cursor:
        cursor.execute(_UNLIMITED_SQL, (list(_LIMITS),))


def room_of(conn: connection) -> int:
    """Return how many connections the server has for ordinary users."""
    with conn.cursor() as cursor:
        cursor.execute(_ROOM_SQL)
        row = cursor.fetchone()
        assert row is not None
        return int(row[0])


def role_of(conn: connection) -> tuple[str, int | None]:
    """Return a connection's role, and that role's CONNECTION LIMIT (None: any number)."""
    with conn.cursor() as cursor:
        cursor.execute(_ROLE_SQL)
        row = cursor.fetchone()
        assert row is not None
        return row[0], row[1]


def end(conn: connection, backends: Sequence[Backend]) -> None:
    """Terminate those backends that are still there. If one must not be, none is terminated."""
    with conn.cursor() as cursor:
        cursor.execute(_FENCE_SQL, ([b.pid for b in backends], [b.start_us for b in backends]))


def cancel(conn: connection, backend: Backend) -> bool | None:
    """Cancel a backend's query.

    Return True if that was done, False if this role may not, None if the backend is gone.
    """
    try:
        with conn.cursor() as cursor:
            cursor.execute(_CANCEL_SQL, (backend.start_us, backend.pid))
            done, visible = cursor.fetchone() or (None, True)
    except psycopg2.errors.InsufficientPrivilege:
        return False
    return done if visible else bool(done)


def end_lent(conn: connection, backend: Backend, since_us: int, *, idle: bool) -> None:
    """Terminate a pooler's backend unless another client has it; an idle one only if `idle`."""
    with conn.cursor() as cursor:
        cursor.execute(
            _FENCE_LENT_SQL, (backend.pid, backend.start_us, backend.pooled, since_us, idle)
        )


def listed(conn: connection, pids: Iterable[int]) -> dict[int, ListedBackend]:
    """Return the rows of those pids that are backends."""
    with conn.cursor() as cursor:
        cursor.execute(_LISTED_SQL, (list(pids),))
        return {pid: ListedBackend(*seen) for pid, *seen in cursor.fetchall()}


def survey(
    conn: connection, pattern: str
) -> tuple[frozenset[int], list[tuple[int, int, str, str]]]:
    """Return the pids of backends in start-up, and the backends whose tag is LIKE `pattern`.

    The latter as (pid, start time, tag, database).
    """
    with conn.cursor() as cursor:
        cursor.execute(_STARTING_SQL)
        with_lock = {pid for (pid,) in cursor.fetchall()}
        cursor.execute(_SURVEY_SQL, [pattern])
        rows = cursor.fetchall()
    starting = frozenset(with_lock - {pid for pid, _, _, _, unnamed, _ in rows if not unnamed})
    return starting, [
        (pid, start_us, tag, database) for pid, start_us, tag, ours, _, database in rows if ours
    ]


def activity_of(conn: connection, backends: Sequence[Backend]) -> list[BackendActivity]:
    """Return what those backends are doing, as far as this role sees it."""
    exact = {(backend.pid, backend.start_us): backend for backend in backends}
    by_pid = {backend.pid: backend for backend in backends}
    codec = encodings.get(conn.encoding, "utf-8")
    found = []
    with conn.cursor() as cursor:
        cursor.execute(_ACTIVITY_SQL, [list(by_pid)])
        for pid, start_us, application, visible, state, wait_event, query in cursor.fetchall():
            backend = exact.get((pid, start_us))
            # Start time 0: one side cannot see it, so the pid alone must do.
            if backend is None and 0 in (start_us, by_pid[pid].start_us):
                backend = by_pid[pid]
            if backend is not None:
                tag, text = _plain(application, codec), _plain(query, codec) if visible else ""
                found.append(
                    BackendActivity(backend, tag, visible, state, wait_event, text[:_QUERY_SHOWN])
                )
    return found


def _plain(raw: memoryview, codec: str) -> str:
    """Return a text for a terminal: one line, without control characters."""
    text = " ".join(bytes(raw).decode(codec, "replace").split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
