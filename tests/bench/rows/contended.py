"""Many processes, few connections: transactions in closed loops, with and without think time, by
every way in."""

from dataclasses import replace
from functools import partial

from tests.bench.contestants import (
    DIRECT,
    PGBOUNCER,
    US_OFF,
    US_ROLLBACK,
    behind_endpoint,
    bouncer,
    direct,
    shared,
    without_handover,
)
from tests.bench.load import Looper, ThreadedLooper
from tests.bench.peers import ROLLBACK
from tests.bench.report import P99_MS, THROUGHPUT, US, Comparison, Result
from tests.bench.runner import Bench, Contestant, Row, take_turns

SLOTS = 8
PROCESSES = 32
CROWDS = (16, 64, 128)
THREADS = 4
THINK_S = 0.010
IDEAL = "ideal: 8 processes, 8 connections"
UNLIMITED = "no limit: 32 connections"
NEAR = "PgBouncer, clients by its unix socket"
IN_WORKERS = f"{US}, TLS in the workers"
_BOTH = (Comparison(THROUGHPUT, PGBOUNCER), Comparison(P99_MS, PGBOUNCER))


def _transaction(bench: Bench, result: Result) -> None:
    """As many processes as there are slots: nobody waits, so that this is what the pool itself
    costs."""
    route = bench.server.routes["unix"]
    bench = replace(bench, new_processes=True)
    take_turns(
        bench,
        result,
        [
            direct(bench, route, SLOTS, Looper),
            shared(bench, route, SLOTS, Looper, slots=SLOTS),
            bouncer(bench, route, SLOTS, Looper, slots=SLOTS),
        ],
    )


def _contended(bench: Bench, result: Result, way: str = "unix", think_s: float = 0.0) -> None:
    route = bench.server.routes[way]
    member = partial(Looper, think_s=think_s)
    contestants = [
        shared(bench, route, PROCESSES, member, slots=SLOTS),
        bouncer(bench, route, PROCESSES, member, slots=SLOTS),
    ]
    if way == "tls":  # no hand-over anyway, and no reset
        more = [bouncer(bench, route, PROCESSES, member, slots=SLOTS, near=True, name=NEAR)]
    else:
        contestants.append(without_handover(bench, route, PROCESSES, member, slots=SLOTS))
        more = [
            shared(bench, route, PROCESSES, member, slots=SLOTS, name=US_ROLLBACK, options=ROLLBACK)
        ]
    if think_s:
        more.append(direct(bench, route, PROCESSES, member, name=UNLIMITED))
    else:
        more.append(direct(bench, route, SLOTS, member, name=IDEAL))
    contestants += more if way == "unix" else _unless_quick(bench, result, more)
    for slice_s in bench.slices_s:
        name = f"{US}, slice {slice_s * 1000:g} ms"
        options = (("time_slice", slice_s),)
        contestants.append(
            shared(bench, route, PROCESSES, member, slots=SLOTS, name=name, options=options)
        )
    take_turns(bench, result, contestants)


def _unless_quick(bench: Bench, result: Result, contestants: list[Contestant]) -> list[Contestant]:
    """Return the contestants; in a quick run none, and note that."""
    if not bench.quick:
        return contestants
    result.unmeasured |= {each.name: "not in a quick run" for each in contestants}
    return []


def _endpoint(bench: Bench, result: Result) -> None:
    """The workers speak plainly to a TLS endpoint beside them, as PgBouncer's clients do to
    PgBouncer."""
    tls = bench.server.routes["tls"]
    more = [
        behind_endpoint(bench, PROCESSES, Looper, slots=SLOTS, name=US_ROLLBACK, options=ROLLBACK),
        shared(bench, tls, PROCESSES, Looper, slots=SLOTS, name=IN_WORKERS),
    ]
    contestants = [
        behind_endpoint(bench, PROCESSES, Looper, slots=SLOTS),
        bouncer(bench, tls, PROCESSES, Looper, slots=SLOTS, near=True),
        *_unless_quick(bench, result, more),
    ]
    take_turns(bench, result, contestants)


