"""Wrappers of `psycopg2.connect` that are refused, or fail."""

from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import extensions

from sharedpool import SharedPoolError
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.pool import Pool
from tests.integration.connect_wrappers import own_connect
from tests.support.fixture_types import Backends, MakePool
from tests.support.sql import ask
from tests.support.waiting import wait_until


def test_a_wrapper_that_makes_its_own_connection_is_refused(
    make_pool: MakePool, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(max_conn=1)

    def connect(*args: Any, **kwargs: Any) -> Any:
        kwargs["connection_factory"] = psycopg2.extras.LoggingConnection
        return own_connect(*args, **kwargs)

    monkeypatch.setattr(psycopg2, "connect", connect)
    with pytest.raises(SharedPoolError, match=r"ignores connection_factory=.*LoggingConnection"):
        pool.get_conn()
    assert_all_is_there_again(pool, backends, monkeypatch)


def test_a_wrapper_that_hides_the_connection_is_refused(
    make_pool: MakePool, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opaque:
        def __init__(self, inner: Any) -> None:
            self.cursor, self.close = inner.cursor, inner.close

    pool = make_pool(max_conn=1)
    monkeypatch.setattr(
        psycopg2, "connect", lambda *args, **kwargs: Opaque(own_connect(*args, **kwargs))
    )
    with pytest.raises(SharedPoolError, match=r"Opaque.*does not pass on the attributes"):
        pool.get_conn()
    assert_all_is_there_again(pool, backends, monkeypatch)


def test_a_wrapper_that_connects_twice_is_refused(
    make_pool: MakePool, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*args: Any, **kwargs: Any) -> Any:
        own_connect(*args, **kwargs)
        return own_connect(*args, **kwargs)

    pool = make_pool(max_conn=1)
    monkeypatch.setattr(psycopg2, "connect", connect)
    with pytest.raises(SharedPoolError, match="connects twice"):
        pool.get_conn()
    assert_all_is_there_again(pool, backends, monkeypatch)


def test_a_wrapper_that_tries_again_gets_the_first_error_again(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def connect(*args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                tries.append(len(tries))
                return own_connect(*args, **kwargs)
            except psycopg2.OperationalError:
                if len(tries) == 3:
                    raise

    wrong = make_pool(max_conn=1, dbname="there_is_none")
    monkeypatch.setattr(psycopg2, "connect", connect)
    with pytest.raises(psycopg2.OperationalError, match="there_is_none"):
        wrong.get_conn()
    assert tries == [0, 1, 2]
    monkeypatch.setattr(psycopg2, "connect", own_connect)
    with pytest.raises(psycopg2.OperationalError, match="there_is_none"):
        wrong.get_conn(timeout=10)  # the slot is there


def test_a_wrapper_that_fails_after_the_connect_costs_the_connection_alone(
    make_pool: MakePool, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*args: Any, **kwargs: Any) -> Any:
        own_connect(*args, **kwargs)
        raise KeyError("the agent's own")

    pool = make_pool(max_conn=1)
    monkeypatch.setattr(psycopg2, "connect", connect)
    with pytest.raises(KeyError, match="the agent's own"):
        pool.get_conn()
    assert_all_is_there_again(pool, backends, monkeypatch)


def assert_all_is_there_again(
    pool: Pool, backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: not backends(pool), what="the backend's end")
    monkeypatch.setattr(psycopg2, "connect", own_connect)
    conn = pool.get_conn(timeout=10)
    assert ask(conn) in backends(pool)
    pool.put_conn(conn)


def test_the_arguments_of_a_connect_are_those_that_the_pool_was_given(
    make_pool: MakePool, postgres: EphemeralPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []

    def connect(dsn: Any = None, **kwargs: Any) -> Any:
        seen.append((dsn, kwargs))
        return own_connect(dsn, **kwargs)

    monkeypatch.setattr(psycopg2, "connect", connect)
    keywords = extensions.parse_dsn(postgres.dsn)
    database = keywords.pop("dbname")
    make_pool(dsn=None, database=database, password=lambda: "secret", **keywords).get_conn()
    dsn, given = seen.pop()
    assert dsn is None
    assert given.items() >= {**keywords, "database": database, "password": "secret"}.items()
    make_pool().get_conn()
    dsn, given = seen.pop()
    assert extensions.parse_dsn(dsn) == extensions.parse_dsn(postgres.dsn)
    assert not given.keys() & {"host", "port", "user", "dbname", "database"}
