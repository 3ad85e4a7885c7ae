"""A fleet at work on a real server, whose role loses the right to connect, and is given it back."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import connection, make_dsn

from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.broker_thread import server_in_a_thread
from tests.support.processes import BackendSampler, Worker, workers
from tests.support.waiting import wait_until

CREW, LIMIT, SECONDS = 4, 4, 3.0
HBA = "pg_hba.conf"
# What is taken away, what gives it back, with which SQLSTATE the server then refuses, and in which
# words.
WAYS = {
    "connect": (
        "REVOKE CONNECT ON DATABASE app FROM PUBLIC",
        "GRANT CONNECT ON DATABASE app TO PUBLIC",
        "42501",
        "permission denied for database",
    ),
    "login": (
        "ALTER ROLE app NOLOGIN",
        "ALTER ROLE app LOGIN",
        "28000",
        "is not permitted to log in",
    ),
    "database": (
        "ALTER DATABASE app ALLOW_CONNECTIONS false",
        "ALTER DATABASE app ALLOW_CONNECTIONS true",
        "55000",
        "is not currently accepting connections",
    ),
    HBA: ("local app app reject", "local all all trust", "28000", "pg_hba.conf rejects connection"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[EphemeralPostgres]:
    """A server whose log has the SQLSTATE in front, with a role and a database `app`."""
    with EphemeralPostgres(settings={"log_line_prefix": "%e "}) as server:
        with admin(server) as conn:
            execute(conn, "CREATE ROLE app LOGIN")
            execute(conn, "CREATE DATABASE app OWNER postgres")
        yield server


@contextlib.contextmanager
def admin(server: EphemeralPostgres) -> Iterator[connection]:
    with contextlib.closing(psycopg2.connect(server.dsn)) as conn:
        conn.autocommit = True
        yield conn


def execute(conn: connection, statement: str) -> None:
    with conn.cursor() as cursor:
        cursor.execute(statement)


def change(conn: connection, server: EphemeralPostgres, way: str, what: str) -> None:
    if way == HBA:
        (server.data_dir / HBA).write_text(f"{what}\nlocal all all trust\n")
        what = "SELECT pg_reload_conf()"
    execute(conn, what)


def insist(crew: list[Worker]) -> list[dict[str, Any]]:
    """Have all of them try to check out and in for some seconds; return what each has to tell."""
    for worker in crew:
        worker.send("insist", seconds=SECONDS, timeout=2)
    return [worker.answer() for worker in crew]


@pytest.mark.long_variants
@pytest.mark.parametrize("way", WAYS)
def test_a_fleet_whose_role_may_not_connect_any_more_says_so_and_comes_back(
    way: str, server: EphemeralPostgres, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken, given, code, words = WAYS[way]
    address = f"ipc://{runtime_dir}/b.sock"
    dsn = make_dsn(server.dsn, user="app", dbname="app")
    refusal = re.compile(rf"^{code} FATAL: ", re.MULTILINE)
    with (
        admin(server) as conn,
        server_in_a_thread(address, dsn=server.dsn, ttl_s=3.0),
        workers(CREW, dsn=dsn, broker=address, name="fleet", max_conn=LIMIT) as crew,
        BackendSampler(server.dsn, "sharedpool fleet [%") as sampler,
    ):
        for worker in crew:
            assert "backend" in worker.ask("get", name="x", timeout=10)
        change(conn, server, way, taken)
        try:
            for worker in crew:  # whoever is in stays in
                assert worker.ask("query", name="x", sql="SELECT 1") == {"rows": [[1]]}
                worker.ask("put", name="x")
            execute(
                conn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
            )
            wait_until(
                lambda: fetch_report(address).leases == 0, what="the connections to be missed"
            )
            for worker in crew:  # an idle one that has just ended would be lent once more
                wait_until(lambda w=worker: w.ask("stats")["idle"] == 0)
            before = server.log_path.stat().st_size
            told = insist(crew)
            connects = len(refusal.findall(server.log_path.read_text()[before:]))
        finally:
            change(conn, server, way, given)
        # Each once, perhaps, and once more for the code; then one of them at a time.
        assert 1 <= connects <= CREW * (3 + 3)
        for answer in told:
            assert set(answer["outcomes"]) <= {"OperationalError", "ConnectRefused"}, answer
            assert answer["outcomes"]["ConnectRefused"] > 20
            assert all(words in text for text in answer["texts"].values()), answer
            assert "the next try is in" in answer["texts"]["ConnectRefused"]
            assert answer["longest"] < 2.0, "it waited for what it could not be given"
        report = fetch_report(address)
        assert report.leases <= 1  # whose turn it is
        assert words in report.pools[0].error  # `sharedpool status` says so
        warnings = [line for line in caplog.messages if f"is refused ({code})" in line]
        assert 1 <= len(warnings) <= CREW
        assert all(words in line and "worker.py[" in line for line in warnings)
        for worker in crew:  # and keeps it: each has a slot in the end
            wait_until(
                lambda w=worker: "backend" in w.ask("get", name="x", timeout=5),
                10,
                "it to be let in",
            )
        assert fetch_report(address).pools[0].error == ""
        assert sampler.peak == LIMIT
