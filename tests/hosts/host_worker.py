"""The workers of one host: `python host_worker.py SETTINGS` forks them.

So does a program that preloads its modules. They use sharedpool as the README's quick start does:
a name, a limit and a DSN, nothing else. A worker does what its byte in the shared `orders` file
says, and appends what happens to it to a file of its own, one line an event by one `os.write`. The
program ends after the last worker, with status 1 if any of them failed.
"""

import json
import mmap
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import extensions

import sharedpool

settings = json.loads(sys.argv[1])
POLL_S = 0.002
LONG_S = 60.0


class Worker:
    """One worker process: its pool, its random numbers, its file."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.parent = os.getppid()
        self.random = random.Random(f"{settings['seed']}:{number}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.file = os.open(Path(settings["directory"], f"{number}.events"), flags, 0o600)
        with open(Path(settings["directory"], "orders"), "r+b") as file:
            self.orders = mmap.mmap(file.fileno(), 0)
        self.pool = sharedpool.config_pool(**settings["config"])
        self.note("born", os.getpid())

    def note(self, kind: str, *words: object) -> None:
        line = f"{time.monotonic():.6f} {kind} {' '.join(map(str, words))}\n"
        os.write(self.file, line.encode())

    @property
    def order(self) -> str:
        return chr(self.orders[self.number])

    def obey(self) -> None:
        ways = {
            "r": self.transact,
            "p": self.pause,
            "h": self.hold,
            "a": self.take_all,
            "k": self.fill,
            "1": self.ask_one,
        }
        while (order := self.order) != "x" and os.getppid() == self.parent:
            ways[order]()
        self.note("leaves")

    def wait_while(self, order: str) -> None:
        while self.order == order and os.getppid() == self.parent:
            time.sleep(POLL_S)  # polls its orders

    def done(self) -> None:
        """Tell that an order which is followed once has been: pause."""
        self.orders[self.number] = ord("p")

    # --- checkouts

    def get(self, timeout: float) -> extensions.connection | None:
        self.note("ask", timeout)
        try:
            conn: extensions.connection = self.pool.get_conn(timeout=timeout)
        except psycopg2.Error as error:
            self.note("fail", type(error).__name__, error.pgcode, words(error))
            return None
        dirty = conn.get_transaction_status() != extensions.TRANSACTION_STATUS_IDLE
        self.note("out", conn.info.backend_pid, 0, int(dirty))
        return conn

    def put(self, conn: Any) -> None:
        self.note("in", conn.info.backend_pid if not conn.closed else 0)
        self.pool.put_conn(conn)
        self.note("back")

    def run(self, conn: Any, when: str, statement: str) -> bool:
        """Run a statement; note and survive its failure."""
        try:
            with conn.cursor() as cursor:
                cursor.execute(statement)
        except psycopg2.Error as error:
            self.note("error", when, type(error).__name__, error.pgcode, words(error))
            return False
        return True

    # --- what can be ordered

    def transact(self) -> None:
        """r: one short transaction, then a moment of thought."""
        conn = self.get(self.random.choice(settings["timeouts"]))
        if conn is not None:
            work_s = self.random.uniform(0, settings["work_s"])
            if self.run(conn, "first", "SELECT 1"):
                self.run(conn, "later", f"SELECT pg_sleep({work_s:.4f})")
            self.put(conn)
        elif settings["think_s"] == 0:
            time.sleep(POLL_S)  # a server that is away refuses at once
        time.sleep(self.random.uniform(0, settings["think_s"]))  # thinks

    def pause(self) -> None:
        """p: do nothing."""
        self.note("paused")
        self.wait_while("p")

    def hold(self) -> None:
        """h: hold a connection, and do nothing with it, until another order comes."""
        conn = self.get(LONG_S)
        if conn is not None:
            self.run(conn, "first", "SELECT 1")
            self.note("holds")
            self.wait_while("h")
            self.run(conn, "later", "SELECT 1")
            self.put(conn)

    def take(self, within_s: float) -> list[extensions.connection]:
        """Take all of the pool's connections at once, or as many as can be had."""
        until = time.monotonic() + within_s
        taken: list[extensions.connection] = []
        while (left := until - time.monotonic()) > 0:
            if len(taken) == settings["config"]["max_conn"]:
                break
            if (conn := self.get(left)) is not None:
                self.run(conn, "first", "SELECT 1")
                taken.append(conn)
        return taken

    def take_all(self) -> None:
        """a: once: have all of the pool's connections at a time if possible; give them back."""
        started = time.monotonic()
        taken = self.take(settings["all_within_s"])
        self.note("took", len(taken), f"{time.monotonic() - started:.4f}")
        for conn in taken:
            self.put(conn)
        self.note("gave")
        self.done()

    def fill(self) -> None:
        """k: once: have all of the pool's connections lie idle in this process."""
        taken = self.take(LONG_S)
        for conn in taken:
            self.put(conn)
        self.note("filled", len(taken))
        self.done()

    def ask_one(self) -> None:
        """1: once: ask for a connection, use it, put it back."""
        conn = self.get(LONG_S)
        if conn is not None:
            self.run(conn, "first", "SELECT 1")
            self.put(conn)
        self.done()


def words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def be_worker(number: int) -> int:
    try:
        Worker(number).obey()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    for number in settings["numbers"]:
        if os.fork() == 0:
            sys.exit(be_worker(number))  # as any Python program ends: with its exit handlers
    statuses = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in settings["numbers"]]
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
