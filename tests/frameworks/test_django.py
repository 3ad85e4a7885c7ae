"""Django's backend on a shared pool: Django's own management commands, servers and test runner, on
a real server."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import django
import django.conf
import psycopg2.extensions
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import ConnectionHandler

import sharedpool
from tests.support.processes import BackendSampler, workers
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "examples" / "django_project"
if not django.conf.settings.configured:
    django.conf.settings.configure(USE_TZ=True, LOGGING_CONFIG=None)
    django.setup()

MakeConnections = Callable[..., ConnectionHandler]
# Where the benchmark's requirements are installed too.
pytestmark = pytest.mark.skipif(
    find_spec("psycopg") is not None, reason="psycopg 3 is installed: Django takes that"
)


# --- the backend itself


@pytest.fixture
def make_connections(broker: sharedpool.Broker, database: str) -> Iterator[MakeConnections]:
    """`django.db.connections` for the test's database, with OPTIONS and settings."""
    found = psycopg2.extensions.parse_dsn(database)
    made: list[ConnectionHandler] = []

    def make(options: dict[str, Any] | None = None, **settings: Any) -> ConnectionHandler:
        default = {
            "ENGINE": "sharedpool.integrations.django",
            "NAME": found["dbname"],
            "USER": found["user"],
            "HOST": found["host"],
            "PORT": found["port"],
            "OPTIONS": {"broker": broker.address, "max_conn": 1, "timeout": 5} | (options or {}),
        }
        handler = ConnectionHandler({"default": default | settings})
        made.append(handler)
        return handler

    yield make
    for handler in made:
        handler.close_all()
        handler["default"].close_pool()


def ask(connection: BaseDatabaseWrapper, query: str = "SELECT pg_backend_pid()") -> Any:
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


def pool_of(connection: BaseDatabaseWrapper) -> sharedpool.Pool:
    return sharedpool.get_pool(f"django default {connection.settings_dict['NAME']}")


def test_close_returns_the_connection_and_the_next_use_gets_it_back(
    make_connections: MakeConnections,
) -> None:
    connection = make_connections()["default"]
    pid = ask(connection)
    assert pool_of(connection).stats().in_use == 1
    connection.close()
    assert connection.connection is None
    assert (pool_of(connection).stats().in_use, pool_of(connection).stats().idle) == (0, 1)
    assert ask(connection) == pid
    assert pool_of(connection).max_conn == 1


def test_the_pools_name_and_timeout(make_connections: MakeConnections) -> None:
    connection = make_connections({"name": "mine"})["default"]
    del connection.settings_dict["OPTIONS"]["timeout"]
    ask(connection)
    pool = sharedpool.get_pool(f"mine {connection.settings_dict['NAME']}")
    assert pool.stats().in_use == 1
    assert pool.config.timeout == 30


@pytest.mark.parametrize("session", ["new", "used before", "of another process"])
def test_it_is_set_up_as_django_wants_it(
    make_connections: MakeConnections, broker: sharedpool.Broker, database: str, session: str
) -> None:
    options = {"isolation_level": psycopg2.extensions.ISOLATION_LEVEL_SERIALIZABLE}
    connection = make_connections(options, TIME_ZONE="Asia/Tokyo")["default"]
    pid = ask(connection)
    connection.close()
    if session == "new":
        pool_of(connection).close_idle()
    elif session == "of another process":
        settings = {
            "dsn": database,
            "broker": broker.address,
            "name": pool_of(connection).name,
            "max_conn": 1,
        }
        with workers(1, **settings) as (other,):
            assert other.ask("get", name="it", timeout=10)["backend"] == pid
            assert "at" in other.ask("put", name="it")
            assert ask(connection) == pid
    assert (ask(connection) == pid) is (session != "new")
    assert ask(connection, "SHOW TimeZone") == "Asia/Tokyo"
    assert ask(connection, "SHOW client_encoding") == "UTF8"
    assert connection.connection.autocommit
    connection.set_autocommit(False)
    assert ask(connection, "SHOW transaction_isolation") == "serializable"
    assert ask(connection, """SELECT '{"a": 1}'::jsonb""") == '{"a": 1}'  # decoded by JSONField
    connection.rollback()


def test_threads_share_the_limit_and_wait_their_turn(make_connections: MakeConnections) -> None:
    connections = make_connections({"max_conn": 2})
    pids = set()

    def work(_: int) -> None:
        for _ in range(20):
            pids.add(ask(connections["default"]))
            connections["default"].close()

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(work, range(6)))
    assert 1 <= len(pids) <= 2


def test_no_free_connection_is_an_operational_error(make_connections: MakeConnections) -> None:
    connections = make_connections({"timeout": 0})
    ask(connections["default"])
    with ThreadPoolExecutor(1) as executor:
        failed = executor.submit(ask, connections["default"].copy()).exception()
    assert isinstance(failed, OperationalError)
    cause = failed.__cause__
    assert isinstance(cause, psycopg2.OperationalError)
    assert isinstance(cause.__cause__, sharedpool.PoolExhausted)


def test_named_cursors_work(make_connections: MakeConnections) -> None:
    connection = make_connections()["default"]
    with connection.chunked_cursor() as cursor:
        cursor.execute("SELECT generate_series(1, 3000)")
        assert sum(len(cursor.fetchmany(1000)) for _ in range(3)) == 3000


def test_the_connection_for_create_database_is_outside_the_pool(
    make_connections: MakeConnections,
) -> None:
    connection = make_connections()["default"]
    ask(connection)  # the pool's only one
    with connection._nodb_cursor() as cursor:
        cursor.execute("SELECT current_database(), current_setting('application_name')")
        assert cursor.fetchone() == ("postgres", "")


def test_close_pool_leaves_nothing_that_would_hinder_drop_database(
    make_connections: MakeConnections, server_connection: psycopg2.extensions.connection
) -> None:
    connection = make_connections()["default"]
    ask(connection)
    connection.close()
    connection.close_pool()
    with server_connection.cursor() as cursor:

        def left() -> Any:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = %s",
                [connection.settings_dict["NAME"]],
            )
            return (cursor.fetchone() or (None,))[0]

        # DROP DATABASE waits for five seconds.
        wait_until(lambda: left() == 0, timeout_s=4, what="the broker's session to end")
    assert ask(connection)  # with a new pool


def test_a_time_zone_that_changes_is_set_on_pooled_connections_too(
    make_connections: MakeConnections,
) -> None:
    connection = make_connections()["default"]
    pid = ask(connection)
    connection.close()
    connection.settings_dict["TIME_ZONE"] = "Europe/Rome"
    for name in ("timezone", "timezone_name"):
        connection.__dict__.pop(name, None)
    assert connection.ensure_timezone() is False  # there is none just now
    assert ask(connection, "SHOW TimeZone") == "Europe/Rome"
    assert ask(connection) == pid


@pytest.mark.parametrize(
    ("options", "settings", "says"),
    [
        ({}, {"CONN_MAX_AGE": 60}, "CONN_MAX_AGE must be 0"),
        ({}, {"CONN_MAX_AGE": None}, "CONN_MAX_AGE must be 0"),
        ({"pool": True}, {}, "Django's own pool"),
        ({"max_con": 3}, {}, "max_con= is not a connection keyword"),
        ({"max_conn": 0}, {}, "max_conn: must be"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    make_connections: MakeConnections, options: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    connection = make_connections(options, **settings)["default"]
    with pytest.raises(ImproperlyConfigured, match=re.escape(says)):
        connection.ensure_connection()


# --- the project in examples/


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
