"""A link that ends while its pool goes on by another one."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psycopg2.extensions
import pytest
from waiting import wait_until

import sharedpool
from sharedpool.worker.link import Link
from sharedpool.worker.session import Session

MakePool = Callable[..., sharedpool.Pool]


@dataclass
class Gate:
    """Where a thread is held until it may go on."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def hold(self) -> None:
        self.reached.set()
        assert self.opened.wait(30)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Holds the first link that finds its pool over, right after that."""
    gate, done = Gate(), Session.done

    def done_and_wait(session: Session) -> bool:
        over = done(session)
        if over and not gate.reached.is_set():
            gate.hold()
        return over

    monkeypatch.setattr(Session, "done", done_and_wait)
    yield gate
    gate.opened.set()


def thread_of(link: Link) -> threading.Thread:
    assert link._thread is not None
    return link._thread


def test_a_link_that_has_ended_leaves_the_pool_to_its_successor(make_pool: MakePool, gate: Gate) -> None:
    """A retired pool that is used on: its link ends with each last lease, the next checkout needs another."""
    pool = make_pool()
    pool.retire()
    holdings = pool._holdings
    conn = pool.get_conn(timeout=10)
    first = holdings.link
    assert first is not None
    pool.put_conn(conn)
    assert gate.reached.wait(10)
    held = pool.get_conn(timeout=10)  # while the first link is between its last look and its farewell
    second = holdings.link
    assert second is not None
    assert second is not first
    (lease,) = holdings.cache.leases.values()
    wait_until(lambda: lease.deposited, what="the second link to have a line to the desk")
    assert holdings.cache.out is not first._outbox, "the first would send the second's words as its own"
    gate.opened.set()
    thread_of(first).join(10)
    assert not thread_of(first).is_alive(), "there are two links"
    assert holdings.link is second
    assert thread_of(second).is_alive()
    assert holdings.desk.line is not None
    pool.put_conn(held)
    thread_of(second).join(10)
    assert not thread_of(second).is_alive()
    assert holdings.link is None
    assert holdings.desk.line is None


def test_a_checkout_in_the_links_own_thread_is_refused_at_once(make_pool: MakePool) -> None:
    said: list[str] = []

    class Curious(psycopg2.extensions.connection):
        """Its close, of an idle connection that expires, runs where the link does."""

        def close(self) -> None:
            if threading.current_thread() is not threading.main_thread():
                try:
                    pool.get_conn(timeout=30)
                except sharedpool.PoolError as error:
                    said.append(str(error))
            super().close()

    kind = sharedpool.ThreadedConnectionPool
    pool = make_pool(max_conn=2, expiration=0.1, connection_factory=Curious, pool_manager=kind)
    pool.put_conn(pool.get_conn(timeout=10))
    wait_until(lambda: said, what="the idle connection to be closed")
    assert f"pool {pool.name!r}: get_conn() was called in sharedpool's own thread" in said[0]
    wait_until(lambda: pool.stats().idle == 0, what="the link to go on")
    pool.put_conn(pool.get_conn(timeout=10))
