"""The link that the pools of a process share, and registrations that end while their
pools go on."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2.extensions
import pytest
from msgspec import structs

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.wire.messages import PROTOCOL_VERSION, Welcome
from sharedpool.worker.link.link import Link
from sharedpool.worker.link.links import SharedContext
from sharedpool.worker.session import Session
from tests.support.fixture_types import MakePool
from tests.support.processes import run_python
from tests.support.waiting import wait_until


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


def test_a_registration_that_has_ended_leaves_the_pool_to_its_successor(
    make_pool: MakePool, gate: Gate
) -> None:
    """A retired pool that is used on: its registration ends with each last lease, the next checkout
    needs another."""
    pool = make_pool(pool_manager=sharedpool.ThreadedConnectionPool)
    pool.retire()
    local = pool._local
    conn = pool.get_conn(timeout=10)
    first, link = local.registration, local.link
    assert first is not None
    assert link is not None
    pool.put_conn(conn)
    assert gate.reached.wait(10)
    with ThreadPoolExecutor(1) as executor:
        held = executor.submit(
            pool.get_conn, timeout=10
        )  # while the first is between its last look and its farewell
        second = wait_until(lambda: local.registration, what="another registration")
        assert second is not first
        assert local.cache.outbox is not first.outbox, (
            "the first would send the second's words as its own"
        )
        gate.opened.set()
        conn = held.result()
        assert first.over.wait(10)
        assert local.registration is second
        assert local.link is link
        (lease,) = local.cache.leases.values()
        wait_until(lambda: lease.deposited, what="the broker to have the socket")
    pool.put_conn(conn)
    thread_of(link).join(10)
    assert not thread_of(link).is_alive()
    assert local.link is None
    assert local.registration is None
    assert link.desk.line is None
    with pool.connection(timeout=10):
        assert local.link is not link, "a link that is over serves nobody"


def test_the_pools_of_a_process_share_one_thread_one_context_and_one_line(
    make_pool: MakePool,
) -> None:
    pools = [make_pool(max_conn=1) for number in range(20)]
    threads: set[int] = set()
    descriptors: list[int] = []
    for pool in pools:
        with pool.connection(timeout=10) as conn, conn.cursor() as cursor:
            cursor.execute("SELECT 1")
        pool.close_idle()
        threads.add(len(os.listdir("/proc/self/task")))
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert len({pool._local.link for pool in pools}) == 1
    assert len({pool._local.registration for pool in pools}) == len(pools)
    assert len(threads) == 1
    assert descriptors[-1] <= descriptors[0] + 1  # a connection that is ended in this moment
    link = pools[0]._local.link
    assert link is not None
    for pool in pools[1:]:
        pool.release_all()
    assert thread_of(link).is_alive()
    with pools[0].connection(timeout=10):
        pass
    pools[0].release_all()
    assert not thread_of(link).is_alive()


def test_after_a_restart_of_the_broker_every_pool_is_registered_again(
    tmp_path: Path, database: str
) -> None:
    address = f"ipc://{tmp_path}/b.sock"
    with sharedpool.start_broker(10, address=address):
        pools = [
            sharedpool.config_pool(2, dsn=database, name=f"p{n}", broker=address, timeout=10)
            for n in range(5)
        ]
        conns = [pool.get_conn() for pool in pools]
    try:
        with sharedpool.start_broker(10, address=address):
            for pool in pools:
                pool.put_conn(pool.get_conn(timeout=10))
            assert fetch_report(address).leases == 10
            for pool, conn in zip(pools, conns, strict=True):
                pool.put_conn(conn)
    finally:
        for pool in pools:
            pool.release_all()


FORKING = """
import os, sys, warnings
warnings.simplefilter("error")
import sharedpool
settings = dict(dsn=sys.argv[1], broker=sys.argv[2], timeout=10)
pools = [sharedpool.config_pool(2, name=f"forks{n}", **settings) for n in (1, 2)]
for _ in range(3):
    for pool in pools:
        with pool.connection() as conn, conn.cursor() as cursor:
            cursor.execute("SELECT 1")
    child = os.fork()
    if not child:
        with pools[0].connection() as conn, conn.cursor() as cursor:
            cursor.execute("SELECT 1")
            os._exit(cursor.fetchone()[0])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
held = pools[0].get_conn()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a fork in the middle of a checkout is what Python warns of
    child = os.fork()
if not child:
    os._exit(0)
os.waitpid(child, 0)
with held.cursor() as cursor:
    cursor.execute("SELECT 1")
    print(cursor.fetchone()[0])
"""


def test_a_process_forks_without_threads_when_nothing_is_in_use(
    broker: sharedpool.Broker, database: str
) -> None:
    """Python 3.12 and newer warn of the threads otherwise, which is an error here."""
    done = run_python(FORKING, database, broker.address)
    assert (done.stdout, done.stderr) == ("1\n1\n1\n1\n", "")


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


def test_a_former_brokers_welcome_is_told_from_a_successors_with_a_lower_number(
    make_pool: MakePool,
) -> None:
    pool = make_pool()
    pool.put_conn(pool.get_conn(timeout=10))
    link = pool._local.link
    assert link is not None
    answer = Welcome(PROTOCOL_VERSION, link.epoch - 1, 1, 1000, 1000, nonce=link._nonce)
    assert link._is_late(answer)  # this line has a broker already
    other = Link("ipc:///nowhere.sock", SharedContext())
    other.epoch, other._nonce = link.epoch, 7
    assert other._is_late(answer)  # it answers what was said elsewhere
    assert not other._is_late(structs.replace(answer, nonce=7))
    assert not other._is_late(structs.replace(answer, epoch=link.epoch))
    other.disown()
