"""What an operator orders on the command line, with real processes and a real server."""

from __future__ import annotations

import os
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

import sharedpool
from sharedpool.broker.launch import config_file
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support import documents
from tests.support.commands import address_of, sharedpool_command, start, wait_for
from tests.support.processes import Worker
from tests.support.waiting import wait_until

_numbers = iter(range(1, 1000))


@pytest.fixture
def name() -> str:
    return f"ordered{next(_numbers)}"


@pytest.fixture
def worker(postgres: EphemeralPostgres, broker: sharedpool.Broker, name: str) -> Iterator[Worker]:
    with Worker(
        dsn=postgres.dsn, broker=broker.address, name=name, max_conn=3, threads=True
    ) as worker:
        yield worker


@pytest.fixture
def other(postgres: EphemeralPostgres, broker: sharedpool.Broker, name: str) -> Iterator[Worker]:
    with Worker(
        dsn=postgres.dsn, broker=broker.address, name=name, max_conn=3, threads=True
    ) as worker:
        yield worker


def leases(broker: sharedpool.Broker, name: str) -> int:
    return sum(pool.leases for pool in fetch_report(broker.address).pools if pool.name == name)


def held(broker: sharedpool.Broker, pid: int) -> int:
    return sum(
        session.leases for session in fetch_report(broker.address).sessions if session.pid == pid
    )


def backends(postgres: EphemeralPostgres, name: str) -> int:
    with psycopg2.connect(postgres.dsn) as conn, conn.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s",
            [f"sharedpool {name} [%"],
        )
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def test_pause_waits_until_the_server_has_none_of_our_backends(
    worker: Worker, broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str
) -> None:
    for each in "ab":
        worker.ask("get", name=each, timeout=10)
    worker.ask("put", name="a")
    with start("pause", "--pool", name, "--wait", "--broker", broker.address) as pausing:
        assert pausing.stdout is not None
        assert (
            pausing.stdout.readline()
            == f"pool {name!r} paused: 2 connections to come back, 0 waiting\n"
        )
        wait_until(lambda: leases(broker, name) == 1, 10, "the idle one to come back")
        assert worker.ask("query", name="b", sql="SELECT 1")["rows"] == [
            [1]
        ]  # what is in use goes on
        worker.ask("put", name="b")
        assert pausing.wait(10) == 0
    assert backends(postgres, name) == 0
    status = sharedpool_command("status", "--broker", broker.address)
    assert f"pool {name!r} is paused" in status.stdout
    refused = worker.ask("get", name="c", timeout=0)
    assert "is paused" in refused["text"]
    worker.send("get", name="c", timeout=20)
    wait_until(
        lambda: fetch_report(broker.address).pools and waiting(broker, name) == 1, 10, "it to wait"
    )
    done = sharedpool_command("resume", "--pool", name, "--broker", broker.address)
    assert done.stdout == f"pool {name!r} resumed: 1 waiting\n"
    assert "backend" in worker.answer(20)


def waiting(broker: sharedpool.Broker, name: str) -> int:
    return sum(pool.waiting for pool in fetch_report(broker.address).pools if pool.name == name)


def test_a_wait_that_is_too_long_says_how_many_are_out(
    worker: Worker, broker: sharedpool.Broker, name: str
) -> None:
    worker.ask("get", name="a", timeout=10)
    done = sharedpool_command(
        "pause", "--pool", name, "--wait", "--timeout", "0.3", "--broker", broker.address
    )
    assert done.returncode == 1
    assert "1 connections are still out: `sharedpool who`" in done.stderr
    sharedpool_command("resume", "--pool", name, "--broker", broker.address)


def test_a_limit_is_set_while_the_pool_is_used(
    worker: Worker, other: Worker, broker: sharedpool.Broker, name: str
) -> None:
    for each in "abc":
        worker.ask("get", name=each, timeout=10)
    done = sharedpool_command("set", "max-conn", "1", "--pool", name, "--broker", broker.address)
    assert done.stdout == f"pool {name!r}: limit 3 before, 1 now, 3 in use\n"
    for each in "abc":
        worker.ask("put", name=each)
    wait_until(lambda: leases(broker, name) == 1, 10, "what is too much to come back")
    assert "backend" in other.ask("get", name="x", timeout=10)  # the one that is left
    assert "backend" not in worker.ask("get", name="y", timeout=0.2)
    sharedpool_command("set", "max-conn", "2", "--pool", name, "--broker", broker.address)
    assert "backend" in worker.ask("get", name="y", timeout=10)


def test_one_process_gives_back_what_it_holds(
    worker: Worker, other: Worker, broker: sharedpool.Broker, name: str
) -> None:
    worker.ask("get", name="a", timeout=10)
    worker.ask("get", name="b", timeout=10)
    worker.ask("put", name="b")
    other.ask("get", name="kept", timeout=10)
    with start("drain", str(worker.pid), "--wait", "--broker", broker.address) as draining:
        wait_until(lambda: held(broker, worker.pid) == 1, 10, "the idle one to come back")
        worker.ask("put", name="a")
        assert draining.wait(10) == 0
    assert held(broker, worker.pid) == 0
    assert other.ask("query", name="kept", sql="SELECT 1")["rows"] == [[1]]
    assert "backend" in worker.ask("get", name="again", timeout=10)
    assert sharedpool_command("drain", "1", "--broker", broker.address).returncode == 1


