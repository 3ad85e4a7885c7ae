"""PgSimple's handles that nobody closes: garbage collection returns their connections."""

import gc
import os
import threading
from collections.abc import Callable

import psycopg2
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

import sharedpool
from sharedpool import PgSimple, Pool, PoolError, PoolExhausted
from tests.integration.pgsimple_handles import (
    TTL_S,
    broker,
    cached,
    in_use,
    make_pool,
    module_dsn,
    pid_of,
    pool,
)
from tests.support.fixture_types import MakePool
from tests.support.waiting import wait_until

__all__ = ["broker", "make_pool", "module_dsn", "pool"]  # pytest finds them here


@pytest.fixture
def single(make_pool: MakePool) -> Pool:
    """A pool of one connection: whoever does not bring it back is found out."""
    return make_pool(max_conn=1)


def test_garbage_collection_returns_the_connection_at_once(single: Pool) -> None:
    pids = set()
    for _ in range(20):
        handle = PgSimple(single)
        handle.execute("SELECT 1")  # leaves a transaction open
        pids.add(pid_of(handle))
        with pytest.raises(PoolExhausted):
            PgSimple(single)
        del handle
    with PgSimple(single) as db:
        assert db._live().info.transaction_status == TRANSACTION_STATUS_IDLE
        pids.add(pid_of(db))
    assert len(pids) == 1


def test_garbage_is_returned_without_another_call_of_the_pool(single: Pool) -> None:
    PgSimple(single)
    wait_until(lambda: cached(single) == 1, timeout_s=3, what="the link's thread to bring it back")


def test_a_cursor_that_outlives_its_handle_does_not_keep_the_connection(single: Pool) -> None:
    cursor = PgSimple(single).execute("SELECT 42")
    with PgSimple(single) as db:
        assert db._live() is cursor.connection
    with pytest.raises(psycopg2.InterfaceError):
        cursor.fetchone()


class Node:
    """Something to make a reference cycle of."""

    def __init__(self, handle: PgSimple) -> None:
        self.handle = handle
        self.itself = self


def test_garbage_in_a_cycle_is_returned_too(single: Pool) -> None:
    for _ in range(5):
        Node(PgSimple(single))
        gc.collect()
        PgSimple(single).close()
    assert (in_use(single), cached(single)) == (0, 1)


def next_heartbeat(pool: Pool) -> None:
    link = pool._local.link
    assert link is not None
    heard_at = link.heard_at
    wait_until(
        lambda: link.heard_at > heard_at,
        timeout_s=5 * TTL_S,
        what="the broker's answer to a heartbeat",
    )


def test_a_checkout_after_a_collected_cycle_is_not_taken_for_lost(
    single: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    Node(PgSimple(single))
    gc.collect()
    with PgSimple(single) as db:
        for _ in range(2):  # at every heartbeat the worker looks for lost connections
            next_heartbeat(single)
        assert in_use(single) == 1
        assert db.execute("SELECT 1").fetchone() == (1,)
    assert not caplog.records


def test_garbage_collection_never_raises(make_pool: MakePool) -> None:
    # pytest turns an unraisable exception into an error.
    PgSimple.__new__(PgSimple).__del__()  # __init__ never ran
    with pytest.raises(PoolError):
        PgSimple(make_pool(name="nothing there", broker="ipc:///nonexistent/broker", timeout=0.1))
    pool = make_pool()
    handle = PgSimple(pool)
    handle.__del__()
    handle.__del__()
    handle.close()
    handle = PgSimple(pool)
    pool.release_all()
    del handle
    gc.collect()


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return 0 if it raised nothing."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_childs_use_of_a_handle_leaves_the_parent_alone(single: Pool) -> None:
    with PgSimple(single) as handle:
        assert in_a_child(lambda: handle.__del__()) == 0
        assert in_a_child(lambda: handle.close()) == 0
        assert in_a_child(lambda: handle.__exit__(None, None, None)) == 0
        assert handle.execute("SELECT 1").fetchone() == (1,)
    assert (in_use(single), cached(single)) == (0, 1)


def test_a_finalizer_takes_no_lock(single: Pool) -> None:
    handle = PgSimple(single)
    with single._local.lock:  # garbage collection may run in the very thread that holds it
        worker = threading.Thread(target=handle.__del__, daemon=True)
        worker.start()
        worker.join(5)
        assert not worker.is_alive()
    PgSimple(single).close()


@pytest.mark.long
def test_release_all_and_garbage_collection_do_not_deadlock(make_pool: MakePool) -> None:
    for _ in range(5):
        pool = make_pool(max_conn=4, pool_manager=sharedpool.ThreadedConnectionPool)
        for _ in range(4):
            Node(PgSimple(pool))
        thresholds = gc.get_threshold()
        gc.set_threshold(
            1, 1, 1
        )  # a collection at almost every allocation, within release_all() too
        try:
            ending = threading.Thread(target=pool.release_all, daemon=True)
            ending.start()
            ending.join(10)
        finally:
            gc.set_threshold(*thresholds)
        assert not ending.is_alive()
        gc.collect()
        assert pool.disposed
