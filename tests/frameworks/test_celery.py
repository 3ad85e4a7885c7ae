"""A real Celery worker and one limit: prefork and threads, processes that are recycled, killed or
orphaned."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import celery.result
import pytest
from celery.exceptions import TimeLimitExceeded
from psycopg2.extensions import connection

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.frameworks.assertions import stuck
from tests.frameworks.celery_files import through_files
from tests.support.processes import BackendSampler, alive
from tests.support.waiting import wait_until

LIMIT = 3
HERE = Path(__file__).parent

StartWorker = Callable[..., "AbstractContextManager[subprocess.Popen[bytes]]"]
Look = Callable[..., "celery.result.AsyncResult[tuple[int, int]]"]
AllSlots = Callable[[int], int]
_numbers = itertools.count(1)


@pytest.fixture
def name() -> str:
    """The pool that the tasks use."""
    return f"celery{next(_numbers)}"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """The app's settings: messages and results go through files."""
    for part in ("unsent", "ends"):
        (tmp_path / part).mkdir()
    return through_files(tmp_path) | {"worker_prefetch_multiplier": 1}


@pytest.fixture
def start_worker(
    automatic_broker: None,
    postgres: EphemeralPostgres,
    name: str,
    settings: dict[str, Any],
    tmp_path: Path,
) -> StartWorker:
    """Run a Celery worker with these options; kill it in the end, if the test has not ended it."""

    @contextmanager
    def start(*options: str, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
        environment |= {"TARGET_POOL": name, "DATABASE_DSN": postgres.dsn}
        environment |= {
            "TARGET_CELERY": json.dumps(settings),
            "TARGET_ENDS": str(tmp_path / "ends"),
        }
        quick = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        log = tmp_path / "worker.log"
        with (
            log.open("w") as output,
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "celery",
                    "-A",
                    "celery_target",
                    "worker",
                    "-l",
                    "INFO",
                    *quick,
                    *options,
                ],
                cwd=HERE,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | environment,
                start_new_session=True,
            ) as process,
        ):
            try:
                yield process
            finally:
                print(log.read_text()[-5000:])  # pytest shows it when the test fails
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # Celery's own end takes five seconds

    return start


@pytest.fixture
def look(settings: dict[str, Any]) -> Iterator[Look]:
    """Send a task that does a query of so many seconds; return its promise."""
    app = celery.Celery("client")
    app.conf.update(settings)
    sent = Path(settings["broker_transport_options"]["data_folder_in"])
    unsent = sent.with_name("unsent")
    app.conf.broker_transport_options = settings["broker_transport_options"] | {
        "data_folder_out": str(unsent)
    }

    def send(seconds: float, **options: Any) -> "celery.result.AsyncResult[tuple[int, int]]":
        promise = app.send_task("look", [seconds], **options)
        for message in unsent.iterdir():  # a worker that finds one half written ends
            message.rename(sent / message.name)
        return promise

    yield send
    app.close()


def outcomes(promises: list["celery.result.AsyncResult[tuple[int, int]]"]) -> list[tuple[int, int]]:
    """Wait for all; return each one's process and backend."""
    return [tuple(promise.get(timeout=60, interval=0.02)) for promise in promises]


@pytest.mark.long_variants
@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        (["-c", "8"], 2, 8),
        (["-c", "8", "-P", "threads"], 1, 1),
        (["-c", "4", "--max-tasks-per-child", "10"], 15, 150),
    ],
    ids=["prefork", "threads", "recycled"],
)
def test_all_tasks_are_done_by_three_connections(
    start_worker: StartWorker,
    look: Look,
    postgres: EphemeralPostgres,
    name: str,
    options: list[str],
    least: int,
    most: int,
) -> None:
    threads = {"TARGET_THREADS": "1"} if "threads" in options else {}
    with (
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
        start_worker(*options, **threads),
    ):
        done = outcomes([look(0.005) for _ in range(150)])
    assert least <= len({process for process, _ in done}) <= most
    assert 2 <= sampler.peak <= LIMIT
    assert sampler.samples > 50


def test_with_signals_connected_the_processes_dispose_of_their_pools_when_the_worker_ends(
    start_worker: StartWorker, look: Look, name: str, tmp_path: Path, all_slots: AllSlots
) -> None:
    with start_worker("-c", "2", TARGET_SIGNALS="1") as worker:
        done = outcomes([look(0.1) for _ in range(4)])
        worker.terminate()
        assert worker.wait(30) == 0
    ends = {int(path.name): path.read_text() for path in (tmp_path / "ends").iterdir()}
    assert {process for process, _ in done} <= set(ends)
    assert set(ends.values()) == {"disposed"}
    assert all_slots(LIMIT) == LIMIT


def test_a_hard_time_limit_in_the_middle_of_a_query_gives_the_slot_back(
    start_worker: StartWorker, look: Look, name: str, all_slots: AllSlots
) -> None:
    with start_worker("-c", "3"):
        stuck = [look(600, time_limit=1) for _ in range(LIMIT)]
        for promise in stuck:
            with pytest.raises(TimeLimitExceeded):
                promise.get(timeout=30, interval=0.02)
        assert len(outcomes([look(0)])) == 1
        assert all_slots(LIMIT) == LIMIT


def test_a_killed_process_and_then_a_killed_worker_leave_no_slot_taken(
    start_worker: StartWorker,
    look: Look,
    server_connection: connection,
    name: str,
    settings: dict[str, Any],
    all_slots: AllSlots,
) -> None:
    settings["worker_prefetch_multiplier"] = (
        4  # Celery takes ten seconds to count the lost task as lost
    )
    with start_worker("-c", "2") as worker:
        ((process, _),) = outcomes([look(0)])
        look(600), look(600)
        wait_until(lambda: stuck(server_connection, name) == 2, what="queries that do not end")
        os.kill(process, signal.SIGKILL)
        wait_until(
            lambda: stuck(server_connection, name) == 1, what="the end of the killed one's query"
        )
        ((successor, _),) = outcomes([look(0)])
        assert successor != process
        worker.kill()  # the kernel then kills its children
        worker.wait()
        wait_until(lambda: not alive(successor), what="the orphan's end")
        assert all_slots(LIMIT) == LIMIT
