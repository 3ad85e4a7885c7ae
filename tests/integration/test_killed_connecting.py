"""Workers that are killed while they connect, and whom the server lets in all the same: no slot is
lost, or lent twice.

A proxy keeps each connect for a while before the server hears of it, and the server's side for
another after its client has gone.
"""

from pathlib import Path
from typing import Any

import pytest

from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support import proxies
from tests.support.broker_thread import server_in_a_thread
from tests.support.ports import free_port
from tests.support.processes import BackendSampler, Worker, as_pid_1, workers
from tests.support.waiting import wait_until

LIMIT = 2


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a broker wait for seconds where it waits for a minute: longer than the proxy does, all
    the same."""
    monkeypatch.setattr("sharedpool.broker.core.leases.START_UP_LIMIT_S", 2.0)
    monkeypatch.setattr("sharedpool.broker.core.leases.QUEUE_LIMIT_S", 3.0)


@pytest.mark.long_variants
@pytest.mark.parametrize("where", ["here", "in a container", "in a container, by tcp", "elsewhere"])
def test_workers_that_are_killed_while_they_connect_cost_no_slot(
    where: str,
    soon: None,
    postgres: EphemeralPostgres,
    runtime_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By tcp a container's process is known by its line to the desk; where it has none, only its
    silence tells."""
    if where == "elsewhere":
        where = "in a container, by tcp"
        monkeypatch.setattr(
            "sharedpool.broker.server.desk.SUPPORTED", False
        )  # another host's cannot be reached
    address = (
        f"tcp://127.0.0.1:{free_port()}" if "tcp" in where else f"ipc://{runtime_dir}/broker.sock"
    )
    prefix = as_pid_1() if "container" in where else ()
    with (
        proxies.LateCloser(postgres, late_s=6.0, accept_late_s=1.0) as slow,
        server_in_a_thread(address, max_conn=LIMIT, dsn=postgres.dsn, ttl_s=1.5),
        BackendSampler(postgres.dsn, "sharedpool killed [%") as sampler,
    ):
        settings: dict[str, Any] = {
            "broker": address,
            "dsn": slow.dsn,
            "max_conn": LIMIT,
            "name": "killed",
        }
        for number in range(1, LIMIT + 1):
            with Worker(prefix=prefix, **settings) as victim:
                victim.send("get", name="x", timeout=20)
                wait_until(lambda n=number: slow.accepted == n, what="the connect to begin")
                victim.kill()
        with workers(LIMIT, **settings) as crew:
            for worker in crew:
                worker.send("get", name="x", timeout=30)
            wait_until(
                lambda: sampler.peak == LIMIT, 20, "the server to let in who has been killed"
            )
            assert fetch_report(address).leases == LIMIT
            for worker in crew:
                assert "backend" in worker.answer()
            assert sampler.peak == LIMIT
