"""A forked child and its parent's sessions."""

from typing import Any

import pytest

import sharedpool
from tests.support.processes import run_python

FORK = """
import os, resource, socket, sys, psycopg2, sharedpool
dsn, address = sys.argv[1:]
pool = sharedpool.config_pool(max_conn=3, dsn=dsn, broker=address, name="forked")
idle, held = pool.get_conn(), pool.get_conn()
pids = {idle.info.backend_pid, held.info.backend_pid}
pool.put_conn(idle)
del idle
CASE
child = os.fork()
if child == 0:
    status = 0
    try:
        held.cursor().execute("SELECT 1")
        status |= 1  # the parent's session was used
    except psycopg2.Error:
        pass
    held.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    if sharedpool.get_pool("forked").get_conn(timeout=20).info.backend_pid in pids:
        status |= 2
    os._exit(status)
_, status = os.waitpid(child, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
with held.cursor() as cursor:
    cursor.execute("SELECT pg_backend_pid()")
    assert cursor.fetchone()[0] in pids
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize(
    "case",
    [
        "limits = resource.getrlimit(resource.RLIMIT_NOFILE)",
        # A fork when no descriptor is free.
        "limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))\n"
        "try:\n    taken = [os.dup(0) for _ in range(100)]\nexcept OSError:\n    pass",
        # Descriptors beyond a limit that was lowered: not even dup2 works.
        "limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))",
        # A fork when the pool of a connection that is out has been replaced.
        "limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "pool = sharedpool.config_pool(max_conn=3, dsn=dsn, broker=address, name='forked')",
    ],
    ids=["plain", "no descriptor free", "limit lowered", "pool replaced"],
)
def test_a_forked_child_never_has_its_parents_sessions(
    case: str, postgres: Any, broker: sharedpool.Broker
) -> None:
    done = run_python(FORK.replace("CASE", case), postgres.dsn, broker.address)
    assert done.stdout.strip() == "0", done.stderr
