"""The `sharedpool` command as its users meet it: help, exit statuses, signals,
stdout and stderr."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from psycopg2.extensions import connection

import sharedpool
from sharedpool.cli import _COMMANDS
from sharedpool.cli.client import fetch_report
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.commands import (
    COMMAND,
    address_of,
    outcomes,
    sharedpool_command,
    start,
    wait_for,
)
from tests.support.processes import Piped, Worker, alive, run_python
from tests.support.waiting import wait_until

# --- every command


def test_every_command_explains_itself() -> None:
    done = sharedpool_command("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")
    for command, status, stdout, stderr in outcomes(*([name, "--help"] for name in _COMMANDS)):
        assert (status, stderr) == (0, ""), command
        assert stdout.startswith("Usage: "), command


def test_the_version_is_the_packages() -> None:
    assert (
        sharedpool_command("--version").stdout.strip()
        == f"sharedpool, version {sharedpool.__version__}"
    )


def test_a_wrong_option_is_named_and_exits_with_2(runtime_dir: Path) -> None:
    wrong = [
        (["broker"], "--max-conn"),
        (["broker", "--max-conn", "0"], "--max-conn"),
        (["broker", "--max-conn", "3", "--ttl", "-1"], "--ttl"),
        (["broker", "--max-conn", "3", "--bind", "http://x"], "--bind"),
        (["broker", "--max-conn", "3", "--bind", "ipc:///" + "x" * 200], "longer than"),
        (["broker", "--max-conn", "3", "--dsn", "nonsense"], "dsn"),
        (["run", "--max-conn", "3"], "COMMAND"),
        (["run", "--", "true"], "--max-conn"),
        (["status", "--broker", "nonsense"], "--broker"),
        (["who", "--broker", "nonsense"], "--broker"),
        (["reconnect", "--broker", "nonsense"], "--broker"),
        (["frobnicate"], "frobnicate"),
    ]
    commands, complaints = zip(*wrong, strict=True)
    for (command, status, stdout, stderr), complaint in zip(
        outcomes(*commands), complaints, strict=True
    ):
        assert (status, stdout) == (2, ""), command
        assert complaint in stderr, command


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    assert "_SHAREDPOOL_COMPLETE" in sharedpool_command("completion", shell).stdout


def test_the_shell_completes_commands_and_options() -> None:
    for words, expected in (("sharedpool w", "who"), ("sharedpool top --int", "--interval")):
        typed: dict[str, Any] = {
            "_SHAREDPOOL_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        done = run_python("from sharedpool.cli import main; main(prog_name='sharedpool')", **typed)
        assert done.stdout.split() == [f"plain,{expected}"]


# --- broker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_broker_says_what_it_enforces_and_stops_cleanly(
    number: signal.Signals, postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    # It waits for what the worker holds: no longer than this.
    options = ["--max-conn", "4", "--dsn", postgres.dsn, "--drain-timeout", "0.2"]
    with start("broker", *options) as process:
        address = address_of(process)
        wait_for(process, "enforces 4 connections over all pools")
        with Worker(dsn=postgres.dsn, broker=address) as worker:
            backend = worker.ask("get", name="x")["backend"]
            process.send_signal(number)
            output, _ = process.communicate(timeout=20)
            assert process.returncode == 0
            assert output == ""  # the log is stderr's
            # What the worker holds is its own.
            assert worker.ask("query", name="x", sql="SELECT pg_backend_pid()")["rows"] == [
                [backend]
            ]
    assert not Path(address.removeprefix("ipc://")).exists()


def test_a_broker_refuses_to_start_twice_on_one_address(runtime_dir: Path) -> None:
    with start("broker", "--max-conn", "4") as process:
        wait_for(process, "SHAREDPOOL_BROKER")
        second = sharedpool_command("broker", "--max-conn", "9")
        assert second.returncode == 1
        assert f"a broker (process {process.pid}) already holds" in second.stderr
        assert sharedpool_command("status", "--json").stdout.count('"max_conn": 4') == 1
        process.terminate()
        process.communicate()


def test_a_killed_brokers_address_can_be_used_again(runtime_dir: Path) -> None:
    for _ in range(2):
        with start("broker", "--max-conn", "4") as process:
            wait_for(process, "SHAREDPOOL_BROKER")
            process.kill()
            process.communicate()


def test_every_option_is_also_an_environment_variable(
    runtime_dir: Path, postgres: EphemeralPostgres
) -> None:
    environment = os.environ | {
        "SHAREDPOOL_MAX_CONN": "7",
        "SHAREDPOOL_BIND": f"ipc://{runtime_dir}/env.sock",
        "SHAREDPOOL_EXPIRATION": "11",
        "SHAREDPOOL_MAX_CHECKOUT": "12",
        "SHAREDPOOL_TTL": "13",
        "SHAREDPOOL_LINGER": "0.2",
        "SHAREDPOOL_DSN": postgres.dsn,
    }
    done = sharedpool_command("broker", env=environment)  # ends by itself: nobody uses it
    assert done.returncode == 0
    assert "enforces 7 connections" in done.stderr
    assert f"{runtime_dir}/env.sock" in done.stderr
    assert "control connection: backend" in done.stderr
    assert "unused for" in done.stderr
    text = sharedpool_command("broker", "--help").stdout
    for name in environment.keys() - os.environ.keys():
        assert name in text


def test_the_brokers_expiration_is_the_longest_a_pool_may_ask_for(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    with start(
        "broker", "--max-conn", "4", "--expiration", "0.3", "--dsn", postgres.dsn
    ) as process:
        address = address_of(process)
        with Worker(dsn=postgres.dsn, broker=address, expiration=600) as worker:
            worker.ask("get", name="x")
            worker.ask("put", name="x")
            wait_until(lambda: worker.ask("stats")["idle"] == 0)
        process.terminate()
        process.communicate()


def test_a_broker_takes_no_file_that_is_not_a_socket(runtime_dir: Path) -> None:
    precious = runtime_dir / "precious.txt"
    precious.write_text("mine")
    done = sharedpool_command("broker", "--max-conn", "4", "--bind", f"ipc://{precious}")
    assert done.returncode == 1
    assert "it exists and is not a socket" in done.stderr
    assert precious.read_text() == "mine"


def test_a_control_connection_that_may_only_look_waits_for_the_backends_own_end(
    postgres: EphemeralPostgres, server_connection: connection, runtime_dir: Path
) -> None:
    with server_connection.cursor() as cursor:
        cursor.execute("DROP ROLE IF EXISTS looker")
        cursor.execute("CREATE ROLE looker LOGIN IN ROLE pg_monitor")
    with start("broker", "--max-conn", "1", "--dsn", f"{postgres.dsn} user=looker") as process:
        address = address_of(process)
        with (
            Worker(dsn=postgres.dsn, broker=address, name="looked") as a,
            Worker(dsn=postgres.dsn, broker=address, name="looked") as b,
        ):
            backend = a.ask("get", name="x")["backend"]
            # The server is not to notice a client that is gone before the broker has tried.
            a.ask("query", name="x", sql="SET client_connection_check_interval = 0")
            a.send("query", name="x", sql="SELECT pg_sleep(60)")

            def active() -> bool:
                with server_connection.cursor() as cursor:
                    cursor.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", [backend])
                    return cursor.fetchone() == ("active",)

            wait_until(active)
            a.kill()
            wait_for(process, "may not end backends")
            b.send("get", name="y", timeout=30)
            assert fetch_report(address).leases == 1  # the end is waited for
            with server_connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s)", [backend])
            assert "backend" in b.answer()
        process.terminate()
        _, errors = process.communicate()
    assert "may not end backends" not in errors  # it is said once
    assert "lost" not in errors


# --- status


def test_status_shows_who_holds_what(
    postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    with Worker(dsn=postgres.dsn, broker=broker.address, name="shown", max_conn=3) as worker:
        worker.ask("get", name="x")
        worker.ask("get", name="y")
        worker.ask("put", name="y")
        seen = json.loads(sharedpool_command("status", "--json", "--broker", broker.address).stdout)
        (pool,) = [pool for pool in seen["pools"] if pool["name"] == "shown"]
        assert (pool["max_conn"], pool["leases"], pool["sessions"]) == (3, 2, 1)
        text = sharedpool_command(
            "status", env=os.environ | {"SHAREDPOOL_BROKER": broker.address}
        ).stdout
        assert f"worker.py[{worker.pid}]" in text
        assert "shown" in text
        assert "WAITING" in text

        def idle() -> bool:
            report = json.loads(
                sharedpool_command("status", "--json", "--broker", broker.address).stdout
            )
            return any(pool["name"] == "shown" and pool["idle"] == 1 for pool in report["pools"])

        wait_until(idle, what="the heartbeat to tell")


def test_status_without_a_broker_says_so_with_3(runtime_dir: Path) -> None:
    done = sharedpool_command("status")
    assert done.returncode == 3
    assert "no broker is running" in done.stderr
    for command in ("status", "who"):  # programs get JSON all the same
        assert sharedpool_command(command, "--json").stdout == "[]\n"
    done = sharedpool_command("status", "--broker", f"ipc://{runtime_dir}/nobody.sock")
    assert done.returncode == 3
    assert "no broker answers" in done.stderr


# --- run


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + 15)]
)
def test_run_ends_as_its_command_ends(script: str, status: int, runtime_dir: Path) -> None:
    done = sharedpool_command("run", "--max-conn", "3", "--", "sh", "-c", script)
    assert done.returncode == status
    assert list((runtime_dir / "sharedpool").iterdir()) == []


def test_run_takes_a_commands_own_options_and_passes_its_output_on(runtime_dir: Path) -> None:
    done = sharedpool_command(
        "run",
        "--max-conn",
        "3",
        "sh",
        "-c",
        'read line; echo "$line $SHAREDPOOL_BROKER"',
        input="in\n",
    )
    assert done.stdout.startswith("in ipc://")
    assert done.returncode == 0


def test_run_says_when_there_is_no_such_command(runtime_dir: Path) -> None:
    done = sharedpool_command("run", "--max-conn", "3", "--", "no-such-command-here")
    assert done.returncode == 127
    assert "command not found: no-such-command-here" in done.stderr
    done = sharedpool_command("run", "--max-conn", "3", "--", str(runtime_dir))
    assert done.returncode == 126


def test_run_gives_its_command_one_shared_limit(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    script = (
        "import sharedpool, sys\n"
        "pool = sharedpool.config_pool(max_conn=9)\n"
        "kept = [pool.get_conn(), pool.get_conn()]\n"
        "print(pool.max_conn)\n"
        "try:\n    pool.get_conn()\nexcept sharedpool.PoolExhausted:\n    print('exhausted')\n"
    )
    environment = os.environ | {"DATABASE_DSN": postgres.dsn}
    done = sharedpool_command(
        "run", "--max-conn", "2", "--", sys.executable, "-c", script, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "exhausted"]


def test_run_works_where_dead_children_are_ignored(runtime_dir: Path) -> None:
    command = [
        "sh",
        "-c",
        'trap "" CHLD; exec "$@"',
        "sh",
        *COMMAND,
        "run",
        "--max-conn",
        "3",
        "--",
        "sh",
        "-c",
        "exit 5",
    ]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 5


def test_run_reaps_the_orphans_that_pid_1_of_a_container_is_given(runtime_dir: Path) -> None:
    """PR_SET_CHILD_SUBREAPER (36) makes a process the one that orphans fall to, as PID 1 is; an
    exec keeps it."""
    orphan = "import os; print(os.getpid(), flush=True)"
    command = (
        "import subprocess, sys; parent = 'import subprocess, sys; "
        "subprocess.Popen([sys.executable, *sys.argv[1:]])';"
        f"subprocess.run([sys.executable, '-c', parent, '-c', {orphan!r}]); sys.stdin.read()"
    )
    first = (
        "import ctypes, os, sys; assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0;"
        "os.execv(sys.executable, [sys.executable, '-m', 'sharedpool', 'run', '--max-conn', '3', "
        "'--', *sys.argv[1:]])"
    )
    with Piped(sys.executable, "-c", first, sys.executable, "-c", command) as process:
        pid = int(process.line())
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), what="the orphan to be reaped")
        process.tell_no_more()
        assert process.wait(20) == 0


def test_run_gives_its_command_the_usual_signals(runtime_dir: Path) -> None:
    done = sharedpool_command("run", "--max-conn", "3", "--", "sh", "-c", "yes | head -1")
    assert done.stdout == "y\n"
    assert "Broken pipe" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_run_passes_signals_on(number: signal.Signals, runtime_dir: Path) -> None:
    script = (
        "import signal, sys\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(42))\n"
        "print('ready', flush=True)\n"
        "while True:\n    signal.pause()\n"
    )
    with start("run", "--max-conn", "3", "--", sys.executable, "-c", script) as process:
        assert process.line() == "ready"
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == 42
    wait_until(lambda: not alive(process.pid))
