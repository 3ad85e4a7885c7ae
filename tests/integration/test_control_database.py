"""The control connection's database: the connection blocks no DROP DATABASE, and its end is no
failover."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import connection, make_dsn, parse_dsn

import sharedpool
from sharedpool.broker.postgres.leadership import Leadership
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import Worker
from tests.support.waiting import wait_until


def run(conn: connection, statement: str, *arguments: Any) -> list[Any]:
    with conn.cursor() as cursor:
        cursor.execute(statement, arguments or None)
        return cursor.fetchall() if cursor.description else []


def control_sessions(conn: connection) -> list[tuple[int, str]]:
    """Backend and database of every broker's control connection."""
    return run(
        conn,
        "SELECT pid, datname FROM pg_stat_activity"
        " WHERE application_name LIKE 'sharedpool broker%'",
    )


def is_there(conn: connection, backend: int) -> bool:
    return bool(run(conn, "SELECT FROM pg_stat_activity WHERE pid = %s", backend))


def log_of(directory: Path) -> str:
    return "".join(path.read_text() for path in directory.glob("sharedpool/*.log"))


@pytest.fixture
def role(postgres: EphemeralPostgres, server_connection: connection) -> Iterator[str]:
    """The conninfo string of an ordinary role and a database of its own, to which no other user has
    a session."""
    name = f"tenant_{os.urandom(3).hex()}"
    run(server_connection, f"CREATE ROLE {name} LOGIN CREATEDB")
    run(server_connection, f"CREATE DATABASE {name} OWNER {name}")
    yield make_dsn(postgres.dsn, user=name, dbname=name)
    run(server_connection, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    run(server_connection, f"DROP DATABASE IF EXISTS {name}_copy WITH (FORCE)")
    run(server_connection, f"DROP ROLE {name}")


def test_an_automatic_broker_keeps_nobody_from_copying_renaming_or_dropping_a_database(
    role: str, server_connection: connection, runtime_dir: Path
) -> None:
    name = parse_dsn(role)["user"]
    with Worker(dsn=role, max_conn=2) as worker:
        worker.ask("get", name="x", timeout=20)
        wait_until(
            lambda: (
                [database for _, database in control_sessions(server_connection)] == ["postgres"]
            )
        )
        worker.ask("put", name="x", close=True)  # its process goes on, as a test runner does
        run(server_connection, f"CREATE DATABASE {name}_copy TEMPLATE {name}")
        run(server_connection, f"ALTER DATABASE {name} RENAME TO {name}_renamed")
        run(server_connection, f"DROP DATABASE {name}_renamed")
    assert "in database 'postgres'" in log_of(runtime_dir)


def test_it_is_nowhere_while_nobody_uses_the_broker(
    role: str, server_connection: connection, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDPOOL_LINGER", "30")
    for _ in range(2):  # who comes to a broker at rest is served as the first one was
        with Worker(dsn=role, max_conn=1) as worker, Worker(dsn=role, max_conn=1) as other:
            worker.ask("get", name="x", timeout=20)
            wait_until(lambda: control_sessions(server_connection))
            assert other.ask("get", name="x")["error"] == "PoolExhausted"
        wait_until(
            lambda: not control_sessions(server_connection),
            what="the control connection to be closed",
        )
    assert log_of(runtime_dir).count("enforces") == 1


def test_where_the_role_may_not_enter_the_maintenance_database_it_is_in_the_pools_own(
    role: str, server_connection: connection, runtime_dir: Path
) -> None:
    name = parse_dsn(role)["user"]
    run(server_connection, "REVOKE CONNECT ON DATABASE postgres FROM PUBLIC")
    try:
        with Worker(dsn=role, max_conn=1) as worker:
            worker.ask("get", name="x", timeout=20)
            wait_until(
                lambda: [database for _, database in control_sessions(server_connection)] == [name]
            )
        wait_until(
            lambda: not control_sessions(server_connection),
            what="the control connection to be closed",
        )
        run(server_connection, f"DROP DATABASE {name}")
    finally:
        run(server_connection, "GRANT CONNECT ON DATABASE postgres TO PUBLIC")
    assert f"in database '{name}', since 'postgres' does not let us in" in log_of(runtime_dir)


def test_a_database_that_was_given_is_taken_as_it_is(
    role: str, server_connection: connection
) -> None:
    with sharedpool.start_broker(1, dsn=role):
        wait_until(
            lambda: (
                [database for _, database in control_sessions(server_connection)]
                == [parse_dsn(role)["user"]]
            )
        )


def test_two_brokers_in_different_databases_see_each_other(
    postgres: EphemeralPostgres, role: str
) -> None:
    told: list[str] = []

    class Told:
        def __init__(self) -> None:
            self.takeover = self  # the part of the ledger that is told

        def outranked(self, now: float, why: str) -> Any:
            told.append("outranked")

        def leads(self, now: float, *, after_another: bool) -> Any:
            told.append("leads")

    with ExitStack() as stack:
        claims = []
        for instance, dsn in (("aaaaaaaa", postgres.dsn), ("bbbbbbbb", role)):
            leadership = Leadership("a scope", instance, lambda word: word(Told(), 0.0))  # type: ignore[arg-type]
            conn = stack.enter_context(
                closing(psycopg2.connect(dsn, application_name=leadership.application_name))
            )
            conn.autocommit = True
            claims.append((leadership, conn))
        (first, held), (second, waits) = claims
        assert first.claim(held, 0.0) == ""
        assert "sharedpool broker aaaaaaaa" in second.claim(waits, 0.0)
        held.close()
        wait_until(lambda: second.claim(waits, 0.0) == "")
    assert told == ["leads", "outranked", "leads"]


# --- its end


def test_time_limits_of_the_role_end_the_workers_idle_connections_and_not_the_brokers(
    role: str, server_connection: connection, runtime_dir: Path
) -> None:
    name = parse_dsn(role)["user"]
    for limit in (
        "idle_session_timeout",
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
    ):
        run(server_connection, f"ALTER ROLE {name} SET {limit} = '300ms'")
    with Worker(dsn=role, max_conn=1) as worker:
        seen = []
        for _ in range(3):
            backend = worker.ask("get", name="x", timeout=20)["backend"]
            seen.append(control_sessions(server_connection))
            worker.ask("put", name="x")
            wait_until(
                lambda backend=backend: not is_there(server_connection, backend), what="its end"
            )
        assert len(seen[0]) == 1
        assert seen == seen[:1] * 3
        worker.ask("get", name="x", timeout=20)
        worker.ask(
            "query", name="x", sql="SET LOCAL statement_timeout = 0; SELECT pg_sleep(1)"
        )  # while it has rest
        assert control_sessions(server_connection) == seen[0]
    log = log_of(runtime_dir)
    assert "generation" not in log
    assert "WARNING" not in log


def test_the_end_of_the_control_connection_is_no_failover(
    role: str, server_connection: connection, runtime_dir: Path
) -> None:
    with Worker(dsn=role, max_conn=2) as a, Worker(dsn=role, max_conn=2) as b:
        for worker in (a, b):
            worker.ask("get", name="x", timeout=20)
        theirs = b.ask("query", name="x", sql="SELECT pg_backend_pid()")["rows"][0][0]
        b.ask("put", name="x")
        (control,) = control_sessions(server_connection)
        mine = a.ask("query", name="x", sql="SELECT pg_backend_pid()")["rows"][0][0]
        a.ask("put", name="x")
        run(
            server_connection,
            "SELECT pg_terminate_backend(pid) FROM unnest(%s) AS pid",
            [control[0], mine],
        )
        wait_until(lambda: not is_there(server_connection, mine))
        wait_until(
            lambda: a.ask("stats")["idle"] == 0, what="the dead connection to leave the cache"
        )
        assert a.ask("get", name="x", timeout=20)["backend"] != mine
        wait_until(
            lambda: control_sessions(server_connection) not in ([], [control]),
            what="a new control connection",
        )
        assert b.ask("get", name="x")["backend"] == theirs
    log = log_of(runtime_dir)
    assert "generation" not in log
    assert "WARNING" not in log
