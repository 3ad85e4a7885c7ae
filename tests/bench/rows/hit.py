"""Checkout and return on a hit: a connection is idle in this very process."""

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from tests.bench.contestants import broker
from tests.bench.crew import Member, crew
from tests.bench.peers import (
    Client,
    DbutilsPool,
    MakeClient,
    Psycopg2Pool,
    PsycopgPool,
    Shared,
    SqlalchemyPool,
)
from tests.bench.report import MEAN_US, US, Comparison, Result, Sample
from tests.bench.runner import Bench, Contestant, Measure, Row, take_turns

PSYCOPG2_POOL = "psycopg2.pool"
US_SIMPLE = f"{US}, one thread's"
_SIZE = 5


class Turner(Member):
    """A process whose threads check out and in, as often as they are told."""

    def __init__(self, make: MakeClient, threads: int) -> None:
        self._client = make()
        self._threads = threads
        held = [self._client.checkout() for _ in range(threads)]  # from here on nobody ever waits
        for conn in held:
            self._client.checkin(conn)

    def run(self, calls: int, times: int) -> float:
        """Return the µs that one checkout and return took: of the process's time, whichever thread
        had it.

        It is the median of several `times`: a turn is short, and somebody else may have the
        processor for part of it.
        """
        return statistics.median(self._once(calls) for _ in range(times))

    def _once(self, calls: int) -> float:
        each = calls // self._threads
        if self._threads == 1:
            return _time(self._client, each) / each * 1e6
        barrier = threading.Barrier(self._threads + 1)

        def turn() -> None:
            barrier.wait()
            _time(self._client, each)

        crew = [threading.Thread(target=turn) for _ in range(self._threads)]
        for thread in crew:
            thread.start()
        barrier.wait()
        started = time.perf_counter()
        for thread in crew:
            thread.join()
        return (time.perf_counter() - started) / (each * self._threads) * 1e6

    def close(self) -> None:
        self._client.close()


def _time(client: Client, calls: int) -> float:
    """Return the seconds that so many checkouts and returns took."""
    checkout, checkin = client.checkout, client.checkin
    started = time.perf_counter()
    for _ in itertools.repeat(None, calls):
        checkin(checkout())
    return time.perf_counter() - started


def _hit(bench: Bench, result: Result, threads: int) -> None:
    dsn = bench.server.dsn
    calls, times = bench.scaled(20_000, 8_000), bench.scaled(9, 5)

    def contestant(name: str, make: Callable[[ExitStack], MakeClient]) -> Contestant:
        def open(stack: ExitStack) -> Measure:
            turner = stack.enter_context(crew([partial(Turner, make(stack), threads)]))
            turner.ask("run", calls // 10, 1)
            return lambda: Sample({MEAN_US: turner.ask("run", calls, times)[0]})

        return Contestant(name, open)

    def ours(stack: ExitStack, *, threaded: bool) -> MakeClient:
        return Shared(dsn, broker(bench, stack, _SIZE, dsn).address, _SIZE, threads=threaded)

    contestants = [
        contestant(US, partial(ours, threaded=True)),
        contestant(PSYCOPG2_POOL, lambda stack: Psycopg2Pool(dsn, _SIZE)),
        contestant("psycopg_pool", lambda stack: PsycopgPool(dsn, _SIZE)),
        contestant("SQLAlchemy QueuePool", lambda stack: SqlalchemyPool(dsn, _SIZE)),
        contestant("DBUtils PooledDB", lambda stack: DbutilsPool(dsn, _SIZE)),
    ]
    if threads == 1:
        contestants.insert(1, contestant(US_SIMPLE, partial(ours, threaded=False)))
    take_turns(bench, result, contestants)


def _row(name: str, threads: int) -> Row:
    return Row(
        name,
        f"checkout+return on a hit, {threads} thread{'s' * (threads > 1)}",
        "≤ 1.0 × psycopg2.pool",
        partial(_hit, threads=threads),
        tuple(
            Comparison(MEAN_US, peer)
            for peer in (PSYCOPG2_POOL, "psycopg_pool", "SQLAlchemy QueuePool", "DBUtils PooledDB")
        ),
    )


ROWS = (_row("hit", 1), _row("hit4", 4))
