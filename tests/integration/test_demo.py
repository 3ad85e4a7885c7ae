"""`sharedpool demo`: its figures hold, its verdict is honest, and nothing of it stays."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest

from sharedpool.cli.demo.view import Moment, Summary, as_document, as_text, judge, panel, plain_line
from sharedpool.descriptors.readable import readable
from tests.support.commands import outcomes
from tests.support.waiting import wait_until

SHORT = ("--workers", "3", "--max-conn", "2", "--seconds", "1.5")
GOOD = Summary(
    workers=4,
    max_conn=2,
    elapsed_s=1.5,
    peak=2,
    samples=100,
    gap_ms=20.0,
    committed=300,
    transfers=300,
    idle_workers=0,
    wait_p50_ms=0.1,
    wait_p99_ms=20.0,
    recalls=7,
    errors={},
    balance_before=100_000,
    balance_after=100_000,
)

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for all that a demo makes; by its unique name its processes are known too."""
    with tempfile.TemporaryDirectory(prefix="spd-", dir="/tmp") as path:
        Path(path).chmod(0o755)  # under root the server runs as somebody else
        yield Path(path)


@pytest.fixture
def run(place: Path) -> Iterator[Run]:
    """Start `sharedpool demo` in a process group of its own; all of it is killed at the end."""
    started = []

    def start(
        *arguments: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "sharedpool", "demo", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            process_group=0,
            # Every process inherits it: the mark by which `left_over` finds them.
            env={
                **os.environ,
                "TMPDIR": str(place),
                "PGAPPNAME": "not the pool",
                "PGOPTIONS": "-c search_path=nowhere",
            },
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def left_over(place: Path) -> list[str]:
    """Everything that is still there of the demos in `place`: processes by their environment or
    folder, and files."""
    found = [str(path) for path in place.iterdir()]
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                str(place).encode()
                in (entry / "environ").read_bytes() + os.readlink(entry / "cwd").encode()
            ):
                found.append(
                    f"{entry.name} "
                    + (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                )
    return found


def read_until(process: "subprocess.Popen[str]", pattern: str) -> str:
    """Read the process's stderr until the pattern has come; return all of it."""
    assert process.stderr is not None
    text = ""
    while not re.search(pattern, text):
        assert readable([process.stderr], 40), f"no {pattern!r} in {text!r}"
        chunk = os.read(process.stderr.fileno(), 4096).decode()
        assert chunk, f"no {pattern!r} in {text!r}"
        text += chunk
    return text


def test_figures_of_a_run_hold_and_nothing_stays(run: Run, place: Path) -> None:
    process = run(*SHORT, "--json")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, out + err
    figures = json.loads(out)
    assert figures["passed"] is True
    assert 0 < figures["peak"] <= figures["max_conn"] == 2
    assert figures["samples"] > 20
    assert figures["committed"] == figures["transfers"] > 0
    assert figures["balance_before"] == figures["balance_after"] == 100_000
    assert figures["errors"] == {}
    assert figures["idle_workers"] == 0
    assert figures["wait_p50_ms"] <= figures["wait_p99_ms"]
    assert "leases" in err  # plain lines, as there is no terminal
    assert "\x1b" not in out + err
    wait_until(lambda: not left_over(place), what="everything to be gone")


@pytest.mark.long_variants
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, r"starting PostgreSQL"),
        (signal.SIGINT, r"starting 3 processes"),
        (signal.SIGINT, r" tx/s"),
        (signal.SIGTERM, r" tx/s"),
    ],
)
def test_signal_to_the_whole_group_leaves_nothing(
    run: Run, place: Path, number: signal.Signals, moment: str
) -> None:
    process = run("--workers", "3", "--max-conn", "2", "--seconds", "60")
    said = read_until(process, moment)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said + err
    assert out == ""
    assert f"stopped by {number.name}" in err
    assert "Traceback" not in said + err
    wait_until(lambda: not left_over(place), what="everything to be gone")


def test_killed_demo_leaves_nothing_either(run: Run, place: Path) -> None:
    process = run("--workers", "3", "--max-conn", "2", "--seconds", "60")
    read_until(process, r" tx/s")
    process.kill()
    wait_until(lambda: not left_over(place), timeout_s=20, what="everything to be gone")


