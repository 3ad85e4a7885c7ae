"""What a connection is that another process has opened, in whatever was left of one here: as one
just opened."""

import io
import os
import re
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import psycopg2
import psycopg2.errorcodes
import psycopg2.extras
import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool import ThreadedConnectionPool
from sharedpool.descriptors.readable import readable
from sharedpool.postgres import libpq
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection import shells
from sharedpool.worker.connection.handover import SUPPORTED
from sharedpool.worker.connection.stub_server import StubServer
from sharedpool.worker.pool import Pool
from tests.support.pool_pair import MakePair, leave_what_comes, moved, report
from tests.support.running_query import Query
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


# --- a class of the user's own


class Own(extensions.connection):
    """Sets itself up when it connects."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.statements: list[str] = []
        self.names = (self.info.dbname, self.info.user, self.dsn, self.get_dsn_parameters())
        floats = extensions.new_type(
            extensions.DECIMAL.values, "FLOATS", lambda text, cursor: text and float(text)
        )
        extensions.register_type(floats, self)


def test_the_object_of_a_users_own_class_is_a_new_one_for_a_new_session(pair: MakePair) -> None:
    a, b = pair(connection_factory=Own)
    names, seen = set(), list[object]()
    for giver, taker in ((a, b), (b, a), (a, b), (b, a)):

        def use(conn: Any) -> None:
            assert conn.statements == []
            seen.append(conn)
            conn.statements.append("mine")
            extensions.register_type(extensions.DECIMAL, conn)

        conn: Any = moved(giver, taker, use)
        assert all(conn is not other for other in seen)
        assert (type(ask(conn, "SELECT 1.5")), conn.statements) == (float, [])
        names.add(str(conn.names))
        assert conn.names == (conn.info.dbname, conn.info.user, conn.dsn, conn.get_dsn_parameters())
        taker.put_conn(conn)
    assert len(names) == 1


class Asking(extensions.connection):
    """Asks the server while it connects, and takes no answer for an answer."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        try:
            self.answer = ask(self, "SELECT 42")
        except psycopg2.Error:
            self.answer = 0
        else:
            self.rollback()


