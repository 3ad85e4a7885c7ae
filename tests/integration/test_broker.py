"""How a broker is found, started, refused, left — automatic, owned by a script, or launched."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

import sharedpool
from sharedpool.broker.server.server import Server
from sharedpool.broker.settings import BrokerSettings
from sharedpool.cli.client import fetch_report
from sharedpool.discovery.address import journal_path
from sharedpool.discovery.lock_file import BrokerLock, is_held
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.codec import decode_to_worker, encode
from sharedpool.wire.messages import PROTOCOL_VERSION, Acquire, Grant, Hello, Welcome
from sharedpool.wire.reports import Report
from sharedpool.wire.values import PoolSpec
from tests.support.ports import free_port
from tests.support.processes import LONG, Piped, Worker, alive, workers
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHAREDPOOL_LINGER", "0.5")


def living(directory: Path) -> list[Report]:
    """The reports of all brokers in a runtime directory."""
    reports = []
    for path in sorted((directory / "sharedpool").glob("*.sock")):
        if is_held(Path(f"{path}.lock")):
            with contextlib.suppress(sharedpool.BrokerUnavailable):  # it left just now
                reports.append(fetch_report(f"ipc://{path}", timeout_s=1))
    return reports


# --- automatic


def test_unrelated_processes_find_one_broker_by_themselves(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    with Worker(dsn=postgres.dsn, max_conn=1) as a, Worker(dsn=postgres.dsn, max_conn=1) as b:
        a.ask("get", name="x")
        assert b.ask("get", name="x")["error"] == "PoolExhausted"
        wait_until(lambda: [report.control for report in living(runtime_dir)] == ["connected"])
        (report,) = living(runtime_dir)
        assert [session.pid for session in report.sessions] == [a.pid, b.pid]
    wait_until(lambda: not living(runtime_dir), what="the broker to leave when nobody uses it")
    wait_until(lambda: not alive(report.pid))


def test_many_processes_that_start_at_once_get_one_broker(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    count = 30 if LONG else 12
    with workers(count, dsn=postgres.dsn, max_conn=3, timeout=60) as crew:
        for worker in crew:
            worker.send("get", name="x", timeout=60)
            worker.send("put", name="x")
        answers = [[worker.answer(), worker.answer()] for worker in crew]
        assert all("backend" in got for got, _ in answers)
        (report,) = living(runtime_dir)
        (log,) = (runtime_dir / "sharedpool").glob("*.log")
        assert log.read_text().count("enforces") == 1  # no other one ever held the lock
        assert len(report.sessions) == count


def test_the_environment_makes_no_other_identity(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same server by keyword, by URL and by libpq's environment: one broker, one limit."""
    monkeypatch.setenv("PGHOST", str(postgres.host))
    monkeypatch.setenv("PGPORT", str(postgres.port))
    host = str(postgres.host).replace("/", "%2F")
    url = f"postgresql://postgres@/postgres?host={host}&port={postgres.port}"
    with (
        Worker(dsn=postgres.dsn, max_conn=1) as a,
        Worker(db_url=url, max_conn=1) as b,
        Worker(user="postgres", max_conn=1) as c,
    ):
        a.ask("get", name="x")
        assert [b.ask("get", name="x")["error"], c.ask("get", name="x")["error"]] == [
            "PoolExhausted"
        ] * 2
        assert len(living(runtime_dir)) == 1


