"""One process: checkout, checkin, scavenging, callbacks, errors — on a real broker and a real
PostgreSQL."""

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg2
import psycopg2.extras
import psycopg2.pool
import pytest
from psycopg2.extensions import (
    STATUS_READY,
    TRANSACTION_STATUS_ACTIVE,
    TRANSACTION_STATUS_IDLE,
    connection,
)

import sharedpool
from sharedpool import (
    BrokerUnavailable,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    ThreadedConnectionPool,
)
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.messages import ReleaseReason
from sharedpool.worker.checkout import Checkout, checkout
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Lease
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


# --- scavenging


def test_idle_connections_expire_from_their_checkin(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=2, expiration=0.3)
    a, b = pool.get_conn(), pool.get_conn()
    held_since = time.monotonic()
    wait_until(lambda: time.monotonic() - held_since > 0.4)
    pool.put_conn(a)  # out for longer than `expiration`: idle for no time at all
    assert pool.stats().idle == 1
    since = time.monotonic()
    wait_until(lambda: time.monotonic() - since > 0.3)
    pool.put_conn(b)
    assert pool.stats().idle == 1
    wait_until(lambda: len(backends(pool)) == 1, what="the backend's end")


def test_purge_tells_how_many_it_closed(make_pool: MakePool, backends: Backends) -> None:
    pool = make_pool(max_conn=3)
    conns = [pool.get_conn() for _ in range(3)]
    for conn in conns:
        pool.put_conn(conn)
    assert pool.purge_expired_connections() == 0
    pool._local.cache.expiration_s = 0.0  # as if 60 seconds had passed
    assert pool.purge_expired_connections() == 3
    assert backends(pool) == set()


def test_a_pool_that_is_never_called_again_loses_its_expired_connections(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=2, expiration=0.3)
    a, b = pool.get_conn(), pool.get_conn()
    pool.put_conn(a)
    pool.put_conn(b)
    wait_until(lambda: not backends(pool), what="the link's thread to close both")


def test_max_lifetime_holds_in_a_pool_that_is_never_called_again(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=1, expiration=1, max_lifetime=0.3)
    pool.put_conn(pool.get_conn())
    wait_until(lambda: not backends(pool))


def test_max_lifetime_replaces_at_checkin_and_checkout(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=1, max_lifetime=0.2)
    conn = pool.get_conn()
    opened = time.monotonic()
    wait_until(lambda: time.monotonic() - opened > 0.25)
    pool.put_conn(conn)
    assert conn.closed
    assert pool.stats().idle == 0
    pool.put_conn(pool.get_conn())
    opened = time.monotonic()
    wait_until(lambda: time.monotonic() - opened > 0.25)
    conn = pool.get_conn()
    assert backends(pool) == {ask(conn)}
    pool.put_conn(conn)


# --- callbacks


@pytest.mark.parametrize("name", ["configure", "check", "reset"])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_a_callback_that_raises_costs_the_connection_and_no_slot(
    make_pool: MakePool, backends: Backends, name: str, error: BaseException
) -> None:
    armed = True

    def callback(conn: connection) -> None:
        if armed:
            raise error

    pool = make_pool(max_conn=1, **{name: callback})
    for _ in range(3):
        with pytest.raises(type(error)) as caught:
            pool.put_conn(pool.get_conn())
        assert caught.value is error
        assert backends(pool) == set()
    armed = False
    conn = pool.get_conn()
    pool.put_conn(conn)
    assert pool.get_conn() is conn


@pytest.mark.parametrize("name", ["configure", "check", "reset"])
def test_a_callback_must_leave_no_transaction_open(make_pool: MakePool, name: str) -> None:
    pool = make_pool(max_conn=1, **{name: lambda conn: ask(conn, "SELECT 1")})
    with pytest.raises(psycopg2.ProgrammingError, match=rf"{name}\(\) left a transaction open"):
        pool.put_conn(pool.get_conn())


def test_callbacks_are_called_when_they_should_be(make_pool: MakePool) -> None:
    calls: list[str] = []
    callbacks = {n: lambda conn, n=n: calls.append(n) for n in ("configure", "reset", "check")}
    pool = make_pool(max_conn=1, **callbacks)
    pool.put_conn(pool.get_conn())
    pool.put_conn(pool.get_conn())
    assert calls == ["configure", "check", "reset", "check", "reset"]


# --- nothing leaks


