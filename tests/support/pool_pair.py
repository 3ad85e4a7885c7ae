"""A connection that moves between two sessions of one pool; see the fixture `pair`."""

from collections.abc import Callable

import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.wire.reports import PoolReport
from sharedpool.worker.pool import Pool
from tests.support.waiting import wait_until

MakePair = Callable[..., tuple[Pool, Pool]]


def report(broker: sharedpool.Broker, name: str) -> PoolReport:
    (found,) = [pool for pool in fetch_report(broker.address).pools if pool.name == name]
    return found


def leave_what_comes(
    pool: Pool, broker: sharedpool.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask for the connection that is parked at the broker, and stop waiting before it arrives."""

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    wait_until(lambda: report(broker, pool.name).parked == 1, what="the connection to be parked")
    with monkeypatch.context() as patch:
        patch.setattr("sharedpool.worker.waiting.Wait._wait_once", leave)
        with pytest.raises(KeyboardInterrupt):
            pool.get_conn()


def moved(
    giver: Pool, taker: Pool, use: Callable[[extensions.connection], object]
) -> extensions.connection:
    """Have `giver` use a connection, and return it after its hand-over to `taker`."""
    conn = giver.get_conn()
    pid = conn.info.backend_pid
    use(conn)
    given, before = giver.stats().given, taker.stats()
    giver.put_conn(conn)  # the hand-over may begin at once
    got = taker.get_conn()
    assert got.info.backend_pid == pid
    wait_until(lambda: giver.stats().given == given + 1)  # counted after the send
    after = taker.stats()
    assert after.adopted == before.adopted + 1
    assert (after.hits, after.handed_on, after.connects) == (
        before.hits,
        before.handed_on,
        before.connects,
    )
    return got
