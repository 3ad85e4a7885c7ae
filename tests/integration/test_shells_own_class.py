"""A connection that another process has opened, in an object of the user's own class."""

import io
import threading
from typing import Any

import psycopg2
import psycopg2.errorcodes
import psycopg2.extras
import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool.postgres import libpq
from sharedpool.worker.connection.handover import SUPPORTED
from tests.support.pool_pair import MakePair, leave_what_comes, moved, report
from tests.support.running_query import Query
from tests.support.sql import ask
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)


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
