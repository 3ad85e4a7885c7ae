"""What operators see and order while connections move past the broker."""

import json
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner
from psycopg2 import extensions

import sharedpool
from sharedpool.cli import main
from sharedpool.lane.lane import SUPPORTED
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection import handover
from tests.integration.lane_workers import at_work, eager, wait_for_moves
from tests.support.pool_pair import report
from tests.support.processes import BackendSampler, workers
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and handover.SUPPORTED), reason="connections cannot move on this platform"
)


def test_operators_are_told_and_obeyed_while_connections_move(
    broker: sharedpool.Broker,
    postgres: EphemeralPostgres,
    server_connection: extensions.connection,
    name: str,
    tmp_path: Path,
) -> None:
    settings = eager(postgres.dsn, broker.address, name, max_conn=2)

    def say(*words: str) -> str:
        """Run a command here: there are many, and to start a process costs most."""
        done = CliRunner().invoke(main, [*words, "--broker", broker.address])
        assert done.exit_code == 0, done.output
        return done.stdout

    def shows_all() -> bool:
        (pool,) = [
            each for each in json.loads(say("status", "--json"))["pools"] if each["name"] == name
        ]
        assert pool["leases"] <= pool["max_conn"] == 2
        return (pool["in_use"] + pool["idle"], pool["sessions"]) == (2, 4)

    def backends() -> int:
        with server_connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s",
                [f"sharedpool {name} [%"],
            )
            (count,) = cast("tuple[int]", cursor.fetchone())
            return count

    with (
        workers(4, **settings) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        pids = {worker.pid for worker in crew}
        with at_work(crew, tmp_path / "stop") as outcomes:
            for turn in range(2):
                wait_for_moves(broker, name)
                # In the second turn some connections are replaced, which takes its time.
                wait_until(shows_all, 30, "status to show them")
                held = [each for each in json.loads(say("who", "--json")) if each["pool"] == name]
                assert len({each["token"] for each in held}) == len(held) <= 2
                assert {each["pid"] for each in held} <= pids | {0}
                assert all((each["state"] == "parked") is (not each["pid"]) for each in held)
                assert "[0]" not in say("who", "--pool", name)
                say("pause", "--pool", name, "--wait", "--timeout", "60")
                assert backends() == 0
                assert report(broker, name).leases == 0
                say("resume", "--pool", name)
                wait_for_moves(broker, name)
                say("set", "max-conn", "1", "--pool", name)
                wait_until(lambda: backends() == 1, 30, "the lower limit to hold")
                wait_for_moves(broker, name)
                assert backends() == 1
                say("set", "max-conn", "2", "--pool", name)
                wait_for_moves(broker, name)
                say("drain", str(crew[turn].pid))
                say("reconnect", "--pool", name)
        generation = report(broker, name).generation
    assert generation > 2
    assert [(outcome["errors"], outcome["wrong"]) for outcome in outcomes] == [([], 0)] * 4
    assert sampler.peak == 2


def test_a_checkout_that_lasts_too_long_is_found_while_others_move(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    """It is one checkout; those of the others are short, whatever the name of the
    lease that moves."""
    settings = eager(postgres.dsn, broker.address, name, max_conn=2)
    with (
        workers(4, **settings, max_checkout=0.5) as crew,
        at_work(crew[1:], tmp_path / "stop") as outcomes,
    ):
        wait_for_moves(broker, name)
        assert "backend" in crew[0].ask("get", name="it", timeout=5)
        wait_until(lambda: report(broker, name).overdue == 1, 5, "the checkout to be reported")
        wait_for_moves(broker, name, 200)
        crew[0].ask("put", name="it")
        wait_for_moves(broker, name, 200)
        assert report(broker, name).overdue == 1
    assert [(outcome["errors"], outcome["wrong"]) for outcome in outcomes] == [([], 0)] * 3
