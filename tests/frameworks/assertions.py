"""What can be seen from outside: who is in a query."""

from psycopg2.extensions import connection


def stuck(server: connection, name: str) -> int:
    """Return how many of a pool's backends are in the query of ten minutes that the targets do."""
    with server.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name LIKE %s AND state = 'active' AND query LIKE 'SELECT "
            "pg_sleep(600%%'",
            [f"sharedpool {name} [%"],
        )
        (count,) = cursor.fetchone() or (0,)
        return int(count)
