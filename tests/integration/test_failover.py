"""A server that turns read-only or ends connections: what one worker sees, all workers act on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import Worker
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def own_server() -> Iterator[EphemeralPostgres]:
    with EphemeralPostgres() as server:
        run_on(server, "CREATE TABLE t (x int)")
        yield server


@pytest.fixture
def server(own_server: EphemeralPostgres, runtime_dir: Path) -> Iterator[EphemeralPostgres]:
    """A server that may be made read-only and restarted; afterwards it takes writes again."""
    yield own_server
    turn_read_only(own_server, "off")


def run_on(server: EphemeralPostgres, *statements: str) -> None:
    conn = psycopg2.connect(server.dsn)
    conn.autocommit = True
    with conn.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
    conn.close()


def turn_read_only(server: EphemeralPostgres, value: str) -> None:
    run_on(
        server,
        f"ALTER SYSTEM SET default_transaction_read_only = {value}",
        "SELECT pg_reload_conf()",
    )


def read_only(conn: Any) -> bool:
    with conn.cursor() as cursor:
        cursor.execute("SHOW transaction_read_only")
        found = cursor.fetchone()[0] == "on"
    conn.rollback()
    return bool(found)


def generation(broker: sharedpool.Broker) -> int:
    (pool,) = fetch_report(broker.address).pools
    return pool.generation


def insert_in_a_block(pool: sharedpool.Pool) -> None:
    with pool.connection(timeout=10) as conn, conn.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (1)")


def insert_by_pgsimple(pool: sharedpool.Pool) -> None:
    with sharedpool.PgSimple(pool) as db:
        db.insert("t", {"x": 1})


def insert_by_hand(pool: sharedpool.Pool) -> None:
    conn = pool.get_conn(timeout=10)
    try:
        with conn.cursor() as cursor:
            cursor.execute("INSERT INTO t VALUES (1)")
    finally:
        pool.put_conn(conn)


INSERTS = {"block": insert_in_a_block, "pgsimple": insert_by_pgsimple, "put_conn": insert_by_hand}


@pytest.mark.long_variants
@pytest.mark.parametrize("how", INSERTS)
def test_one_read_only_error_replaces_the_connections_of_every_worker(
    server: EphemeralPostgres, how: str
) -> None:
    with sharedpool.start_broker(4, dsn=server.dsn) as broker:
        settings: dict[str, Any] = {"dsn": server.dsn, "broker": broker.address, "max_conn": 4}
        pool = sharedpool.config_pool(**settings)
        with Worker(**settings) as other:
            pool.put_conn(pool.get_conn(timeout=10))
            busy = other.ask("get", name="busy", timeout=10)["backend"]
            idle = other.ask("get", name="idle", timeout=10)["backend"]
            other.ask("put", name="idle")
            turn_read_only(server, "on")
            conn = pool.get_conn(timeout=10)
            wait_until(lambda: read_only(conn), what="the reload to reach the backend")
            pool.put_conn(conn)
            assert generation(broker) == 1
            with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
                INSERTS[how](pool)
            wait_until(lambda: generation(broker) == 2)
            turn_read_only(server, "off")
            # What lay idle elsewhere is replaced, and what is in use is at its checkin.
            wait_until(
                lambda: other.ask("stats")["idle"] == 0,
                what="the other worker's idle connection to be dropped",
            )
            assert other.ask("get", name="again", timeout=10)["backend"] not in (busy, idle)
            other.ask("put", name="busy")
            wait_until(lambda: other.ask("stats")["idle"] == 0)
        pool.release_all()


def test_one_backend_ended_by_an_administrator_is_no_failover(server: EphemeralPostgres) -> None:
    with sharedpool.start_broker(4, dsn=server.dsn) as broker:
        settings: dict[str, Any] = {"dsn": server.dsn, "broker": broker.address, "max_conn": 4}
        with Worker(**settings) as a, Worker(**settings) as b:
            mine = a.ask("get", name="x", timeout=10)["backend"]
            a.ask("put", name="x")
            theirs = b.ask("get", name="x", timeout=10)["backend"]
            b.ask("put", name="x")
            run_on(server, f"SELECT pg_terminate_backend({mine})")
            wait_until(
                lambda: a.ask("stats")["idle"] == 0,
                what="the dead connection to leave the cache by itself",
            )
            assert a.ask("get", name="x", timeout=10)["backend"] != mine
            assert b.ask("get", name="x")["backend"] == theirs
            assert generation(broker) == 1


def test_a_server_restart_is_unseen_by_who_held_nothing(server: EphemeralPostgres) -> None:
    with sharedpool.start_broker(3, dsn=server.dsn) as broker:
        settings: dict[str, Any] = {"dsn": server.dsn, "broker": broker.address, "max_conn": 3}
        with Worker(**settings) as a, Worker(**settings) as b:
            for worker in (a, b):
                worker.ask("get", name="x", timeout=10)
                worker.ask("put", name="x")
            held = a.ask("get", name="held", timeout=10)["backend"]
            server.restart("fast")
            wait_until(
                lambda: fetch_report(broker.address).leases == 0,
                what="the slots of the former server",
            )
            assert a.ask("query", name="held", sql="SELECT 1")["error"] in (
                "OperationalError",
                "AdminShutdown",
            )
            a.ask("put", name="held")
            for worker in (a, b):
                got = worker.ask("get", name="x", timeout=10)
                assert got["backend"] != held
                assert worker.ask("query", name="x", sql="SELECT 1")["rows"] == [[1]]
