"""The broker's log: quiet in good times, one event a line, as text or JSON."""

import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.cli.logs import JsonLines
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.commands import address_of, sharedpool_command, start, wait_for
from tests.support.processes import Worker


def event(line: str) -> dict[str, Any]:
    found = json.loads(line)
    assert isinstance(found, dict), line
    return found


def test_a_json_log_tells_whom_an_event_concerns(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    options = ["--max-conn", "2", "--dsn", postgres.dsn, "--ttl", "0.9", "--max-checkout", "0.2"]
    begun = datetime.now(UTC)
    with start("broker", *options, "--log-format", "json") as process:
        first = wait_for(process, "export SHAREDPOOL_BROKER=")
        address = event(first)["message"].split("=", 1)[1]
        lines = [first]
        with Worker(dsn=postgres.dsn, broker=address, name="told") as worker:
            worker.ask("get", name="x", timeout=10)
            lines.append(wait_for(process, "has been checked out for"))
            worker.kill()
            # Its line to the desk and its process are watched: whichever is seen to end first is
            # told of.
            lines.append(wait_for(process, "leases are ended"))
        process.terminate()
        _, rest = process.communicate(timeout=20)
    events = [event(line) for line in [*lines, *rest.splitlines()]]
    for each in events:
        assert timedelta() <= datetime.fromisoformat(each["time"]) - begun + timedelta(
            milliseconds=1
        )
        assert each["logger"] == "sharedpool.broker"
        assert each["level"] in ("info", "warning")
        assert each["message"]
    _, long, death, *_ = events
    who = {"pool": "told", "session": f"worker.py[{worker.pid}]"}
    assert who.items() <= long.items()
    assert who.items() <= death.items()
    assert (long["level"], long["reason"]) == ("warning", "max_checkout")
    assert long["lease"] == f"{long['epoch']}-1"
    assert (death["level"], death["reason"]) in [
        ("info", "its worker died"),
        ("info", "its worker ended"),
    ]
    assert len([each for each in events if each["message"].endswith("leases are ended")]) == 1
    assert death["epoch"] == long["epoch"]


def test_in_good_times_a_broker_says_only_that_it_begins_and_ends(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    with start("broker", "--max-conn", "2", "--dsn", postgres.dsn, "--ttl", "1.5") as process:
        address = address_of(process)
        said = [wait_for(process, "enforces"), wait_for(process, "control connection: backend")]
        with (
            Worker(dsn=postgres.dsn, broker=address) as one,
            Worker(dsn=postgres.dsn, broker=address) as other,
        ):
            for worker in (one, other) * 5:
                worker.ask("get", name="x", timeout=10)
                worker.ask("get", name="y", timeout=10)
                worker.ask("put", name="x")
                worker.ask("put", name="y", close=True)
        process.terminate()
        _, rest = process.communicate(timeout=20)
    said += rest.splitlines()
    assert len(said) == 4, "".join(said)
    parts = ("enforces", "control connection: backend", "draining 0 leases", "stopped")
    for line, part in zip(said, parts, strict=True):
        assert part in line
        assert " INFO sharedpool.broker: " in line


def test_run_and_the_environment_choose_the_format_too(runtime_dir: Path) -> None:
    done = sharedpool_command("run", "--max-conn", "3", "--log-format", "json", "--", "true")
    assert [event(line)["level"] for line in done.stderr.splitlines()]
    environment = os.environ | {"SHAREDPOOL_LOG_FORMAT": "json"}
    done = sharedpool_command("broker", "--max-conn", "3", "--linger", "0.1", env=environment)
    assert any("enforces 3" in event(line)["message"] for line in done.stderr.splitlines())
    done = sharedpool_command("broker", "--max-conn", "3", "--log-format", "xml")
    assert done.returncode == 2
    assert "--log-format" in done.stderr


def test_a_traceback_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord(
            "sharedpool.broker", logging.ERROR, "", 1, "it %s\n", ("failed",), sys.exc_info()
        )
    line = JsonLines().format(record)
    assert "\n" not in line
    found = event(line)
    assert (found["message"], found["level"]) == ("it failed\n", "error")
    assert "ValueError: two\nlines" in found["exception"]


@pytest.mark.parametrize("value", [object(), b"\xff"])
def test_no_field_can_keep_an_event_from_being_written(value: object) -> None:
    record = logging.LogRecord("sharedpool.broker", logging.INFO, "", 1, "x", (), None)
    record.sharedpool = {"reason": value}
    assert event(JsonLines().format(record))["reason"] == str(value)


# --- a worker's log, and handlers that use the pool themselves

_TO_THE_DATABASE = """
import logging, sys, threading, time
import sharedpool

def tell(line):  # in one piece: two threads do, and print() writes a line's end by itself
    sys.stderr.write(line + "\\n")

dsn, broker, at_exit = sys.argv[1:]
pool = sharedpool.config_pool(
    max_conn=2, dsn=dsn, broker=broker, name="told", timeout=20,
    pool_manager=sharedpool.ThreadedConnectionPool,
)

class ToTheDatabase(logging.Handler):
    def emit(self, record):
        with pool.connection() as conn, conn.cursor() as cursor:
            cursor.execute("SELECT %s", [self.format(record)])
            (written,) = cursor.fetchone()
        tell(f"written by {threading.current_thread().name} {written}")

class Slow(logging.Handler):
    def emit(self, record):
        time.sleep(0.3)
        tell(f"told {record.threadName} {record.funcName} {record.getMessage()}")

logging.getLogger().addHandler(Slow() if at_exit else ToTheDatabase())
began = time.monotonic()
with pool.connection() as conn, conn.cursor() as cursor:
    cursor.execute("SELECT 1")
tell(f"checked out after {time.monotonic() - began}")
if not at_exit:
    sys.stdin.read()
"""


def with_handler(
    postgres: EphemeralPostgres, broker: sharedpool.Broker, at_exit: str = ""
) -> "subprocess.Popen[str]":
    """Start a process whose limit is not the one that is enforced: its link logs a warning at the
    first checkout."""
    command = [sys.executable, "-c", _TO_THE_DATABASE, postgres.dsn, broker.address, at_exit]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_handler_that_writes_to_the_database_by_the_pool_keeps_nobody_waiting(
    postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    with Worker(dsn=postgres.dsn, broker=broker.address, name="told", max_conn=3) as worker:
        worker.ask("get", name="x", timeout=10)
        worker.ask("put", name="x")
        with with_handler(postgres, broker) as process:
            said = [wait_for(process, " "), wait_for(process, " ")]  # in either order
            _, rest = process.communicate(timeout=20)
        by_subject = {line.split()[0]: line for line in said}
        assert float(by_subject["checked"].split()[-1]) < 5
        assert "max_conn=2 was asked for, 3 is enforced" in by_subject["written"]
        assert rest == ""


def test_no_record_is_lost_when_the_process_ends_at_once(
    postgres: EphemeralPostgres, broker: sharedpool.Broker
) -> None:
    with Worker(dsn=postgres.dsn, broker=broker.address, name="told", max_conn=3) as worker:
        worker.ask("get", name="x", timeout=10)
        worker.ask("put", name="x")
        with with_handler(postgres, broker, "at exit") as process:
            _, said = process.communicate(timeout=20)
        assert "told sharedpool-link _welcomed pool 'told': max_conn=2 was asked for" in said
        assert "Traceback" not in said
