"""Few descriptors are left in a process, or many of its threads wait: errors that say what to do,
and no abort."""

import dataclasses
import os
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

import sharedpool
from sharedpool.lane.lane import FOR_A_LANE
from sharedpool.postgres.buffer_probe import Probe
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.handover import SUPPORTED
from tests.support.pool_pair import report
from tests.support.processes import Worker, run_python
from tests.support.sql import ask
from tests.support.waiting import wait_until

SCRIPT = """
import os, resource, sys
import psycopg2, sharedpool
left, used, dsn, address = int(sys.argv[1]), sys.argv[2] == "used", *sys.argv[3:]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
pool = sharedpool.config_pool(max_conn=4, dsn=dsn, broker=address, name="few")
conns = [pool.get_conn(timeout=20)] if used else []
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
for _ in range(left):
    os.close(held.pop())
try:
    conns.append(pool.get_conn(timeout=20))
    conns[-1].cursor().execute("SELECT 1")
    said = "works"
except sharedpool.PoolError as error:
    said = str(error)
for each in held:
    os.close(each)
conns.append(pool.get_conn(timeout=20))
conns[-1].cursor().execute("SELECT 1")  # as soon as there is room again
print(said)
"""


@pytest.mark.long_variants(first=8)
@pytest.mark.parametrize("used", ["new", "used"])
@pytest.mark.parametrize("left", [*range(0, 18, 2), 3, 5])
def test_a_process_with_few_descriptors_left_gets_a_connection_or_an_error(
    left: int, used: str, postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    done = run_python(SCRIPT, str(left), used, postgres.dsn, broker.address)
    assert done.returncode == 0, done.stderr
    if left >= (16 if used == "new" else 2):
        assert done.stdout == "works\n"
    else:
        assert (
            "descriptors, and fewer are free of the 200 that this process may have open"
            in done.stdout
        )
        assert "raise the limit (`ulimit -n`" in done.stdout


def test_a_crowd_of_waiting_threads_has_less_than_one_descriptor_each(
    broker: sharedpool.Broker, postgres: EphemeralPostgres
) -> None:
    pool = sharedpool.config_pool(
        max_conn=2,
        dsn=postgres.dsn,
        broker=broker.address,
        name="crowd",
        pool_manager=sharedpool.ThreadedConnectionPool,
    )
    # Once more, so that it is known where the desk is.
    conns = [pool.get_conn(timeout=20), pool.get_conn(timeout=20)]
    pool.put_conn(conns.pop(), close=True)
    conns.append(pool.get_conn(timeout=20))
    before = len(os.listdir("/proc/self/fd"))
    served: list[int] = []

    def use() -> None:
        with pool.connection(timeout=60) as conn, conn.cursor() as cursor:
            cursor.execute("SELECT 1")
            served.append(1)

    threads = [threading.Thread(target=use) for _ in range(300)]
    for thread in threads:
        thread.start()
    wait_until(lambda: pool.stats().waiting == len(threads), 30)
    assert len(os.listdir("/proc/self/fd")) - before < len(threads) / 2
    for conn in conns:
        pool.put_conn(conn)
    for thread in threads:
        thread.join(60)
    assert len(served) == len(threads)
    pool.release_all()


@contextmanager
def only(count: int) -> Iterator[None]:
    """Let this process open so many descriptors and no more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    gaps: list[int] = []
    while not gaps or gaps[-1] < highest:
        gaps.append(os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (gaps[-1] + 1 + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in gaps:
            os.close(each)


@dataclasses.dataclass
class Host:
    """A pool of this process, where the only connection comes for a visit: it is
    another process's."""

    pool: sharedpool.Pool
    broker: sharedpool.Broker
    other: Worker
    executor: ThreadPoolExecutor

    def visit(self, left: int | None = None) -> None:
        """Have it come, use it and let it go; `left` descriptors can be opened here
        while it comes."""
        waiter = self.executor.submit(self.pool.get_conn, timeout=20)
        wait_until(lambda: report(self.broker, self.pool.name).waiting == 1)
        try:
            with nullcontext() if left is None else only(left):
                self.other.ask("put", name="x")
                conn = waiter.result()
            assert ask(conn, "SELECT 1") == 1
            self.pool.put_conn(conn)
        finally:
            assert "backend" in self.other.ask("get", name="x", timeout=20)

    @property
    def descriptors(self) -> int:
        """How many are open, but for those of empty connections, and the lane with its timer."""
        local = self.pool._local
        shells = sum(map(len, local.shells._stock.values()))
        probes = 2 * sum(map(len, Probe._pairs.values()))
        lane = (
            FOR_A_LANE + len(local.membership.wait_sockets._all)
            if local.membership.wait_sockets is not None
            else 0
        )
        return len(os.listdir("/proc/self/fd")) - shells - probes - lane


@pytest.fixture
def host(broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str) -> Iterator[Host]:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
    }
    pool = sharedpool.config_pool(**settings, pool_manager=sharedpool.ThreadedConnectionPool)
    with Worker(**settings) as other, ThreadPoolExecutor() as executor:
        assert "backend" in other.ask("get", name="x", timeout=20)
        yield Host(pool, broker, other, executor)
        pool.release_all()


@pytest.mark.long_variants(first=4)
@pytest.mark.skipif(not SUPPORTED, reason="connections cannot be handed over on this platform")
@pytest.mark.parametrize("shell", ["kept", "built"])
@pytest.mark.parametrize("left", range(7))
def test_a_shortage_that_passes_costs_no_more_than_the_connection_that_comes_meanwhile(
    host: Host, caplog: pytest.LogCaptureFixture, left: int, shell: str
) -> None:
    for _ in range(2):
        host.visit()
    assert host.pool.stats().adopted == 2
    before = host.descriptors
    if shell == "built":
        host.pool._local.shells._stock.clear()
    # In its place one of its own is opened, which takes two: of those that are left, or that an
    # empty one had.
    lacks = left < (1 if shell == "kept" else 2)
    with (
        pytest.raises(sharedpool.PoolError, match=r"raise the limit \(`ulimit -n`")
        if lacks
        else nullcontext()
    ):
        host.visit(left)
    adopted = host.pool.stats().adopted
    assert adopted == 2 + (left >= (1 if shell == "kept" else 5))
    for _ in range(2):
        host.visit()
    assert host.pool.stats().adopted == adopted + 2
    assert "no hand-over" not in caplog.text
    wait_until(lambda: host.descriptors == before, 10, "no descriptor to be lost")
