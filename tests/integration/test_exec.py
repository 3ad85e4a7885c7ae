"""A process that replaces itself by exec: its pid lives on, its program and all that it held are
gone."""

import os
import sys
from pathlib import Path

import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import Piped, Worker
from tests.support.waiting import wait_until

# Long beyond the patience of these tests: what comes back, comes back by other evidence than
# silence.
TTL_S = 120.0

PROGRAM = """
import atexit, os, sys, sharedpool
dsn, broker, how = sys.argv[1:4]
pool = sharedpool.config_pool(max_conn=1, dsn=dsn, broker=broker, timeout=20)
conn = pool.get_conn()
conn.cursor().execute("SELECT 1")
if how in ("idle", "at its exit"):
    pool.put_conn(conn)
other = [sys.executable, "-c", "import sys; print('other', flush=True); sys.stdin.read()"]
if how == "again":
    other[2] = (
        "import sys, sharedpool;"
        "pool = sharedpool.config_pool(max_conn=1, dsn=sys.argv[1], broker=sys.argv[2]);"
        "conn = pool.get_conn(timeout=20); print('other', flush=True); sys.stdin.read()"
    )
    other += [dsn, broker]
if how == "in a query":
    import threading
    sleep = lambda: conn.cursor().execute("SELECT pg_sleep(600)")
    threading.Thread(target=sleep, daemon=True).start()
    with __import__("psycopg2").connect(dsn) as look, look.cursor() as cursor:
        while True:
            ask = "SELECT state = 'active' FROM pg_stat_activity WHERE pid = %s"
            cursor.execute(ask, [conn.info.backend_pid])
            if cursor.fetchone() == (True,):
                break
if how == "at its exit":  # registered last, it runs first
    atexit.register(os.execv, sys.executable, other)
    sys.exit(0)
os.execv(sys.executable, other)
"""


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize("how", ["idle", "checked out", "in a query", "at its exit", "again"])
def test_the_leases_of_a_process_come_back_when_it_runs_another_program(
    how: str, postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    address = f"ipc://{runtime_dir}/b.sock"
    with (
        sharedpool.start_broker(1, address=address, dsn=postgres.dsn, ttl=TTL_S),
        Worker(dsn=postgres.dsn, broker=address, max_conn=1) as worker,
        Piped(sys.executable, "-c", PROGRAM, postgres.dsn, address, how) as process,
    ):
        assert process.line() == "other"
        if how == "again":
            sessions = [session.pid for session in fetch_report(address).sessions]
            assert sessions.count(process.pid) == 1
            process.tell_no_more()
        answer = worker.ask("get", name="x", timeout=20)
        assert "backend" in answer, answer
        assert answer["waited"] < 10
        assert how == "again" or process.poll() is None
        process.kill()


def test_a_worker_that_registers_again_is_not_taken_for_another_program(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    """It goes to the desk anew, and leaves its former line there."""
    address = f"ipc://{runtime_dir}/b.sock"
    with (
        sharedpool.start_broker(1, address=address, dsn=postgres.dsn, ttl=1.5) as broker,
        Worker(dsn=postgres.dsn, broker=address, max_conn=1) as worker,
    ):
        backend = worker.ask("get", name="x", timeout=20)["backend"]
        os.kill(broker.pid, 19)  # until it is missed
        silent = worker.ask("query", name="x", sql="SELECT pg_sleep(4)")
        assert "rows" in silent
        os.kill(broker.pid, 18)
        wait_until(lambda: [s.in_use for s in fetch_report(address).sessions] == [1])
        assert worker.ask("query", name="x", sql="SELECT pg_backend_pid()") == {"rows": [[backend]]}
        worker.ask("put", name="x")
        assert worker.ask("get", name="x", timeout=20)["backend"] == backend
