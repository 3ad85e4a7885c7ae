"""A real uWSGI, whose forks Python does not see: under load, reloaded, recycled, killed."""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.frameworks.web_servers import Server, load, serving, traffic
from tests.support import automatic_broker as automatic
from tests.support.processes import BackendSampler, alive
from tests.support.waiting import wait_until

LIMIT = 3
POSTFORK = {"TARGET_POSTFORK": "1"}
IN_MASTER = {"TARGET_AT_IMPORT": "1"}

AllSlots = Callable[[int], int]
StartUwsgi = Callable[..., AbstractContextManager[Server]]
_numbers = itertools.count(1)


@pytest.fixture
def name() -> str:
    """The pool that the application uses."""
    return f"uwsgi{next(_numbers)}"


def python_of(command: list[str]) -> str:
    """The version of Python in a uWSGI; empty if there is none."""
    asked = subprocess.run(
        [*command, "--python-version"], capture_output=True, text=True, timeout=30, check=False
    )
    return ".".join(asked.stdout.strip().split(".")[:2]) if asked.returncode == 0 else ""


@functools.cache
def real_uwsgi() -> list[str] | None:
    """How uWSGI's own program is called that has this Python in it: built by pip, or with a
    distribution's plugin."""
    wanted = f"{sys.version_info.major}.{sys.version_info.minor}"
    for folder in [str(Path(sys.executable).parent), *os.get_exec_path()]:
        program = shutil.which("uwsgi", path=folder)
        if program is not None and Path(program).read_bytes()[:2] != b"#!":  # as pyuwsgi's is
            for plugin in ([], ["--plugin", "python3"]):
                if python_of([program, *plugin]) == wanted:
                    return [program, *plugin]
    return None


@pytest.fixture(params=["pyuwsgi", "uwsgi"])
def program(request: pytest.FixtureRequest) -> list[str]:
    """uWSGI as a part of Python, which PyPI has ready to run; and its own program, of which Python
    is a part."""
    if request.param == "pyuwsgi":
        found = shutil.which("pyuwsgi", path=Path(sys.executable).parent)
        assert found is not None, "pip install pyuwsgi"
        return [found]
    if (command := real_uwsgi()) is None:
        pytest.skip(
            "no uwsgi with this Python: pip install uwsgi, or apt-get install uwsgi-plugin-python3"
        )
    return [*command, "--virtualenv", sys.prefix]


@pytest.fixture
def uwsgi(
    automatic_broker: None,
    program: list[str],
    postgres: EphemeralPostgres,
    name: str,
    tmp_path: Path,
) -> StartUwsgi:
    """Serve the application by four uWSGI workers with these options."""
    paths = [str(Path(sharedpool.__file__).parents[1])]
    if "--virtualenv" not in program:
        # At a reload pyuwsgi, unlike uWSGI's own program, starts Python anew without its virtual
        # environment.
        paths += [path for path in sys.path if path.endswith("-packages")]

    @contextmanager
    def start(*options: str, **environment: str) -> Iterator[Server]:
        environment |= {
            "TARGET_POOL": name,
            "DATABASE_DSN": postgres.dsn,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        command = [
            *program,
            "--http-socket",
            "fd://{fd}",
            "--master",
            "--processes",
            "4",
            "--enable-threads",
        ]
        more = ["--die-on-term", "--need-app", "--wsgi", "uwsgi_target:app", *options]
        with serving([*command, *more], tmp_path / "uwsgi.log", environment) as server:
            yield server

    return start


def catches(pid: int, number: int) -> bool:
    """Return True if a process handles a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def started(server: Server) -> set[int]:
    """Wait until uWSGI and its four workers take orders; return the workers.

    It serves before that. An order that comes too early is lost; one to a worker that has only just
    been forked is taken for its master's, which then waits for a minute for it to leave, and starts
    no other meanwhile.
    """
    master = server.process.pid

    def workers() -> set[int]:
        found = set(map(int, Path(f"/proc/{master}/task/{master}/children").read_text().split()))
        # A worker inherits its master's handlers and puts its own in their place one by one.
        # SIGUSR2, for which a master has none, comes after SIGTERM.
        ready = len(found) == 4 and all(catches(pid, signal.SIGUSR2) for pid in found)
        return found if ready and catches(master, signal.SIGHUP) else set()

    return wait_until(workers, what="uWSGI and four workers to take orders")


def ended_well(server: Server, name: str) -> None:
    assert server.process.poll() is None, "uWSGI ended before it was told to"
    started(server)
    assert server.stop() == 0
    assert "Traceback" not in server.words()
    # When uWSGI has ended, so have the leases of its workers and its master.
    wait_until(lambda: not automatic.leases(name))


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize(
    ("options", "environment"),
    [([], IN_MASTER), (["--threads", "2"], IN_MASTER | POSTFORK), (["--lazy-apps"], {})],
    ids=["used in the master", "used in the master, postfork, threads", "lazy apps"],
)
def test_every_request_is_answered_by_three_connections(
    uwsgi: StartUwsgi,
    sampler: BackendSampler,
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
        (broker,) = automatic.reports()
        assert Path(automatic.command(broker)[0]).parent == Path(
            sys.prefix, "bin"
        )  # the application's environment
        ended_well(server, name)
    assert 1 < sampler.peak <= LIMIT


def test_nothing_of_the_pool_is_left_in_the_master_when_it_forks(uwsgi: StartUwsgi) -> None:
    """A thread that runs Python at that moment would leave the children the interpreter's lock,
    taken."""
    with uwsgi(**IN_MASTER) as server:
        started(server)
        # A thread that has ended is listed for a moment more; one that goes on, for ever.
        pid = server.process.pid
        wait_until(lambda: os.listdir(f"/proc/{pid}/task") == [str(pid)], what="its threads' end")


@pytest.mark.long_variants
def test_recycled_workers_lose_no_request(
    uwsgi: StartUwsgi, sampler: BackendSampler, name: str
) -> None:
    with uwsgi("--max-requests", "25", "--min-worker-lifetime", "0", **POSTFORK) as server:
        answers = load(server, 200)
        # It waits for ever for a worker that it starts again while it ends.
        wait_until(
            lambda: server.words().count("Respawned uWSGI worker") == server.words().count("Seeya!")
        )
        ended_well(server, name)
    assert len({answer["worker"] for answer in answers}) > 4
    assert 1 < sampler.peak <= LIMIT


@pytest.mark.long_variants
@pytest.mark.parametrize(
    "environment", [POSTFORK, IN_MASTER], ids=["postfork", "used in the master"]
)
def test_reloads_and_killed_workers_leave_no_slot_taken(
    uwsgi: StartUwsgi, sampler: BackendSampler, all_slots: AllSlots, environment: dict[str, str]
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
                wait_until(
                    lambda known=known: seen.workers - known - old,
                    what="an answer of the successor",
                )
        assert len(seen.lost) <= 2
        assert all_slots(LIMIT) == LIMIT
    assert 1 < sampler.peak <= LIMIT
