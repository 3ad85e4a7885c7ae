"""`sharedpool who`, and the line of code that a refusal names: real processes, a real server."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from psycopg2.extensions import connection

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.core.reporting import lease_reports
from tests.support.commands import address_of, sharedpool_command, start, wait_for, who
from tests.support.fixture_types import MakePool
from tests.support.processes import Worker
from tests.support.waiting import wait_until

WORKER = str(Path(__file__).parents[1] / "support" / "worker.py")


def test_who_shows_the_holder_its_line_of_code_and_what_the_server_says(
    postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    with Worker(
        dsn=postgres.dsn,
        broker=broker.address,
        name="asked",
        application_name="web",
        debug_checkouts=True,
    ) as worker:
        backend = worker.ask("get", name="x", timeout=10)["backend"]
        worker.send("query", name="x", sql="SELECT pg_sleep(60) /* " + "é\u001b[2J" * 60 + " */")

        def running() -> list[dict[str, Any]]:
            rows = who(broker.address, "--pool", "asked")
            return rows if rows and rows[0]["server_state"] == "active" and rows[0]["stack"] else []

        (row,) = wait_until(running, what="the heartbeat and the query")
        assert (row["pool"], row["pid"], row["title"], row["thread"]) == (
            "asked",
            worker.pid,
            "worker.py",
            "MainThread",
        )
        assert (row["state"], row["backend"]["pid"], row["application"]) == (
            "in use",
            backend,
            "web",
        )
        assert row["wait_event"] == "Timeout: PgSleep"
        assert row["query"].startswith("SELECT pg_sleep(60) /* é")
        assert len(row["query"]) == 60
        assert row["query"].isprintable()
        assert row["stack"][0].endswith("in get")
        assert f"{Path(WORKER).name}:" in row["stack"][0]

        text = sharedpool_command(
            "who", env=os.environ | {"SHAREDPOOL_BROKER": broker.address}
        ).stdout
        (line,) = [line for line in text.splitlines() if "asked" in line]
        for part in (
            f"worker.py[{worker.pid}]",
            "MainThread",
            str(backend),
            "web",
            "active, Timeout: PgSleep",
            "in get",
        ):
            assert part in line
        worker.kill()


def test_who_shows_the_present_state_not_the_last_heartbeats(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    """With this TTL a heartbeat comes every twenty seconds."""
    with start("broker", "--max-conn", "2", "--dsn", postgres.dsn, "--ttl", "60") as process:
        address = address_of(process)
        with Worker(dsn=postgres.dsn, broker=address, debug_checkouts=True) as worker:

            def is_shown(state: str, site: bool) -> bool:
                (row,) = who(address)
                assert row["pid"] == worker.pid
                return row["state"] == state and bool(row["thread"]) == bool(row["stack"]) == site

            def shows(state: str, site: bool) -> None:
                wait_until(lambda: is_shown(state, site), 8, f"{state}, long before a heartbeat")

            for _ in range(2):
                worker.ask("get", name="x", timeout=10)
                shows("in use", site=True)
                worker.ask("put", name="x")
                shows("idle", site=False)
            worker.ask("get", name="x")
            worker.kill(signal.SIGSTOP)
            assert is_shown("idle", site=False)  # who cannot answer is shown as it was
            worker.kill(signal.SIGCONT)
            shows("in use", site=True)
        process.terminate()
        process.communicate()


def test_who_is_sorted_by_age_and_tells_who_waits(
    postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    settings: dict[str, Any] = {
        "dsn": postgres.dsn,
        "broker": broker.address,
        "name": "aged",
        "max_conn": 2,
    }
    with Worker(**settings) as first, Worker(**settings) as second, Worker(**settings) as third:
        first.ask("get", name="x", timeout=10)
        second.ask("get", name="x", timeout=10)
        third.send("get", name="x", timeout=30)
        ages: list[int] = []

        def in_use() -> bool:
            rows = who(broker.address, "--pool", "aged")
            ages[:] = [row["age_ms"] for row in rows]
            return [row["pid"] for row in rows] == [first.pid, second.pid]

        wait_until(in_use)
        assert ages == sorted(ages, reverse=True)
        done = sharedpool_command("who", "--broker", broker.address)
        assert "pool 'aged': 1 wait for a connection" in done.stderr
        assert "debug_checkouts=True" in done.stderr
        assert "CHECKED OUT AT" not in done.stdout
        second.ask("put", name="x")
        assert "backend" in third.answer()


def test_columns_that_the_control_connection_may_not_see_are_not_guessed(
    postgres: EphemeralPostgres, server_connection: connection, runtime_dir: Path
) -> None:
    with server_connection.cursor() as cursor:
        cursor.execute("DROP ROLE IF EXISTS stranger")
        cursor.execute("CREATE ROLE stranger LOGIN")
    with start("broker", "--max-conn", "2", "--dsn", f"{postgres.dsn} user=stranger") as process:
        address = address_of(process)
        wait_for(process, "control connection: backend")
        with Worker(dsn=postgres.dsn, broker=address, application_name="hidden") as worker:
            worker.ask("get", name="x", timeout=10)
            (row,) = who(address)
            assert (row["application"], row["server_state"], row["wait_event"], row["query"]) == (
                "hidden",
            ) + (None,) * 3
            assert "(not visible)" in sharedpool_command("who", "--broker", address).stdout
        process.terminate()
        process.communicate()


def test_a_server_that_hangs_keeps_nobody_from_seeing_the_books(
    postgres: EphemeralPostgres, server_connection: connection, runtime_dir: Path
) -> None:
    with start("broker", "--max-conn", "2", "--dsn", postgres.dsn) as process:
        address = address_of(process)
        control = int(
            wait_for(process, "control connection: backend").split("backend ")[1].split()[0]
        )
        with Worker(dsn=postgres.dsn, broker=address) as worker:
            worker.ask("get", name="x", timeout=10)
            os.kill(control, signal.SIGSTOP)
            try:
                done = sharedpool_command("who", "--broker", address)
            finally:
                os.kill(control, signal.SIGCONT)
            assert f"worker.py[{worker.pid}]" in done.stdout
            assert "the server has not answered" in done.stderr
            assert done.returncode == 0
            wait_until(
                lambda: who(address)[0]["server_state"] == "idle",
                what="the control connection to go on",
            )
        process.terminate()
        process.communicate()


def test_without_a_control_connection_the_books_are_shown(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    with start("broker", "--max-conn", "2") as process:
        address = address_of(process)
        with Worker(dsn=postgres.dsn, broker=address) as worker:
            worker.ask("get", name="x", timeout=10)
            (row,) = who(address)
            assert (row["pid"], row["server_state"], row["application"]) == (worker.pid, None, None)
        process.terminate()
        process.communicate()


def test_who_without_a_broker_says_so_with_3(runtime_dir: Path) -> None:
    done = sharedpool_command("who")
    assert done.returncode == 3
    assert "no broker is running" in done.stderr
    assert sharedpool_command("who", "--broker", f"ipc://{runtime_dir}/nobody.sock").returncode == 3


# --- debug_checkouts


@pytest.mark.parametrize("timeout", [0, 0.2])
def test_a_refusal_names_the_line_of_this_processs_own_leak(
    make_pool: MakePool, timeout: float
) -> None:
    pool = make_pool(max_conn=1, debug_checkouts=True)

    def leak() -> Any:
        return pool.get_conn(timeout=10)

    kept = leak()
    with pytest.raises(sharedpool.PoolError) as refused:
        pool.get_conn(timeout=timeout)
    line = leak.__code__.co_firstlineno + 1
    assert type(refused.value) is (sharedpool.PoolTimeout if timeout else sharedpool.PoolExhausted)
    assert f"test_who.py:{line} in {leak.__qualname__}"[-60:] in str(refused.value)
    pool.put_conn(kept)


@pytest.mark.parametrize("timeout", [0, 0.2])
def test_a_refusal_names_the_line_of_another_processs_leak(
    make_pool: MakePool, postgres: EphemeralPostgres, timeout: float
) -> None:
    pool = make_pool(max_conn=1)
    with Worker(
        dsn=postgres.dsn,
        broker=pool.config.broker,
        name=pool.name,
        max_conn=1,
        debug_checkouts=True,
    ) as worker:
        worker.ask("get", name="x", timeout=10)

        def refused() -> bool:  # until the holder has been asked, or its heartbeat has come
            with pytest.raises(sharedpool.PoolError) as error:
                pool.get_conn(timeout=timeout)
            text = str(error.value)
            return (
                f"worker.py[{worker.pid}] 1 (longest" in text
                and "checked out at" in text
                and "in get)" in text
            )

        wait_until(refused)


def test_every_way_of_checking_out_is_known_by_its_users_line(make_pool: MakePool) -> None:
    pool = make_pool(
        debug_checkouts=True, pool_manager=sharedpool.ThreadedConnectionPool, max_conn=3
    )

    def by_hand() -> Any:
        conn = pool.get_conn(timeout=10)
        seen = sites(pool)
        pool.put_conn(conn)
        return seen

    def by_block() -> Any:
        with pool.connection(timeout=10):
            return sites(pool)

    def by_pgsimple() -> Any:
        with sharedpool.PgSimple(pool) as db:
            db.execute("SELECT 1")
            return sites(pool)

    for way in (by_hand, by_block, by_pgsimple, by_hand):  # the last one finds it idle
        (site,) = way()
        assert site.endswith(f"{way.__name__}"), site


def sites(pool: sharedpool.Pool) -> list[str]:
    """What the next heartbeat says."""
    return [
        report.stack[0]
        for report in lease_reports(pool._local.cache.leases.values(), 0.0, {})
        if report.stack
    ]


def test_without_debug_checkouts_the_fast_path_is_open_and_nothing_is_noted(
    make_pool: MakePool,
) -> None:
    """A checkout of an idle connection runs not one instruction more."""
    plain, noted = make_pool(), make_pool(debug_checkouts=True)
    for pool in (plain, noted):
        for _ in range(2):
            pool.put_conn(pool.get_conn(timeout=10))
        assert pool.stats().hits == 1
    assert plain._fast_path[0]
    assert not noted._fast_path[0]
    kept = plain.get_conn()
    assert sites(plain) == []
    plain.put_conn(kept)


def test_a_connection_handed_over_is_known_by_its_new_users_line(
    make_pool: MakePool, postgres: EphemeralPostgres
) -> None:
    pool = make_pool(max_conn=1, debug_checkouts=True)
    kept = pool.get_conn(timeout=10)
    backend = kept.info.backend_pid
    with Worker(
        dsn=postgres.dsn,
        broker=pool.config.broker,
        name=pool.name,
        max_conn=1,
        debug_checkouts=True,
    ) as worker:
        worker.send("get", name="x", timeout=30)
        address = str(pool.config.broker)
        wait_until(
            lambda: any(
                each["name"] == pool.name and each["waiting"]
                for each in json.loads(
                    sharedpool_command("status", "--json", "--broker", address).stdout
                )["pools"]
            )
        )
        pool.put_conn(kept)
        assert worker.answer()["backend"] == backend

        def known() -> bool:
            (row,) = who(address, "--pool", pool.name)
            return (
                row["pid"] == worker.pid
                and bool(row["stack"])
                and row["stack"][0].endswith("in get")
            )

        wait_until(known)


def test_the_report_of_a_long_checkout_carries_its_stack(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    options = ["--max-conn", "2", "--dsn", postgres.dsn, "--ttl", "0.9", "--max-checkout", "0.6"]
    with start("broker", *options) as process:
        address = address_of(process)
        with Worker(dsn=postgres.dsn, broker=address, debug_checkouts=True) as worker:
            worker.ask("get", name="x", timeout=10)
            text = wait_for(process, "has been checked out for")
            assert "worker.py:" in text
            assert " in get < " in text
        process.terminate()
        process.communicate()
