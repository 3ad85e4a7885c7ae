"""Connects that fail: whom it concerns is known whatever language the server speaks, and nobody
hammers it."""

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import psycopg2.extras
import pytest

import sharedpool
from sharedpool.postgres.conninfo import resolve
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.diagnosis import Diagnosis, Failure
from sharedpool.worker.connection.opening import connect
from sharedpool.worker.connection.pooled import PooledConnection
from tests.support.fixture_types import MakePool
from tests.support.processes import workers
from tests.support.refusing_server import RefusingServer, Stage
from tests.support.waiting import wait_until

GERMAN, ROLE = "de_DE", "app"


def failed(
    dsn: str, diagnosis: Diagnosis | None = None, timeout_s: float | None = None
) -> tuple[Failure, str]:
    """Connect, which is to fail; return what is known of that, and the text that a caller gets."""
    made: list[PooledConnection] = []
    with pytest.raises(psycopg2.OperationalError) as caught:
        connect(resolve(dsn), "test", timeout_s, made)
    made[0].sharedpool_direct = True  # as the broker has said
    found = (diagnosis or Diagnosis()).of(made[0], caught.value, None)
    return found, str(caught.value)


@pytest.mark.parametrize("stage", ["start", "password", "login"])
@pytest.mark.parametrize("code", ["28P01", "28000", "3D000", "42501", "53300", "57P03"])
@pytest.mark.parametrize(
    ("severity", "text", "encoding"),
    [
        ("FATAL", "password authentication failed: timeout expired", "utf-8"),
        ("ВАЖНО", "слишком много клиентов", "utf-8"),
        ("FATAL", "Passwort-Authentifizierung für Benutzer »app« fehlgeschlagen", "latin-1"),
    ],
    ids=["misleading", "russian", "latin1"],
)
def test_a_refusals_code_is_known_in_every_language_and_at_every_stage(
    stage: Stage, code: str, severity: str, text: str, encoding: str
) -> None:
    with RefusingServer(stage, code, text, severity, encoding) as server:
        found, said = failed(server.dsn)
    assert (found.code, found.unreachable, found.gone) == (code, False, True)
    assert found.error == " ".join(said.split())
    assert text.encode(encoding).decode("utf-8", "replace") in said


def test_the_reason_of_repeated_refusals_is_not_asked_for_every_time() -> None:
    diagnosis = Diagnosis()
    with RefusingServer("password", "28P01") as server:
        for _ in range(3):
            assert failed(server.dsn, diagnosis)[0].code == "28P01"
        assert server.connects == 4
    with RefusingServer("login", "53300") as server:
        for _ in range(3):
            assert (
                failed(server.dsn, diagnosis)[0].code == "53300"
            )  # that may be over at any moment
        assert server.connects == 6


def test_the_process_that_tries_a_full_server_again_tries_once() -> None:
    """The broker has said with what the server refuses everybody: a second connect would be one
    more refused one."""
    with RefusingServer("login", "53300") as server:
        made: list[PooledConnection] = []
        with pytest.raises(psycopg2.OperationalError) as caught:
            connect(resolve(server.dsn), "test", None, made)
        made[0].sharedpool_direct = True
        found = Diagnosis().of(made[0], caught.value, None, "53300")
        assert server.connects == 1
    assert (found.code, found.gone) == ("53300", True)


def test_a_server_that_is_gone_when_it_is_asked_for_the_reason_is_not_reached() -> None:
    """It was shutting down: that is everybody's affair."""
    made: list[PooledConnection] = []
    with (
        RefusingServer("start", "57P03") as server,
        pytest.raises(psycopg2.OperationalError) as caught,
    ):
        connect(resolve(server.dsn), "test", None, made)
    made[0].sharedpool_direct = True
    found = Diagnosis().of(made[0], caught.value, None)
    assert (found.code, found.unreachable, found.gone) == ("", True, True)


