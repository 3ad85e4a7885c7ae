"""One process: checkout, checkin, the limit, keys and threads — on a real server."""

import threading
import time
from typing import Any

import psycopg2
import psycopg2.extras
import psycopg2.pool
import pytest
from psycopg2.extensions import STATUS_READY, connection

from sharedpool import PoolError, PoolExhausted, PoolTimeout, ThreadedConnectionPool
from tests.support.fixture_types import Backends, MakePool
from tests.support.sql import ask
from tests.support.waiting import wait_until

# --- a pool at all


def test_a_connection_comes_back_and_is_used_again(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=2)
    first = pool.get_conn()
    pid = ask(first)
    pool.put_conn(first)
    second = pool.get_conn()
    assert second is first
    assert ask(second) == pid
    assert pool.stats().connects == 1
    assert pool.stats().hits == 1


def test_the_most_recently_used_connection_comes_first(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=3)
    a, b, c = pool.get_conn(), pool.get_conn(), pool.get_conn()
    for conn in (a, c, b):
        pool.put_conn(conn)
    assert [pool.get_conn(), pool.get_conn(), pool.get_conn()] == [b, c, a]


def test_it_is_a_plain_psycopg2_connection(make_pool: MakePool) -> None:
    conn = make_pool().get_conn()
    assert isinstance(conn, connection)
    assert conn.status == STATUS_READY
    assert not conn.autocommit
    psycopg2.extras.register_hstore  # noqa: B018 — psycopg2.extras refuses proxies; this one it takes:
    psycopg2.extras.register_uuid(conn_or_curs=conn)
    with conn.cursor(cursor_factory=psycopg2.extras.DictCursor) as cursor:
        cursor.execute("SELECT 1 AS one")
        (row,) = cursor.fetchall()
        assert row["one"] == 1


def test_the_callers_connection_factory_is_kept(make_pool: MakePool) -> None:
    class Mine(connection):
        closed_by = None

        def close(self) -> None:
            Mine.closed_by = "me"
            super().close()

    pool = make_pool(connection_factory=Mine)
    conn = pool.get_conn()
    assert isinstance(conn, Mine)
    pool.put_conn(conn, close=True)
    assert Mine.closed_by == "me"


def test_a_connection_factory_may_have_slots_of_its_own(make_pool: MakePool) -> None:
    class Slotted(psycopg2.extensions.connection):
        __slots__ = ("noted",)
        noted: int

    pool = make_pool(connection_factory=Slotted)
    with pool.connection() as conn:
        assert isinstance(conn, Slotted)
        conn.noted = 1
    with pool.connection() as again:
        assert again is conn


def test_cursor_factory_and_options_reach_psycopg2(make_pool: MakePool) -> None:
    pool = make_pool(
        cursor_factory=psycopg2.extras.DictCursor, options="-c work_mem=7MB", connect_timeout=7
    )
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("SHOW work_mem")
        row: Any = cursor.fetchone()
        assert row["work_mem"] == "7MB"
        assert conn.info.dsn_parameters["connect_timeout"] == "7"


def test_backends_are_named_after_the_pool_unless_the_caller_names_them(
    make_pool: MakePool,
) -> None:
    pool = make_pool()
    assert ask(pool.get_conn(), "SHOW application_name").startswith(f"sharedpool {pool.name} [")
    assert ask(make_pool(application_name="mine").get_conn(), "SHOW application_name") == "mine"


