"""A process with so many files open that its sockets have numbers beyond 1,023: what select() knows
nothing of."""

import os
import resource
from pathlib import Path

import pytest

from sharedpool.lane.lane import SUPPORTED
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from sharedpool.worker.connection import handover
from tests.support import automatic_broker
from tests.support.processes import Worker, run_python, workers
from tests.support.waiting import wait_until

FILES = 1_100
_MOST = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

pytestmark = [
    pytest.mark.skipif(
        _MOST != resource.RLIM_INFINITY and _MOST < FILES + 1000,
        reason=f"no {FILES} files may be opened here",
    ),
    pytest.mark.skipif(
        not Path("/proc/self/fd").is_dir(), reason="a process's descriptors are not to be seen here"
    ),
]


def lowest_socket(worker: Worker) -> int:
    """Return the lowest number that a socket has in a process."""
    numbers = Path(f"/proc/{worker.pid}/fd")
    return min(
        int(each.name) for each in numbers.iterdir() if os.readlink(each).startswith("socket:")
    )


@pytest.mark.skipif(
    not (SUPPORTED and handover.SUPPORTED), reason="connections cannot move on this platform"
)
def test_processes_with_many_files_start_their_broker_and_pass_a_connection_to_each_other(
    postgres: EphemeralPostgres, runtime_dir: Path, tmp_path: Path
) -> None:
    settings = {
        "dsn": postgres.dsn,
        "name": "many files",
        "max_conn": 1,
        "time_slice": 0,
        "threads": True,
    }
    stop = tmp_path / "stop"
    with automatic_broker.seen_off(), workers(2, files=FILES, **settings) as (a, b):
        backend = a.ask("get", name="x", timeout=20)["backend"]
        assert a.ask("query", name="x", sql="SELECT pg_backend_pid()") == {"rows": [[backend]]}
        b.send("get", name="x", timeout=20)
        wait_until(
            lambda: sum(pool.waiting for each in automatic_broker.reports() for pool in each.pools),
            20,
            "it to wait",
        )
        a.ask("put", name="x")
        assert b.answer()["backend"] == backend
        b.ask("put", name="x")
        for worker in (a, b):
            worker.send(
                "hammer",
                seconds=60,
                threads=2,
                timeout=20,
                work_s=0.001,
                think_s=0.001,
                stop=str(stop),
            )
        wait_until(
            lambda: sum(p.handovers for r in automatic_broker.reports() for p in r.pools) > 20,
            20,
            "it to move",
        )
        stop.touch()
        for worker in (a, b):
            outcome = worker.answer()
            assert (outcome["errors"], outcome["wrong"]) == ([], 0)
        found = [worker.ask("stats") for worker in (a, b)]
        assert all(stats["moving"] for stats in found), "not in the lane"
        assert all(stats["adopted"] > 5 for stats in found)
        assert sum(stats["connects"] for stats in found) == 1
        assert min(map(lowest_socket, (a, b))) >= FILES


OWN_BROKER = """
import os, resource, sys
import sharedpool
dsn, address, files = *sys.argv[1:3], int(sys.argv[3])
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (files + 1000, most))
while os.open(os.devnull, os.O_RDONLY) < files:
    pass
with sharedpool.start_broker(1, address=address, dsn=dsn) as broker:
    pool = sharedpool.config_pool(broker=broker.address, dsn=dsn)
    with pool.connection(timeout=20) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT 'works'")
        print(cursor.fetchone()[0], conn.fileno())
    pool.release_all()
"""


def test_a_process_with_many_files_may_have_a_broker_of_its_own(
    postgres: EphemeralPostgres, runtime_dir: Path
) -> None:
    done = run_python(OWN_BROKER, postgres.dsn, f"ipc://{runtime_dir}/own.sock", str(FILES))
    assert done.returncode == 0, done.stderr
    word, number = done.stdout.split()
    assert word == "works"
    assert int(number) >= FILES
