"""A live connection moves from one process to another: nothing of its session does, and what cannot
be reset is closed."""

import subprocess
import sys
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.handover import SUPPORTED
from tests.support.pool_pair import MakePair, moved
from tests.support.sql import ask

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)


def test_nothing_of_one_users_session_reaches_the_next(pair: MakePair) -> None:
    a, b = pair()

    def use(conn: extensions.connection) -> None:
        conn.autocommit = True
        conn.cursor_factory = psycopg2.extras.DictCursor
        with conn.cursor() as cursor:
            cursor.execute(
                "SET search_path TO nowhere; SET TIME ZONE 'Asia/Tokyo'; SET application_name TO "
                "'mine'"
            )
            cursor.execute(
                "CREATE TEMP TABLE left_over (n int); PREPARE mine AS SELECT 1; SELECT "
                "pg_advisory_lock(42)"
            )
            cursor.execute("LISTEN news; NOTIFY news; DO $$ BEGIN RAISE NOTICE 'said'; END $$")
        psycopg2.extras.register_default_json(conn, loads=lambda text: "the giver's")
        conn.commit()

    conn = moved(a, b, use)
    assert not conn.autocommit
    assert conn.cursor_factory is None
    assert (conn.notices, conn.notifies) == ([], [])
    assert ask(conn, "SHOW search_path") == '"$user", public'
    assert ask(conn, "SHOW TimeZone") == conn.get_parameter_status("TimeZone") != "Asia/Tokyo"
    assert (
        ask(conn, "SHOW application_name")
        == conn.get_parameter_status("application_name")
        != "mine"
    )
    assert ask(conn, "SELECT to_regclass('left_over')") is None
    assert ask(conn, "SELECT count(*) FROM pg_prepared_statements") == 0
    assert (
        ask(
            conn,
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        )
        == 0
    )
    assert ask(conn, "SELECT count(*) FROM pg_listening_channels()") == 0
    assert ask(conn, """SELECT '{"a": 1}'::json""") == {"a": 1}


_SIGPIPE = """
import signal, sys
import psycopg2
from sharedpool.descriptors.readable import readable
from sharedpool.worker.connection import reset

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
conn, other = (psycopg2.connect(sys.argv[1]) for _ in range(2))
other.cursor().execute("SELECT pg_terminate_backend(%s, 5000)", [conn.info.backend_pid])
readable([conn], 5)
print(reset.send(conn.fileno(), b"DISCARD ALL"))
"""


def test_a_program_that_does_not_ignore_sigpipe_outlives_a_backend_that_is_reset(
    postgres: EphemeralPostgres,
) -> None:
    command = [sys.executable, "-c", _SIGPIPE, postgres.dsn]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@pytest.mark.parametrize(("length", "moves"), [(1500, True), (4000, False)])
def test_a_connection_with_too_much_to_say_of_itself_is_closed_instead(
    pair: MakePair, postgres: EphemeralPostgres, length: int, moves: bool
) -> None:
    a, b = pair(dsn=f"{postgres.dsn} options='-c search_path={'x' * length}'")
    before = b.stats()
    a.put_conn(a.get_conn())
    assert ask(b.get_conn(), "SELECT length(current_setting('search_path'))") == length
    after = b.stats()
    assert (after.adopted - before.adopted, after.connects - before.connects) == (
        int(moves),
        int(not moves),
    )


@pytest.mark.parametrize("end", ["nothing", "an error", "COMMIT as SQL"])
def test_no_half_transaction_is_committed(
    pair: MakePair, end: str, database: str, broker: sharedpool.Broker
) -> None:
    a, b = pair()
    conn = a.get_conn()
    ask(conn, "CREATE TABLE IF NOT EXISTS halves (n int); SELECT 1")
    conn.commit()
    a.put_conn(conn)

    def use(conn: extensions.connection) -> None:
        conn.cursor().execute("INSERT INTO halves VALUES (1)")
        if end == "an error":
            with pytest.raises(psycopg2.Error):
                conn.cursor().execute("SELECT 1/0")
        elif end == "COMMIT as SQL":
            conn.cursor().execute("ROLLBACK")

    conn = moved(a, b, use)
    assert conn.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE
    assert ask(conn, "SELECT count(*) FROM halves") == 0
    conn.cursor().execute("INSERT INTO halves VALUES (2)")
    conn.rollback()
    assert ask(conn, "SELECT count(*) FROM halves") == 0
    ask(conn, "DROP TABLE halves; SELECT 1")
    conn.commit()


def test_a_connection_whose_encoding_has_changed_does_not_move(pair: MakePair) -> None:
    """psycopg2 chose its codec by it, and here it is not what was reset."""
    a, b = pair(reset="rollback")
    conn = a.get_conn()
    pid = conn.info.backend_pid
    conn.cursor().execute("SET client_encoding TO 'LATIN1'")
    conn.commit()
    a.put_conn(conn)
    got = b.get_conn()
    assert got.info.backend_pid != pid
    assert (got.encoding, ask(got, "SELECT %s", "ä")) == ("UTF8", "ä")


@pytest.mark.parametrize("reset", ["rollback", lambda conn: None], ids=["rollback", "a function"])
def test_without_discard_settings_move_along_but_no_listening(pair: MakePair, reset: Any) -> None:
    a, b = pair(reset=reset)

    def use(conn: extensions.connection) -> None:
        conn.cursor().execute("SET statement_timeout TO '9s'; LISTEN news")
        conn.commit()

    conn = moved(a, b, use)
    assert ask(conn, "SHOW statement_timeout") == "9s"
    assert ask(conn, "SELECT count(*) FROM pg_listening_channels()") == 0
