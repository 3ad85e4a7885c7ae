"""What comes to the broker and is not a good worker's word: dropped, logged, and without effect."""

import os
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import psycopg2
import pytest
import zmq

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.codec import MAX_FRAME_BYTES, decode_to_operator, decode_to_worker, encode
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
from sharedpool.wire.reports import Status
from sharedpool.wire.values import Backend, PoolSpec, Token
from tests.support.broker_thread import line_to, server_in_a_thread
from tests.support.ports import free_port
from tests.support.processes import Worker
from tests.support.waiting import wait_until


def hello(pool: str, version: int = PROTOCOL_VERSION) -> bytes:
    return encode(Hello(version, os.getpid(), "", "bare", PoolSpec(pool, 3, 60_000)))


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


# --- connects that fail


def test_a_connect_that_the_server_refuses_gives_its_slot_back_by_evidence(
    broker: sharedpool.Broker, postgres: EphemeralPostgres
) -> None:
    pool = sharedpool.config_pool(
        max_conn=1,
        dsn=postgres.dsn,
        dbname="no_such_database",
        broker=broker.address,
        name="refused",
    )
    for _ in range(
        5
    ):  # each needs the only slot; no other caller is to blame, so nothing is held back
        with pytest.raises(psycopg2.OperationalError, match="does not exist"):
            pool.get_conn(timeout=10)
    assert sum(p.quarantined for p in fetch_report(broker.address).pools) == 0
    pool.release_all()


def test_a_connect_that_nobody_answers_goes_into_quarantine_and_comes_back(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharedpool.broker.core.leases.QUEUE_LIMIT_S", 1.0)  # ten seconds
    address = f"ipc://{runtime_dir}/quarantine.sock"
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        server_in_a_thread(address, max_conn=1, dsn=postgres.dsn),
        Worker(
            host="127.0.0.1",
            port=silent.getsockname()[1],
            user="x",
            dbname="x",
            broker=address,
            name="silent",
        ) as worker,
    ):
        refused = worker.ask("get", name="x", timeout=1)
        assert refused["error"] == "OperationalError"
        assert "timeout expired" in refused["text"]
        # Something may be in between, with a queue of its own.
        wait_until(lambda: fetch_report(address).leases == 0, 20, "the quarantine to end")


def test_while_the_server_is_away_every_caller_gets_its_error_at_once(runtime_dir: Path) -> None:
    with EphemeralPostgres() as server, sharedpool.start_broker(3, dsn=server.dsn) as broker:
        settings: dict[str, Any] = {"dsn": server.dsn, "broker": broker.address, "max_conn": 3}
        with Worker(**settings) as a, Worker(**settings) as b:
            a.ask("get", name="x")
            a.ask("put", name="x")
            server.shutdown("immediate")
            # One that has just been put is not looked at; the broker tells of its end a moment
            # later.
            wait_until(
                lambda: a.ask("stats")["idle"] == 0, what="the idle connection to be dropped"
            )
            errors = [worker.ask("get", name="x", timeout=20)["error"] for worker in (a, b, a, b)]
            assert set(errors) <= {"OperationalError", "ServerUnavailable"}
            assert "ServerUnavailable" in errors
            server.start()
            for worker, name in (
                (a, "x"),
                (b, "y"),
                (b, "z"),
            ):  # the second may come before the first one's word
                wait_until(
                    lambda w=worker, n=name: "backend" in w.ask("get", name=n, timeout=5),
                    timeout_s=10,
                )
