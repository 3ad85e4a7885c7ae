"""A link that ends while its pool goes on by another one."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from msgspec import structs
from waiting import wait_until

import sharedpool
from sharedpool.wire.messages import PROTOCOL_VERSION, Welcome
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


def test_a_former_brokers_welcome_is_told_from_a_successors_with_a_lower_number(make_pool: MakePool) -> None:
    pool = make_pool()
    pool.put_conn(pool.get_conn(timeout=10))
    link = pool._holdings.link
    assert link is not None
    answer = Welcome(PROTOCOL_VERSION, link.epoch - 1, 1, 1000, 1000, nonce=link._nonce)
    assert link._is_late(answer)  # this line has a broker already
    other = Link(link._endpoint, "ipc:///nowhere.sock", deque(), None)
    other.epoch, other._nonce = link.epoch, 7
    assert other._is_late(answer)  # it answers what was said elsewhere
    assert not other._is_late(structs.replace(answer, nonce=7))
    assert not other._is_late(structs.replace(answer, epoch=link.epoch))
    other.disown()
