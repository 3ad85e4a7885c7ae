"""Ask the server one thing."""

from __future__ import annotations

from typing import Any

from psycopg2.extensions import connection

from sharedpool.wire.values import Backend


def ask(conn: connection, query: str = "SELECT pg_backend_pid()", *values: object) -> Any:
    """Return the only value in a query's first row; by default the backend's process id."""
    with conn.cursor() as cursor:
        cursor.execute(query, values or None)
        row: Any = cursor.fetchone()
    (value,) = row.values() if isinstance(row, dict) else row
    return value


def backend_of(conn: connection) -> Backend:
    """Return a connection's backend, as the control connection identifies it."""
    with conn.cursor() as cursor:
        cursor.execute(
            "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint,"
            " (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint"
            " FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        )
        row = cursor.fetchone()
        assert row is not None
    pid, started_us, server_us = row
    return Backend(pid, started_us, server_us, direct=True)
