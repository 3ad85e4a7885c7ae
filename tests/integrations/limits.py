"""What can be seen from outside: who is in a query, and that no slot was lost."""

from collections.abc import Callable

from psycopg2.extensions import connection

import sharedpool


def stuck(server: connection, name: str) -> int:
    """Return how many of a pool's backends are in the query of ten minutes that the targets do."""
    with server.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name LIKE %s AND state = 'active' AND query LIKE 'SELECT pg_sleep(600%%'",
            [f"sharedpool {name} [%"],
        )
        (count,) = cursor.fetchone() or (0,)
        return int(count)


def all_slots(make_pool: Callable[..., sharedpool.Pool], name: str, limit: int) -> int:
    """Have all slots of a pool at once, in this process; return how many that were."""
    pool = make_pool(name=name, max_conn=limit, pool_manager=sharedpool.ThreadedConnectionPool)
    conns = [pool.get_conn(timeout=5) for _ in range(limit)]
    backends = {conn.info.backend_pid for conn in conns}
    pool.release_all()
    return len(backends)
