"""A process that is killed or stopped in the middle of a move costs no slot."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharedpool
from sharedpool.lane.lane import SUPPORTED
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection import handover
from tests.integration.lane_workers import TTL_S, at_work, eager, hammer, wait_for_moves
from tests.support.processes import LONG, BackendSampler, Worker, workers
from tests.support.stepping import GIVING, TAKING
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and handover.SUPPORTED), reason="connections cannot move on this platform"
)

# Steps where a stopped process is missed in different ways: each test of one waits for its TTL.
_TELLING = [
    "the reset is sent",
    "the receiver is on the board",
    "the shelf is on the board",
    "it has come",
    "it is adopted",
]


class Stepping(Worker):
    """A worker that sends itself signal `number` at a step of a move (see `stepping.py`)."""

    program = Worker.program.with_name("stepping.py")


@pytest.fixture(scope="module")
def impatient(
    postgres: EphemeralPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[sharedpool.Broker]:
    """A broker that soon suspects who is silent."""
    address = f"ipc://{tmp_path_factory.mktemp('lane')}/broker.sock"
    with sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=TTL_S) as broker:
        yield broker


def is_stopped(worker: Worker) -> bool:
    return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.long_variants(first=4)
@pytest.mark.parametrize("step", [*GIVING, *TAKING])
def test_a_process_that_is_killed_in_the_middle_of_a_move_costs_no_slot(
    impatient: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path, step: str
) -> None:
    settings = eager(postgres.dsn, impatient.address, name, max_conn=1)
    with (
        workers(2, **settings) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        with at_work(crew, tmp_path / "stop") as outcomes:
            wait_for_moves(impatient, name)
            with Stepping(at=step, number=signal.SIGKILL, **settings) as victim:
                hammer(victim, tmp_path / "stop")
                assert victim.wait(8) == -signal.SIGKILL
            wait_for_moves(impatient, name)
        assert "backend" in crew[0].ask("get", name="it", timeout=5)
    assert [(outcome["errors"], outcome["wrong"]) for outcome in outcomes] == [([], 0)] * 2
    assert max(outcome["longest"] for outcome in outcomes) < 2
    assert sampler.peak == 1


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize("step", [*GIVING, *TAKING] if LONG else _TELLING)
def test_a_process_that_is_stopped_in_the_middle_of_a_move_costs_no_slot_and_goes_on(
    impatient: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path, step: str
) -> None:
    """The others wait for its TTL at most, and a little more; what it was taken away it does not
    use again."""
    settings = eager(postgres.dsn, impatient.address, name, max_conn=1)
    with (
        workers(2, **settings) as crew,
        Stepping(at=step, number=signal.SIGSTOP, **settings) as victim,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        with at_work(crew, tmp_path / "stop") as outcomes:
            wait_for_moves(impatient, name)
            victim.send("insist", seconds=60, timeout=10, stop=str(tmp_path / "stop"))
            wait_until(lambda: is_stopped(victim), 8, "the step")
            wait_for_moves(impatient, name)
            victim.kill(signal.SIGCONT)
            wait_for_moves(impatient, name)
        told = victim.answer(20)
        assert "backend" in victim.ask("get", name="it", timeout=5)
    assert [(outcome["errors"], outcome["wrong"]) for outcome in outcomes] == [([], 0)] * 2
    assert max(outcome["longest"] for outcome in outcomes) < TTL_S + 3
    assert told["outcomes"].keys() <= {"done", "OperationalError", "InterfaceError"}, told
    assert sampler.peak == 1


@pytest.mark.long_variants
@pytest.mark.parametrize("step", ["the receiver is on the board", "it is read"])
def test_a_process_that_is_killed_while_it_is_stopped_costs_no_slot(
    impatient: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path, step: str
) -> None:
    settings = eager(postgres.dsn, impatient.address, name, max_conn=1)
    with (
        workers(2, **settings) as crew,
        Stepping(at=step, number=signal.SIGSTOP, **settings) as victim,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        with at_work(crew, tmp_path / "stop") as outcomes:
            wait_for_moves(impatient, name)
            hammer(victim, tmp_path / "stop")
            wait_until(lambda: is_stopped(victim), 8, "the step")
            victim.kill()
            wait_for_moves(impatient, name)
        assert "backend" in crew[0].ask("get", name="it", timeout=5)
    assert [(outcome["errors"], outcome["wrong"]) for outcome in outcomes] == [([], 0)] * 2
    assert max(outcome["longest"] for outcome in outcomes) < 2
    assert sampler.peak == 1
