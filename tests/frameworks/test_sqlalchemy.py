"""SQLAlchemy's engine on a shared pool: a real engine, broker and server."""

import gc
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2.extensions
import pytest
import sqlalchemy
from sqlalchemy import event, exc, text
from sqlalchemy.pool import NullPool

import sharedpool
from sharedpool.integrations.sqlalchemy import SharedPool
from tests.support.fixture_types import Backends, MakePool
from tests.support.processes import workers
from tests.support.waiting import wait_until

MakeEngine = Callable[..., sqlalchemy.Engine]
PID = text("SELECT pg_backend_pid()")


@pytest.fixture
def pool(make_pool: MakePool) -> sharedpool.Pool:
    return make_pool(max_conn=2, pool_manager=sharedpool.ThreadedConnectionPool)


@pytest.fixture
def make_engine(pool: sharedpool.Pool) -> Iterator[MakeEngine]:
    made: list[sqlalchemy.Engine] = []

    def make(**options: Any) -> sqlalchemy.Engine:
        options = {"creator": pool.connect, "poolclass": SharedPool} | options
        engine = sqlalchemy.create_engine("postgresql+psycopg2://", **options)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.dispose()


def pid_of(engine: sqlalchemy.Engine) -> int:
    with engine.connect() as conn:
        return int(conn.execute(PID).scalar_one())


@pytest.fixture
def terminate(
    server_connection: psycopg2.extensions.connection, pool: sharedpool.Pool, backends: Backends
) -> Any:
    """End a backend, and wait until it is gone."""

    def end(pid: int) -> None:
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
        wait_until(lambda: pid not in backends(pool))

    return end


def test_an_engine_uses_and_returns_the_pools_connections(
    make_engine: MakeEngine, pool: sharedpool.Pool
) -> None:
    engine = make_engine()
    assert isinstance(engine.pool, SharedPool)
    with engine.begin() as conn:
        assert pool.stats().in_use == 1
        assert isinstance(conn.connection.dbapi_connection, psycopg2.extensions.connection)
        pid = conn.execute(PID).scalar_one()
    assert (pool.stats().in_use, pool.stats().idle) == (0, 1)
    assert pid_of(engine) == pid
    assert engine.pool.status() == repr(pool)


def test_null_pool_on_connect_works_too(make_engine: MakeEngine, pool: sharedpool.Pool) -> None:
    engine = make_engine(poolclass=NullPool)
    pid = pid_of(engine)
    assert pool.stats().idle == 1
    assert pid_of(engine) == pid
    assert pool.stats().connects == 1


@pytest.mark.parametrize(
    "creator", [lambda: None, print, object()], ids=["function", "builtin", "object"]
)
def test_another_creator_is_refused(make_engine: MakeEngine, creator: Any) -> None:
    with pytest.raises(exc.ArgumentError, match="connect method of a pool"):
        make_engine(creator=creator)


def test_events_tell_what_happens_to_the_session(make_engine: MakeEngine) -> None:
    engine = make_engine()
    seen: list[str] = []
    for name in ("connect", "checkout", "checkin", "reset", "invalidate", "close", "detach"):

        def note(*_: object, name: str = name, **__: object) -> None:
            seen.append(name)

        event.listen(engine, name, note)
    pid = pid_of(engine)
    assert seen[0] == "connect"
    assert seen[-3:] == ["checkout", "reset", "checkin"]
    seen.clear()
    assert pid_of(engine) == pid
    assert seen == ["checkout", "reset", "checkin"]  # no second `connect`: it is the same session
    seen.clear()
    with engine.connect() as conn:
        conn.invalidate()
    assert seen == ["checkout", "invalidate", "close", "checkin"]
    seen.clear()
    with engine.connect() as conn:
        assert conn.execute(PID).scalar_one() != pid
        conn.detach()
        assert seen == ["connect", "checkout", "detach"]


def test_info_lives_as_long_as_the_session(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect() as conn:
        conn.info["mine"] = conn.execute(PID).scalar_one()
    with engine.connect() as conn:
        assert conn.info["mine"] == conn.execute(PID).scalar_one()
        conn.invalidate()
    with engine.connect() as conn:
        assert conn.info == {}


def test_settings_of_a_connect_event_remain(make_engine: MakeEngine) -> None:
    engine = make_engine(isolation_level="AUTOCOMMIT")

    @event.listens_for(engine, "connect")
    def configure(conn: psycopg2.extensions.connection, record: object) -> None:
        with conn.cursor() as cursor:
            cursor.execute("SET search_path = mine")

    for _ in range(2):
        with engine.connect() as conn:
            assert conn.execute(text("SHOW search_path")).scalar_one() == "mine"
            driver = conn.connection.driver_connection
            assert isinstance(driver, psycopg2.extensions.connection)
            assert driver.autocommit
            conn.rollback()
            # For this checkout only.
            conn.execution_options(isolation_level="SERIALIZABLE")
            assert conn.execute(text("SHOW transaction_isolation")).scalar_one() == "serializable"


def test_connect_events_run_again_for_a_session_that_came_from_another_process(
    make_pool: MakePool, broker: sharedpool.Broker, postgres: Any
) -> None:
    pool = make_pool(max_conn=1, pool_manager=sharedpool.ThreadedConnectionPool, timeout=10)
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg2://", creator=pool.connect, poolclass=SharedPool
    )
    connects: list[object] = []

    @event.listens_for(engine, "connect")
    def configure(conn: psycopg2.extensions.connection, record: object) -> None:
        connects.append(record)
        with conn.cursor() as cursor:
            cursor.execute("SET search_path = mine")

    settings = {"dsn": postgres.dsn, "broker": broker.address, "name": pool.name, "max_conn": 1}
    with workers(1, **settings) as (other,):
        for round_ in range(1, 4):
            with engine.connect() as conn:
                assert conn.execute(text("SHOW search_path")).scalar_one() == "mine"
            assert len(connects) == round_
            assert "backend" in other.ask("get", name="it", timeout=10)
            assert "at" in other.ask("put", name="it")


