"""Faults of what is between workers and server: a proxy closes its own sides when it likes, a
pooler keeps backends."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from psycopg2.extensions import make_dsn

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.faults.brokers import BrokerProcess, ReportWatch
from tests.faults.environment import MAX_CONN, TTL_S, WORKERS, Environment, environment
from tests.faults.results import LONG, Row, percentile, scale, spread
from tests.support import proxies

pytestmark = [pytest.mark.fault, pytest.mark.timeout(scale(120, 600))]

GOAL = "never above the limit; slot back: p99 ≤ 0.5 s after a kill"
_BUSY = {"PoolExhausted", "PoolTimeout"}
Proxy = Callable[[EphemeralPostgres, str], AbstractContextManager[str]]


def _kind(name: str, fault: str, start: Proxy) -> object:
    return pytest.param(start, id=name, marks=pytest.mark.row(f"behind-{name}", fault, GOAL))


KINDS = [
    _kind(
        "haproxy",
        "behind HAProxy, which ends sessions in the middle of their queries; SIGKILL of workers",
        lambda server, role: proxies.haproxy(server, silence_s=0.7),
    ),
    _kind(
        "stunnel",
        "behind stunnel; SIGKILL of workers",
        lambda server, role: proxies.stunnel(server),
    ),
    _kind("socat", "behind socat; SIGKILL of workers", lambda server, role: proxies.socat(server)),
    _kind(
        "late-closer",
        "behind a proxy that closes the server's side 2 s after its client's; SIGKILL of workers",
        lambda server, role: proxies.late_closer(server, late_s=2.0),
    ),
    _kind(
        "pgbouncer",
        "behind PgBouncer in session mode; SIGKILL of workers",
        lambda server, role: proxies.pgbouncer(
            server, role, others=("postgres",), size=2 * MAX_CONN
        ),
    ),
]


WAYS = {"proxied": "a control connection by the proxy"} | (
    {"direct": "a direct one"} if LONG else {}
)


@pytest.fixture(params=list(WAYS.values()), ids=list(WAYS))
def variant(request: pytest.FixtureRequest) -> str:
    """The way of the broker's control connection: by the proxy, and in the long version a direct
    one, too."""
    return str(request.param)


@pytest.fixture
def field(logging_postgres: EphemeralPostgres, row: Row) -> Iterator[Environment]:
    """The environment of this test, without PostgreSQL's own limit on the role, which would hide an
    excess."""
    with environment(logging_postgres, row, role_limit=False) as world:
        yield world


@pytest.mark.long
@pytest.mark.parametrize("start", KINDS)
def test_the_limit_holds_behind_a_proxy(
    start: Proxy, field: Environment, row: Row, variant: str
) -> None:
    """Workers close many connections, are killed while idle or in a query, and have long queries,
    in which HAProxy closes both sides. Slot back: as in the row of killed workers.
    """
    rng = random.Random(row.seed)
    field.pools_elsewhere = "pgbouncer" in row.name
    with start(field.server, field.role) as dsn:
        control = dsn if variant.endswith("proxy") else field.server.dsn
        options = {"max_conn": MAX_CONN, "ttl": TTL_S, "dsn": control, "drain_timeout": 3}
        field.broker = BrokerProcess(field.address, field.directory / "broker.log", **options)
        crew = field.open(
            config={"dsn": make_dsn(dsn, user=field.role, dbname=field.role)},
            discard=0.4,
            think=0.02,
            long_query=1.5,
        )
        crew.start(WORKERS)
        kills: list[tuple[int, float]] = []
        spared: set[int] = set()
        with ReportWatch(field.address) as watch:
            for step in range(scale(5, 32)):
                # A spared worker may not have seen yet that it may go on.
                number = rng.choice(sorted(crew.alive.keys() - spared))
                since, pid = time.monotonic(), crew.pid(number)
                order, sign = ("q", "queries") if step % 4 else ("i", "idle")
                crew.order([number], order)
                crew.wait_for([number], sign, since)
                if order == "q" and step % 4 == 1:
                    crew.wait_for([number], "queried", since)  # by HAProxy's end, or its own
                    crew.order([number], "r")
                    spared = {number}
                    continue
                spared = set()
                kills.append((pid, crew.kill(number)))
                crew.start(1)
            back = [freed - at for pid, at in kills if (freed := watch.freed(pid, at)) is not None]
        row.faults = len(kills)
        row.figures |= {"slot back": spread(back)}
        row.worst = percentile(back, 99)
        row.measured = f"{len(kills)} kills; slot back {spread(back, 1e-3, 'ms')}"
        found = field.judge()
    assert len(back) >= len(kills) // 2, "hardly anybody held anything when it was killed"
    assert max(back) <= scale(3.0, 1.5), f"slots back after {sorted(back)[-5:]} s"
    # Who has just started, and waits for a moment only, may not have met the broker.
    assert {c.failure for c in found if c.failure and not 0 < c.timeout < 0.5} <= _BUSY
    if scale(False, True):
        assert row.worst <= 0.5
