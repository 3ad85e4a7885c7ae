"""What is checked out is clean and alive, and what may not be put back."""

import os
import signal
import threading
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, connection

import sharedpool
from sharedpool import BrokerUnavailable, PoolError, ThreadedConnectionPool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.fixture_types import Backends, MakePool
from tests.support.sql import ask
from tests.support.waiting import wait_until

# --- what is checked out is clean


def test_an_open_transaction_is_rolled_back(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    ask(conn, "SELECT txid_current()")
    pool.put_conn(conn)
    assert conn.get_transaction_status() == TRANSACTION_STATUS_IDLE
    again = pool.get_conn()
    assert again is conn


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK", "END"])
def test_the_next_user_can_roll_back_when_a_transaction_was_ended_by_sql(
    make_pool: MakePool, end: str
) -> None:
    """psycopg2 does not see that; it would take the next user's first statement for the middle of a
    transaction."""
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    conn.cursor().execute("CREATE TEMP TABLE mine AS SELECT 1 AS n")
    conn.commit()
    ask(conn, "SELECT count(*) FROM mine")
    conn.cursor().execute(end)
    pool.put_conn(conn)
    again = pool.get_conn()
    assert again is conn
    again.cursor().execute("DELETE FROM mine")
    again.rollback()
    assert ask(again, "SELECT count(*) FROM mine") == 1


def test_a_failed_transaction_is_rolled_back(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    with pytest.raises(psycopg2.errors.DivisionByZero):
        ask(conn, "SELECT 1/0")
    pool.put_conn(conn)
    assert ask(pool.get_conn(), "SELECT 1") == 1


def test_client_side_settings_do_not_reach_the_next_user(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    conn.set_session(
        isolation_level="SERIALIZABLE", readonly=True, deferrable=True, autocommit=True
    )
    pool.put_conn(conn)
    again = pool.get_conn()
    assert (again.autocommit, again.readonly, again.deferrable, again.isolation_level) == (
        False,
        None,
        None,
        None,
    )
    assert ask(again, "SHOW transaction_isolation") == "read committed"


def test_settings_made_by_configure_stay(make_pool: MakePool) -> None:
    def configure(conn: connection) -> None:
        conn.autocommit = True

    pool = make_pool(max_conn=1, configure=configure)
    conn = pool.get_conn()
    conn.autocommit = False
    pool.put_conn(conn)
    assert pool.get_conn().autocommit


def test_a_connection_closed_by_its_user_is_replaced_and_costs_no_slot(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    for _ in range(3):
        conn = pool.get_conn()
        conn.close()
        pool.put_conn(conn)
    assert ask(pool.get_conn())


def test_a_connection_broken_in_use_is_replaced_and_costs_no_slot(
    make_pool: MakePool, server_connection: connection
) -> None:
    pool = make_pool(max_conn=1)
    for _ in range(3):
        conn = pool.get_conn()
        ask(server_connection, f"SELECT pg_terminate_backend({ask(conn)})")
        with pytest.raises(psycopg2.OperationalError):
            ask(conn)
        pool.put_conn(conn)
    assert ask(pool.get_conn())
    assert pool.stats().discarded == 3


def test_a_connection_that_died_idle_is_never_handed_out(
    make_pool: MakePool,
    server_connection: connection,
    backends: Backends,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sharedpool.worker.pool.CHECK_AFTER_S", -1.0)
    monkeypatch.setattr("sharedpool.worker.checkout.CHECK_AFTER_S", -1.0)
    pool = make_pool(max_conn=1)
    for _ in range(5):
        with pool.connection() as conn:
            pid = ask(conn)
        ask(server_connection, f"SELECT pg_terminate_backend({pid})")
        wait_until(lambda: not backends(pool))
    assert ask(pool.get_conn()) != pid


# --- put_conn in the wrong


def test_a_connection_that_died_idle_is_not_opened_again_without_the_brokers_word(
    make_pool: MakePool,
    postgres: EphemeralPostgres,
    backends: Backends,
    runtime_dir: Path,
    server_connection: connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under the old lease, which another may have by now: this process may have been frozen for any
    time."""
    for module in ("pool", "checkout"):
        monkeypatch.setattr(f"sharedpool.worker.{module}.CHECK_AFTER_S", -1.0)
    with sharedpool.start_broker(1, dsn=postgres.dsn) as broker:
        pool = make_pool(broker=broker.address, max_conn=1)
        conn = pool.get_conn(timeout=10)
        pid = ask(conn)
        pool.put_conn(conn)
        os.kill(broker.pid, signal.SIGSTOP)  # it says nothing of any lease
        try:
            ask(server_connection, f"SELECT pg_terminate_backend({pid})")
            wait_until(lambda: not backends(pool), what="the backend's end")
            with pytest.raises(BrokerUnavailable):
                pool.get_conn(timeout=0.5)
            assert not backends(pool)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        conn = pool.get_conn(timeout=10)
        assert ask(conn) != pid
        pool.put_conn(conn)


def test_a_second_put_is_refused(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    pool.put_conn(conn)
    with pytest.raises(PoolError, match="already put back"):
        pool.put_conn(conn)
    pool.put_conn(conn, fail_silently=True)
    assert pool.stats().idle == 1


def test_a_foreign_connection_is_refused(
    make_pool: MakePool, server_connection: connection
) -> None:
    pool, other = make_pool(), make_pool()
    with pytest.raises(PoolError, match="did not lend out"):
        pool.put_conn(server_connection)
    conn = other.get_conn()
    with pytest.raises(PoolError, match="did not lend out"):
        pool.put_conn(conn)
    pool.put_conn(conn, fail_silently=True)
    assert not server_connection.closed
    other.put_conn(conn)


def test_of_two_threads_that_put_the_same_connection_one_succeeds(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, pool_manager=ThreadedConnectionPool)
    for _ in range(50):
        conn = pool.get_conn()
        outcomes: list[str] = []
        gate = threading.Barrier(2)

        def put(
            conn: connection = conn, gate: threading.Barrier = gate, outcomes: list[str] = outcomes
        ) -> None:
            gate.wait()
            try:
                pool.put_conn(conn)
                outcomes.append("put")
            except PoolError:
                outcomes.append("refused")

        threads = [threading.Thread(target=put) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["put", "refused"]
        assert pool.stats().idle == 1
