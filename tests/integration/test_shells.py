"""What a connection is that another process has opened, in whatever was left of one here: as one
just opened."""

import os
import re
import socket
import struct
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool.descriptors.readable import readable
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection import shells
from sharedpool.worker.connection.handover import SUPPORTED
from sharedpool.worker.connection.stub_server import StubServer
from tests.integration.session_uses import (
    USES,
    execute,
    leave_two_phases,
    register_types,
    replace_lists,
)
from tests.support.pool_pair import MakePair, moved
from tests.support.sql import ask
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)

# Another one at each connect, or no setting.
_OWN = {"pgconn_ptr", "info", "socket", "backend_pid"}
_VALUES = {
    "text": "chr(233)",
    "char": "'a'::char(3)",
    "numeric": "1.5",
    "float": "1.5::float8",
    "int": "1",
    "bool": "true",
    "date": "DATE '2026-02-01'",
    "time": "TIME '01:02:03'",
    "stamp": "TIMESTAMP '2026-02-01 03:04:05'",
    "zoned": "TIMESTAMPTZ '2026-02-01 03:04:05+05'",
    "interval": "INTERVAL '1 day 2 hours'",
    "bytea": "'\\\\xff00'::bytea",
    "json": "'{\"a\": 1.5}'::json",
    "uuid": "'6bd64c4c-4b8e-4d8e-8b1e-0123456789ab'::uuid",
    "array": "ARRAY[1.5, 2]",
    "range": "int4range(1, 3)",
}
_SERVERS = {
    "settings": "SELECT array_agg(name || '=' || setting ORDER BY name) FROM pg_settings"
    " WHERE source = 'session' AND name <> 'client_connection_check_interval'",  # the pool's own
    "prepared": "SELECT count(*) FROM pg_prepared_statements",
    "cursors": "SELECT count(*) FROM pg_cursors",
    "listening": "SELECT count(*) FROM pg_listening_channels()",
    "locks": "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'",
    "role": "SELECT current_user || session_user",
    "temporary": "SELECT count(*) FROM pg_class WHERE relpersistence = 't' AND "
    "pg_table_is_visible(oid)",
    "isolation": "SELECT current_setting('transaction_isolation') || "
    "current_setting('transaction_read_only')",
}


def everything(conn: extensions.connection) -> dict[str, Any]:
    """Return all that can be seen of a connection, by itself and by what it does."""
    seen: dict[str, Any] = {}
    for kind, thing in ((extensions.connection, conn), (extensions.ConnectionInfo, conn.info)):
        for name, descriptor in vars(kind).items():
            if (
                type(descriptor).__name__ in ("member_descriptor", "getset_descriptor")
                and name not in _OWN
            ):
                value = getattr(thing, name)
                seen[f"{kind.__name__}.{name}"] = (
                    value.copy() if isinstance(value, list | dict) else value
                )
    seen["parameters"] = conn.get_dsn_parameters()
    seen["transaction"] = conn.get_transaction_status()
    seen["attributes"] = sorted(name for name in vars(conn) if not name.startswith("sharedpool_"))
    seen["repr"] = re.sub(r"0x[0-9a-f]+", "", repr(conn))
    reported = (
        "client_encoding",
        "DateStyle",
        "TimeZone",
        "standard_conforming_strings",
        "session_authorization",
    )
    seen["reported"] = {
        name: conn.get_parameter_status(name)
        for name in (*reported, "search_path", "application_name")
    }
    for value in ("a'\\é", b"\\\0'\xff", 1.5, [1, "\\"]):
        adapted: Any = extensions.adapt(value)
        if hasattr(adapted, "prepare"):
            adapted.prepare(conn)
        seen[f"quoted {value!r}"] = adapted.getquoted()
    seen["identifier"] = extensions.quote_ident('é"\\', conn)
    with conn, conn.cursor() as cursor:  # it is in no block, nor in a two-phase transaction
        seen["cursor"] = type(cursor)
        for name, value in _VALUES.items():
            cursor.execute("SELECT " + value)
            seen["read " + name] = [(type(found), found) for (found,) in cursor.fetchall()]
        cursor.execute("SELECT ascii(%s), length(%s)", ["é", "Ã©"])
        seen["written"] = cursor.fetchall()
        for name, query in _SERVERS.items():
            cursor.execute(query)
            seen["server's " + name] = cursor.fetchall()
    seen["heard"] = (list(conn.notices), list(conn.notifies))
    text = re.compile(r"sharedpool \w+ \[\w+\]")  # the worker's own, as the application's name
    return {
        name: text.sub("", value) if isinstance(value, str) else _same(value, text)
        for name, value in seen.items()
    }


