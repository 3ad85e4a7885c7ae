"""Connections move between processes past the broker: it works, and whoever dies or stops in it
costs no slot."""

import contextlib
import dataclasses
import json
import os
import re
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from psycopg2 import extensions

import sharedpool
from sharedpool.broker.core.lane_members import ARRIVAL_S
from sharedpool.cli import main
from sharedpool.cli.client import fetch_report
from sharedpool.lane.lane import SUPPORTED
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.board import PLACES
from sharedpool.worker.connection import handover
from tests.support.pool_pair import MakePair, report
from tests.support.processes import LONG, BackendSampler, Worker, workers
from tests.support.stepping import GIVING, TAKING
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and handover.SUPPORTED), reason="connections cannot move on this platform"
)

_TTL_S = 1.5
# Each checkin is a move, whoever comes next.
_EAGER = {"time_slice": 0, "threads": True}

_LEAVE_ALL = """
    SET sharedpool.user = 'me'; CREATE TEMP TABLE left_over (n int); SELECT pg_advisory_lock(42);
    LISTEN news; PREPARE mine AS SELECT 1
"""
_WHAT_IS_LEFT = """
    SELECT current_setting('sharedpool.user', true), to_regclass('left_over')::text,
        (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
        (SELECT count(*) FROM pg_listening_channels()),
        (SELECT count(*) FROM pg_prepared_statements)
"""

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
    with sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=_TTL_S) as broker:
        yield broker


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


def is_stopped(worker: Worker) -> bool:
    return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.long_variants(first=4)
@pytest.mark.parametrize("step", [*GIVING, *TAKING])
def test_a_process_that_is_killed_in_the_middle_of_a_move_costs_no_slot(
    impatient: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path, step: str
) -> None:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": impatient.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
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
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": impatient.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
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
    assert max(outcome["longest"] for outcome in outcomes) < _TTL_S + 3
    assert told["outcomes"].keys() <= {"done", "OperationalError", "InterfaceError"}, told
    assert sampler.peak == 1


@pytest.mark.long_variants
@pytest.mark.parametrize("step", ["the receiver is on the board", "it is read"])
def test_a_process_that_is_killed_while_it_is_stopped_costs_no_slot(
    impatient: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path, step: str
) -> None:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": impatient.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
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


def test_connections_move_while_there_is_no_broker_and_the_next_one_finds_them(
    postgres: EphemeralPostgres, name: str, tmp_path: Path, runtime_dir: Path
) -> None:
    """What a worker uses when the next broker comes is not taken from it, whoever had it when the
    former one died."""
    address = f"ipc://{runtime_dir}/b.sock"
    first = sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=_TTL_S)
    settings = {"dsn": postgres.dsn, "broker": address, "name": name, "max_conn": 2, **_EAGER}
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
                    sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=_TTL_S)
                )
                wait_for_moves(second, name)
            for worker in crew[:2]:
                assert "backend" in worker.ask("get", name="it", timeout=5)
            for worker in crew[:2]:
                worker.ask("put", name="it")
    assert [(outcome["errors"], outcome["wrong"]) for outcome in then + now] == [([], 0)] * 8
    assert max(outcome["longest"] for outcome in then + now) < _TTL_S + 2
    assert sampler.peak == 2


def test_slots_lost_with_a_broker_are_back_as_soon_as_all_members_have_reported(
    postgres: EphemeralPostgres, name: str, tmp_path: Path, runtime_dir: Path
) -> None:
    """It was sent to one who has died since, and whom the next broker knows as a member of that
    lane alone."""
    address, ttl_s = f"ipc://{runtime_dir}/b.sock", 20.0
    first = sharedpool.start_broker(60, address=address, dsn=postgres.dsn, ttl=ttl_s)
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
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


# --- it works


