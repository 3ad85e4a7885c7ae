"""A cleaner deletes a broker's files."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.processes import Worker, alive
from tests.support.waiting import wait_until

SUFFIXES = {"socket": "", "lock": ".lock", "journal": ".journal", "desk": ".desk"}


@pytest.fixture
def path(runtime_dir: Path) -> Path:
    directory = runtime_dir / "own"
    directory.mkdir(mode=0o700)
    return directory / "b.sock"


def files(path: Path) -> dict[str, Path]:
    return {what: path.with_name(path.name + suffix) for what, suffix in SUFFIXES.items()}


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize(
    "gone", [["socket"], ["lock"], ["journal"], ["desk"], list(SUFFIXES), ["directory"]]
)
def test_files_that_a_cleaner_deletes_are_made_anew_while_workers_live(
    gone: list[str], path: Path, postgres: EphemeralPostgres, capfd: pytest.CaptureFixture[str]
) -> None:
    address = f"ipc://{path}"
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    with (
        sharedpool.start_broker(1, address=address, dsn=postgres.dsn) as broker,
        Worker(**settings) as old,
    ):
        backend = old.ask("get", name="x", timeout=20)["backend"]
        before = fetch_report(address)
        assert before.pid == broker.pid
        if gone == ["directory"]:
            shutil.rmtree(path.parent)
        else:
            for what in gone:
                files(path)[what].unlink()
        wait_until(
            lambda: all(each.exists() for each in files(path).values()), what="the broker to see it"
        )
        with Worker(**settings) as new:
            assert new.ask("get", name="x")["error"] == "PoolExhausted"
            old.ask("put", name="x")
            assert (
                new.ask("get", name="x", timeout=20)["backend"] == backend
            )  # handed over, at the desk
        report = fetch_report(address)
        assert (report.pid, report.epoch) == (before.pid, before.epoch)
        os.kill(broker.pid, 9)
        broker.stop()
        with sharedpool.start_broker(
            1, address=address, dsn=postgres.dsn
        ):  # it knows all from the journal
            assert fetch_report(address).epoch == before.epoch + 1
            assert "backend" in old.ask("get", name="x", timeout=10)
    assert "was deleted, and is made again" in capfd.readouterr().err


def test_its_files_stay_young(path: Path, postgres: EphemeralPostgres) -> None:
    with sharedpool.start_broker(1, address=f"ipc://{path}", dsn=postgres.dsn):
        week_ago = time.time() - 7 * 86400
        for each in files(path).values():
            os.utime(each, (week_ago, week_ago))
        for what, each in files(path).items():
            wait_until(
                lambda each=each: each.stat().st_mtime > week_ago + 86400,
                what=f"the {what} to be young",
            )


def test_a_second_broker_where_the_files_of_the_first_were_deleted_lends_nothing_that_is_lent(
    path: Path, postgres: EphemeralPostgres
) -> None:
    address = f"ipc://{path}"
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    with (
        sharedpool.start_broker(1, address=address, dsn=postgres.dsn, ttl=2.0) as first,
        Worker(**settings) as old,
    ):
        backend = old.ask("get", name="x", timeout=20)["backend"]
        wait_until(lambda: fetch_report(address).control == "connected")
        # Stopped: it would put its files back, and a second broker be refused.
        os.kill(first.pid, signal.SIGSTOP)
        try:
            shutil.rmtree(path.parent)
            path.parent.mkdir(mode=0o700)
            second = sharedpool.start_broker(1, address=address, dsn=postgres.dsn, ttl=2.0)
        finally:
            os.kill(first.pid, signal.SIGCONT)
        with second, Worker(**settings) as new:
            new.send("get", name="x", timeout=30)
            wait_until(
                lambda: not first.is_alive,
                what="the first broker to leave the address to the second",
            )
            wait_until(
                lambda: (
                    [s.in_use for s in fetch_report(address).sessions if s.pid == old.pid] == [1]
                )
            )
            assert fetch_report(address).pid == second.pid
            assert old.ask("query", name="x", sql="SELECT pg_backend_pid()") == {
                "rows": [[backend]]
            }
            began = time.monotonic()
            old.ask("put", name="x")
            answer = new.answer()
            assert "backend" in answer, answer
            assert answer["at"] >= began


def test_a_broker_that_nobody_uses_does_not_come_back_to_a_directory_that_is_gone(
    runtime_dir: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the automatic ones: the next worker starts another."""
    monkeypatch.setenv("SHAREDPOOL_LINGER", "600")
    with Worker(dsn=database, max_conn=1) as worker:
        worker.ask("get", name="x", timeout=20)
        (socket,) = (runtime_dir / "sharedpool").glob("auto-*.sock")
        pid = fetch_report(f"ipc://{socket}").pid
    shutil.rmtree(runtime_dir / "sharedpool")
    wait_until(lambda: not alive(pid))
    assert not (runtime_dir / "sharedpool").exists()
