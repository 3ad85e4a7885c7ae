"""`Pool.connect`: a real psycopg2 connection whose `close()` checks it in."""

import os
import threading
from contextlib import closing

import psycopg2
import psycopg2.extras
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, connection

from sharedpool import PoolExhausted, SharedPoolError, ThreadedConnectionPool
from tests.support.fixture_types import Backends, MakePool
from tests.support.sql import ask


def test_close_checks_it_in_and_the_next_user_gets_the_same_session(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=1)
    with closing(pool.connect()) as conn:
        pid = ask(conn, "CREATE TEMPORARY TABLE unfinished (); SELECT pg_backend_pid()")
        with pytest.raises(PoolExhausted):
            pool.connect()
    assert conn.get_transaction_status() == TRANSACTION_STATUS_IDLE
    assert pool.stats().idle == 1
    with closing(pool.connect()) as conn:
        assert ask(conn) == pid
        assert ask(conn, "SELECT to_regclass('unfinished')") is None
    assert backends(pool) == {pid}
    assert pool.stats().connects == 1


def test_psycopg2_extras_take_it(make_pool: MakePool) -> None:
    with closing(make_pool().connect()) as conn:
        assert isinstance(conn, connection)
        psycopg2.extras.register_uuid(conn_or_curs=conn)
        psycopg2.extras.register_default_json(conn, loads=lambda text: text)
        assert ask(conn, """SELECT '{"a": 1}'::json""") == '{"a": 1}'


def test_a_second_close_closes_nothing_that_others_may_get(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.connect()
    pid = ask(conn)
    conn.close()
    conn.close()
    with closing(pool.connect()) as again:
        assert ask(again) == pid


def test_close_closes_a_connection_of_get_conn_even_after_connect_had_lent_it(
    make_pool: MakePool,
) -> None:
    pool = make_pool(max_conn=1)
    with closing(pool.connect()) as conn:
        pid = ask(conn)
    conn = pool.get_conn()
    assert ask(conn) == pid
    conn.close()
    assert conn.closed
    pool.put_conn(conn)
    with closing(pool.connect()) as conn:
        assert ask(conn) != pid


def test_a_callback_may_still_close_it(make_pool: MakePool) -> None:
    unwanted: set[int] = set()

    def reset(conn: connection) -> None:
        if conn.info.backend_pid in unwanted:
            conn.close()

    pool = make_pool(max_conn=1, reset=reset)
    conn = pool.connect()
    pid = ask(conn)
    conn.close()
    with closing(pool.connect()) as conn:
        assert ask(conn) == pid
        unwanted.add(pid)
    with closing(pool.connect()) as conn:
        assert ask(conn) != pid


def test_put_conn_takes_it_too_and_its_close_means_nothing_then(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    pool.put_conn(pool.connect(), close=True)
    conn = pool.connect()
    pool.put_conn(conn)
    with pytest.raises(SharedPoolError, match="already put back"):
        pool.put_conn(conn)
    assert pool.stats().in_use == 0


def test_a_dropped_connection_comes_back(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, timeout=5)
    pid = ask(pool.connect())
    with closing(pool.connect()) as conn:
        assert ask(conn) != pid


def test_close_after_the_pool_has_ended_is_silent(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.connect()
    pool.release_all()
    conn.close()
    assert conn.closed


def test_a_forked_child_that_closes_it_leaves_the_parents_alone(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.connect()
    pid = ask(conn)
    child = os.fork()
    if child == 0:
        try:
            conn.close()
        finally:
            os._exit(0 if conn.closed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask(conn) == pid
    conn.close()
    assert pool.stats().idle == 1


def test_the_limit_holds_for_threads_that_connect_and_close(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=2, pool_manager=ThreadedConnectionPool, timeout=20)
    pids: list[int] = []

    def work() -> None:
        for _ in range(100):
            with closing(pool.connect()) as conn:
                pids.append(ask(conn))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 400
    assert len(set(pids)) <= 2
    assert pool.stats().in_use == 0


def test_close_idle_keeps_what_is_in_use(make_pool: MakePool, backends: Backends) -> None:
    pool = make_pool(max_conn=2)
    with closing(pool.connect()) as conn:
        pool.connect().close()
        assert pool.close_idle() == 1
        assert backends(pool) == {ask(conn)}
    assert pool.close_idle() == 1
    assert backends(pool) == set()
    pool.connect().close()
