"""What a process is called in texts, tables and logs: in a container it is PID 1 to itself, as any
other's first is."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool.postgres.throwaway_server import EphemeralPostgres
from tests.support.broker_thread import server_in_a_thread
from tests.support.commands import sharedpool_command, who
from tests.support.fixture_types import MakePool
from tests.support.ports import free_port
from tests.support.processes import Piped, Worker, as_pid_1
from tests.support.waiting import wait_until


def inner(worker: Worker) -> int:
    """Return the pid, here, of what was started in a namespace of its own."""
    (pid,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    return int(pid)


def processes(address: str, pool: str) -> set[str]:
    """Return how `sharedpool status` calls those that use a pool."""
    lines = sharedpool_command("status", "--broker", address).stdout.splitlines()
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("PROCESS")) + 1 :]
    return {line.split()[0] for line in table if line.split()[1] == pool}


@pytest.mark.long
def test_a_process_that_is_pid_1_to_itself_has_the_pid_that_it_has_where_the_broker_runs(
    postgres: EphemeralPostgres, make_pool: MakePool
) -> None:
    pool = make_pool(max_conn=1)
    address = str(pool.config.broker)
    with Worker(
        prefix=as_pid_1(), dsn=postgres.dsn, broker=address, name=pool.name, max_conn=1
    ) as worker:
        worker.ask("get", name="x", timeout=10)
        pid = inner(worker)
        (row,) = who(address, "--pool", pool.name)
        assert (row["pid"], row["title"], row["host"]) == (pid, "worker.py", "")
        assert processes(address, pool.name) == {f"worker.py[{pid}]"}
        with pytest.raises(sharedpool.PoolExhausted, match=rf"held most by worker\.py\[{pid}\] 1"):
            pool.get_conn(timeout=0)
        done = sharedpool_command("drain", str(pid), "--broker", address)
        assert f"worker.py[{pid}] in pool '{pool.name}': 1 to come back" in done.stdout
        worker.ask("put", name="x")
        pool.put_conn(pool.get_conn(timeout=10))


def test_processes_whose_pids_mean_nothing_here_are_told_apart_by_their_namespaces(
    postgres: EphemeralPostgres,
    runtime_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By TCP the kernel does not name the peer's process, and there is no desk, as
    on another host."""
    monkeypatch.setattr("sharedpool.broker.server.desk.SUPPORTED", False)
    address = f"tcp://127.0.0.1:{free_port()}"
    settings: dict[str, Any] = {
        "prefix": as_pid_1(), "dsn": postgres.dsn, "broker": address, "name": "boxes", "max_conn": 2
    }  # fmt: skip
    with (
        server_in_a_thread(address, max_conn=2, dsn=postgres.dsn, ttl_s=1.5),
        Worker(**settings) as one,
        Worker(**settings) as other,
    ):
        names = set()
        for worker in (one, other):
            worker.ask("get", name="x", timeout=10)
            names.add(f"worker.py[1]@{os.readlink(f'/proc/{inner(worker)}/ns/pid')}")
        assert len(names) == 2
        assert {f"{row['title']}[{row['pid']}]@{row['host']}" for row in who(address)} == names
        text = sharedpool_command("who", "--broker", address).stdout
        assert all(name in text for name in names)
        assert processes(address, "boxes") == names
        name = f"worker.py[1]@{os.readlink(f'/proc/{inner(one)}/ns/pid')}"
        one.kill()
        wait_until(
            lambda: f"{name} has been silent for" in caplog.text, 20, "the dead one to be noticed"
        )


PROGRAM = """
import os, sys
import sharedpool
pool = sharedpool.config_pool(
    max_conn=1, timeout=10, dsn=os.environ["DSN"], broker=os.environ["ADDRESS"], name="title"
)
conn = pool.get_conn()
print("has it", flush=True)
sys.stdin.read()
pool.put_conn(conn)
pool.release_all()
"""


@pytest.mark.long_variants(first=2)
@pytest.mark.parametrize(
    ("command", "title"),
    [
        (["-m", "shop"], "shop"),
        (["-m", "shop.till"], "till.py"),
        (["shop/till.py"], "till.py"),
        (["shop"], "shop"),
        (["-c", PROGRAM], "python"),
    ],
)
def test_a_program_is_called_what_its_user_has_started(
    command: list[str],
    title: str,
    tmp_path: Path,
    postgres: EphemeralPostgres,
    broker: sharedpool.Broker,
) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    for name in ("__main__.py", "till.py"):
        (package / name).write_text(PROGRAM)
    environment = os.environ | {"DSN": postgres.dsn, "ADDRESS": broker.address}
    places = (str(Path(sharedpool.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    with Piped(sys.executable, *command, cwd=tmp_path, env=environment) as program:
        assert program.line() == "has it"
        (row,) = who(broker.address, "--pool", "title")
        assert (row["title"], row["pid"]) == (title, program.pid)
        program.tell_no_more()


STRANGER = """
import os, sys
import sharedpool
os.setuid(65534)
try:
    sharedpool.config_pool(dsn=sys.argv[1], broker=sys.argv[2]).get_conn(timeout=5)
except sharedpool.BrokerUnavailable as error:
    print(error, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("boxed", [False, True], ids=["here", "as PID 1"])
def test_a_broker_says_which_process_of_another_user_it_turns_away(
    boxed: bool, postgres: EphemeralPostgres, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"ipc://{runtime_dir}/open.sock"
    with server_in_a_thread(address, dsn=postgres.dsn):
        runtime_dir.chmod(0o755)
        for path in runtime_dir.glob("open.sock*"):
            path.chmod(0o666)
        with Piped(
            *(as_pid_1() if boxed else ()), sys.executable, "-c", STRANGER, postgres.dsn, address
        ) as stranger:
            assert (
                "the broker is uid 0's and serves nobody else (but root), not uid 65534"
                in stranger.line()
            )
            pid = stranger.pid
            if boxed:
                (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            stranger.tell_no_more()
    assert f"dropped a message from uid 65534 ({name}[{pid}])" in caplog.text
