"""Forks that Python does not see, as uWSGI's: no hook runs in the child.

The parent's connections stay the parent's.
"""

import pytest

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import run_python

# The parent has one connection out, with a temporary table and an open transaction, and one idle.
# CHILD is run in a child process.
SCRIPT = """
import ctypes, glob, os, sys, time
import psycopg2, sharedpool

def switches():
    own = f"/proc/self/task/{os.getpid()}/status"
    others = sorted(set(glob.glob("/proc/self/task/*/status")) - {own})
    lines = [line for path in others for line in open(path)]
    return [line for line in lines if "ctxt_switches" in line]

def fork():
    # A thread that waited for the interpreter's lock would leave it unusable in the child. So all
    # others must be asleep: none has been scheduled for a while.
    before = None
    while before != (before := switches()):
        time.sleep(0.02)
    child = ctypes.PyDLL(None).fork()
    if child == 0:
        status = 1
        try:
            in_the_child()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"

def raises(kind, call, *arguments):
    try:
        call(*arguments)
    except kind as error:
        return str(error)
    raise AssertionError(f"{call} raised nothing")

def answer(conn, query):
    with conn.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]

def in_the_child():
    CHILD

dsn, address = sys.argv[1:]
manager = sharedpool.ThreadedConnectionPool
settings = dict(max_conn=3, dsn=dsn, broker=address, name="blind", pool_manager=manager)
pool = sharedpool.config_pool(**settings)
held, idle = pool.get_conn(timeout=10), pool.get_conn(timeout=10)
pids = [conn.info.backend_pid for conn in (held, idle)]
pool.put_conn(idle)
del idle
with held.cursor() as cursor:
    cursor.execute("CREATE TEMPORARY TABLE kept AS SELECT 42 AS answer")
held.commit()
with held.cursor() as cursor:
    cursor.execute("UPDATE kept SET answer = 43")
before = sharedpool.reset_after_fork(), pool._local  # in the process that made the pools: nothing
fork()
assert pool._local is before[1]
assert answer(held, "SELECT answer FROM kept") == 43
held.rollback()
assert answer(held, "SELECT answer FROM kept") == 42, "the child has committed the parent's work"
pool.put_conn(held)
conns = pool.get_conn(timeout=10), pool.get_conn(timeout=10)
kept = sorted(answer(conn, "SELECT pg_backend_pid()") for conn in conns)
assert kept == sorted(pids), "the parent lost a session"
pool.release_all()
"""

# Makes the connection `idle` one that the fast path has lent.
AGAIN = "pool.put_conn(idle)\nidle = pool.get_conn()\nassert pool._cache.hits == 1\n"

CASES = {
    "get_conn": """
    conn = pool.get_conn(timeout=10)
    assert answer(conn, "SELECT pg_backend_pid()") not in pids
    pool.put_conn(conn)
    pool.release_all()
""",
    "put_conn": """
    assert "belongs to process" in raises(sharedpool.PoolError, pool.put_conn, held)
""",
    "put_conn, close": """
    raises(sharedpool.PoolError, pool.put_conn, held, None, True)
""",
    "close of a connection": """
    held.close()
""",
    "release_all": """
    pool.release_all()
    raises(sharedpool.PoolClosed, pool.get_conn)
""",
    "purge_expired_connections": """
    pool._local.cache.expiration_s = 0.0
    assert pool.purge_expired_connections() == 0
""",
    "a new pool of the same name": """
    other = sharedpool.config_pool(**settings)
    conn = other.get_conn(timeout=10)
    assert answer(conn, "SELECT pg_backend_pid()") not in pids
    other.release_all()
""",
    "stats": """
    assert (pool.stats().idle, pool.stats().in_use) == (0, 0)
""",
    "reset_after_fork": """
    sharedpool.reset_after_fork()
    raises(psycopg2.OperationalError, answer, held, "SELECT answer FROM kept")
    conn = pool.get_conn(timeout=10)
    sharedpool.reset_after_fork()  # the second time: nothing
    assert answer(conn, "SELECT pg_backend_pid()") not in pids
    pool.put_conn(conn)
    assert pool.stats().idle == 1
    pool.release_all()
""",
}


def run(script: str, postgres: EphemeralPostgres, broker: sharedpool.Broker) -> None:
    done = run_python(script, postgres.dsn, broker.address)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_a_child_of_a_fork_that_nobody_saw_leaves_its_parents_sessions_alone(
    case: str, postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    run(SCRIPT.replace("    CHILD\n", CASES[case]), postgres, broker)


@pytest.mark.parametrize(
    "child",
    [
        "raises(psycopg2.Error, block.__exit__, None, None, None)",
        "assert not block.__exit__(KeyError, KeyError(), None)  # its own error it keeps",
    ],
    ids=["without an error", "with one"],
)
def test_a_child_that_leaves_its_parents_block_neither_commits_nor_rolls_back(
    child: str, postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    script = SCRIPT.replace("CHILD", child).replace(
        "held, idle = pool.get_conn(timeout=10), ",
        "block = pool.connection(timeout=10)\nheld, idle = block.__enter__(), ",
    )
    run(script, postgres, broker)


@pytest.mark.parametrize(
    ("wanted", "put"),
    [
        (0, "pool.put_conn(idle)"),
        (1, 'assert "belongs to process" in raises(sharedpool.PoolError, pool.put_conn, idle)'),
        (1, "pool.put_conn(idle, fail_silently=True)"),
    ],
    ids=["nobody wants it", "others wait", "others wait, silently"],
)
def test_a_child_that_puts_back_its_parents_clean_connection_does_not_lend_it(
    wanted: int, put: str, postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    """The fast path of `put_conn` does not see the fork, and need not."""
    child = f"""
    parents = pool._local.cache
    parents.returns_due, parents.moving_flag = {wanted}, [{wanted}]
    parents.next_scavenge_at = float("inf")
    {put}
    assert len(parents.idle) == 1, "not the fast path"
    conn = pool.get_conn(timeout=10)
    assert pool._local.cache is not parents
    assert answer(conn, "SELECT pg_backend_pid()") not in pids
    pool.release_all()
"""
    script = SCRIPT.replace("    CHILD\n", child)
    script = script.replace("pool.put_conn(idle)\ndel idle\n", AGAIN, 1)
    script = script.replace("pool.put_conn(held)\n", "pool.put_conn(held)\npool.put_conn(idle)\n")
    run(script, postgres, broker)
