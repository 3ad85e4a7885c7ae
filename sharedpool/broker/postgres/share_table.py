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
from typing import Any

from psycopg2.extensions import connection

from sharedpool.broker.core.commands import SyncShare
from sharedpool.broker.core.host_presence import SILENT_S, Listed, Presence
from sharedpool.broker.core.share_sync import SyncDecision, decide_sync
from sharedpool.broker.core.share_terms import LimitRow, Wakeup
from sharedpool.broker.core.shares import HostShare
from sharedpool.broker.postgres import statements
from sharedpool.broker.postgres.share_schema import CHANNEL, Registration

# Whom a NOTIFY is for, the newest question, the sender's instance, what it holds and wants; scope.
_PAYLOAD = re.compile(
    r"([^|]*)\|([0-9]{1,18})\|([^|]*)\|([0-9]{1,9})\|([0-9]{1,9})\|(.*)", re.DOTALL
)
_MOST_PAYLOAD = 7500  # bytes; PostgreSQL's limit is 8000

_LOCK_SQL = """
BEGIN;
SELECT FROM sharedpool.limits WHERE role = current_user AND scope = %(scope)s FOR UPDATE;
SELECT max_conn, asked, paused, CASE row_number() OVER () WHEN 1 THEN hosts END,
       extract(epoch FROM clock_timestamp() - lost_at)::float8, home,
       instance, host, pid, started_us, held, wanted, answered, cut,
       greatest(0, extract(epoch FROM clock_timestamp() - told_at))::float8, spare, unnamed, ttl_s
FROM sharedpool.limits LEFT JOIN sharedpool.shares USING (role, scope)
WHERE role = current_user AND scope = %(scope)s
"""
_INSERT_SQL = """
INSERT INTO sharedpool.limits (scope, max_conn) VALUES (%(scope)s, %(max_conn)s)
ON CONFLICT DO NOTHING;
"""
_FIRST_SQL = f"ROLLBACK; {_INSERT_SQL}"
_HOME_SQL = """
SELECT home, hosts <> '' OR EXISTS (
    SELECT FROM sharedpool.shares AS used
    WHERE used.role = limits.role AND used.scope = limits.scope)
FROM sharedpool.limits WHERE role = current_user AND scope = %(scope)s
"""
_MOVE_SQL = """
UPDATE sharedpool.limits SET home = %(home)s WHERE role = current_user AND scope = %(scope)s;
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
WHERE role = current_user AND scope = %(scope)s AND hosts = '' AND home = ''
  AND NOT EXISTS (SELECT FROM sharedpool.shares AS other
                  WHERE other.role = empty.role AND other.scope = empty.scope);
"""
_END_SQL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = %s AND (extract(epoch FROM backend_start) * 1000000)::bigint = %s
"""


class SharedElsewhere(Exception):
    """The hosts of a limit share it in another database, `home`."""

    def __init__(self, home: str) -> None:
        super().__init__(home)
        self.home = home


def agreed_home(conn: connection, scope: str) -> str | None:
    """Return the database in which the hosts of a limit share it; empty: the session's own.

    None: nothing is agreed yet. Blocks for a round trip. Raise psycopg2's errors.
    """
    with conn.cursor() as cursor:
        cursor.execute(_HOME_SQL, {"scope": scope})
        home, is_used = cursor.fetchone() or ("", False)
    return str(home) if home or is_used else None


def agree_on_home(conn: connection, scope: str, max_conn: int, wanted: str) -> str:
    """Agree on the database `wanted`, unless something else is agreed by now; return what is.

    The first host decides, for good. Blocks for two round trips. Raise psycopg2's errors.
    """
    with conn.cursor() as cursor:
        try:
            parameters = {"scope": scope, "max_conn": max_conn}
            cursor.execute(f"BEGIN; {_INSERT_SQL} {_HOME_SQL} FOR UPDATE", parameters)
            home, is_used = cursor.fetchone() or ("", True)
            if not (home or is_used):
                home = wanted
                cursor.execute(_DURABLE_SQL + _MOVE_SQL, {"scope": scope, "home": home})
            cursor.execute("COMMIT")
        except BaseException:
            if not conn.closed:
                cursor.execute("ROLLBACK")
            raise
    return str(home)


def sync(
    conn: connection, me: Registration, order: SyncShare, presence: Presence, scope: str
) -> SyncDecision:
    """Change this host's share of a limit as is fair, in one transaction. `scope`: its name here.

    Blocks for two round trips, more while other hosts hold the lock. Raise `SharedElsewhere`, or
    psycopg2's errors.
    """
    with conn.cursor() as cursor:
        try:
            rows = _lock(cursor, scope, order.max_conn)
            max_conn, asked, paused, hosts, lost_s, home = rows[0][:6]
            if home:
                raise SharedElsewhere(home)
            limit = LimitRow(max_conn, asked, paused, tuple(hosts.split()), lost_s)
            listed = [Listed(*row[6:]) for row in rows if row[6] is not None]
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
                    "channel": CHANNEL,
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


def leave(conn: connection, me: Registration, scope: str, to_wake: Iterable[str]) -> None:
    """Give a share back, and wake the other hosts. Raise psycopg2's errors."""
    names = tuple(to_wake)
    parameters = {
        "scope": scope,
        "instance": me.instance,
        "channel": CHANNEL,
        "payload": _payload(scope, names, HostShare(me.instance, 0, 0)),
    }
    with conn.cursor() as cursor:
        try:
            cursor.execute(_LEAVE_SQL + _notify_sql(names) + "COMMIT", parameters)
        except BaseException:
            if not conn.closed:  # other limits use the session
                cursor.execute("ROLLBACK")
            raise


def look(conn: connection, presence: Presence, now: float) -> None:
    """See which brokers and workers have sessions on the server. Raise psycopg2's errors."""
    starting, sessions = statements.survey(conn, "%")
    presence.seen(
        starting,
        [(pid, start_us, name) for pid, start_us, name, _ in sessions],
        now,
        {(pid, start_us): database for pid, start_us, _, database in sessions},
    )


def end_silent(conn: connection, presence: Presence, scope: str, rows: Iterable[Listed]) -> None:
    """End the sessions of hosts that have been silent for too long; mark their rows before.

    Only a host that is still silent is marked, and only once: what it did not have in use then may
    be granted, and is not free yet.
    """
    for row in rows:
        with conn.cursor() as cursor:
            cursor.execute(
                _CUT_SQL,
                {
                    "scope": scope,
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
