"""Something is between the workers and the server: its end of a connection is not the backend's
end."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import connection, make_dsn

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.conninfo import resolve
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.opening import connect, describe
from tests.support import proxies
from tests.support.fixture_types import Backends, MakePool
from tests.support.processes import BackendSampler, Worker, as_pid_1
from tests.support.waiting import wait_until

Start = Callable[[EphemeralPostgres], AbstractContextManager[str]]

BACK_S = 0.1  # after a backend's end its slot is to be had again
POOLERS = {"pgbouncer": lambda server: proxies.pgbouncer(server, "postgres")}
KINDS: dict[str, Start] = {
    "haproxy": proxies.haproxy, "stunnel": proxies.stunnel, "socat": proxies.socat,
    "late closer": proxies.late_closer, **POOLERS,
}  # fmt: skip


def is_direct(dsn: str) -> bool:
    conn = connect(resolve(dsn=dsn), "sharedpool route", None, [])
    try:
        return describe(conn).direct
    finally:
        conn.close()


# --- who is in between


def test_nobody_is_in_between_by_loopback() -> None:
    with EphemeralPostgres(tcp=True) as server:
        for host in ("127.0.0.1", "localhost"):
            assert is_direct(make_dsn(server.dsn, host=host)), host


def test_nobody_is_in_between_on_a_unix_socket(postgres: EphemeralPostgres) -> None:
    assert is_direct(postgres.dsn)


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_is_found_out(kind: str, postgres: EphemeralPostgres) -> None:
    with KINDS[kind](postgres) as dsn:
        assert not is_direct(dsn)


def test_a_forwarder_from_one_unix_socket_to_another_is_found_out(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    """The server sees no address in either case; who listens is not the parent of the backend."""
    path = runtime_dir / ".s.PGSQL.5432"
    listen = f"UNIX-LISTEN:{path},fork,backlog=16"
    with proxies.running(
        proxies.program("socat"), listen, f"UNIX-CONNECT:{proxies.unix_path(postgres)}", port=0
    ):

        def listens() -> bool:  # a moment after its socket is there
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(path)) == 0

        wait_until(listens, what="the forwarder to listen")
        assert not is_direct(make_dsn(postgres.dsn, host=str(runtime_dir), port=5432))


def test_a_worker_that_cannot_see_the_servers_processes_takes_nothing_for_granted(
    postgres: EphemeralPostgres,
) -> None:
    """In a PID namespace of its own, as in another container: then only the server's
    word counts."""
    code = (
        "import sys; from sharedpool.postgres.conninfo import resolve;"
        " from sharedpool.worker.connection import opening as c;"
        " print(c.describe(c.connect(resolve(dsn=sys.argv[1]), 'x', None, [])).direct)"
    )
    run = subprocess.run(
        [*as_pid_1(), sys.executable, "-c", code, postgres.dsn], capture_output=True, text=True
    )
    assert run.stdout.strip() == "False", run.stderr


# --- slots


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
    with (
        proxies.haproxy(postgres, silence_s=0.5) as dsn,
        sharedpool.start_broker(1, dsn=postgres.dsn) as broker,
    ):
        pool = make_pool(broker=broker.address, dsn=dsn, max_conn=1)
        conn = pool.get_conn(timeout=10)
        with pytest.raises(psycopg2.OperationalError), conn.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(60)")
        pool.put_conn(conn)
        pool.put_conn(pool.get_conn(timeout=10))
        assert len(backends(pool)) == 1


def test_a_control_connection_that_the_proxy_ends_when_it_is_silent_is_made_anew(
    runtime_dir: Path,
) -> None:
    with (
        EphemeralPostgres() as server,
        proxies.haproxy(server, silence_s=0.3) as dsn,
        sharedpool.start_broker(1, dsn=dsn) as broker,
        Worker(broker=broker.address, dsn=dsn, max_conn=1) as worker,
    ):
        observer = psycopg2.connect(server.dsn)
        observer.autocommit = True

        def controls() -> int:
            with observer.cursor() as cursor:
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sharedpool "
                    "broker'"
                )
                (found,) = cursor.fetchone() or (0,)
                return int(found)

        for _ in range(3):
            wait_until(lambda: controls() == 0, what="the proxy to end the control connection")
            assert "backend" in worker.ask("get", name="c", timeout=10)
            worker.ask("put", name="c", close=True)
            wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slot to be free")
        observer.close()


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


# --- poolers


def test_a_pooler_that_keeps_sessions_lends_a_backend_again_and_nobody_elses_is_ended(
    postgres: EphemeralPostgres, runtime_dir: Path, make_pool: MakePool
) -> None:
    with (
        proxies.pgbouncer(postgres, "postgres") as dsn,
        sharedpool.start_broker(2, dsn=dsn) as broker,
    ):
        pool = make_pool(broker=broker.address, dsn=dsn, max_conn=2)
        errors: list[Exception] = []
        over = threading.Event()

        def use() -> None:
            while not over.is_set():
                try:
                    other = psycopg2.connect(dsn, application_name="somebody else")
                    with other.cursor() as cursor:
                        cursor.execute("SELECT pg_sleep(0.01)")
                    other.close()
                except psycopg2.Error as error:
                    errors.append(error)

        bystander = threading.Thread(target=use)
        bystander.start()
        try:
            for _ in range(100):
                conn = pool.get_conn(timeout=10)
                with conn.cursor() as cursor:
                    cursor.execute("SELECT 1")
                pool.put_conn(conn, close=True)
        finally:
            over.set()
            bystander.join()
        assert not errors
        wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slots to be free")


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_pooler_that_keeps_no_sessions_is_refused(
    mode: str, postgres: EphemeralPostgres, runtime_dir: Path, server_connection: connection
) -> None:
    """By the automatic broker, which goes the same way: no lock of its stays on the pooler's
    connection."""

    def locks() -> set[object]:
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT pid, classid, objid FROM pg_locks WHERE locktype = 'advisory'")
            return set(cursor.fetchall())

    before = locks()
    with proxies.pgbouncer(postgres, "postgres", mode=mode) as dsn:
        pool = sharedpool.config_pool(dsn=dsn, name="unkept")
        try:
            for timeout in (10, 0):
                with pytest.raises(
                    sharedpool.SessionsNotKept, match=r"pool 'unkept': .* does not keep sessions"
                ):
                    pool.get_conn(timeout=timeout)
            assert locks() <= before
        finally:
            pool.release_all()


@pytest.mark.long_variants
@pytest.mark.parametrize("has_control", [True, False], ids=["a direct control connection", "none"])
def test_a_pooler_that_keeps_no_sessions_is_refused_when_two_workers_have_one_backend(
    has_control: bool, postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    with (
        proxies.pgbouncer(postgres, "postgres", mode="transaction") as dsn,
        sharedpool.start_broker(4, dsn=postgres.dsn if has_control else None) as broker,
    ):
        settings: dict[str, Any] = {
            "broker": broker.address,
            "dsn": dsn,
            "max_conn": 4,
            "name": "twins",
        }
        with Worker(**settings) as one, Worker(**settings) as other:
            one.ask("get", name="a", timeout=10)
            other.ask("get", name="b", timeout=10)

            def refused() -> bool:
                answer = other.ask("get", name="c", timeout=0.2)
                return (
                    str(answer.get("error")) == "SessionsNotKept"
                    and "same backend" in answer["text"]
                )

            wait_until(refused, what="a refusal")


def test_two_workers_that_have_had_one_backend_in_turn_are_no_proof(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    with (
        proxies.pgbouncer(postgres, "postgres", size=1) as dsn,
        sharedpool.start_broker(2, dsn=postgres.dsn) as broker,
    ):
        settings: dict[str, Any] = {
            "broker": broker.address,
            "dsn": dsn,
            "max_conn": 2,
            "name": "turns",
        }
        with Worker(**settings) as one, Worker(**settings) as other:
            for _ in range(10):
                for worker in (one, other):
                    assert "backend" in worker.ask("get", name="c", timeout=10)
                    worker.ask("put", name="c", close=True)


def test_a_socket_to_nobody_is_no_proof() -> None:
    """A server that says nothing of itself, or not the truth."""
    from sharedpool.postgres.route import is_direct as look

    one, other = socket.socketpair()
    with one, other:
        assert not look(one.fileno(), 1, None)
        assert not look(one.fileno(), 1, (("127.0.0.1", 1), ("127.0.0.1", 2)))
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
    ):
        ours, theirs = sock.getsockname(), sock.getpeername()
        assert look(sock.fileno(), 1, (ours, theirs))
        assert not look(
            sock.fileno(), 1, (ours, (theirs[0], theirs[1] + 1))
        )  # a port that is mapped
        assert not look(sock.fileno(), 1, ((ours[0], ours[1] + 1), theirs))
        assert not look(sock.fileno(), 1, (("nonsense", 1), theirs))
        assert not look(sock.fileno(), 1, None)