def test_one_lease_is_ended(worker: Worker, broker: sharedpool.Broker, name: str) -> None:
    worker.ask("get", name="a", timeout=10)
    who = sharedpool_command("who", "--pool", name, "--json", "--broker", broker.address)
    token = who.stdout.partition('"token": "')[2].partition('"')[0]
    done = sharedpool_command("kill", token, "--broker", broker.address)
    assert f"lease {token} of" in done.stdout
    assert "is being ended" in done.stdout
    wait_until(lambda: leases(broker, name) == 0, 10, "its slot to be free")
    assert "error" in worker.ask("query", name="a", sql="SELECT 1")
    assert "backend" in worker.ask("get", name="b", timeout=10)
    assert "is over" in sharedpool_command("kill", token, "--broker", broker.address).stdout
    assert sharedpool_command("kill", "nonsense", "--broker", broker.address).returncode == 2


# --- the configuration file


def test_a_configuration_file_is_read_at_start_and_again_on_sighup(
    postgres: EphemeralPostgres, runtime_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sharedpool.toml"
    file.write_text("max_conn = 2\n[groups.web]\nmin = 1\n")
    environment = {
        name: value for name, value in os.environ.items() if name != "SHAREDPOOL_MAX_CONN"
    }
    with start("broker", "--config", str(file), "--dsn", postgres.dsn, env=environment) as process:
        address = address_of(process)
        wait_for(process, "enforces 2 connections over all pools")
        with (
            Worker(dsn=postgres.dsn, broker=address, max_conn=9, group="web") as web,
            Worker(dsn=postgres.dsn, broker=address, max_conn=9, group="jobs") as jobs,
        ):
            jobs.ask("get", name="a", timeout=10)
            refused = jobs.ask("get", name="b", timeout=0)["text"]
            assert (
                "2 connections over all pools of the broker, 1 of it reserved for other groups"
                in refused
            )
            file.write_text("max_conn = 2\n[groups.web]\nmin = 3\n")
            process.send_signal(signal.SIGHUP)
            wait_for(process, "not reloaded: ")
            file.write_text(
                "max_conn = 3\nttl = 20\n[groups.web]\nmin = 1\n[groups.jobs]\nmax = 2\n"
            )
            process.send_signal(signal.SIGHUP)
            wait_for(process, "reloaded: new max_conn, groups")
            wait_for(process, "only a restart changes ttl_s")
            assert "backend" in jobs.ask("get", name="b", timeout=10)
            assert "group 'jobs'" in jobs.ask("get", name="c", timeout=0)["text"]
            assert "backend" in web.ask("get", name="x", timeout=10)
        process.terminate()
        assert process.wait(20) == 0


def test_check_config_says_what_a_file_means(tmp_path: Path) -> None:
    file = tmp_path / "sharedpool.toml"
    file.write_text(
        'max_conn = 20\ndsn = "password=secret"\n[groups.web]\nmin = 8\npriority = 1\n[pools.x]\n'
        "max_conn = 4\n"
    )
    done = sharedpool_command("check-config", str(file))
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "dsn: (given)",
        "max_conn: 20",
        "group 'web': 8 reserved, no limit of its own, priority 1",
        "pool 'x': at most 4",
    ]
    file.write_text("max_conn = 0\nfoo = 1\n")
    done = sharedpool_command("check-config", str(file))
    assert done.returncode == 2
    assert f"{file}: max_conn: " in done.stderr
    assert f"{file}: foo: " in done.stderr


def test_the_example_is_right_and_the_operators_guide_has_the_same_groups() -> None:
    example = config_file.read(documents.ROOT / "examples" / "sharedpool.toml")
    (told,) = documents.blocks(documents.section(documents.ON_CALL, "Who gets how much?"), "toml")
    file = tomllib.loads(told)
    assert file["groups"].keys() == example.groups.keys()
    assert {name: (g.reserved, g.max_conn, g.priority) for name, g in example.groups.items()} == {
        name: (table.get("min", 0), table.get("max"), table.get("priority", 0))
        for name, table in file["groups"].items()
    }


def test_the_command_line_goes_before_the_file(
    postgres: EphemeralPostgres, runtime_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sharedpool.toml"
    file.write_text("max_conn = 2\n")
    with start(
        "broker", "--config", str(file), "--max-conn", "5", "--dsn", postgres.dsn
    ) as process:
        wait_for(process, "enforces 5 connections over all pools")
        file.write_text("max_conn = 3\n")
        process.send_signal(signal.SIGHUP)
        wait_for(process, "reloaded: no changes")
        process.terminate()
        assert process.wait(20) == 0
