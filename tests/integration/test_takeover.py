"""A broker that comes after one that was killed, together with workers or with the server."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.wire.codec import decode_to_worker, encode
from sharedpool.wire.messages import PROTOCOL_VERSION, Acquire, Confirm, Grant, Hello
from sharedpool.wire.values import PoolSpec
from tests.support.broker_thread import line_to, server_in_a_thread
from tests.support.processes import Worker
from tests.support.sql import backend_of
from tests.support.waiting import wait_until

_PROCESS = re.compile(rb'"process":\[\d+,\d+,"[^"]*"\]')
_BACKEND = re.compile(rb'"backend":\[[^]]*\]')


@pytest.fixture
def address(runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir}/b.sock"


def kill(broker: sharedpool.Broker) -> None:
    os.kill(broker.pid, signal.SIGKILL)
    broker.stop()


@pytest.mark.long_variants
@pytest.mark.parametrize("confirmed", [True, False])
def test_slots_ended_by_a_server_restart_are_free_though_no_living_broker_saw_them_before(
    address: str, confirmed: bool
) -> None:
    """The machine goes down: broker, worker and server; perhaps before it was noted which backend
    the worker had."""
    with EphemeralPostgres() as server:
        first = sharedpool.start_broker(1, address=address, dsn=server.dsn)
        settings: dict[str, Any] = {"dsn": server.dsn, "broker": address, "max_conn": 1}
        wait_until(lambda: fetch_report(address).control == "connected")
        with Worker(**settings) as worker:
            worker.ask("get", name="x", timeout=20)
            wait_until(lambda: fetch_report(address).pools[0].in_use == 1)
            kill(first)
            worker.kill()
        if not confirmed:
            journal = Path(f"{address.removeprefix('ipc://')}.journal")
            text, count = _BACKEND.subn(b'"backend":null', journal.read_bytes())
            assert count >= 1
            journal.write_bytes(text)
        server.restart("immediate")
        with (
            sharedpool.start_broker(1, address=address, dsn=server.dsn),
            Worker(**settings) as worker,
        ):
            assert "backend" in worker.ask(
                "get", name="x", timeout=8
            )  # sooner than a proxy's queue could be empty


def test_a_dead_workers_query_is_counted_by_a_broker_that_cannot_look(
    address: str, postgres: EphemeralPostgres, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its socket was in the former broker's custody; who comes after sees nothing of it until
    somebody gives a DSN."""
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    first = sharedpool.start_broker(1, address=address)
    with Worker(**settings) as worker:
        worker.ask("get", name="x", timeout=20)
        worker.send("query", name="x", sql="SELECT pg_sleep(600)")
        wait_until(lambda: fetch_report(address).custody == 1)
        kill(first)
        worker.kill()
    with sharedpool.start_broker(1, address=address), Worker(**settings) as worker:
        wait_until(lambda: fetch_report(address).leases == 1)
        refused = worker.ask("get", name="x", timeout=2)
        assert refused["error"] == "PoolTimeout"
        assert fetch_report(address).leases == 1
    assert "start the broker again with --dsn, or without its .journal" in capfd.readouterr().err
    with (
        sharedpool.start_broker(1, address=address, dsn=postgres.dsn),
        Worker(**settings) as worker,
    ):
        assert "backend" in worker.ask("get", name="x", timeout=20)


