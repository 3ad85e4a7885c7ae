"""PgSimple's transactions, and who gets the connection when they end."""

from collections.abc import Generator
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS

from sharedpool import PgSimple, Pool, PoolClosed, PoolError
from tests.integration.pgsimple_handles import (
    broker,
    cached,
    count,
    db,
    in_use,
    kill,
    make_pool,
    module_dsn,
    pool,
    table,
)
from tests.support.fixture_types import MakePool

__all__ = ["broker", "db", "make_pool", "module_dsn", "pool", "table"]  # pytest finds them here


def test_with_commits_and_returns(pool: Pool, db: PgSimple, table: str) -> None:
    with PgSimple(pool) as inner:
        assert inner.is_open
        assert in_use(pool) == 2
        inner.insert(table, {"id": 1})
    assert not inner.is_open
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 1


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, psycopg2.DataError]
)
def test_with_rolls_back_for_any_exception(
    pool: Pool, db: PgSimple, table: str, error: type[BaseException]
) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            raise error("stop")

    with pytest.raises(error, match="stop"):
        work()
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 0


def test_with_rolls_back_when_a_generator_is_dropped(pool: Pool, db: PgSimple, table: str) -> None:
    def work() -> Generator[None]:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            yield

    generator = work()
    next(generator)
    generator.close()
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 0


def test_explicit_commit_and_rollback(pool: Pool, db: PgSimple, table: str) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            inner.insert(table, {"id": 1})
            inner.commit()
            inner.insert(table, {"id": 2})
            inner.rollback()
            inner.insert(table, {"id": 3})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert count(db) == 1


class ResetError(Exception):
    """What a pool's `reset` callback raises."""


def refuse(conn: object) -> None:
    raise ResetError("reset() is upset too")


def insert_twice(pool: Pool, table: str) -> None:
    with PgSimple(pool) as inner:
        inner.insert(table, {"id": 1})
        inner.insert(table, {"id": 1})  # the constraint is deferred: refused at commit


def test_a_refused_commit_reaches_the_caller_and_keeps_the_connection(
    pool: Pool, db: PgSimple, table: str
) -> None:
    with pytest.raises(psycopg2.errors.UniqueViolation):
        insert_twice(pool, table)
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 0


def test_an_error_of_the_pool_hides_no_other(make_pool: MakePool, db: PgSimple, table: str) -> None:
    pool = make_pool(reset=refuse)
    with pytest.raises(psycopg2.errors.UniqueViolation):
        insert_twice(pool, table)
    with pytest.raises(ZeroDivisionError), PgSimple(pool):
        raise ZeroDivisionError
    with pytest.raises(ResetError), PgSimple(pool) as inner:
        inner.insert(table, {"id": 1})
    assert count(db) == 1
    with pytest.raises(ResetError):
        PgSimple(pool).close()
    assert (in_use(pool), cached(pool)) == (0, 0)


def test_a_pool_disposed_of_meanwhile_reaches_the_caller_after_success_only(
    make_pool: MakePool,
) -> None:
    def work(pool: Pool) -> None:
        with PgSimple(pool):
            pool.release_all()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work(make_pool())
    pool = make_pool()
    handle = PgSimple(pool)
    pool.release_all()
    assert not handle.is_open
    with pytest.raises(PoolClosed):
        handle.close()
    handle.close()


def test_a_dead_connection_reaches_the_caller_and_is_discarded(pool: Pool, db: PgSimple) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            kill(inner, db)
            inner.execute("SELECT 1")

    with pytest.raises(psycopg2.OperationalError, match=r"server closed|terminating connection"):
        work()
    assert (in_use(pool), cached(pool)) == (1, 0)
    with PgSimple(pool) as inner:  # its slot is free again
        inner.execute("SELECT 1")


def test_a_commit_on_a_dead_connection_reaches_the_caller(pool: Pool, db: PgSimple) -> None:
    def work() -> None:
        with PgSimple(pool) as inner:
            inner.execute("SELECT 1")
            kill(inner, db)

    with pytest.raises(psycopg2.OperationalError):
        work()
    assert (in_use(pool), cached(pool)) == (1, 0)


def test_is_open_sees_a_connection_that_broke(pool: Pool, db: PgSimple) -> None:
    inner = PgSimple(pool)
    kill(inner, db)
    with pytest.raises(psycopg2.OperationalError):
        inner.execute("SELECT 1")
    assert not inner.is_open
    with pytest.raises(psycopg2.InterfaceError):
        inner.fetchall("pg_class")
    with pytest.raises(psycopg2.InterfaceError):
        inner.commit()
    inner.close()
    assert (in_use(pool), cached(pool)) == (1, 0)


def test_close_is_idempotent_and_final(pool: Pool) -> None:
    handle = PgSimple(pool)
    assert handle.is_open
    assert "open" in repr(handle)
    handle.close()
    handle.close()
    assert not handle.is_open
    assert "closed" in repr(handle)
    uses: list[Any] = [
        handle.commit,
        handle.rollback,
        lambda: handle.execute("SELECT 1"),
        handle.__enter__,
    ]
    uses += [lambda: handle.fetchall("t"), lambda: handle.insert("t", {}), lambda: handle.drop("t")]
    for use in uses:
        with pytest.raises(psycopg2.InterfaceError, match="closed"):
            use()
    assert (in_use(pool), cached(pool)) == (0, 1)


def test_close_inside_with_commits_nothing(pool: Pool, db: PgSimple, table: str) -> None:
    with PgSimple(pool) as inner:
        inner.insert(table, {"id": 1})
        inner.close()
    assert (in_use(pool), cached(pool)) == (1, 1)
    assert count(db) == 0


def test_exhaustion_surfaces_as_pool_error(pool: Pool) -> None:
    with PgSimple(pool), PgSimple(pool):
        with pytest.raises(PoolError):
            PgSimple(pool)
        with pytest.raises(psycopg2.pool.PoolError):
            PgSimple(pool)
    assert (in_use(pool), cached(pool)) == (0, 2)


def test_the_default_is_the_current_pool(make_pool: MakePool) -> None:
    pool = make_pool(name="default")
    with PgSimple() as db:
        assert in_use(pool) == 1
        db.execute("SELECT 1")
        assert db._live().info.transaction_status == TRANSACTION_STATUS_INTRANS
    assert in_use(pool) == 0
