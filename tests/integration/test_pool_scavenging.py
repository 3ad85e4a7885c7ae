"""Connections that expire, and callbacks."""

import time

import psycopg2
import pytest
from psycopg2.extensions import connection

from tests.support.fixture_types import Backends, MakePool
from tests.support.sql import ask
from tests.support.waiting import wait_until

# --- scavenging


def test_idle_connections_expire_from_their_checkin(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=2, expiration=0.3)
    a, b = pool.get_conn(), pool.get_conn()
    held_since = time.monotonic()
    wait_until(lambda: time.monotonic() - held_since > 0.4)
    pool.put_conn(a)  # out for longer than `expiration`: idle for no time at all
    assert pool.stats().idle == 1
    since = time.monotonic()
    wait_until(lambda: time.monotonic() - since > 0.3)
    pool.put_conn(b)
    assert pool.stats().idle == 1
    wait_until(lambda: len(backends(pool)) == 1, what="the backend's end")


def test_purge_tells_how_many_it_closed(make_pool: MakePool, backends: Backends) -> None:
    pool = make_pool(max_conn=3)
    conns = [pool.get_conn() for _ in range(3)]
    for conn in conns:
        pool.put_conn(conn)
    assert pool.purge_expired_connections() == 0
    pool._local.cache.expiration_s = 0.0  # as if 60 seconds had passed
    assert pool.purge_expired_connections() == 3
    assert backends(pool) == set()


def test_a_pool_that_is_never_called_again_loses_its_expired_connections(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=2, expiration=0.3)
    a, b = pool.get_conn(), pool.get_conn()
    pool.put_conn(a)
    pool.put_conn(b)
    wait_until(lambda: not backends(pool), what="the link's thread to close both")


def test_max_lifetime_holds_in_a_pool_that_is_never_called_again(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=1, expiration=1, max_lifetime=0.3)
    pool.put_conn(pool.get_conn())
    wait_until(lambda: not backends(pool))


def test_max_lifetime_replaces_at_checkin_and_checkout(
    make_pool: MakePool, backends: Backends
) -> None:
    pool = make_pool(max_conn=1, max_lifetime=0.2)
    conn = pool.get_conn()
    opened = time.monotonic()
    wait_until(lambda: time.monotonic() - opened > 0.25)
    pool.put_conn(conn)
    assert conn.closed
    assert pool.stats().idle == 0
    pool.put_conn(pool.get_conn())
    opened = time.monotonic()
    wait_until(lambda: time.monotonic() - opened > 0.25)
    conn = pool.get_conn()
    assert backends(pool) == {ask(conn)}
    pool.put_conn(conn)


# --- callbacks


@pytest.mark.parametrize("name", ["configure", "check", "reset"])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_a_callback_that_raises_costs_the_connection_and_no_slot(
    make_pool: MakePool, backends: Backends, name: str, error: BaseException
) -> None:
    armed = True

    def callback(conn: connection) -> None:
        if armed:
            raise error

    pool = make_pool(max_conn=1, **{name: callback})
    for _ in range(3):
        with pytest.raises(type(error)) as caught:
            pool.put_conn(pool.get_conn())
        assert caught.value is error
        assert backends(pool) == set()
    armed = False
    conn = pool.get_conn()
    pool.put_conn(conn)
    assert pool.get_conn() is conn


@pytest.mark.parametrize("name", ["configure", "check", "reset"])
def test_a_callback_must_leave_no_transaction_open(make_pool: MakePool, name: str) -> None:
    pool = make_pool(max_conn=1, **{name: lambda conn: ask(conn, "SELECT 1")})
    with pytest.raises(psycopg2.ProgrammingError, match=rf"{name}\(\) left a transaction open"):
        pool.put_conn(pool.get_conn())


def test_callbacks_are_called_when_they_should_be(make_pool: MakePool) -> None:
    calls: list[str] = []
    callbacks = {n: lambda conn, n=n: calls.append(n) for n in ("configure", "reset", "check")}
    pool = make_pool(max_conn=1, **callbacks)
    pool.put_conn(pool.get_conn())
    pool.put_conn(pool.get_conn())
    assert calls == ["configure", "check", "reset", "check", "reset"]
