"""Where to connect: values that are refused, and what the error says."""

from typing import Any

import pytest
from psycopg2.extensions import connection
from psycopg2.extras import DictConnection, NamedTupleCursor
from psycopg2.pool import PoolError

from sharedpool.errors import ConfigError
from sharedpool.postgres.conninfo import resolve
from tests.unit.conninfo_helpers import no_settings_of_the_developer, parts

__all__ = ["no_settings_of_the_developer"]  # pytest finds it here


def test_dsn_together_with_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dsn=.*db_url="):
        resolve("host=a", "postgres://b")


@pytest.mark.parametrize(
    "url",
    [
        "postgres://u:p@ss@h/app",
        "postgres://u:p@@h",
        "postgres://u:12/34@h/app",
        "postgres://u:a@b/c@h/app?sslmode=a@b",
    ],
)
def test_an_undecodable_password_is_not_taken_for_a_host(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^db_url= has a stray @ or /: percent-encode"):
        resolve(db_url=url)


def test_an_at_sign_elsewhere_is_allowed() -> None:
    assert (
        parts(db_url="postgres://u:p@h/app?application_name=a@b/c")["application_name"] == "a@b/c"
    )
    assert parts(db_url="postgres://h/app?user=a@b")["user"] == "a@b"
    assert parts(host="@abstract")["host"] == "@abstract"


def test_a_port_must_be_a_number() -> None:
    with pytest.raises(ConfigError, match=r"^port= has a port"):
        resolve("host=h", port="http")
    with pytest.raises(ConfigError, match=r"^DATABASE_URL has a port") as raised:
        resolve(environ={"DATABASE_URL": "postgres://app:zsecret"})
    assert "zsecret" not in str(raised.value)
    assert parts(host="a,b", port="1,")["port"] == "1,"


@pytest.mark.parametrize(
    "keyword", ["bogus", "max_connections", "a b", "x=1 password", "", "ho\0st", "café"]
)
def test_unknown_keyword_is_named(keyword: str) -> None:
    arguments: dict[str, Any] = {"host": "h", keyword: "1"}
    with pytest.raises(ConfigError) as raised:
        resolve(**arguments)
    assert str(raised.value).startswith(f"{keyword}= is not")


@pytest.mark.parametrize("keyword", ["async", "async_"])
def test_asynchronous_connections_are_refused(keyword: str) -> None:
    arguments: dict[str, Any] = {"host": "h", keyword: True}
    with pytest.raises(ConfigError, match=rf"^{keyword}= .*blocking"):
        resolve(**arguments)


def test_database_is_an_alias_of_dbname() -> None:
    assert parts(database="a", dbname="a") == {"dbname": "a"}
    with pytest.raises(ConfigError, match=r"database=.*dbname="):
        resolve(database="a", dbname="b")


@pytest.mark.parametrize("factory", [lambda dsn: None, NamedTupleCursor, "connection", 1])
def test_connection_factory_must_be_a_connection_class(factory: object) -> None:
    with pytest.raises(ConfigError, match=r"^connection_factory="):
        resolve(host="h", connection_factory=factory)


def test_connection_factory_is_passed_on() -> None:
    class Mine(connection):
        pass

    assert resolve(host="h", connection_factory=Mine).python_kwargs == {"connection_factory": Mine}
    assert resolve(host="h", connection_factory=DictConnection).python_kwargs == {
        "connection_factory": DictConnection
    }


def test_cursor_factory_must_be_callable() -> None:
    with pytest.raises(ConfigError, match=r"^cursor_factory="):
        resolve(host="h", cursor_factory="DictCursor")


@pytest.mark.parametrize("environ", [{}, {"PGSSLMODE": "require", "DATABASE_URL": ""}])
@pytest.mark.parametrize(
    "arguments", [{}, {"dsn": ""}, {"sslmode": "require"}, {"cursor_factory": NamedTupleCursor}]
)
def test_nothing_to_connect_to_says_what_to_set(
    environ: dict[str, str], arguments: dict[str, Any]
) -> None:
    with pytest.raises(
        ConfigError, match=r"nothing to connect to: pass dsn=.*DATABASE_URL.*PGSERVICE"
    ):
        resolve(environ=environ, **arguments)


@pytest.mark.parametrize(
    "name", ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"]
)
def test_one_libpq_variable_is_enough(name: str) -> None:
    assert resolve(environ={name: "1"}).dsn == ""


def test_wrong_types_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^dsn= must be a string, not int"):
        resolve(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^db_url= must be a string, not bytes"):
        resolve(db_url=b"postgres://h")  # type: ignore[arg-type]


def test_config_error_is_a_pool_error_and_a_value_error() -> None:
    with pytest.raises(PoolError):
        resolve(environ={})
    with pytest.raises(ValueError, match="nothing"):
        resolve(environ={})
