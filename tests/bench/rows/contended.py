"""Many processes, few connections: transactions in closed loops, with and without think time, by every way in."""

from functools import partial

from bench.contestants import DIRECT, PGBOUNCER, US_OFF, bouncer, direct, shared, without_handover
from bench.load import Looper
from bench.report import P99_MS, THROUGHPUT, US, Comparison, Result
from bench.runner import Bench, Row, take_turns

SLOTS = 8
PROCESSES = 32
THINK_S = 0.010
IDEAL = "ideal: 8 processes, 8 connections"
UNLIMITED = "no limit: 32 connections"
NEAR = "PgBouncer, clients by its unix socket"
_NOT_QUICK = "not in a quick run"


def _transaction(bench: Bench, result: Result) -> None:
    """As many processes as there are slots: nobody waits, so that this is what the pool itself costs."""
    route = bench.server.routes["unix"]
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
    if way == "tls" and bench.quick:
        result.unmeasured[NEAR] = _NOT_QUICK
    elif way == "tls":
        contestants.append(bouncer(bench, route, PROCESSES, member, slots=SLOTS, near=True, name=NEAR))
    else:  # with TLS there is no hand-over anyway
        contestants.append(without_handover(bench, route, PROCESSES, member, slots=SLOTS))
    if way != "unix" and bench.quick:
        result.unmeasured[UNLIMITED if think_s else IDEAL] = _NOT_QUICK
    elif think_s:
        contestants.append(direct(bench, route, PROCESSES, member, name=UNLIMITED))
    else:
        contestants.append(direct(bench, route, SLOTS, member, name=IDEAL))
    for slice_s in bench.slices_s:
        name = f"{US}, slice {slice_s * 1000:g} ms"
        options = (("slice", slice_s),)
        contestants.append(shared(bench, route, PROCESSES, member, slots=SLOTS, name=name, options=options))
    take_turns(bench, result, contestants)


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
            Comparison(THROUGHPUT, PGBOUNCER),
            Comparison(P99_MS, PGBOUNCER),
            Comparison(THROUGHPUT, other),
            Comparison(THROUGHPUT, PGBOUNCER, US_OFF),
        ),
    )


_CLOSED = "throughput ≥ 1.15 × PgBouncer at p99 ≤ 1.4 ×, fairness ≥ 0.7"
_THINKING = "throughput ≥ 1.0 × PgBouncer, p99 ≤ 1.0 ×"
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
)
