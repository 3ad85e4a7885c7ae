"""The broker's metrics, as Prometheus reads them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.integration.served_metrics import pool_on, served
from tests.support.broker_process import POOL, STATE, Broker, running
from tests.support.processes import Worker, workers
from tests.support.waiting import wait_until

__all__ = ["served"]  # pytest finds it here

# OpenTelemetry's instruments, as Prometheus names them, and their kinds.
CONVENTIONS = {
    "db_client_connection_count": "gauge",
    "db_client_connection_idle_max": "gauge",
    "db_client_connection_max": "gauge",
    "db_client_connection_pending_requests": "gauge",
    "db_client_connection_timeouts": "counter",
    "db_client_connection_create_time_seconds": "histogram",
    "db_client_connection_wait_time_seconds": "histogram",
    "db_client_connection_use_time_seconds": "histogram",
}


def test_the_names_are_opentelemetrys_and_prometheus_reads_them(
    served: Broker, postgres: EphemeralPostgres
) -> None:
    with pool_on(served, postgres, "names", max_conn=3) as pool:
        pool.put_conn(pool.get_conn(timeout=20))
        wait_until(lambda: served.value("sharedpool_sessions", "names") == 1)
        families = served.families()
    assert {name: families[name].type for name in CONVENTIONS} == CONVENTIONS
    for name in CONVENTIONS:
        assert all(POOL in sample.labels for sample in families[name].samples), name
    ours = [name for name in families if name not in CONVENTIONS]
    assert all(name.startswith("sharedpool_") for name in ours)
    assert {
        "sharedpool_recalls",
        "sharedpool_fences",
        "sharedpool_sessions",
        "sharedpool_broker_epoch",
    } <= set(ours)
    assert all(family.documentation for family in families.values())


def test_connections_and_waiters_are_counted_as_they_are(
    served: Broker, postgres: EphemeralPostgres
) -> None:
    def used(state: str) -> float:
        return served.value("db_client_connection_count", "states", **{STATE: state})

    with pool_on(served, postgres, "states", max_conn=2) as pool:
        first, second = pool.get_conn(timeout=20), pool.get_conn(timeout=20)
        wait_until(lambda: used("used") == 2)
        assert served.value("db_client_connection_max", "states") == 2
        assert served.value("sharedpool_sessions", "states") == 1
        waiter = threading.Thread(target=lambda: pool.put_conn(pool.get_conn(timeout=20)))
        waiter.start()
        wait_until(lambda: served.value("db_client_connection_pending_requests", "states") == 1)
        pool.put_conn(first)
        waiter.join()
        first = pool.get_conn(timeout=20)

        def times_out() -> bool:
            """Return True if the broker itself has refused, and not the worker, when it is late."""
            with pytest.raises(sharedpool.PoolError) as raised:
                pool.get_conn(timeout=0.05)
            return "held most by" in str(raised.value)

        assert served.value("db_client_connection_timeouts_total", "states") == 0
        wait_until(times_out)
        wait_until(lambda: served.value("db_client_connection_timeouts_total", "states") >= 1)
        pool.put_conn(first)
        pool.put_conn(second)
        wait_until(lambda: used("idle") == 2)  # what was seen a moment ago may be shown again
        assert used("used") == served.value("db_client_connection_pending_requests", "states") == 0


def test_the_times_of_all_processes_are_added_up(
    served: Broker, postgres: EphemeralPostgres
) -> None:
    settings = {"dsn": postgres.dsn, "broker": served.address, "name": "fleet", "max_conn": 5}
    with workers(3, **settings) as crew:
        for worker in crew:
            worker.send("cycle", count=400)
        for worker in crew:
            worker.answer()
        wait_until(
            lambda: served.value("db_client_connection_wait_time_seconds_count", "fleet") == 1200
        )
        for worker in crew:  # past half a second every use is timed
            worker.ask("get", name="x", timeout=20)
            worker.ask("query", name="x", sql="SELECT pg_sleep(0.7)")
            worker.ask("put", name="x")
            worker.ask("cycle", count=10)  # told by the last message, however soon it ends
    name = "db_client_connection_use_time_seconds"
    # Nobody is left, but what was counted is.
    wait_until(lambda: served.value("sharedpool_sessions", "fleet") == 0)
    assert served.value("db_client_connection_wait_time_seconds_count", "fleet") == 1200 + 3 * 11
    longer = served.value(name + "_count", "fleet") - served.value(
        name + "_bucket", "fleet", le="0.5"
    )
    assert longer == 3
    assert served.value(name + "_bucket", "fleet", le="1.0") == served.value(
        name + "_count", "fleet"
    )
    assert served.value(name + "_sum", "fleet") >= 3 * 0.7
    created = served.value("db_client_connection_create_time_seconds_count", "fleet")
    assert created == served.value("sharedpool_grants_total", "fleet") >= 3


def test_short_uses_are_sampled_in_the_right_proportion(
    served: Broker, postgres: EphemeralPostgres
) -> None:
    with pool_on(served, postgres, "sampled", max_conn=2) as pool:
        for _ in range(150):
            conn = pool.get_conn(timeout=20)
            with conn.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(0.003)")
            conn.rollback()
            pool.put_conn(conn)
    name = "db_client_connection_use_time_seconds"
    wait_until(
        lambda: served.value("db_client_connection_wait_time_seconds_count", "sampled") == 150
    )
    assert served.value(name + "_count", "sampled") == pytest.approx(150, abs=15)
    assert (
        served.value(name + "_bucket", "sampled", le="0.0025") <= 1
    )  # the server slept for longer than that


def test_no_counter_goes_back_when_a_worker_is_killed_or_the_pool_is_left(
    served: Broker, postgres: EphemeralPostgres
) -> None:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": served.address,
        "name": "mortal",
        "max_conn": 2,
    }
    with Worker(**settings) as worker:
        worker.ask("cycle", count=30)
        wait_until(
            lambda: served.value("db_client_connection_wait_time_seconds_count", "mortal") == 30
        )
        worker.kill(signal.SIGKILL)
        wait_until(lambda: served.value("sharedpool_sessions", "mortal") == 0)
    assert served.value("db_client_connection_wait_time_seconds_count", "mortal") == 30
    with Worker(**settings) as worker:
        worker.ask("cycle", count=5)
    wait_until(lambda: served.value("db_client_connection_wait_time_seconds_count", "mortal") == 35)
    assert served.value("sharedpool_grants_total", "mortal") == 2


def test_a_restarted_broker_counts_from_nothing(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    """Else a rate over the restart would show all that a worker has ever done as if it were new."""
    with ExitStack() as stack:
        with running(postgres.dsn, runtime_dir) as first:
            worker = stack.enter_context(
                Worker(
                    dsn=postgres.dsn, broker=first.address, name="steady", max_conn=2, expiration=60
                )
            )
            worker.ask("cycle", count=200)
            wait_until(
                lambda: first.value("db_client_connection_wait_time_seconds_count", "steady") == 200
            )
            first.process.kill()
            first.process.wait()
        second = stack.enter_context(running(postgres.dsn, runtime_dir))
        wait_until(lambda: second.value("sharedpool_sessions", "steady") == 1, timeout_s=20)
        worker.ask("cycle", count=7)
        wait_until(
            lambda: second.value("db_client_connection_wait_time_seconds_count", "steady") == 7
        )


def test_any_pool_name_is_a_good_label(served: Broker, postgres: EphemeralPostgres) -> None:
    name = 'a "quoted"\\backslash\\n} 1, Größe'
    with pool_on(served, postgres, name, max_conn=1) as pool:
        pool.put_conn(pool.get_conn(timeout=20))
        wait_until(lambda: served.value("db_client_connection_max", name) == 1)


def test_a_broker_for_one_command_has_metrics_too(runtime_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fetch = (
        "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=20).read().decode())"
    )
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "sharedpool",
                "run",
                "--max-conn",
                "7",
                "--metrics",
                f"127.0.0.1:{port}",
                "--",
            ),
            *(sys.executable, "-c", fetch, f"http://127.0.0.1:{port}/metrics"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "sharedpool_broker_max 7" in done.stdout.splitlines(), done.stderr
