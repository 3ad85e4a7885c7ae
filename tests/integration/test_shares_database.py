"""Hosts that share their limits in a database that is not the pool's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import connection, make_dsn, parse_dsn

from sharedpool.broker.postgres.share_schema import create, open_table
from sharedpool.broker.postgres.share_table import leave
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.integration.several_hosts import MakeHost, log_of, on_host
from tests.support.sql import ask
from tests.support.waiting import wait_until

__all__ = ["on_host"]  # pytest finds it here

HOME = "shares_home"
TENANTS = ("shares_a", "shares_b", "shares_c")
MakeDsn = Callable[[str], str]


@pytest.fixture
def databases(postgres: EphemeralPostgres, server_connection: connection) -> Iterator[MakeDsn]:
    """Databases of one server; called with a name it returns the conninfo string."""
    with server_connection.cursor() as cursor:
        for name in (HOME, *TENANTS):
            cursor.execute(f"CREATE DATABASE {name}")
    yield lambda name: make_dsn(postgres.dsn, dbname=name)
    with server_connection.cursor() as cursor:
        for name in (HOME, *TENANTS):
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


def sessions(observer: connection) -> list[str]:
    """Return the databases of the brokers' sessions for shares."""
    with observer.cursor() as cursor:
        cursor.execute(
            "SELECT datname FROM pg_stat_activity WHERE application_name LIKE 'sharedpool-shares %'"
            " ORDER BY 1"
        )
        return [name for (name,) in cursor]


def agreed(dsn: str) -> str:
    """Return which database the hosts of a database's only limit have agreed on."""
    with closing(psycopg2.connect(dsn)) as conn:
        return str(ask(conn, "SELECT home FROM sharedpool.limits"))


def use_all(host: Any, *names: str) -> None:
    for name in names:
        assert "backend" in host.ask("get", name=name, timeout=20)


def test_one_session_serves_the_pools_of_many_databases(
    on_host: MakeHost, databases: MakeDsn, server_connection: connection
) -> None:
    workers = [
        on_host("web", dsn=databases(name), max_conn=1, shares_database=HOME) for name in TENANTS
    ]
    for worker in workers:  # each pool has a limit of its own, though they have one name
        use_all(worker, "x")
        assert worker.ask("get", name="y")["error"] == "PoolExhausted"
    wait_until(lambda: sessions(server_connection) == [HOME], what="one session")


def test_hosts_share_a_limit_in_the_database_that_they_name(
    on_host: MakeHost, databases: MakeDsn
) -> None:
    dsn = databases(TENANTS[0])
    settings = {"dsn": dsn, "max_conn": 3, "shares_database": HOME}
    web, cron = on_host("web", **settings), on_host("cron", **settings)
    use_all(web, "a", "b")
    use_all(cron, "a")
    for host in (web, cron):
        assert host.ask("get", name="x")["error"] == "PoolExhausted"
    cron.send("get", name="x", timeout=20)
    web.ask("put", name="a")
    assert "backend" in cron.answer()
    assert agreed(dsn) == HOME


def test_a_host_that_names_no_database_uses_that_of_the_others(
    on_host: MakeHost, databases: MakeDsn, server_connection: connection
) -> None:
    dsn = databases(TENANTS[0])
    web = on_host("web", dsn=dsn, max_conn=2, shares_database=HOME)
    cron = on_host("cron", dsn=dsn, max_conn=2)
    use_all(web, "a")
    use_all(cron, "a")
    for host in (web, cron):
        assert host.ask("get", name="x")["error"] == "PoolExhausted"
    wait_until(lambda: sessions(server_connection) == [HOME, HOME], what="both sessions there")


def test_a_host_that_names_another_database_than_the_others_is_told(
    on_host: MakeHost, databases: MakeDsn, runtime_dir: Path
) -> None:
    dsn = databases(TENANTS[0])
    web = on_host("web", dsn=dsn, max_conn=2)
    use_all(web, "a")
    cron = on_host("cron", dsn=dsn, max_conn=2, shares_database=HOME)
    use_all(cron, "a")
    for host in (web, cron):
        assert host.ask("get", name="x")["error"] == "PoolExhausted"
    said = f"its hosts share its limit in database {TENANTS[0]!r}, not in {HOME!r}"
    wait_until(lambda: said in log_of(runtime_dir / "cron"), what="a line in the log")
    assert agreed(dsn) == ""


def test_the_pools_own_name_is_as_good_as_none(on_host: MakeHost, databases: MakeDsn) -> None:
    dsn = databases(TENANTS[0])
    web = on_host("web", dsn=dsn, max_conn=1, shares_database=parse_dsn(dsn)["dbname"])
    cron = on_host("cron", dsn=dsn, max_conn=1)
    use_all(web, "a")
    assert cron.ask("get", name="x")["error"] == "PoolExhausted"
    assert agreed(dsn) == ""


