"""What comes to the broker and is not a good worker's word: dropped, logged, and without effect."""

import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.codec import MAX_FRAME_BYTES, decode_to_worker, encode
from sharedpool.wire.desk import Deposit
from sharedpool.wire.messages import (
    PROTOCOL_VERSION,
    Acquire,
    Confirm,
    Hello,
    Reject,
    Release,
    ReleaseReason,
    Renew,
    Welcome,
)
from sharedpool.wire.values import Backend, PoolSpec, Token
from tests.integration.strangers import hello
from tests.support.broker_thread import line_to, server_in_a_thread
from tests.support.ports import free_port
from tests.support.processes import Worker
from tests.support.waiting import wait_until


def test_no_command_uses_a_zeromq_name_that_another_peer_may_have(runtime_dir: Path) -> None:
    """The broker would abort: libzmq counts from the same number in every process, and takes any
    name from a peer."""
    with (
        sharedpool.start_broker(5, address=f"ipc://{runtime_dir}/b.sock") as broker,
        ExitStack() as lines,
    ):
        for number in range(20):
            line = lines.enter_context(
                line_to(broker.address, b"\0" + (0x6B8B4567 + number).to_bytes(4))
            )
            line.send(hello("x", version=99))
            line.recv()
        for _ in range(3):
            assert fetch_report(broker.address).pid == broker.pid


def test_a_worker_of_protocol_1_is_told_what_to_install(broker: sharedpool.Broker) -> None:
    """Its HELLO cannot be decoded any more, but it begins as ours does."""
    first_version = [
        "hello",
        1,
        os.getpid(),
        "host",
        "app.py",
        ["default", 5, 60000, 0, "server"],
        [],
        0,
    ]
    with line_to(broker.address) as dealer:
        dealer.send(msgspec.msgpack.encode(first_version))
        answer = decode_to_worker(dealer.recv())
    assert isinstance(answer, Reject)
    assert answer.fatal
    assert (
        f"the broker speaks protocol {PROTOCOL_VERSION}, this worker 1: install the same"
        in answer.reason
    )


def test_other_peoples_tokens_and_words_out_of_order_change_nothing(
    broker: sharedpool.Broker, make_pool: Callable[..., sharedpool.Pool]
) -> None:
    pool = make_pool(max_conn=1)
    conn = pool.get_conn()
    (token,) = pool._local.cache.leases
    with line_to(broker.address) as dealer:
        for message in (
            Acquire(1, 0),  # before any HELLO
            Release(token, True, ReleaseReason.CLOSED),
            Hello(PROTOCOL_VERSION, os.getpid(), "", "bare", PoolSpec(pool.name, 1, 60_000)),
            Release(token, True, ReleaseReason.CLOSED),
            Confirm(token, Backend(1, 2, 3)),
            Confirm(Token(1, 1), Backend(1, 2, 3)),
            Renew([], Token(2**40, 5), gone=[token]),
            Renew([], token, answers=999, pending=[7]),
        ):
            dealer.send(encode(message))
        while not isinstance(decode_to_worker(dealer.recv()), Welcome):
            pass
        (report,) = [p for p in fetch_report(broker.address).pools if p.name == pool.name]
        assert (report.leases, report.in_use) == (1, 1)
        with pytest.raises(sharedpool.PoolExhausted):
            pool.get_conn()
    pool.put_conn(conn)


def test_an_oversized_message_costs_its_sender_the_line_and_nobody_else(
    broker: sharedpool.Broker, make_pool: Callable[..., sharedpool.Pool]
) -> None:
    pool = make_pool()
    with line_to(broker.address, b"too much") as dealer:
        dealer.send(b"x" * (MAX_FRAME_BYTES + 1))
        assert not any(
            s.title == "bare" and s.pool == "oversized"
            for s in fetch_report(broker.address).sessions
        )
        pool.put_conn(pool.get_conn())


