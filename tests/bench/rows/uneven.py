"""Load that comes all at once, and load that comes from few of many processes."""

import time
from contextlib import ExitStack
from functools import partial
from typing import Any

from tests.bench.contestants import PGBOUNCER, US_OFF, broker, in_a_window, shared
from tests.bench.crew import CrewError, Member, crew, sleep_until, window
from tests.bench.load import BookKeeping, ThreadedLooper
from tests.bench.peers import OFF, Late, MakeClient, Shared, SqlalchemyPool
from tests.bench.pgbouncer import PgBouncer
from tests.bench.report import P50_MS, P99_MS, THROUGHPUT, US, Comparison, Metric, Result, Sample
from tests.bench.runner import Bench, Contestant, Measure, Row, take_turns
from tests.bench.stats import percentile

# --- the first checkout of many processes at once

RUSH = 64
SLOTS = 20
WARM = "PgBouncer that has its 20 connections already"
_SERVED = Metric("served", "/s", 0)


class Newcomer(Member):
    """A process that has what it needs to connect, and has not yet."""

    def __init__(self, make: MakeClient, number: int) -> None:
        self._client = make()
        self._work = BookKeeping(number)

    def run(self, start: float) -> tuple[float, float]:
        """Have a connection for one transaction; return when it began and when it was over."""
        sleep_until(start)
        began = time.monotonic()
        conn = self._client.checkout()
        self._work(conn)
        self._client.checkin(conn)
        return began, time.monotonic()

    def close(self) -> None:
        self._client.close()


def _rush(make: MakeClient) -> Sample:
    """Start the processes anew, and time them all."""
    with crew([partial(Newcomer, make, number) for number in range(RUSH)]) as newcomers:
        start = window(0, 0).start
        turns = newcomers.ask("run", start)
    if late := [began for began, _ in turns if began > start + 1]:
        raise CrewError(f"{len(late)} processes were told too late")
    took_ms = [(ended - start) * 1000 for _, ended in turns]
    figures = {
        _SERVED: RUSH / (max(took_ms) / 1000),
        P50_MS: percentile(took_ms, 50),
        P99_MS: percentile(took_ms, 99),
    }
    return Sample(figures, took_ms)


def _first(bench: Bench, result: Result) -> None:
    dsn = bench.server.dsn
    route = bench.server.routes["unix"]

    def ours(stack: ExitStack, options: tuple[tuple[str, Any], ...] = ()) -> Measure:
        address = broker(bench, stack, SLOTS, dsn).address
        return partial(_rush, Shared(dsn, address, SLOTS, options=options))

    def cold(stack: ExitStack) -> Measure:
        stack.enter_context(PgBouncer(bench.server, route))  # to see whether there is one

        def measure() -> Sample:
            with PgBouncer(bench.server, route, size=SLOTS) as proxy:
                return _rush(Late(proxy.dsn))

        return measure

    def warm(stack: ExitStack) -> Measure:
        proxy = stack.enter_context(PgBouncer(bench.server, route, size=SLOTS))
        _rush(Late(proxy.dsn))
        return partial(_rush, Late(proxy.dsn))

    take_turns(
        bench,
        result,
        [
            Contestant(US, ours),
            Contestant(PGBOUNCER, cold),
            Contestant(US_OFF, partial(ours, options=OFF)),
            Contestant(WARM, warm),
        ],
    )
    result.notes.append(
        "both begin without a connection to the server, the broker and PgBouncer running; each "
        "process connects,"
        " does one transaction and leaves its turn"
    )


# --- two of sixteen processes are busy

PROCESSES = 16
BUSY = 2
THREADS = 10
WAIT_S = 0.002
SHARE = "a pool of 1 in each process (16 in all)"
SHARE_UP = "a pool of 2 in each process (32 in all)"


def _member(make: MakeClient, number: int) -> Member:
    """The last two are busy: by then the others have had their connections."""
    threads = THREADS if number >= PROCESSES - BUSY else 0
    return ThreadedLooper(make, number, threads, WAIT_S)


def _skew(bench: Bench, result: Result) -> None:
    route = bench.server.routes["unix"]

    def fixed(stack: ExitStack, size: int) -> Measure:
        return in_a_window(bench, stack, PROCESSES, _member, SqlalchemyPool(route.dsn, size))

    take_turns(
        bench,
        result,
        [
            shared(bench, route, PROCESSES, _member, slots=SLOTS, threads=True),
            Contestant(SHARE, partial(fixed, size=1)),
            Contestant(SHARE_UP, partial(fixed, size=2)),
        ],
    )
    result.notes.append(
        f"{THREADS} threads in each busy process; each transaction has the server wait "
        f"{WAIT_S * 1000:g} ms; the fixed"
        " pools are SQLAlchemy's QueuePool"
    )


ROWS = (
    Row(
        "first",
        f"{RUSH} processes' first checkout at once, {SLOTS} slots",
        "served/s ≥ 1.0 × PgBouncer",
        _first,
        (Comparison(_SERVED, PGBOUNCER), Comparison(P99_MS, PGBOUNCER), Comparison(_SERVED, WARM)),
    ),
    Row(
        "skew",
        f"skewed load: {BUSY} of {PROCESSES} processes busy, {SLOTS} slots",
        "throughput ≥ 1.5 × each process with its fixed share (20/16)",
        _skew,
        (
            Comparison(THROUGHPUT, SHARE),
            Comparison(P99_MS, SHARE),
            Comparison(THROUGHPUT, SHARE_UP),
            Comparison(P99_MS, SHARE_UP),
        ),
    ),
)
