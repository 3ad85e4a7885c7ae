"""The quick start: one limit that all your processes share, without any set-up.

    $ python examples/quickstart.py

DATABASE_URL must name the database, such as postgresql://user:password@localhost:5432/app.

Stores a row, reads it back, and prints it and the pool's state. Start the script as often as you
like, also many times at once: all processes together open at most five connections. The first
process starts the broker that enforces this. The broker ends half a minute after the last process.
Nothing stays in your database.
"""

import sharedpool

pool = sharedpool.config_pool(max_conn=5, expiration=60)

# The block commits at its end, or rolls back after an exception, and returns the connection.
with sharedpool.PgSimple(pool) as db:
    db.execute("CREATE TEMP TABLE books (id serial, name text) ON COMMIT DROP")
    row = db.insert("books", {"name": "The Sea, The Sea"}, returning=["id", "name"])
    print(f"stored book {row.id}: {row.name}")

# The same connection, as plain psycopg2.
with pool.connection(timeout=5) as conn, conn.cursor() as cursor:
    cursor.execute("SELECT 6 * 7")
    print(f"six times seven is {cursor.fetchone()[0]}")

print(pool)
