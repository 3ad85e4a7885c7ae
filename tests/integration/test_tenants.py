"""Many databases of one server in one program: one automatic broker, one link, and a limit for each
pool."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import connection, make_dsn

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.discovery import address as addresses
from sharedpool.discovery.lock_file import is_held
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import Piped, run_python
from tests.support.waiting import wait_until

TENANTS = [f"tenant{number}" for number in range(4)]


@pytest.fixture
def tenants(
    server_connection: connection, postgres: EphemeralPostgres
) -> Iterator[Callable[[str], str]]:
    """Databases of one server; called with a name it returns the conninfo string."""
    with server_connection.cursor() as cursor:
        for name in TENANTS:
            cursor.execute(f"CREATE DATABASE {name}")
    yield lambda name: make_dsn(postgres.dsn, dbname=name)
    with server_connection.cursor() as cursor:
        for name in TENANTS:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def lingering(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[str]]]:
    """Returns the addresses of the automatic brokers of a private runtime directory; they have left
    at the end."""
    monkeypatch.setenv("SHAREDPOOL_LINGER", "0.2")

    def living() -> list[str]:
        sockets = (runtime_dir / "sharedpool").glob("*.sock")
        return [
            f"ipc://{path}" for path in sockets if is_held(addresses.lock_path(f"ipc://{path}"))
        ]

    yield living
    wait_until(lambda: not living(), 30, "the automatic broker to leave")


def database_of(pool: sharedpool.Pool) -> str:
    with pool.connection(timeout=10) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        return str(cursor.fetchone()[0])  # type: ignore[index]


def test_pools_of_one_name_in_several_databases_have_one_broker_and_a_limit_each(
    tenants: Callable[[str], str], lingering: Callable[[], list[str]], server_connection: connection
) -> None:
    with contextlib.ExitStack() as stack:
        pools = []
        for name in TENANTS:
            pools.append(sharedpool.config_pool(max_conn=1, dsn=tenants(name)))
            stack.callback(pools[-1].release_all)
        held = [pool.get_conn(timeout=10) for pool in pools]
        assert [conn.info.dbname for conn in held] == TENANTS
        for pool in pools:
            with pytest.raises(sharedpool.PoolExhausted, match="limit of 1 "):
                pool.get_conn()
        (address,) = lingering()
        report = fetch_report(address)
        assert [pool.name for pool in report.pools] == [
            "default",
            *(f"default/{name}" for name in TENANTS[1:]),
        ]
        assert [pool.leases for pool in report.pools] == [1] * len(TENANTS)
        (tag,) = {conn.info.parameter_status("application_name") for conn in held}
        assert tag is not None
        assert tag.startswith("sharedpool default [")
        with server_connection.cursor() as cursor:
            cursor.execute(
                "SELECT datname FROM pg_stat_activity WHERE application_name = %s ORDER BY datname",
                [tag],
            )
            assert [datname for (datname,) in cursor.fetchall()] == TENANTS
        for pool, conn in zip(pools, held, strict=True):
            pool.put_conn(conn)


@pytest.mark.long
def test_a_successor_without_a_journal_counts_each_databases_connections_in_its_pool(
    tenants: Callable[[str], str],
    lingering: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two programs hold the only connection of their databases, and are silent; broker and journal
    are lost."""
    script = """
import sys, sharedpool
pool = sharedpool.config_pool(max_conn=1, dsn=sys.argv[1])
conn = pool.get_conn(timeout=20)
print("held", flush=True)
sys.stdin.read()
"""
    monkeypatch.setenv("SHAREDPOOL_TTL", "2")
    holders = []
    with contextlib.ExitStack() as stack:
        for name in TENANTS[:2]:
            holder = stack.enter_context(Piped(sys.executable, "-c", script, tenants(name)))
            stack.callback(holder.kill)
            assert holder.line() == "held"
            holders.append(holder)
        (address,) = lingering()
        for holder in holders:
            holder.send_signal(signal.SIGSTOP)
        os.kill(fetch_report(address).pid, signal.SIGKILL)
        wait_until(lambda: not lingering(), what="the broker's end")
        addresses.journal_path(address).unlink()
        other = sharedpool.config_pool(max_conn=1, dsn=tenants(TENANTS[0]), name="other")
        stack.callback(other.release_all)
        assert database_of(other) == TENANTS[0]  # after the grace period
        counted = {
            pool.name: pool.leases for pool in fetch_report(address).pools if pool.name != "other"
        }
        assert sorted(counted.values()) == [1, 1]
        assert set(counted) in ({"default", f"default/{name}"} for name in TENANTS[:2])
    for name in TENANTS[:2]:  # the programs have ended
        pool = sharedpool.config_pool(max_conn=1, dsn=tenants(name))
        assert database_of(pool) == name
        pool.release_all()


PROGRAM = """
import os, resource, sys
import sharedpool
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
pools = [
    sharedpool.config_pool(max_conn=2, dsn=sys.argv[1], name=f"tenant{number}", timeout=20)
    for number in range(200)
]
held = []
for number, pool in enumerate(pools):
    conn = pool.get_conn()
    with conn.cursor() as cursor:
        cursor.execute("SELECT 1")
    if number % 5 == 0:
        held.append((pool, conn))
    else:
        pool.put_conn(conn, close=True)
print(len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")) - 2 * len(held))
for pool, conn in held:
    pool.put_conn(conn)
print(sum(pool.stats().connects for pool in pools))
"""


@pytest.mark.long
def test_two_hundred_pools_in_a_process_need_three_threads_and_few_descriptors(
    postgres: EphemeralPostgres, lingering: Callable[[], list[str]]
) -> None:
    done = run_python(PROGRAM, postgres.dsn, timeout_s=100)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    threads, descriptors = map(int, first.split())
    assert threads <= 1 + 3
    assert descriptors < 40
    assert second == "200"


def test_a_database_can_be_dropped_when_its_pool_is_closed(
    tenants: Callable[[str], str], lingering: Callable[[], list[str]], server_connection: connection
) -> None:
    """Though the broker serves on, for the others."""
    first, second = (
        sharedpool.config_pool(max_conn=1, dsn=tenants(n), name=n) for n in TENANTS[:2]
    )
    try:
        assert [database_of(first), database_of(second)] == TENANTS[:2]
        first.release_all()
        with server_connection.cursor() as cursor:
            cursor.execute(f"DROP DATABASE {TENANTS[0]}")
            cursor.execute(f"CREATE DATABASE {TENANTS[0]}")
        assert database_of(second) == TENANTS[1]
    finally:
        with contextlib.suppress(sharedpool.PoolClosed):
            first.release_all()
        second.release_all()
    assert lingering()
    assert psycopg2.connect(tenants(TENANTS[0])).closed == 0