def test_a_database_that_does_not_exist_is_not_agreed_on(
    on_host: MakeHost, databases: MakeDsn, runtime_dir: Path
) -> None:
    """The first host with that setting shares in the pool's own database, as one without does."""
    dsn = databases(TENANTS[0])
    web = on_host("web", dsn=dsn, max_conn=2, shares_database="shares_nowhere")
    use_all(web, "a")
    said = f"in database {TENANTS[0]!r}, not in 'shares_nowhere' as asked for: .* does not exist"
    wait_until(lambda: re.search(said, log_of(runtime_dir / "web")), what="a line in the log")
    cron = on_host("cron", dsn=dsn, max_conn=2)
    use_all(cron, "a")
    for host in (web, cron):
        assert host.ask("get", name="x")["error"] == "PoolExhausted"
    assert agreed(dsn) == ""


def test_one_limit_that_cannot_be_shared_there_does_not_disturb_another(
    on_host: MakeHost, databases: MakeDsn
) -> None:
    dsn = databases(TENANTS[0])
    use_all(on_host("web", dsn=dsn, max_conn=1, name="shared"), "a")
    wrong = {"dsn": dsn, "max_conn": 1, "name": "wrong", "shares_database": "shares_nowhere"}
    use_all(on_host("web", **wrong), "a")
    for name in ("shared", "wrong"):
        again = on_host("cron", dsn=dsn, max_conn=1, name=name)
        assert again.ask("get", name="x")["error"] == "PoolExhausted"


def test_a_host_that_names_a_database_in_vain_shares_where_the_others_do(
    on_host: MakeHost, databases: MakeDsn
) -> None:
    dsn = databases(TENANTS[0])
    web = on_host("web", dsn=dsn, max_conn=2)
    use_all(web, "a")
    cron = on_host("cron", dsn=dsn, max_conn=2, shares_database="shares_nowhere")
    use_all(cron, "a")
    for host in (web, cron):
        assert host.ask("get", name="x")["error"] == "PoolExhausted"


def test_a_host_that_cannot_get_where_the_others_share_opens_nothing(
    on_host: MakeHost, databases: MakeDsn, server_connection: connection
) -> None:
    dsn = databases(TENANTS[0])
    use_all(on_host("web", dsn=dsn, max_conn=2, shares_database=HOME), "a")
    with server_connection.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {HOME} ALLOW_CONNECTIONS false")
        cron = on_host("cron", dsn=dsn, max_conn=2, shares_database=HOME)
        refused = cron.ask("get", name="x", timeout=3)
        assert "backend" not in refused
        assert f'database "{HOME}" is not currently accepting connections' in refused["text"]
        cursor.execute(f"ALTER DATABASE {HOME} ALLOW_CONNECTIONS true")
    wait_until(lambda: "backend" in cron.ask("get", name="y", timeout=5), 30, "the share")


def test_what_the_hosts_have_agreed_on_outlives_a_host_that_leaves(
    on_host: MakeHost, databases: MakeDsn
) -> None:
    """It never came to know it: its first sync in the pool's own database has failed."""
    dsn = databases(TENANTS[0])
    use_all(on_host("web", dsn=dsn, max_conn=1, shares_database=HOME), "a")
    with closing(psycopg2.connect(dsn)) as conn:
        me = open_table(conn, "i", "host", 15.0)
        leave(conn, me, "pool default", [])
    assert agreed(dsn) == HOME


@pytest.mark.parametrize("names", [TENANTS[0], TENANTS[1]])
def test_a_row_that_is_nonsense_is_not_followed_for_ever(
    on_host: MakeHost, databases: MakeDsn, runtime_dir: Path, names: str
) -> None:
    """It names its own database, or another one whose row names the first."""
    own = TENANTS[0]
    for database, scope, home in (
        (own, "pool default", names),
        (TENANTS[1], f"in {len(own)} {own} pool default", own),
    ):
        with closing(psycopg2.connect(databases(database))) as conn:
            create(conn)
            insert = "INSERT INTO sharedpool.limits (scope, max_conn, home) VALUES (%s, 1, %s)"
            with conn.cursor() as cursor:
                cursor.execute(insert, [scope, home])
    use_all(on_host("web", dsn=databases(own), max_conn=1), "a")
    said = f"the limit is not shared with other hosts: database {names!r} says that it is shared in"
    wait_until(lambda: f"{said} {own!r}" in log_of(runtime_dir / "web"), what="a line in the log")