@pytest.mark.parametrize("stage", ["hangs up", "silent"])
def test_a_server_that_says_nothing_is_not_reached(stage: Stage) -> None:
    with RefusingServer(stage) as server:
        found, _ = failed(server.dsn, timeout_s=1.0)
    assert (found.unreachable, found.code) == (True, "")
    assert found.gone is (stage == "hangs up")


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_where_nobody_listens_nothing_is_reached(tmp_path: Path) -> None:
    for dsn in (
        f"host=127.0.0.1 port={unused_port()} user=app",
        f"host={tmp_path} port=5432 user=app",
    ):
        assert failed(dsn)[0][2:4] == ("", True), dsn


def test_a_refusal_of_libpqs_own_concerns_no_other_process(postgres: EphemeralPostgres) -> None:
    with RefusingServer("start", "53300") as server:  # it knows no TLS
        for dsn in (f"{postgres.dsn} sslmode=no-such-mode", f"{server.dsn} sslmode=require"):
            found, _ = failed(dsn)
            assert (found.unreachable, found.code) == (False, ""), dsn
    assert not failed("host=no..such..host user=app")[0].unreachable


def test_a_probe_for_the_reason_that_succeeds_leaves_no_backend(
    postgres: EphemeralPostgres, server_connection: psycopg2.extensions.connection
) -> None:
    with server_connection.cursor() as cursor:
        cursor.execute("CREATE ROLE hesitant NOLOGIN")
        made: list[PooledConnection] = []
        with pytest.raises(psycopg2.OperationalError) as caught:
            connect(resolve(postgres.dsn, user="hesitant"), "test", None, made)
        cursor.execute("ALTER ROLE hesitant LOGIN")
        found = Diagnosis().of(made[0], caught.value, None)
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'hesitant'")
        assert cursor.fetchone() == (0,)
        cursor.execute("DROP ROLE hesitant")
    assert found[:1] + found[2:4] == (True, "", False)


# --- a fleet


@pytest.mark.long_variants
@pytest.mark.parametrize(
    ("stage", "code"), [("password", "28P01"), ("login", "28000"), ("start", "28000")]
)
def test_a_fleet_that_is_refused_does_not_hammer_the_server_and_each_caller_is_told_at_once(
    broker: sharedpool.Broker, stage: Stage, code: str
) -> None:
    seconds, crew_size, text = 3.0, 4, "Rolle »app« hat keine Berechtigung zum Einloggen"
    with RefusingServer(stage, code, text) as server:
        settings = {
            "dsn": server.dsn,
            "broker": broker.address,
            "max_conn": 4,
            "name": f"refused {stage}",
        }
        with workers(crew_size, **settings) as crew:
            for worker in crew:
                worker.send("insist", seconds=seconds, timeout=2)
            answers = [worker.answer() for worker in crew]
        # Each once, and once more for the code; once for a new password; then by turns, or each
        # less and less often.
        assert server.connects <= crew_size * (3 + 3)
    for answer in answers:
        assert set(answer["outcomes"]) <= {"OperationalError", "ConnectRefused"}
        assert answer["outcomes"]["ConnectRefused"] > 20
        assert all(text in said for said in answer["texts"].values())
        assert "the next try is in" in answer["texts"]["ConnectRefused"]
        assert answer["longest"] < 1.0
        assert "zsecret" not in str(answers)


