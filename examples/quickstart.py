"""The quick start: one table, one limit that every process of yours shares, no set-up.

    $ python examples/quickstart.py

DATABASE_URL says where PostgreSQL is: export DATABASE_URL=postgresql://user:password@localhost:5432/app

Prints the row it stored and read back, and what the pool says of itself. Start it as often and as many times at once as
you like: all of them together open no more than five connections. The broker that sees to this is started by the first
one and leaves half a minute after the last. Nothing stays in your database.
"""

import sharedpool

pool = sharedpool.config_pool(max_conn=5, expiration=60)

with sharedpool.PgSimple(
    pool
) as db:  # commits at its end, or rolls back; then the connection is the pool's again
    db.execute("CREATE TEMP TABLE books (id serial, name text) ON COMMIT DROP")
    row = db.insert("books", {"name": "The Sea, The Sea"}, returning=["id", "name"])
    print(f"stored book {row.id}: {row.name}")

with (
    pool.connection(timeout=5) as conn,
    conn.cursor() as cursor,
):  # the same connection, as plain psycopg2
    cursor.execute("SELECT 6 * 7")
    print(f"six times seven is {cursor.fetchone()[0]}")

print(pool)
