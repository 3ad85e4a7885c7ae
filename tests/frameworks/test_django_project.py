"""The Django project in examples/: its servers, management commands and test runner on a shared
pool."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2.extensions
import pytest

from tests.support.processes import BackendSampler
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "examples" / "django_project"

# Where the benchmark's requirements are installed too.
pytestmark = pytest.mark.skipif(
    find_spec("psycopg") is not None, reason="psycopg 3 is installed: Django takes that"
)


@pytest.fixture
def site(
    automatic_broker: None, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    """The environment of the example project; returns its database."""
    found = psycopg2.extensions.parse_dsn(database)
    host = quote(found["host"], safe="")
    url = f"postgresql://{found['user']}@/{found['dbname']}?host={host}&port={found['port']}"
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    )
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    return found["dbname"]


def manage(*arguments: str) -> str:
    """Run manage.py to its end; return what it said."""
    command = [sys.executable, str(PROJECT / "manage.py"), *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout + outcome.stderr


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[int]:
    """Serve the project; yield its port. `command` has PORT where that belongs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    with log.open("w") as output:
        filled = [part.replace("PORT", str(port)) for part in command]
        process = subprocess.Popen(
            filled, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    with process:
        try:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    get(port)
                except ConnectionRefusedError:
                    return False
                return True

            wait_until(answers, timeout_s=30, what="the server")
            yield port
            assert process.poll() is None, log.read_text()
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # runserver's reloader has a child
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


def get(port: int) -> dict[str, int]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", "/")
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        answer: dict[str, int] = json.loads(body)
        return answer


GUNICORN = [
    sys.executable,
    "-m",
    "gunicorn",
    "--chdir",
    str(PROJECT),
    "-b",
    "127.0.0.1:PORT",
    "project.wsgi",
]
RUNSERVER = [sys.executable, str(PROJECT / "manage.py"), "runserver", "127.0.0.1:PORT"]


@pytest.mark.long_variants
@pytest.mark.parametrize(
    "command",
    [
        [*GUNICORN, "-w", "4"],
        [*GUNICORN, "-w", "2", "-k", "gthread", "--threads", "4", "--preload"],
        RUNSERVER,
    ],
    ids=["gunicorn", "gunicorn gthread preload", "runserver"],
)
def test_a_server_returns_connections_at_the_end_of_requests(
    site: str, command: list[str], database: str, tmp_path: Path
) -> None:
    manage("migrate")
    log = tmp_path / "server.log"
    watching = BackendSampler(database, f"sharedpool django default {site} [%")
    with watching as seen, serving(command, log) as port, ThreadPoolExecutor(8) as executor:
        answers = list(executor.map(get, [port] * 160))
    assert max(answer["connections"] for answer in answers) <= 3
    assert 1 <= seen.peak <= 3
    with closing(psycopg2.connect(database)) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM notes_note")
        assert (cursor.fetchone() or (0,))[0] >= 160
    assert "Traceback" not in log.read_text()


def test_management_commands_leave_no_connection(
    site: str, server_connection: psycopg2.extensions.connection
) -> None:
    assert "Applying notes.0001_initial... OK" in manage("migrate")
    assert "[X] 0001_initial" in manage("showmigrations", "notes")
    assert "No changes detected" in manage("makemigrations", "--check")
    with server_connection.cursor() as cursor:

        def left() -> Any:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", [site])
            return (cursor.fetchone() or (None,))[0]

        wait_until(lambda: left() == 0, what="the end of its connections")


def databases(server: psycopg2.extensions.connection, pattern: str) -> list[str]:
    with server.cursor() as cursor:
        cursor.execute(
            "SELECT datname FROM pg_database WHERE datname LIKE %s ORDER BY 1", [pattern]
        )
        return [name for (name,) in cursor.fetchall()]


@pytest.mark.long_variants
@pytest.mark.parametrize("more", [[], ["--parallel", "2"]], ids=["one process", "parallel"])
def test_the_test_runner_makes_and_drops_its_database(
    site: str, more: list[str], server_connection: psycopg2.extensions.connection
) -> None:
    """Twice, as people do: the broker of the first run is still there."""
    for _ in range(2):
        said = manage("test", "notes", "-v", "2", *more)
        assert "Ran 2 tests" in said
        assert f"Creating test database for alias 'default' ('test_{site}')" in said
        assert databases(server_connection, f"test_{site}%") == []


@pytest.mark.long
def test_the_test_runner_uses_a_database_that_was_kept_and_drops_it_later(
    site: str, server_connection: psycopg2.extensions.connection
) -> None:
    assert "Preserving test database" in manage("test", "notes", "--keepdb")
    assert databases(server_connection, f"test_{site}%") == [f"test_{site}"]
    assert "Using existing test database" in manage("test", "notes", "--keepdb")
    assert "Destroying old test database" in manage("test", "notes", "--noinput")
    assert databases(server_connection, f"test_{site}%") == []


@pytest.mark.long
def test_tests_run_beside_the_site_that_they_are_of(
    site: str, tmp_path: Path, server_connection: psycopg2.extensions.connection
) -> None:
    """The pool of the site's database is not in the way of the one of the copy."""
    manage("migrate")
    with serving([*GUNICORN, "-w", "2"], tmp_path / "server.log") as port:
        assert get(port)["connections"] >= 1
        assert "OK" in manage("test", "notes", "--parallel", "2")
        assert get(port)["connections"] >= 1
    assert databases(server_connection, f"test_{site}%") == []


def test_psycopg_3_is_refused_with_a_word_of_what_to_do(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever is importable under that name is what Django would take.
    (tmp_path / "psycopg.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    command = [sys.executable, str(PROJECT / "manage.py"), "migrate"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 1
    assert outcome.stderr.splitlines()[-1].startswith(
        "django.core.exceptions.ImproperlyConfigured: sharedpool.integrations.django needs psycopg2"
    )
    assert "pip uninstall psycopg" in outcome.stderr
