"""Where to connect: which setting counts, and how a URL is read. No server is needed."""

import pickle
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn
from psycopg2.extras import NamedTupleCursor

from sharedpool.errors import ConfigError
from sharedpool.postgres.conninfo import resolve
from tests.unit.conninfo_helpers import no_settings_of_the_developer, parts, unhurried

__all__ = ["no_settings_of_the_developer"]  # pytest finds it here


# --- precedence


def test_keywords_alone_make_the_conninfo() -> None:
    assert parts(host="db", port=5433, database="app", user="u", password="p w'\\") == {
        "host": "db",
        "port": "5433",
        "dbname": "app",
        "user": "u",
        "password": "p w'\\",
    }


def test_explicit_dsn_wins_over_the_environment() -> None:
    environ = {"DATABASE_DSN": "host=wrong", "DATABASE_URL": "postgres://wrong"}
    assert parts("host=right", environ=environ) == {"host": "right"}
    assert parts(db_url="postgres://right", environ=environ) == {"host": "right"}


def test_database_dsn_wins_over_database_url() -> None:
    assert parts(environ={"DATABASE_DSN": "host=one", "DATABASE_URL": "postgres://two"}) == {
        "host": "one"
    }
    assert parts(environ={"DATABASE_DSN": "", "DATABASE_URL": "postgres://two"}) == {"host": "two"}


def test_environment_defaults_to_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://from-env/app")
    assert parse_dsn(resolve().dsn) == {"host": "from-env", "dbname": "app"}


@pytest.mark.parametrize(
    "name", ["host", "hostaddr", "port", "dbname", "database", "user", "password", "service"]
)
def test_any_location_keyword_sets_database_variables_aside(name: str) -> None:
    environ = {
        "DATABASE_DSN": "host=wrong user=wrong sslmode=require",
        "DATABASE_URL": "postgres://wrong",
    }
    assert parts(environ=environ, **{name: "1"}) == {"dbname" if name == "database" else name: "1"}


def test_other_keywords_are_laid_over_the_environment() -> None:
    info = resolve(
        environ={"DATABASE_URL": "postgres://h/app?sslmode=disable&connect_timeout=3"},
        sslmode="require",
        cursor_factory=NamedTupleCursor,
    )
    assert parse_dsn(info.dsn) == {
        "host": "h",
        "dbname": "app",
        "sslmode": "require",
        "connect_timeout": "3",
    }
    assert info.python_kwargs == {"cursor_factory": NamedTupleCursor}


def test_keywords_win_over_dsn_and_url() -> None:
    assert parts("host=a dbname=x", host="b") == {"host": "b", "dbname": "x"}
    assert parts(db_url="postgres://a/x?sslmode=disable", database="y", sslmode="require") == {
        "host": "a",
        "dbname": "y",
        "sslmode": "require",
    }


def test_none_valued_keywords_are_ignored() -> None:
    environ = {"DATABASE_URL": "postgres://env"}
    assert parts(environ=environ, host=None, password=None, cursor_factory=None, no_such=None) == {
        "host": "env"
    }


def test_libpq_environment_is_left_to_libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(environ={"PGHOST": "db", "PGPASSWORD": "x"}).dsn == ""
    assert parts(environ={"PGHOST": "db"}, sslmode="require") == {"sslmode": "require"}


def test_a_dsn_may_be_a_url_as_in_psycopg2() -> None:
    assert parts("postgresql://u@h/db") == {"user": "u", "host": "h", "dbname": "db"}


# --- URLs


def test_url_is_decoded_and_its_query_parameters_are_kept() -> None:
    url = "postgres://us%65r:p%40ss%2F%25@host:5432/app?sslmode=require&options=-c%20geqo%3Doff&application_name=a%26b"
    assert parts(db_url=url) == {
        "user": "user",
        "password": "p@ss/%",
        "host": "host",
        "port": "5432",
        "dbname": "app",
        "sslmode": "require",
        "options": "-c geqo=off",
        "application_name": "a&b",
    }


def test_url_with_socket_directory_and_several_hosts() -> None:
    assert parts(db_url="postgres://%2Frun%2Fpg/app")["host"] == "/run/pg"
    several = parts(db_url="postgres://a:1,b:2/app?target_session_attrs=read-write")
    assert (several["host"], several["port"]) == ("a,b", "1,2")


def test_white_space_around_a_url_is_dropped() -> None:
    assert parts(environ={"DATABASE_URL": " postgres://h/app\n"}) == {"host": "h", "dbname": "app"}


@pytest.mark.parametrize(
    "url",
    [
        "mysql://h/app",
        "postgresql+psycopg2://h/app",
        "POSTGRES://h/app",
        "h:5432/app",
        "",
        "dbname=app",
    ],
)
def test_other_schemes_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^db_url= has .*postgres:// and postgresql://"):
        resolve(db_url=url)
    if "://" in url:
        with pytest.raises(ConfigError, match=r"^DATABASE_URL has the scheme"):
            resolve(environ={"DATABASE_URL": url})
        with pytest.raises(ConfigError, match=r"^DATABASE_DSN has the scheme"):
            resolve(environ={"DATABASE_DSN": url})


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@unhurried
@given(user=text, password=text)
def test_any_user_and_password_survive_a_url(user: str, password: str) -> None:
    found = parts(db_url=f"postgres://{quote(user, safe='')}:{quote(password, safe='')}@h/app")
    assert found == {"user": user, "password": password, "host": "h", "dbname": "app"}


@unhurried
@given(user=text, password=text, dbname=text)
def test_any_keyword_value_survives(user: str, password: str, dbname: str) -> None:
    assert parts(user=user, password=password, dbname=dbname) == {
        "user": user,
        "password": password,
        "dbname": dbname,
    }


# --- the value itself


def test_conninfo_is_frozen_hashable_and_picklable() -> None:
    info = resolve(host="h", cursor_factory=NamedTupleCursor)
    with pytest.raises(AttributeError):
        info.dsn = ""  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(info)) == info
    assert {info: 1}[resolve(host="h", cursor_factory=NamedTupleCursor)] == 1