def test_a_descriptor_that_is_no_socket_is_refused_at_the_desk(
    runtime_dir: Path, postgres: EphemeralPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"ipc://{runtime_dir}/desk.sock"
    caplog.set_level("WARNING", "sharedpool.broker")
    with (
        server_in_a_thread(address, dsn=postgres.dsn),
        Worker(dsn=postgres.dsn, broker=address) as worker,
        tempfile.TemporaryFile() as file,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as desk,
    ):
        worker.ask("get", name="x")
        wait_until(lambda: fetch_report(address).custody == 1)
        ours, theirs = socket.socketpair()
        desk.connect(f"{runtime_dir}/desk.sock.desk")
        good = encode(Deposit(b"nobody", Token(1, 1)))
        socket.send_fds(desk, [good], [file.fileno()])
        socket.send_fds(desk, [b"garbage"], [ours.fileno()])
        socket.send_fds(desk, [good], [ours.fileno(), theirs.fileno()])
        desk.send(good)
        socket.send_fds(desk, [good], [ours.fileno()])  # of a session and a lease that do not exist
        wait_until(
            lambda: caplog.text.count("dropped a malformed message at the desk") == 4,
            what="four words of warning",
        )
        assert fetch_report(address).custody == 1
        # What it did not keep it has closed: the other end sees it.
        ours.close()
        theirs.settimeout(10)
        assert theirs.recv(1) == b""
        theirs.close()
        assert worker.ask("query", name="x", sql="SELECT 1")["rows"] == [[1]]


def test_a_file_in_the_desks_place_is_kept_and_the_broker_does_without(
    runtime_dir: Path, postgres: EphemeralPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    (runtime_dir / "plain.sock.desk").write_text("precious")
    address = f"ipc://{runtime_dir}/plain.sock"
    with (
        server_in_a_thread(address, dsn=postgres.dsn),
        Worker(dsn=postgres.dsn, broker=address) as worker,
    ):
        assert "backend" in worker.ask("get", name="x", timeout=10)
        worker.ask("put", name="x", close=True)
        wait_until(lambda: fetch_report(address).leases == 0, 10, "the lease to be given back")
        assert fetch_report(address).custody == 0
    assert (runtime_dir / "plain.sock.desk").read_text() == "precious"
    assert "no desk at" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_users_words_are_dropped(
    runtime_dir: Path, postgres: EphemeralPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where the socket's mode lets them in: the kernel says who they are."""
    address = f"ipc://{runtime_dir}/open.sock"
    caplog.set_level("WARNING", "sharedpool.broker")
    with server_in_a_thread(address, dsn=postgres.dsn):
        runtime_dir.chmod(0o755)
        for path in runtime_dir.glob("open.sock*"):
            path.chmod(0o666)
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as desk:
                    desk.connect(f"{runtime_dir}/open.sock.desk")
                    with line_to(address) as dealer:
                        dealer.send(hello("intruder"))
                        refusal = decode_to_worker(dealer.recv())
                        assert isinstance(refusal, Reject)
                        assert refusal.fatal
                        assert refusal.reason.endswith(
                            "serves nobody else (but root), not uid 65534"
                        )
                        os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert fetch_report(address).sessions == []
    assert "dropped a message from uid 65534" in caplog.text
    assert "dropped a line to the desk from uid 65534" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("closed", ["socket", "directory"])
def test_another_user_is_told_whose_broker_it_is(
    closed: str, runtime_dir: Path, postgres: EphemeralPostgres
) -> None:
    address = f"ipc://{runtime_dir}/b.sock"
    blamed = runtime_dir / "b.sock" if closed == "socket" else runtime_dir
    with sharedpool.start_broker(1, address=address):
        if closed == "socket":
            runtime_dir.chmod(0o755)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                pool = sharedpool.config_pool(dsn=postgres.dsn, broker=address)
                for ask in (
                    lambda: pool.get_conn(timeout=0.3),
                    lambda: fetch_report(address, timeout_s=0.3),
                ):
                    try:
                        ask()
                    except sharedpool.BrokerUnavailable as error:
                        os.write(writing, f"{error}\n".encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as said:
            texts = said.read().splitlines()
        os.waitpid(child, 0)
        assert len(texts) == 2
        for text in texts:
            assert (
                f"{blamed} belongs to uid 0 and is closed to others, such as this process (uid "
                "65534)" in text
            )


def test_by_tcp_a_pid_counts_only_where_it_means_the_same_process(
    runtime_dir: Path, postgres: EphemeralPostgres
) -> None:
    """A worker in another PID namespace with this host's name, as in a pod: its pid is somebody
    else's here."""
    spec = PoolSpec("far", 1, 60_000)
    with (
        sharedpool.start_broker(3, address=f"tcp://127.0.0.1:{free_port()}", ttl=60.0) as broker,
        line_to(broker.address) as far,
        line_to(broker.address) as nowhere,
        Worker(dsn=postgres.dsn, broker=broker.address, name="near") as near,
    ):
        near.ask("get", name="x", timeout=10)
        for line, pid in ((far, near.pid), (nowhere, 2**22)):  # pid_max: nobody has it
            line.send(
                encode(
                    Hello(
                        PROTOCOL_VERSION,
                        pid,
                        socket.gethostname(),
                        "bare",
                        spec,
                        pid_namespace="another",
                    )
                )
            )
            assert isinstance(decode_to_worker(line.recv()), Welcome)
        near.kill()
        wait_until(
            lambda: (
                not any(
                    s.pool == "near" and not s.suspect
                    for s in fetch_report(broker.address).sessions
                )
            )
        )
        assert [s.title for s in fetch_report(broker.address).sessions if s.pool == "far"] == [
            "bare",
            "bare",
        ]
