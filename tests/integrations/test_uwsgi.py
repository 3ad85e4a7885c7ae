"""A real uWSGI, whose forks Python does not see: under load, reloaded, recycled, killed."""

import itertools
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from limits import all_slots
from processes import Sampler, alive
from waiting import wait_until
from web_servers import Server, load, serving, traffic

import sharedpool
from sharedpool.cli.asking import fetch_report
from sharedpool.cli.postgres import EphemeralPostgres

LIMIT = 3
POSTFORK = {"TARGET_POSTFORK": "1"}
IN_MASTER = {"TARGET_AT_IMPORT": "1"}

MakePool = Callable[..., sharedpool.Pool]
StartUwsgi = Callable[..., AbstractContextManager[Server]]
_numbers = itertools.count(1)


@pytest.fixture
def name() -> str:
    """The pool that the application uses."""
    return f"uwsgi{next(_numbers)}"


@pytest.fixture
def uwsgi(broker: sharedpool.Broker, postgres: EphemeralPostgres, name: str, tmp_path: Path) -> StartUwsgi:
    """Serve the application by four uWSGI workers with these options."""
    program = shutil.which("uwsgi", path=Path(sys.executable).parent)
    assert program is not None, "pip install pyuwsgi"

    # At a reload pyuwsgi, unlike uWSGI's own program, starts Python anew without its virtual environment.
    paths = [sysconfig.get_path("purelib"), str(Path(sharedpool.__file__).parents[1])]

    @contextmanager
    def start(*options: str, **environment: str) -> Iterator[Server]:
        environment |= {"TARGET_POOL": name, "DATABASE_DSN": postgres.dsn, "SHAREDPOOL_BROKER": broker.address}
        environment |= {"PYTHONPATH": os.pathsep.join(paths)}
        command = [program, "--http-socket", "fd://{fd}", "--master", "--processes", "4", "--enable-threads"]
        more = ["--die-on-term", "--need-app", "--wsgi", "uwsgi_target:app", *options]
        with serving([*command, *more], tmp_path / "uwsgi.log", environment) as server:
            yield server

    return start


def catches(pid: int, number: int) -> bool:
    """Say whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # it has ended
        return False
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def started(server: Server) -> set[int]:
    """Wait until uWSGI and its four workers take orders; return the workers.

    It serves before that. An order that comes too early is lost; one to a worker that has only just been forked is
    taken for its master's, which then waits for a minute for it to leave, and starts no other meanwhile.
    """
    master = server.process.pid

    def workers() -> set[int]:
        found = set(map(int, Path(f"/proc/{master}/task/{master}/children").read_text().split()))
        # SIGUSR1 is among the last that a worker, and no master, learns to catch.
        ready = len(found) == 4 and all(catches(pid, signal.SIGUSR1) for pid in found)
        return found if ready and catches(master, signal.SIGHUP) else set()

    return wait_until(workers, what="uWSGI and four workers to take orders")


def ended_well(server: Server, broker: sharedpool.Broker, name: str) -> None:
    assert server.process.poll() is None, "uWSGI ended before it was told to"
    started(server)
    assert server.stop() == 0
    assert "Traceback" not in server.words()
    # When uWSGI has ended, so have the leases of its workers and its master.
    wait_until(lambda: not any(pool.leases for pool in fetch_report(broker.address).pools if pool.name == name))


@pytest.mark.parametrize(
    ("options", "environment"),
    [([], IN_MASTER), (["--threads", "2"], IN_MASTER | POSTFORK), (["--lazy-apps"], {})],
    ids=["used in the master", "used in the master, postfork, threads", "lazy apps"],
)
def test_every_request_is_answered_by_three_connections(
    uwsgi: StartUwsgi,
    sampler: Sampler,
    broker: sharedpool.Broker,
    name: str,
    options: list[str],
    environment: dict[str, str],
) -> None:
    with uwsgi(*options, **environment) as server:
        answers = load(server, 200)

        def several_workers() -> bool:  # for a while the kernel may prefer one
            answers.extend(load(server, 20))
            return len({answer["worker"] for answer in answers}) > 1

        wait_until(several_workers)
        ended_well(server, broker, name)
    assert 1 < sampler.peak <= LIMIT


def test_nothing_of_the_pool_is_left_in_the_master_when_it_forks(uwsgi: StartUwsgi) -> None:
    """A thread that runs Python at that moment would leave the children the interpreter's lock, taken."""
    with uwsgi(**IN_MASTER) as server:
        started(server)
        assert os.listdir(f"/proc/{server.process.pid}/task") == [str(server.process.pid)]


def test_recycled_workers_lose_no_request(
    uwsgi: StartUwsgi, sampler: Sampler, broker: sharedpool.Broker, name: str
) -> None:
    with uwsgi("--max-requests", "25", "--min-worker-lifetime", "0", **POSTFORK) as server:
        answers = load(server, 200)
        # It waits for ever for a worker that it starts again while it ends.
        wait_until(lambda: server.words().count("Respawned uWSGI worker") == server.words().count("Seeya!"))
        ended_well(server, broker, name)
    assert len({answer["worker"] for answer in answers}) > 4
    assert 1 < sampler.peak <= LIMIT


@pytest.mark.parametrize("environment", [POSTFORK, IN_MASTER], ids=["postfork", "used in the master"])
def test_reloads_and_killed_workers_leave_no_slot_taken(
    uwsgi: StartUwsgi, sampler: Sampler, make_pool: MakePool, name: str, environment: dict[str, str]
) -> None:
    with uwsgi(**environment) as server:
        with traffic(server) as seen:
            wait_until(lambda: seen.workers)
            old = started(server)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: seen.workers - old, what="the new workers' answers")
            wait_until(lambda: not any(map(alive, old)), what="the old workers' end")
            assert seen.lost == []
            for _ in range(2):
                known = started(server)
                victim = wait_until(lambda known=known: next(iter(known & seen.workers), None))
                os.kill(victim, signal.SIGKILL)
                wait_until(lambda known=known: seen.workers - known - old, what="an answer of the successor")
        assert len(seen.lost) <= 2
        assert all_slots(make_pool, name, LIMIT) == LIMIT
    assert 1 < sampler.peak <= LIMIT
