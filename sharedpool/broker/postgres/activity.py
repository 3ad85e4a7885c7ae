"""What backends are doing, as far as the server shows it to the control connection's role."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg2.extensions import connection, encodings

from sharedpool.wire.reports import BackendActivity
from sharedpool.wire.values import Backend

_QUERY_SHOWN = 60  # characters

# Texts are fetched as bytes: in a database with another encoding they may be invalid in ours.
# `state` and `backend_start` are NULL unless the role has pg_read_all_stats, or is the backend's.
_ACTIVITY_SQL = """
SELECT pid, coalesce((extract(epoch FROM backend_start) * 1000000)::bigint, 0),
       textsend(coalesce(application_name, '')), state IS NOT NULL, coalesce(state, ''),
       coalesce(wait_event_type || ': ' || wait_event, ''),
       substring(textsend(coalesce(query, '')) FROM 1 FOR 400)
FROM pg_stat_activity WHERE pid = ANY(%s)
"""


def activity_of(conn: connection, backends: Sequence[Backend]) -> list[BackendActivity]:
    """Return the activity of those backends that are listed. Raise psycopg2's errors."""
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