def _crowd(bench: Bench, result: Result, processes: int) -> None:
    route = bench.server.routes["unix"]
    take_turns(
        bench,
        result,
        [
            shared(bench, route, processes, Looper, slots=SLOTS),
            bouncer(bench, route, processes, Looper, slots=SLOTS),
        ],
    )


def _threads(bench: Bench, result: Result) -> None:
    """A pool in each process: sharedpool's, or psycopg2's of as many connections to PgBouncer as it
    has threads."""
    route = bench.server.routes["unix"]
    member = partial(ThreadedLooper, threads=THREADS)
    take_turns(
        bench,
        result,
        [
            shared(bench, route, PROCESSES, member, slots=SLOTS, threads=True),
            bouncer(bench, route, PROCESSES, member, slots=SLOTS, threads=THREADS),
        ],
    )


def _row(way: str, think_s: float, goal: str) -> Row:
    name = ("think" if think_s else "contended") + ("" if way == "unix" else f"-{way}")
    by = {"unix": "unix socket", "tcp": "TCP with scram", "tls": "TCP with TLS and scram"}[way]
    loop = f"{THINK_S * 1000:g} ms think time" if think_s else "closed loop"
    other = UNLIMITED if think_s else IDEAL
    return Row(
        name,
        f"{PROCESSES} processes, {SLOTS} slots, {loop}, {by}",
        goal,
        partial(_contended, way=way, think_s=think_s),
        (
            *_BOTH,
            Comparison(THROUGHPUT, other),
            Comparison(THROUGHPUT, PGBOUNCER, US_ROLLBACK),
            Comparison(P99_MS, PGBOUNCER, US_ROLLBACK),
            Comparison(THROUGHPUT, PGBOUNCER, US_OFF),
        ),
    )


def _crowd_row(processes: int) -> Row:
    return Row(
        f"contended-{processes}",
        f"{processes} processes, {SLOTS} slots, closed loop, unix socket",
        "throughput ≥ 0.95 × PgBouncer at p99 ≤ 0.9 ×",
        partial(_crowd, processes=processes),
        _BOTH,
    )


_CLOSED = "throughput ≥ 1.0 × PgBouncer at p99 ≤ 1.1 ×, fairness ≥ 0.85"
_THINKING = "throughput ≥ 0.95 × PgBouncer at p99 ≤ 1.2 ×"
_BEST = "what slices allow (no hand-over)"

ROWS = (
    Row(
        "transaction",
        f"whole transaction incl. checkout, {SLOTS} processes on {SLOTS} slots",
        "throughput ≥ 0.97 × direct",
        _transaction,
        (Comparison(THROUGHPUT, DIRECT), Comparison(THROUGHPUT, PGBOUNCER)),
    ),
    _row("unix", 0.0, _CLOSED),
    _row("unix", THINK_S, _THINKING),
    _row("tcp", 0.0, _CLOSED),
    _row("tcp", THINK_S, _THINKING),
    _row("tls", 0.0, _BEST),
    _row("tls", THINK_S, _BEST),
    Row(
        "contended-endpoint",
        f"{PROCESSES} processes, {SLOTS} slots, closed loop, TLS to the server by a local "
        "endpoint (stunnel)",
        "throughput ≥ 1.0 × PgBouncer with TLS to the server",
        _endpoint,
        (
            *_BOTH,
            Comparison(THROUGHPUT, PGBOUNCER, US_ROLLBACK),
            Comparison(P99_MS, PGBOUNCER, US_ROLLBACK),
            Comparison(THROUGHPUT, PGBOUNCER, IN_WORKERS),
        ),
    ),
    *(_crowd_row(processes) for processes in CROWDS),
    Row(
        "contended-threads",
        f"{PROCESSES} processes × {THREADS} threads, {SLOTS} slots, closed loop, unix socket",
        "throughput ≥ 1.0 × PgBouncer",
        _threads,
        _BOTH,
    ),
)
