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
