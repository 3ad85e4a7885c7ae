"""Nothing is lost and nothing is used twice: disposal, finalizers, interrupts, keys, callbacks,
descriptors."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg2.extras
import pytest
from psycopg2.extensions import connection

import sharedpool
from sharedpool import PoolClosed, ThreadedConnectionPool
from sharedpool.cli.client import fetch_report
from sharedpool.wire.messages import ReleaseReason
from sharedpool.wire.reports import PoolReport
from sharedpool.worker.connection.closing import close_confirmed, cut
from sharedpool.worker.core.cache import Cache
from sharedpool.worker.core.lease import Lease
from tests.support.fixture_types import Backends, MakePool
from tests.support.running_query import Query
from tests.support.sql import ask
from tests.support.waiting import wait_until


def report(broker: sharedpool.Broker, pool: sharedpool.Pool) -> PoolReport | None:
    return next(
        (each for each in fetch_report(broker.address).pools if each.name == pool.name), None
    )


# --- disposal


def test_a_connect_that_ends_after_release_all_is_closed_and_its_slot_returned(
    make_pool: MakePool, backends: Backends, broker: sharedpool.Broker
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def configure(conn: connection) -> None:
        inside.set()
        assert go_on.wait(20)

    pool = make_pool(max_conn=1, pool_manager=ThreadedConnectionPool, configure=configure)
    outcome: list[object] = []

    def get() -> None:
        try:
            conn = pool.get_conn(timeout=20)
            pool.put_conn(conn)  # handed out just before: it can still be put, and is closed
        except PoolClosed as error:
            outcome.append(error)

    thread = threading.Thread(target=get)
    thread.start()
    assert inside.wait(20)
    pool.release_all()
    go_on.set()
    thread.join(20)
    assert len(outcome) == 1
    wait_until(
        lambda: report(broker, pool) is None, what="the lease to come back and the session to end"
    )
    assert backends(pool) == set()


def test_a_connection_lent_to_another_thread_does_not_hold_release_all_up(
    make_pool: MakePool,
) -> None:
    pool = make_pool(max_conn=1, pool_manager=ThreadedConnectionPool)
    conn = pool.get_conn()
    query = Query(conn)
    started = time.monotonic()
    pool.release_all()
    assert time.monotonic() - started < 10
    query.end(20)


def test_config_pool_called_again_and_again_leaves_no_threads_and_descriptors(
    make_pool: MakePool, broker: sharedpool.Broker
) -> None:
    def use(pool: sharedpool.Pool) -> sharedpool.Pool:
        pool.put_conn(pool.get_conn(timeout=20))
        return pool

    first = use(make_pool(max_conn=3))
    links = [t for t in threading.enumerate() if t.name == "sharedpool-link"]
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        use(make_pool(max_conn=3, name=first.name))
    wait_until(
        lambda: len([t for t in threading.enumerate() if t.name == "sharedpool-link"]) <= len(links)
    )
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 3)
    found = report(broker, first)
    assert found is not None
    assert found.sessions == 1


def test_closing_leaks_no_descriptor(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=2)
    for _ in range(2):  # the first waits for the broker to be found, later ones at its desk
        pool.put_conn(pool.get_conn(), close=True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        pool.put_conn(pool.get_conn(), close=True)
    assert len(os.listdir("/proc/self/fd")) == before


# --- finalizers


@pytest.mark.long
@pytest.mark.parametrize("cycle", [True, False])
def test_a_users_finalizer_may_put_even_while_its_thread_is_at_the_books(
    make_pool: MakePool, cycle: bool
) -> None:
    pool = make_pool(max_conn=2, pool_manager=ThreadedConnectionPool)

    class Handle:
        def __init__(self) -> None:
            self.conn = pool.get_conn(timeout=20)
            self.myself = self if cycle else None

        def __del__(self) -> None:
            pool.put_conn(self.conn, fail_silently=True)

    for _ in range(10):
        handle = Handle()
        with pool._local.lock:  # the collector may run in any line, this one included
            del handle
            gc.collect()
        handle = Handle()
        del handle
        gc.collect()
    kept: list[Any] = [pool.get_conn(timeout=20), pool.get_conn(timeout=20)]
    assert len({ask(conn) for conn in kept}) == 2
    assert all(conn.sharedpool_witness >= 0 for conn in kept)


def test_a_slow_reset_of_a_dropped_connection_costs_no_heartbeat(
    make_pool: MakePool, broker: sharedpool.Broker
) -> None:
    calls = 0

    def reset(conn: connection) -> None:
        nonlocal calls
        calls += 1

    pool = make_pool(max_conn=2, reset=reset)
    conn = pool.get_conn()
    pool.put_conn_later(conn)
    del conn
    wait_until(lambda: pool.stats().in_use == 0, what="the heartbeat to bring it back")
    assert calls == 0  # no user's code in the link's thread


def test_a_dropped_key_is_not_met_again(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=2)
    for _ in range(10):
        conn = pool.get_conn("k")
        assert pool.get_conn("k") is conn
        assert ask(conn)
        del conn
    conn = pool.get_conn("k")
    assert ask(conn)
    pool.put_conn(conn, "k")


# --- interrupts


class Interrupt(BaseException):
    pass


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # whatever was half-made
def test_a_close_that_is_interrupted_is_finished_by_the_link(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=1)

    def interrupt(*_: object) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for step in range(6):
            conn = pool.get_conn(timeout=30)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00005 + step * 0.0002)
                pool.put_conn(conn, close=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if not conn.closed:
                pool.put_conn(conn, close=True, fail_silently=True)
            del conn
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interrupted
    conn = pool.get_conn(timeout=30)
    assert backends(pool) == {ask(conn)}


def interrupt(*_: object) -> None:
    raise Interrupt


def test_a_slot_whose_connect_was_interrupted_is_not_called_free(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean-up is interrupted as well. A backend may be left, in its start-up."""
    pool = make_pool(max_conn=1)
    pool.put_conn(pool.get_conn(timeout=30), close=True)
    said: list[tuple[ReleaseReason, bool]] = []
    closed = Cache.closed

    def record(
        cache: Cache, lease: Lease, reason: ReleaseReason, *, gone: bool, **more: Any
    ) -> None:
        said.append((reason, gone))
        closed(cache, lease, reason, gone=gone, **more)

    monkeypatch.setattr(Cache, "closed", record)
    with monkeypatch.context() as interrupted:
        interrupted.setattr("sharedpool.worker.checkout.open_connection", interrupt)
        interrupted.setattr("sharedpool.worker.checkout.Checkout._abandon", interrupt)
        with pytest.raises(Interrupt):
            pool.get_conn(timeout=30)
    assert ask(pool.get_conn(timeout=30))  # the slot comes back
    assert said == [(ReleaseReason.CLOSED, False)]


