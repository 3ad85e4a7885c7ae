"""Ends in good order: a broker that drains, processes that exit while something is wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import Piped, Worker, alive, workers
from tests.support.waiting import wait_until

# A process that hangs at its exit would be killed, and seen, after this.
EXIT_LIMIT_S = 30


@contextlib.contextmanager
def broker_process(address: str, dsn: str, *more: str) -> Iterator["subprocess.Popen[str]"]:
    """`sharedpool broker`, as supervisors run it; it is ready when this yields."""
    command = [
        sys.executable,
        "-m",
        "sharedpool",
        "broker",
        "--max-conn",
        "3",
        "--bind",
        address,
        "--dsn",
        dsn,
    ]
    with subprocess.Popen(
        [*command, "--ttl", "3", *more], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "workers find it" in line:
                    break
            yield process
        finally:
            process.kill()
            print("the broker's words:", process.stderr.read())  # shown when the test fails


@pytest.fixture
def address(runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir}/broker.sock"


# --- the broker drains


def test_sigterm_recalls_what_is_idle_waits_for_the_rest_and_lends_nothing_more(
    postgres: EphemeralPostgres, address: str
) -> None:
    with (
        broker_process(address, postgres.dsn, "--drain-timeout", "60") as process,
        Worker(dsn=postgres.dsn, broker=address, max_conn=3) as a,
        Worker(dsn=postgres.dsn, broker=address, max_conn=3) as b,
    ):
        a.ask("get", name="busy")
        a.ask("get", name="idle")
        a.ask("put", name="idle")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: fetch_report(address).leases == 1, what="the idle one to be recalled")
        assert fetch_report(address).state == "draining"
        started = time.monotonic()
        for timeout_s, text in (
            (0, "grants no connections"),
            (1, "no other broker came within 1 s"),
        ):
            refused = b.ask("get", name="x", timeout=timeout_s)
            assert refused["error"] == "BrokerUnavailable"
            assert text in refused["text"]
        assert 1 <= time.monotonic() - started < 5  # who does not wait is told at once
        assert a.ask("query", name="busy", sql="SELECT 1")["rows"] == [[1]]
        assert process.poll() is None
        a.ask("put", name="busy")
        assert process.wait(10) == 0


def test_a_planned_restart_costs_nobody_an_error_who_waits(
    postgres: EphemeralPostgres, address: str
) -> None:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": address,
        "max_conn": 3,
        "threads": True,
    }
    with workers(4, **settings) as crew, Worker(**settings) as a, Worker(**settings) as b:
        with broker_process(address, postgres.dsn) as first:
            a.ask("get", name="x")
            for worker in crew:  # some wait at the broker, some are just using what it lent
                worker.send("hammer", seconds=4, threads=3, timeout=30)
            b.ask("get", name="y", timeout=30)
            first.send_signal(signal.SIGTERM)
            wait_until(lambda: fetch_report(address).state == "draining")
            b.ask("put", name="y")
            b.send("get", name="y", timeout=30)  # asked for while the broker ends
            a.ask("put", name="x")
            assert first.wait(10) == 0
        with broker_process(address, postgres.dsn):
            assert "backend" in b.answer()
            assert "backend" in a.ask("get", name="x", timeout=30)
            outcomes = [worker.answer() for worker in crew]
            assert [outcome["errors"] for outcome in outcomes] == [[]] * 4
            assert all(outcome["done"] for outcome in outcomes)


@pytest.mark.long
def test_a_drain_ends_at_its_timeout_or_with_a_second_signal_and_breaks_nothing(
    postgres: EphemeralPostgres, address: str
) -> None:
    for more, signals in ((("--drain-timeout", "0.3"), 1), (("--drain-timeout", "600"), 2)):
        with (
            broker_process(address, postgres.dsn, *more) as process,
            Worker(dsn=postgres.dsn, broker=address) as worker,
        ):
            backend = worker.ask("get", name="x")["backend"]
            process.send_signal(signal.SIGTERM)
            wait_until(
                lambda process=process: (
                    process.poll() is not None or fetch_state(address) == "draining"
                )
            )
            if signals == 2:
                process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            assert worker.ask("query", name="x", sql="SELECT pg_backend_pid()")["rows"] == [
                [backend]
            ]
            worker.ask("put", name="x", close=True)


def fetch_state(address: str) -> str:
    try:
        return fetch_report(address, timeout_s=1).state
    except sharedpool.BrokerUnavailable:
        return "gone"


def test_a_broker_restarted_with_leases_out_knows_them_at_once(
    postgres: EphemeralPostgres, address: str
) -> None:
    with (
        Worker(dsn=postgres.dsn, broker=address, max_conn=3) as a,
        Worker(dsn=postgres.dsn, broker=address) as b,
    ):
        with broker_process(address, postgres.dsn) as first:
            held = a.ask("get", name="x")["backend"]
            a.ask("get", name="y")
            first.kill()
            first.wait()
            assert a.ask("query", name="x", sql="SELECT pg_backend_pid()") == {"rows": [[held]]}
            refused = b.ask("get", name="z", timeout=0.3)
            assert refused["error"] == "BrokerUnavailable"
        os.kill(a.pid, signal.SIGSTOP)  # it cannot say what it holds
        with broker_process(address, postgres.dsn):
            assert fetch_report(address).leases == 2
            assert "backend" in b.ask("get", name="z", timeout=5)
            os.kill(a.pid, signal.SIGCONT)
            wait_until(
                lambda: [p.suspect for p in fetch_report(address).pools] == [0],
                what="the worker's HELLO",
            )
            assert b.ask("get", name="w")["error"] == "PoolExhausted"
            assert a.ask("query", name="x", sql="SELECT pg_backend_pid()") == {"rows": [[held]]}
            assert fetch_report(address).custody == 3


def test_leases_of_a_worker_that_died_with_the_broker_come_back(
    postgres: EphemeralPostgres, address: str
) -> None:
    with Worker(dsn=postgres.dsn, broker=address, max_conn=3) as b:
        with (
            broker_process(address, postgres.dsn) as first,
            Worker(dsn=postgres.dsn, broker=address, max_conn=3) as a,
        ):
            for name in "xyz":
                a.ask("get", name=name)
            first.kill()
            first.wait()
            a.kill()
        with broker_process(address, postgres.dsn):
            for name in "xyz":
                assert "backend" in b.ask("get", name=name, timeout=5)


@pytest.mark.long
def test_without_its_journal_a_broker_waits_and_then_counts_what_the_server_shows(
    postgres: EphemeralPostgres, address: str
) -> None:
    journal = Path(address.removeprefix("ipc://") + ".journal")
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": address,
        "max_conn": 3,
        "name": "forgotten",
    }
    with Worker(**settings) as a, Worker(**settings) as b:
        with broker_process(address, postgres.dsn) as first:
            held = a.ask("get", name="x")["backend"]
            a.ask("get", name="y")
            first.kill()
            first.wait()
        journal.unlink()
        os.kill(a.pid, signal.SIGSTOP)  # nobody says what it holds
        with broker_process(address, postgres.dsn):
            assert fetch_report(address).state == "waiting"
            asked = time.monotonic()
            assert "backend" in b.ask("get", name="z", timeout=20)
            assert time.monotonic() - asked > 2  # of the TTL of 3 seconds
            assert fetch_report(address).leases == 3
            os.kill(a.pid, signal.SIGCONT)
            wait_until(
                lambda: [p.suspect for p in fetch_report(address).pools] == [0],
                what="the worker's HELLO",
            )
            assert b.ask("get", name="w")["error"] == "PoolExhausted"
            assert a.ask("query", name="x", sql="SELECT pg_backend_pid()") == {"rows": [[held]]}


# --- processes exit


SCRIPT = """
import os, sys, threading, time, signal
import sharedpool
pool = sharedpool.config_pool(
    max_conn=1, pool_manager=sharedpool.ThreadedConnectionPool,
    dsn=sys.argv[1], broker=sys.argv[2], name=sys.argv[3],
)
conn = pool.get_conn(timeout=20)
{body}
print("leaving", flush=True)
"""

BODIES = {
    "threads waiting": """
