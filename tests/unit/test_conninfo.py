"""Where to connect: precedence, checks, secrets and libpq's own resolution. No server is needed."""

import logging
import pickle
import socket
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2.extensions import connection, parse_dsn
from psycopg2.extras import DictConnection, NamedTupleCursor
from psycopg2.pool import PoolError

from sharedpool.errors import ConfigError
from sharedpool.postgres import conninfo, libpq
from sharedpool.postgres.conninfo import ConnInfo, ServerIdentity, resolve

LIBPQ_VARIABLES = [
    "PGHOST",
    "PGHOSTADDR",
    "PGPORT",
    "PGDATABASE",
    "PGUSER",
    "PGPASSWORD",
    "PGSSLMODE",
    "PGPASSFILE",
]
LIBPQ_VARIABLES += ["PGSERVICE", "PGSERVICEFILE", "PGSYSCONFDIR"]

# A busy machine is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*LIBPQ_VARIABLES, "DATABASE_DSN", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "HOME", str(tmp_path)
    )  # no ~/.pg_service.conf of the person who runs the tests


def parts(dsn: str | None = None, db_url: str | None = None, **rest: Any) -> dict[str, str]:
    rest.setdefault("environ", {})
    return parse_dsn(resolve(dsn, db_url, **rest).dsn)


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


# --- wrong values


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


# --- what is asked for at every connect


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


# --- secrets


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


# --- the value itself


def test_conninfo_is_frozen_hashable_and_picklable() -> None:
    info = resolve(host="h", cursor_factory=NamedTupleCursor)
    with pytest.raises(AttributeError):
        info.dsn = ""  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(info)) == info
    assert {info: 1}[resolve(host="h", cursor_factory=NamedTupleCursor)] == 1


# --- identity


