"""A process under gevent's monkey-patching: `python green_worker.py SCENARIO SETTINGS [ARGUMENT]`.

Each scenario proves that the hub ran by what only another greenlet of the same process could have
done meanwhile.
"""

import json
import os
import sys
from typing import Any

if sys.argv[1] != "patched_late":
    from gevent import monkey

    monkey.patch_all()

import gevent
import gevent.socket
import psycogreen.gevent
import psycopg2
from gevent import event
from psycopg2 import extensions

import sharedpool

scenario, settings = sys.argv[1], json.loads(sys.argv[2])
if scenario != "patched_late" and not scenario.startswith("without_psycogreen"):
    psycogreen.gevent.patch_psycopg()
pool = sharedpool.config_pool(pool_manager=sharedpool.ThreadedConnectionPool, **settings)


def ask(conn: extensions.connection, query: str = "SELECT pg_backend_pid()") -> Any:
    with conn.cursor() as cursor:
        cursor.execute(query)
        ((value,),) = cursor.fetchall()
        return value


def others_run(turns: int = 20) -> None:
    """Return only when the hub has come round that often."""
    for _ in range(turns):
        gevent.sleep(0.002)


def use() -> int:
    with pool.connection(timeout=20) as conn:
        return int(ask(conn))


def until_told() -> None:
    gevent.socket.wait_read(sys.stdin.fileno())  # to read from a pipe would block the hub
    sys.stdin.readline()


def waiting_within_the_process() -> None:
    """The one that holds the slot gives it back only while the other waits: if that froze the hub,
    it never would."""
    held = pool.get_conn(timeout=20)
    pid = ask(held)
    waiter = gevent.spawn(use)
    while not pool.stats().waiting:
        gevent.sleep(0.002)
    others_run()
    assert not waiter.ready()
    pool.put_conn(held)
    assert waiter.get(timeout=20) == pid
    assert pool.stats().handed_on == 1


def many_greenlets() -> None:
    pids = [gevent.spawn(lambda: [use() for _ in range(20)]) for _ in range(20)]
    gevent.joinall(pids, timeout=60, raise_error=True)
    assert len({pid for job in pids for pid in job.get()}) <= pool.max_conn
    assert pool.stats().in_use == 0
    assert pool.stats().connects <= pool.max_conn


def many_greenlets_need_few_descriptors() -> None:
    """Hundreds wait at once, here and in another process."""
    before = len(os.listdir("/proc/self/fd"))
    held = pool.get_conn(timeout=20)  # the other process has the other one
    print("has one", flush=True)
    until_told()
    jobs = [gevent.spawn(use) for _ in range(300)]
    while pool.stats().waiting < 300:
        gevent.sleep(0.002)
    others_run()
    taken = len(os.listdir("/proc/self/fd")) - before
    assert taken < 150, taken
    pool.put_conn(held)
    gevent.joinall(jobs, timeout=60, raise_error=True)
    assert pool.stats().in_use == 0


def waiting_for_another_process() -> None:
    """The other process holds the slot until it reads that this one's hub goes on."""
    waiter = gevent.spawn(use)
    while not pool.stats().waiting:
        gevent.sleep(0.002)
    others_run()
    print("waiting", flush=True)
    waiter.get(timeout=30)


def idle_until_told() -> None:
    """Have an idle connection, and leave the pool alone: it is taken by the link's greenlet."""
    print(use(), flush=True)
    until_told()


def queries_overlap() -> None:
    """Each query waits for a lock that the other greenlet lets go."""
    with pool.connection(timeout=20) as first:
        ask(first, "SELECT pg_advisory_lock(1)")
        second = gevent.spawn(lambda: hold(pool.get_conn(timeout=20)))
        others_run()
        assert not second.ready()
        ask(first, "SELECT pg_advisory_unlock(1)")
        second.get(timeout=20)


def hold(conn: extensions.connection) -> None:
    ask(conn, "SELECT pg_advisory_lock(1)")
    ask(conn, "SELECT pg_advisory_unlock(1)")
    pool.put_conn(conn)


