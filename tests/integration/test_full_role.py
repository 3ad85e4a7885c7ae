"""PostgreSQL's own limit for the role (`CONNECTION LIMIT`), where the broker logs in as that role,
too."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support import automatic_broker, proxies
from tests.support.broker_thread import server_in_a_thread
from tests.support.commands import sharedpool_command
from tests.support.processes import workers
from tests.support.waiting import wait_until

TOO_MANY = "53300 "
OF_THE_BROKER = "application_name=sharedpool broker"


@pytest.fixture(scope="module")
def server() -> Iterator[EphemeralPostgres]:
    with EphemeralPostgres(settings={"log_line_prefix": "%e ", "log_connections": "on"}) as server:
        execute(server, "CREATE ROLE app LOGIN")
        sharedpool_command("init-db", "--dsn", server.dsn)
        yield server


def execute(server: EphemeralPostgres, statement: str) -> None:
    with contextlib.closing(psycopg2.connect(server.dsn)) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(statement)


def logged(server: EphemeralPostgres, what: str, since: int) -> int:
    """Return how many lines the server has logged with that since then."""
    return sum(what in line for line in server.log_path.read_text()[since:].splitlines())


@pytest.mark.long_variants
@pytest.mark.parametrize("more", [3, 2])
def test_max_conn_and_three_is_what_pool_and_broker_need(
    more: int,
    server: EphemeralPostgres,
    runtime_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """When all slots are taken and the broker looks for what a killed worker's connect has left, it
    has three itself."""
    monkeypatch.setattr("sharedpool.broker.core.leases.QUEUE_LIMIT_S", 2.0)
    max_conn, address, dsn = 2, f"ipc://{runtime_dir}/b.sock", make_dsn(server.dsn, user="app")
    execute(server, f"ALTER ROLE app CONNECTION LIMIT {max_conn + more}")
    since = server.log_path.stat().st_size
    with (
        proxies.LateCloser(server, late_s=6.0, accept_late_s=0.5) as slow,
        server_in_a_thread(address, max_conn=max_conn, dsn=dsn, ttl_s=3.0),
        workers(
            3, dsn=make_dsn(slow.dsn, user="app"), broker=address, max_conn=max_conn, name="limited"
        ) as (
            holder,
            victim,
            waiter,
        ),
    ):
        assert "backend" in holder.ask("get", name="x", timeout=10)
        wait_until(lambda: logged(server, OF_THE_BROKER, since) == 1, what="the control connection")
        victim.send("get", name="x", timeout=20)
        wait_until(lambda: slow.accepted == 2, what="the connect to begin")
        victim.kill()
        waiter.send("get", name="x", timeout=30)
        assert "backend" in waiter.answer()
        assert holder.ask("query", name="x", sql="SELECT 1") == {"rows": [[1]]}
    assert logged(server, OF_THE_BROKER, since) >= 2  # the server notes them before it counts
    refused = logged(server, TOO_MANY, since)
    warned = (
        "role 'app' may have 4 connections (CONNECTION LIMIT), and 5 are needed: max_conn 2,"
        " and 3 of the broker's"
    )
    if more == 3:
        assert not refused
        assert "CONNECTION LIMIT" not in caplog.text
    else:  # the look is refused, which serves as well; the next one might be a worker's
        assert refused
        assert warned in caplog.text


def test_where_it_is_far_too_low_the_fleet_shares_what_there_is_and_the_operator_is_told(
    server: EphemeralPostgres, runtime_dir: Path
) -> None:
    execute(server, "ALTER ROLE app CONNECTION LIMIT 4")
    since = server.log_path.stat().st_size
    settings = {"dsn": make_dsn(server.dsn, user="app"), "max_conn": 4, "name": "narrow"}
    with automatic_broker.seen_off(), workers(4, **settings) as crew:
        for worker in crew:
            worker.send("insist", seconds=4, timeout=4)
        (address,) = wait_until(automatic_broker.living, what="the broker to be started")
        wait_until(
            lambda: any(pool.error for pool in fetch_report(address).pools),
            what="the server to be found full",
        )
        (line,) = [
            line
            for line in sharedpool_command("status", "--broker", address).stdout.splitlines()
            if "cannot open connections" in line
        ]
        assert 'too many connections for role "app"' in line
        answers = [worker.answer() for worker in crew]
    for answer in answers:
        assert answer["outcomes"].get("done", 0) > 5, answers
        assert set(answer["outcomes"]) <= {"done", "OperationalError"}
    assert sum(answer["outcomes"].get("OperationalError", 0) for answer in answers) <= 12
    assert logged(server, TOO_MANY, since) <= 30
    log = "".join(path.read_text() for path in runtime_dir.glob("sharedpool/*.log"))
    assert (
        log.count(
            "role 'app' may have 4 connections (CONNECTION LIMIT), and 7 are needed: max_conn 4,"
            " and 3"
        )
        == 1
    )
    assert 'too many connections for role "app"' in log
