"""A broker's descriptors run out: it lives, lets nobody in meanwhile, and serves again when there is room."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_until

import sharedpool
from sharedpool.cli.postgres import EphemeralPostgres

START = "import resource, sys; n = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_NOFILE, (n, n));"
RUN = "import runpy; runpy.run_module('sharedpool', run_name='__main__')"


def open_in(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    return runtime_dir / "crowded.sock"


def broker_with(limit: int, path: Path, dsn: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", f"{START} {RUN}", str(limit), "broker", "--bind", f"ipc://{path}"]
    return subprocess.Popen([*command, "--max-conn", "2", "--dsn", dsn], stderr=subprocess.PIPE, text=True)


@pytest.fixture
def crowded(path: Path, postgres: EphemeralPostgres) -> "Iterator[subprocess.Popen[str]]":
    with broker_with(64, path, postgres.dsn) as process:
        try:
            wait_until(path.exists, 20)
            yield process
        finally:
            process.kill()


def test_a_broker_outlives_more_connects_than_it_has_descriptors(
    path: Path, crowded: "subprocess.Popen[str]", postgres: EphemeralPostgres
) -> None:
    pool = sharedpool.config_pool(max_conn=2, dsn=postgres.dsn, broker=f"ipc://{path}", name="crowded")
    conn = pool.get_conn(timeout=20)
    for _ in range(3):
        callers: list[socket.socket] = []
        while path.exists():
            before = open_in(crowded.pid)
            callers.append(socket.socket(socket.AF_UNIX))
            callers[-1].connect(str(path))
            wait_until(lambda before=before: open_in(crowded.pid) > before or not path.exists())
            assert len(callers) < 64
        assert crowded.poll() is None
        conn.cursor().execute("SELECT 1")
        pool.put_conn(conn, close=True)
        conn = pool.get_conn(timeout=20)  # who is in is served
        for each in callers:
            each.close()
        wait_until(path.exists, 20, what="the broker to let others in again")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    pool.put_conn(conn)
    pool.release_all()
    crowded.send_signal(signal.SIGTERM)
    assert "descriptors are left of 64" in crowded.communicate(timeout=20)[1]
    assert crowded.returncode == 0
    assert not list(path.parent.glob("crowded.sock.full"))


def test_a_broker_with_too_few_descriptors_says_so(path: Path, postgres: EphemeralPostgres) -> None:
    with broker_with(40, path, postgres.dsn) as process:
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert "a broker needs 48 descriptors and some four for each worker, and may have only 40 open" in said
