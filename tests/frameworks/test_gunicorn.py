"""A real gunicorn, its workers, and one limit: under load, reloaded, recycled, killed, hanging."""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from psycopg2.extensions import connection

from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.frameworks.assertions import stuck
from tests.frameworks.web_servers import Server, load, request, serving, traffic
from tests.support import automatic_broker as automatic
from tests.support.processes import LONG, BackendSampler, alive
from tests.support.waiting import wait_until

LIMIT = 3
HOOKS = "from sharedpool.integrations.gunicorn import *"
OWN_HOOK = """
import os
import signal
import sharedpool.integrations.gunicorn

def worker_exit(server, worker):
    sharedpool.integrations.gunicorn.worker_exit(server, worker)
    where = "master" if os.getpid() == server.pid else "worker"
    server.log.info("a hook of the user's own in the %s", where)
"""
# gunicorn's hook runs in the master when a worker is not there any more that it wants to signal.
REAPED_BY_ANOTHER = """
def on_reload(server):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    for pid in server.WORKERS:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
"""

Gunicorn = Callable[..., AbstractContextManager[Server]]
AllSlots = Callable[[int], int]
_numbers = itertools.count(1)


@pytest.fixture
def name() -> str:
    """The pool that the application uses."""
    return f"gunicorn{next(_numbers)}"


@pytest.fixture
def gunicorn(
    automatic_broker: None, postgres: EphemeralPostgres, name: str, tmp_path: Path
) -> Gunicorn:
    """Serve the application by gunicorn with these options and this gunicorn.conf.py."""

    @contextmanager
    def start(*options: str, conf: str = "", **environment: str) -> Iterator[Server]:
        configuration = tmp_path / "gunicorn.conf.py"
        configuration.write_text(conf)
        command = [
            sys.executable,
            "-m",
            "gunicorn",
            "--bind",
            "fd://{fd}",
            "--config",
            str(configuration),
        ]
        # A worker that is just being forked when gunicorn is told to end does not hear of it, and
        # is killed after that.
        command += ["--graceful-timeout", "8", *options]
        environment |= {"TARGET_POOL": name, "DATABASE_DSN": postgres.dsn}
        with serving(
            [*command, "wsgi_target:app"], tmp_path / "gunicorn.log", environment
        ) as server:
            yield server

    return start


def ended_well(server: Server, name: str) -> None:
    assert server.process.poll() is None, "gunicorn ended before it was told to"
    assert server.stop() == 0
    words = server.words()
    assert "Shutting down: Master" in words
    assert "Traceback" not in words
    # Workers leave in good order: when gunicorn has ended, so have their sessions and leases.
    assert automatic.leases(name) == 0


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize(
    ("options", "conf"),
    [
        (["-w", "8"], ""),
        (["-w", "8", "--preload"], HOOKS),
        (["-w", "4", "-k", "gthread", "--threads", "3"], HOOKS),
        (["-w", "4", "-k", "gthread", "--threads", "3", "--preload"], ""),
    ],
    ids=["sync", "sync, preload, hooks", "gthread, hooks", "gthread, preload"],
)
def test_every_request_is_answered_by_three_connections(
    gunicorn: Gunicorn,
    sampler: BackendSampler,
    name: str,
    options: list[str],
    conf: str,
) -> None:
    requests = 2000 if LONG else 300
    simple = {} if "--threads" in options else {"TARGET_SIMPLE": "1"}  # the default
    with gunicorn(*options, conf=conf, **simple) as server:
        answers = load(server, requests)
        assert len(answers) == requests

        def more_workers_than_connections() -> bool:  # for a while the kernel may prefer a few
            answers.extend(load(server, 20))
            return len({answer["worker"] for answer in answers}) > LIMIT

        wait_until(more_workers_than_connections)
        ended_well(server, name)
        assert "ERROR" not in server.words()
    assert 1 < sampler.peak <= LIMIT
    assert sampler.samples > 50


@pytest.mark.long_variants
@pytest.mark.parametrize("conf", ["", HOOKS], ids=["no hooks", "hooks"])
def test_a_reload_doubles_the_workers_and_loses_no_request(
    gunicorn: Gunicorn, sampler: BackendSampler, name: str, conf: str
) -> None:
    with gunicorn("-w", "4", conf=conf) as server:
        with traffic(server) as seen:
            for _ in range(2):
                before = wait_until(lambda: seen.workers)
                server.process.send_signal(signal.SIGHUP)
                wait_until(
                    lambda before=before: len(seen.workers - before) >= 2,
                    what="the new workers' answers",
                )
                wait_until(
                    lambda before=before: not any(map(alive, before)), what="the old workers' end"
                )
        assert seen.lost == []
        ended_well(server, name)
    assert 1 < sampler.peak <= LIMIT


