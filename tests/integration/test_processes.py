"""Many processes, one limit: sharing, recall, order, death, forks — seen from the server."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg2.extensions import connection

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.reports import PoolReport
from tests.support.processes import BackendSampler, Piped, Worker, workers
from tests.support.waiting import wait_until

StartWorker = Callable[..., Worker]
_numbers = iter(range(1, 1000))


@pytest.fixture
def name() -> str:
    return f"shared{next(_numbers)}"


@pytest.fixture
def settings(broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str) -> dict[str, Any]:
    return {"dsn": postgres.dsn, "broker": broker.address, "name": name}


@pytest.fixture
def start(settings: dict[str, Any]) -> Iterator[StartWorker]:
    started: list[Worker] = []

    def start_worker(**more: Any) -> Worker:
        worker = Worker(**settings, **more)
        started.append(worker)
        return worker.ready()

    yield start_worker
    for worker in started:
        worker.__exit__(None, None, None)


def pids(server: connection, name: str) -> set[int]:
    with server.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s",
            [f"sharedpool {name} [%"],
        )
        return {pid for (pid,) in cursor.fetchall()}


def report(broker: sharedpool.Broker, name: str) -> PoolReport:
    (found,) = [pool for pool in fetch_report(broker.address).pools if pool.name == name]
    return found


def test_processes_and_threads_share_one_limit(
    settings: dict[str, Any], postgres: EphemeralPostgres, name: str
) -> None:
    with (
        workers(6, **settings, max_conn=3, threads=True) as crew,
        BackendSampler(postgres.dsn, f"sharedpool {name} [%") as sampler,
    ):
        for worker in crew:
            worker.send("hammer", seconds=2, threads=2, timeout=30)
        outcomes = [worker.answer() for worker in crew]
    assert [outcome["errors"] for outcome in outcomes] == [[]] * 6
    assert all(outcome["done"] > 0 for outcome in outcomes)
    assert sampler.samples > 50
    assert sampler.peak == 3


@pytest.mark.parametrize("handover", ["auto", "off"])
def test_a_connection_idle_elsewhere_serves_who_will_not_wait(
    start: StartWorker, server_connection: connection, name: str, handover: str
) -> None:
    a, b = start(max_conn=2, handover=handover), start(max_conn=2, handover=handover)
    first = a.ask("get", name="x")["backend"]
    second = a.ask("get", name="y")["backend"]
    assert b.ask("get", name="z")["error"] == "PoolExhausted"
    a.ask("put", name="x")
    a.ask("put", name="y")
    got = b.ask("get", name="z")
    if handover == "auto":
        assert got["backend"] == first  # itself, as it is
    else:
        assert got["backend"] not in (first, second)
    assert pids(server_connection, name) == {second, got["backend"]}  # the longest idle was given
    assert a.ask("get", name="x")["backend"] == second


def test_an_idle_connection_is_found_however_often_it_was_used_unseen(start: StartWorker) -> None:
    """The broker hears of checkouts only now and then; what it believes must not keep a connection
    from others."""
    a, b = start(max_conn=1), start(max_conn=1)
    for turn in range(20):
        worker, other = (a, b) if turn % 2 else (b, a)
        for _ in range(3):
            assert "backend" in worker.ask("get", name="x")
            assert other.ask("get", name="x").get("error") == "PoolExhausted"
            worker.ask("put", name="x")


def test_a_worker_that_is_busy_with_other_things_gives_its_idle_connection_up(
    start: StartWorker,
) -> None:
    a, b = start(max_conn=2), start(max_conn=2)
    a.ask("get", name="idle")
    a.ask("get", name="busy")
    a.ask("put", name="idle")
    a.send("query", name="busy", sql="SELECT pg_sleep(1)")  # its only thread is in libpq now
    got = b.ask("get", name="z", timeout=30)
    assert "backend" in got
    assert got["waited"] < 0.9
    a.answer()


def test_waiters_are_served_in_order_over_all_processes(
    start: StartWorker, broker: sharedpool.Broker, name: str
) -> None:
    holder = start(max_conn=1)
    holder.ask("get", name="x")
    others = [start(max_conn=1) for _ in range(4)]
    for number, worker in enumerate(others):
        worker.send("get", name="x", timeout=60)
        wait_until(lambda number=number: report(broker, name).waiting == number + 1)
    holder.ask("put", name="x")
    served = []
    for worker in others:
        served.append(worker.answer()["at"])
        worker.ask("put", name="x")
    assert served == sorted(served)


def test_a_holder_in_a_loop_does_not_starve_the_others(start: StartWorker) -> None:
    a, b = start(max_conn=1), start(max_conn=1)
    a.send("hammer", seconds=2, threads=1, timeout=30, work_s=0.001)
    b.send("hammer", seconds=2, threads=1, timeout=30, work_s=0.001)
    done = [a.answer()["done"], b.answer()["done"]]
    assert min(done) > max(done) / 3


def test_a_waiter_that_gave_up_swallows_no_slot(start: StartWorker) -> None:
    a, b, c = start(max_conn=1), start(max_conn=1), start(max_conn=1)
    a.ask("get", name="x")
    assert b.ask("get", name="x", timeout=1)["error"] == "PoolTimeout"
    c.send("get", name="x", timeout=30)
    a.ask("put", name="x")
    assert "backend" in c.answer()


def test_the_error_names_the_process_that_holds_most(start: StartWorker) -> None:
    a, b = start(max_conn=2), start(max_conn=2)
    a.ask("get", name="x")
    a.ask("get", name="y")
    text = b.ask("get", name="z")["text"]
    assert f"worker.py[{a.pid}] 2 (longest " in text


@pytest.mark.long_variants
@pytest.mark.parametrize("doing", ["idle", "in a transaction", "in a query", "waiting"])
def test_a_killed_workers_slots_come_back_when_its_backends_are_gone(
    start: StartWorker, server_connection: connection, name: str, doing: str
) -> None:
    a, b = start(max_conn=2), start(max_conn=2)
    a.ask("get", name="x")
    a.ask("get", name="y")
    if doing == "idle":
        a.ask("put", name="x")
        a.ask("put", name="y")
    elif doing == "in a transaction":
        a.ask("query", name="x", sql="SELECT 1")
    elif doing == "in a query":
        a.send("query", name="x", sql="SELECT pg_sleep(60)")
    else:
        a.send("get", name="z", timeout=60)
    a.kill()
    first, second = b.ask("get", name="x", timeout=20), b.ask("get", name="y", timeout=20)
    assert pids(server_connection, name) == {first["backend"], second["backend"]}


def test_a_worker_that_ends_in_good_order_leaves_nothing(
    start: StartWorker, server_connection: connection, broker: sharedpool.Broker, name: str
) -> None:
    a, b = start(max_conn=2), start(max_conn=2)
    b.ask("get", name="z")
    a.ask("get", name="x")
    assert a.end() == 0
    assert len(pids(server_connection, name)) == 1
    wait_until(lambda: report(broker, name).leases == 1)
    assert report(broker, name).sessions == 1
    assert report(broker, name).fences == 0  # returned, not fenced


def test_a_frozen_worker_keeps_its_connection_when_nobody_needs_it(
    start: StartWorker, broker: sharedpool.Broker, name: str
) -> None:
    a = start(max_conn=2)
    backend = a.ask("get", name="x")["backend"]
    a.kill(signal.SIGSTOP)
    wait_until(lambda: report(broker, name).suspect == 1, timeout_s=20, what="its TTL to pass")
    a.kill(signal.SIGCONT)
    wait_until(lambda: report(broker, name).suspect == 0, timeout_s=20, what="its heartbeat")
    assert a.ask("query", name="x", sql="SELECT pg_backend_pid()")["rows"] == [[backend]]


def test_a_frozen_worker_does_not_check_in_what_was_taken_away_meanwhile(
    start: StartWorker, server_connection: connection, name: str
) -> None:
    """It wakes, checks in and out at once: before its link could hear that the
    backend has ended."""
    a = start(max_conn=1)
    for _ in range(5):
        backend = a.ask("get", name="x")["backend"]
        a.kill(signal.SIGSTOP)
        with server_connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(%s, 5000), pg_sleep(0.6)", [backend]
            )  # long enough to matter
        a.send("put", name="x")
        a.send("get", name="y", timeout=10)
        a.send("query", name="y", sql="SELECT pg_backend_pid()")
        a.send("put", name="y")
        a.kill(signal.SIGCONT)
        assert "error" not in a.answer()
        fresh = a.answer()["backend"]
        assert fresh != backend
        assert a.answer()["rows"] == [[fresh]]
        assert "error" not in a.answer()


def test_a_long_checkout_is_reported_with_its_holder(
    postgres: EphemeralPostgres, runtime_dir: object, name: str
) -> None:
    address = f"ipc://{runtime_dir}/b.sock"
    options = [
        "--max-conn",
        "2",
        "--bind",
        address,
        "--dsn",
        postgres.dsn,
        "--ttl",
        "0.9",
        "--max-checkout",
        "0.3",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "sharedpool", "broker", *options], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        with Worker(dsn=postgres.dsn, broker=address, name=name) as worker:
            worker.ask("get", name="x")
            text = ""
            while "has been checked out for" not in text:
                text = process.stderr.readline()
                assert text, "the broker ended"
            assert f"worker.py[{worker.pid}]" in text
            assert "'MainThread'" in text
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 0


# --- forks


def test_a_forked_child_starts_afresh_and_leaves_its_parent_alone(
    start: StartWorker, server_connection: connection, name: str
) -> None:
    a = start(max_conn=3)
    idle = a.ask("get", name="idle")["backend"]
    held = a.ask("get", name="held")["backend"]
    a.ask("query", name="held", sql="CREATE TEMP TABLE mine (n int)")
    a.ask("put", name="idle")
    child = a.ask("fork", name="held")
    assert "error" not in child
    assert child["inherited"] in ("OperationalError", "InterfaceError")  # never used…
    assert f"belongs to process {a.pid}" in child["put"]  # …never returned…
    assert child["backend"] not in (idle, held)
    assert a.ask("query", name="held", sql="SELECT count(*) FROM mine")["rows"] == [
        [0]
    ]  # …never ended by the child
    assert a.ask("get", name="again")["backend"] == idle
    wait_until(
        lambda: pids(server_connection, name) == {idle, held},
        what="the child's own connection to go with it",
    )


def test_generations_of_forks_share_the_limit(start: StartWorker) -> None:
    a = start(max_conn=1)
    for _ in range(5):
        a.ask("get", name="x")
        a.ask("put", name="x")
        assert "backend" in a.ask("fork")  # recalls the parent's idle one


@pytest.mark.long_variants
@pytest.mark.parametrize("package", ["multiprocessing", "multiprocess"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_multiprocessing_child_returns_what_it_holds_at_its_end(
    package: str,
    method: str,
    postgres: EphemeralPostgres,
    runtime_dir: Path,
    server_connection: connection,
    name: str,
) -> None:
    """The broker has no control connection here: what is not returned would stay counted."""
    script = runtime_dir / "script.py"
    script.write_text(
        f"import json, sys, {package} as mp, sharedpool\n"
        "settings = json.loads(sys.argv[1])\n"
        "def work(n):\n"
        "    pool = sharedpool.config_pool(max_conn=3, **settings)\n"
        "    global kept\n"
        "    pool.put_conn(pool.get_conn(timeout=30))\n"
        "    kept = pool.get_conn(timeout=30)\n"
        "if __name__ == '__main__':\n"
        "    pool = sharedpool.config_pool(max_conn=3, **settings)\n"
        "    conn = pool.get_conn()\n"
        f"    context = mp.get_context({method!r})\n"
        "    children = [context.Process(target=work, args=(n,)) for n in range(4)]\n"
        "    [child.start() for child in children]; [child.join() for child in children]\n"
        "    assert [child.exitcode for child in children] == [0] * 4\n"
        "    conn.cursor().execute('SELECT 1')\n"
        "    print('parent unharmed', flush=True); sys.stdin.read()\n"
    )
    with sharedpool.start_broker(9) as broker:
        settings = json.dumps({"dsn": postgres.dsn, "broker": broker.address, "name": name})
        with Piped(sys.executable, str(script), settings) as process:
            assert process.line() == "parent unharmed"
            assert len(pids(server_connection, name)) == 1
            wait_until(lambda: report(broker, name).leases == 1)
            process.communicate()
        assert process.returncode == 0


# --- one broker for all pools


def test_the_cap_over_all_pools_moves_slots_between_them(
    postgres: EphemeralPostgres,
    server_connection: connection,
    runtime_dir: object,
) -> None:
    address = f"ipc://{runtime_dir}/cap.sock"
    with sharedpool.start_broker(2, address=address, dsn=postgres.dsn):
        common: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 2}
        with Worker(**common, name="one") as one, Worker(**common, name="two") as two:
            one.ask("get", name="x")
            one.ask("get", name="y")
            one.ask("put", name="x")
            one.ask("put", name="y")
            assert "backend" in two.ask("get", name="x")
            assert "backend" in two.ask("get", name="y", timeout=20)
            assert two.ask("stats")["max_conn"] == 2
            assert pids(server_connection, "one") == set()
            text = one.ask("get", name="x")["text"]
            assert "limit of 2 connections over all pools of the broker" in text
            assert f"worker.py[{two.pid}] in 'two' 2" in text
