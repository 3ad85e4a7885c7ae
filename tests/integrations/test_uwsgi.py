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
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(mask, 16) >> (number - 1) & 1)


def children(pid: int) -> set[int]:
    """Return the processes that a process has started."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def started(server: Server) -> set[int]:
    """Wait until uWSGI's master, which serves before that, has started all workers and minds them; return those."""
    master = server.process.pid
    wait_until(lambda: catches(master, signal.SIGHUP) and len(children(master)) >= 4, what="uWSGI to have started")
    return children(master)


def ended_well(server: Server, broker: sharedpool.Broker, name: str) -> None:
    assert server.process.poll() is None, "uWSGI ended before it was told to"
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
        load(server, 1)
        assert os.listdir(f"/proc/{server.process.pid}/task") == [str(server.process.pid)]


def test_recycled_workers_lose_no_request(
    uwsgi: StartUwsgi, sampler: Sampler, broker: sharedpool.Broker, name: str
) -> None:
    # A worker that it has just forked takes the order to end for its master's: uWSGI kills it after five seconds, but
    # waits for ever for one that it starts again while it ends.
    recycled = ("--max-requests", "25", "--min-worker-lifetime", "0", "--worker-reload-mercy", "5")
    with uwsgi(*recycled, **POSTFORK) as server:
        answers = load(server, 200)
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
            before = wait_until(lambda: seen.workers)
            old = started(server)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: seen.workers - before, what="the new workers' answers")
            wait_until(lambda: not any(map(alive, before)), what="the old workers' end")
            assert seen.lost == []
            wait_until(lambda: not started(server) & old, what="the end of those that were given no request")
            for _ in range(2):
                known = children(server.process.pid)
                victim = wait_until(lambda known=known: next(iter(known & seen.workers), None))
                os.kill(victim, signal.SIGKILL)
                # Beside other load uWSGI was seen to start no successor for 10 s: the slot is what matters here.
                wait_until(lambda victim=victim: not alive(victim))
        assert len(seen.lost) <= 2
        assert all_slots(make_pool, name, LIMIT) == LIMIT
    assert 1 < sampler.peak <= LIMIT