def a_close_lets_others_run() -> None:
    """A backend in the middle of a query does not leave at once: its end is waited for, up to a
    second."""
    conn = pool.get_conn(timeout=20)
    ask(conn)
    turns: list[None] = []

    def count() -> None:
        while True:
            gevent.sleep(0.002)
            turns.append(None)

    counter = gevent.spawn(count)
    busy = gevent.spawn(ask, conn, "SELECT pg_sleep(30)")
    gevent.sleep(0.05)
    busy.kill()
    before = len(turns)
    pool.put_conn(conn, close=True)
    assert len(turns) - before >= 10, len(turns) - before
    counter.kill()


def a_timeout_of_gevents_leaks_nothing() -> None:
    held = pool.get_conn(timeout=20)
    for _ in range(3):
        with gevent.Timeout(0.05, False):
            pool.get_conn(timeout=20)
            raise AssertionError("got one")
    assert pool.stats().waiting == 0
    killed = gevent.spawn(use)
    gevent.sleep(0.05)
    killed.kill()
    pool.put_conn(held)
    assert use()
    assert (pool.stats().in_use, pool.stats().idle) == (0, 1)


def a_timeout_of_the_pools_own() -> None:
    held = pool.get_conn(timeout=20)
    for timeout, error in ((0, sharedpool.PoolExhausted), (0.05, sharedpool.PoolTimeout)):
        try:
            pool.get_conn(timeout=timeout)
        except error:
            continue
        raise AssertionError("got one")
    pool.put_conn(held)


def a_killed_query_costs_its_connection_and_no_slot() -> None:
    def run() -> None:
        with pool.connection(timeout=20) as conn:
            ask(conn, "SELECT pg_sleep(60)")

    for _ in range(2):
        job = gevent.spawn(run)
        while not pool.stats().in_use:
            gevent.sleep(0.002)
        others_run()
        job.kill()
    assert use()
    assert pool.stats().in_use == 0


def a_fork() -> None:
    pid = use()
    held = pool.get_conn(timeout=20)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            others_run()  # the parent's link is here as well, as a greenlet
            with pool.connection(timeout=20) as conn:
                status = 0 if ask(conn) != pid else 2
            pool.release_all()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask(held) == pid
    pool.put_conn(held)
    assert use() == pid


def live_connections_move() -> None:
    """Write rows that say whose they are, each in a transaction of its own; wait for who else uses
    the slots."""
    me = os.getpid()

    def write(greenlet: int) -> None:
        for n in range(40):
            body = f"{me} {greenlet} {n} " * 50
            with pool.connection(timeout=30) as conn, conn.cursor() as cursor:
                cursor.execute(
                    "INSERT INTO moves VALUES (%s) RETURNING body, pg_backend_pid()", [body]
                )
                assert cursor.fetchone() == (body, conn.info.backend_pid)
                gevent.sleep(0)
                cursor.execute("SELECT count(*) FROM moves WHERE body = %s", [body])
                assert cursor.fetchone() == (1,)

    print("ready", flush=True)
    until_told()
    jobs = [gevent.spawn(write, greenlet) for greenlet in range(5)]
    gevent.joinall(jobs, timeout=60, raise_error=True)
    print(pool._local.adopted, flush=True)


def patched_late() -> None:
    """As in a gunicorn worker with --preload: imported and configured first, patched afterwards."""
    from gevent import monkey

    monkey.patch_all()
    psycogreen.gevent.patch_psycopg()
    waiting_within_the_process()


def without_psycogreen() -> None:
    """Queries block the hub then, but a wait for a lease does not."""
    waiting_within_the_process()


def without_psycogreen_from_another_process() -> None:
    print(use(), flush=True)


def ending() -> None:
    """Leave with an idle connection and one in use: atexit returns both."""
    print(use(), flush=True)
    held.append(pool.get_conn(timeout=20))


def connecting_can_be_given_up() -> None:
    """`settings` lead to a server that never answers."""
    with gevent.Timeout(0.2, False):
        pool.get_conn(timeout=20)
        raise AssertionError("got one")
    assert pool.stats().in_use == 0
    others = event.Event()
    gevent.spawn(others.set)
    try:
        pool.get_conn(timeout=1)
    except (psycopg2.OperationalError, sharedpool.PoolError):
        pass
    else:
        raise AssertionError("got one")
    assert others.is_set()
    assert pool.stats().in_use == 0


held: list[extensions.connection] = []
globals()[scenario]()
print("done", flush=True)
