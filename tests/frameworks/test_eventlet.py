"""eventlet is not supported: who tries is told at once, and not left to wait for ever."""

import importlib.util
import subprocess
import sys

import pytest

from sharedpool.postgres.throwaway_server import EphemeralPostgres

# Not imported here: from then on it warns of every fork.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("eventlet") is None, reason="eventlet is not installed"
)

_APPLICATION = """
import eventlet
{before}
import sys, time
import sharedpool
{after}
broker, kind = "ipc:///no/such/broker.sock", sharedpool.ThreadedConnectionPool
pool = sharedpool.config_pool(
    max_conn=2, dsn=sys.argv[1], broker=broker, timeout=60, pool_manager=kind
)
for where in ("here", "in a greenlet"):
    began = time.monotonic()
    try:
        pool.get_conn() if where == "here" else eventlet.spawn(pool.get_conn).wait()
    except sharedpool.PoolError as error:
        print(where, time.monotonic() - began < 2, error)
"""


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_patched_process_is_told_at_once_what_to_use(
    postgres: EphemeralPostgres, place: str
) -> None:
    patch = {"before": "", "after": ""} | {place: "eventlet.monkey_patch()"}
    command = [sys.executable, "-c", _APPLICATION.format(**patch), postgres.dsn]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout.splitlines()
    assert [line.startswith(("here True", "in a greenlet True")) for line in said] == [
        True,
        True,
    ], done.stderr
    assert all(
        "does not work in a process that eventlet has monkey-patched" in line for line in said
    )
    assert "gthread" in said[0]
    assert "atexit" not in done.stderr
    assert done.returncode == 0