@pytest.mark.long
def test_lost_worker_fails_the_run(run: Run, place: Path) -> None:
    process = run("--workers", "3", "--max-conn", "2", "--seconds", "2", "--json")
    read_until(process, r" tx/s")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)  # the last that was started is a worker
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1, out + err
    figures = json.loads(out)
    assert figures["errors"] == {"worker lost": 1}
    assert figures["peak"] <= 2
    assert figures["balance_before"] == figures["balance_after"]
    wait_until(lambda: not left_over(place), what="everything to be gone")


@pytest.mark.long
def test_one_connection_above_the_limit_fails_the_run(run: Run, place: Path) -> None:
    process = run("--workers", "3", "--max-conn", "2", "--seconds", "2", "--json")
    read_until(process, r" tx/s")
    (directory,) = place.glob("sharedpool-pg-*")
    connection = psycopg2.connect(host=str(directory), user="postgres", dbname="postgres")
    try:
        out, err = process.communicate(timeout=100)
    finally:
        connection.close()
    assert process.returncode == 1, out + err
    figures = json.loads(out)
    assert figures["peak"] == 3
    assert [condition["name"] for condition in figures["conditions"] if not condition["holds"]] == [
        "server connections never above the limit"
    ]


def test_live_view_gives_the_terminal_back_after_ctrl_c(run: Run, place: Path) -> None:
    pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    try:
        process = run(
            "--workers", "2", "--max-conn", "1", "--seconds", "60", stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        text, stopped = "", False
        with contextlib.suppress(OSError):  # how Linux says that nobody holds the terminal any more
            while readable([ours], 40) and (chunk := os.read(ours, 65536)):
                text += chunk.decode(errors="replace")
                if not stopped and "peak 1" in text:
                    stopped = True
                    os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130, text
    finally:
        os.close(ours)
    assert "2 processes share 1 connections" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor went, and came back
    assert "stopped by SIGINT" in text[text.index("\x1b[?25h") :]
    wait_until(lambda: not left_over(place), what="everything to be gone")


def test_no_server_programs_is_a_clear_error(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDPOOL_PG_BIN", str(place))
    process = run(*SHORT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert f"Error: SHAREDPOOL_PG_BIN={place} has no executable initdb" in err
    assert "Traceback" not in err


def test_bad_option_is_a_usage_error() -> None:
    bad = [["--workers", "0"], ["--max-conn", "0"], ["--seconds", "0"], ["--seconds", "x"]]
    for command, status, _, stderr in outcomes(*(["demo", *each] for each in bad)):
        assert status == 2, command
        assert command.split()[1] in stderr, command


# --- the verdict


def test_good_run_passes() -> None:
    assert all(condition.holds for condition in judge(GOOD))
    assert as_document(GOOD)["passed"] is True
    assert "FAIL" not in as_text(GOOD)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (replace(GOOD, peak=3), "server connections never above the limit"),
        (replace(GOOD, peak=0), "server connections never above the limit"),
        (replace(GOOD, balance_after=99_999), "total balance unchanged"),
        (replace(GOOD, transfers=301), "no transaction lost or doubled"),
        (replace(GOOD, errors={"PoolTimeout": 1}), "no errors"),
        (replace(GOOD, idle_workers=1), "every process committed something"),
    ],
)
def test_each_broken_condition_fails_alone(broken: Summary, name: str) -> None:
    assert [condition.name for condition in judge(broken) if not condition.holds] == [name]
    assert as_document(broken)["passed"] is False
    assert f"FAIL  {name}" in as_text(broken)


def test_limit_that_was_not_reached_is_no_failure() -> None:
    below = replace(GOOD, peak=1)
    assert all(condition.holds for condition in judge(below))
    assert "never reached" in as_text(below)


@pytest.mark.parametrize("limit", [1, 5, 60, 5000])
def test_views_fit_a_small_terminal(limit: int) -> None:
    console = pytest.importorskip("rich.console").Console(
        width=80, height=24, record=True, file=io.StringIO()
    )
    moment = Moment(
        1,
        8,
        10000,
        limit,
        limit // 2,
        limit // 4,
        1,
        1,
        1,
        300,
        12345,
        limit + 1,
        limit + 1,
        9999,
        10**6,
        1e4,
        3,
    )
    console.print(panel(moment, [float(i) for i in range(240)]))
    lines = console.export_text().splitlines()
    assert len(lines) < 20
    assert max(map(len, lines)) <= 76
    assert f"peak {limit + 1}" in "".join(lines)
    assert f"peak {limit + 1} " in plain_line(moment)
