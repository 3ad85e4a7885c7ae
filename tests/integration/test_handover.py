"""A live connection moves from one process to another, and does there all that a connection
does."""

import io
import random

import psycopg2
import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.handover import SUPPORTED
from tests.support.pool_pair import MakePair, leave_what_comes, moved, report
from tests.support.processes import Worker, workers
from tests.support.running_query import Query
from tests.support.sql import ask
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)


def test_it_is_the_same_backend_and_a_plain_connection(
    pair: MakePair, broker: sharedpool.Broker, name: str, postgres: EphemeralPostgres
) -> None:
    a, b = pair()
    conn = moved(a, b, lambda conn: None)
    assert isinstance(conn, extensions.connection)
    assert conn.get_backend_pid() == conn.info.backend_pid == ask(conn, "SELECT pg_backend_pid()")
    assert conn.info.transaction_status == extensions.TRANSACTION_STATUS_INTRANS
    conn.rollback()
    assert (conn.status, conn.closed, conn.autocommit) == (extensions.STATUS_READY, 0, False)
    assert conn.server_version == conn.info.server_version > 100000
    assert conn.encoding == "UTF8"
    b.put_conn(conn)
    assert report(broker, name).handovers > 0
    assert (
        b.stats().connects == 0
        or a.stats().connects == 0
        or b.stats().connects + a.stats().connects <= 2
    )


def test_everything_that_a_connection_does_works_after_a_move(pair: MakePair) -> None:
    a, b = pair()
    conn = moved(a, b, lambda conn: None)
    with conn.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE rows (n int, t text)")
        cursor.copy_expert("COPY rows FROM STDIN", io.StringIO("1\tä€\n2\tb\n"))
        out = io.StringIO()
        cursor.copy_expert("COPY (SELECT * FROM rows ORDER BY n) TO STDOUT", out)
        assert out.getvalue() == "1\tä€\n2\tb\n"
        cursor.execute("SELECT repeat('x', 10000000)")
        assert cursor.fetchone() == ("x" * 10_000_000,)
    with conn.cursor("named") as named:
        named.execute("SELECT * FROM generate_series(1, 5000)")
        assert sum(n for (n,) in named) == 12502500
    large = conn.lobject(0, "wb")
    large.write(b"bytes")
    large.unlink()
    conn.commit()
    conn.autocommit = True
    with conn.cursor() as cursor:
        cursor.execute("LISTEN here; NOTIFY here, 'word'; DO $$ BEGIN RAISE NOTICE 'said'; END $$")
    assert [n.payload for n in conn.notifies] == ["word"]
    assert "said" in conn.notices[-1]
    assert conn.notifies[0].pid == conn.info.backend_pid
    conn.autocommit = False
    with pytest.raises(psycopg2.errors.DivisionByZero):
        ask(conn, "SELECT 1/0")
    conn.rollback()
    conn.set_client_encoding("LATIN1")
    assert ask(conn, "SELECT %s", "ä") == "ä"
    conn.rollback()
    conn.set_session(readonly=True, isolation_level="SERIALIZABLE")
    assert ask(conn, "SHOW transaction_isolation") == "serializable"
    b.put_conn(conn)
    assert ask(b.get_conn(), "SHOW transaction_isolation") == "read committed"


def test_a_query_of_a_connection_that_has_moved_can_be_cancelled(pair: MakePair) -> None:
    a, b = pair()
    conn = moved(a, b, lambda conn: None)
    query = Query(conn)
    query.cancel()
    assert isinstance(query.end(), psycopg2.errors.QueryCanceled)
    conn.rollback()
    assert ask(conn, "SELECT 1") == 1


def test_the_object_of_a_connection_that_was_given_is_dead(pair: MakePair) -> None:
    a, b = pair()
    old = a.get_conn()
    a.put_conn(old)
    got = b.get_conn()
    ask(got, "SELECT 1")
    for use in (old.cancel, old.commit, lambda: ask(old, "SELECT 1")):
        with pytest.raises(psycopg2.InterfaceError, match="already closed"):
            use()
    old.close()
    assert ask(got, "SELECT 1") == 1


