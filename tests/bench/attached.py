"""A program that does nothing but hold a connection: `python attached.py DSN [BROKER]`, until its
input ends.

Without a broker it has psycopg2 alone: the difference is what sharedpool costs a worker.
"""

import sys
import threading

if len(sys.argv) > 2:
    import sharedpool

    pool = sharedpool.config_pool(10, dsn=sys.argv[1], broker=sys.argv[2], timeout=30)
    pool.put_conn(pool.get_conn())
else:
    import psycopg2

    connection = psycopg2.connect(sys.argv[1])
print(threading.active_count(), flush=True)
sys.stdin.read()