def wait():
    try:
        pool.get_conn(timeout=600)
    except sharedpool.PoolError:
        pass
threads = [threading.Thread(target=wait, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()
while pool.stats().waiting < 4:
    time.sleep(0.005)
""",
    "broker dead": """
print("ready", flush=True)
sys.stdin.readline()
""",
    "postgres dead": """
pool.put_conn(conn)
print("ready", flush=True)
sys.stdin.readline()
""",
    "after a fork": """
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)
conn.cursor().execute("SELECT 1")
""",
}


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize("case", BODIES)
def test_no_process_hangs_at_its_exit(
    case: str, postgres: EphemeralPostgres, address: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(body=BODIES[case]))
    own = EphemeralPostgres() if case == "postgres dead" else contextlib.nullcontext(postgres)
    with own as server, broker_process(address, server.dsn) as broker:
        command = [sys.executable, str(script), server.dsn, address, "exiting"]
        with Piped(*command, stderr=subprocess.PIPE) as process:
            if case in ("broker dead", "postgres dead"):
                assert process.line() == "ready"
                if case == "broker dead":
                    broker.kill()
                    broker.wait()
                else:
                    server.kill()
                process.tell("go")
            started = time.monotonic()
            _, errors = process.communicate(timeout=EXIT_LIMIT_S)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert time.monotonic() - started < EXIT_LIMIT_S
        if case not in ("broker dead", "postgres dead"):
            wait_until(lambda: fetch_report(address).leases == 0, what="the lease to be back")


def test_release_all_wakes_those_who_wait_and_returns_every_lease(
    postgres: EphemeralPostgres, address: str
) -> None:
    with broker_process(address, postgres.dsn):
        pool = sharedpool.config_pool(
            max_conn=1,
            pool_manager=sharedpool.ThreadedConnectionPool,
            dsn=postgres.dsn,
            broker=address,
        )
        conn = pool.get_conn(timeout=10)
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                pool.get_conn(timeout=600)
            except sharedpool.PoolError as error:
                errors.append(error)

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: pool.stats().waiting == 3)
        pool.release_all()
        for thread in threads:
            thread.join(10)
        assert [type(error) for error in errors] == [sharedpool.PoolClosed] * 3
        with pytest.raises(psycopg2.InterfaceError):
            conn.cursor()
        assert fetch_report(address).leases == 0


def test_cache_hits_need_no_broker_and_what_needs_one_says_so_by_its_deadline(
    postgres: EphemeralPostgres, address: str
) -> None:
    with Worker(dsn=postgres.dsn, broker=address, max_conn=3) as worker:
        with broker_process(address, postgres.dsn) as broker:
            worker.ask("get", name="x")
            worker.ask("put", name="x")
            broker.kill()
            broker.wait()
        for _ in range(3):
            assert "backend" in worker.ask("get", name="x")
            worker.ask("put", name="x")
        worker.ask("get", name="x")
        started = time.monotonic()
        refused = worker.ask("get", name="y", timeout=0.5)
        assert refused["error"] == "BrokerUnavailable"
        assert 0.4 < time.monotonic() - started < 5
    assert not alive(worker.pid)
