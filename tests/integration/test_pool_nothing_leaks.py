"""No slot leaks: failed connects, dropped connections, interrupts."""

import gc
import signal
import sys
import threading
from types import FrameType
from typing import Any

import psycopg2
import pytest

import sharedpool
from sharedpool import PoolError, PoolExhausted, ThreadedConnectionPool
from sharedpool.wire.messages import ReleaseReason
from sharedpool.worker.checkout import Checkout, checkout
from sharedpool.worker.connection.pooled import PooledConnection
from sharedpool.worker.core.lease import Lease
from tests.support.fixture_types import Backends, MakePool
from tests.support.sql import ask
from tests.support.waiting import wait_until


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
