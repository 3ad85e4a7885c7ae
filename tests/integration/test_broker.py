"""A broker by its address: how it is found, owned by a script, refused, left; and words that are
none."""

import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.broker.server.server import Server
from sharedpool.broker.settings import BrokerSettings
from sharedpool.cli.client import fetch_report
from sharedpool.discovery.address import journal_path
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.codec import decode_to_worker, encode
from sharedpool.wire.messages import PROTOCOL_VERSION, Acquire, Grant, Hello, Welcome
from sharedpool.wire.values import PoolSpec
from tests.integration.living_brokers import short_linger
from tests.support.ports import free_port
from tests.support.processes import Piped, Worker, alive
from tests.support.waiting import wait_until

__all__ = ["short_linger"]  # pytest finds it here


# --- a broker by its address


def test_a_missing_broker_is_named_at_the_deadline(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    pool = sharedpool.config_pool(dsn=postgres.dsn, broker=f"ipc://{runtime_dir}/nobody.sock")
    with pytest.raises(
        sharedpool.BrokerUnavailable,
        match=r"nobody\.sock did not answer within 0\.[23].*sharedpool broker",
    ):
        pool.get_conn(timeout=0.2)
    pool.release_all()


def test_a_broker_that_starts_late_is_found(postgres: EphemeralPostgres, runtime_dir: Path) -> None:
    address = f"ipc://{runtime_dir}/late.sock"
    with Worker(dsn=postgres.dsn, broker=address) as worker:
        worker.send("get", name="x", timeout=60)
        with sharedpool.start_broker(3, address=address, dsn=postgres.dsn):
            assert "backend" in worker.answer()


def test_the_environment_names_the_broker(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sharedpool.start_broker(1, dsn=postgres.dsn) as broker:
        monkeypatch.setenv("SHAREDPOOL_BROKER", broker.address)
        with Worker(dsn=postgres.dsn, max_conn=5) as worker:
            worker.ask("get", name="x")
            assert worker.ask("stats")["max_conn"] == 1
            assert fetch_report(broker.address).sessions[0].pid == worker.pid


def test_a_tcp_broker_serves_and_notices_a_death(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    with (
        sharedpool.start_broker(
            1, address=f"tcp://127.0.0.1:{free_port()}", dsn=postgres.dsn
        ) as broker,
        Worker(dsn=postgres.dsn, broker=broker.address) as a,
        Worker(dsn=postgres.dsn, broker=broker.address) as b,
    ):
        a.ask("get", name="x")
        a.kill()
        assert "backend" in b.ask("get", name="x", timeout=20)


def test_an_owned_broker_ends_with_its_block_and_leaves_nothing(runtime_dir: Path) -> None:
    with sharedpool.start_broker(3) as broker:
        assert broker.is_alive
        assert fetch_report(broker.address).max_conn == 3
        assert fetch_report(broker.address).control == "none"
    assert not broker.is_alive
    assert list((runtime_dir / "sharedpool").iterdir()) == []


def test_an_owned_broker_ends_with_its_owner(runtime_dir: Path) -> None:
    script = (
        "import sharedpool, sys\n"
        "if __name__ == '__main__':\n"
        "    broker = sharedpool.start_broker(2)\n"
        "    print(broker.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    path = runtime_dir / "owner.py"
    path.write_text(script)
    with Piped(sys.executable, str(path)) as owner:
        pid = int(owner.line())
        owner.kill()
    wait_until(lambda: not alive(pid), what="the broker to end")


@pytest.mark.parametrize(
    "wrong",
    [{"max_conn": 0}, {"max_conn": 2.5}, {"max_conn": "5"}, {"ttl": 0}, {"ttl": float("nan")},
     {"expiration": -5}, {"max_checkout": 0}, {"address": "nowhere"}, {"dsn": "nonsense"}],
)  # fmt: skip
def test_start_broker_names_a_wrong_argument(wrong: dict[str, Any]) -> None:
    with pytest.raises(sharedpool.ConfigError, match=next(iter(wrong))):
        sharedpool.start_broker(**{"max_conn": 3} | wrong)


def test_a_second_broker_is_refused_and_the_first_not_disturbed(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    address = f"ipc://{runtime_dir}/one.sock"
    with sharedpool.start_broker(1, address=address, dsn=postgres.dsn) as first:
        for _ in range(3):
            with pytest.raises(sharedpool.BrokerUnavailable, match="already holds"):
                sharedpool.start_broker(9, address=address)
        with Worker(dsn=postgres.dsn, broker=address) as worker:
            assert "backend" in worker.ask("get", name="x")
        assert fetch_report(address).pid == first.pid


def test_the_broker_warns_when_the_server_has_less_room(
    postgres: EphemeralPostgres, runtime_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with sharedpool.start_broker(100, dsn=postgres.dsn):
        seen = ""

        def warned() -> bool:
            nonlocal seen
            seen += capfd.readouterr().err
            return "max_conn 100 and 1 control connection are more than the 97 connections" in seen

        wait_until(warned)


# --- messages that are not ours


def test_garbage_neither_stops_nor_changes_anything(
    broker: sharedpool.Broker, make_pool: Callable[..., Any]
) -> None:
    import zmq

    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    before = [p for p in fetch_report(broker.address).pools if p.name == pool.name]
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 1000)
    dealer.connect(broker.address)
    for frame in (
        b"",
        b"\xc1",
        b"\x93\x01\x02\x03",
        os.urandom(64),
        b"\x91\xa3bye",
        b"\x94\xa6renew",
    ):
        dealer.send(frame)
    dealer.send_multipart([b"one", b"two", b"three"])
    dealer.close()
    context.term()
    with pytest.raises(sharedpool.PoolExhausted):
        pool.get_conn()
    pool.put_conn(conn)
    assert pool.get_conn() is conn
    after = [p for p in fetch_report(broker.address).pools if p.name == pool.name]
    assert [(p.leases, p.sessions) for p in before] == [(p.leases, p.sessions) for p in after]


def test_no_grant_leaves_before_it_is_in_the_journal(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when many requests are there at once, whose grants are written and sent together."""
    import zmq

    most = 100
    address = f"ipc://{runtime_dir}/journal.sock"
    server = Server(BrokerSettings(address, most))
    send = server._router.send
    unwritten = []

    def looking(session: bytes, frame: bytes) -> None:
        message = decode_to_worker(frame)
        if isinstance(message, Grant):
            token = f'"token":[{message.token.epoch},{message.token.serial}]'
            if token not in journal_path(address).read_text():
                unwritten.append(token)
        send(session, frame)

    monkeypatch.setattr(server._router, "send", looking)
    thread = threading.Thread(target=server.run)
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVTIMEO, 20_000)
    dealer.connect(address)
    spec = PoolSpec("journal", most, 60_000)
    dealer.send(encode(Hello(PROTOCOL_VERSION, os.getpid(), socket.gethostname(), "journal", spec)))
    for request in range(1, most + 1):
        dealer.send(encode(Acquire(request, 20_000)))
    thread.start()
    try:
        assert isinstance(decode_to_worker(dealer.recv()), Welcome)
        granted = [decode_to_worker(dealer.recv()) for _ in range(most)]
        assert [each.request for each in granted if isinstance(each, Grant)] == list(
            range(1, most + 1)
        )
        assert unwritten == []
    finally:
        server.stop()
        thread.join(20)
        dealer.close()
        context.term()


def test_a_worker_of_another_protocol_is_told_so(
    runtime_dir: Path, postgres: EphemeralPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sharedpool.start_broker(1, dsn=postgres.dsn) as broker:
        monkeypatch.setattr("sharedpool.worker.session.PROTOCOL_VERSION", 99)
        pool = sharedpool.config_pool(dsn=postgres.dsn, broker=broker.address)
        with pytest.raises(
            sharedpool.BrokerUnavailable, match="install the same sharedpool version for both"
        ):
            pool.get_conn(timeout=10)
        pool.release_all()
