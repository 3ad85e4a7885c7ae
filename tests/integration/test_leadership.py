"""Two brokers that cannot see each other's lock file: one of them counts."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import connection, make_dsn

from sharedpool.broker.postgres.control import Control
from sharedpool.broker.postgres.leadership import Leadership
from sharedpool.cli.client import fetch_report
from sharedpool.discovery.scope import automatic_scope, scope_of
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import Worker
from tests.support.waiting import wait_until


@contextmanager
def ordinary_role(postgres: EphemeralPostgres) -> Iterator[str]:
    """Make a database that belongs to another role; yield the conninfo of one that uses it."""
    name = f"ordinary_{os.urandom(3).hex()}"
    with closing(psycopg2.connect(postgres.dsn)) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(f"CREATE ROLE {name} LOGIN")
            cursor.execute(f"CREATE DATABASE {name}")
            yield make_dsn(postgres.dsn, user=name, dbname=name)
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
            cursor.execute(f"DROP ROLE {name}")


class Candidate:
    """A broker's side of the lock; it notes what the ledger is told."""

    def __init__(self, dsn: str, instance: str, scope: str = "a scope") -> None:
        self._dsn = dsn
        self.takeover = self  # the part of the ledger that is told
        self.told: list[object] = []
        self.leadership = Leadership(
            scope,
            instance,
            lambda call: self.told.append(call(self, 0.0)),  # type: ignore[arg-type]
        )
        self.conns: list[connection] = []

    def outranked(self, now: float, why: str) -> Any:
        return "outranked"

    def leads(self, now: float, *, after_another: bool) -> Any:
        return "leads after another" if after_another else "leads"

    def connect(self) -> connection:
        conn = psycopg2.connect(self._dsn, application_name=self.leadership.application_name)
        conn.autocommit = True
        self.conns.append(conn)
        return conn

    def claim(self, conn: connection) -> str:
        return self.leadership.claim(conn, 0.0)

    def close(self) -> None:
        for conn in self.conns:
            conn.close()


@pytest.fixture
def candidates(postgres: EphemeralPostgres) -> Iterator[list[Candidate]]:
    made = [Candidate(postgres.dsn, instance) for instance in ("aaaaaaaa", "bbbbbbbb", "aaaaaaaa")]
    yield made
    for candidate in made:
        candidate.close()


def test_the_second_is_told_who_has_the_limit_and_follows_at_its_end(
    candidates: list[Candidate],
) -> None:
    first, second, _ = candidates
    held, waits = first.connect(), second.connect()
    assert first.claim(held) == ""
    assert f"backend {held.info.backend_pid} (sharedpool broker aaaaaaaa" in second.claim(waits)
    assert (
        0.5 < second.leadership.claim_at < 1.5
    )  # not at the same moments as others that wait for it
    second.claim(waits)
    held.close()
    wait_until(lambda: second.claim(waits) == "")
    assert (first.told, second.told) == (["leads"], ["outranked", "leads after another"])
    assert "sharedpool broker bbbbbbbb" in first.claim(first.connect())
    assert first.told == ["leads", "outranked"]


def test_it_is_kept_over_a_new_connection_with_no_gap(candidates: list[Candidate]) -> None:
    """A barrier makes the connection anew, as often as a worker is killed in connect()."""
    first, second, _ = candidates
    waits, old = second.connect(), first.connect()
    first.claim(old)
    for _ in range(3):
        new = first.connect()
        assert first.claim(new) == ""
        assert second.claim(waits)
        old.close()
        old = new
        assert second.claim(waits)
    assert first.told == ["leads"]


def test_a_killed_predecessors_connection_is_nobody_else(candidates: list[Candidate]) -> None:
    """Its file lock is ours, so it is dead; the server may not have noticed yet."""
    first, _, successor = candidates
    first.claim(first.connect())
    assert successor.claim(successor.connect()) == ""
    assert successor.told == ["leads"]


def test_other_scopes_are_not_in_each_others_way(postgres: EphemeralPostgres) -> None:
    with ExitStack() as stack:
        for scope in (
            scope_of("tcp://127.0.0.1:5555"),
            scope_of("tcp://127.0.0.1:5556"),
            automatic_scope("aa"),
            automatic_scope("ab"),
        ):
            candidate = Candidate(postgres.dsn, os.urandom(4).hex(), scope)
            stack.callback(candidate.close)
            assert candidate.claim(candidate.connect()) == ""


def test_where_the_server_cannot_be_asked_a_broker_begins_all_the_same(runtime_dir: Path) -> None:
    """Its workers cannot connect either, and are to hear so from the server."""
    nobody = Candidate("", "cccccccc")
    control = Control(
        f"host={runtime_dir} user=x", None, "cccccccc", lambda _: None, (), nobody.leadership
    )
    control.start()
    control.claim_leadership()
    wait_until(lambda: nobody.told == ["leads"])
    control.stop()


def log_of(directory: Path) -> str:
    return "".join(path.read_text() for path in directory.glob("sharedpool/*.log"))


def test_two_automatic_brokers_in_different_directories_never_lend_twice_the_limit(
    database: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cron job and a login: their brokers share the limit as those of two hosts do."""
    monkeypatch.setenv("SHAREDPOOL_LINGER", "0.3")
    crew = []
    with ExitStack() as stack:
        for name in ("cron", "login"):
            directory = runtime_dir / name
            directory.mkdir(mode=0o700)
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
            crew.append(stack.enter_context(Worker(dsn=database, max_conn=1)))
        cron, login = crew
        assert "backend" in cron.ask("get", name="x", timeout=20)
        assert login.ask("get", name="x")["error"] == "PoolExhausted"
        assert login.ask("get", name="x", timeout=1)["error"] == "PoolTimeout"
        cron.ask("put", name="x")
        assert "backend" in login.ask("get", name="x", timeout=20)
        login.ask("put", name="x")
        assert "backend" in cron.ask("get", name="x")  # it is idle elsewhere: no need to wait
        assert cron.end() == 0
        assert "backend" in login.ask("get", name="x", timeout=20)


@pytest.mark.long
def test_where_limits_cannot_be_shared_the_second_broker_waits_for_the_first(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The role may not make the tables."""
    monkeypatch.setenv("SHAREDPOOL_LINGER", "0.3")
    monkeypatch.setenv("SHAREDPOOL_TTL", "0.9")
    with ordinary_role(postgres) as dsn, ExitStack() as stack:
        crew = []
        for name in ("cron", "login"):
            directory = runtime_dir / name
            directory.mkdir(mode=0o700)
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
            crew.append(stack.enter_context(Worker(dsn=dsn, max_conn=1)))
            if name == "cron":
                crew[0].ask("get", name="x", timeout=20)
        cron, login = crew
        login.send("get", name="x", timeout=3)
        wait_until(
            lambda: "another broker counts to this limit: backend" in log_of(runtime_dir / "login")
        )
        (socket,) = (runtime_dir / "login" / "sharedpool").glob("auto-*.sock")
        report = fetch_report(f"ipc://{socket}")
        assert report.state == "waiting"
        assert "another broker counts to this limit: backend" in report.control
        assert login.answer()["error"] == "PoolTimeout"
        assert "may not make the tables" in log_of(runtime_dir / "cron")
        assert cron.end() == 0
        assert "backend" in login.ask("get", name="x", timeout=20)
