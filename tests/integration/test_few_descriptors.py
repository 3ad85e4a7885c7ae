"""Few descriptors are left in a process, or many of its threads wait: errors that say what to do, and no abort."""

import os
import threading

import pytest
from processes import run_python
from waiting import wait_until

import sharedpool
from sharedpool.cli.postgres import EphemeralPostgres

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
        assert "descriptors, and fewer are free of the 200 that this process may have open" in done.stdout
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

    threads = [threading.Thread(target=use) for _ in range(150)]
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
