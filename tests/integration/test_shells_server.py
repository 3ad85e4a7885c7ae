"""What a connection that another process has opened says of its server, and refuses."""

import psycopg2
import pytest
from psycopg2 import extensions

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.handover import SUPPORTED
from tests.support.pool_pair import MakePair, moved
from tests.support.sql import ask

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)


def test_a_connection_that_has_moved_names_its_server(
    pair: MakePair, postgres: EphemeralPostgres
) -> None:
    dsn = extensions.make_dsn(
        postgres.dsn, options="-c work_mem=5MB", password="of no use", sslpassword="secret"
    )
    a, b = pair(dsn=dsn)
    plain = psycopg2.connect(dsn)
    for giver, taker in ((a, b), (b, a), (a, b)):
        conn = moved(giver, taker, lambda conn: None)
        for name in (
            "host",
            "port",
            "user",
            "dbname",
            "options",
            "password",
            "used_password",
            "needs_password",
        ):
            assert getattr(conn.info, name) == getattr(plain.info, name), name
        for parameters in (conn.get_dsn_parameters(), conn.info.dsn_parameters):
            for mine in ("connect_timeout", "fallback_application_name"):
                del parameters[mine]
            given = plain.get_dsn_parameters()
            assert given.pop("sslpassword") == "secret"  # psycopg2 shows it; it does not go along
            assert {**parameters, "sslpassword": ""} == {**given, "sslpassword": ""}
        said = extensions.parse_dsn(conn.dsn)
        assert said == {**extensions.parse_dsn(plain.dsn), **said, "password": "xxx"}
        assert "shell" not in f"{conn!r} {conn.dsn} {conn.info.host}"
        assert extensions.parse_dsn(conn.dsn)["host"] in repr(conn)
        taker.put_conn(conn)
    plain.close()


def test_the_environment_does_not_lead_a_shell_elsewhere(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair()
    for pool in (a, b):
        pool._local.shells._stock.clear()
    for name, value in (
        ("PGHOSTADDR", "127.0.0.1"),
        ("PGREQUIREPEER", "nobody"),
        ("PGREQUIREAUTH", "scram-sha-256"),
    ):
        monkeypatch.setenv(name, value)
    for name, value in (
        ("PGSSLMODE", "verify-full"),
        ("PGSSLROOTCERT", "system"),
        ("PGOPTIONS", "-c work_mem=1MB"),
    ):
        monkeypatch.setenv(name, value)
    conn = moved(a, b, lambda conn: None)
    assert ask(conn, "SELECT 1") == 1


def test_cancel_raises_where_psycopg2_raises(
    pair: MakePair, server_connection: extensions.connection
) -> None:
    a, b = pair()
    plain = psycopg2.connect(server_connection.dsn)
    told: dict[extensions.connection, list[tuple[type, str]]] = {}
    for conn in (plain, moved(a, b, lambda conn: None)):
        told[conn] = []
        conn.cancel()  # nothing to do
        conn.tpc_begin("cancel")
        conn.tpc_prepare()
        with pytest.raises(psycopg2.Error) as prepared:
            conn.cancel()
        told[conn].append((prepared.type, str(prepared.value)))
        conn.tpc_rollback()
        conn.close()
        with pytest.raises(psycopg2.Error) as closed:
            conn.cancel()
        told[conn].append((closed.type, str(closed.value)))
    first, second = told.values()
    assert first == second
    assert first[-1][0] is psycopg2.InterfaceError