def test_pools_of_other_names_have_limits_of_their_own(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    with (
        Worker(dsn=postgres.dsn, max_conn=1) as a,
        Worker(dsn=postgres.dsn, max_conn=1, name="reports") as b,
    ):
        assert "backend" in a.ask("get", name="x")
        assert "backend" in b.ask("get", name="x")


def test_an_automatic_broker_that_died_is_replaced_and_held_connections_live_on(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDPOOL_TTL", "1.5")
    with Worker(dsn=postgres.dsn, max_conn=2) as a, Worker(dsn=postgres.dsn, max_conn=2) as b:
        held = a.ask("get", name="x")["backend"]
        b.ask("get", name="x")
        b.ask("put", name="x")
        (report,) = living(runtime_dir)
        os.kill(report.pid, signal.SIGKILL)
        assert a.ask("query", name="x", sql="SELECT pg_backend_pid()")["rows"] == [[held]]
        b.ask("get", name="x")  # a cache hit needs no broker
        # Both have told the new one what they hold: it is counted, and no third connection is
        # granted.
        wait_until(lambda: (found := living(runtime_dir)) and found[0].leases == 2, timeout_s=30)
        assert living(runtime_dir)[0].epoch == report.epoch + 1
        assert a.ask("get", name="y")["error"] == "PoolExhausted"
        b.ask("put", name="x")
        assert "backend" in a.ask("get", name="y", timeout=20)


def test_of_many_workers_exactly_one_restarts_a_broker_that_died(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDPOOL_TTL", "3")
    with workers(12 if LONG else 6, dsn=postgres.dsn, max_conn=4, timeout=60, threads=True) as crew:
        for worker in crew:
            worker.ask("get", name="x", timeout=30)
            worker.ask("put", name="x")
        for rounds in range(1, 4):
            (report,) = living(runtime_dir)
            os.kill(report.pid, signal.SIGKILL)
            for worker in crew:
                worker.send("hammer", seconds=0.2, threads=1, timeout=30)
            assert [worker.answer()["errors"] for worker in crew] == [[]] * len(crew)
            wait_until(
                lambda: [len(r.sessions) for r in living(runtime_dir)] == [len(crew)], timeout_s=30
            )
            (log,) = (runtime_dir / "sharedpool").glob("*.log")
            assert log.read_text().count("enforces") == 1 + rounds


def test_without_a_control_connection_custody_gives_a_killed_workers_slots_back(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        sharedpool.start_broker(2) as broker,  # it knows of no server
        Worker(dsn=postgres.dsn, broker=broker.address, max_conn=2) as a,
        Worker(dsn=postgres.dsn, broker=broker.address, max_conn=2) as b,
    ):
        assert fetch_report(broker.address).control == "none"
        for name in "xy":
            a.ask("get", name=name, timeout=10)
        a.ask("query", name="x", sql="SELECT 1")  # in a transaction
        a.kill()
        for name in "xy":
            assert "backend" in b.ask("get", name=name, timeout=10)


def test_an_automatic_broker_heeds_the_signals_that_its_starter_ignores(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As uWSGI's master does while it loads an application."""
    monkeypatch.setenv("SHAREDPOOL_LINGER", "60")
    ignored = (signal.SIGTERM, signal.SIGCHLD)
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
        with Worker(dsn=postgres.dsn, max_conn=1) as worker:
            assert "backend" in worker.ask("get", name="x")
            (report,) = living(runtime_dir)
    finally:
        for number, handler in zip(ignored, before, strict=True):
            signal.signal(number, handler)
    os.kill(report.pid, signal.SIGTERM)
    wait_until(lambda: not alive(report.pid), 20, "its end")


def test_the_password_is_on_no_command_line_and_in_no_log(runtime_dir: Path) -> None:
    with EphemeralPostgres(password="s3cr3t-word") as server:
        dsn = make_dsn(server.dsn, password="s3cr3t-word")
        with Worker(dsn=dsn, max_conn=1) as worker:
            assert "backend" in worker.ask("get", name="x")
            # Its control connection needs the password: so it was handed down.
            wait_until(lambda: [report.control for report in living(runtime_dir)] == ["connected"])
            (report,) = living(runtime_dir)
            command = Path(f"/proc/{report.pid}/cmdline").read_bytes()
            assert b"sharedpool.broker" in command
            assert b"s3cr3t" not in command
            for path in (runtime_dir / "sharedpool").iterdir():
                if path.is_file():
                    assert "s3cr3t" not in path.read_text()
            assert "s3cr3t" not in repr(report)


def test_a_broker_that_cannot_start_says_why(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    pool = sharedpool.config_pool(dsn=postgres.dsn)
    address = Path(pool._broker.address().removeprefix("ipc://"))
    address.mkdir()  # libzmq cannot bind there
    try:
        with pytest.raises(sharedpool.BrokerUnavailable, match="did not start: cannot listen at"):
            pool.get_conn()
    finally:
        pool.release_all()


def test_a_broker_whose_address_another_has_taken_makes_way(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lock file was deleted, and somebody was faster than it: a cleaner must not make two
    brokers of one."""
    monkeypatch.setattr("sharedpool.broker.server.server._CHECK_FILES_EVERY_S", 0.1)
    address = f"ipc://{runtime_dir}/cleaned.sock"
    server = Server(BrokerSettings(address, 1))
    thread = threading.Thread(target=server.run)
    thread.start()
    other = BrokerLock(runtime_dir / "other.lock")
    (runtime_dir / "other.lock").rename(runtime_dir / "cleaned.sock.lock")
    thread.join(20)
    assert not thread.is_alive()
    assert "is another broker's by now: stopping" in caplog.text
    assert is_held(runtime_dir / "cleaned.sock.lock")
    assert (runtime_dir / "cleaned.sock").exists()  # it may be the other's
    other.release()


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


# --- a connect that cannot be


def test_refused_connects_free_their_slots(runtime_dir: Path, broker: sharedpool.Broker) -> None:
    pool = sharedpool.config_pool(
        max_conn=2, host=str(runtime_dir), user="nobody", name="nowhere", broker=broker.address,
        pool_manager=sharedpool.ThreadedConnectionPool,
    )  # fmt: skip
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            pool.get_conn(timeout=10)
        except psycopg2.OperationalError as error:
            errors.append(error)

    threads = [threading.Thread(target=connect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 8
    wait_until(
        lambda: [p.leases for p in fetch_report(broker.address).pools if p.name == "nowhere"] == [0]
    )
    pool.release_all()
