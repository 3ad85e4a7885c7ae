"""Peers that flood the broker, or read no answers: they cost it neither memory nor its log."""

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import zmq

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.codec import decode_to_operator, encode
from sharedpool.wire.messages import PROTOCOL_VERSION, Hello, Renew
from sharedpool.wire.reports import Status
from sharedpool.wire.values import PoolSpec, Token
from tests.integration.strangers import hello
from tests.support.broker_thread import line_to
from tests.support.processes import Worker
from tests.support.waiting import wait_until


def rss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_a_worker_that_stops_reading_cannot_grow_the_broker(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    """It asks and asks, and never takes an answer."""
    with (
        sharedpool.start_broker(3, dsn=postgres.dsn) as broker,
        line_to(broker.address, b"deaf") as deaf,
        Worker(dsn=postgres.dsn, broker=broker.address) as worker,
    ):
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.send(hello("deaf"))

        def ask(times: int) -> None:
            for number in range(times):
                deaf.send(encode(Renew([], Token(1, 1), pending=[number])))
            assert fetch_report(broker.address, timeout_s=30).sessions  # it has taken them all in

        ask(5_000)
        before = rss_kib(broker.pid)
        ask(40_000)
        assert rss_kib(broker.pid) - before < 4096
        assert "backend" in worker.ask("get", name="x", timeout=10)


def test_a_peer_that_reads_no_answers_is_sent_no_more_of_them(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    """A report of many pools is big, and libzmq keeps a thousand for each line."""
    with (
        sharedpool.start_broker(3, dsn=postgres.dsn) as broker,
        line_to(broker.address, b"deaf") as deaf,
        ExitStack() as stack,
    ):
        for number in range(40):
            line = stack.enter_context(line_to(broker.address))
            name = f"{number} {'p' * 5000}"
            line.send(
                encode(Hello(PROTOCOL_VERSION, 1, "h" * 5000, "t" * 5000, PoolSpec(name, 1, 1000)))
            )
        wait_until(lambda: len(fetch_report(broker.address).sessions) == 40)
        report = fetch_report(broker.address)
        assert {(len(session.host), len(session.title)) for session in report.sessions} == {
            (255, 255)
        }
        assert len(encode(report)) > 200_000
        deaf.setsockopt(zmq.RCVHWM, 1)
        before = rss_kib(broker.pid)
        for _ in range(2_000):
            deaf.send(encode(Status(PROTOCOL_VERSION, 500)))
        assert fetch_report(broker.address, timeout_s=30).sessions  # it has taken them all in
        assert (
            rss_kib(broker.pid) - before < 32_000
        )  # 2,000 answers would be 800 MB, a thousand half of that
        for number in range(20):  # who reads goes on being answered
            assert decode_to_operator(deaf.recv())
            deaf.send(encode(Status(PROTOCOL_VERSION, read=number + 1)))


def test_garbage_does_not_fill_the_log(
    postgres: EphemeralPostgres, runtime_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with sharedpool.start_broker(3, dsn=postgres.dsn) as broker, line_to(broker.address) as line:
        for number in range(5_000):
            line.send(b"garbage %d" % number)
            if number % 10 == 0:
                line.send_multipart([b"three", b"frames"])
        assert fetch_report(broker.address, timeout_s=30).sessions == []
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as packets:
            packets.connect(f"{broker.address.removeprefix('ipc://')}.desk")
            for _ in range(1_000):
                packets.send(b"garbage")
        assert fetch_report(broker.address, timeout_s=30).sessions == []
    lines = capfd.readouterr().err.splitlines()
    assert (
        0 < sum("dropped" in each for each in lines) <= 30
    )  # by kind, and a few in every ten seconds


def test_no_more_may_wait_than_max_waiting(make_pool: Callable[..., sharedpool.Pool]) -> None:
    pool = make_pool(max_conn=1, max_waiting=1, pool_manager=sharedpool.ThreadedConnectionPool)
    conn = pool.get_conn()
    waiting = threading.Thread(target=lambda: pool.put_conn(pool.get_conn(timeout=30)))
    waiting.start()
    wait_until(lambda: pool.stats().waiting == 1)

    def crowded() -> bool:
        """The first one's request may still be on its way."""
        with pytest.raises((sharedpool.TooManyWaiting, sharedpool.PoolTimeout)) as caught:
            pool.get_conn(timeout=0.01)
        return isinstance(caught.value, sharedpool.TooManyWaiting) and "max_waiting" in str(
            caught.value
        )

    wait_until(crowded)
    pool.put_conn(conn)
    waiting.join(20)
    assert not waiting.is_alive()