def test_a_pool_whose_class_asks_the_server_while_it_connects_opens_connections_instead(
    pair: MakePair, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair(connection_factory=Asking)
    for pool in (a, b, a, b):
        conn: Any = pool.get_conn()
        assert (conn.answer, ask(conn, "SELECT 1")) == (42, 1)
        pool.put_conn(conn)
    assert "Asking executes statements while it connects; move them to configure=" in caplog.text
    assert a.stats().adopted == b.stats().adopted == 0


def test_no_users_object_is_built_in_the_links_thread(
    pair: MakePair, broker: sharedpool.Broker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes for one who has left is ended there: its slot is free again."""
    threads: set[str] = set()

    class Noting(extensions.connection):
        def __init__(self, dsn: str) -> None:
            super().__init__(dsn)
            threads.add(threading.current_thread().name)

    _, b = pair(connection_factory=Noting)
    leave_what_comes(b, broker, monkeypatch)
    wait_until(lambda: report(broker, name).leases == 0, what="it to be ended")
    assert ask(b.get_conn(), "SELECT 1") == 1
    assert threads == {threading.current_thread().name}


@pytest.mark.parametrize(
    "kind", [None, psycopg2.extras.LoggingConnection, psycopg2.extras.MinTimeLoggingConnection]
)
def test_the_first_move_of_a_logging_connection_takes_no_longer_than_another_ones(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """It is tried whether a cancel ends what it executes.

    One that ends nothing has who waits sit through a second.
    """
    ended: list[bytes | None] = []
    refused = libpq.refused

    def noted(*arguments: Any) -> bytes | None:
        ended.append(refused(*arguments))
        return ended[-1]

    monkeypatch.setattr(libpq, "refused", noted)
    log = io.StringIO()
    a, b = pair(
        connection_factory=kind, configure=(lambda conn: conn.initialize(log)) if kind else None
    )
    assert ended == [psycopg2.errorcodes.QUERY_CANCELED.encode()]
    assert (b.stats().connects, b.stats().given, a.stats().connects, a.stats().adopted) == (
        1,
        1,
        0,
        1,
    )
    moved(a, b, lambda conn: None)
    assert len(ended) == 1
    assert log.getvalue() == ""


def test_logging_connections_move_and_can_be_cancelled(pair: MakePair) -> None:
    """Their cursors cannot be had before they are initialized; and they log what is executed:
    nothing of the pool's."""
    log = io.StringIO()

    def configure(conn: Any) -> None:
        conn.initialize(log)

    a, b = pair(connection_factory=psycopg2.extras.LoggingConnection, configure=configure)
    conn = moved(a, b, lambda conn: None)
    assert log.getvalue() == ""
    query = Query(conn)
    query.cancel()
    assert isinstance(query.end(), psycopg2.errors.QueryCanceled)
    assert "pg_sleep" in log.getvalue()


# --- what it says of its server, and refuses


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


# --- a reference that is kept


@pytest.fixture
def pool(broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str) -> Any:
    made = sharedpool.config_pool(
        name=name,
        dsn=postgres.dsn,
        broker=broker.address,
        max_conn=1,
        timeout=10,
        pool_manager=ThreadedConnectionPool,
    )
    yield made
    made.release_all()


def test_a_connection_that_was_put_back_is_closed_to_its_user(pool: Pool) -> None:
    told: list[dict[str, object]] = []
    uses: dict[str, Callable[[Any, Any, Any, Any], object]] = {
        "cursor": lambda conn, cursor, named, large: conn.cursor(),
        "commit": lambda conn, cursor, named, large: conn.commit(),
        "rollback": lambda conn, cursor, named, large: conn.rollback(),
        "cancel": lambda conn, cursor, named, large: conn.cancel(),
        "autocommit": lambda conn, cursor, named, large: setattr(conn, "autocommit", True),
        "set_session": lambda conn, cursor, named, large: conn.set_session(readonly=True),
        "encoding": lambda conn, cursor, named, large: conn.set_client_encoding("LATIN1"),
        "reset": lambda conn, cursor, named, large: conn.reset(),
        "tpc": lambda conn, cursor, named, large: conn.tpc_begin("x"),
        "lobject": lambda conn, cursor, named, large: conn.lobject(),
        "with": lambda conn, cursor, named, large: conn.__enter__(),
        "poll": lambda conn, cursor, named, large: conn.poll(),
        "fileno": lambda conn, cursor, named, large: conn.fileno(),
        "execute": lambda conn, cursor, named, large: cursor.execute("SELECT 1"),
        "fetch": lambda conn, cursor, named, large: cursor.fetchone(),
        "copy": lambda conn, cursor, named, large: cursor.copy_expert(
            "COPY t TO STDOUT", io.StringIO()
        ),
        "named": lambda conn, cursor, named, large: named.fetchone(),
        "large": lambda conn, cursor, named, large: large.read(),
    }
    for take, end in (
        (lambda: psycopg2.connect(pool.config.conninfo.dsn), lambda conn: conn.close()),
        (pool.get_conn, pool.put_conn),
        (lambda: pool.get_conn("key"), pool.put_conn),
        (pool.connect, lambda conn: conn.close()),
    ):
        conn = take()
        cursor, named, large = conn.cursor(), conn.cursor("named"), conn.lobject(0, "rw")
        cursor.execute("SELECT generate_series(1, 10)")
        named.execute("SELECT generate_series(1, 10)")
        end(conn)
        said: dict[str, object] = {"closed": (conn.closed, cursor.closed, large.closed)}
        for name, use in uses.items():
            with pytest.raises(psycopg2.Error) as raised:
                use(conn, cursor, named, large)
            said[name] = (raised.type, str(raised.value))
        conn.close()  # as often as one likes
        assert conn.closed
        told.append(said)
    assert told == [told[0]] * 4
    assert pool.stats().idle == 1
    assert ask(pool.get_conn(), "SELECT 1") == 1


def test_it_is_closed_by_the_fast_path_too(pool: Pool) -> None:
    for _ in range(50):  # all but the few that are timed go it
        conn = pool.get_conn()
        assert not conn.closed
        cursor = conn.cursor()
        pool.put_conn(conn)
        for use in (conn.cursor, conn.commit, lambda cursor=cursor: cursor.execute("SELECT 1")):
            with pytest.raises(psycopg2.InterfaceError, match="already closed"):
                use()


class PutsBack:
    """A value that returns the connection while it is written into a statement: psycopg2 has looked
    at it by then."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def prepare(self, conn: extensions.connection) -> None:
        self.pool.put_conn(conn)

    def __conform__(self, protocol: object) -> object:
        return self

    def getquoted(self) -> bytes:
        return b"42"


def test_a_statement_that_goes_on_leaves_no_transaction_that_psycopg2_believes_in(
    pool: Pool,
) -> None:
    """It would send no BEGIN for the next user, who could roll nothing back."""
    cursor = pool.get_conn().cursor()
    cursor.execute("COMMIT /* %s */", [PutsBack(pool)])
    assert pool.get_conn().status == extensions.STATUS_READY


def test_a_setting_on_a_connection_that_was_put_back_is_not_the_next_users(pool: Pool) -> None:
    before = pool.get_conn()
    pool.put_conn(before)
    with pytest.raises(psycopg2.InterfaceError, match="already closed"):
        before.cursor_factory = psycopg2.extras.DictCursor
    assert pool.get_conn().cursor_factory is None


def test_settings_are_restored_by_the_fast_path_too(pool: Pool) -> None:
    for _ in range(50):  # all but the few that are timed would go it
        conn = pool.get_conn()
        assert not conn.autocommit
        assert conn.cursor_factory is None
        conn.autocommit, conn.cursor_factory = True, psycopg2.extras.DictCursor
        pool.put_conn(conn)
        conn = pool.get_conn()
        assert not conn.autocommit
        pool.put_conn(conn)


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_connection_that_is_not_idle_is_not_handed_out(pool: Pool, autocommit: bool) -> None:
    conn = pool.get_conn()
    conn.autocommit = autocommit
    cursor = conn.cursor()
    cursor.execute("SELECT %s", [PutsBack(pool)])
    got = pool.get_conn()
    assert (got.status, got.get_transaction_status()) == (extensions.STATUS_READY, 0)
    assert not got.autocommit
    got.set_session(readonly=True)
    assert (
        ask(got, "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%%'")
        == 0
    )
    pool.put_conn(got)
    with pytest.raises(psycopg2.InterfaceError):
        cursor.execute("SELECT 1")


@pytest.mark.parametrize("asked_for", [False, True])
def test_no_checkin_waits_for_a_thread_that_goes_on(pair: MakePair, asked_for: bool) -> None:
    """Nor does the link's thread, when another process wants the connection."""
    a, b = pair()
    conn = a.get_conn()
    query = Query(conn)
    if asked_for:
        got: list[extensions.connection] = []
        other = threading.Thread(target=lambda: got.append(b.get_conn()))
        other.start()
        wait_until(lambda: a.stats().waiting or b.stats().waiting, 5, "the other to wait")
        a.put_conn(conn)
        other.join(5)
        assert ask(got[0], "SELECT 1") == 1
    else:
        a.put_conn(conn)
        assert ask(a.get_conn(timeout=5), "SELECT 1") == 1
    query.end()
    with pytest.raises(psycopg2.InterfaceError):
        conn.cursor()
