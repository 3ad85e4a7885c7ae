"""Threads that wait while connections move past the broker: in vain, late, until their deadline or
the pool's end."""

import os
import re
import signal
from pathlib import Path

import pytest

import sharedpool
from sharedpool.lane.lane import SUPPORTED
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection import handover
from tests.integration.lane_workers import eager, let_move, wait_for_waiters
from tests.support.processes import Worker, workers

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and handover.SUPPORTED), reason="connections cannot move on this platform"
)


def test_a_thread_that_waits_in_vain_is_told_in_time_who_holds_what(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    settings = eager(postgres.dsn, broker.address, name, max_conn=1)
    with workers(2, **settings) as crew:
        let_move(crew, broker, name, tmp_path)
        holder, waiter = crew
        assert "backend" in holder.ask("get", name="it", timeout=5)
        waiter.send("get", name="it", timeout=0.5)
        wait_for_waiters(broker, name, 1, holder)
        refused = waiter.answer(2)
        assert refused["error"] == "PoolTimeout"
        assert str(holder.pid) in refused["text"]
        holder.ask("put", name="it")
        assert "backend" in waiter.ask("get", name="it", timeout=5)


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (signal.SIGSTOP, "PoolTimeout", "no connection became free within 1.2 s"),
        (
            signal.SIGKILL,
            "BrokerUnavailable",
            r"did not answer within 0\.\d s, asked after a wait of 1\.\d s for a",
        ),
    ],
    ids=["stopped", "killed"],
)
def test_a_thread_that_waits_in_vain_without_the_broker_is_told_how_long_it_was(
    postgres: EphemeralPostgres,
    name: str,
    tmp_path: Path,
    runtime_dir: Path,
    number: int,
    error: str,
    said: str,
) -> None:
    """A thread that waited in the lane asks the broker only when its time is over."""
    address = f"ipc://{runtime_dir}/b.sock"
    settings = eager(postgres.dsn, address, name, max_conn=1)
    with (
        sharedpool.start_broker(60, address=address, dsn=postgres.dsn) as broker,
        workers(2, **settings) as crew,
    ):
        let_move(crew, broker, name, tmp_path)
        holder, waiter = crew
        assert "backend" in holder.ask("get", name="it", timeout=5)
        waiter.send("get", name="it", timeout=5)
        wait_for_waiters(broker, name, 1, holder)
        os.kill(broker.pid, number)
        try:
            holder.ask("put", name="it")
            assert "backend" in waiter.answer(5)
            refused = holder.ask("get", name="it", timeout=1.2)
            waiter.ask("put", name="it")
        finally:
            os.kill(broker.pid, signal.SIGCONT)
    assert refused["error"] == error
    assert re.search(said, refused["text"]), refused["text"]


@pytest.mark.parametrize("wait_s", [0, 5])
def test_a_late_request_is_given_the_connection_on_the_shelf_at_once(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path, wait_s: float
) -> None:
    """A process outside the lane, and a thread that does not wait, ask the broker."""
    settings = eager(postgres.dsn, broker.address, name, max_conn=1)
    opened: list[int] = []
    with workers(2, **settings) as crew:
        # A process that is not in the lane within a second, on a very busy machine, is not waited
        # for: it opens a connection of its own.
        while 0 not in opened and len(opened) < 3:
            with Worker(**settings) as late:
                let_move(crew, broker, name, tmp_path)
                for _ in range(2):
                    assert late.ask("get", name="it", timeout=wait_s)["waited"] < 0.5
                    late.ask("put", name="it")
                opened.append(late.ask("stats")["connects"])
    assert opened[-1] == 0, opened


@pytest.mark.parametrize("wait_s", [0.3, 1.2])
def test_a_wait_in_the_lane_is_over_by_its_deadline(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path, wait_s: float
) -> None:
    settings = eager(postgres.dsn, broker.address, name, max_conn=1)
    with workers(2, **settings) as crew:
        let_move(crew, broker, name, tmp_path)
        holder, waiter = crew
        assert "backend" in holder.ask("get", name="it", timeout=5)
        told = waiter.ask("insist", seconds=0, least=1, timeout=wait_s)
        assert list(told["outcomes"]) == ["PoolTimeout"], told
        assert wait_s <= told["longest"] < wait_s + 0.25
        holder.ask("put", name="it")


def test_release_all_wakes_who_waits(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    settings = eager(postgres.dsn, broker.address, name, max_conn=1)
    with workers(2, **settings) as crew:
        let_move(crew, broker, name, tmp_path)
        holder, waiter = crew
        assert "backend" in holder.ask("get", name="it", timeout=5)
        waiter.ask("wait_aside", timeout=20)
        wait_for_waiters(broker, name, 1, holder)
        told = waiter.ask("dispose")
        assert told["error"] == "PoolClosed"
        assert told["after"] < 0.3
        assert "at" in holder.ask("put", name="it")
        assert "backend" in holder.ask("get", name="it", timeout=5)
