"""The operator's guide on connections that move although the server wants TLS: its stunnel, with
paths of a test."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.wire.reports import PoolReport
from sharedpool.worker.connection.handover import SUPPORTED
from tests.support import automatic_broker, documents, proxies
from tests.support.certified_server import PASSWORD, Certified, certified
from tests.support.ports import free_port
from tests.support.processes import BackendSampler, workers
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)

_SECTION = documents.section(documents.ON_CALL, "The server wants TLS: do connections still move?")
# By loopback with a password; what is different by a unix socket with a certificate.
CONFIG, BY_CERTIFICATE = documents.blocks(_SECTION, "ini")
(DSN,) = re.findall(r'^dsn = "(.*)"$', _SECTION, flags=re.MULTILINE)
(NAME_OF_SERVER,) = re.findall(r"^checkHost = (.*)$", CONFIG, flags=re.MULTILINE)

POOL = "endpoint"
OURS = f"sharedpool {POOL} [%"
# from a death until the slot is another's, a connect included, with room for a busy machine
BACK_S = 3.0


@pytest.fixture(params=["password", "cert"], scope="module")
def method(request: pytest.FixtureRequest) -> str:
    """How `app` logs in."""
    return str(request.param)


@pytest.fixture(scope="module")
def far(method: str) -> Iterator[Certified]:
    assert f"`hostssl app app 10.0.0.0/8 {method}`" in _SECTION
    with certified(NAME_OF_SERVER, method) as server:
        yield server


@pytest.fixture
def accept(method: str, runtime_dir: Path) -> str | Path:
    port = free_port()
    return f"{proxies.HOST}:{port}" if method == "password" else runtime_dir / f".s.PGSQL.{port}"


def endpoint(far: Certified, accept: str | Path, **more: object) -> AbstractContextManager[None]:
    """The guide's endpoint, in front of this server."""
    here = {
        "accept": accept,
        "connect": f"{proxies.HOST}:{far.server.port}",
        "CAfile": far.keys / "ca.crt",
    }
    if isinstance(accept, str):
        return proxies.tls_endpoint(CONFIG, **here | more)
    _, _, keys = BY_CERTIFICATE.partition("\n")
    here |= {"cert": far.keys / "app.crt", "key": far.keys / "app.key"}
    return proxies.tls_endpoint(CONFIG + keys, **here | more)


def by(accept: str | Path, **more: str) -> str:
    """The guide's DSN, by this endpoint."""
    if isinstance(accept, str):
        return make_dsn(DSN, port=accept.rpartition(":")[2], password=PASSWORD, **more)
    return make_dsn(DSN, host=str(accept.parent), port=accept.suffix.removeprefix("."), **more)


@pytest.mark.long_variants
def test_under_tls_nobody_is_let_into_a_lane_in_which_nothing_could_move(
    far: Certified,
) -> None:
    """It costs each process some descriptors."""
    with (
        sharedpool.start_broker(3, dsn=far.verified_dsn) as started,
        workers(3, dsn=far.verified_dsn, broker=started.address, max_conn=1, name=POOL) as crew,
    ):
        for worker in crew:
            worker.send("cycle", count=20)
        assert [worker.answer() for worker in crew] == [{}] * 3
        assert (
            sum(worker.ask("stats")["connects"] for worker in crew) > 1
        )  # they had to wait for each other
        assert [worker.ask("stats")["in_lane"] for worker in crew] == [False] * 3


@pytest.fixture
def dsn(far: Certified, accept: str | Path) -> Iterator[str]:
    with endpoint(far, accept):
        yield by(accept)


@pytest.fixture(params=["automatic", "past the endpoint"])
def broker(
    request: pytest.FixtureRequest, far: Certified, dsn: str, runtime_dir: Path
) -> Iterator[str | None]:
    """The address of a broker whose control connection goes past the endpoint; None: nobody names
    one, so by it."""
    if request.param == "automatic":
        with automatic_broker.seen_off():
            yield None
    else:
        with sharedpool.start_broker(3, dsn=far.verified_dsn) as started:
            yield started.address


