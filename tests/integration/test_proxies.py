"""Something is between the workers and the server: how it is found out, and which poolers are
refused."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
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
from tests.support.fixture_types import MakePool
from tests.support.processes import Worker, as_pid_1
from tests.support.waiting import wait_until

Start = Callable[[EphemeralPostgres], AbstractContextManager[str]]

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
