"""The broker's metrics, as Prometheus reads them, and its HTTP server, as clients good and bad meet
it."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.broker.core.snapshot import Snapshot
from sharedpool.broker.metrics.http_server import HttpServer
from sharedpool.broker.metrics.service import MetricsService
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.reports import LeaseLine, Report
from sharedpool.wire.values import Token
from tests.support.broker_process import POOL, STATE, Broker, running
from tests.support.processes import Worker, workers
from tests.support.waiting import wait_until

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


@pytest.fixture(scope="module")
def served(postgres: EphemeralPostgres) -> Iterator[Broker]:
    directory = Path(tempfile.mkdtemp(prefix="spm-", dir="/tmp"))
    with running(postgres.dsn, directory) as broker:
        yield broker
    shutil.rmtree(directory)


@contextmanager
def pool_on(
    served: Broker, postgres: EphemeralPostgres, name: str, **more: Any
) -> Iterator[sharedpool.Pool]:
    pool = sharedpool.config_pool(
        dsn=postgres.dsn,
        broker=served.address,
        name=name,
        pool_manager=sharedpool.ThreadedConnectionPool,
        **more,
    )
    try:
        yield pool
    finally:
        pool.release_all()


# --- what is measured


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


# --- HTTP


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_written(served: Broker, method: str) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        connection.request(method, "/metrics", body=b"x" * 10_000)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_head_answers_as_get_does_without_the_body(served: Broker) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        connection.request("HEAD", "/")
        answer = connection.getresponse()
        assert answer.status == 200
        assert int(answer.headers["Content-Length"]) == len(served.fetch("/").encode())
        assert answer.read() == b""


@pytest.mark.parametrize(
    "path", ["/nothing", "/../web.py", "/page/../web.py", "//etc/passwd", "/metrics/"]
)
def test_only_what_there_is_is_found(served: Broker, path: str) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        connection.request("GET", path)
        assert connection.getresponse().status == 404


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/page.css", "/status.json", "/metrics", "/nothing"]
)
def test_every_answer_forbids_what_the_page_does_not_need(served: Broker, path: str) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        connection.request("GET", path)
        headers = connection.getresponse().headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9187", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("evil.example:80", 421),
    ],
)
def test_a_name_that_a_stranger_can_point_here_is_refused(
    served: Broker, host: str, status: int
) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        connection.request("GET", "/status.json", headers={"Host": host})
        assert connection.getresponse().status == status


def test_clients_that_hang_keep_nobody_out(served: Broker) -> None:
    with ExitStack() as stack:
        hanging = [
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            for _ in range(60)
        ]
        for number, client in enumerate(hanging):
            if number % 2:
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: loc")
        started = time.monotonic()
        assert "sharedpool_broker_epoch" in served.fetch("/metrics")
        assert time.monotonic() - started < 5
        assert (
            fetch_report(served.address, 3.0).state == "serving"
        )  # and the broker has not noticed
        hanging[0].settimeout(5)
        assert hanging[0].recv(100) == b""  # it had to make room


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\xff\xfe\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://[ HTTP/1.0\r\n\r\n",
        b"FROBNICATE / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: \xff\xfe\r\n\r\n",
        b"GET / HTTP/1.0\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.0\r\n\r\n",
        b"GET /metrics HTTP/1.0\r\n\r\n" + b"more" * 100_000,
    ],
    ids=lambda text: repr(text[:24]),
)
def test_no_request_disturbs_the_next(served: Broker, request_bytes: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
        try:
            client.sendall(request_bytes)
            while client.recv(65536):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass  # it has had enough
    assert "sharedpool_broker_epoch" in served.fetch("/metrics")
    assert "Traceback" not in served.log.read_text()


def test_a_broker_that_does_not_answer_is_said_so() -> None:
    def late(limit_s: float) -> Snapshot:
        raise TimeoutError

    web = HttpServer("127.0.0.1", 0, late)
    web.start()
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{web.port}/metrics", timeout=10)
        assert caught.value.code == 503
        caught.value.close()
    finally:
        web.stop()


def test_a_lease_that_no_process_holds_names_none() -> None:
    parked = LeaseLine(Token(1, 2), "app", 0, "", "", "", "parked", 900)
    report = Report(1, 17, 4711, "ipc:///x", 61_500, 20, 1, "connected", [], [])
    web = HttpServer("127.0.0.1", 0, lambda _: Snapshot(report, [], [parked]))
    web.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{web.port}/status.json") as answer:
            (row,) = json.load(answer)["leases"]
    finally:
        web.stop()
    assert (row["lease"], row["state"], row["process"]) == ("1-2", "parked", "")


def test_a_reader_waits_no_longer_than_its_limit_and_not_at_all_for_a_broker_that_ends() -> None:
    calls: list[object] = []
    service = MetricsService(
        "127.0.0.1:0", calls.append, lambda now: pytest.fail("nobody runs the calls")
    )
    with pytest.raises(TimeoutError):
        service.snapshot(0.05)
    outcome: list[str] = []

    def look() -> None:
        try:
            service.snapshot(60)
        except TimeoutError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=look)
    thread.start()
    wait_until(lambda: len(calls) == 2)
    service.stop()
    thread.join(10)
    assert outcome == ["the broker is ending"]
    with pytest.raises(TimeoutError, match="ending"):
        service.snapshot(60)


def test_the_status_names_every_lease(served: Broker, postgres: EphemeralPostgres) -> None:
    with pool_on(served, postgres, "rows", max_conn=2) as pool:
        conn = pool.get_conn(timeout=20)

        def rows() -> list[dict[str, Any]]:
            found = json.loads(served.fetch("/status.json"))["leases"]
            return [row for row in found if row["pool"] == "rows" and row["thread"]]

        (row,) = wait_until(rows)
        assert row["backend"] == conn.info.backend_pid
        assert row["state"] == "in use"
        assert row["thread"] == "MainThread"
        assert row["for_ms"] >= 0
        pool.put_conn(conn)


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


@pytest.mark.parametrize(
    ("metrics", "status", "complaint"),
    [
        ("nonsense", 2, "--metrics"),
        ("127.0.0.1:99999", 2, "--metrics"),
        ("192.0.2.1:9187", 1, "cannot serve metrics"),
    ],
)
def test_a_wrong_address_is_named(
    metrics: str, status: int, complaint: str, runtime_dir: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sharedpool", "broker", "--max-conn", "1", "--metrics", metrics],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, complaint in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr
