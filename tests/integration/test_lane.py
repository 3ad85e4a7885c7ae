"""Connections move between processes past the broker: who gets them, in which order, and what is
left of their sessions."""

from itertools import pairwise
from pathlib import Path

import pytest
from msgspec import structs

import sharedpool
from sharedpool.broker.core.lane_members import ARRIVAL_S
from sharedpool.cli.client import fetch_report
from sharedpool.lane.lane import SUPPORTED
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.board import PLACES
from sharedpool.worker.connection import handover
from tests.integration.lane_workers import (
    at_work,
    eager,
    handovers,
    let_move,
    total,
    wait_for_moves,
    wait_for_waiters,
)
from tests.support.pool_pair import MakePair, report
from tests.support.processes import BackendSampler, Worker, workers
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not (SUPPORTED and handover.SUPPORTED), reason="connections cannot move on this platform"
)

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


def test_connections_move_past_the_broker(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    """Threads of one process are among those that share them."""
    settings = eager(postgres.dsn, broker.address, name, max_conn=2)
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
    settings = eager(postgres.dsn, broker.address, name, max_conn=4)
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
    late = [type(a)(structs.replace(a.config), a._broker) for _ in range(5)]
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
    settings = eager(postgres.dsn, broker.address, name, max_conn=1)
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
    settings = eager(postgres.dsn, broker.address, name, max_conn=1)
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


@pytest.mark.parametrize("why", ["no control connection", "no hand-over"])
def test_nobody_is_let_into_a_lane_in_which_nothing_could_move(
    postgres: EphemeralPostgres, name: str, runtime_dir: Path, why: str
) -> None:
    """It costs each process some descriptors. (For TLS see `test_tls_endpoint.py`.)"""
    address, dsn = f"ipc://{runtime_dir}/b.sock", postgres.dsn
    settings = eager(dsn, address, name, max_conn=1)
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
    settings = eager(postgres.dsn, broker.address, name, max_conn=1)
    with workers(2, **settings) as crew, Worker(**settings, handover="off") as aside:
        holder, waiter = crew
        holder.ask("get", name="it", timeout=5)
        waiter.send("get", name="it", timeout=5)
        wait_until(lambda: report(broker, name).waiting == 1, 5, "somebody to wait")
        holder.ask("put", name="it")
        assert "backend" in waiter.answer(5)
        waiter.ask("put", name="it")
        assert aside.ask("get", name="it", timeout=5)["waited"] < ARRIVAL_S


def test_a_pool_that_nobody_uses_any_more_keeps_no_connection(
    broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> None:
    settings = eager(postgres.dsn, broker.address, name, max_conn=1)
    with workers(2, **settings) as crew:
        let_move(crew, broker, name, tmp_path)  # it lies on the shelf now
    wait_until(
        lambda: name not in [pool.name for pool in fetch_report(broker.address).pools],
        5,
        "the pool to be gone",
    )
