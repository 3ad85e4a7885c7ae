"""A broker that nobody has started: how workers find, start and replace it."""

import os
import signal
import threading
from pathlib import Path

import pytest
from psycopg2.extensions import make_dsn

import sharedpool
from sharedpool.broker.server.server import Server
from sharedpool.broker.settings import BrokerSettings
from sharedpool.cli.client import fetch_report
from sharedpool.discovery.lock_file import BrokerLock, is_held
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.integration.living_brokers import living, short_linger
from tests.support.processes import LONG, Worker, alive, workers
from tests.support.waiting import wait_until

__all__ = ["short_linger"]  # pytest finds it here


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
