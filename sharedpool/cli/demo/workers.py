"""The worker processes of `sharedpool demo`, and the handles by which their parent controls them.

Each worker has a pipe. The parent sends orders: go, stop, leave. The worker sends news: one when it
is ready, more while it works, and a last one after "stop". The end of the pipe tells either side
that the other is gone.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import multiprocess
import multiprocess.connection
import multiprocess.resource_tracker
from psycopg2.extensions import connection

from sharedpool.config import config_pool

ACCOUNTS = 100
GET_CONN_LIMIT_S = 10.0
_NEWS_EVERY_S = 0.2
_POLL_EVERY_S = 0.1
_END_LIMIT_S = 3.0

# In the order of the ids: two opposite transfers would deadlock otherwise.
_LOCK_SQL = "SELECT id, balance FROM accounts WHERE id IN (%s, %s) ORDER BY id FOR UPDATE"
_MOVE_SQL = """
UPDATE accounts SET balance = balance + CASE id WHEN %s THEN -%s ELSE %s END, moves = moves + 1
WHERE id IN (%s, %s)
"""

Order = Literal["go", "stop", "leave"]


@dataclass(frozen=True, slots=True)
class _News:
    """What a worker has done since its last news."""

    committed: int
    errors: Counter[str]
    waits: array[float]  # for a connection, in seconds
    last: bool


# --- in the worker process


def work(pipe: Connection, address: str, dsn: str, max_conn: int) -> None:
    """Run one worker: transfer money from "go" to "stop", and return after "leave".

    The process exits if the parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    orders: dict[Order, threading.Event] = {
        "go": threading.Event(),
        "stop": threading.Event(),
        "leave": threading.Event(),
    }
    threading.Thread(target=_obey, args=(pipe, orders), name="demo-orders", daemon=True).start()
    pool = config_pool(max_conn, dsn=dsn, broker=address)
    _send(pipe, _News(0, Counter(), array("d"), last=False))
    orders["go"].wait()
    stop, last = orders["stop"], False
    while not last:
        committed, errors, waits = 0, Counter[str](), array("d")
        due = time.monotonic() + _NEWS_EVERY_S
        while not (last := stop.is_set()) and time.monotonic() < due:
            started = time.monotonic()
            try:
                with pool.connection(timeout=GET_CONN_LIMIT_S) as conn:
                    waits.append(time.monotonic() - started)
                    _transfer(conn)
                committed += 1
            except Exception as error:  # the summary counts errors of any kind
                errors[type(error).__name__] += 1
            stop.wait(_think_s())
        _send(pipe, _News(committed, errors, waits, last))
    orders["leave"].wait()
    pool.release_all()


def _obey(pipe: Connection, orders: dict[Order, threading.Event]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while not orders["leave"].is_set():
            orders[pipe.recv()].set()
        return
    os._exit(1)  # the parent is gone, and its server with it: there is nothing to close


def _send(pipe: Connection, news: _News) -> None:
    try:
        pipe.send(news)
    except OSError:
        os._exit(1)  # as above


def _transfer(conn: connection) -> None:
    """Move money between two accounts. Sometimes hold the connection, and both rows, for longer."""
    payer, payee = random.sample(range(1, ACCOUNTS + 1), 2)
    with conn.cursor() as cursor:
        cursor.execute(_LOCK_SQL, (payer, payee))
        amount = min(random.randint(1, 100), dict(cursor.fetchall())[payer])
        if random.random() < 0.3:
            cursor.execute("SELECT pg_sleep(%s)", (random.uniform(0.001, 0.005),))
        cursor.execute(_MOVE_SQL, (payer, amount, amount, payer, payee))


def _think_s() -> float:
    # Half a dozen transfers, then a pause. So the demand swings around the limit and moves from
    # process to process: connections lie idle in one process while another waits.
    return random.uniform(0, 0.004) if random.random() < 0.85 else random.uniform(0.2, 0.8)


# --- in the parent


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process, as its parent knows it."""

    process: Any
    pipe: Connection
    ready: bool = False
    done: bool = False  # the last news has come
    gone: bool = False  # the pipe has ended
    committed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    waits: array[float] = field(default_factory=lambda: array("d"))

    def read_news(self) -> None:
        """Handle one message, which must have arrived."""
        try:
            news: _News = self.pipe.recv()
        except (EOFError, OSError):
            self.gone = True
            return
        self.ready, self.done = True, news.last
        self.committed += news.committed
        self.errors += news.errors
        self.waits += news.waits


class WorkerFleet:
    """All workers. `end` must be called in any case.

    Methods call `check` often while they block. It may raise.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.workers: list[Worker] = []
        self._check = check

    def start(self, count: int, *arguments: object) -> None:
        """Start processes that run `work` with these arguments, without waiting for "ready"."""
        context = multiprocess.get_context("spawn")
        for number in range(count):
            ours, theirs = context.Pipe()
            with shielded_children():
                name = f"sharedpool-demo-{number}"
                process = context.Process(
                    target=work, args=(theirs, *arguments), name=name, daemon=True
                )
                process.start()
            theirs.close()
            self.workers.append(Worker(process, ours))
            self._check()

    def send(self, order: Order) -> None:
        """Send an order to all workers that are there."""
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(order)

    def wait_for(self, until: Callable[[Worker], bool], limit_s: float) -> bool:
        """Handle news until `until` is true for each worker that is not gone.

        Return False after `limit_s`.
        """
        deadline = time.monotonic() + limit_s
        while not all(worker.gone or until(worker) for worker in self.workers):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            pipes = {worker.pipe: worker for worker in self.workers if not worker.gone}
            for pipe in multiprocess.connection.wait(list(pipes), min(left, _POLL_EVERY_S)):
                pipes[pipe].read_news()
            self._check()
        return True

    def end(self) -> None:
        """End every process: by the end of its pipe, or else by SIGTERM, or else by SIGKILL."""
        for worker in self.workers:
            worker.pipe.close()
        deadline = time.monotonic() + _END_LIMIT_S
        for worker in self.workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        for end in ("terminate", "kill"):
            left = [worker.process for worker in self.workers if worker.process.is_alive()]
            for process in left:
                getattr(process, end)()
            deadline = time.monotonic() + 1
            for process in left:
                process.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def shielded_children() -> Iterator[None]:
    """Start children inside this block that the terminal's Ctrl-C does not reach.

    They inherit the signal mask, so there is no moment without it.
    """
    # The tracker would lift the mask if it started inside the block.
    multiprocess.resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
