"""Several hosts with one limit, each of them a runtime directory with a broker of its own.

`tests/hosts` has the real ones, with networks and processes that fail.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2 import errors
from psycopg2.extensions import connection, make_dsn, parse_dsn

from sharedpool.broker.core import sharing
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.integration.several_hosts import MakeHost, log_of, on_host
from tests.support.broker_thread import server_in_a_thread
from tests.support.commands import sharedpool_command
from tests.support.processes import Worker
from tests.support.sql import ask
from tests.support.waiting import wait_until

__all__ = ["on_host"]  # pytest finds it here


def broker_pid(runtime_dir: Path, host: str) -> int:
    (path,) = (runtime_dir / host / "sharedpool").glob("*.sock")
    return fetch_report(f"ipc://{path}").pid


def command(runtime_dir: Path, host: str, *arguments: str) -> str:
    """Run an operator's command on a host; return what it prints."""
    done = sharedpool_command(
        *arguments, env=os.environ | {"XDG_RUNTIME_DIR": str(runtime_dir / host)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- one limit


def test_hosts_use_no_more_than_the_limit_and_all_of_it(on_host: MakeHost) -> None:
    web, cron = on_host("web", max_conn=3), on_host("cron", max_conn=3)
    for name in "abc":
        assert "backend" in web.ask("get", name=name, timeout=20)
    refused = cron.ask("get", name="x")
    assert refused["error"] == "PoolExhausted"
    assert "host " in refused["text"]  # and how many it holds
    for name in "abc":
        web.ask("put", name=name)
    for name in "abc":  # idle on the other host: no need to wait
        assert "backend" in cron.ask("get", name=name)
    assert web.ask("get", name="x")["error"] == "PoolExhausted"


def test_who_waits_gets_what_another_host_returns(on_host: MakeHost) -> None:
    web, cron = on_host("web", max_conn=1), on_host("cron", max_conn=1)
    web.ask("get", name="x", timeout=20)
    cron.send("get", name="x", timeout=20)
    assert "backend" not in web.ask("get", name="y")
    web.ask("put", name="x")
    assert "backend" in cron.answer()


def test_the_limit_is_that_of_the_first_host(on_host: MakeHost, runtime_dir: Path) -> None:
    web, cron = on_host("web", max_conn=1), on_host("cron", max_conn=5)
    web.ask("get", name="x", timeout=20)
    assert cron.ask("get", name="x")["error"] == "PoolExhausted"
    wait_until(
        lambda: (
            "its limit is 1 for all hosts, not the 5 that are asked for here"
            in log_of(runtime_dir / "cron")
        )
    )


def test_a_restart_of_the_server_needs_nobody(on_host: MakeHost) -> None:
    with EphemeralPostgres() as server:
        web = on_host("web", max_conn=2, dsn=server.dsn)
        cron = on_host("cron", max_conn=2, dsn=server.dsn)
        for host in (web, cron):
            assert "backend" in host.ask("get", name="x", timeout=20)
            host.ask("put", name="x")
        server.restart()
        for host in (web, cron):
            assert "backend" in host.ask("get", name="x", timeout=20)
        assert web.ask("get", name="y", timeout=1)["error"] == "PoolTimeout"
        cron.ask("put", name="x")
        assert "backend" in web.ask("get", name="y", timeout=20)


def test_a_host_that_comes_after_a_crash_waits_for_those_that_were_there(
    on_host: MakeHost, runtime_dir: Path
) -> None:
    """Workers of a host whose broker has died with the server may still have grants of before."""
    with EphemeralPostgres() as server:
        web = on_host("web", max_conn=2, dsn=server.dsn)
        assert "backend" in web.ask("get", name="x", timeout=20)
        cron = on_host("cron", max_conn=2, dsn=server.dsn)
        assert "backend" in cron.ask("get", name="x", timeout=20)
        for host in ("web", "cron"):
            os.kill(broker_pid(runtime_dir, host), signal.SIGKILL)
        server.kill()
        for worker in (web, cron):
            worker.kill()
        server.restart("immediate")
        new = on_host("new", max_conn=2, dsn=server.dsn)

        def answer_of_its_broker() -> str | None:
            """Return its answer, once it has started: that takes a while where much else runs."""
            text: str = new.ask("get", name="x", timeout=0.5).get("text", "granted")
            starts = "did not answer" in text or "has not answered its first connect" in text
            return None if starts else text

        assert "shares were lost with the server" in wait_until(answer_of_its_broker, 20)
        back = [on_host(host, max_conn=2, dsn=server.dsn) for host in ("web", "cron")]
        for worker in back:
            worker.send("get", name="x", timeout=20)
        for worker in back:
            assert "backend" in worker.answer()


def test_a_share_that_nobody_uses_is_given_back(
    on_host: MakeHost, database: str, server_connection: connection
) -> None:
    web = on_host("web", max_conn=2)
    web.ask("get", name="x", timeout=20)
    web.ask("put", name="x", close=True)
    with closing(psycopg2.connect(database)) as conn:
        conn.autocommit = True
        wait_until(lambda: ask(conn, "SELECT count(*) FROM sharedpool.shares") == 0)
        assert ask(conn, "SELECT count(*) FROM sharedpool.limits") == 0
    wait_until(
        lambda: (
            ask(
                server_connection,
                "SELECT count(*) FROM pg_stat_activity WHERE datname = %s",
                parse_dsn(database)["dbname"],
            )
            == 0
        ),
        what="the database to be free",
    )
    assert "backend" in web.ask("get", name="x", timeout=20)


# --- operators


def test_status_tells_of_the_other_hosts(on_host: MakeHost, runtime_dir: Path) -> None:
    web, cron = on_host("web", max_conn=3), on_host("cron", max_conn=3)
    for host in (web, cron):
        host.ask("get", name="x", timeout=20)

    def shares() -> list[str]:
        lines = command(runtime_dir, "web", "status").partition("HOST")[2].splitlines()[1:3]
        (this, own), (_, theirs) = (line.split("default", 1) for line in lines)
        assert this.strip() == "this one"
        return [own.split()[0], theirs.split()[0]]

    wait_until(lambda: sum(map(int, shares())) == 3)
    assert (
        "other hosts share the limit"
        in sharedpool_command(
            "who", env=os.environ | {"XDG_RUNTIME_DIR": str(runtime_dir / "web")}
        ).stderr
    )


def test_all_hosts_are_paused_and_go_on(on_host: MakeHost, runtime_dir: Path) -> None:
    web, cron = on_host("web", max_conn=2), on_host("cron", max_conn=2)
    for host in (web, cron):
        host.ask("get", name="x", timeout=20)
        host.ask("put", name="x")
    command(runtime_dir, "web", "pause", "--all-hosts", "--wait", "--timeout", "20")
    assert "is paused" in cron.ask("get", name="x")["text"]
    cron.send("get", name="x", timeout=20)
    done = sharedpool_command(
        "resume", env=os.environ | {"XDG_RUNTIME_DIR": str(runtime_dir / "cron")}
    )
    assert "--all-hosts" in done.stderr
    command(runtime_dir, "cron", "resume", "--all-hosts")
    assert "backend" in cron.answer()
    assert "backend" in web.ask("get", name="x", timeout=20)


def test_a_limit_is_set_for_all_hosts(on_host: MakeHost, runtime_dir: Path) -> None:
    web, cron = on_host("web", max_conn=1), on_host("cron", max_conn=1)
    web.ask("get", name="x", timeout=20)
    assert cron.ask("get", name="x")["error"] == "PoolExhausted"
    command(runtime_dir, "cron", "set", "max-conn", "2", "--pool", "default", "--all-hosts")
    assert "backend" in cron.ask("get", name="x", timeout=20)
    assert web.ask("get", name="y")["error"] == "PoolExhausted"


# --- rights, and what others can do


@pytest.fixture
def ordinary(postgres: EphemeralPostgres, server_connection: connection) -> Iterator[str]:
    """The conninfo string of a role that may make nothing in its database."""
    name = f"ordinary_{os.urandom(3).hex()}"
    with server_connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {name} LOGIN")
        cursor.execute(f"CREATE DATABASE {name}")
        yield make_dsn(postgres.dsn, user=name, dbname=name)
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
        cursor.execute(f"DROP ROLE {name}")


def test_an_administrator_makes_the_tables(
    ordinary: str,
    postgres: EphemeralPostgres,
    runtime_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sharing, "_RETRY_UNSHARED_S", 0.2)
    address, name = f"ipc://{runtime_dir}/b.sock", parse_dsn(ordinary)["dbname"]
    settings: dict[str, Any] = {"dsn": ordinary, "broker": address, "max_conn": 1}
    with server_in_a_thread(address, max_conn=1, dsn=ordinary), Worker(**settings) as worker:
        assert "backend" in worker.ask("get", name="x", timeout=20)
        assert "may not make the tables" in caplog.text
        (own,) = fetch_report(address).hosts
        assert "not shared with other hosts" in own.trouble
        done = sharedpool_command("init-db", "--dsn", make_dsn(postgres.dsn, dbname=name))
        assert done.returncode == 0, done.stderr
        wait_until(lambda: not fetch_report(address).hosts, what="the limit to be shared")
        with closing(psycopg2.connect(ordinary)) as conn:
            assert ask(conn, "SELECT scope FROM sharedpool.shares") == f"broker {address}"
            assert ask(conn, "SELECT held FROM sharedpool.shares") == 1


def test_the_sql_that_is_printed_is_what_is_run(ordinary: str, postgres: EphemeralPostgres) -> None:
    printed = sharedpool_command("init-db", "--print").stdout
    with closing(
        psycopg2.connect(make_dsn(postgres.dsn, dbname=parse_dsn(ordinary)["dbname"]))
    ) as conn:
        conn.autocommit = True
        for _ in range(2):
            with conn.cursor() as cursor:
                cursor.execute(printed)


def test_another_role_neither_sees_nor_changes_a_share(
    on_host: MakeHost, database: str, server_connection: connection
) -> None:
    web = on_host("web", max_conn=2)
    web.ask("get", name="x", timeout=20)
    other = f"other_{os.urandom(3).hex()}"
    with server_connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {other} LOGIN")
    try:
        with closing(psycopg2.connect(make_dsn(database, user=other))) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                for table in ("limits", "shares"):
                    cursor.execute(f"SELECT * FROM sharedpool.{table} FOR UPDATE")
                    assert cursor.fetchall() == []
                    cursor.execute(f"DELETE FROM sharedpool.{table}")
                    assert cursor.rowcount == 0
                cursor.execute("UPDATE sharedpool.limits SET max_conn = 1000")
                assert cursor.rowcount == 0
                theirs = parse_dsn(database)["user"]
                with pytest.raises(errors.InsufficientPrivilege):
                    cursor.execute(
                        "INSERT INTO sharedpool.limits (role, scope, max_conn) VALUES (%s, 'x', 1)",
                        [theirs],
                    )
                for statement in ("TRUNCATE sharedpool.shares", "DROP TABLE sharedpool.shares"):
                    with pytest.raises(errors.InsufficientPrivilege):
                        cursor.execute(statement)
    finally:
        with server_connection.cursor() as cursor:
            cursor.execute(f"DROP ROLE {other}")


@pytest.mark.long
def test_rows_that_are_nonsense_disturb_nobody(on_host: MakeHost, database: str) -> None:
    web = on_host("web", max_conn=2)
    web.ask("get", name="x", timeout=20)
    with closing(psycopg2.connect(database)) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(
                "INSERT INTO sharedpool.shares (scope, instance, host, pid, started_us, held,"
                " wanted, answered, spare, unnamed) SELECT scope, 'a b|c', E'\\x1b[31m', -1, -1,"
                " 2147483647, 2147483647, -9, -5, 'x:y 7 :: 1:2:3' FROM sharedpool.limits"
            )
            cursor.execute("SELECT pg_notify('sharedpool_shares', repeat('|*', 3000))")
            cursor.execute("SELECT pg_notify('sharedpool_shares', '')")
        web.send("get", name="y", timeout=20)
        assert "backend" in web.answer(), "the host of that row has nothing on the server"
        wait_until(lambda: ask(conn, "SELECT count(*) FROM sharedpool.shares") == 1)


def test_defaults_of_a_role_do_not_matter(
    on_host: MakeHost, database: str, server_connection: connection
) -> None:
    """Its transactions are serializable and read only, and its statements must be fast."""
    name = f"strict_{os.urandom(3).hex()}"
    with server_connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {name} LOGIN")
        cursor.execute(f"GRANT CREATE ON DATABASE {parse_dsn(database)['dbname']} TO {name}")
        for setting in ("default_transaction_isolation = serializable", "lock_timeout = '1ms'"):
            cursor.execute(f"ALTER ROLE {name} SET {setting}")
        cursor.execute(f"ALTER ROLE {name} SET default_transaction_read_only = on")
    try:
        dsn = make_dsn(database, user=name)
        web, cron = on_host("web", max_conn=1, dsn=dsn), on_host("cron", max_conn=1, dsn=dsn)
        assert "backend" in web.ask("get", name="x", timeout=20)
        assert cron.ask("get", name="x")["error"] == "PoolExhausted"
        web.ask("put", name="x")
        assert "backend" in cron.ask("get", name="x", timeout=20)
    finally:
        with closing(psycopg2.connect(database)) as conn, conn.cursor() as cursor:
            cursor.execute(f"DROP OWNED BY {name} CASCADE")
            cursor.execute(f"DROP ROLE {name}")
            conn.commit()
