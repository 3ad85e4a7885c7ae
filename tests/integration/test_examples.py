"""Every example does what its own docstring says, by the command given there, and the server never
sees too many."""

import ast
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg2
import psycopg2.extensions
import pytest

import sharedpool
from tests.support import automatic_broker
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
BACKENDS_SQL = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'sharedpool %'
  AND application_name NOT LIKE 'sharedpool broker%'
"""


def commands(example: str) -> list[list[str]]:
    """The commands in an example's docstring: its lines that begin with a $."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / f"{example}.py").read_text())) or ""
    found = [
        shlex.split(line.strip()[2:]) for line in text.splitlines() if line.strip().startswith("$ ")
    ]
    if shutil.which("sharedpool", path=Path(sys.executable).parent):
        return found
    # Tested from the source tree, without an installation.
    module = [sys.executable, "-m", "sharedpool"]
    return [module + command[1:] if command[0] == "sharedpool" else command for command in found]


@pytest.fixture
def environment(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path, tmp_path: Path
) -> Iterator[None]:
    """What the user of an example has, but all that it leaves behind is ours; in the end nobody
    uses a broker."""
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    package = str(Path(sharedpool.__file__).parents[1])  # the one that is tested, installed or not
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with automatic_broker.seen_off():
        yield


@pytest.fixture
def database_url(environment: None, database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """DATABASE_URL, set for the examples, as their docstrings want it."""
    found = psycopg2.extensions.parse_dsn(database)
    host = quote(found["host"], safe="")
    url = f"postgresql://{found['user']}@/{found['dbname']}?host={host}&port={found['port']}"
    monkeypatch.setenv("DATABASE_URL", url)
    return url


@contextmanager
def watched(url: str) -> Iterator[list[int]]:
    """Count the pool's backends on the server every few milliseconds, as long as the block runs."""
    counts: list[int] = []
    done = threading.Event()

    def watch() -> None:
        with closing(psycopg2.connect(url)) as conn:
            conn.autocommit = True
            with conn.cursor() as cursor:
                while not done.wait(0.004):
                    cursor.execute(BACKENDS_SQL)
                    counts.extend(cursor.fetchone() or ())

    with ThreadPoolExecutor(1) as executor:
        watching = executor.submit(watch)
        try:
            yield counts
        finally:
            done.set()
        watching.result()


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; one that takes too long is killed with all that it started."""
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=ROOT, stdin=null, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


SCRIPTS = ["quickstart", "multiprocessing_script", "process_pools", "celery_app", "sqlalchemy_app"]


def test_every_example_is_tested_here() -> None:
    modules = ["process_pools_task"]  # imported by one that is tested
    servers = ["flask_app", "gunicorn_app"]
    assert sorted(modules + servers + SCRIPTS) == EXAMPLES


@pytest.mark.parametrize(
    ("example", "limit", "expected"),
    [
        (
            "quickstart",
            5,
            [
                "stored book 1: The Sea, The Sea",
                "six times seven is 42",
                "<SimpleConnectionPool .*>",
            ],
        ),
        # How many processes got work, and what was seen while they did, is the scheduler's choice.
        (
            "multiprocessing_script",
            3,
            ["300 queries by [2-8] processes", "most connections at a time: [1-3], limit: 3"],
        ),
        pytest.param(
            "process_pools",
            2,
            [
                f"{way}: 40 queries by [1-4] processes, at most [12] connections at a time"
                for way in (
                    "multiprocessing, fork",
                    "multiprocessing, spawn",
                    "concurrent.futures, fork",
                    "concurrent.futures, spawn",
                    "multiprocess, fork",
                    "multiprocess, spawn",
                    "joblib, multiprocessing",
                    "joblib, loky",
                )
            ],
            marks=pytest.mark.long,
        ),
        pytest.param(
            "celery_app",
            2,
            ["40 tasks done by [1-4] processes", "most connections at a time: [12], limit: 2"],
            marks=pytest.mark.long,
        ),
        (
            "sqlalchemy_app",
            3,
            ["200 orders stored by 4 processes", "most connections at a time: [1-3], limit: 3"],
        ),
    ],
)
def test_a_script_prints_what_it_says(
    database_url: str, example: str, limit: int, expected: list[str]
) -> None:
    with watched(database_url) as counts:
        outcome = run(commands(example)[0])
    assert outcome.returncode == 0, outcome.stderr
    for line, pattern in zip(
        outcome.stdout.splitlines(), expected, strict=False
    ):  # celery says more at its end
        assert re.fullmatch(pattern, line)
    assert len(outcome.stdout.splitlines()) >= len(expected)
    assert max(counts) <= limit  # a short script may have come and gone between two looks


@pytest.mark.long_variants
@pytest.mark.parametrize("example", SCRIPTS)
def test_a_script_without_a_server_says_what_to_set(environment: None, example: str) -> None:
    outcome = run(commands(example)[0])
    assert outcome.returncode != 0
    assert "set DATABASE_DSN, DATABASE_URL" in outcome.stderr


@contextmanager
def serving(
    command: list[str], *more: str
) -> Iterator[tuple[int, "subprocess.Popen[bytes]", Path]]:
    """Run a documented gunicorn command, with `more` options; yield its port, the process and its
    log."""
    log = Path(os.environ["TMPDIR"], "gunicorn.log")
    # It inherits a socket that listens already: nobody can take the port, and requests wait until a
    # worker is there.
    with log.open("w") as output, socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        process = subprocess.Popen(
            [*command, *more],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(os.environ, GUNICORN_CMD_ARGS=f"--bind fd://{listener.fileno()}"),
            pass_fds=[listener.fileno()],
        )
        port: int = listener.getsockname()[1]
    with process:
        try:
            yield port, process, log
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def get(port: int, path: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def request(port: int) -> dict[str, int]:
    status, body = get(port, "/")
    assert status == 200, body
    answer: dict[str, int] = json.loads(body)
    return answer


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize(
    ("number", "more", "requests"),
    [
        (0, [], 100),
        (0, ["--preload"], 100),
        (0, ["-k", "gthread", "--threads", "4"], 100),
        (0, ["--preload", "-k", "gthread", "--threads", "2", "-w", "8"], 100),
        (1, [], 100),
    ],
    ids=["sync", "preload", "gthread", "preload gthread", "sharedpool run"],
)
def test_gunicorn_workers_share_the_limit(
    database_url: str, number: int, more: list[str], requests: int
) -> None:
    with (
        watched(database_url) as counts,
        serving(commands("gunicorn_app")[number], *more) as (port, process, log),
    ):
        with ThreadPoolExecutor(8) as executor:
            answers = list(executor.map(request, [port] * requests))

            def several_workers_answered() -> (
                bool
            ):  # the kernel may give one worker everything for a while
                answers.extend(executor.map(request, [port] * 16))
                return len({answer["worker"] for answer in answers}) >= 2 and max(counts) >= 2

            wait_until(several_workers_answered, timeout_s=60)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert max(counts) <= 3
    assert 1 <= max(answer["connections"] for answer in answers) <= 3
    text = log.read_text()
    assert "Shutting down: Master" in text
    assert "ERROR" not in text
    assert "Traceback" not in text
    with closing(psycopg2.connect(database_url)) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:

            def connections() -> int:
                cursor.execute(BACKENDS_SQL)
                return int((cursor.fetchone() or [0])[0])

            wait_until(lambda: connections() == 0, what="the end of gunicorn's connections")


def test_the_flask_app_commits_what_succeeds_and_returns_every_connection(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, serve, drop = commands("flask_app")
    assert run(init).returncode == 0
    monkeypatch.setenv("FLASK_RUN_PORT", "0")
    log = tmp_path / "flask.log"
    with (
        log.open("w") as output,
        watched(database_url) as counts,
        subprocess.Popen(
            serve, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            running = wait_until(
                lambda: re.search(r"Running on http://127.0.0.1:(\d+)", log.read_text()), 30
            )
            port = int(running[1])
            with ThreadPoolExecutor(
                8
            ) as executor:  # threads of one process, each with a request of its own
                failed = list(executor.map(get, [port] * 40, ["/fail"] * 40))
                answers = list(executor.map(request, [port] * 40))
            assert {status for status, _ in failed} == {500}
            assert request(port)["visits"] == 41  # only those that succeeded
        finally:
            process.terminate()
            process.wait(20)
    assert 1 <= len({answer["backend"] for answer in answers}) <= 3
    assert max(counts) <= 3
    assert "does not count" in log.read_text()
    assert run(drop).returncode == 0
    with closing(psycopg2.connect(database_url)) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT to_regclass('sharedpool_visits')")
        assert cursor.fetchone() == (None,)
