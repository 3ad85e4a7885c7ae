"""What PostgreSQL says that backends are doing, as far as the control connection may see it."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg2.extensions import connection, encodings

from sharedpool.wire.messages import Backend
from sharedpool.wire.reports import BackendActivity

_QUERY_SHOWN = 60  # characters

# A backend of a database with another encoding may show text that is none in ours: so it is fetched as bytes. Where
# the role may not see more (it needs pg_read_all_stats, or to be the same one) `state` and `backend_start` are NULL.
_ACTIVITY_SQL = """
SELECT pid, coalesce((extract(epoch FROM backend_start) * 1000000)::bigint, 0),
       textsend(coalesce(application_name, '')), state IS NOT NULL, coalesce(state, ''),
       coalesce(wait_event_type || ': ' || wait_event, ''), substring(textsend(coalesce(query, '')) FROM 1 FOR 400)
FROM pg_stat_activity WHERE pid = ANY(%s)
"""


def activity_of(conn: connection, backends: Sequence[Backend]) -> list[BackendActivity]:
    """Return what the server says of those of these backends that are there. Raise psycopg2's errors."""
    exact = {(backend.pid, backend.start_us): backend for backend in backends}
    by_pid = {backend.pid: backend for backend in backends}
    codec = encodings.get(conn.encoding, "utf-8")
    found = []
    with conn.cursor() as cursor:
        cursor.execute(_ACTIVITY_SQL, [list(by_pid)])
        for pid, start_us, application, visible, state, wait_event, query in cursor.fetchall():
            # Start time 0: hidden from one side, so that the pid alone tells.
            backend = exact.get((pid, start_us)) or (
                by_pid[pid] if 0 in (start_us, by_pid[pid].start_us) else None
            )
            if backend is not None:
                tag, text = _plain(application, codec), _plain(query, codec) if visible else ""
                found.append(
                    BackendActivity(backend, tag, visible, state, wait_event, text[:_QUERY_SHOWN])
                )
    return found


def _plain(raw: memoryview, codec: str) -> str:
    """Return text for a terminal: a line of it, without control characters."""
    text = " ".join(bytes(raw).decode(codec, "replace").split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
