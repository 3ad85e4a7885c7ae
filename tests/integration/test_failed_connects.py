"""Connects that the server refuses, or that nobody answers, give their slots back."""

import socket
import threading
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import sharedpool
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.broker_thread import server_in_a_thread
from tests.support.processes import Worker
from tests.support.waiting import wait_until


def test_a_connect_that_the_server_refuses_gives_its_slot_back_by_evidence(
    broker: sharedpool.Broker, postgres: EphemeralPostgres
) -> None:
    pool = sharedpool.config_pool(
        max_conn=1,
        dsn=postgres.dsn,
        dbname="no_such_database",
        broker=broker.address,
        name="refused",
    )
    for _ in range(
        5
    ):  # each needs the only slot; no other caller is to blame, so nothing is held back
        with pytest.raises(psycopg2.OperationalError, match="does not exist"):
            pool.get_conn(timeout=10)
    assert sum(p.quarantined for p in fetch_report(broker.address).pools) == 0
    pool.release_all()


def test_a_connect_that_nobody_answers_goes_into_quarantine_and_comes_back(
    postgres: EphemeralPostgres, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharedpool.broker.core.leases.QUEUE_LIMIT_S", 1.0)  # ten seconds
    address = f"ipc://{runtime_dir}/quarantine.sock"
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        server_in_a_thread(address, max_conn=1, dsn=postgres.dsn),
        Worker(
            host="127.0.0.1",
            port=silent.getsockname()[1],
            user="x",
            dbname="x",
            broker=address,
            name="silent",
        ) as worker,
    ):
        refused = worker.ask("get", name="x", timeout=1)
        assert refused["error"] == "OperationalError"
        assert "timeout expired" in refused["text"]
        # Something may be in between, with a queue of its own.
        wait_until(lambda: fetch_report(address).leases == 0, 20, "the quarantine to end")


def test_while_the_server_is_away_every_caller_gets_its_error_at_once(runtime_dir: Path) -> None:
    with EphemeralPostgres() as server, sharedpool.start_broker(3, dsn=server.dsn) as broker:
        settings: dict[str, Any] = {"dsn": server.dsn, "broker": broker.address, "max_conn": 3}
        with Worker(**settings) as a, Worker(**settings) as b:
            a.ask("get", name="x")
            a.ask("put", name="x")
            server.shutdown("immediate")
            # One that has just been put is not looked at; the broker tells of its end a moment
            # later.
            wait_until(
                lambda: a.ask("stats")["idle"] == 0, what="the idle connection to be dropped"
            )
            errors = [worker.ask("get", name="x", timeout=20)["error"] for worker in (a, b, a, b)]
            assert set(errors) <= {"OperationalError", "ServerUnavailable"}
            assert "ServerUnavailable" in errors
            server.start()
            for worker, name in (
                (a, "x"),
                (b, "y"),
                (b, "z"),
            ):  # the second may come before the first one's word
                wait_until(
                    lambda w=worker, n=name: "backend" in w.ask("get", name=n, timeout=5),
                    timeout_s=10,
                )


def test_refused_connects_free_their_slots(runtime_dir: Path, broker: sharedpool.Broker) -> None:
    pool = sharedpool.config_pool(
        max_conn=2, host=str(runtime_dir), user="nobody", name="nowhere", broker=broker.address,
        pool_manager=sharedpool.ThreadedConnectionPool,
    )  # fmt: skip
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            pool.get_conn(timeout=10)
        except psycopg2.OperationalError as error:
            errors.append(error)

    threads = [threading.Thread(target=connect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 8
    wait_until(
        lambda: [p.leases for p in fetch_report(broker.address).pools if p.name == "nowhere"] == [0]
    )
    pool.release_all()
