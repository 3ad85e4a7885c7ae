"""What clients do with their connections."""

from __future__ import annotations

import random
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.crew import Member, Window, sleep_until
from tests.bench.peers import Client, MakeClient
from tests.bench.report import FAIRNESS, P50_MS, P99_MS, THROUGHPUT, Sample
from tests.bench.server import ROWS_OF_ONE
from tests.bench.stats import fairness, percentile


@dataclass
class Outcome:
    """One client's turn: how many transactions ended in the window, and how long each took that
    began in it."""

    done: int
    latencies_s: array[float]


Transaction = Callable[[Any], None]


class BookKeeping:
    """BEGIN, one select, one update by primary key, COMMIT, on rows that no other client touches.

    With `wait_s` the server also waits for so long in it, as for a slower disk or a lock.
    """

    def __init__(self, client: int, wait_s: float = 0.0) -> None:
        self._random = random.Random(client)
        self._first = client * ROWS_OF_ONE
        self._wait_s = wait_s

    def __call__(self, conn: Any) -> None:
        key = self._first + self._random.randrange(ROWS_OF_ONE)
        cursor = conn.cursor()
        cursor.execute("SELECT counter FROM bench WHERE id = %s", (key,))
        cursor.fetchone()
        if self._wait_s:
            cursor.execute("SELECT pg_sleep(%s)", (self._wait_s,))
        cursor.execute("UPDATE bench SET counter = counter + 1 WHERE id = %s", (key,))
        cursor.close()
        conn.commit()


def repeat(client: Client, work: Transaction, window: Window, think_s: float = 0.0) -> Outcome:
    """Check out, work, check in; think; again, until the window ends: one client's closed loop.

    The last transaction is finished, and its latency counts, but it is not one that was done in
    time: what one waits for to the end of the window and beyond would be missing from the latencies
    otherwise.
    """
    clock = time.monotonic
    checkout, checkin = client.checkout, client.checkin
    _, begin, end = window
    latencies = array("d")
    done = 0
    sleep_until(window.start)
    ended = clock()
    while ended < end:
        began = clock()
        conn = checkout()
        work(conn)
        checkin(conn)
        ended = clock()
        if began >= begin:
            latencies.append(ended - began)
        done += begin <= ended < end
        if think_s:
            time.sleep(think_s)
    return Outcome(done, latencies)


class Looper(Member):
    """A process with one client in a closed loop.

    It has had its connection once before it says that it is ready.
    """

    def __init__(self, make: MakeClient, number: int, think_s: float = 0.0) -> None:
        self._client = make()
        self._think_s = think_s
        self._work = BookKeeping(number)
        self._client.checkin(self._client.checkout())

    def run(self, window: Window) -> Outcome:
        return repeat(self._client, self._work, window, self._think_s)

    def close(self) -> None:
        self._client.close()


class ThreadedLooper(Member):
    """A process whose threads share a client, each in its closed loop; with no threads it is idle,
    but attached."""

    def __init__(self, make: MakeClient, number: int, threads: int, wait_s: float = 0.0) -> None:
        self._client = make()
        self._works = [BookKeeping(number * threads + thread, wait_s) for thread in range(threads)]
        self._client.checkin(self._client.checkout())

    def run(self, window: Window) -> Outcome | None:
        """Return what all threads did together; None without any."""
        if not self._works:
            return None
        outcomes: list[Outcome] = []
        errors: list[BaseException] = []

        def work(each: Transaction) -> None:
            try:
                outcomes.append(repeat(self._client, each, window))
            except BaseException as error:
                errors.append(error)

        crew = [threading.Thread(target=work, args=(each,)) for each in self._works]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        if errors:
            raise errors[0]
        latencies = array("d")
        for outcome in outcomes:
            latencies.extend(outcome.latencies_s)
        return Outcome(sum(outcome.done for outcome in outcomes), latencies)

    def close(self) -> None:
        self._client.close()


def sample_of(outcomes: Sequence[Outcome | None], window: Window) -> Sample:
    """Add up what all clients of one turn did. Raises ValueError when nobody got anything done."""
    busy = [outcome for outcome in outcomes if outcome is not None]
    latencies_ms = [latency * 1000 for outcome in busy for latency in outcome.latencies_s]
    counts = [outcome.done for outcome in busy]
    return Sample(
        {
            THROUGHPUT: sum(counts) / window.length_s,
            P50_MS: percentile(latencies_ms, 50),
            P99_MS: percentile(latencies_ms, 99),
            FAIRNESS: fairness(counts),
        },
        latencies_ms,
    )
