"""The table in which the brokers of all hosts keep their shares, and one sync as a transaction.

The tables are in the protected database itself, or in another one of its server. Every broker
reaches them anyway, with the server's own authentication and encryption.

- `limits` has a row for each limit that is shared. The lock of that row is the one lock there is.
- `shares` has a row for each host's share of a limit.

`shares` is UNLOGGED: a crash of the server empties it, and ends every connection that it counts.
After a clean restart or a failover, rows that are older than the server's start are void for the
same reason. `limits` outlives that, with the names of the hosts whose shares were lost.

Each role sees its own rows only (row-level security): two roles never share a limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psycopg2
from psycopg2.errors import InsufficientPrivilege
from psycopg2.extensions import connection

from sharedpool.broker.core.commands import SyncShare
from sharedpool.broker.core.host_presence import SILENT_S, Listed, Presence
from sharedpool.broker.core.share_sync import SyncDecision, decide_sync
from sharedpool.broker.core.share_terms import LimitRow, ShareKey, Wakeup
from sharedpool.broker.core.shares import HostShare
from sharedpool.broker.postgres import statements

_CHANNEL = "sharedpool_shares"
# Whom a NOTIFY is for, the newest question, the sender's instance, what it holds and wants; scope.
_PAYLOAD = re.compile(
    r"([^|]*)\|([0-9]{1,18})\|([^|]*)\|([0-9]{1,9})\|([0-9]{1,9})\|(.*)", re.DOTALL
)
_MOST_PAYLOAD = 7500  # bytes; PostgreSQL's limit is 8000

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
_LOCK_SQL = """
BEGIN;
SELECT FROM sharedpool.limits WHERE role = current_user AND scope = %(scope)s FOR UPDATE;
SELECT max_conn, asked, paused, CASE row_number() OVER () WHEN 1 THEN hosts END,
       extract(epoch FROM clock_timestamp() - lost_at)::float8,
       instance, host, pid, started_us, held, wanted, answered, cut,
       greatest(0, extract(epoch FROM clock_timestamp() - told_at))::float8, spare, unnamed, ttl_s
FROM sharedpool.limits LEFT JOIN sharedpool.shares USING (role, scope)
WHERE role = current_user AND scope = %(scope)s
"""
_FIRST_SQL = """
ROLLBACK;
INSERT INTO sharedpool.limits (scope, max_conn) VALUES (%(scope)s, %(max_conn)s)
ON CONFLICT DO NOTHING
"""
_FORGET_SQL = """
DELETE FROM sharedpool.shares
WHERE role = current_user AND scope = %(scope)s AND instance = ANY(%(gone)s);
"""
_LOWER_SQL = """
UPDATE sharedpool.shares SET held = least(held, lowered.held)
FROM unnest(%(lowered)s::text[], %(most)s::int[]) AS lowered (instance, held)
WHERE role = current_user AND scope = %(scope)s AND shares.instance = lowered.instance;
"""
_CUT_SQL = """
UPDATE sharedpool.shares SET cut = true, spare = greatest(0, held - %(in_use)s)
WHERE role = current_user AND scope = %(scope)s AND instance = %(instance)s
  AND pid = %(pid)s AND started_us = %(started_us)s AND NOT cut
  AND clock_timestamp() - told_at > make_interval(secs => %(silent_s)s)
"""
_WRITE_SQL = """
INSERT INTO sharedpool.shares (scope, instance, host, pid, started_us, held, wanted, answered,
                               unnamed, ttl_s)
VALUES (%(scope)s, %(instance)s, %(host)s, %(pid)s, %(started_us)s, %(held)s,
        %(wanted)s, %(answered)s, %(unnamed)s, %(ttl_s)s)
ON CONFLICT (role, scope, instance) DO UPDATE
SET host = excluded.host, pid = excluded.pid, started_us = excluded.started_us,
    held = excluded.held, wanted = excluded.wanted, answered = excluded.answered, cut = false,
    unnamed = excluded.unnamed, ttl_s = excluded.ttl_s,
    told_at = clock_timestamp();
"""
_LIMIT_SQL = """
UPDATE sharedpool.limits SET max_conn = %(max_conn)s, asked = %(asked)s,
    paused = %(paused)s, hosts = %(hosts)s,
    lost_at = CASE WHEN %(lost)s THEN coalesce(lost_at, clock_timestamp()) END
WHERE role = current_user AND scope = %(scope)s;
"""
_DURABLE_SQL = "SET LOCAL synchronous_commit = local;"
_LEAVE_SQL = """
BEGIN;
SELECT FROM sharedpool.limits WHERE role = current_user AND scope = %(scope)s FOR UPDATE;
DELETE FROM sharedpool.shares
WHERE role = current_user AND scope = %(scope)s AND instance = %(instance)s;
UPDATE sharedpool.limits
SET hosts = array_to_string(array_remove(string_to_array(hosts, ' '), %(instance)s), ' ')
WHERE role = current_user AND scope = %(scope)s;
DELETE FROM sharedpool.limits AS empty
WHERE role = current_user AND scope = %(scope)s AND hosts = ''
  AND NOT EXISTS (SELECT FROM sharedpool.shares AS other
                  WHERE other.role = empty.role AND other.scope = empty.scope);
