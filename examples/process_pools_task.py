"""What the processes of process_pools.py do: a module that they import, however they are started."""

import os

import sharedpool

# A process that was forked has this pool already, one that was spawned makes it when it imports this module, and both
# share the limit. A pool itself cannot be passed to another process, nor can a connection.
pool = sharedpool.config_pool(max_conn=2, name="process pools example")


def look(number: int) -> tuple[int, int]:
    """Work a little in the database; return the process that did, and the pool's connections on the server."""
    with pool.connection(timeout=30) as conn, conn.cursor() as cursor:
        cursor.execute(
            "SELECT count(*), pg_sleep(0.01) FROM pg_stat_activity WHERE application_name LIKE %s",
            ["sharedpool process pools example [%"],
        )
        return os.getpid(), cursor.fetchone()[0]
