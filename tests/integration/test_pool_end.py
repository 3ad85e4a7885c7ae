"""A pool's end, and its successor of the same name."""

import threading

import psycopg2
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_ACTIVE, connection

import sharedpool
from sharedpool import PoolClosed, PoolError, ThreadedConnectionPool
from tests.support.fixture_types import Backends, MakePool
from tests.support.sql import ask
from tests.support.waiting import wait_until


def test_release_all_closes_everything_and_ends_the_pool(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=3)
    idle, used = pool.get_conn(), pool.get_conn()
    pool.put_conn(idle)
    assert not pool.disposed
    pool.release_all()
    assert pool.disposed
    assert backends(pool) == set()
    assert used.closed
    for call in (pool.get_conn, pool.release_all, lambda: pool.put_conn(used)):
        with pytest.raises(PoolClosed):
            call()
    pool.put_conn(used, fail_silently=True)


def test_release_all_ends_a_query_in_another_thread(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=2, pool_manager=ThreadedConnectionPool)
    errors: list[BaseException] = []

    conns: list[connection] = []

    def sleep() -> None:
        conn = pool.get_conn()
        conns.append(conn)
        try:
            ask(conn, "SELECT pg_sleep(60)")
        except psycopg2.Error as error:
            errors.append(error)

    thread = threading.Thread(target=sleep)
    thread.start()
    wait_until(lambda: conns and conns[0].get_transaction_status() == TRANSACTION_STATUS_ACTIVE)
    pool.release_all()
    thread.join(10)
    assert errors
    assert not thread.is_alive()
    wait_until(lambda: not backends(pool), what="the broker to end the query")


def test_release_all_wakes_those_who_wait(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, pool_manager=ThreadedConnectionPool)
    _conn = pool.get_conn()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            pool.get_conn(timeout=60)
        except PoolError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: pool.stats().waiting == 1)
    pool.release_all()
    thread.join(10)
    assert [type(error) for error in errors] == [PoolClosed]


def test_a_pool_of_the_same_name_takes_over_and_the_old_one_keeps_nothing_idle(
    make_pool: MakePool, backends: Backends
) -> None:
    old = make_pool(max_conn=2)
    out = old.get_conn()
    old.put_conn(old.get_conn())
    new = make_pool(max_conn=2, name=old.name)
    assert sharedpool.get_pool(old.name) is new
    assert len(backends(old)) == 1
    old.put_conn(out)
    assert len(backends(old)) == 0
    kept = [new.get_conn(), new.get_conn()]
    assert len(kept) == 2


def test_get_pool_says_what_is_missing() -> None:
    with pytest.raises(
        PoolError, match=r"no pool 'nobody' is configured: call sharedpool\.config_pool\(\) first"
    ):
        sharedpool.get_pool("nobody")
