"""gevent: in a monkey-patched process a wait for a lease lets the other greenlets run.

All in real such processes.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest

import sharedpool
from tests.support.processes import BackendSampler, workers
from tests.support.waiting import wait_until

SCRIPT = Path(__file__).with_name("green_worker.py")
_numbers = iter(range(1, 1000))


@pytest.fixture
def settings(broker: sharedpool.Broker, database: str) -> dict[str, Any]:
    return {
        "dsn": database,
        "broker": broker.address,
        "name": f"green{next(_numbers)}",
        "max_conn": 1,
    }


@pytest.fixture
def as_in_readme(settings: dict[str, Any], automatic_broker: None) -> dict[str, Any]:
    """The settings of a pool without a word of a broker."""
    return {name: value for name, value in settings.items() if name != "broker"}


class Scenario:
    """A process that plays a scenario of `green_worker.py`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.said, self._told = process.stdout, process.stdin

    def hears(self) -> str:
        return self.said.readline().rstrip()

    def go_on(self) -> None:
        self._told.write("\n")
        self._told.flush()


@contextmanager
def running(scenario: str, settings: dict[str, Any]) -> Iterator[Scenario]:
    """Start a scenario, and see at the end of the block that it went well."""
    pipe = subprocess.PIPE
    command = [sys.executable, str(SCRIPT), scenario, json.dumps(settings)]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, text=True) as process,
    ):
        try:
            playing = Scenario(process)
            yield playing
            rest = playing.said.read()
            status = process.wait(30)
        except BaseException:
            process.kill()
            raise
        finally:
            stderr.seek(0)
            complaints = stderr.read()
            sys.stderr.write(complaints)
    assert (status, rest, complaints) == (0, "done\n", "")


@pytest.mark.long_variants(first=3)
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


@pytest.mark.long_variants
@pytest.mark.parametrize("scenario", ["queries_overlap", "a_fork", "many_greenlets"])
def test_with_two_connections(settings: dict[str, Any], scenario: str) -> None:
    with running(scenario, settings | {"max_conn": 2}):
        pass


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted there")
def test_hundreds_of_greenlets_may_wait(settings: dict[str, Any]) -> None:
    settings["max_conn"] = 2
    scenario = "many_greenlets_need_few_descriptors"
    with running(scenario, settings) as one, running(scenario, settings) as two:
        for each in (one, two):
            assert each.hears() == "has one"
        for each in (one, two):
            each.go_on()


def test_the_hub_goes_on_while_another_process_has_the_slot(settings: dict[str, Any]) -> None:
    with workers(1, **settings) as (other,):
        other.ask("get", name="it", timeout=10)
        with running("waiting_for_another_process", settings) as playing:
            assert playing.hears() == "waiting"
            assert other.ask("stats")["in_use"] == 1
            other.ask("put", name="it")


def test_an_idle_connection_is_given_up_to_another_process(settings: dict[str, Any]) -> None:
    with running("idle_until_told", settings) as playing:
        pid = int(playing.hears())
        with workers(1, **settings) as (other,):
            assert other.ask("get", name="it", timeout=10)["backend"] == pid  # handed over as it is
            other.ask("put", name="it")
        playing.go_on()


def test_without_psycogreen_connections_are_closed_and_opened_in_place_of_moved(
    settings: dict[str, Any],
) -> None:
    with workers(1, **settings) as (other,):
        pid = other.ask("get", name="it", timeout=10)["backend"]
        other.ask("put", name="it")
        with running("without_psycogreen_from_another_process", settings) as playing:
            assert int(playing.hears()) != pid


def test_live_connections_move_between_patched_processes(settings: dict[str, Any]) -> None:
    with closing(psycopg2.connect(settings["dsn"])) as conn, conn, conn.cursor() as cursor:
        cursor.execute("CREATE TABLE moves (body text)")
    settings |= {"max_conn": 2, "time_slice": 0}
    with (
        running("live_connections_move", settings) as one,
        running("live_connections_move", settings) as two,
    ):
        for each in (one, two):
            assert each.hears() == "ready"
        for each in (one, two):
            each.go_on()
        moved = [int(each.hears()) for each in (one, two)]
    assert min(moved) > 0
    with closing(psycopg2.connect(settings["dsn"])) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT count(DISTINCT body), count(*) FROM moves")
        assert cursor.fetchone() == (400, 400)


def test_a_process_that_ends_returns_everything(
    settings: dict[str, Any], server_connection: psycopg2.extensions.connection
) -> None:
    with running("ending", settings | {"max_conn": 2}) as playing:
        assert playing.hears()
    with server_connection.cursor() as cursor:

        def left() -> list[Any]:
            name = f"sharedpool {settings['name']} [%"
            cursor.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s", [name]
            )
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
    as_in_readme: dict[str, Any],
) -> None:
    with running("waiting_within_the_process", as_in_readme):
        pass


# --- gunicorn's gevent worker

GUNICORN_CONF = """
worker_class = "gevent"


def post_fork(server, worker):
    from psycogreen.gevent import patch_psycopg

    patch_psycopg()
"""


@contextmanager
def gunicorn(tmp_path: Path, settings: dict[str, Any], *options: str) -> Iterator[int]:
    """Serve `green_app.py`; yield the port."""
    conf, log = tmp_path / "gunicorn.conf.py", tmp_path / "gunicorn.log"
    conf.write_text(GUNICORN_CONF)
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-c",
        str(conf),
        "--chdir",
        str(SCRIPT.parent),
        "green_app:app",
    ]
    with log.open("w") as output, socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        process = subprocess.Popen(
            [*command, "--bind", f"fd://{listener.fileno()}", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ
            | {"SETTINGS": json.dumps(settings), "PYTHONPATH": str(SCRIPT.parents[2])},
            pass_fds=[listener.fileno()],
        )
        port: int = listener.getsockname()[1]
    with process:
        try:
            yield port
            process.terminate()
            assert process.wait(20) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


def get(port: int, path: str) -> dict[str, Any]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer


@pytest.mark.long_variants
@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["plain", "preload"])
def test_a_gunicorn_worker_answers_while_one_of_its_requests_waits_for_a_lease(
    as_in_readme: dict[str, Any], tmp_path: Path, options: list[str]
) -> None:
    with (
        gunicorn(tmp_path, as_in_readme, "-w", "1", *options) as port,
        ThreadPoolExecutor(2) as executor,
    ):
        holding = executor.submit(get, port, "/hold")
        wait_until(lambda: get(port, "/state") == {"in_use": 1, "waiting": 0})
        waiting = executor.submit(get, port, "/sleep")
        wait_until(lambda: get(port, "/state") == {"in_use": 1, "waiting": 1})
        get(port, "/release")
        assert waiting.result(30) == holding.result(30)


def test_gunicorn_workers_share_the_limit(as_in_readme: dict[str, Any], tmp_path: Path) -> None:
    watching = BackendSampler(as_in_readme["dsn"], f"sharedpool {as_in_readme['name']} [%")
    as_in_readme["max_conn"] = 3
    with (
        watching as seen,
        gunicorn(tmp_path, as_in_readme, "-w", "2") as port,
        ThreadPoolExecutor(16) as executor,
    ):
        workers_seen: set[int] = set()

        def both_have_answered() -> bool:  # the kernel may give one worker everything for a while
            answers = executor.map(get, [port] * 100, ["/sleep"] * 100)
            workers_seen.update(answer["worker"] for answer in answers)
            return len(workers_seen) == 2

        wait_until(both_have_answered, timeout_s=60)
    assert 1 <= seen.peak <= 3