@pytest.mark.parametrize("wrong", ["5", object(), -1, float("nan")])
def test_a_wrong_timeout_costs_no_slot(make_pool: MakePool, wrong: Any) -> None:
    pool = make_pool(
        max_conn=1, check=lambda conn: None
    )  # so that an idle one takes the slow way too
    pool.put_conn(pool.get_conn())
    with pytest.raises((ValueError, TypeError)):
        pool.get_conn(timeout=wrong)
    assert ask(pool.get_conn())


def test_a_dead_idle_connection_is_replaced_under_a_new_lease(
    make_pool: MakePool, backends: Backends
) -> None:
    """Its old lease may have been fenced and its slot granted to another while this process was
    frozen."""
    pool = make_pool(max_conn=1)
    conn: Any = pool.get_conn()
    old = conn.sharedpool_lease.token
    pool.put_conn(conn)
    conn.sharedpool_close()  # its session ends under it
    conn = pool.get_conn()
    assert conn.sharedpool_lease.token.serial > old.serial
    assert backends(pool) == {ask(conn)}


# --- what users configure


@pytest.mark.parametrize(
    "settings",
    [
        {"cursor_factory": psycopg2.extras.RealDictCursor},
        {"connection_factory": psycopg2.extras.RealDictConnection},
    ],
)
def test_cursors_of_other_kinds_do_not_disturb_the_protocol(
    make_pool: MakePool, broker: sharedpool.Broker, settings: dict[str, Any]
) -> None:
    pool = make_pool(max_conn=1, **settings)
    for _ in range(3):
        pool.put_conn(pool.get_conn(), close=True)
    conn = pool.get_conn()
    with conn.cursor() as cursor:
        cursor.execute("SELECT 1 AS one")
        row: Any = cursor.fetchone()
        assert row["one"] == 1
    found = report(broker, pool)
    assert found is not None
    assert found.leases == 1


def test_a_cursor_factory_set_by_one_user_does_not_reach_the_next(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    conn.cursor_factory = psycopg2.extras.DictCursor
    pool.put_conn(conn)
    assert pool.get_conn().cursor_factory is None


def test_without_pooling_a_waiting_thread_gets_a_connection_of_its_own(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1, disable_pooling=True, pool_manager=ThreadedConnectionPool)
    conn = pool.get_conn()
    first = ask(conn)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(ask(pool.get_conn(timeout=20))))
    thread.start()
    wait_until(lambda: pool.stats().waiting == 1)
    pool.put_conn(conn)
    thread.join(20)
    assert got
    assert got != [first]


def test_a_connection_closed_after_its_return_is_not_handed_out(make_pool: MakePool) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    pool.put_conn(conn)
    conn.close()  # a user's mistake
    assert ask(pool.get_conn())


def test_two_threads_that_end_one_connection_share_no_descriptor(make_pool: MakePool) -> None:
    """The link cuts what the broker takes away while its user closes it: one has the witness, the
    other leaves it."""
    pool = make_pool(max_conn=4, pool_manager=sharedpool.ThreadedConnectionPool)
    for _ in range(150):
        conn: Any = pool.get_conn(timeout=20)
        errors: list[BaseException] = []
        start = threading.Barrier(2)

        def end(
            how: Callable[[list[Any]], None],
            conn: Any = conn,
            start: Any = start,
            errors: Any = errors,
        ) -> None:
            start.wait()
            try:
                how([conn])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=end, args=[how]) for how in (cut, close_confirmed)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert errors == []
        assert conn.sharedpool_witness == -1
        pool.put_conn(conn)