def _same(value: Any, text: re.Pattern[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: text.sub("", each) if isinstance(each, str) else each
            for key, each in value.items()
        }
    return value


@pytest.fixture
def opened(broker: sharedpool.Broker, postgres: EphemeralPostgres) -> dict[str, Any]:
    """A connection just opened."""
    pool = sharedpool.config_pool(
        name="opened", dsn=postgres.dsn, broker=broker.address, timeout=10
    )
    conn = pool.get_conn()
    seen = everything(conn)
    pool.put_conn(conn)
    pool.release_all()
    return seen


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_a_connection_that_has_moved_is_as_one_just_opened(
    pair: MakePair, opened: dict[str, Any], use: Callable[[extensions.connection], None]
) -> None:
    a, b = pair()
    for giver, taker in ((a, b), (b, a), (a, b)):
        # What is left of it after its use takes the next session in.
        conn = moved(giver, taker, use)
        assert everything(conn) == opened
        use(conn)
        taker.put_conn(conn)


def test_a_state_that_only_a_new_connection_mends_is_not_handed_over(
    pair: MakePair, opened: dict[str, Any]
) -> None:
    a, b = pair()
    for pool in (a, b, a, b):
        conn = pool.get_conn()
        assert everything(conn) == opened
        leave_two_phases(conn)
        pool.put_conn(conn)


def test_configure_finds_a_connection_just_opened(pair: MakePair) -> None:
    found: list[object] = []

    def configure(conn: extensions.connection) -> None:
        found.append(
            (
                conn.autocommit,
                conn.isolation_level,
                conn.cursor_factory,
                conn.encoding,
                dict(conn.string_types),
            )
        )
        conn.set_session("SERIALIZABLE", autocommit=True)
        conn.cursor_factory = psycopg2.extras.DictCursor
        conn.set_client_encoding("LATIN1")
        register_types(conn)
        replace_lists(conn)

    a, b = pair(configure=configure)
    for giver, taker in ((a, b), (b, a), (a, b)):
        conn = moved(giver, taker, lambda conn: None)
        assert (conn.autocommit, conn.cursor_factory, conn.encoding) == (
            True,
            psycopg2.extras.DictCursor,
            "LATIN1",
        )
        assert ask(conn, "SELECT chr(233)") == ("mine", "é")
        taker.put_conn(conn)
    assert found == [(False, None, None, "UTF8", {})] * len(found)
    assert len(found) >= 5


def test_a_codec_that_configure_sets_is_not_met_by_it(pair: MakePair) -> None:
    found: list[str] = []

    def configure(conn: extensions.connection) -> None:
        found.append(conn.encoding)
        conn.set_client_encoding("LATIN1")

    a, b = pair(configure=configure)
    for giver, taker in ((a, b), (b, a), (a, b)):
        conn = moved(giver, taker, lambda conn: None)
        assert (conn.encoding, ask(conn, "SELECT %s", "é")) == ("LATIN1", "é")
        taker.put_conn(conn)
    assert set(found) == {"UTF8"}


def test_data_kept_about_a_connection_object_is_not_found_again(pair: MakePair) -> None:
    a, b = pair()
    caches: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()

    def note(conn: extensions.connection) -> None:
        assert conn not in caches
        caches[conn] = "its prepared statements"

    for giver, taker in ((a, b), (b, a), (a, b)):
        conn = moved(giver, taker, note)
        note(conn)
        taker.put_conn(conn)


def test_an_unread_result_is_not_the_next_users(pair: MakePair) -> None:
    """Half a message may have been read: the session cannot go on elsewhere."""
    a, b = pair()
    conn = a.get_conn()
    execute(conn, "LISTEN news")
    conn.commit()
    with psycopg2.connect(conn.dsn) as other, other.cursor() as cursor:
        cursor.execute("NOTIFY news")
    other.close()
    wait_until(lambda: readable([conn], 0))
    given = a.stats().given
    a.put_conn(conn)
    got = b.get_conn()
    assert (ask(got, "SELECT 1"), got.notifies) == (1, [])
    assert a.stats().given == given


@pytest.mark.timeout(60)
def test_half_a_message_that_was_read_does_not_swallow_what_the_next_session_says(
    pair: MakePair,
) -> None:
    """Of a notification, for instance, of which the rest had not come yet when its
    listener polled."""
    a, b = pair()
    conn = a.get_conn()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"A" + struct.pack("!ii", 100, 1) + b"news")
        session = os.dup(conn.fileno())
        os.dup2(ours.fileno(), conn.fileno())
        assert conn.poll() == extensions.POLL_OK
        os.dup2(session, conn.fileno())
        os.close(session)
    given = a.stats().given
    a.put_conn(conn)
    b.put_conn(b.get_conn())
    assert a.stats().given == given  # the other half would meet whoever read on
    got = a.get_conn()
    assert (ask(got, "SELECT 1"), ask(got, "SELECT repeat('x', 200)"), got.notifies) == (
        1,
        "x" * 200,
        [],
    )


@pytest.mark.parametrize("sql", ["SELECT 1", "SET TIME ZONE 'Asia/Tokyo'"])
def test_the_shell_that_a_connection_leaves_behind_is_used_for_the_next_one(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch, sql: str
) -> None:
    built: list[Mapping[str, str]] = []

    class Counted(StubServer):
        def __init__(self, parameters: Mapping[str, str]) -> None:
            built.append(parameters)
            super().__init__(parameters)

    monkeypatch.setattr(shells, "StubServer", Counted)
    a, b = pair()
    for giver, taker in ((a, b), (b, a)) * 5:
        conn = moved(giver, taker, lambda conn: execute(conn, sql))
        assert conn.get_parameter_status("TimeZone") == ask(conn, "SHOW TimeZone") != "Asia/Tokyo"
        taker.put_conn(conn)
    assert len(built) <= 2  # the first of each process