@pytest.mark.long_variants
@pytest.mark.parametrize(
    ("options", "conf"),
    [([], ""), (["--preload", "-k", "gthread", "--threads", "3"], HOOKS)],
    ids=["no hooks", "gthread, preload, hooks"],
)
def test_workers_that_are_recycled_all_the_time_lose_no_request(
    gunicorn: Gunicorn, sampler: BackendSampler, name: str, options: list[str], conf: str
) -> None:
    with gunicorn(
        "-w", "4", "--max-requests", "25", "--max-requests-jitter", "10", *options, conf=conf
    ) as server:
        answers = load(server, 300)
        ended_well(server, name)
    assert len({answer["worker"] for answer in answers}) > 4
    assert 1 < sampler.peak <= LIMIT


@pytest.mark.long_variants
@pytest.mark.parametrize("conf", ["", HOOKS], ids=["no hooks", "hooks"])
def test_killed_workers_cost_their_own_requests_and_no_slot(
    gunicorn: Gunicorn, sampler: BackendSampler, name: str, conf: str, all_slots: AllSlots
) -> None:
    kills = 4
    with gunicorn("-w", "4", conf=conf) as server:
        with traffic(server) as seen:
            for _ in range(kills):
                known = wait_until(lambda: seen.workers)
                victim = wait_until(lambda: next((pid for pid in seen.workers if alive(pid)), None))
                os.kill(victim, signal.SIGKILL)
                wait_until(
                    lambda known=known: seen.workers - known, what="an answer of the successor"
                )
        assert len(seen.lost) <= kills  # a sync worker has one request at a time
        assert all_slots(LIMIT) == LIMIT
        assert server.stop() == 0
    assert 1 < sampler.peak <= LIMIT


@pytest.mark.long_variants
@pytest.mark.parametrize(
    ("how", "conf"),
    [("recycled", HOOKS), ("reloaded", OWN_HOOK)],
    ids=["recycled", "reloaded, own hook"],
)
def test_a_worker_that_leaves_with_a_query_under_way_is_not_held_up_by_it(
    gunicorn: Gunicorn,
    server_connection: connection,
    name: str,
    how: str,
    conf: str,
    all_slots: AllSlots,
) -> None:
    options = [
        "-w",
        "1",
        "-k",
        "gthread",
        "--threads",
        "2",
        "--graceful-timeout",
        "1",
        "--timeout",
        "60",
    ]
    if how == "recycled":
        options += ["--max-requests", "2"]
    with gunicorn(*options, conf=conf) as server:
        worker = request(server.port)["worker"]
        waiting = HTTPConnection("127.0.0.1", server.port, timeout=60)
        waiting.request("GET", "/stuck")
        wait_until(lambda: stuck(server_connection, name) == 1, what="the query that does not end")
        if how == "reloaded":
            server.process.send_signal(signal.SIGHUP)
        # Without the hook its thread is waited for until gunicorn kills the worker, after the 60
        # seconds of --timeout.
        wait_until(lambda: not alive(worker), timeout_s=15, what="the worker's end")
        assert waiting.getresponse().status == 500
        waiting.close()
        assert all_slots(LIMIT) == LIMIT
        assert request(server.port)["worker"] != worker
        assert server.stop() == 0
        assert ("own in the worker" in server.words()) == (conf == OWN_HOOK)


def test_a_worker_that_gunicorn_kills_for_its_timeout_leaves_no_slot_taken(
    gunicorn: Gunicorn, server_connection: connection, name: str, all_slots: AllSlots
) -> None:
    with gunicorn("-w", "1", "--timeout", "1") as server:
        worker = request(server.port)["worker"]
        waiting = HTTPConnection("127.0.0.1", server.port, timeout=60)
        waiting.request("GET", "/stuck")
        wait_until(lambda: stuck(server_connection, name) == 1, what="the query that does not end")
        # It is in libpq and heeds no SIGABRT: SIGKILL follows, and its query must be ended for it.
        wait_until(lambda: not alive(worker), timeout_s=15, what="the worker's end")
        wait_until(lambda: stuck(server_connection, name) == 0, what="the query's end")
        waiting.close()
        assert request(server.port)["worker"] != worker
        assert all_slots(LIMIT) == LIMIT


def test_the_hook_leaves_the_pool_of_a_preloading_master_alone(
    gunicorn: Gunicorn, sampler: BackendSampler
) -> None:
    conf = OWN_HOOK + REAPED_BY_ANOTHER
    with gunicorn("-w", "2", "--preload", conf=conf, TARGET_AT_IMPORT="1") as server:
        before = {answer["worker"] for answer in load(server, 20)}
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "own in the master" in server.words(), what="the hook in the master")
        with traffic(server) as seen:
            victim = wait_until(
                lambda: next(iter(seen.workers - before), None), what="an answer of a new worker"
            )
            known = seen.workers
            os.kill(victim, signal.SIGKILL)  # the next one is forked from the master as it is now
            wait_until(lambda: seen.workers - known - before, what="an answer of the successor")
        assert server.stop() == 0
    assert 1 <= sampler.peak <= LIMIT