def test_pre_ping_replaces_what_has_died(make_engine: MakeEngine, terminate: Any) -> None:
    engine = make_engine(pool_pre_ping=True)
    for _ in range(2):
        with engine.connect(), engine.connect():
            pass  # two sessions
        pid = pid_of(engine)
        terminate(pid)
        assert pid_of(engine) != pid


def test_an_error_that_ends_the_session_is_a_disconnect(
    make_engine: MakeEngine, terminate: Any, pool: sharedpool.Pool
) -> None:
    engine = make_engine()
    with engine.connect() as conn:
        pid = conn.execute(PID).scalar_one()
        terminate(pid)
        with pytest.raises(exc.DBAPIError) as caught:
            conn.execute(PID)
        assert caught.value.connection_invalidated
        conn.rollback()
        assert conn.execute(PID).scalar_one() != pid
    assert pool.stats().in_use == 0


def test_recycle_replaces_what_is_older(make_engine: MakeEngine, pool: sharedpool.Pool) -> None:
    engine = make_engine(pool_recycle=0)
    with engine.connect() as first, engine.connect() as second:
        pids = {conn.execute(PID).scalar_one() for conn in (first, second)}
    with engine.connect() as first, engine.connect() as second:
        assert pids.isdisjoint({conn.execute(PID).scalar_one() for conn in (first, second)})
    assert pool.stats().in_use == 0


def test_dispose_closes_what_is_idle_now_and_what_is_in_use_later(
    make_engine: MakeEngine, pool: sharedpool.Pool, backends: Backends
) -> None:
    engine = make_engine(pool_logging_name="mine")
    connects: list[object] = []
    event.listen(engine, "connect", lambda conn, record: connects.append(record))
    with engine.connect() as conn:
        pid = conn.execute(PID).scalar_one()
        pid_of(engine)
        assert len(backends(pool)) == 2
        engine.dispose()
        assert backends(pool) == {pid}
        assert conn.execute(PID).scalar_one() == pid
    assert backends(pool) == set()
    assert pid_of(engine) != pid
    assert len(connects) == 3  # the new pool has the listeners
    assert isinstance(engine.pool, SharedPool)
    assert engine.pool.logging_name == "mine"


def test_the_logging_name_is_in_the_log(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="sqlalchemy.pool"):
        pid_of(make_engine(pool_logging_name="mine", echo_pool="debug"))
    ours = [record for record in caplog.records if record.name.endswith("SharedPool.mine")]
    assert any("checked out from pool" in record.getMessage() for record in ours)
    assert any("being returned to pool" in record.getMessage() for record in ours)


def test_a_full_pool_raises_what_sqlalchemys_own_raises(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect(), engine.connect():
        with pytest.raises(exc.TimeoutError) as caught:
            engine.connect()
        assert isinstance(caught.value.__cause__, sharedpool.PoolExhausted)
        with pytest.raises(exc.TimeoutError) as caught:
            make_engine(pool_timeout=0.5).connect()
        assert isinstance(caught.value.__cause__, sharedpool.PoolTimeout)
    assert pid_of(engine)


def test_a_connect_event_that_fails_leaks_nothing(
    make_engine: MakeEngine, pool: sharedpool.Pool
) -> None:
    engine = make_engine()
    broken = True

    @event.listens_for(engine, "connect")
    def fail(*_: object) -> None:
        if broken:
            raise RuntimeError("mine")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="mine"):
            engine.connect()
    assert pool.stats().in_use == 0
    broken = False
    assert pid_of(engine)


def test_a_connection_that_is_dropped_comes_back(
    make_engine: MakeEngine, pool: sharedpool.Pool
) -> None:
    engine = make_engine()
    conn = engine.connect()
    conn.execute(PID)
    assert pool.stats().in_use == 1
    del conn
    gc.collect()  # it refers to its transaction, which refers to it
    wait_until(lambda: pool.stats().in_use == 0)


def test_an_end_of_the_pool_ends_the_engines_connections(
    make_engine: MakeEngine, pool: sharedpool.Pool
) -> None:
    engine = make_engine()
    with engine.connect() as conn:
        conn.execute(PID)
        conn.rollback()
        pool.release_all()
    with pytest.raises(exc.DBAPIError) as caught:
        engine.connect()
    assert isinstance(caught.value.orig, sharedpool.PoolClosed)


def test_a_read_only_server_has_older_sessions_replaced(
    make_engine: MakeEngine, pool: sharedpool.Pool, backends: Backends
) -> None:
    engine = make_engine()
    with engine.connect() as conn:
        with engine.connect() as other:
            idle = other.execute(PID).scalar_one()
        assert idle in backends(pool)
        conn.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(exc.DBAPIError):
            conn.execute(text("CREATE TABLE never ()"))
        wait_until(lambda: idle not in backends(pool))


def test_a_forked_child_opens_its_own_and_the_parents_goes_on(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with engine.connect() as conn:
        pid = conn.execute(PID).scalar_one()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if pid_of(engine) != pid else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert conn.execute(PID).scalar_one() == pid


def test_threads_share_the_limit(make_engine: MakeEngine, pool: sharedpool.Pool) -> None:
    engine = make_engine(pool_timeout=30)
    pids: Counter[int] = Counter()

    def work() -> None:
        for _ in range(50):
            with engine.begin() as conn:
                pids[conn.execute(PID).scalar_one()] += 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pids.total() == 300
    assert len(pids) <= 2
    assert pool.stats().in_use == 0
