"""A query that runs in a thread, and how it ends."""

import threading

import psycopg2
from psycopg2 import extensions

from tests.support.waiting import wait_until


class Query:
    """A `SELECT pg_sleep(60)` in another thread; after construction, the server is executing it."""

    def __init__(self, conn: extensions.connection) -> None:
        self._conn = conn
        self._error: psycopg2.Error | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        active = extensions.TRANSACTION_STATUS_ACTIVE
        wait_until(lambda: conn.info.transaction_status == active, 5, "the query to run")

    def _run(self) -> None:
        try:
            with self._conn.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(60)")
        except psycopg2.Error as error:
            self._error = error

    def cancel(self) -> None:
        """Cancel until the query ends: the first cancel may arrive before the query."""
        thread = self._thread
        wait_until(
            lambda: self._conn.cancel() or not thread.is_alive() or thread.join(0.05),
            10,
            "the cancel",
        )

    def end(self, limit_s: float = 5) -> psycopg2.Error:
        """Wait for the query's end; return its error."""
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), "the query goes on"
        assert self._error is not None, "the query was not ended"
        return self._error
