"""Passwords that change: a function is asked at every connect, and `sharedpool reconnect` moves the
fleet."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.commands import address_of, sharedpool_command, start
from tests.support.fixture_types import MakePool
from tests.support.processes import Worker, workers
from tests.support.waiting import wait_until

OLD, NEW = "zold-secret", "znew-secret"


@pytest.fixture(scope="module")
def scram() -> Iterator[EphemeralPostgres]:
    """A server to which everybody logs in by SCRAM, over TCP."""
    with EphemeralPostgres(tcp=True, password="zroot-secret") as server:
        run_on(server, "CREATE ROLE app LOGIN")
        yield server


@pytest.fixture
def secret(scram: EphemeralPostgres, tmp_path: Path) -> Path:
    """The file in which the application finds its password."""
    path = tmp_path / "password"
    rotate(scram, path, OLD)
    return path


def run_on(server: EphemeralPostgres, sql: str) -> list[Any]:
    with contextlib.closing(psycopg2.connect(server.dsn)) as conn, conn, conn.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


def rotate(server: EphemeralPostgres, path: Path, password: str) -> None:
    run_on(server, f"ALTER ROLE app PASSWORD '{password}'")
    fresh = path.with_suffix(".new")
    fresh.write_text(password)
    fresh.replace(path)


def as_app(server: EphemeralPostgres) -> dict[str, Any]:
    return {"host": server.host, "port": server.port, "user": "app", "dbname": "postgres"}


@pytest.mark.long
def test_the_fleet_moves_to_a_new_password_without_an_error(
    scram: EphemeralPostgres, secret: Path, runtime_dir: Path
) -> None:
    ages = (
        "SELECT count(*) FILTER (WHERE backend_start < '{}'), count(*) FROM pg_stat_activity"
        " WHERE usename = 'app'"
    )
    with start("broker", "--max-conn", "3", "--dsn", scram.dsn) as process:
        address = address_of(process)
        settings = as_app(scram) | {
            "broker": address,
            "max_conn": 3,
            "threads": True,
            "password_file": str(secret),
        }
        with workers(3, **settings) as crew:
            for worker in crew:
                worker.ask("get", name="first", timeout=10)
            for worker in crew:
                worker.ask("put", name="first")
                worker.send("hammer", seconds=4, threads=1, timeout=10)
            rotate(scram, secret, NEW)
            ((rotated,),) = run_on(scram, "SELECT clock_timestamp()")
            assert run_on(scram, ages.format(rotated)) == [(3, 3)]
            with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
                psycopg2.connect(**as_app(scram), password=OLD)
            done = sharedpool_command("reconnect", "--broker", address)
            assert done.returncode == 0
            assert "pool 'default': generation 2: 3 connections are replaced" in done.stdout
            wait_until(
                lambda: run_on(scram, ages.format(rotated))[0][0] == 0,
                what="every old connection to go",
            )
            for worker in crew:
                outcome = worker.answer()
                assert outcome["errors"] == []
                assert outcome["done"] > 10
            for worker in crew:
                assert "backend" in worker.ask("get", name="last", timeout=10)
            assert run_on(scram, ages.format(rotated)) == [(0, 3)]
            seen = str(
                [
                    sharedpool_command(name, "--json", "--broker", address).stdout
                    for name in ("who", "status")
                ]
            )
        process.terminate()
        _, log = process.communicate()
    assert "generation 2" in log
    assert "secret" not in log + seen


@pytest.mark.long
def test_a_connect_in_the_gap_fails_by_itself_and_leaks_nothing(
    scram: EphemeralPostgres, secret: Path, runtime_dir: Path
) -> None:
    """Between ALTER ROLE and the new password's arrival a new connection cannot be had; the next
    try can."""
    with start("broker", "--max-conn", "1", "--dsn", scram.dsn) as process:
        address = address_of(process)
        with Worker(
            **as_app(scram), broker=address, max_conn=1, password_file=str(secret)
        ) as worker:
            run_on(scram, f"ALTER ROLE app PASSWORD '{NEW}'")
            refused = worker.ask("get", name="x", timeout=10)
            assert refused["error"] == "OperationalError"
            assert "password authentication failed" in refused["text"]
            assert "secret" not in refused["text"]
            rotate(scram, secret, NEW)
            assert "backend" in worker.ask("get", name="x", timeout=10)
        process.terminate()
        process.communicate()


def test_the_automatic_broker_is_one_whatever_the_password_is(
    scram: EphemeralPostgres, secret: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDPOOL_LINGER", "0.5")
    settings = as_app(scram) | {"max_conn": 1, "password_file": str(secret)}
    with Worker(**settings) as one:
        one.ask("get", name="x", timeout=20)
        rotate(scram, secret, NEW)
        with Worker(**settings) as other:
            assert other.ask("get", name="x")["error"] == "PoolExhausted"
            assert sharedpool_command("status").stdout.count("broker ") == 1
            one.ask("put", name="x", close=True)
            assert "backend" in other.ask("get", name="x", timeout=10)  # with the new one
    for log in (runtime_dir / "sharedpool").glob("*.log"):
        assert "secret" not in log.read_text()


def test_an_automatic_broker_that_cannot_be_given_a_password_is_not_started(
    runtime_dir: Path, postgres: EphemeralPostgres
) -> None:
    def ask() -> str:
        raise KeyError("the vault is sealed")

    pool = sharedpool.config_pool(dsn=postgres.dsn, password=ask)
    with pytest.raises(
        sharedpool.BrokerUnavailable, match=r"was not started: KeyError: 'the vault is sealed'"
    ):
        pool.get_conn(timeout=5)
    pool.release_all()
    assert not list((runtime_dir / "sharedpool").glob("*.sock"))


# --- the function


def test_it_is_asked_at_every_connect_and_its_errors_reach_the_caller(make_pool: MakePool) -> None:
    calls = []

    def ask() -> str:
        calls.append(threading.get_ident())
        if len(calls) == 2:
            raise KeyError("the vault is sealed")
        return "unused: the server trusts us"

    pool = make_pool(password=ask, max_conn=1)
    assert calls == []
    pool.put_conn(pool.get_conn(timeout=10), close=True)
    with pytest.raises(KeyError, match="sealed"):
        pool.get_conn(timeout=10)
    pool.put_conn(pool.get_conn())  # the slot is free
    pool.put_conn(pool.get_conn())  # idle: nothing to connect
    assert calls == [threading.get_ident()] * 3


def test_a_dsn_may_be_one_too(make_pool: MakePool, postgres: EphemeralPostgres) -> None:
    names = iter(["configured", "first", "second"])
    pool = make_pool(dsn=lambda: make_dsn(postgres.dsn, application_name=next(names)), max_conn=1)
    for expected in ("first", "second"):
        conn = pool.get_conn(timeout=10)
        with conn.cursor() as cursor:
            cursor.execute("SHOW application_name")
            assert cursor.fetchone() == (expected,)
        pool.put_conn(conn, close=True)


def test_while_it_is_asked_nobody_else_waits(make_pool: MakePool) -> None:
    """It may go to another host for the password: not under the pool's lock."""
    asked, answer = threading.Event(), threading.Event()
    answer.set()

    def ask() -> str:
        asked.set()
        assert answer.wait(20)
        return "unused"

    pool = make_pool(password=ask, max_conn=2, pool_manager=sharedpool.ThreadedConnectionPool)
    first = pool.get_conn(timeout=10)
    asked.clear()
    answer.clear()
    connecting = threading.Thread(target=lambda: pool.put_conn(pool.get_conn(timeout=10)))
    connecting.start()
    assert asked.wait(10)
    for _ in range(3):
        pool.put_conn(first)
        assert pool.stats().in_use == 1  # the one that is being connected
        first = pool.get_conn()
    answer.set()
    connecting.join()
    pool.put_conn(first)


