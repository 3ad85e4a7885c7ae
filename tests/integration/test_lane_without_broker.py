"""Connections move while there is no broker, and the next one finds them."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

import sharedpool
from sharedpool.lane.lane import SUPPORTED
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection import handover
from tests.integration.lane_workers import (
    TTL_S,
    at_work,
    eager,
    let_move,
    total,
    wait_for_moves,
    wait_for_waiters,
)
from tests.support.processes import BackendSampler, Worker, workers

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and handover.SUPPORTED), reason="connections cannot move on this platform"
)


def test_connections_move_while_there_is_no_broker_and_the_next_one_finds_them(
    postgres: EphemeralPostgres, name: str, tmp_path: Path, runtime_dir: Path
) -> None:
    """What a worker uses when the next broker comes is not taken from it, whoever had it when the
    former one died."""
    address = f"ipc://{runtime_dir}/b.sock"
    first = sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=TTL_S)
    settings = eager(postgres.dsn, address, name, max_conn=2)
    with (
        workers(4, **settings) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        with at_work(crew, tmp_path / "without") as then:
            wait_for_moves(first, name)
            os.kill(first.pid, signal.SIGKILL)
            first.stop()
        adopted = total(crew, "adopted")
        for worker in crew:
            worker.send("cycle", count=100)
        assert [worker.answer(20) for worker in crew] == [{}] * 4
        assert total(crew, "adopted") > adopted + 100
        with contextlib.ExitStack() as stack:
            with at_work(crew, tmp_path / "with") as now:
                second = stack.enter_context(
                    sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=TTL_S)
                )
                wait_for_moves(second, name)
            for worker in crew[:2]:
                assert "backend" in worker.ask("get", name="it", timeout=5)
            for worker in crew[:2]:
                worker.ask("put", name="it")
    assert [(outcome["errors"], outcome["wrong"]) for outcome in then + now] == [([], 0)] * 8
    assert max(outcome["longest"] for outcome in then + now) < TTL_S + 2
    assert sampler.peak == 2


def test_slots_lost_with_a_broker_are_back_as_soon_as_all_members_have_reported(
    postgres: EphemeralPostgres, name: str, tmp_path: Path, runtime_dir: Path
) -> None:
    """It was sent to one who has died since, and whom the next broker knows as a member of that
    lane alone."""
    address, ttl_s = f"ipc://{runtime_dir}/b.sock", 20.0
    first = sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=ttl_s)
    settings = eager(postgres.dsn, address, name, max_conn=1)
    with workers(2, **settings) as crew, Worker(**settings) as receiver:
        let_move([*crew, receiver], first, name, tmp_path)
        holder, other = crew
        holder.ask("get", name="it", timeout=5)
        receiver.send("get", name="it", timeout=60)
        wait_for_waiters(first, name, 1, holder)
        receiver.kill(signal.SIGSTOP)
        os.kill(first.pid, signal.SIGKILL)
        first.stop()
        holder.ask("put", name="it")
        receiver.kill()
        receiver.wait(5)
        with (
            sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=ttl_s),
            BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
        ):
            assert other.ask("get", name="it", timeout=30)["waited"] < ttl_s / 2
    assert sampler.peak == 1
