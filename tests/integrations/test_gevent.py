"""gevent: in a monkey-patched process a wait for a lease lets the other greenlets run. All in real such processes."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest
from processes import workers
from waiting import wait_until

import sharedpool

SCRIPT = Path(__file__).with_name("green_worker.py")
_numbers = iter(range(1, 1000))


@pytest.fixture
def settings(broker: sharedpool.Broker, database: str) -> dict[str, Any]:
    return {"dsn": database, "broker": broker.address, "name": f"green{next(_numbers)}", "max_conn": 1}


def start(scenario: str, settings: dict[str, Any]) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    command = [sys.executable, str(SCRIPT), scenario, json.dumps(settings)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@contextmanager
def running(scenario: str, settings: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    """Start a scenario, and see at the end of the block that it went well."""
    with start(scenario, settings) as process:
        try:
            yield process
            said, complaints = process.communicate(timeout=60)
        except BaseException:
            process.kill()
            raise
    assert said.endswith("done\n"), complaints
    assert process.returncode == 0, complaints
    assert complaints == "", complaints


@pytest.mark.parametrize(
    "scenario",
    [
        "waiting_within_the_process",
        "a_timeout_of_gevents_leaks_nothing",
        "a_timeout_of_the_pools_own",
        "a_killed_query_costs_its_connection_and_no_slot",
        "a_close_lets_others_run",
        "patched_late",
        "without_psycogreen",
    ],
)
def test_the_hub_goes_on(settings: dict[str, Any], scenario: str) -> None:
    with running(scenario, settings):
        pass


@pytest.mark.parametrize("scenario", ["queries_overlap", "a_fork", "many_greenlets"])
def test_with_two_connections(settings: dict[str, Any], scenario: str) -> None:
    with running(scenario, settings | {"max_conn": 2}):
        pass


def test_the_hub_goes_on_while_another_process_has_the_slot(settings: dict[str, Any]) -> None:
    with workers(1, **settings) as (other,):
        other.ask("get", name="it", timeout=10)
        with running("waiting_for_another_process", settings) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            assert other.ask("stats")["in_use"] == 1
            other.ask("put", name="it")


def test_an_idle_connection_is_given_up_to_another_process(settings: dict[str, Any]) -> None:
    with running("idle_until_told", settings) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        with workers(1, **settings) as (other,):
            assert other.ask("get", name="it", timeout=10)["backend"] != pid
            other.ask("put", name="it")
        process.stdin.write("\n")
        process.stdin.flush()


def test_a_process_that_ends_returns_everything(
    settings: dict[str, Any], server_connection: psycopg2.extensions.connection
) -> None:
    with running("ending", settings | {"max_conn": 2}):
        pass
    with server_connection.cursor() as cursor:

        def left() -> list[Any]:
            name = f"sharedpool {settings['name']} [%"
            cursor.execute("SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s", [name])
            return cursor.fetchall()

        wait_until(lambda: not left())
    with workers(1, **settings | {"max_conn": 2}) as (other,):
        for name in ("one", "two"):
            assert "backend" in other.ask("get", name=name, timeout=5)


def test_a_connect_can_be_given_up(settings: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"host=127.0.0.1 port={silent.getsockname()[1]} dbname=x user=x"
        with running("connecting_can_be_given_up", settings | {"dsn": dsn, "max_conn": 2}):
            pass


def test_the_automatic_broker_is_started_from_a_patched_process(
    settings: dict[str, Any], runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDPOOL_LINGER", "0.5")
    with running("waiting_within_the_process", settings | {"broker": None}):
        pass
