"""Worker processes in a lane: have them use their pool, and see connections move."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sharedpool
from sharedpool.cli.client import fetch_report
from tests.support.pool_pair import report
from tests.support.processes import Worker
from tests.support.waiting import wait_until

TTL_S = 1.5


def eager(dsn: str, address: str, name: str, *, max_conn: int) -> dict[str, Any]:
    """Return the settings of a worker whose every checkin is a move, whoever comes next."""
    shared = {"dsn": dsn, "broker": address, "name": name, "max_conn": max_conn}
    return {**shared, "time_slice": 0, "threads": True}


def hammer(worker: Worker, stop: Path, threads: int = 1) -> None:
    worker.send(
        "hammer",
        seconds=120,  # longer than any test: the file ends it
        threads=threads,
        timeout=30,
        work_s=0.001,
        think_s=0.005,
        stop=str(stop),
    )


@contextlib.contextmanager
def at_work(crew: list[Worker], stop: Path, threads: int = 1) -> Iterator[list[dict[str, Any]]]:
    """Have workers use their pool in the block; fill in what each has to tell of it."""
    outcomes: list[dict[str, Any]] = []
    for worker in crew:
        hammer(worker, stop, threads)
    try:
        yield outcomes
    finally:
        stop.touch()
    outcomes += [worker.answer(20) for worker in crew]


def handovers(broker: sharedpool.Broker, name: str) -> int:
    return sum(pool.handovers for pool in fetch_report(broker.address).pools if pool.name == name)


def wait_for_moves(broker: sharedpool.Broker, name: str, count: int = 20) -> None:
    """Wait until connections move past the broker."""
    before = handovers(broker, name)
    wait_until(lambda: handovers(broker, name) > before + count, 60, "connections to move")


def total(crew: list[Worker], what: str) -> int:
    return sum(worker.ask("stats")[what] for worker in crew)


def wait_for_waiters(broker: sharedpool.Broker, name: str, count: int, holder: Worker) -> None:
    """Wait until so many wait, in the lane, as `holder` sees it."""
    wait_until(lambda: report(broker, name).waiting == count, 5, "them to wait")
    wait_until(lambda: holder.ask("stats")["moving"], 5, "connections to move")


def let_move(crew: list[Worker], broker: sharedpool.Broker, name: str, tmp_path: Path) -> None:
    """Have all of them in the lane, and connections move for a while, whether somebody uses them or
    not."""
    with at_work(crew, stop := tmp_path / "in the lane"):
        wait_for_moves(broker, name)
    stop.unlink()  # for the next time
