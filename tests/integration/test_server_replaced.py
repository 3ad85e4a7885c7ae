"""A primary that crashes, and its replica in its place: what becomes of the backends it had.

Nobody can ask a server that is gone. Where the connections were reset, and not closed, only the
server that has taken its place proves that their slots are free.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg2
import pytest
from psycopg2.extensions import connection, make_dsn

from sharedpool.broker.core.commands import Fence
from sharedpool.broker.postgres import statements
from sharedpool.broker.postgres.control_connection import ControlConnection
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.values import Backend, Token
from tests.integration.control_driver import Listener, running
from tests.support.replica import Replica, promote
from tests.support.sql import backend_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long_variants

FENCE = Token(1, 1)


@dataclass
class Pair:
    """A primary, its replica, and a backend on the primary."""

    primary: EphemeralPostgres
    replica: Replica
    backend: Backend

    def dsn(self, **more: str) -> str:
        """Return a connection string that leads to either server."""
        host = f"{self.primary.host},{self.replica.host}"
        return make_dsn(self.primary.dsn, host=host, **more)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with EphemeralPostgres() as primary, Replica(primary) as replica:
        conn = psycopg2.connect(primary.dsn)
        yield Pair(primary, replica, backend_of(conn))
        conn.close()


@pytest.mark.parametrize("promoted_at", ["before it is asked", "after it was asked"])
def test_a_backend_is_gone_with_the_primary_that_another_has_replaced(
    pair: Pair, promoted_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sharedpool.broker")
    with running(pair.dsn()) as (control, listener):
        wait_until(lambda: control.state == "connected")
        if promoted_at == "before it is asked":
            pair.primary.shutdown("immediate")
            promote(pair.replica)
        else:
            pair.primary.shutdown("immediate")
        control.enqueue_fence(Fence(FENCE, "p", pair.backend, "a test"))
        if promoted_at == "after it was asked":
            wait_until(lambda: "cannot tell whether" in caplog.text, what="the replica's answer")
            assert listener.gone.empty()
            promote(pair.replica)
        assert listener.gone.get(timeout=20) == FENCE
    assert f"backend {pair.backend.pid} is gone with its server" in caplog.text


def opened(dsn: str, listener: Listener) -> ControlConnection:
    """Return a control connection of a broker whose journal has what the listener was told."""
    control = ControlConnection(
        dsn, None, listener.call_soon, [*listener.servers], leadership=None, maintenance=False
    )
    control.open()
    return control


def test_a_later_broker_knows_which_primary_was_replaced_but_not_by_a_copy(pair: Pair) -> None:
    """The copy has the same identifier, and the connection string does not lead from the one to
    the other: a program's test database may be made of the backup of its real one."""
    listener = Listener()
    opened(pair.dsn(), listener).close("over")
    assert [each.boot_us for each in listener.servers] == [pair.backend.boot_us] * 2  # two names
    pair.primary.shutdown("immediate")
    promote(pair.replica)
    copy = opened(pair.replica.dsn, listener)
    assert not copy.is_server_gone(pair.backend)
    copy.close("over")
    later = opened(pair.dsn(), listener)
    assert later.is_server_gone(pair.backend)
    later.close("over")


def test_a_former_primary_that_starts_again_replaces_nobody(pair: Pair) -> None:
    """It was started later, and its timeline is the older one."""
    listener = Listener()
    opened(pair.dsn(), listener).close("over")
    pair.primary.shutdown("immediate")
    promote(pair.replica)
    opened(pair.dsn(), listener).close("over")
    conn = psycopg2.connect(pair.replica.dsn)
    new = backend_of(conn)
    pair.primary.start()
    control = opened(pair.dsn(), listener)  # the first host that it names answers
    assert control.boot_us > new.boot_us
    assert not control.is_server_gone(new)
    assert control.is_server_gone(pair.backend)  # of its former incarnation
    control.close("over")
    conn.close()


def test_a_role_that_may_not_ask_whose_primary_it_is_does_without(
    postgres: EphemeralPostgres, server_connection: connection
) -> None:
    assert statements.server_of(server_connection).system is not None
    with server_connection.cursor() as cursor:
        cursor.execute("DROP ROLE IF EXISTS incurious")
        cursor.execute("CREATE ROLE incurious LOGIN")
        cursor.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM public")
    try:
        with running(make_dsn(postgres.dsn, user="incurious")) as (control, listener):
            wait_until(lambda: control.state == "connected")
            assert len(listener.servers) == 1  # by its address
    finally:
        with server_connection.cursor() as cursor:
            cursor.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO public")