# --- sharedpool reconnect


def test_reconnect_replaces_what_is_idle_at_once_and_what_is_in_use_at_its_checkin(
    postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    with (
        Worker(dsn=postgres.dsn, broker=broker.address, name="renewed") as worker,
        Worker(dsn=postgres.dsn, broker=broker.address, name="kept") as other,
    ):
        for each in (worker, other):
            each.ask("get", name="busy", timeout=10)
            each.ask("get", name="idle", timeout=10)
            each.ask("put", name="idle")
        done = sharedpool_command("reconnect", "--pool", "renewed", "--broker", broker.address)
        assert done.stdout == (
            "pool 'renewed': generation 2: 2 connections are replaced at their next checkout or "
            "checkin\n"
        )
        wait_until(lambda: worker.ask("stats")["idle"] == 0)
        before = worker.ask("query", name="busy", sql="SELECT pg_backend_pid()")["rows"][0][
            0
        ]  # it goes on
        worker.ask("put", name="busy")
        assert worker.ask("get", name="busy", timeout=10)["backend"] != before
        assert other.ask("stats")["idle"] == 1


@pytest.mark.long
def test_reconnect_says_when_there_is_no_such_pool_or_broker(
    postgres: EphemeralPostgres, broker: sharedpool.Broker, runtime_dir: Path
) -> None:
    environment = os.environ | {"SHAREDPOOL_BROKER": broker.address}
    with Worker(dsn=postgres.dsn, broker=broker.address, name="there") as worker:
        worker.ask("get", name="x", timeout=10)
        done = sharedpool_command("reconnect", "--pool", "nobody's", env=environment)
        assert done.returncode == 1
        assert 'no pool "nobody\'s" at this broker; there are:' in done.stderr
        assert "'there'" in done.stderr
    done = sharedpool_command("reconnect")
    assert done.returncode == 3
    assert "no broker is running" in done.stderr
