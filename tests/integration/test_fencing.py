"""What the control connection ends, and what it leaves alone, of what a pooler has lent."""

import threading
import time
from collections.abc import Iterator

import psycopg2
import pytest
from psycopg2.extensions import connection

from sharedpool.broker.core.commands import Fence
from sharedpool.broker.postgres.fencing import Fencing
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.values import Backend, Token
from tests.support.waiting import wait_until

TOKEN = Token(1, 1)
OURS, THEIRS = "sharedpool ours", "somebody else"


class Lent:
    """A backend that was lent to a session of ours, and how the fence of it goes."""

    def __init__(self, dsn: str, observer: connection) -> None:
        self.conn = psycopg2.connect(dsn, application_name=OURS)
        self.conn.autocommit = True
        self._observer = observer
        self.done: list[Token] = []
        self._fencing = Fencing(self.done.append, lambda backend: False)
        row = self._see(
            "pid, (extract(epoch FROM backend_start) * 1000000)::bigint",
            self.conn.info.backend_pid,
        )
        assert row is not None
        pid, started_us = row
        self.backend = Backend(pid, started_us, 1, pooled=OURS)
        self._thread: threading.Thread | None = None

    def _see(self, what: str, pid: int) -> tuple[int, ...] | None:
        with self._observer.cursor() as cursor:
            cursor.execute(f"SELECT {what} FROM pg_stat_activity WHERE pid = %s", [pid])
            return cursor.fetchone()

    @property
    def alive(self) -> bool:
        return self._see("1", self.backend.pid) is not None

    def execute(self, statement: str) -> None:
        with self.conn.cursor() as cursor:
            cursor.execute(statement)

    def query(self) -> None:
        """Be in the middle of a query from now on."""

        def run() -> None:
            with pytest.raises(psycopg2.Error):
                self.execute("SELECT pg_sleep(60)")

        self._thread = threading.Thread(target=run)
        self._thread.start()
        wait_until(
            lambda: self._see("1", self.backend.pid) and self._asleep(), what="the query to run"
        )

    def _asleep(self) -> bool:
        row = self._see(
            "(query = 'SELECT pg_sleep(60)' AND state = 'active')::int", self.backend.pid
        )
        return row == (1,)

    def fence(self, *, left: bool) -> None:
        self._fencing.add(Fence(TOKEN, "p", self.backend, "a test", left), time.monotonic())

    def work(self) -> bool:
        """Go on; say whether the slot is free."""
        self._fencing.work(self._observer, 1, time.monotonic())
        return self.done == [TOKEN]

    def work_for(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.work()
        return bool(self.done)

    def close(self) -> None:
        with self._observer.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", [self.backend.pid])
        if self._thread is not None:
            self._thread.join()
        self.conn.close()


@pytest.fixture
def lent(postgres: EphemeralPostgres, server_connection: connection) -> Iterator[Lent]:
    lent = Lent(postgres.dsn, server_connection)
    yield lent
    lent.close()


def test_a_backend_that_its_pooler_has_cleaned_is_free_and_lives_on(lent: Lent) -> None:
    lent.execute(f"SET application_name = '{THEIRS}'")
    lent.fence(left=True)
    wait_until(lent.work, what="the slot")
    assert lent.alive


def test_a_backend_that_has_begun_a_query_since_is_anothers(lent: Lent) -> None:
    lent.fence(left=True)
    assert not lent.work()
    lent.execute("SELECT 1")  # another worker's of ours, under the same name
    wait_until(lent.work, what="the slot")
    assert lent.alive


@pytest.mark.parametrize("name", [OURS, THEIRS])
def test_a_backend_that_is_never_seen_idle_is_anothers_too(lent: Lent, name: str) -> None:
    """It executes one short query after another; our own client's was over before
    the first look."""
    lent.fence(left=True)
    assert not lent.work()
    lent.execute(f"SET application_name = '{name}'")
    lent.query()
    wait_until(lent.work, what="the slot")
    assert lent.alive


def test_a_backend_that_goes_on_with_our_query_is_ended(lent: Lent) -> None:
    lent.query()
    lent.fence(left=True)
    wait_until(lent.work, what="the slot")
    assert not lent.alive


def test_a_backend_that_may_serve_another_is_neither_ended_nor_free(lent: Lent) -> None:
    """The user may have renamed the session, or the backend served another user before the first
    look."""
    lent.execute(f"SET application_name = '{THEIRS}'")
    lent.query()
    lent.fence(left=True)
    assert not lent.work_for(0.5)
    assert lent.alive


def test_a_backend_whose_client_may_be_connected_is_ended_at_once_whatever_it_has_begun(
    lent: Lent,
) -> None:
    lent.fence(left=False)
    lent.execute("SELECT 1")
    wait_until(lent.work, what="the slot")
    assert not lent.alive
