"""Where to connect: no password is told."""

import logging
import traceback
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extras import NamedTupleCursor

from sharedpool.errors import ConfigError
from sharedpool.postgres import conninfo
from sharedpool.postgres.conninfo import ConnInfo, resolve
from tests.unit.conninfo_helpers import no_settings_of_the_developer, unhurried

__all__ = ["no_settings_of_the_developer"]  # pytest finds it here


def resolved_or_error(**arguments: Any) -> ConnInfo | str:
    """Return the ConnInfo, or all that a log could show of the error: text, repr and every chained
    error."""
    try:
        return resolve(**arguments)
    except ConfigError as error:
        told = traceback.TracebackException.from_exception(error)
        chained = [error.__context__, error.__cause__]
        return "".join([*told.format_exception_only(), repr(error), *map(repr, chained)])


@pytest.mark.parametrize(
    ("origin", "arguments"),
    [
        ("db_url=", {"db_url": "postgres://zadmin:zsecret%4@h/app"}),
        ("db_url=", {"db_url": 'postgres://zadmin:a"zsecret"b%zz@h/app'}),
        ("db_url=", {"db_url": "postgres://zadmin:zsecret%00@h/app"}),
        ("db_url=", {"db_url": "postgres://zadmin:zsecret@h/app?zsecret=1"}),
        ("db_url=", {"db_url": "postgres://[zadmin:zsecret"}),
        ("db_url=", {"db_url": "postgres://zadmin:?@zsecret@h/app"}),
        ("dsn=", {"dsn": "postgres://zadmin:?zsecret@zsecret@h"}),
        ("db_url=", {"db_url": "mysql://zadmin:zsecret@h/app"}),
        ("db_url=", {"db_url": "zadmin:zsecret@h/app"}),
        ("db_url=", {"db_url": "postgres://zadmin:zsecret\0@h/app"}),
        ("db_url=", {"db_url": "postgres://zadmin:zsecret\ud800@h/app"}),
        ("dsn=", {"dsn": "user=zadmin password='zsecret"}),
        ("dsn=", {"dsn": "user=zadmin password=a zsecret=b"}),
        ("dsn=", {"dsn": "user=zadmin password=a zsecret"}),
        ("dsn=", {"dsn": "zadmin zsecret"}),
        ("DATABASE_DSN", {"environ": {"DATABASE_DSN": "user=zadmin password='zsecret"}}),
        ("DATABASE_URL", {"environ": {"DATABASE_URL": "postgres://zadmin:zsecret%4@h/app"}}),
        ("password=", {"password": "zsecret\0"}),
        ("password=", {"password": "zsecret\udfff"}),
        ("bogus=", {"dsn": "user=zadmin password=zsecret", "bogus": 1}),
        ("database=", {"password": "zsecret", "user": "zadmin", "database": "a", "dbname": "b"}),
    ],
)
def test_errors_name_the_argument_and_hide_the_secret(
    origin: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(**arguments)
    assert str(raised.value).startswith(origin)
    shown = repr(resolved_or_error(**arguments))
    assert "zsecret" not in shown
    assert "zadmin" not in shown


marked = st.builds(lambda before, after: f"{before}zsecret{after}", st.text(), st.text())


@unhurried
@given(
    password=marked, origin=st.sampled_from(["dsn", "db_url", "environ", "keyword"]), data=st.data()
)
def test_no_error_and_no_repr_ever_contains_the_password(
    password: str, origin: str, data: st.DataObject
) -> None:
    url = data.draw(
        st.sampled_from(
            [
                f"postgres://u:{password}@h/app",
                f"postgres://u:{quote(password, safe='', errors='replace')}%@h",
                f"postgres://h/app?password={password}",
                f"jdbc:postgresql://u:{password}@h",
            ]
        )
    )
    dsn = data.draw(
        st.sampled_from([f"user=u password={password}", f"host=h password='{password}' x", url])
    )
    environ = data.draw(st.sampled_from([{"DATABASE_URL": url}, {"DATABASE_DSN": dsn}]))
    arguments: dict[str, dict[str, Any]] = {
        "dsn": {"dsn": dsn},
        "db_url": {"db_url": url},
        "environ": {"environ": environ},
        "keyword": {"host": "h", "password": password, "sslpassword": password},
    }
    shown = repr(resolved_or_error(**arguments[origin]))
    assert "zsecret" not in shown


def test_repr_shows_where_and_hides_secrets() -> None:
    info = resolve(
        db_url="postgres://app:zsecret@db:5432/app?sslpassword=zother",
        cursor_factory=NamedTupleCursor,
    )
    shown = repr(info)
    assert "host=db" in shown
    assert "user=app" in shown
    assert "cursor_factory" in shown
    assert "zsecret" not in shown + str(info) + f"{info}"
    assert "zother" not in shown


def test_repr_of_a_malformed_conninfo_does_not_raise() -> None:
    assert "zsecret" not in repr(ConnInfo("password='zsecret"))


def test_an_unforeseen_message_of_libpq_is_not_repeated() -> None:
    assert conninfo._without_quotes("invalid dsn: ungültig: „zsecret“\n") == "libpq refuses it"
    assert conninfo._without_quotes('invalid dsn: odd " zsecret') == "libpq refuses it"
    assert conninfo._without_quotes('invalid dsn: bad "a"zsecret"b" here\n') == "bad ... here"


def test_resolving_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        resolve(db_url="postgres://app:zsecret@db/app").identity()
    assert not caplog.records
