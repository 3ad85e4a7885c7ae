"""What proves that a backend is gone, and what only looks like it."""

import threading
from collections.abc import Callable
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest
from waiting import wait_until

import sharedpool
from sharedpool.cli.postgres import EphemeralPostgres
from sharedpool.cli.status import fetch_report

Backends = Callable[[sharedpool.Pool], set[int]]
Observer = psycopg2.extensions.connection


class Querying:
    """A thread that is in the middle of a query of `pool`; `error` is how that ended.

    `check_interval`: how often the server looks for its client (PostgreSQL's client_connection_check_interval).
    """

    def __init__(self, pool: sharedpool.Pool, check_interval: str, observer: Observer) -> None:
        self.error: Exception | None = None
        self.backend = 0
        self._pool = pool
        self._interval = check_interval
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(lambda: self._is_at_it(observer), what="the query to run")

    def _run(self) -> None:
        conn = self._pool.get_conn(timeout=10)
        self.backend = conn.info.backend_pid
        with conn.cursor() as cursor:
            cursor.execute("SET client_connection_check_interval = %s", [self._interval])
            try:
                cursor.execute("SELECT pg_sleep(60)")
            except psycopg2.Error as error:
                self.error = error

    def _is_at_it(self, observer: Observer) -> bool:
        with observer.cursor() as cursor:
            cursor.execute("SELECT query FROM pg_stat_activity WHERE pid = %s", [self.backend])
            return cursor.fetchone() == ("SELECT pg_sleep(60)",)

    def join(self, limit_s: float) -> None:
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), "the query goes on"


def test_a_slot_stays_counted_while_a_query_goes_on_after_release_all(
    postgres: EphemeralPostgres, runtime_dir: Path, server_connection: Observer, backends: Backends
) -> None:
    """Without a control connection nobody ends the query: what the broker sees on the socket is all its evidence."""
    with sharedpool.start_broker(1) as broker:
        pool = sharedpool.config_pool(
            dsn=postgres.dsn, broker=broker.address, max_conn=1, pool_manager=sharedpool.ThreadedConnectionPool
        )
        querying = Querying(pool, "1h", server_connection)
        pool.release_all()
        for _ in range(3):  # the broker looks at its sockets between two answers
            assert fetch_report(broker.address).leases == 1
        assert backends(pool) == {querying.backend}
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", [querying.backend])
        wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slot to be free")
        querying.join(10)
        assert isinstance(querying.error, psycopg2.OperationalError)


@pytest.mark.parametrize("control", [True, False], ids=["control connection", "none"])
def test_a_query_in_another_thread_ends_with_an_error_after_release_all(
    control: bool, postgres: EphemeralPostgres, runtime_dir: Path, server_connection: Observer, backends: Backends
) -> None:
    """The broker ends it, or the server when it looks for its client: every two seconds if nothing else is set."""
    with sharedpool.start_broker(1, dsn=postgres.dsn if control else None) as broker:
        pool = sharedpool.config_pool(
            dsn=postgres.dsn, broker=broker.address, max_conn=1, pool_manager=sharedpool.ThreadedConnectionPool
        )
        querying = Querying(pool, "1h" if control else "100ms", server_connection)
        pool.release_all()
        querying.join(10)
        assert isinstance(querying.error, psycopg2.Error)
        wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slot to be free")
        assert not backends(pool)
