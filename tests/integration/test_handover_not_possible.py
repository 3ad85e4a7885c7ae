"""Processes and brokers that cannot hand connections over go on without."""

import os
from pathlib import Path

import psycopg2
import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool import ThreadedConnectionPool
from sharedpool.broker_location import GivenBroker
from sharedpool.descriptors.owned import Owned
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.desk import Live
from sharedpool.wire.values import Token
from sharedpool.worker.connection.handover import SUPPORTED, adopt
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.connection.stub_server import StubServer
from sharedpool.worker.local_pool import LocalPool
from tests.support.pool_pair import MakePair, moved, report
from tests.support.processes import run_python
from tests.support.sql import ask
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)


def test_a_process_that_can_build_no_shell_goes_on_without(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, b = pair()
    monkeypatch.setattr("sharedpool.worker.connection.stub_server.StubServer.port", 1 << 20)
    b._local.shells._stock.clear()
    conn = b.get_conn()
    assert ask(conn, "SELECT 1") == 1
    assert "no hand-over in this process" in caplog.text


def test_a_process_where_an_adopted_connection_does_not_work_goes_on_without(
    pair: MakePair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    postgres: EphemeralPostgres,
    broker: sharedpool.Broker,
    name: str,
) -> None:
    """The self-test finds it: here a shell that speaks with another backend than it says."""
    a, b = pair()
    others: list[extensions.connection] = []
    shells = b._local.shells
    take, taken = shells.take, set[PooledConnection]()
    monkeypatch.setattr(shells, "take", lambda *of: taken.add(shell := take(*of)) or shell)

    def go_wrong(shell: PooledConnection, sock: Owned, live: Live) -> PooledConnection:
        if shell not in taken:  # the other session's
            return adopt(shell, sock, live)
        others.append(psycopg2.connect(postgres.dsn))
        os.dup2(others[-1].fileno(), sock.fileno())
        return adopt(shell, sock, live)

    monkeypatch.setattr("sharedpool.worker.receiving.adopt", go_wrong)
    rounds = 0
    while b._local.handover_enabled:
        rounds += 1
        assert rounds < 20
        conn = b.get_conn()
        assert ask(conn, "SELECT pg_backend_pid()") == conn.info.backend_pid
        b.put_conn(conn)
        a.put_conn(a.get_conn())
    assert rounds >= 3  # once or twice it may have been a slow server
    assert "no hand-over in this process" in caplog.text
    assert b._local.adopted == 0
    wait_until(
        lambda: report(broker, name).leases == 1,
        10,
        "the connection that was passed in vain to be ended",
    )


def test_the_first_connection_that_a_broker_passes_is_tried_with_a_cancel(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[LocalPool, Token]] = []
    cancel = LocalPool.cancel_query

    def note(local: LocalPool, token: Token, **options: bool) -> None:
        sent.append((local, token))
        cancel(local, token, **options)

    monkeypatch.setattr(LocalPool, "cancel_query", note)
    a, b = pair(timeout=1)  # which moves it from the second to the first
    assert a._local.adopted == 1
    assert sent == []  # a cancel that is lost would cost its caller a second
    b.put_conn(b.get_conn(timeout=10))
    assert [local for local, _ in sent] == [b._local]
    assert b._local.adopted == 1
    for giver, taker in ((b, a), (a, b)):
        conn = moved(giver, taker, lambda conn: None)
        assert ask(conn, "SELECT pg_sleep(0.05)") == ""
        taker.put_conn(conn)
    assert len(sent) == 1  # once has to do


def test_where_the_broker_may_not_cancel_connections_are_not_handed_over(
    server_connection: extensions.connection, postgres: EphemeralPostgres, tmp_path: Path
) -> None:
    """Its role is not the workers', and no member of it: nobody could cancel a query of a
    connection that has moved."""
    with server_connection.cursor() as cursor:
        cursor.execute("CREATE ROLE watcher LOGIN")
    dsn = extensions.make_dsn(postgres.dsn, user="watcher")
    with sharedpool.start_broker(5, address=f"ipc://{tmp_path}/b.sock", dsn=dsn) as broker:
        config = sharedpool.config_pool(
            name="watched", dsn=postgres.dsn, broker=broker.address, max_conn=1
        ).config
        pools = [ThreadedConnectionPool(config, GivenBroker(broker.address)) for _ in range(2)]
        for pool in pools * 5:
            conn = pool.get_conn(timeout=10)
            assert ask(conn, "SELECT pg_backend_pid()") == conn.info.backend_pid
            pool.put_conn(conn)
        late = ThreadedConnectionPool(config, GivenBroker(broker.address))
        late.put_conn(late.get_conn(timeout=10))
        assert report(broker, "watched").handovers == 1  # the trial
        assert [pool._local.adopted for pool in pools] == [0, 0]
        assert [pool._local.hands_over for pool in (*pools, late)] == [True, True, False]
        for pool in (*pools, late):
            pool.release_all()


def test_a_backend_that_ends_on_the_way_is_not_handed_out(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch, server_connection: extensions.connection
) -> None:
    _, b = pair()
    ended: list[int] = []

    def adopt_too_late(shell: PooledConnection, sock: Owned, live: Live) -> PooledConnection:
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [live.backend.pid])
        ended.append(live.backend.pid)
        return adopt(shell, sock, live)

    monkeypatch.setattr("sharedpool.worker.receiving.adopt", adopt_too_late)
    conn = b.get_conn()
    assert ask(conn, "SELECT pg_backend_pid()") not in ended
    assert len(ended) == 1
    assert b._local.handover_enabled


def test_a_shell_is_built_for_this_process_alone() -> None:
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1]);"
        " print(s.recv(1))"
    )
    with StubServer(
        {"server_version": "15.1", "client_encoding": "UTF8", "DateStyle": "ISO"}
    ) as stub:
        name = f"{stub.host[1:]}/.s.PGSQL.{stub.port}"
        other = run_python(script, name)
        ours = psycopg2.connect(
            host=stub.host, port=stub.port, user="shell", dbname="shell", sslmode="disable"
        )
    assert other.stdout == "b''\n", other.stderr
    assert ours.server_version == 150001