def test_connections_move_past_the_broker(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    """Threads of one process are among those that share them."""
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 2,
        **_EAGER,
    }
    with (
        workers(3, **settings) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        with at_work(crew, tmp_path / "stop", threads=2) as outcomes:
            wait_for_moves(broker, name)
            before = report(broker, name)
            wait_for_moves(broker, name, 200)
            after = report(broker, name)
            assert (after.grants, after.fences) == (before.grants, before.fences), (before, after)
        adopted = total(crew, "adopted")
    assert [(outcome["errors"], outcome["wrong"]) for outcome in outcomes] == [([], 0)] * 3
    assert min(outcome["done"] for outcome in outcomes) > 10
    assert adopted > 150
    assert sampler.peak == 2


@pytest.mark.long
def test_more_threads_than_wait_sockets_take_turns_and_cost_no_connect(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    """They queue for a wait socket, as the others queue for a connection.

    (The broker could pass nothing to a thread without.)

    Nor is a connection taken for lost, and ended, that a thread has received and has had no time to
    list.
    """
    threads = PLACES + 32
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 4,
        **_EAGER,
    }
    with (
        workers(2, **settings) as crew,
        at_work(crew, tmp_path / "stop", threads=threads) as outcomes,
    ):
        wait_for_moves(broker, name)
        before = report(broker, name)
        wait_until(
            lambda: handovers(broker, name) > before.handovers + 20 * threads, 60, "ten turns each"
        )
        after = report(broker, name)
    assert [(outcome["errors"], outcome["wrong"]) for outcome in outcomes] == [([], 0)] * 2
    assert min(outcome["least"] for outcome in outcomes) >= 5
    assert (
        after.grants - before.grants < threads
    )  # of those who asked the broker before connections moved


def test_a_worker_that_is_invited_before_its_welcome_joins(pair: MakePair) -> None:
    """In a process that has a line to the desk already the invitation may be faster than the
    WELCOME."""
    a, b = pair()
    conn = a.get_conn()
    a.put_conn(conn)
    b.put_conn(b.get_conn())  # there is a lane by now
    late = [type(a)(dataclasses.replace(a.config), a._broker) for _ in range(5)]
    try:
        for pool in late:
            pool.put_conn(pool.get_conn())
            wait_until(
                lambda pool=pool: pool._local.membership.wait_sockets is not None,
                5,
                "it to take part",
            )
    finally:
        for pool in late:
            pool.release_all()


def test_the_first_thread_is_served_first_over_all_processes(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
    with workers(5, **settings) as crew:
        let_move(crew, broker, name, tmp_path)
        holder, *others = crew
        assert "backend" in holder.ask("get", name="it", timeout=5)
        for count, worker in enumerate(others, 1):
            worker.send("get", name="it", timeout=10)
            wait_for_waiters(broker, name, count, holder)
        for giver, next_one in pairwise(crew):
            assert giver.ask("put", name="it")
            assert "backend" in next_one.answer(5)
        crew[-1].ask("put", name="it")


def test_nothing_of_the_givers_session_is_left(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
    with workers(2, **settings) as crew:
        let_move(crew, broker, name, tmp_path)
        a, b = crew
        pid = a.ask("get", name="it", timeout=5)["backend"]
        b.send("get", name="it", timeout=10)
        wait_for_waiters(broker, name, 1, a)
        a.ask("query", name="it", sql=_LEAVE_ALL)
        a.ask("query", name="it", sql="COMMIT")
        a.ask("put", name="it")
        assert b.answer(5)["backend"] == pid
        assert b.ask("query", name="it", sql=_WHAT_IS_LEFT)["rows"] == [["", None, 0, 0, 0]]


def test_a_thread_that_waits_in_vain_is_told_in_time_who_holds_what(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
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
    settings = {"dsn": postgres.dsn, "broker": address, "name": name, "max_conn": 1, **_EAGER}
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
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
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


@pytest.mark.parametrize("why", ["no control connection", "no hand-over"])
def test_nobody_is_let_into_a_lane_in_which_nothing_could_move(
    postgres: EphemeralPostgres, name: str, runtime_dir: Path, why: str
) -> None:
    """It costs each process some descriptors. (For TLS see `test_tls_endpoint.py`.)"""
    address, dsn = f"ipc://{runtime_dir}/b.sock", postgres.dsn
    settings = {"dsn": dsn, "broker": address, "name": name, "max_conn": 1, **_EAGER}
    if why == "no hand-over":
        settings["handover"] = "off"
    with (
        sharedpool.start_broker(
            3, address=address, dsn=None if why == "no control connection" else dsn
        ),
        workers(3, **settings) as crew,
    ):
        for worker in crew:
            worker.send("cycle", count=20)
        assert [worker.answer() for worker in crew] == [{}] * 3
        assert total(crew, "connects") > 1  # they had to wait for each other
        assert [worker.ask("stats")["in_lane"] for worker in crew] == [False] * 3


def test_nothing_is_kept_for_who_will_not_be_in_the_lane(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str
) -> None:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
    with workers(2, **settings) as crew, Worker(**settings, handover="off") as aside:
        holder, waiter = crew
        holder.ask("get", name="it", timeout=5)
        waiter.send("get", name="it", timeout=5)
        wait_until(lambda: report(broker, name).waiting == 1, 5, "somebody to wait")
        holder.ask("put", name="it")
        assert "backend" in waiter.answer(5)
        waiter.ask("put", name="it")
        assert aside.ask("get", name="it", timeout=5)["waited"] < ARRIVAL_S


@pytest.mark.parametrize("wait_s", [0.3, 1.2])
def test_a_wait_in_the_lane_is_over_by_its_deadline(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path, wait_s: float
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
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
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
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


def test_a_pool_that_nobody_uses_any_more_keeps_no_connection(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 1,
        **_EAGER,
    }
    with workers(2, **settings) as crew:
        let_move(crew, broker, name, tmp_path)  # it lies on the shelf now
    wait_until(
        lambda: name not in [pool.name for pool in fetch_report(broker.address).pools],
        5,
        "the pool to be gone",
    )


def test_operators_are_told_and_obeyed_while_connections_move(
    broker: sharedpool.Broker,
    postgres: EphemeralPostgres,
    server_connection: extensions.connection,
    name: str,
    tmp_path: Path,
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 2,
        **_EAGER,
    }

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
    settings = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": name,
        "max_conn": 2,
        **_EAGER,
    }
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