def test_a_connection_that_cannot_be_opened_costs_no_slot(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, dbname="no_such_database")
    for _ in range(3):
        with pytest.raises(psycopg2.OperationalError, match="no_such_database"):
            pool.get_conn()
    assert pool.stats().in_use == 0


def test_a_dropped_connection_gives_its_slot_back_at_once(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=1)
    for _ in range(5):
        conn = pool.get_conn()
        ask(conn)  # in a transaction
        del conn
        gc.collect()
    conn = pool.get_conn()
    assert backends(pool) == {ask(conn)}
    pool.put_conn(conn)


def test_a_finalizer_can_return_a_connection(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    for _ in range(5):
        pool.put_conn_later(pool.get_conn())
    pool.put_conn(pool.get_conn())
    assert pool.stats().connects == 1


class Interrupt(BaseException):
    pass


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # sockets half-made when interrupted
def test_nothing_leaks_when_get_conn_is_interrupted_anywhere(make_pool: MakePool) -> None:
    """A signal handler that raises, at a hundred different moments of waiting, connecting and
    handing out."""
    pool = make_pool(max_conn=1)

    def interrupt(*_: object) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for step in range(100):
            conn = None
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + step * 0.00008)
                conn = pool.get_conn(timeout=20)
                signal.setitimer(signal.ITIMER_REAL, 0)
                pool.put_conn(conn, close=True)
            except Interrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if conn is not None and not conn.closed:
                pool.put_conn(conn, close=True, fail_silently=True)
            del conn
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 20  # else this shows nothing
    # What was lost between two instructions of ours is found after HANDING_OUT_LIMIT_S.
    assert ask(pool.get_conn(timeout=60))


def test_an_interrupt_just_before_libpq_is_called_frees_the_slot(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(max_conn=1)

    def interrupt(*_: object) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("sharedpool.worker.connection.opening._number", interrupt)
        with pytest.raises(Interrupt):
            pool.get_conn(timeout=20)
    assert ask(pool.get_conn(timeout=20))


def test_an_interrupt_just_after_a_connection_was_handed_out_frees_the_slot(
    make_pool: MakePool,
) -> None:
    pool = make_pool(max_conn=1)
    pool.put_conn(pool.get_conn(timeout=20), close=True)

    def interrupt_at_return(frame: FrameType, event: str, value: object) -> Any:
        if frame.f_code is not checkout.__code__:
            return None
        if event == "return" and value is not None:
            sys.settrace(None)
            raise Interrupt
        return interrupt_at_return

    sys.settrace(interrupt_at_return)
    try:
        with pytest.raises(Interrupt):
            pool.get_conn(timeout=20)
    finally:
        sys.settrace(None)
    assert ask(pool.get_conn(timeout=20))  # long before HANDING_OUT_LIMIT_S


def test_nothing_leaks_when_a_wait_is_interrupted_or_crosses_a_grant(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, pool_manager=ThreadedConnectionPool)
    for step in range(60):
        conn = pool.get_conn(timeout=20)
        waiter = threading.Thread(target=lambda s=step: _try(pool, 0.0005 * s))
        waiter.start()
        wait_until(lambda waiter=waiter: pool.stats().waiting or not waiter.is_alive())
        pool.put_conn(conn, close=step % 2 == 0)
        waiter.join(20)
    assert ask(pool.get_conn(timeout=20))
    with pytest.raises(PoolExhausted):
        pool.get_conn()


def _try(pool: sharedpool.Pool, timeout: float) -> None:
    try:
        pool.put_conn(pool.get_conn(timeout=timeout))
    except PoolError:
        pass


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


# --- the end


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


def test_a_lease_that_is_too_old_to_be_connected_is_given_back_and_another_is_waited_for(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may have been frozen between the grant and the connect, for any time."""
    reason_to_replace = Checkout._reason_to_replace
    too_old: list[object] = []

    def first_is_too_old(
        self: Checkout, lease: Lease, conn: PooledConnection | None
    ) -> ReleaseReason | None:
        if conn is None and not too_old:
            too_old.append(lease)
            return ReleaseReason.UNUSED
        return reason_to_replace(self, lease, conn)

    monkeypatch.setattr(Checkout, "_reason_to_replace", first_is_too_old)
    pool = make_pool(max_conn=1)
    pool.put_conn(pool.get_conn(timeout=10))
    assert too_old[0] not in pool._local.cache.leases.values()
    assert len(pool._local.cache.leases) == 1
