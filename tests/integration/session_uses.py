"""What users do to a connection, of which its next user must not see anything."""

import io
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import extensions


class Collector:
    """What psycopg2 takes for `notices` and `notifies`: it has `append`."""

    def append(self, what: object) -> None:
        pass


def execute(conn: extensions.connection, sql: str) -> None:
    with conn.cursor() as cursor:
        cursor.execute(sql)
    conn.commit()


def enter_and_stay(conn: extensions.connection) -> None:
    conn.__enter__()


def set_codec(conn: extensions.connection) -> None:
    conn.set_client_encoding("LATIN1")


def set_codec_and_restore_it_as_sql(conn: extensions.connection) -> None:
    conn.set_client_encoding("LATIN1")
    execute(conn, "SET client_encoding TO 'UTF8'")


def set_encoding_as_sql(conn: extensions.connection) -> None:
    execute(conn, "SET client_encoding TO 'LATIN1'")


def set_session(conn: extensions.connection) -> None:
    conn.set_session("SERIALIZABLE", True, True)


def set_session_and_autocommit(conn: extensions.connection) -> None:
    conn.set_session("REPEATABLE READ", True, True, True)


def set_characteristics(conn: extensions.connection) -> None:
    conn.isolation_level, conn.readonly, conn.deferrable = 3, True, True


def set_cursor_factory(conn: extensions.connection) -> None:
    conn.cursor_factory = psycopg2.extras.NamedTupleCursor


def register_types(conn: extensions.connection) -> None:
    for value in (extensions.DECIMAL, extensions.UNICODE, extensions.PYDATE):
        kind = extensions.new_type(value.values, "MINE", lambda text, cursor: ("mine", text))
        extensions.register_type(kind, conn)
    psycopg2.extras.register_default_json(conn, loads=lambda text: "mine")
    psycopg2.extras.register_uuid(conn_or_curs=conn)


def replace_lists(conn: extensions.connection) -> None:
    conn.notices = conn.notifies = Collector()  # type: ignore[assignment]


def hear(conn: extensions.connection) -> None:
    execute(conn, "LISTEN news; NOTIFY news; DO $$ BEGIN RAISE NOTICE 'said'; END $$")


def have_the_reset_make_noise(conn: extensions.connection) -> None:
    """The server says much while the connection is reset."""
    execute(
        conn,
        "LISTEN news; SET client_min_messages TO debug5; CREATE TEMP TABLE noise (n int PRIMARY "
        "KEY)",
    )


def set_attributes(conn: Any) -> None:
    conn.prepared = {"statement": 1}


def leave_two_phases(conn: extensions.connection) -> None:
    """psycopg2 keeps the transaction's id here, though the transaction has ended."""
    conn.tpc_begin("x")
    conn.set_client_encoding("LATIN1")
    conn.set_client_encoding("UTF8")


def commit_two_phases(conn: extensions.connection) -> None:
    conn.tpc_begin("y")
    conn.cursor().execute("SELECT 1")
    conn.tpc_prepare()
    conn.tpc_commit()


def leave_cursors(conn: extensions.connection) -> None:
    for name, withhold in (("one", False), ("two", True)):
        conn.cursor(name, withhold=withhold).execute("SELECT generate_series(1, 1000)")


def leave_large_object(conn: extensions.connection) -> None:
    conn.lobject(0, "wb").write(b"bytes")


def escape(conn: extensions.connection) -> None:
    execute(conn, "SET standard_conforming_strings TO off")


def set_date_style(conn: extensions.connection) -> None:
    execute(
        conn,
        "SET DateStyle TO 'German'; SET IntervalStyle TO 'iso_8601'; SET TIME ZONE 'Asia/Tokyo'",
    )


def set_role(conn: extensions.connection) -> None:
    execute(
        conn,
        "SET ROLE pg_monitor; SET search_path TO nowhere; SET SESSION AUTHORIZATION pg_monitor",
    )


def reset(conn: extensions.connection) -> None:
    conn.autocommit = True
    conn.reset()


def prepare(conn: extensions.connection) -> None:
    execute(conn, "PREPARE mine AS SELECT 1; SELECT pg_advisory_lock(42)")


def fail(conn: extensions.connection) -> None:
    with pytest.raises(psycopg2.Error):
        conn.cursor().execute("SELECT 1/0")


def end_as_sql(conn: extensions.connection) -> None:
    conn.cursor().execute("SELECT 1; COMMIT")


def copy(conn: extensions.connection) -> None:
    conn.cursor().copy_expert("COPY (SELECT generate_series(1, 100)) TO STDOUT", io.StringIO())


def autocommit(conn: extensions.connection) -> None:
    conn.autocommit = True
    conn.cursor().execute("SELECT 1")


USES = [
    autocommit,
    commit_two_phases,
    copy,
    end_as_sql,
    enter_and_stay,
    escape,
    fail,
    hear,
    leave_cursors,
    leave_large_object,
    have_the_reset_make_noise,
    prepare,
    register_types,
    replace_lists,
    reset,
    set_attributes,
    set_characteristics,
    set_codec,
    set_codec_and_restore_it_as_sql,
    set_cursor_factory,
    set_date_style,
    set_encoding_as_sql,
    set_role,
    set_session,
    set_session_and_autocommit,
]
