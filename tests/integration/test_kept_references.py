"""A connection that was put back, and to which its user has kept a reference."""

import io
import threading
from collections.abc import Callable
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool import ThreadedConnectionPool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.handover import SUPPORTED
from sharedpool.worker.pool import Pool
from tests.support.pool_pair import MakePair
from tests.support.running_query import Query
from tests.support.sql import ask
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)


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
