"""The broker's HTTP server, as clients good and bad meet it."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from sharedpool.broker.core.snapshot import Snapshot
from sharedpool.broker.metrics.http_server import HttpServer
from sharedpool.broker.metrics.service import MetricsService
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.reports import LeaseLine, Report
from sharedpool.wire.values import Token
from tests.integration.served_metrics import pool_on, served
from tests.support.broker_process import Broker
from tests.support.waiting import wait_until

__all__ = ["served"]  # pytest finds it here


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