def test_configure_runs_again_and_its_settings_hold(pair: MakePair) -> None:
    def configure(conn: extensions.connection) -> None:
        with conn.cursor() as cursor:
            cursor.execute("SET statement_timeout TO '7s'")
        conn.commit()

    a, b = pair(configure=configure)
    conn = moved(a, b, lambda conn: None)
    assert ask(conn, "SHOW statement_timeout") == "7s"


def test_configure_runs_on_what_came_for_one_who_had_left(
    pair: MakePair, broker: sharedpool.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies idle then, and the next checkout is a short one."""

    def configure(conn: extensions.connection) -> None:
        with conn.cursor() as cursor:
            cursor.execute("SET statement_timeout TO '7s'")
        conn.commit()

    _, b = pair(configure=configure)
    leave_what_comes(b, broker, monkeypatch)
    wait_until(lambda: b.stats().idle == 1)
    conn = b.get_conn()
    assert ask(conn, "SHOW statement_timeout") == "7s"


def test_a_process_that_waits_before_it_knows_the_broker_is_passed_a_connection(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str
) -> None:
    settings = {"dsn": postgres.dsn, "broker": broker.address, "name": name, "max_conn": 1}
    with workers(2, **settings) as (first, second):
        held = first.ask("get", name="x", timeout=20)["backend"]
        second.send("get", name="x", timeout=20)
        wait_until(lambda: report(broker, name).waiting == 1)
        first.ask("put", name="x")
        assert second.answer()["backend"] == held


def test_handover_off_closes_and_opens(
    pair: MakePair, broker: sharedpool.Broker, name: str
) -> None:
    a, b = pair(handover="off")
    conn = a.get_conn()
    pid = conn.info.backend_pid
    a.put_conn(conn)
    assert b.get_conn().info.backend_pid != pid
    assert report(broker, name).handovers == 0


def test_a_parked_connection_expires(pair: MakePair, broker: sharedpool.Broker, name: str) -> None:
    """Given while nobody waits any more: the broker keeps it, but no longer than a worker would."""
    _, b = pair(expiration=0.5)
    held = b.get_conn()
    b.put_conn(held)
    wait_until(lambda: report(broker, name).leases == 0, 10, "the connection to expire")


def test_a_backend_that_ends_while_parked_or_moving_is_not_handed_out(
    pair: MakePair, server_connection: extensions.connection
) -> None:
    a, b = pair()
    rng = random.Random(1)
    for _ in range(20):
        giver, taker = rng.sample((a, b), 2)
        conn = giver.get_conn()
        pid = conn.info.backend_pid
        giver.put_conn(conn)
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        got = taker.get_conn()
        assert ask(got, "SELECT pg_backend_pid()") != pid
        taker.put_conn(got)
    assert a._local.handover_enabled  # that is no reason to do without
    assert b._local.handover_enabled


def test_nothing_is_handed_over_between_processes_that_connect_to_different_databases(
    broker: sharedpool.Broker, database: str, postgres: EphemeralPostgres
) -> None:
    settings = {"broker": broker.address, "name": "one name, two databases", "max_conn": 1}
    names: dict[Worker, set[str]] = {}
    with (
        workers(1, dsn=database, **settings) as (first,),
        workers(1, dsn=postgres.dsn, **settings) as (second,),
    ):
        for _ in range(3):  # to and fro
            for each in (first, second):
                assert "backend" in each.ask("get", name="it", timeout=10)
                rows = each.ask("query", name="it", sql="SELECT current_database()")["rows"]
                names.setdefault(each, set()).add(rows[0][0])
                assert "at" in each.ask("put", name="it")
    found = extensions.parse_dsn(database)["dbname"]
    assert names == {first: {found}, second: {"postgres"}}