@pytest.fixture(params=["libpq", "by hand"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Resolve with libpq and, as on a build whose symbols cannot be reached, without it."""
    if request.param == "by hand":
        monkeypatch.setattr("sharedpool.postgres.libpq.library", lambda: None)
    return str(request.param)


def identity(**arguments: Any) -> ServerIdentity:
    return resolve(environ={"PGHOST": "only so that something is set"}, **arguments).identity()


def test_libpq_can_be_reached_here() -> None:
    assert libpq.library() is not None


@pytest.mark.usefixtures("either_way")
def test_identity_of_explicit_values() -> None:
    found = identity(host="db.example", port=5433, dbname="app", user="u", password="zsecret")
    assert found == ServerIdentity("db.example", "5433", "app", "u")
    assert str(found) == f"{found}" == "u@db.example:5433/app"


@pytest.mark.usefixtures("either_way")
def test_identity_fills_in_built_in_values() -> None:
    found = identity(sslmode="require")
    assert found.host == "local"
    assert found.port == "5432"
    assert found.user
    assert found.dbname == found.user
    assert identity(user="u") == ("local", "5432", "u", "u")


@pytest.mark.usefixtures("either_way")
def test_identity_takes_the_libpq_environment_below_explicit_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "PGHOST": "eh",
        "PGPORT": "1234",
        "PGDATABASE": "ed",
        "PGUSER": "eu",
    }.items():
        monkeypatch.setenv(name, value)
    assert resolve().identity() == ("eh", "1234", "ed", "eu")
    assert identity(host="h", dbname="d") == ("h", "1234", "d", "eu")


@pytest.mark.usefixtures("either_way")
def test_hostaddr_is_where_libpq_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity(hostaddr="10.0.0.1", user="u").host == "10.0.0.1"
    assert identity(hostaddr="10.0.0.1", host="db", user="u").host == "10.0.0.1"
    monkeypatch.setenv("PGHOSTADDR", "10.0.0.2")
    assert identity(user="u").host == "10.0.0.2"


@pytest.mark.usefixtures("either_way")
def test_several_hosts_and_odd_characters_are_kept_as_text() -> None:
    url = "postgres://u%25:p@a:1,b:2/d%20b%27%5C"
    assert identity(db_url=url) == ("a,b", "1,2", "d b'\\", "u%")
    assert identity(db_url="postgres://u@a:1,b:2,c:3").dbname == "u"
    assert identity(user="ü", dbname="数据").dbname == "数据"


@pytest.mark.usefixtures("either_way")
def test_the_same_server_named_in_different_ways_is_one_identity() -> None:
    assert (
        identity(dsn="host=h port=5432 dbname=d user=u")
        == identity(db_url="postgresql://u:secret@h/d?sslmode=require")
        == identity(host="h", database="d", user="u", connect_timeout=3)
    )


@pytest.fixture
def service_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pg_service.conf"
    path.write_text("[reports]\nhost=sh\nport=6000\nuser=su\n\n[other]\nhost=oh\ndbname=od\n")
    monkeypatch.setenv("PGSERVICEFILE", str(path))
    return path


@pytest.mark.usefixtures("service_file")
def test_a_service_is_resolved_between_explicit_values_and_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGHOST", "eh")
    monkeypatch.setenv("PGDATABASE", "ed")
    assert identity(service="reports") == ("sh", "6000", "ed", "su")
    assert identity(dsn="service=reports port=1 user=xu") == ("sh", "1", "ed", "xu")
    assert identity(db_url="postgres:///?service=other").host == "oh"


def test_the_source_of_an_identity_may_change(
    monkeypatch: pytest.MonkeyPatch, service_file: Path
) -> None:
    info, by_service = resolve(dsn="dbname=d user=u"), resolve(dsn="service=reports user=u")
    for host in ("one", "two"):
        monkeypatch.setenv("PGHOST", host)
        assert info.identity() == info.identity() == (host, "5432", "d", "u")
    for host in ("sh", "moved"):
        service_file.write_text(f"[reports]\nhost={host}\n")
        assert by_service.identity().host == host
    monkeypatch.setenv("PGSERVICE", "other")
    service_file.write_text("[other]\nport=1\n")
    assert info.identity().port == "1"
    service_file.write_text("[other]\nport=2\n")
    assert info.identity().port == "2"


@pytest.mark.usefixtures("service_file")
def test_an_explicit_service_wins_over_pgservice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSERVICE", "other")
    assert identity(user="u") == ("oh", "5432", "od", "u")
    assert identity(service="reports").host == "sh"


@pytest.mark.usefixtures("service_file")
def test_a_missing_service_is_named() -> None:
    with pytest.raises(ConfigError, match=r"service 'nosuch' .*not found"):
        resolve(service="nosuch", password="zsecret").identity()


def test_a_service_keeps_its_name_where_libpq_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sharedpool.postgres.libpq.library", lambda: None)
    assert identity(service="reports", user="u").host == "service=reports"
    assert identity(service="reports", host="h", user="u").host == "h"


def test_identity_connects_to_nothing_and_changes_no_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        before = dict(os.environ)
        found = identity(
            host="127.0.0.1", hostaddr="127.0.0.1", port=port, user="u", sslmode="disable"
        )
        assert found == ("127.0.0.1", str(port), "u", "u")
        assert dict(os.environ) == before
        with pytest.raises(BlockingIOError):
            server.accept()


def test_the_digest_is_the_servers_and_the_roles_not_the_databases() -> None:
    base = ServerIdentity("h", "1", "d", "u")
    digests = {base._replace(**{name: "x"}).digest() for name in ("host", "port", "user")}
    digests |= {base.digest(), ServerIdentity("h1", "", "d", "u").digest()}
    assert len(digests) == 5
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)
    assert (
        base.digest()
        == ServerIdentity("h", "1", "d", "u").digest()
        == base._replace(dbname="other").digest()
    )


@unhurried
@given(user=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_role_has_a_digest(user: str) -> None:
    assert len(ServerIdentity("h\udcff", "1", "d", user).digest()) == 16