def test_psycopg2_pools_names_do_the_same(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.getconn()
    pool.putconn(conn)
    assert pool.getconn("k") is conn
    pool.putconn(conn, "k")
    pool.closeall()
    assert pool.disposed


# --- the limit


def test_exhaustion_is_told_at_once_and_in_full(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=2)
    kept = [pool.get_conn(), pool.get_conn()]
    with pytest.raises(PoolExhausted) as caught:
        pool.get_conn()
    text = str(caught.value)
    assert isinstance(caught.value, psycopg2.pool.PoolError)
    assert f"'{pool.name}'" in text
    assert "limit of 2" in text
    assert f"[{__import__('os').getpid()}] 2" in text  # who holds most: this process, 2
    pool.put_conn(kept.pop())
    pool.get_conn()


def test_a_waiter_is_served_by_a_checkin(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, pool_manager=ThreadedConnectionPool)
    conn = pool.get_conn()
    got: list[connection] = []
    waiter = threading.Thread(target=lambda: got.append(pool.get_conn(timeout=10)))
    waiter.start()
    wait_until(lambda: pool.stats().waiting == 1)
    pool.put_conn(conn)
    waiter.join(10)
    assert got == [conn]  # handed on: no close, no connect
    assert (pool.stats().handed_on, pool.stats().hits, pool.stats().connects) == (1, 0, 1)


def test_threads_are_served_in_the_order_they_came(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, pool_manager=ThreadedConnectionPool)
    conn = pool.get_conn()
    order: list[int] = []

    def take(number: int) -> None:
        with pool.connection(timeout=20):
            order.append(number)

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        wait_until(lambda number=number: pool.stats().waiting == number + 1)
    pool.put_conn(conn)
    for thread in threads:
        thread.join(20)
    assert order == [0, 1, 2, 3, 4]


def test_a_wait_ends_at_its_deadline_and_says_who_holds(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    started = time.monotonic()
    with pytest.raises(PoolTimeout, match=r"within 0\.7 s.*held most by .*1 \(longest"):
        pool.get_conn(timeout=0.7)
    assert 0.7 <= time.monotonic() - started < 2
    assert ask(conn)  # nothing happened to it
    pool.put_conn(conn)
    assert pool.get_conn(timeout=30) is conn  # the waiter that gave up swallowed nothing


def test_the_pools_own_timeout_is_the_default(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, timeout=0.5)
    _conn = pool.get_conn(timeout=30)
    with pytest.raises(PoolTimeout):
        pool.get_conn()
    with pytest.raises(PoolExhausted):
        pool.get_conn(timeout=0)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_that_makes_no_sense_is_refused(make_pool: MakePool, timeout: float) -> None:
    pool = make_pool(max_conn=1)
    _conn = pool.get_conn()
    with pytest.raises(ValueError, match="timeout"):
        pool.get_conn(timeout=timeout)


def test_a_slot_is_free_when_put_conn_has_closed(make_pool: MakePool, backends: Backends) -> None:
    pool = make_pool(max_conn=1)
    for _ in range(20):
        conn = pool.get_conn()
        pool.put_conn(conn, close=True)
        assert backends(pool) == set()


def test_without_pooling_every_put_closes_under_the_same_limit(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=1, disable_pooling=True)
    first = pool.get_conn()
    pid = ask(first)
    with pytest.raises(PoolExhausted):
        pool.get_conn()
    pool.put_conn(first)
    assert backends(pool) == set()
    assert ask(pool.get_conn()) != pid


def test_the_limit_is_set_by_the_first_and_told_to_the_others(
    make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(max_conn=2)
    _kept = pool.get_conn()
    other = make_pool(max_conn=7, name=pool.name)
    _conn = other.get_conn()
    wait_until(lambda: other.max_conn == 2)
    wait_until(  # what the link logs is written by another thread
        lambda: [
            r for r in caplog.records if "max_conn=7 was asked for, 2 is enforced" in r.message
        ]
    )
    assert pool.max_conn == 2


# --- keys


def test_the_same_key_gives_the_same_connection(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=2)
    conn = pool.get_conn("a")
    assert pool.get_conn("a") is conn
    other = pool.get_conn("b")
    assert other is not conn
    with pytest.raises(PoolError, match="key 'a', not 'b'"):
        pool.put_conn(conn, "b")
    pool.put_conn(conn, "a")
    pool.put_conn(other)
    assert pool.get_conn("a") is other  # a new checkout: the most recently used


# --- one thread, many threads


def test_a_simple_pool_refuses_a_second_thread(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=2)
    conn = pool.get_conn()
    errors: list[BaseException] = []

    def use() -> None:
        for call in (pool.get_conn, lambda: pool.put_conn(conn)):
            try:
                call()
            except PoolError as error:
                errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(errors) == 2
    assert all(
        "belongs to one thread" in str(error) and "ThreadedConnectionPool" in str(error)
        for error in errors
    )
    pool.put_conn(conn)


def test_many_threads_share_the_limit(make_pool: MakePool, backends: Backends) -> None:
    pool = make_pool(max_conn=3, pool_manager=ThreadedConnectionPool)
    inside, peak, done = 0, 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, peak, done
        for _ in range(50):
            with pool.connection(timeout=30) as conn:
                with lock:
                    inside += 1
                    peak = max(peak, inside)
                assert ask(conn, "SELECT 1") == 1
                with lock:
                    inside -= 1
                    done += 1

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == 500
    assert peak <= 3
    assert len(backends(pool)) <= 3


# --- connection()


def test_the_block_commits_rolls_back_and_always_returns(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE t (n int)")
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (1)")

    def fail(error: type[BaseException]) -> None:
        with pool.connection() as conn, conn.cursor() as cursor:
            cursor.execute("INSERT INTO t VALUES (2)")
            raise error

    for error in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error):
            fail(error)
    with pool.connection() as conn:
        assert ask(conn, "SELECT sum(n) FROM t") == 1
    assert pool.stats().idle == 1
