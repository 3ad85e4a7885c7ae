"""What proves that a backend is gone, and what only looks like it."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

import sharedpool
from sharedpool.broker.server.server import Server
from sharedpool.broker.settings import BrokerSettings
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.conninfo import resolve
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.closing import close_confirmed
from sharedpool.worker.connection.opening import connect, describe
from tests.support.fixture_types import Backends, MakePool
from tests.support.waiting import wait_until

Observer = psycopg2.extensions.connection


class Querying:
    """A thread that is in the middle of a query of `pool`; `error` is how that ended.

    `check_interval`: how often the server looks for its client (PostgreSQL's
    client_connection_check_interval).
    """

    def __init__(self, pool: sharedpool.Pool, check_interval: str, observer: Observer) -> None:
        self.error: Exception | None = None
        self.backend = 0
        self._pool = pool
        self._interval = check_interval
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(lambda: self._is_at_it(observer), what="the query to run")

    def _run(self) -> None:
        conn = self._pool.get_conn(timeout=10)
        self.backend = conn.info.backend_pid
        with conn.cursor() as cursor:
            cursor.execute("SET client_connection_check_interval = %s", [self._interval])
            try:
                cursor.execute("SELECT pg_sleep(60)")
            except psycopg2.Error as error:
                self.error = error

    def _is_at_it(self, observer: Observer) -> bool:
        with observer.cursor() as cursor:
            cursor.execute("SELECT query FROM pg_stat_activity WHERE pid = %s", [self.backend])
            return cursor.fetchone() == ("SELECT pg_sleep(60)",)

    def join(self, limit_s: float) -> None:
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), "the query goes on"


def test_a_slot_stays_counted_while_a_query_goes_on_after_release_all(
    make_pool: MakePool, runtime_dir: Path, server_connection: Observer, backends: Backends
) -> None:
    """Without a control connection nobody ends the query: what the broker sees on the socket is all
    its evidence."""
    with sharedpool.start_broker(1) as broker:
        pool = make_pool(
            broker=broker.address, max_conn=1, pool_manager=sharedpool.ThreadedConnectionPool
        )
        querying = Querying(pool, "1h", server_connection)
        pool.release_all()
        for _ in range(3):  # the broker looks at its sockets between two answers
            assert fetch_report(broker.address).leases == 1
        assert backends(pool) == {querying.backend}
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", [querying.backend])
        wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slot to be free")
        querying.join(10)
        assert isinstance(querying.error, psycopg2.OperationalError)


@pytest.mark.long_variants
@pytest.mark.parametrize("control", [True, False], ids=["control connection", "none"])
def test_a_query_in_another_thread_ends_with_an_error_after_release_all(
    control: bool,
    postgres: EphemeralPostgres,
    make_pool: MakePool,
    runtime_dir: Path,
    server_connection: Observer,
    backends: Backends,
) -> None:
    """The broker ends it, or the server when it looks for its client: every two seconds if nothing
    else is set."""
    with sharedpool.start_broker(1, dsn=postgres.dsn if control else None) as broker:
        pool = make_pool(
            broker=broker.address, max_conn=1, pool_manager=sharedpool.ThreadedConnectionPool
        )
        querying = Querying(pool, "1h" if control else "100ms", server_connection)
        pool.release_all()
        querying.join(10)
        assert isinstance(querying.error, psycopg2.Error)
        wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slot to be free")
        assert not backends(pool)


# --- the network between a worker and the server


class Firewall:
    """A way to the server by TCP that forgets its connections when it is told to: the client gets a
    RST, and the server, which is told nothing, keeps the session.
    """

    def __init__(self, server: EphemeralPostgres) -> None:
        self._path = f"{server.host}/.s.PGSQL.{server.port}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self._listener.getsockname()[1],
        }
        self._clients: list[socket.socket] = []
        self._servers: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._path)
                self._clients.append(client)
                self._servers.append(server)
                threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    def forget(self) -> None:
        """Answer with a RST from now on."""
        while self._clients:
            client = self._clients.pop()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.shutdown(socket.SHUT_RD)  # wakes its pump, which holds it open
            client.close()

    def close(self) -> None:
        self._listener.close()
        for each in self._clients + self._servers:
            each.close()


@pytest.fixture
def firewall(postgres: EphemeralPostgres) -> Iterator[Firewall]:
    firewall = Firewall(postgres)
    yield firewall
    firewall.close()


def test_a_backend_whose_connection_was_reset_on_the_way_is_ended_before_its_slot_is_free(
    broker: sharedpool.Broker, make_pool: MakePool, firewall: Firewall, backends: Backends
) -> None:
    pool = make_pool(max_conn=1, **firewall.address)
    conn = pool.get_conn(timeout=10)
    wait_until(lambda: fetch_report(broker.address).custody == 1, what="the socket's duplicate")
    firewall.forget()
    wait_until(lambda: fetch_report(broker.address).leases == 0, what="the slot to be free")
    assert not backends(pool)
    pool.put_conn(conn)
    pool.put_conn(pool.get_conn(timeout=10))


def test_a_backend_whose_connection_was_reset_on_the_way_stays_counted_when_nobody_can_look(
    runtime_dir: Path, make_pool: MakePool, firewall: Firewall, backends: Backends
) -> None:
    with sharedpool.start_broker(1) as broker:
        pool = make_pool(broker=broker.address, max_conn=1, **firewall.address)
        conn = pool.get_conn(timeout=10)
        wait_until(lambda: fetch_report(broker.address).custody == 1, what="the socket's duplicate")
        firewall.forget()
        wait_until(lambda: fetch_report(broker.address).custody == 0, what="the broker to see it")
        # Else the fast path may lend the connection again before the broker's word has come.
        wait_until(lambda: pool.stats().in_use == 0, what="the worker to be told")
        pool.put_conn(conn)
        with pytest.raises(sharedpool.PoolExhausted):  # the broker's answer, whenever it comes
            pool.get_conn(timeout=0)
        assert fetch_report(broker.address).leases == 1
        assert len(backends(pool)) == 1
        pool.release_all()


def test_a_worker_takes_a_reset_for_no_proof(
    postgres: EphemeralPostgres, firewall: Firewall
) -> None:
    direct = connect(resolve(dsn=postgres.dsn), "evidence", None, [])
    broken = connect(resolve(dsn=postgres.dsn, **firewall.address), "evidence", None, [])
    assert describe(direct).direct
    broken.sharedpool_direct = True  # else it would believe in nothing that it sees there
    firewall.forget()
    close_confirmed([direct, broken])
    assert (direct.sharedpool_gone, broken.sharedpool_gone) == (True, False)


def test_the_broker_sees_every_server_that_its_workers_have_been_on(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is lost with it, should it be restarted again soon, could never be known to be
    gone."""
    address = f"ipc://{runtime_dir}/met.sock"
    with EphemeralPostgres() as database:
        broker = Server(BrokerSettings(address, dsn=database.dsn))
        thread = threading.Thread(target=broker.run)
        thread.start()
        pool = sharedpool.config_pool(dsn=database.dsn, broker=address, name="met")
        try:
            pool.put_conn(pool.get_conn(timeout=10), close=True)
            control = broker._control.connection
            assert control is not None
            wait_until(lambda: control.state == "connected", what="the control connection")
            # By itself it would not look for long.
            monkeypatch.setattr("sharedpool.broker.postgres.control._FIRST_RECONNECT_S", 3600.0)
            monkeypatch.setattr("sharedpool.broker.postgres.control._LAST_RECONNECT_S", 3600.0)
            first = control.boot_us
            database.restart("immediate")
            conn = pool.get_conn(timeout=10)
            wait_until(lambda: control.boot_us != first, what="the broker to see the new server")
            (lease,) = pool._local.cache.leases.values()
            assert lease.backend is not None
            assert lease.backend.boot_us == control.boot_us
            pool.put_conn(conn)
        finally:
            with contextlib.suppress(sharedpool.PoolClosed):
                pool.release_all()
            broker.stop()
            thread.join(20)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/St_Johns"])
def test_a_worker_knows_its_backend_by_the_numbers_the_broker_reads(
    zone: str, postgres: EphemeralPostgres
) -> None:
    """The one reads them as text, the other has the server count: else nothing could be fenced."""
    info = resolve(dsn=f"{postgres.dsn} options='-c timezone={zone}'")
    conn = connect(info, "numbers", None, [])
    backend = describe(conn)
    with conn.cursor() as cursor:
        cursor.execute(
            "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint,"
            " (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint"
            " FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        )
        assert cursor.fetchone() == backend.identity
    close_confirmed([conn])
