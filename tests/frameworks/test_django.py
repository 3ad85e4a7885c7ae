"""Django's backend on a shared pool, on a real server."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import django
import django.conf
import psycopg2.extensions
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import ConnectionHandler

import sharedpool
from tests.support.processes import workers
from tests.support.waiting import wait_until

if not django.conf.settings.configured:
    django.conf.settings.configure(USE_TZ=True, LOGGING_CONFIG=None)
    django.setup()

MakeConnections = Callable[..., ConnectionHandler]
# Where the benchmark's requirements are installed too.
pytestmark = pytest.mark.skipif(
    find_spec("psycopg") is not None, reason="psycopg 3 is installed: Django takes that"
)


@pytest.fixture
def make_connections(broker: sharedpool.Broker, database: str) -> Iterator[MakeConnections]:
    """`django.db.connections` for the test's database, with OPTIONS and settings."""
    found = psycopg2.extensions.parse_dsn(database)
    made: list[ConnectionHandler] = []

    def make(options: dict[str, Any] | None = None, **settings: Any) -> ConnectionHandler:
        default = {
            "ENGINE": "sharedpool.integrations.django",
            "NAME": found["dbname"],
            "USER": found["user"],
            "HOST": found["host"],
            "PORT": found["port"],
            "OPTIONS": {"broker": broker.address, "max_conn": 1, "timeout": 5} | (options or {}),
        }
        handler = ConnectionHandler({"default": default | settings})
        made.append(handler)
        return handler

    yield make
    for handler in made:
        handler.close_all()
        handler["default"].close_pool()


def ask(connection: BaseDatabaseWrapper, query: str = "SELECT pg_backend_pid()") -> Any:
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


def pool_of(connection: BaseDatabaseWrapper) -> sharedpool.Pool:
    return sharedpool.get_pool(f"django default {connection.settings_dict['NAME']}")


def test_close_returns_the_connection_and_the_next_use_gets_it_back(
    make_connections: MakeConnections,
) -> None:
    connection = make_connections()["default"]
    pid = ask(connection)
    assert pool_of(connection).stats().in_use == 1
    connection.close()
    assert connection.connection is None
    assert (pool_of(connection).stats().in_use, pool_of(connection).stats().idle) == (0, 1)
    assert ask(connection) == pid
    assert pool_of(connection).max_conn == 1


def test_the_pools_name_and_timeout(make_connections: MakeConnections) -> None:
    connection = make_connections({"name": "mine"})["default"]
    del connection.settings_dict["OPTIONS"]["timeout"]
    ask(connection)
    pool = sharedpool.get_pool(f"mine {connection.settings_dict['NAME']}")
    assert pool.stats().in_use == 1
    assert pool.config.timeout == 30


@pytest.mark.parametrize("session", ["new", "used before", "of another process"])
def test_it_is_set_up_as_django_wants_it(
    make_connections: MakeConnections, broker: sharedpool.Broker, database: str, session: str
) -> None:
    options = {"isolation_level": psycopg2.extensions.ISOLATION_LEVEL_SERIALIZABLE}
    connection = make_connections(options, TIME_ZONE="Asia/Tokyo")["default"]
    pid = ask(connection)
    connection.close()
    if session == "new":
        pool_of(connection).close_idle()
    elif session == "of another process":
        settings = {
            "dsn": database,
            "broker": broker.address,
            "name": pool_of(connection).name,
            "max_conn": 1,
        }
        with workers(1, **settings) as (other,):
            assert other.ask("get", name="it", timeout=10)["backend"] == pid
            assert "at" in other.ask("put", name="it")
            assert ask(connection) == pid
    assert (ask(connection) == pid) is (session != "new")
    assert ask(connection, "SHOW TimeZone") == "Asia/Tokyo"
    assert ask(connection, "SHOW client_encoding") == "UTF8"
    assert connection.connection.autocommit
    connection.set_autocommit(False)
    assert ask(connection, "SHOW transaction_isolation") == "serializable"
    assert ask(connection, """SELECT '{"a": 1}'::jsonb""") == '{"a": 1}'  # decoded by JSONField
    connection.rollback()


def test_threads_share_the_limit_and_wait_their_turn(make_connections: MakeConnections) -> None:
    connections = make_connections({"max_conn": 2})
    pids = set()

    def work(_: int) -> None:
        for _ in range(20):
            pids.add(ask(connections["default"]))
            connections["default"].close()

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(work, range(6)))
    assert 1 <= len(pids) <= 2


def test_no_free_connection_is_an_operational_error(make_connections: MakeConnections) -> None:
    connections = make_connections({"timeout": 0})
    ask(connections["default"])
    with ThreadPoolExecutor(1) as executor:
        failed = executor.submit(ask, connections["default"].copy()).exception()
    assert isinstance(failed, OperationalError)
    cause = failed.__cause__
    assert isinstance(cause, psycopg2.OperationalError)
    assert isinstance(cause.__cause__, sharedpool.PoolExhausted)


def test_named_cursors_work(make_connections: MakeConnections) -> None:
    connection = make_connections()["default"]
    with connection.chunked_cursor() as cursor:
        cursor.execute("SELECT generate_series(1, 3000)")
        assert sum(len(cursor.fetchmany(1000)) for _ in range(3)) == 3000


def test_the_connection_for_create_database_is_outside_the_pool(
    make_connections: MakeConnections,
) -> None:
    connection = make_connections()["default"]
    ask(connection)  # the pool's only one
    with connection._nodb_cursor() as cursor:
        cursor.execute("SELECT current_database(), current_setting('application_name')")
        assert cursor.fetchone() == ("postgres", "")


def test_close_pool_leaves_nothing_that_would_hinder_drop_database(
    make_connections: MakeConnections, server_connection: psycopg2.extensions.connection
) -> None:
    connection = make_connections()["default"]
    ask(connection)
    connection.close()
    connection.close_pool()
    with server_connection.cursor() as cursor:

        def left() -> Any:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = %s",
                [connection.settings_dict["NAME"]],
            )
            return (cursor.fetchone() or (None,))[0]

        # DROP DATABASE waits for five seconds.
        wait_until(lambda: left() == 0, timeout_s=4, what="the broker's session to end")
    assert ask(connection)  # with a new pool


def test_a_time_zone_that_changes_is_set_on_pooled_connections_too(
    make_connections: MakeConnections,
) -> None:
    connection = make_connections()["default"]
    pid = ask(connection)
    connection.close()
    connection.settings_dict["TIME_ZONE"] = "Europe/Rome"
    for name in ("timezone", "timezone_name"):
        connection.__dict__.pop(name, None)
    assert connection.ensure_timezone() is False  # there is none just now
    assert ask(connection, "SHOW TimeZone") == "Europe/Rome"
    assert ask(connection) == pid


@pytest.mark.parametrize(
    ("options", "settings", "says"),
    [
        ({}, {"CONN_MAX_AGE": 60}, "CONN_MAX_AGE must be 0"),
        ({}, {"CONN_MAX_AGE": None}, "CONN_MAX_AGE must be 0"),
        ({"pool": True}, {}, "Django's own pool"),
        ({"max_con": 3}, {}, "max_con= is not a connection keyword"),
        ({"max_conn": 0}, {}, "max_conn: must be"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    make_connections: MakeConnections, options: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    connection = make_connections(options, **settings)["default"]
    with pytest.raises(ImproperlyConfigured, match=re.escape(says)):
        connection.ensure_connection()
