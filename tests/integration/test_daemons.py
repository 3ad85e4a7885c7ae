"""Programs that close descriptors which are not their own, as daemons do: what they open next is
left alone."""

import pytest

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import run_python

# DAEMONIZE closes all descriptors, in whatever process; `Foreign` takes the numbers that have
# become free.
SCRIPT = """
import ctypes, gc, os, socket, sys, threading, time
import psycopg2, sharedpool, sharedpool.worker.connection.handover

class Foreign:
    '''Sockets of the application, under the numbers that the pool had.

    Nothing may come in, nothing may end.
    '''

    def __init__(self):
        self.pairs = [socket.socketpair() for _ in range(20)]
        self.known = [os.fstat(each.fileno()) for pair in self.pairs for each in pair]

    def check(self):
        assert [os.fstat(each.fileno()) for pair in self.pairs for each in pair] == self.known
        for pair in self.pairs:
            for each in pair:
                each.setblocking(False)
                try:
                    raise AssertionError(f"in {each.fileno()}: {each.recv(1000)!r}")
                except BlockingIOError:
                    pass
            pair[0].send(b"mine")
            assert pair[1].recv(100) == b"mine"

def fork():
    if os.fork():
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))

def blind_fork():
    # What another thread holds at that moment, the child waits for: a program that forks so has to
    # see to it itself.
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    deadline = time.monotonic() + 5  # a kernel may not tell
    while not all(map(rests, others)) and time.monotonic() < deadline:
        os.sched_yield()
    if (child := ctypes.PyDLL(None).fork()):
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

def rests(thread):
    with open(f"/proc/self/task/{thread.native_id}/wchan") as where:
        return "poll" in where.read()

def close_all():
    os.closerange(3, 1000)

def raises(call, *arguments):
    try:
        call(*arguments)
    except (psycopg2.Error, sharedpool.PoolError):
        return
    raise AssertionError(f"{call} raised nothing")

def use(pool):
    conn = pool.get_conn(timeout=20)
    with conn.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        assert cursor.fetchone()[0] == conn.info.backend_pid
    pool.put_conn(conn)

dsn, address = sys.argv[1:]
pool = sharedpool.config_pool(
    max_conn=3, dsn=dsn, broker=address, name="daemon",
    pool_manager=sharedpool.ThreadedConnectionPool,
)
block, free = None, 3
BEFORE
DAEMONIZE
foreign = Foreign()
AFTER
use(pool)
foreign.check()
# Another session, as another daemon would have it: connections move between the two.
other = type(pool)(pool.config, pool._broker)
held = [pool.get_conn(timeout=20) for _ in range(free)]
for _ in range(5):
    pool.put_conn(held.pop(0))
    held.append(other.get_conn(timeout=20))
    other.put_conn(held.pop())
    held.append(pool.get_conn(timeout=20))
foreign.check()
for conn in held:
    pool.put_conn(conn, close=True)
assert pool.stats().adopted or not sharedpool.worker.connection.handover.SUPPORTED
other.release_all()
pool.release_all()
for each in (pool, other):
    # As time would: what is left of connections that have moved is closed.
    each._local.shells._trim(0)
gc.collect()
foreign.check()
print("done", flush=True)
"""

USED = (
    "use(pool); free = 2; inherited = pool.get_conn(timeout=20);"
    " inherited.cursor().execute('SELECT 1')"
)
CASES = {
    "configured, closed": ("", "close_all()", ""),
    "configured, two forks": ("", "fork(); os.setsid(); fork(); close_all()", ""),
    "used, two forks": (USED, "fork(); os.setsid(); fork(); close_all()", ""),
    "used, a fork that Python does not see": (USED, "blind_fork(); close_all()", ""),
    "an inherited connection is closed": (USED, "fork(); close_all()", "inherited.close()"),
    "so is one, by a fork that Python does not see": (
        USED,
        "blind_fork(); close_all()",
        "inherited.close()",
    ),
    "an inherited connection is put": (
        USED,
        "blind_fork(); close_all()",
        "raises(pool.put_conn, inherited)",
    ),
    "an inherited connection is dropped": (
        USED,
        "fork(); close_all()",
        "del inherited; gc.collect()",
    ),
    "within a block": (
        USED + "; free = 1; block = pool.connection(timeout=20); "
        "block.__enter__().cursor().execute('SELECT 1')",
        "fork(); close_all()",
        "raises(block.__exit__, None, None, None)",
    ),
    "within a block that fails": (
        USED + "; free = 1; block = pool.connection(timeout=20); "
        "block.__enter__().cursor().execute('SELECT 1')",
        "fork(); close_all()",
        "assert not block.__exit__(KeyError, KeyError(), None)",
    ),
    "disposed of before": (
        USED + "; pool.put_conn(inherited); pool.release_all(); free = 3",
        "close_all()",
        "pool = type(pool)(pool.config, pool._broker)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_daemons_descriptors_under_our_numbers_are_left_alone(
    case: str, postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    script = SCRIPT
    for name, code in zip(("BEFORE", "DAEMONIZE", "AFTER"), CASES[case], strict=True):
        script = script.replace(name + "\n", code + "\n")
    done = run_python(script, postgres.dsn, broker.address, PYTHONDEVMODE="0")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
