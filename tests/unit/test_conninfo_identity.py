"""Which server and role a conninfo means: by libpq's own resolution, and without it."""

import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedpool.errors import ConfigError
from sharedpool.postgres import libpq
from sharedpool.postgres.conninfo import ServerIdentity, resolve
from tests.unit.conninfo_helpers import no_settings_of_the_developer, unhurried

__all__ = ["no_settings_of_the_developer"]  # pytest finds it here


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
