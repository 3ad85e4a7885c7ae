"""A user's callbacks: `configure`, `check` and `reset`.

None runs under the pool's lock. `reset` for a connection that its user has dropped runs under
`reclaim_lock`, which its own thread may enter again (`LocalPool.reclaim`).
"""

from __future__ import annotations

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.state import sync_transaction_status
from sharedpool.worker.connection.wrapper import as_user_sees
from sharedpool.worker.settings import Callback


def run(pool: str, name: str, callback: Callback, conn: PooledConnection) -> bool:
    """Call a callback; return True if it left the connection open.

    Raise what it raises, and `psycopg2.ProgrammingError` if it left a transaction open.
    """
    callback(as_user_sees(conn))
    if conn.closed:
        return False
    if conn.get_transaction_status() != TRANSACTION_STATUS_IDLE:
        raise psycopg2.ProgrammingError(
            f"pool {pool!r}: {name}() left a transaction open on the connection:"
            " commit or roll back in it"
        )
    sync_transaction_status(conn)
    return True
