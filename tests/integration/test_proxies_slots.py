"""Through a proxy, whose end of a connection is not the backend's end: when a slot is free
again."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support import proxies
from tests.support.fixture_types import Backends, MakePool
from tests.support.processes import BackendSampler, Worker
from tests.support.running_query import Query
from tests.support.waiting import wait_until

BACK_S = 0.1  # after a backend's end its slot is to be had again


class Ends:
    """Notes when a backend was `seen` in the server's list last, and by when it has left it."""

    def __init__(self, dsn: str, pid: int) -> None:
        self.at = self.seen = 0.0
        self._observer = psycopg2.connect(dsn, application_name="test observer")
        self._observer.autocommit = True
        self._thread = threading.Thread(target=self._watch, args=[pid])
        self._thread.start()

    def _watch(self, pid: int) -> None:
        with self._observer.cursor() as cursor:
            while True:
                asked = time.monotonic()
                cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid])
                if cursor.fetchone() is None:
                    break
                self.seen = asked
        self.at = time.monotonic()

    def join(self) -> float:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the backend lives on"
        self._observer.close()
        return self.at


@pytest.fixture(params=["direct", "proxied"])
def control(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def late(postgres: EphemeralPostgres) -> Iterator[proxies.LateCloser]:
    """A proxy that keeps the server's side for a minute after its client has left."""
    with proxies.LateCloser(postgres, late_s=60.0) as proxy:
        yield proxy


@pytest.fixture
def own_broker(
    runtime_dir: Path, postgres: EphemeralPostgres, late: proxies.LateCloser, control: str
) -> Iterator[sharedpool.Broker]:
    with sharedpool.start_broker(
        1, dsn=postgres.dsn if control == "direct" else late.dsn
    ) as broker:
        yield broker


def test_a_closed_connections_slot_is_free_when_the_server_says_so(
    make_pool: MakePool, late: proxies.LateCloser, own_broker: sharedpool.Broker, backends: Backends
) -> None:
    pool = make_pool(broker=own_broker.address, dsn=late.dsn, max_conn=1)
    for _ in range(5):
        conn = pool.get_conn(timeout=10)
        assert len(backends(pool)) == 1
        pool.put_conn(conn, close=True)
    wait_until(lambda: fetch_report(own_broker.address).leases == 0, what="the slot to be free")
    assert not backends(pool)


@pytest.mark.long_variants
@pytest.mark.parametrize("doing", ["idle", "in a query"])
def test_a_killed_workers_slot_is_back_soon_after_its_backend(
    doing: str, postgres: EphemeralPostgres, late: proxies.LateCloser, own_broker: sharedpool.Broker
) -> None:
    """The proxy keeps the backend alive, and the query would last for a minute: the broker has it
    ended."""
    settings: dict[str, Any] = {
        "broker": own_broker.address,
        "dsn": late.dsn,
        "max_conn": 1,
        "name": "victim",
    }
    with Worker(**settings) as victim, Worker(**settings) as waiter:
        ends = Ends(postgres.dsn, victim.ask("get", name="c", timeout=10)["backend"])
        if doing == "in a query":
            victim.send("query", name="c", sql="SELECT pg_sleep(60)")
            wait_until(lambda: _queries(postgres, "SELECT pg_sleep(60)"), what="the query to run")
        waiter.send("get", name="c", timeout=20)
        wait_until(
            lambda: fetch_report(own_broker.address).pools[0].waiting == 1, what="somebody to wait"
        )
        victim.kill(signal.SIGKILL)
        answer = waiter.answer()
        assert answer["at"] - ends.join() < BACK_S + 0.4  # and a connect, on a busy machine
        assert answer["at"] >= ends.seen


def _queries(server: EphemeralPostgres, query: str) -> bool:
    observer = psycopg2.connect(server.dsn)
    try:
        with observer.cursor() as cursor:
            cursor.execute(
                "SELECT 1 FROM pg_stat_activity WHERE query = %s AND state = 'active'", [query]
            )
            return cursor.fetchone() is not None
    finally:
        observer.close()


def test_a_session_that_the_proxy_ends_in_a_query_keeps_its_slot_as_long_as_the_query(
    postgres: EphemeralPostgres, runtime_dir: Path, make_pool: MakePool, backends: Backends
) -> None:
    orders = runtime_dir / "haproxy"
    with (
        proxies.haproxy(postgres, orders=orders) as dsn,
        sharedpool.start_broker(1, dsn=postgres.dsn) as broker,
    ):
        pool = make_pool(broker=broker.address, dsn=dsn, max_conn=1)
        conn = pool.get_conn(timeout=10)
        query = Query(conn)
        wait_until(lambda: _queries(postgres, "SELECT pg_sleep(60)"), what="the query to run")
        proxies.shut_down_sessions(orders)
        assert isinstance(query.end(), psycopg2.OperationalError)
        pool.put_conn(conn)
        pool.put_conn(pool.get_conn(timeout=10))
        assert len(backends(pool)) == 1


def test_a_control_connection_that_the_proxy_ends_is_made_anew(runtime_dir: Path) -> None:
    orders = runtime_dir / "haproxy"
    with (
        EphemeralPostgres() as server,
        proxies.haproxy(server, orders=orders) as dsn,
        sharedpool.start_broker(1, dsn=dsn) as broker,
        Worker(broker=broker.address, dsn=dsn, max_conn=1) as worker,
    ):
        for _ in range(3):
            _end_controls(server, orders)
            assert "backend" in worker.ask("get", name="c", timeout=10)
            worker.ask("put", name="c", close=True)
            wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slot to be free")
            wait_until(lambda: _controls(server), what="another control connection")


def _end_controls(server: EphemeralPostgres, orders: Path) -> None:
    former = wait_until(lambda: _controls(server), what="a control connection")
    proxies.shut_down_sessions(orders)
    wait_until(lambda: not former & _controls(server), what="the control connection's end")


def _controls(server: EphemeralPostgres) -> set[int]:
    """Return the backends of the broker's control connections."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'sharedpool broker'"
    with contextlib.closing(psycopg2.connect(server.dsn)) as conn, conn.cursor() as cursor:
        cursor.execute(query)
        return {pid for (pid,) in cursor}


def test_without_a_control_connection_the_slot_stays_counted_and_that_is_said(
    late: proxies.LateCloser,
    runtime_dir: Path,
    make_pool: MakePool,
    backends: Backends,
    caplog: Any,
) -> None:
    with sharedpool.start_broker(2) as broker:
        pool = make_pool(broker=broker.address, dsn=late.dsn, max_conn=2)
        for _ in range(2):
            pool.put_conn(pool.get_conn(timeout=10), close=True)
        with pytest.raises(sharedpool.PoolExhausted):
            pool.get_conn(timeout=0)
        assert fetch_report(broker.address).leases == 2
        assert len(backends(pool)) <= 2


def test_without_a_control_connection_a_refused_connect_gives_its_slot_back(
    postgres: EphemeralPostgres, runtime_dir: Path, make_pool: MakePool
) -> None:
    """Nobody has met a proxy: the server itself has refused, as far as can be known."""
    with sharedpool.start_broker(1) as broker:
        pool = make_pool(
            broker=broker.address, dsn=make_dsn(postgres.dsn, dbname="nowhere"), max_conn=1
        )
        for _ in range(3):
            with pytest.raises(psycopg2.OperationalError, match="nowhere"):
                pool.get_conn(timeout=5)
        wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slot to be free")


def test_a_connect_that_a_proxy_refuses_gives_its_slot_back(
    late: proxies.LateCloser, own_broker: sharedpool.Broker, make_pool: MakePool
) -> None:
    pool = make_pool(
        broker=own_broker.address, dsn=make_dsn(late.dsn, dbname="nowhere"), max_conn=1
    )
    for _ in range(2):
        with pytest.raises(psycopg2.OperationalError, match="nowhere"):
            pool.get_conn(timeout=20)
    wait_until(lambda: fetch_report(own_broker.address).leases == 0, what="the slot to be free")


@pytest.mark.long
def test_a_connect_that_waits_in_a_proxys_queue_is_waited_for(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    """Its worker is killed; a second later the proxy hands the connect to the
    server, all the same."""
    with (
        proxies.LateCloser(postgres, late_s=3.0, accept_late_s=1.0) as slow,
        sharedpool.start_broker(1, dsn=postgres.dsn) as broker,
    ):
        settings: dict[str, Any] = {
            "broker": broker.address,
            "dsn": slow.dsn,
            "max_conn": 1,
            "name": "queued",
        }
        with Worker(**settings) as victim, Worker(**settings) as waiter:
            victim.send("get", name="c", timeout=20)
            wait_until(lambda: slow.accepted == 1, what="the connect to be queued")
            victim.kill(signal.SIGKILL)
            waiter.send("get", name="c", timeout=40)
            with BackendSampler(postgres.dsn, "sharedpool queued%") as sampler:
                assert "backend" in waiter.answer()
            assert sampler.peak == 1
