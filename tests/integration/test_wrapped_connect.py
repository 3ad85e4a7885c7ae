"""`psycopg2.connect` is wrapped, as agents do that trace statements: users have the wrapper's
object, as with psycopg2's own pool."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.pool
import pytest
from msgspec import structs
from psycopg2 import extensions, sql

from sharedpool import PgSimple, PoolExhausted, SharedPoolError, ThreadedConnectionPool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.handover import SUPPORTED
from sharedpool.worker.pool import Pool
from tests.integration.connect_wrappers import (
    WRAPPERS,
    AroundConnection,
    around,
    kind,
    own_connect,
    traced,
    use,
    wrapped,
)
from tests.support.fixture_types import Backends, MakePool
from tests.support.processes import run_python
from tests.support.sql import ask

__all__ = ["around", "wrapped"]  # pytest finds both here


@pytest.fixture
def pair(make_pool: MakePool) -> Iterator[tuple[Pool, Pool]]:
    """Two sessions of one pool, as two processes would have them; the connection lies idle in the
    first."""
    a = make_pool(max_conn=1, timeout=10, pool_manager=ThreadedConnectionPool)
    b = type(a)(structs.replace(a.config), a._broker)
    for pool in (b, a):  # both know the broker
        pool.put_conn(pool.get_conn())
    yield a, b
    b.release_all()


def test_as_with_psycopg2s_pool(
    make_pool: MakePool, postgres: EphemeralPostgres, wrapped: str
) -> None:
    keywords = extensions.parse_dsn(postgres.dsn)

    def use_theirs() -> None:
        pool = psycopg2.pool.ThreadedConnectionPool(1, 2, **keywords)
        use(pool)
        pool.closeall()

    expected = traced(use_theirs)
    ours = make_pool(dsn=None, **keywords, pool_manager=ThreadedConnectionPool)
    assert traced(lambda: use(ours)) == expected
    assert ours.stats().connects == [name for name, *_ in expected].count("connect") == 1
    assert ours.stats().hits == 2


def test_its_user_gets_what_connect_has_returned(make_pool: MakePool, around: None) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    assert kind(conn) is AroundConnection
    pool.put_conn(conn)
    assert pool.get_conn() is conn
    with pytest.raises(PoolExhausted):
        pool.get_conn()
    pool.put_conn(conn)
    with pytest.raises(SharedPoolError, match="already put back"):
        pool.put_conn(conn)
    with pytest.raises(psycopg2.InterfaceError):
        ask(conn)
    with pool.connection() as again:
        assert again is conn


def test_its_end(make_pool: MakePool, backends: Backends, wrapped: str) -> None:
    pool = make_pool(max_conn=1, pool_manager=ThreadedConnectionPool)
    pool.put_conn(pool.get_conn(), close=True)
    conn = pool.get_conn()
    conn.close()
    pool.put_conn(conn)
    lent = pool.connect()
    lent.close()
    conn = pool.get_conn()
    assert (pool.stats().connects, ask(conn)) == (3, backends(pool).pop())
    pool.release_all()
    assert backends(pool) == set()
    assert conn.closed


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_wrapped_connection_that_its_user_drops_comes_back(
    make_pool: MakePool, wrapped: str, in_a_cycle: bool
) -> None:
    pool = make_pool(max_conn=1, timeout=10, pool_manager=ThreadedConnectionPool)
    conn: Any = pool.get_conn()
    kept: list[Any] = [conn]
    if in_a_cycle:
        kept.append(kept)
    conn = kept = None  # type: ignore[assignment]
    gc.collect()
    for _ in range(3):
        with pool.connection() as again:
            assert ask(again)


def test_it_is_what_is_collected_even_when_it_lies_idle(make_pool: MakePool, around: None) -> None:
    gc.collect()
    before = sum(isinstance(each, AroundConnection) for each in gc.get_objects())
    pool = make_pool(max_conn=2)
    conns = [pool.get_conn() for _ in range(2)]
    for conn in conns:
        pool.put_conn(conn)
    del conn, conns
    pool.release_all()
    gc.collect()
    assert sum(isinstance(each, AroundConnection) for each in gc.get_objects()) == before


def test_the_connection_itself_may_be_put_back_in_place_of_it(
    make_pool: MakePool, around: None
) -> None:
    pool = make_pool(max_conn=1)
    conn: Any = pool.get_conn()
    cursor = conn.cursor()
    pool.put_conn(cursor.connection)
    assert pool.get_conn() is conn
    pool.put_conn(cursor.connection)
    gone = id(conn)
    conn = None

    def get_another() -> None:
        again = pool.get_conn()
        assert kind(again) is AroundConnection, gone
        assert ask(again, "SELECT 1") == 1
        pool.put_conn(again)

    assert traced(get_another) == [("execute", "SELECT 1"), ("rollback",)]
    assert pool.stats().connects == 1


def test_a_wrapped_connection_without_weak_references(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreferable:
        __slots__ = ("inner",)

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.setattr(
        psycopg2, "connect", lambda *args, **kwargs: Unreferable(own_connect(*args, **kwargs))
    )
    pool = make_pool(max_conn=1)
    for _ in range(3):
        conn = pool.get_conn()
        assert kind(conn) is Unreferable
        pool.put_conn(conn.cursor().connection)
    assert pool.stats().connects == 1


def test_the_same_key_gives_the_same_one(make_pool: MakePool, around: None) -> None:
    pool = make_pool(max_conn=2)
    conn = pool.get_conn("mine")
    assert pool.get_conn("mine") is conn
    pool.put_conn(conn, "mine")
    assert kind(pool.get_conn("mine")) is AroundConnection


def test_callbacks_get_it_too(make_pool: MakePool, around: None) -> None:
    seen: list[tuple[str, object]] = []
    names = ("configure", "check", "reset")
    pool = make_pool(
        max_conn=1, **{name: lambda conn, name=name: seen.append((name, conn)) for name in names}
    )
    conn = pool.get_conn()
    pool.put_conn(conn)
    assert kind(conn) is AroundConnection
    assert seen == [("configure", conn), ("check", conn), ("reset", conn)]


@pytest.mark.skipif(not SUPPORTED, reason="connections cannot be handed over on this platform")
def test_a_connection_from_another_process_is_wrapped_too(
    pair: tuple[Pool, Pool], wrapped: str
) -> None:
    expected: list[tuple[Any, ...]] = [("execute", "SELECT 1")]
    assert traced_moves(pair) == 4 * (expected if wrapped == "cursor" else [*expected, ("commit",)])


@pytest.mark.skipif(not SUPPORTED, reason="connections cannot be handed over on this platform")
def test_a_connection_opened_before_psycopg2_was_wrapped(
    pair: tuple[Pool, Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert traced_moves(pair) == []  # and the empty ones of both have been used
    monkeypatch.setattr(psycopg2, "connect", WRAPPERS["transparent object"])
    assert traced_moves(pair) == 4 * [("execute", "SELECT 1"), ("commit",)]


def traced_moves(pair: tuple[Pool, Pool]) -> list[tuple[Any, ...]]:
    """Return what is noted of a connection that is used in one process, then in the other, and so
    on."""
    events: list[tuple[Any, ...]] = []
    a, b = pair
    a.put_conn(a.get_conn())
    for pool in (b, a, b, a):
        adopted, connects = pool.stats().adopted, pool.stats().connects

        def checkout(pool: Pool = pool) -> None:
            conn = pool.get_conn()
            assert ask(conn, "SELECT 1") == 1
            conn.commit()
            pool.put_conn(conn)

        events += traced(checkout)
        assert (pool.stats().adopted, pool.stats().connects) == (adopted + 1, connects)
    return events


def test_a_forked_child_has_its_own(make_pool: MakePool, around: None) -> None:
    pool = make_pool(max_conn=2, timeout=10, pool_manager=ThreadedConnectionPool)
    kept = pool.get_conn()
    ask(kept)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        answer: list[Any] = ["it failed"]
        try:
            answer = traced(lambda: use(pool, 1))
        finally:
            os.write(writer, json.dumps(answer).encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        noted = json.loads(file.read())
    os.waitpid(child, 0)
    assert [name for name, *_ in noted] == ["connect", "execute", "commit"]
    assert ask(kept)
    pool.put_conn(kept)


def test_pgsimple_and_composed_statements(make_pool: MakePool, wrapped: str) -> None:
    pool = make_pool(max_conn=1)
    with PgSimple(pool) as db:
        db.create("pg_temp.books", "id int, name text")
        db.insert("books", {"id": 1, "name": "x"}, returning="id")
        assert (
            db.fetchone("books", ["name"], where=sql.SQL("name = {}").format(sql.Literal("x"))).name
            == "x"
        )
        assert db.fetchall("books", sql.SQL("count(*) AS n"))[0].n == 1


_CUSTOMIZED = """
import os, psycopg2
own = psycopg2.connect
def connect(*args, **kwargs):
    with open(os.environ["CONNECTS"], "a") as file:
        print(os.getpid(), file=file)
    return own(*args, **kwargs)
psycopg2.connect = connect
"""
_WORKER = """
import os, sys, sharedpool
with sharedpool.config_pool(max_conn=2, dsn=sys.argv[1], timeout=20).connection() as conn:
    conn.cursor().execute("SELECT 1")
print(os.getpid())
"""


def test_the_automatic_brokers_own_session_is_nobodys_to_trace(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    (runtime_dir / "sitecustomize.py").write_text(
        _CUSTOMIZED
    )  # as agents' starters do: children have it too
    log = runtime_dir / "connects"
    environment: dict[str, Any] = {
        "PYTHONPATH": str(runtime_dir),
        "CONNECTS": str(log),
        "SHAREDPOOL_LINGER": "0.1",
    }
    run = run_python(_WORKER, postgres.dsn, **environment)
    assert run.returncode == 0, run.stderr
    assert log.read_text().split() == run.stdout.split()
