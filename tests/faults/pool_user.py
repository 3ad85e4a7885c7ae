"""A process that uses a pool and notes what happens to it: one line an event, by one `os.write`.

Part of the program `fault_worker.py`; like it, it imports nothing of the tests.
"""

import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import extensions

import sharedpool

settings = json.loads(sys.argv[1])
POLL_S = 0.002


class PoolUser:
    """One process: its pool, its random numbers, its file."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.random = random.Random(f"{settings['seed']}:{number}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.file = os.open(Path(settings["directory"], f"{number}.events"), flags, 0o600)
        with open(Path(settings["directory"], "orders"), "r+b") as file:
            self.orders = mmap.mmap(file.fileno(), 0)
        self.held: list[Any] = []
        self.pool = sharedpool.config_pool(
            pool_manager=sharedpool.ThreadedConnectionPool,
            configure=note_start,
            connection_factory=self.make_factory(),
            **settings["config"],
        )
        self.note("born", os.getpid())

    def note(self, kind: str, *words: object) -> None:
        os.write(
            self.file,
            f"{time.monotonic():.6f} {kind} {' '.join(str(word) for word in words)}\n".encode(),
        )

    def make_factory(self) -> type[extensions.connection]:
        worker = self

        class Noting(extensions.connection):
            """Tells when its connect begins, and dies in the middle of it when that was ordered."""

            def __init__(self, *args: Any, **keywords: Any) -> None:
                worker.note("connecting")
                if worker.order == "d":
                    threading.Thread(
                        target=worker.die, args=[worker.random.uniform(0, 0.006)]
                    ).start()
                super().__init__(*args, **keywords)

        return Noting

    def die(self, after_s: float) -> None:
        time.sleep(after_s)  # where in the connect it dies is to be random
        self.note("dies")
        os.kill(os.getpid(), signal.SIGKILL)

    @property
    def order(self) -> str:
        return chr(self.orders[self.number])

    def wait_while(self, *orders: str) -> None:
        while self.order in orders and os.getppid() == settings["nursery"]:
            time.sleep(POLL_S)  # polls its orders

    # --- checkouts

    @contextmanager
    def checkout(
        self, timeout: float, close: bool = False
    ) -> Iterator[extensions.connection | None]:
        """Check a connection out and in, noting both; None when there was none to be had."""
        conn = self.get(timeout)
        try:
            yield conn
        finally:
            if conn is not None:
                self.put(conn, close)

    def get(self, timeout: float) -> extensions.connection | None:
        self.note("ask", timeout)
        try:
            conn = self.pool.get_conn(timeout=timeout)
        except Exception as error:
            self.note(
                "fail",
                type(error).__name__,
                getattr(error, "pgcode", None),
                " ".join(str(error).split())[:300],
            )
            return None
        # psycopg2 has an opinion of its own on whether a transaction is open: with a wrong one it
        # sends no BEGIN.
        dirty = conn.get_transaction_status() != extensions.TRANSACTION_STATUS_IDLE
        dirty = dirty or conn.status != extensions.STATUS_READY
        self.note("out", server_pid(conn), getattr(conn, "started", 0), int(dirty))
        return conn

    def put(self, conn: extensions.connection, close: bool = False) -> None:
        self.note("in", server_pid(conn) if not conn.closed else 0)
        try:
            self.pool.put_conn(conn, close=close)
        except Exception as error:
            self.note("putfail", type(error).__name__, " ".join(str(error).split())[:300])
        self.note("back")

    def run(self, conn: extensions.connection, when: str, statement: str) -> bool:
        """Run a statement; note and survive its failure."""

        def execute() -> None:
            with conn.cursor() as cursor:
                cursor.execute(statement)

        return self.survive(conn, when, execute)

    def commit(self, conn: extensions.connection) -> bool:
        return self.survive(conn, "later", conn.commit)

    def survive(self, conn: extensions.connection, when: str, act: Callable[[], None]) -> bool:
        try:
            act()
        except psycopg2.Error as error:
            words = " ".join(str(error).split())[:300]
            self.note("error", when, type(error).__name__, error.pgcode, words)
            self.pool.notice(conn, error)
            return False
        return True


def note_start(conn: Any) -> None:
    """Ask, once a connection, when its backend started: a pid alone may be used again.

    And what pid it has: behind a pooler libpq has been told another.
    """
    with conn.cursor() as cursor:
        cursor.execute(
            "SELECT pid, extract(epoch FROM backend_start) FROM "
            "pg_stat_get_activity(pg_backend_pid())"
        )
        conn.server_pid, conn.started = cursor.fetchone()
    conn.rollback()


def server_pid(conn: Any) -> int:
    return int(getattr(conn, "server_pid", 0) or conn.info.backend_pid)
