"""The tables in which hosts share limits: make them, and prepare a session for their use.

What a sync does in them is in `share_table.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import psycopg2
from psycopg2.errors import InsufficientPrivilege
from psycopg2.extensions import connection

CHANNEL = "sharedpool_shares"  # by which brokers wake each other

SCHEMA_SQL = """\
CREATE SCHEMA IF NOT EXISTS sharedpool;
CREATE TABLE IF NOT EXISTS sharedpool.limits (
  role name NOT NULL DEFAULT current_user,
  scope text NOT NULL CHECK (length(scope) <= 200),
  max_conn int NOT NULL CHECK (max_conn > 0),
  asked bigint NOT NULL DEFAULT 0 CHECK (asked BETWEEN 0 AND 1::bigint << 61),
  paused boolean NOT NULL DEFAULT false,
  hosts text NOT NULL DEFAULT '',
  lost_at timestamptz,
  home name NOT NULL DEFAULT '',
  PRIMARY KEY (role, scope)
);
CREATE UNLOGGED TABLE IF NOT EXISTS sharedpool.shares (
  role name NOT NULL DEFAULT current_user,
  scope text NOT NULL,
  instance text NOT NULL CHECK (length(instance) <= 40),
  host text NOT NULL CHECK (length(host) <= 100),
  pid int NOT NULL,
  started_us bigint NOT NULL,
  held int NOT NULL CHECK (held >= 0),
  wanted int NOT NULL CHECK (wanted >= 0),
  answered bigint NOT NULL DEFAULT 0,
  cut boolean NOT NULL DEFAULT false,
  spare int NOT NULL DEFAULT 0,
  unnamed text NOT NULL DEFAULT '',
  ttl_s float8 NOT NULL DEFAULT 15 CHECK (ttl_s BETWEEN 0 AND 1e9),
  told_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (role, scope, instance)
);
ALTER TABLE sharedpool.limits ENABLE ROW LEVEL SECURITY;
ALTER TABLE sharedpool.shares ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS own_rows ON sharedpool.limits;
CREATE POLICY own_rows ON sharedpool.limits USING (role = current_user);
DROP POLICY IF EXISTS own_rows ON sharedpool.shares;
CREATE POLICY own_rows ON sharedpool.shares USING (role = current_user);
GRANT USAGE ON SCHEMA sharedpool TO PUBLIC;
GRANT SELECT, INSERT, UPDATE, DELETE ON sharedpool.limits, sharedpool.shares TO PUBLIC;
"""
# Two brokers that make the tables at once would fail on each other's half: one at a time.
_CREATE_SQL = f"BEGIN; SELECT pg_advisory_xact_lock(%s); {SCHEMA_SQL} COMMIT"
_CREATE_LOCK = int.from_bytes(b"shpl-ddl", "big")

_STATE_SQL = """
SELECT pg_is_in_recovery(), to_regclass('sharedpool.shares') IS NOT NULL,
       pg_backend_pid(), (extract(epoch FROM backend_start) * 1000000)::bigint
FROM pg_stat_get_activity(pg_backend_pid())
"""
# A session that holds the lock must not stop the other hosts: its process may be frozen, its
# network cut. Nor may one that was cut off seem to have ended by itself, which would prove that its
# host is gone: the server waits for longer than any of its connects may take.
_SETTINGS = {
    "statement_timeout": "5s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "2s",
    "idle_session_timeout": "0",
    # Only a limit's hosts and terms must not be lost with the server: see `_DURABLE_SQL`.
    "synchronous_commit": "off",
    "tcp_keepalives_idle": "60",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "6",
    "tcp_user_timeout": "120s",
    # Whatever the role's defaults are: a statement sees all that was committed before it.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
}
# Older servers do not know all of them.
_SETTINGS_SQL = """
SELECT set_config(name, value, false)
FROM unnest(%s::text[], %s::text[]) AS wanted (name, value) JOIN pg_settings USING (name)
"""
_VOID_SQL = """
DELETE FROM sharedpool.shares
WHERE role = current_user AND told_at < pg_postmaster_start_time()
"""


class CannotShare(Exception):
    """A limit cannot be shared at this server or by this role; the text says why."""


@dataclass(frozen=True, slots=True)
class Registration:
    """How a broker's rows name it. The session's pid and start tell whether its host lives."""

    instance: str
    host: str
    pid: int
    started_us: int
    ttl_s: float


def open_table(conn: connection, instance: str, host: str, ttl_s: float) -> Registration:
    """Prepare a session for `sync`; make the tables if there are none.

    Raise `CannotShare`, or psycopg2's errors.
    """
    conn.autocommit = True
    with conn.cursor() as cursor:
        cursor.execute(_SETTINGS_SQL, (list(_SETTINGS), list(_SETTINGS.values())))
        cursor.execute(_STATE_SQL)
        in_recovery, exists, pid, started_us = cursor.fetchone() or (False, False, 0, 0)
        if pid != conn.info.backend_pid:  # a pooler tells its clients a key of its own
            raise CannotShare("the server is reached through a pooler")
        if in_recovery:
            raise CannotShare("the server is a standby, which takes no writes")
        if not exists:
            _create(conn)
        cursor.execute(_VOID_SQL)
        cursor.execute(f"LISTEN {CHANNEL}")
    return Registration(instance, host, pid, started_us, ttl_s)


def create(conn: connection) -> None:
    """Make the tables if there are none. Raise psycopg2's errors."""
    conn.autocommit = True
    with conn.cursor() as cursor:
        try:
            cursor.execute(_CREATE_SQL, (_CREATE_LOCK,))
        except psycopg2.Error:
            if not conn.closed:
                cursor.execute("ROLLBACK")
            raise


def _create(conn: connection) -> None:
    try:
        create(conn)
    except InsufficientPrivilege:
        info = conn.info
        raise CannotShare(
            f"role {info.user} may not make the tables for that in database {info.dbname}. An"
            " administrator can, with `sharedpool init-db` or the SQL that `sharedpool init-db"
            " --print` prints"
        ) from None
