"""Many threads and processes share few connections: no row is wrong, no slot is lost."""

import contextlib
import hashlib
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from psycopg2 import extensions

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection.handover import SUPPORTED
from tests.support.pool_pair import report
from tests.support.processes import BackendSampler, Piped, Worker, workers
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="connections cannot be handed over on this platform"
)

# Read before the tests hide the environment from themselves.
_MOVES = int(os.environ.get("SHAREDPOOL_MOVES", "3000"))


def test_threads_of_several_processes_share_few_connections(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 3,
        "threads": True,
    }
    with (
        workers(4, **settings) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        for worker in crew:
            worker.send("hammer", seconds=2, threads=3, timeout=30)
        outcomes = [worker.answer() for worker in crew]
    assert [outcome["errors"] for outcome in outcomes] == [[]] * 4
    assert min(outcome["done"] for outcome in outcomes) > 0
    assert sampler.peak <= 3


@pytest.mark.long_variants
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_no_slot_is_lost_with_a_process_that_ends_or_stops_in_the_middle_of_a_transfer(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, number: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 2,
    }
    stop = tmp_path / "stop"
    rng = random.Random(number)
    with (
        workers(4, **settings) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        for worker in crew:
            worker.send("hammer", seconds=60, threads=1, timeout=30, work_s=0.001, stop=str(stop))
        for each in range(
            3 if number == signal.SIGKILL else 1
        ):  # a frozen one holds up the rest for a TTL
            enough = tmp_path / f"enough of {each}"
            with Worker(**settings) as victim:
                victim.send(
                    "hammer", seconds=60, threads=1, timeout=30, work_s=0.001, stop=str(enough)
                )
                wait_until(
                    lambda: report(broker, name).sessions >= 5, 10, "the victim to take part"
                )
                handovers = report(broker, name).handovers + rng.randrange(1, 50)
                wait_until(
                    lambda n=handovers: report(broker, name).handovers >= n, 10, "some transfers"
                )
                victim.kill(number)
                handovers = report(broker, name).handovers
                wait_until(
                    lambda n=handovers: report(broker, name).handovers > n,
                    10,
                    "the others to go on",
                )
                enough.touch()
        stop.touch()
        outcomes = [worker.answer() for worker in crew]
    assert [outcome["errors"] for outcome in outcomes] == [[]] * 4
    assert sampler.peak <= 2


_TWO_RECEIVE = """
import os, sys, threading, warnings
import sharedpool
from sharedpool.worker.connection import reset

reset.LIMIT_S = 60.0  # the backends are stopped meanwhile
warnings.simplefilter("ignore")  # a fork with threads is what Python 3.12 warns of
pool = sharedpool.config_pool(2, dsn=sys.argv[1], broker=sys.argv[2], name=sys.argv[3], timeout=60,
                              pool_manager=sharedpool.ThreadedConnectionPool)
pool.put_conn(pool.get_conn())
print("ready", flush=True)
input()
answers = []

def use():
    with pool.connection() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT 42")
        answers.append(cursor.fetchone()[0])

threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
input()
read, write = os.pipe()
if not os.fork():
    os.close(write)
    print(os.getpid(), flush=True)
    os.read(read, 1)  # until the parent ends
    os._exit(0)
for thread in threads:
    thread.join()
print(answers, pool.stats().adopted)
"""


def _sockets(pid: int) -> set[str]:
    """Return the sockets that a process has open."""
    found: set[str] = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(each.readlink()))
    return {each for each in found if each.startswith("socket:")}


def test_a_fork_while_several_threads_receive_leaves_all_that_arrives_to_the_parent(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str
) -> None:
    command = [sys.executable, "-c", _TWO_RECEIVE, postgres.dsn, broker.address, name]
    with (
        Piped(*command) as taker,
        Worker(dsn=postgres.dsn, broker=broker.address, name=name, max_conn=2) as giver,
    ):
        assert taker.line() == "ready"
        backends = [giver.ask("get", name=key, timeout=20)["backend"] for key in "xy"]
        taker.tell("wait")
        wait_until(lambda: report(broker, name).waiting == 2)
        before = _sockets(taker.pid)
        for backend in backends:
            os.kill(backend, signal.SIGSTOP)  # their resets take for as long
        try:
            for key in "xy":
                giver.ask("put", name=key)
            arriving = wait_until(
                lambda: new if len(new := _sockets(taker.pid) - before) == 2 else None
            )
            taker.tell("fork")
            child = int(taker.line())
            assert _sockets(child) & arriving == set()
            assert _sockets(taker.pid) >= arriving
        finally:
            for backend in backends:
                os.kill(backend, signal.SIGCONT)
        assert taker.line() == "[42, 42] 2"


@pytest.mark.long
def test_rows_are_read_and_written_correctly_over_thousands_of_moves(
    broker: sharedpool.Broker,
    postgres: EphemeralPostgres,
    name: str,
    server_connection: extensions.connection,
) -> None:
    """Each process writes rows of its own and reads them back, by checksum; no row is another's,
    lost or doubled."""
    with server_connection.cursor() as cursor:
        cursor.execute("CREATE TABLE moves (worker int, n int, body text, PRIMARY KEY (worker, n))")
    total = _MOVES
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 2,
        "time_slice": 0,
    }
    try:
        with workers(5, **settings) as crew:
            for number, worker in enumerate(crew):
                worker.send("write_rows", worker=number, count=total // 5)
            answers = [worker.answer(600) for worker in crew]
            moves = report(broker, name).handovers
        assert [answer.get("wrong", answer) for answer in answers] == [0] * 5
        assert moves > total // 2
        with server_connection.cursor() as cursor:
            cursor.execute("SELECT worker, n, body FROM moves")
            rows = cursor.fetchall()
    finally:
        with server_connection.cursor() as cursor:
            cursor.execute("DROP TABLE moves")
    assert len(rows) == total // 5 * 5
    assert all(
        body == hashlib.sha256(f"{worker} {n}".encode()).hexdigest() * 4 for worker, n, body in rows
    )
