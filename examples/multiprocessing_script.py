"""Eight processes, three connections: the workers of a process pool share one limit.

    $ python examples/multiprocessing_script.py

DATABASE_URL must name the database, such as postgresql://user:password@localhost:5432/app.

Prints how many queries were done, by how many processes, and the most connections that the server
itself had at any moment, beside the limit. Exits with 1 if that was more than the limit.
"""

import concurrent.futures
import os
import sys
from contextlib import closing

import psycopg2

import sharedpool

PROCESSES, LIMIT, QUERIES = 8, 3, 300

# Configuring a pool connects to nothing, so it is done at import. Then every worker has the pool,
# whether forked or spawned. The name keeps this pool apart from the pools of your other programs.
pool = sharedpool.config_pool(max_conn=LIMIT, name="multiprocessing example")


def work(number: int) -> int:
    """Run one query. Return this process's id."""
    # With a timeout, the fourth process waits for its turn. Without, it would get PoolExhausted.
    with pool.connection(timeout=30) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT %s, pg_sleep(0.005)", [number])
        return os.getpid()


def watch(futures: list[concurrent.futures.Future[int]]) -> int:
    """Count the pool's connections on the server until all queries are done. Return the maximum."""
    peak, unfinished = 0, set(futures)
    with (
        closing(psycopg2.connect(pool.config.conninfo.dsn)) as observer,
        observer.cursor() as cursor,
    ):
        observer.autocommit = True  # pg_stat_activity does not change within a transaction
        while unfinished:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s",
                [f"sharedpool {pool.name} [%"],
            )
            peak = max(peak, cursor.fetchone()[0])
            unfinished = concurrent.futures.wait(unfinished, timeout=0.005).not_done
    return peak


def main() -> int:
    with concurrent.futures.ProcessPoolExecutor(PROCESSES) as executor:
        futures = [executor.submit(work, number) for number in range(QUERIES)]
        peak = watch(futures)
    processes = {future.result() for future in futures}
    print(f"{QUERIES} queries by {len(processes)} processes")
    print(f"most connections at a time: {peak}, limit: {LIMIT}")
    return 0 if peak <= LIMIT else 1


if __name__ == "__main__":  # a spawned worker imports this file, too
    sys.exit(main())
