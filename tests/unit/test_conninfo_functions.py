"""Where to connect: functions that are asked at every connect."""

import traceback
from typing import Any

import pytest
from psycopg2.extensions import parse_dsn

from sharedpool.errors import ConfigError
from sharedpool.postgres.conninfo import resolve
from tests.unit.conninfo_helpers import no_settings_of_the_developer

__all__ = ["no_settings_of_the_developer"]  # pytest finds it here


def test_a_function_is_asked_for_the_password_at_every_connect_and_not_before() -> None:
    passwords = iter(["first", "it's \\ second"])
    found = resolve(host="h", dbname="d", user="u", password=lambda: next(passwords))
    assert parse_dsn(found.dsn) == {"host": "h", "dbname": "d", "user": "u"}
    assert parse_dsn(found.current())["password"] == "first"
    assert parse_dsn(found.current()) == {
        "host": "h",
        "dbname": "d",
        "user": "u",
        "password": "it's \\ second",
    }
    assert found.identity() == resolve(host="h", dbname="d", user="u", password="other").identity()


def test_a_function_is_asked_for_the_dsn_and_keywords_are_laid_over_it() -> None:
    passwords = iter(["first", "second", "third"])
    found = resolve(
        dsn=lambda: f"postgres://u:{next(passwords)}@h/d", port="5433", sslpassword=lambda: "s"
    )
    assert found.identity() == ("h", "5433", "d", "u")
    expected = {"host": "h", "port": "5433", "dbname": "d", "user": "u", "sslpassword": "s"}
    assert parse_dsn(found.current()) == expected | {"password": "second"}
    assert parse_dsn(found.current()) == expected | {"password": "third"}
    assert next(passwords, None) is None


def test_a_constant_conninfo_is_current() -> None:
    assert resolve(host="h").current() == resolve(host="h").dsn


@pytest.mark.parametrize(
    "name", ["host", "hostaddr", "port", "dbname", "database", "service", "user"]
)
def test_a_keyword_that_says_where_is_no_function(name: str) -> None:
    arguments: dict[str, Any] = {"host": "h", name: lambda: "x"}
    with pytest.raises(ConfigError, match=rf"^{name}= cannot be a function.*dsn= can be one"):
        resolve(**arguments)


def test_a_function_under_an_unknown_name_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^bogus= is not"):
        resolve(host="h", bogus=lambda: "x")


def test_a_password_function_is_explicit_as_a_password_is() -> None:
    environ = {"DATABASE_URL": "postgres://elsewhere/x", "PGHOST": "h"}
    assert resolve(environ=environ, password=lambda: "p").current() == "password=p"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            {"password": lambda: None},
            r"^password= must be a function that returns a string, not NoneType",
        ),
        (
            {"password": lambda: b"zsecret"},
            r"^password= must be a function that returns a string, not bytes",
        ),
        ({"password": lambda: "zsecret\0"}, r"^password= has a value that libpq cannot take"),
    ],
)
def test_a_functions_password_is_checked_and_never_shown(
    arguments: dict[str, Any], complaint: str
) -> None:
    found = resolve(host="h", **arguments)
    with pytest.raises(ConfigError, match=complaint) as raised:
        found.current()
    assert "zsecret" not in "".join(
        traceback.TracebackException.from_exception(raised.value).format_exception_only()
    )


def test_a_functions_dsn_is_checked_and_never_shown() -> None:
    answers: list[Any] = ["host=h password=zsecret", "host=h password='zsecret", None]
    found = resolve(dsn=lambda: answers.pop(0))
    for complaint in (r"^dsn= cannot be parsed", r"^dsn= must be a string, not NoneType"):
        with pytest.raises(ConfigError, match=complaint) as raised:
            found.current()
        assert "zsecret" not in str(raised.value)
    assert "zsecret" not in repr(found)


def test_a_functions_own_error_is_raised_as_it_is() -> None:
    def ask() -> str:
        raise KeyError("the vault is sealed")

    with pytest.raises(KeyError, match="sealed"):
        resolve(dsn=ask)
    with pytest.raises(KeyError, match="sealed"):
        resolve(host="h", password=ask).current()
