"""One client, one query after the other on a connection it holds: what lies between it and the
server."""

from __future__ import annotations

import random
import time
from array import array
from contextlib import ExitStack
from functools import partial

from tests.bench.contestants import DIRECT, PGBOUNCER, broker
from tests.bench.crew import Member, Window, crew, sleep_until, window
from tests.bench.peers import MakeClient, Permanent, Shared
from tests.bench.pgbouncer import PgBouncer
from tests.bench.processes import on_one_cpu
from tests.bench.report import MEAN_US, US, Comparison, Metric, Result, Sample
from tests.bench.runner import Bench, Contestant, Measure, Row, take_turns
from tests.bench.server import ROWS_OF_ONE
from tests.bench.stats import percentile

SESSION = "PgBouncer, session mode"
_P50_US = Metric("p50", "µs", 1)
_P99_US = Metric("p99", "µs", 1)
_ONE = "SELECT 1"
_BY_KEY = "SELECT id, counter, filler FROM bench WHERE id = %s"


class Asker(Member):
    """A process that holds one connection, in autocommit mode."""

    def __init__(self, make: MakeClient, query: str) -> None:
        self._client = make()
        self._conn = self._client.checkout()
        self._conn.autocommit = True
        self._query = query
        self._keys = (
            [None] if query == _ONE else [(random.randrange(ROWS_OF_ONE),) for _ in range(1024)]
        )

    def run(self, turn: Window) -> array[float]:
        """Return the seconds that each query took, its row included."""
        clock = time.perf_counter
        query, keys, count = self._query, self._keys, len(self._keys)
        latencies = array("d")
        sleep_until(turn.start)
        with self._conn.cursor() as cursor:
            while (now := time.monotonic()) < turn.end:
                for number in range(64):
                    began = clock()
                    cursor.execute(query, keys[number % count])
                    cursor.fetchone()
                    ended = clock()
                    if now >= turn.begin:
                        latencies.append(ended - began)
        return latencies

    def close(self) -> None:
        self._conn.autocommit = False
        self._client.checkin(self._conn)
        self._client.close()


def _measure(bench: Bench, stack: ExitStack, make: MakeClient, query: str) -> Measure:
    asker = stack.enter_context(crew([partial(Asker, make, query)]))

    def measure() -> Sample:
        (latencies_s,) = asker.ask("run", window(bench.warm_s / 2, bench.window_s / 2))
        each_us = [latency * 1e6 for latency in latencies_s]
        figures = {
            MEAN_US: sum(each_us) / len(each_us),
            _P50_US: percentile(each_us, 50),
            _P99_US: percentile(each_us, 99),
        }
        return Sample(figures, [latency * 1000 for latency in latencies_s])

    return measure


def _queries(bench: Bench, result: Result, query: str) -> None:
    route = bench.server.routes["unix"]

    def direct(stack: ExitStack) -> Measure:
        return _measure(bench, stack, Permanent(route.dsn), query)

    def ours(stack: ExitStack) -> Measure:
        return _measure(
            bench, stack, Shared(route.dsn, broker(bench, stack, 1, route.dsn).address, 1), query
        )

    def bouncer(stack: ExitStack, mode: str) -> Measure:
        proxy = stack.enter_context(PgBouncer(bench.server, route, mode=mode))
        return _measure(bench, stack, Permanent(proxy.dsn), query)

    contestants = [
        Contestant(DIRECT, direct),
        Contestant(US, ours),
        Contestant(PGBOUNCER, partial(bouncer, mode="transaction")),
        Contestant(SESSION, partial(bouncer, mode="session")),
    ]
    # One of them works at a time, the others wait for it. Whether they share a processor is the
    # scheduler's whim, for a whole round or run, and waking an idle one of a virtual machine takes
    # longer than the query: 17 µs become 60.
    with on_one_cpu(bench.server.postgres.pid):
        take_turns(bench, result, contestants)
    result.notes.append(
        "client, server and proxy share one processor, so that no time is lost in waking another"
    )


def _row(name: str, title: str, query: str) -> Row:
    return Row(
        name,
        f"{title}, one client",
        "≤ 1.03 × direct",
        partial(_queries, query=query),
        (
            Comparison(MEAN_US, DIRECT),
            Comparison(_P50_US, DIRECT),
            Comparison(MEAN_US, DIRECT, PGBOUNCER),
            Comparison(MEAN_US, DIRECT, SESSION),
        ),
    )


ROWS = (_row("select", "`SELECT 1`", _ONE), _row("select-pk", "a primary-key select", _BY_KEY))