def reports(broker: str | None) -> list[PoolReport]:
    """What there is to tell of the pool: nothing before the automatic broker has started."""
    return [
        pool
        for found in (automatic_broker.reports() if broker is None else [fetch_report(broker)])
        for pool in found.pools
    ]


def report(broker: str | None) -> PoolReport:
    (pool,) = reports(broker)
    return pool


def look(far: Certified, sql: str, *values: object) -> list[object]:
    """The first column of what the server says."""
    with closing(psycopg2.connect(far.near_dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(sql, values)
        return [row[0] for row in cursor.fetchall()]


@pytest.mark.long_variants
def test_connections_move_between_processes_and_the_server_sees_them_encrypted(
    far: Certified, dsn: str, broker: str | None, tmp_path: Path
) -> None:
    stop = tmp_path / "stop"
    with (
        workers(6, dsn=dsn, broker=broker, max_conn=3, name=POOL, threads=True) as crew,
        BackendSampler(far.near_dsn, OURS) as sampler,
    ):
        for worker in crew:
            worker.send("hammer", seconds=60, threads=2, timeout=30, stop=str(stop))
        wait_until(
            lambda: sum(pool.handovers for pool in reports(broker)) > 200, 60, "connections to move"
        )
        stop.touch()
        outcomes = [worker.answer() for worker in crew]
        encrypted = look(
            far,
            "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE "
            "application_name LIKE %s",
            OURS,
        )
        pool = report(broker)
        connects = sum(worker.ask("stats")["connects"] for worker in crew)
    assert [outcome["errors"] for outcome in outcomes] == [[]] * 6
    assert all(outcome["done"] > 0 for outcome in outcomes)
    assert sampler.samples > 50
    assert sampler.peak == 3
    assert encrypted == [True] * 3
    assert pool.handovers > 10 * connects


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize("doing", ["idle", "in a query"])
def test_a_killed_workers_slot_comes_back(
    doing: str, far: Certified, dsn: str, broker: str | None
) -> None:
    with (
        workers(2, dsn=dsn, broker=broker, max_conn=1, name=POOL) as (victim, waiter),
        BackendSampler(far.near_dsn, OURS) as sampler,
    ):
        lost = victim.ask("get", name="c", timeout=10)["backend"]
        if doing == "in a query":
            victim.send("query", name="c", sql="SELECT pg_sleep(60)")
            active = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
            wait_until(lambda: look(far, active, lost), what="the query to run")
        waiter.send("get", name="c", timeout=20)
        wait_until(lambda: report(broker).waiting == 1, what="somebody to wait")
        killed = time.monotonic()
        victim.kill(signal.SIGKILL)
        answer = waiter.answer()
    assert answer["backend"] != lost
    assert answer["at"] - killed < BACK_S
    assert sampler.peak == 1


def test_the_endpoint_connects_to_nobody_else(far: Certified, accept: str | Path) -> None:
    """Whose certificate another CA has signed, or that names another host."""
    for wrong in ({"CAfile": far.keys / "stranger.crt"}, {"checkHost": "other.example.com"}):
        with (
            endpoint(far, accept, **wrong),
            pytest.raises(psycopg2.OperationalError, match="closed the connection"),
        ):
            psycopg2.connect(by(accept))


def test_libpq_itself_refuses_scram_through_an_endpoint(far: Certified, accept: str | Path) -> None:
    """As the guide says; should a libpq do it one day, the guide can be shorter."""
    said = "server offered SCRAM-SHA-256-PLUS authentication over a non-SSL connection"
    assert said in " ".join(_SECTION.split())
    with endpoint(far, accept), pytest.raises(psycopg2.OperationalError, match=said):
        psycopg2.connect(by(accept, user="postgres", dbname="postgres"))
