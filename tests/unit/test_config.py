"""`config_pool`: what it takes, what it refuses, what it remembers.

No server is needed: nothing connects.
"""

import pickle
import subprocess
import sys
from typing import Any

import pytest

import sharedpool
from sharedpool import ConfigError
from tests.unit.unconnected_pools import DSN, fresh

__all__ = ["fresh"]  # pytest finds it here


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_conn": 0}, "max_conn"),
        ({"max_conn": -3}, "max_conn"),
        ({"max_conn": 2.5}, "max_conn"),
        ({"max_conn": "5"}, "max_conn"),
        ({"max_conn": True}, "max_conn"),
        ({"expiration": -1}, "expiration"),
        ({"expiration": float("nan")}, "expiration"),
        ({"expiration": None}, "expiration"),
        ({"timeout": -0.1}, "timeout"),
        ({"max_lifetime": 0}, "max_lifetime"),
        ({"max_checkout": -5}, "max_checkout"),
        ({"max_checkout_action": "kill"}, "max_checkout_action"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"time_slice": -1}, "time_slice"),
        ({"handover": "on"}, "handover"),
        ({"group": "a@b"}, "group"),
        ({"configure": "SET x"}, "configure"),
        ({"reset": 1}, "reset"),
        ({"check": 1}, "check"),
        ({"pool_manager": object}, "pool_manager"),
        ({"pool_manager": "threaded"}, "pool_manager"),
        ({"name": ""}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"max_conn": 2**70}, "max_conn"),
        ({"max_checkout": float("inf")}, "max_checkout"),
        ({"broker": "localhost:5555"}, "broker"),
        ({"broker": "ipc://relative.sock"}, "broker"),
        ({"db_url": "postgres://app@db/app"}, "dsn"),
        ({"no_such_keyword": 1}, "no_such_keyword"),
    ],
)
def test_a_wrong_argument_is_named_and_no_password_told(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        sharedpool.config_pool(**{"dsn": DSN} | settings)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, sharedpool.PoolError)
    assert "s3cr3t" not in str(caught.value)


def test_a_url_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="db_url"):
        sharedpool.config_pool(db_url="mysql://app@db/app")


def test_nothing_to_connect_to_is_said_clearly() -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL"):
        sharedpool.config_pool()


def test_the_environment_is_used_and_loses_to_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://url_user@url.example/app")
    assert sharedpool.config_pool().config.conninfo.identity().host == "url.example"
    monkeypatch.setenv("DATABASE_DSN", "host=dsn.example user=u")
    assert sharedpool.config_pool().config.conninfo.identity().host == "dsn.example"
    assert (
        sharedpool.config_pool(host="mine.example", user="me").config.conninfo.identity().host
        == "mine.example"
    )


def test_the_last_pool_of_a_name_is_the_current_one() -> None:
    first = sharedpool.config_pool(dsn=DSN)
    reports = sharedpool.config_pool(dsn=DSN, name="reports")
    assert sharedpool.get_pool() is first
    assert sharedpool.get_pool("reports") is reports
    second = sharedpool.config_pool(dsn=DSN)
    assert sharedpool.get_pool() is second


def test_a_pool_with_a_name_is_not_the_one_without() -> None:
    with pytest.raises(
        sharedpool.PoolError,
        match=r"no pool 'default' is configured: call sharedpool.config_pool\(\) first$",
    ):
        sharedpool.get_pool()
    sharedpool.config_pool(dsn=DSN, name="reports")
    with pytest.raises(
        sharedpool.PoolError, match=r"first, or take one that is: get_pool\('reports'\)$"
    ):
        sharedpool.get_pool()
    with pytest.raises(sharedpool.PoolError, match="no pool 'default'"):
        sharedpool.PgSimple()


def test_the_kind_of_pool_is_the_callers() -> None:
    class Mine(sharedpool.ThreadedConnectionPool):
        pass

    assert type(sharedpool.config_pool(dsn=DSN)) is sharedpool.SimpleConnectionPool
    assert type(sharedpool.config_pool(dsn=DSN, pool_manager=Mine)) is Mine


def test_a_pool_shows_its_state_and_no_password() -> None:
    pool = sharedpool.config_pool(dsn=DSN, max_conn=7)
    assert (
        repr(pool)
        == "<SimpleConnectionPool 'default': 0 in use and 0 idle in this process, limit 7 over all>"
    )
    assert "s3cr3t" not in repr(pool.config)
    pool.release_all()
    assert repr(pool) == "<SimpleConnectionPool 'default' disposed>"


def test_a_pool_that_is_pickled_for_another_process_says_what_to_do() -> None:
    with pytest.raises(
        TypeError, match=r"'spawned' cannot be pickled .* call config_pool\(\) there too"
    ):
        pickle.dumps(sharedpool.config_pool(dsn="dbname=app password=secret", name="spawned"))


def test_a_service_that_is_not_there_is_an_error_of_config_pool() -> None:
    with pytest.raises(ConfigError, match="service 'nosuch'"):
        sharedpool.config_pool(service="nosuch")


def test_a_worker_loads_no_more_than_it_needs() -> None:
    """The broker's modules are 3 MB of memory in every process, the others 0.7 MB or more."""
    own = ("sharedpool.broker.", "sharedpool.cli", "sharedpool.pgsimple")
    unneeded = (*own, "multip", "hashlib", "dataclasses", "psycopg2.extras", "psycopg2.sql")
    code = f"import sys, sharedpool; print([m for m in sys.modules if m.startswith({unneeded})])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed == "[]\n"


def test_what_only_some_programs_use_is_loaded_on_demand() -> None:
    assert sharedpool.PgSimple.__module__ == "sharedpool.pgsimple"
    assert (
        sharedpool.start_broker.__module__
        == sharedpool.Broker.__module__
        == "sharedpool.broker.launch.run"
    )
    with pytest.raises(AttributeError, match="no attribute 'start_brocker'"):
        sharedpool.start_brocker  # noqa: B018