"""
_END_SQL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = %s AND (extract(epoch FROM backend_start) * 1000000)::bigint = %s
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
        cursor.execute(f"LISTEN {_CHANNEL}")
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


def sync(conn: connection, me: Registration, order: SyncShare, presence: Presence) -> SyncDecision:
    """Change this host's share of a limit as is fair, in one transaction.

    Blocks for two round trips, more while other hosts hold the lock. Raise psycopg2's errors.
    """
    scope = order.key.scope
    with conn.cursor() as cursor:
        try:
            rows = _lock(cursor, scope, order.max_conn)
            max_conn, asked, paused, hosts, lost_s = rows[0][:5]
            limit = LimitRow(max_conn, asked, paused, tuple(hosts.split()), lost_s)
            listed = [Listed(*row[5:]) for row in rows if row[5] is not None]
            decision = decide_sync(me.instance, order, limit, listed, presence)
            division = decision.result.division
            cursor.execute(
                _change_sql(limit, decision)
                + (_FORGET_SQL if decision.gone else "")
                + (_LOWER_SQL if decision.lowered else "")
                + _WRITE_SQL
                + _notify_sql(decision.to_wake)
                + "COMMIT",
                {
                    "scope": scope,
                    "gone": list(decision.gone),
                    "lowered": list(decision.lowered),
                    "most": list(decision.lowered.values()),
                    "instance": me.instance,
                    "host": me.host,
                    "pid": me.pid,
                    "started_us": me.started_us,
                    "held": division.held,
                    "wanted": order.claim.wanted,
                    "answered": division.answered,
                    "unnamed": decision.unnamed,
                    "ttl_s": me.ttl_s,
                    "max_conn": decision.result.max_conn,
                    "asked": decision.asked,
                    "paused": decision.result.paused,
                    "hosts": " ".join(decision.hosts),
                    "lost": decision.lost,
                    "channel": _CHANNEL,
                    "payload": _payload(
                        scope,
                        decision.to_wake,
                        HostShare(me.instance, division.held, order.claim.wanted),
                        decision.asked,
                    ),
                },
            )
        except BaseException:
            if not conn.closed:
                cursor.execute("ROLLBACK")
            raise
    return decision


def _change_sql(limit: LimitRow, decision: SyncDecision) -> str:
    """Return what is to be done to the limit's row."""
    terms = decision.result.max_conn, decision.result.paused, decision.hosts
    if terms != (limit.max_conn, limit.paused, limit.hosts):
        return _DURABLE_SQL + _LIMIT_SQL
    is_changed = decision.asked != limit.asked or decision.lost != (limit.lost_s is not None)
    return _LIMIT_SQL if is_changed else ""


def _lock(cursor: Any, scope: str, max_conn: int) -> list[Any]:
    """Lock a limit's row, made if there is none; return it with all its shares."""
    parameters = {"scope": scope, "max_conn": max_conn}
    cursor.execute(_LOCK_SQL, parameters)
    rows = cursor.fetchall()
    while not rows:
        cursor.execute(_FIRST_SQL, parameters)
        cursor.execute(_LOCK_SQL, parameters)
        rows = cursor.fetchall()
    return list(rows)


def leave(conn: connection, me: Registration, key: ShareKey, to_wake: Iterable[str]) -> None:
    """Give a share back, and wake the other hosts. Raise psycopg2's errors."""
    with conn.cursor() as cursor:
        names = tuple(to_wake)
        cursor.execute(
            _LEAVE_SQL + _notify_sql(names) + "COMMIT",
            {
                "scope": key.scope,
                "instance": me.instance,
                "channel": _CHANNEL,
                "payload": _payload(key.scope, names, HostShare(me.instance, 0, 0)),
            },
        )


def look(conn: connection, presence: Presence, now: float) -> None:
    """See which brokers and workers have sessions on the server. Raise psycopg2's errors."""
    starting, sessions = statements.survey(conn, "%")
    here = conn.info.dbname
    presence.seen(
        starting,
        [(pid, start_us, name) for pid, start_us, name, _ in sessions],
        now,
        {(pid, start_us) for pid, start_us, _, database in sessions if database != here},
    )


def end_silent(conn: connection, presence: Presence, key: ShareKey, rows: Iterable[Listed]) -> None:
    """End the sessions of hosts that have been silent for too long; mark their rows before.

    Only a host that is still silent is marked, and only once: what it did not have in use then may
    be granted, and is not free yet.
    """
    for row in rows:
        with conn.cursor() as cursor:
            cursor.execute(
                _CUT_SQL,
                {
                    "scope": key.scope,
                    "instance": row.instance,
                    "pid": row.pid,
                    "started_us": row.started_us,
                    "in_use": len(presence.backends_of(row)),
                    "silent_s": SILENT_S,
                },
            )
            if not cursor.rowcount and not row.cut:
                continue  # it has spoken again
            for pid, start_us in presence.sessions_of(row):
                cursor.execute(_END_SQL, (pid, start_us))


def woken(conn: connection, instance: str) -> list[tuple[str, Wakeup]]:
    """Return the scopes in which other brokers want this one to look; does not block."""
    conn.poll()
    found = []
    while conn.notifies:
        notify = conn.notifies.pop(0)
        if (fields := _PAYLOAD.fullmatch(notify.payload)) is None:
            continue
        names, asked, sender, held, wanted, scope = fields.groups()
        if names == "*" or instance in names.split():
            host = HostShare(sender, int(held), int(wanted))
            found.append((scope, Wakeup(int(asked), host, notify.pid)))
    return found


def _notify_sql(names: tuple[str, ...]) -> str:
    return "SELECT pg_notify(%(channel)s, %(payload)s);" if names else ""


def _payload(scope: str, names: tuple[str, ...], me: HostShare, asked: int = 0) -> str:
    listed = " ".join(names)
    told = f"{asked}|{me.instance}|{me.held}|{me.wanted}|{scope}"
    return f"{listed if len(listed) < _MOST_PAYLOAD - 4 * len(told) else '*'}|{told}"