def test_a_killed_worker_of_another_host_is_counted_until_somebody_can_look(
    address: str, postgres: EphemeralPostgres, capfd: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    first = sharedpool.start_broker(1, address=address)
    foreign = Hello(
        PROTOCOL_VERSION, os.getpid(), "elsewhere", "far.py", PoolSpec("default", 1, 60_000)
    )
    with line_to(
        address
    ) as far:  # from here the broker could watch its process: the entry is made another host's
        far.send(encode(foreign))
        far.send(encode(Acquire(1, 0)))
        while not isinstance(grant := decode_to_worker(far.recv()), Grant):
            pass
        with psycopg2.connect(postgres.dsn) as conn:
            backend = backend_of(conn)
        conn.close()
        far.send(encode(Confirm(grant.token, backend)))
        wait_until(lambda: fetch_report(address).pools[0].in_use == 1)
    kill(first)
    assert "start the broker again with --dsn, or without its .journal" in capfd.readouterr().err
    journal = Path(f"{address.removeprefix('ipc://')}.journal")
    text = journal.read_bytes()
    journal.write_bytes(_PROCESS.sub(b'"process":null', text))
    with sharedpool.start_broker(1, address=address, ttl=0.3), Worker(**settings) as worker:
        assert worker.ask("get", name="x", timeout=1)["error"] == "PoolTimeout"
    with (
        sharedpool.start_broker(1, address=address, dsn=postgres.dsn, ttl=0.3),
        Worker(**settings) as worker,
    ):
        assert "backend" in worker.ask("get", name="x", timeout=20)


def test_a_deleted_journal_forgets_the_dead(
    address: str, postgres: EphemeralPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out where there is no DSN to give; nobody of the old crew is alive."""
    monkeypatch.setattr("sharedpool.broker.core.takeover.QUEUE_LIMIT_S", 1.0)  # ten seconds
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    first = sharedpool.start_broker(1, address=address)
    with Worker(**settings) as worker:
        worker.ask("get", name="x", timeout=20)
        kill(first)
        worker.kill()
    Path(f"{address.removeprefix('ipc://')}.journal").unlink()
    with server_in_a_thread(address, max_conn=1, ttl_s=0.5), Worker(**settings) as worker:
        assert "backend" in worker.ask("get", name="x", timeout=20)


def test_a_thread_that_has_waited_through_a_brokers_end_is_passed_a_connection(
    address: str, postgres: EphemeralPostgres
) -> None:
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    first = sharedpool.start_broker(1, address=address, dsn=postgres.dsn)
    with Worker(**settings) as a, Worker(**settings) as b:
        held = a.ask("get", name="x", timeout=20)["backend"]
        b.send("get", name="x", timeout=60)
        wait_until(lambda: fetch_report(address).pools[0].waiting == 1)
        kill(first)
        with sharedpool.start_broker(1, address=address, dsn=postgres.dsn):
            wait_until(
                lambda: [(p.in_use, p.waiting) for p in fetch_report(address).pools] == [(1, 1)]
            )
            a.ask("put", name="x")
            assert b.answer()["backend"] == held


def test_a_successor_in_another_pid_namespace_does_not_judge_by_pids_that_are_not_its_own(
    address: str, postgres: EphemeralPostgres
) -> None:
    """Broker and worker shared a container; the next broker runs outside, where their pids are
    nobody's."""
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    first = sharedpool.start_broker(1, address=address, dsn=postgres.dsn)
    with Worker(**settings) as worker:
        backend = worker.ask("get", name="x", timeout=20)["backend"]
        wait_until(lambda: fetch_report(address).custody == 1)
        os.kill(worker.pid, signal.SIGSTOP)  # it cannot say HELLO before it is judged
        kill(first)
        journal = Path(f"{address.removeprefix('ipc://')}.journal")
        text, count = _PROCESS.subn(b'"process":[%d,1,"another"]' % 2**22, journal.read_bytes())
        assert count  # 2**22 is pid_max: nobody has it
        journal.write_bytes(text)
        with sharedpool.start_broker(1, address=address, dsn=postgres.dsn):
            assert fetch_report(address).leases == 1
            os.kill(worker.pid, signal.SIGCONT)
            wait_until(
                lambda: (
                    [s.pid for s in fetch_report(address).sessions if not s.suspect] == [worker.pid]
                )
            )
            assert worker.ask("query", name="x", sql="SELECT pg_backend_pid()") == {
                "rows": [[backend]]
            }
            worker.kill()  # from its HELLO on it is watched as what it is here
            with Worker(**settings) as other:
                assert "backend" in other.ask("get", name="x", timeout=10)


@pytest.mark.long
def test_a_broker_with_a_lower_number_is_accepted_after_one_whose_clock_was_ahead(
    address: str, postgres: EphemeralPostgres
) -> None:
    """Its files are lost, so that its successor begins with what the clock says by now."""
    path = Path(address.removeprefix("ipc://"))
    ahead = int((time.time() + 2 * 86400) * 1000)
    Path(f"{path}.lock").write_text(f"{ahead} 1 0badcafe\n")
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 2}
    first = sharedpool.start_broker(2, address=address, dsn=postgres.dsn, ttl=2.0)
    with Worker(**settings) as worker, Worker(**settings) as other:
        backend = worker.ask("get", name="x", timeout=20)["backend"]
        other.ask("get", name="y", timeout=20)
        assert fetch_report(address).epoch > ahead
        kill(first)
        for each in path.parent.glob(f"{path.name}*"):
            each.unlink()
        with sharedpool.start_broker(2, address=address, dsn=postgres.dsn, ttl=2.0):
            wait_until(lambda: fetch_report(address).leases == 2, what="both to say what they hold")
            assert fetch_report(address).epoch < ahead
            assert worker.ask("get", name="z")["error"] == "PoolExhausted"
            assert worker.ask("query", name="x", sql="SELECT pg_backend_pid()") == {
                "rows": [[backend]]
            }
            other.ask("put", name="y", close=True)
            assert "backend" in worker.ask("get", name="z", timeout=10)
            assert worker.ask("query", name="x", sql="SELECT pg_backend_pid()") == {
                "rows": [[backend]]
            }


def test_a_broker_is_numbered_above_what_its_journal_holds(
    address: str, postgres: EphemeralPostgres
) -> None:
    """The lock file alone is lost: a lease's name is never used twice, and the newer one is told by
    its number."""
    path = Path(address.removeprefix("ipc://"))
    ahead = int((time.time() + 2 * 86400) * 1000)
    Path(f"{path}.lock").write_text(f"{ahead} 1 0badcafe\n")
    settings: dict[str, Any] = {"dsn": postgres.dsn, "broker": address, "max_conn": 1}
    first = sharedpool.start_broker(1, address=address, dsn=postgres.dsn, ttl=2.0)
    with Worker(**settings) as worker:
        worker.ask("get", name="x", timeout=20)
        kill(first)
        Path(f"{path}.lock").unlink()
        with sharedpool.start_broker(1, address=address, dsn=postgres.dsn, ttl=2.0):
            assert fetch_report(address).epoch > ahead + 1
            assert int(Path(f"{path}.lock").read_text().split()[0]) == fetch_report(address).epoch
