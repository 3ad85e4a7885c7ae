"""Faults of PostgreSQL: restarted, crashed, its backends ended one by one, too small."""

import random
import time
from collections import Counter

import pytest

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.faults import server_log
from tests.faults.environment import MAX_CONN, WORKERS, Environment, environment
from tests.faults.events import Checkout
from tests.faults.results import CONFIRMED_S, Row, percentile, scale, spread
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.timeout(scale(120, 900))]

_BUSY = {"PoolExhausted", "PoolTimeout"}


def dead_handed_out(found: list[Checkout], gone: dict[tuple[str, str], float]) -> list[Checkout]:
    """Return the checkouts of backends that had been seen to be gone for a while
    before they began."""
    never = float("inf")
    return [
        checkout
        for checkout in found
        if checkout.backend is not None
        and checkout.asked >= gone.get(checkout.backend, never) + CONFIRMED_S
    ]


@pytest.mark.long
@pytest.mark.row(
    "restart",
    "PostgreSQL restarted fast / immediate, 20 times",
    "≤ 1 error per held connection; full capacity ≤ 2 s",
)
def test_capacity_is_back_soon_after_the_server(field: Environment, row: Row) -> None:
    """Full capacity: from the server's first answer until its list shows `max_conn` of the pool's
    backends.

    Every third restart follows a SIGKILL of the postmaster. An error is any failed statement, of
    whoever holds the connection; after full capacity there must be none, and no checkout may fail
    but for want of a free slot.
    """
    rng = random.Random(row.seed)
    crew = field.open(work=0.1, think=0.02, timeouts=[1, 3, 10])
    crew.start(WORKERS)
    full: list[float] = []
    calm: list[tuple[float, float]] = []
    away: list[tuple[float, float]] = []
    for step in range(scale(2, 20)):
        wait_until(lambda: field.sampler.now >= MAX_CONN, 20, "all connections to be open")
        since = time.monotonic()
        time.sleep(rng.uniform(0.2, scale(0.5, 3.0)))  # the schedule is the fault
        down = time.monotonic()
        calm.append((since, down))
        if step % 3 == 2:
            field.server.kill()
        field.server.restart("fast" if step % 2 else "immediate")
        up = time.monotonic()
        away.append((down, up))
        full.append(field.sampler.wait_for(MAX_CONN, 20) - up)
        row.faults += 1
    found = field.judge()
    errors = Counter(checkout.backend for checkout in found for _ in checkout.errors)
    handed_out = [
        c
        for c in found
        if c.errors and c.errors[0][1] == "first" and any(d + 0.05 < c.asked for d, _ in away)
    ]
    row.figures |= {"full": spread(full), "errors of one": max(errors.values(), default=0)}
    row.figures |= {
        "away": spread([up - down for down, up in away]),
        "first queries failed": len(handed_out),
    }
    row.worst = max(full)
    row.measured = (
        f"{row.faults} restarts; at most {max(errors.values(), default=0)} errors per held "
        "connection,"
        f" {sum(errors.values())} in all; full capacity {spread(full)}"
    )
    assert max(errors.values(), default=0) <= 1, errors.most_common(3)
    for begin, end in calm:
        wrong = [
            c for c in found if begin <= c.asked and c.answered is not None and c.answered < end
        ]
        wrong = [
            c
            for c in wrong
            if any(at < end for at, _, _ in c.errors) or c.failure not in {"", *_BUSY}
        ]
        assert not wrong, f"errors while the server was well: {wrong[:3]}"
    assert percentile(full, 100) <= scale(6.0, 2.0)


@pytest.mark.long
@pytest.mark.row(
    "terminate",
    "random `pg_terminate_backend` on idle connections",
    "dead connections handed out: 0",
)
def test_connections_that_were_ended_while_idle_are_replaced_unseen(
    field: Environment, row: Row
) -> None:
    """Dead: the first query of a checkout fails although the backend had been gone for 50 ms when
    it began.

    A backend is gone when `pg_terminate_backend(pid, timeout)` has seen it leave
    `pg_stat_activity`.
    """
    rng = random.Random(row.seed)
    crew = field.open(think=1.0, work=0.01, discard=0.02)
    crew.start(8)
    gone: dict[tuple[str, str], float] = {}
    until = time.monotonic() + scale(4, 60)
    with field.admin() as cursor:
        while time.monotonic() < until:
            cursor.execute(
                "SELECT pid, extract(epoch FROM backend_start)::text, pg_terminate_backend(pid, "
                "5000)"
                " FROM (SELECT * FROM pg_stat_activity WHERE usename = %s AND state = 'idle'"
                "       ORDER BY random() LIMIT 1) AS chosen",
                [field.role],
            )
            for pid, start, ended in cursor.fetchall():
                assert ended, "a backend has outlived pg_terminate_backend"
                gone[str(pid), start] = time.monotonic()
            time.sleep(rng.uniform(0, 0.1))  # the schedule is the fault
    found = field.judge()
    row.faults = len(gone)
    dead = dead_handed_out(found, gone)
    broken = [error for checkout in found for error in checkout.errors]
    row.figures |= {"dead": len(dead), "raced": len(broken)}
    row.worst = len(dead)
    row.measured = (
        f"{len(gone)} ended; dead handed out {len(dead)};"
        f" {len(broken)} were ended in or just before their use"
    )
    assert len(gone) > 10
    assert not dead, dead[:3]


@pytest.mark.long
@pytest.mark.row(
    "too-small", "server's `max_connections` below `max_conn`",
    "≤ 2 connect attempts a second for the pool; clear warning",
)  # fmt: skip
def test_a_server_that_is_too_small_is_not_flooded(row: Row, variant: str) -> None:
    """Attempts: refused connects in the server's log, after the first two seconds.

    The pool's own tries are further apart than half a second. Beside them one may fail that was
    made in the place of a connection which has just gone, when an observer's connection has taken
    that place.
    """
    with (
        EphemeralPostgres(
            max_connections=9, settings=server_log.SETTINGS
        ) as server,  # 3 are reserved
        environment(server, row, role_limit=bool(variant)) as field,
    ):
        crew = field.open(timeouts=[0.5, 2, 5])
        crew.start(WORKERS)
        crew.wait_for(crew.alive, "ask")
        started, began = time.time(), time.monotonic()
        length_s = scale(5.0, 60.0)
        wait_until(
            lambda: time.time() - started > length_s, length_s + 10
        )  # the load lasts so long
        ended, stopped = time.time(), time.monotonic()
        refused = [at for at in field.log.depth(field.role).refused if started + 2 <= at <= ended]
        busiest = max((sum(at <= other < at + 1 for other in refused) for at in refused), default=0)
        row.faults = len(refused)
        with field.admin() as cursor:
            cursor.execute("ALTER SYSTEM SET max_connections = 60")
        server.restart()
        found = field.judge()
        assert (
            "max_conn 10 and 1 control connection are more than the 6 connections"
            in field.broker.words()
        )
    rate = len(refused) / (ended - started - 2)
    row.figures |= {"busiest second": busiest, "a second": rate}
    row.worst = rate
    row.measured = f"{rate:.2f} attempts a second, {busiest} in the busiest"
    assert refused, "nothing was tried"
    assert rate <= 2
    assert busiest <= scale(4, 2)
    told = Counter(
        c.failure
        for c in found
        if c.failure and c.answered is not None and began <= c.answered < stopped
    )
    row.figures |= {"while too small": dict(told)}
    assert set(told) <= {"OperationalError", *_BUSY}, (
        "the pool had connections, and callers were told it had none"
    )
