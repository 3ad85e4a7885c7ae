"""A broker that comes after one that was killed, together with workers or with the server."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import Worker
from waiting import wait_until

import sharedpool
from sharedpool.cli.postgres import EphemeralPostgres
from sharedpool.cli.status import fetch_report


@pytest.fixture
def address(runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir}/b.sock"


def kill(broker: sharedpool.Broker) -> None:
    os.kill(broker.pid, signal.SIGKILL)
    broker.stop()


def test_what_a_server_restart_has_ended_is_free_though_no_living_broker_saw_it_before(address: str) -> None:
    """The machine goes down: broker, worker and server."""
    with EphemeralPostgres() as server:
        first = sharedpool.start_broker(1, address=address, dsn=server.dsn)
        settings: dict[str, Any] = {"dsn": server.dsn, "broker": address, "max_conn": 1}
        wait_until(lambda: fetch_report(address).control == "connected")
        with Worker(**settings) as worker:
            worker.ask("get", name="x", timeout=20)
            kill(first)
            worker.kill()
        server.restart("immediate")
        with sharedpool.start_broker(1, address=address, dsn=server.dsn), Worker(**settings) as worker:
            assert "backend" in worker.ask("get", name="x", timeout=20)


def test_a_dead_workers_query_is_counted_by_a_broker_that_cannot_look(
    address: str, postgres: EphemeralPostgres, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its socket was in the former broker's custody; who comes after sees nothing of it until somebody gives a DSN."""
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    first = sharedpool.start_broker(1, address=address)
    with Worker(**settings) as worker:
        worker.ask("get", name="x", timeout=20)
        worker.send("query", name="x", sql="SELECT pg_sleep(600)")
        wait_until(lambda: fetch_report(address).custody == 1)
        kill(first)
        worker.kill()
    with sharedpool.start_broker(1, address=address), Worker(**settings) as worker:
        wait_until(lambda: fetch_report(address).leases == 1)
        refused = worker.ask("get", name="x", timeout=0.5)
        assert refused["error"] == "PoolTimeout"
        assert fetch_report(address).leases == 1
    assert "start it again with --dsn, or without its .journal file while no broker and no" in capfd.readouterr().err
    with sharedpool.start_broker(1, address=address, dsn=postgres.dsn), Worker(**settings) as worker:
        assert "backend" in worker.ask("get", name="x", timeout=20)


def test_a_deleted_journal_forgets_the_dead(address: str, postgres: EphemeralPostgres) -> None:
    """The way out where there is no DSN to give; nobody of the old crew is alive."""
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    first = sharedpool.start_broker(1, address=address)
    with Worker(**settings) as worker:
        worker.ask("get", name="x", timeout=20)
        kill(first)
        worker.kill()
    Path(f"{address.removeprefix('ipc://')}.journal").unlink()
    with sharedpool.start_broker(1, address=address, ttl=0.5), Worker(**settings) as worker:
        assert "backend" in worker.ask("get", name="x", timeout=20)