@pytest.fixture(scope="module")
def german() -> Iterator[EphemeralPostgres]:
    """A server that speaks German."""
    known = subprocess.run(
        ["locale", "-a"], capture_output=True, text=True, check=True
    ).stdout.split()
    if (
        locale := next(
            (name for name in known if name.lower() in ("de_de.utf8", "de_de.utf-8")), None
        )
    ) is None:
        pytest.skip(
            "the system has no locale de_DE.UTF-8 (localedef -i de_DE -f UTF-8 de_DE.UTF-8)"
        )
    with EphemeralPostgres(tcp=True, password="zroot", settings={"lc_messages": locale}) as server:
        with contextlib.closing(psycopg2.connect(server.dsn)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                cursor.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD 'zright'")
                try:
                    cursor.execute("SELECT 1 FROM no_such_table")
                except psycopg2.ProgrammingError as error:
                    if "existiert nicht" not in str(error):
                        pytest.skip("this PostgreSQL has no German translation")
        yield server


def as_app(server: EphemeralPostgres, password: str) -> dict[str, Any]:
    return {
        "host": server.host,
        "port": server.port,
        "user": ROLE,
        "dbname": "postgres",
        "password": password,
    }


def test_one_worker_with_an_old_password_does_not_disturb_the_others_of_a_german_server(
    german: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    common = {"broker": broker.address, "max_conn": 3, "name": "german", "disable_pooling": True}
    with (
        workers(2, **common, **as_app(german, "zright")) as good,
        workers(1, **common, **as_app(german, "zold")) as bad,
    ):
        crew = [*bad, *good]
        for worker in crew:
            worker.send("insist", seconds=3, timeout=2)
        refused, *others = [worker.answer() for worker in crew]
    for answer in others:
        assert set(answer["outcomes"]) == {"done"}, answer
    assert set(refused["outcomes"]) == {"OperationalError", "ConnectRefused"}
    assert refused["outcomes"]["OperationalError"] <= 5
    assert "fehlgeschlagen" in refused["texts"]["ConnectRefused"]


def test_a_full_german_server_makes_everybody_keep_to_what_there_is(
    german: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    with contextlib.closing(psycopg2.connect(german.dsn)) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT 2")
        settings = {
            "broker": broker.address,
            "max_conn": 4,
            "name": "full",
            **as_app(german, "zright"),
        }
        with workers(4, **settings) as crew:
            for worker in crew:
                worker.send("insist", seconds=3, timeout=2)
            answers = [worker.answer() for worker in crew]
        with conn.cursor() as cursor:
            cursor.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")
    assert all(answer["outcomes"].get("done", 0) > 20 for answer in answers), answers
    assert sum(answer["outcomes"].get("OperationalError", 0) for answer in answers) <= 8
    assert not any("ConnectRefused" in answer["outcomes"] for answer in answers)


# --- a server that accepts and is silent


@pytest.fixture
def wait_callback() -> Iterator[None]:
    """psycopg2 waits by a callback, in the whole process: Ctrl-C ends long queries then."""
    psycopg2.extensions.set_wait_callback(psycopg2.extras.wait_select)
    yield
    psycopg2.extensions.set_wait_callback(None)


@pytest.mark.parametrize("settings", [{}, {"connect_timeout": 10}], ids=["default", "explicit"])
def test_the_callers_limit_holds_with_a_wait_callback_that_knows_none(
    wait_callback: None, make_pool: MakePool, settings: dict[str, Any]
) -> None:
    with RefusingServer("silent") as server:
        pool = make_pool(dsn=server.dsn, max_conn=1, **settings)
        began = time.monotonic()
        with pytest.raises(
            psycopg2.OperationalError, match=rf"127\.0\.0\.1.*{server.port}.*did not answer"
        ):
            pool.get_conn(timeout=1.2)
        assert 1.0 < time.monotonic() - began < 1.2 + 0.8


def test_with_a_wait_callback_a_pool_works_as_ever(
    wait_callback: None, make_pool: MakePool
) -> None:
    pool = make_pool(max_conn=1)
    with pool.connection(timeout=10) as conn, conn.cursor() as cursor:
        assert "poll" not in vars(conn)
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)


def refusal_by_broker(pool: sharedpool.Pool) -> sharedpool.PoolError | None:
    """Ask for a connection; return the error if it is by the broker, which may yet have to start.

    A broker that is late is not waited for: then the process refuses by itself.
    """
    with pytest.raises(sharedpool.PoolError) as raised:
        pool.get_conn(timeout=0.5)
    return raised.value if "waited" in str(raised.value) else None


def test_a_thread_that_waits_for_a_broker_without_a_server_is_told_which_server(
    runtime_dir: Path,
) -> None:
    with RefusingServer("silent") as server:
        pool = sharedpool.config_pool(dsn=server.dsn, max_conn=2, name=f"silent {os.getpid()}")
        try:
            error = wait_until(lambda: refusal_by_broker(pool), 60, "the broker's own refusal")
        finally:
            pool.release_all()
    assert isinstance(error, sharedpool.PoolTimeout)
    assert re.search(rf"waited 0\.5 s.*app@127\.0\.0\.1:{server.port}/app", str(error))
