"""The task of process_pools.py, in a module that its processes can import."""

import os

import sharedpool

# A forked process has this pool already, and a spawned process makes it when it imports this
# module. All share the limit. A pool or a connection cannot be passed to another process.
pool = sharedpool.config_pool(max_conn=2, name="process pools example")


def look(number: int) -> tuple[int, int]:
    """Run a query. Return this process's id, and the number of the pool's connections."""
    with pool.connection(timeout=30) as conn, conn.cursor() as cursor:
        cursor.execute(
            "SELECT count(*), pg_sleep(0.01) FROM pg_stat_activity WHERE application_name LIKE %s",
            ["sharedpool process pools example [%"],
        )
        return os.getpid(), cursor.fetchone()[0]
