"""The laboratory itself: hosts see the server, not each other; what is done to them happens."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedpool.descriptors.readable import readable
from tests.hosts.host import RUNTIME_DIR, Host, Program
from tests.hosts.lab import Laboratory
from tests.support.documents import ROOT
from tests.support.processes import Piped, alive
from tests.support.waiting import wait_until

pytestmark = pytest.mark.hosts

_CONNECT = (
    "import psycopg2, sys; conn = psycopg2.connect(sys.argv[1], application_name=sys.argv[2])"
)
_HOLD = f"{_CONNECT}; print('held', flush=True); sys.stdin.read()"
_ASK_EVERY_LINE = f"""
{_CONNECT}
cursor = conn.cursor()
for _ in sys.stdin:
    cursor.execute("SELECT 1")
    print("answered", flush=True)
"""


@pytest.fixture(scope="module")
def lab(namespaces: None) -> Iterator[Laboratory]:
    with Laboratory() as lab:
        yield lab


@pytest.fixture
def hosts(lab: Laboratory) -> Iterator[tuple[Host, Host]]:
    """Two hosts of this test."""
    yield lab.add_host("left"), lab.add_host("right")
    for name in ("left", "right"):
        lab.hosts.pop(name).close()


def dsn(lab: Laboratory) -> str:
    return f"host={lab.server.address} user=postgres dbname=postgres"


def start(host: Host, lab: Laboratory, code: str, name: str) -> Program:
    return host.run(sys.executable, "-c", code, dsn(lab), name)


def sessions(lab: Laboratory, name: str) -> list[str]:
    """Return the addresses from which sessions of this name have come."""
    connection = lab.server.observer()
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT host(client_addr) FROM pg_stat_activity WHERE application_name = %s", [name]
            )
            return [str(address) for (address,) in cursor.fetchall()]
    finally:
        connection.close()


def test_two_hosts_have_one_server_and_nothing_else_in_common(
    lab: Laboratory, hosts: tuple[Host, Host]
) -> None:
    left, right = hosts
    program = start(left, lab, _HOLD, "mine")
    assert program.stdout.readline() == b"held\n"
    assert sessions(lab, "mine") == [left.address]
    left.output("touch", "/tmp/mine", "/dev/shm/mine", f"{RUNTIME_DIR}/mine")
    assert left.output("ls", RUNTIME_DIR) == "mine\n"
    for place in ("/tmp", "/dev/shm", RUNTIME_DIR):
        assert "mine" not in right.output("ls", place)
        assert not Path(place, "mine").exists()
    shown = 'for p in /proc/[0-9]*; do tr "\\0" " " < $p/cmdline; done'
    assert "'held'" in left.output("sh", "-c", shown)
    assert "'held'" not in right.output("sh", "-c", shown)
    for word in ("hostname", "cat /proc/sys/kernel/random/boot_id"):
        said = {host.output(*word.split()) for host in hosts}
        assert len(said) == 2, f"both hosts say {said}"


def test_a_host_reaps_what_its_programs_leave_behind(hosts: tuple[Host, Host]) -> None:
    left, _ = hosts
    orphan = "import os; os.fork() and os._exit(0); os.fork() and os._exit(0)"
    left.python(orphan)
    wait_until(lambda: len(left.processes()) == 1, 10, "only PID 1 to be left, and no zombie")


def test_a_killed_host_leaves_no_session(lab: Laboratory, hosts: tuple[Host, Host]) -> None:
    left, right = hosts
    held = [start(host, lab, _HOLD, "held") for host in hosts]
    assert [program.stdout.readline() for program in held] == [b"held\n", b"held\n"]
    left.kill()
    wait_until(lambda: sessions(lab, "held") == [right.address], 10, "the host's session to end")
    assert not left.processes()


def test_a_host_that_lost_its_power_leaves_its_sessions_behind(
    lab: Laboratory, hosts: tuple[Host, Host]
) -> None:
    left, _ = hosts
    assert start(left, lab, _HOLD, "dark").stdout.readline() == b"held\n"
    left.lose_power()
    assert not left.is_up
    # Nobody has told the server: with its defaults it would find out after two hours.
    assert sessions(lab, "dark") == [left.address]


def test_a_host_can_come_back_under_its_name(lab: Laboratory, hosts: tuple[Host, Host]) -> None:
    left, _ = hosts
    left.kill()
    again = lab.add_host("left")
    assert again.output("hostname") == "left\n"


def test_a_cut_network_blocks_until_it_is_healed(lab: Laboratory, hosts: tuple[Host, Host]) -> None:
    left, right = hosts
    asking = {host: start(host, lab, _ASK_EVERY_LINE, "asking") for host in hosts}
    for program in asking.values():
        program.stdin.write(b"\n")
        assert program.stdout.readline() == b"answered\n"
    left.cable.cut()
    for program in asking.values():
        program.stdin.write(b"\n")
    assert asking[right].stdout.readline() == b"answered\n"
    assert not readable([asking[left].stdout], 0.5), "a packet went through a cut cable"
    left.cable.heal()
    assert asking[left].stdout.readline() == b"answered\n"


def test_a_frozen_host_does_nothing_until_it_goes_on(
    lab: Laboratory, hosts: tuple[Host, Host]
) -> None:
    left, _ = hosts
    program = start(left, lab, _ASK_EVERY_LINE, "frozen")
    left.freeze()
    program.stdin.write(b"\n")
    assert not readable([program.stdout], 0.5)
    left.thaw()
    assert program.stdout.readline() == b"answered\n"


def test_a_promoted_replica_has_what_the_server_had(
    lab: Laboratory, hosts: tuple[Host, Host]
) -> None:
    """The hosts find it by a connection string that names both servers."""
    left, _ = hosts
    standby = lab.add_standby()
    connection = lab.server.observer()
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE written (n int)")
    connection.close()
    standby.wait_until_it_streams()
    both = f"host={lab.server.address},{standby.address} user=postgres dbname=postgres"
    both += " target_session_attrs=read-write"
    where = f"{_CONNECT}; print(conn.info.host)"
    assert left.python(where, both, "finder").strip() == lab.server.address
    lab.server.shutdown("immediate")
    standby.promote()
    write = f"{where}; conn.cursor().execute('INSERT INTO written VALUES (1)'); conn.commit()"
    assert left.python(write, both, "finder").strip() == standby.address
    lab.server.start()


def test_nothing_of_the_machine_is_touched(lab: Laboratory, hosts: tuple[Host, Host]) -> None:
    links = Path("/sys/class/net")
    assert not {link.name for link in links.iterdir()} & {"bridge", "port1", "eth0@port1"}
    assert not any("10.77.0." in line for line in Path("/proc/net/fib_trie").read_text().split())


def test_a_closed_laboratory_leaves_nothing(namespaces: None) -> None:
    with Laboratory() as lab:
        host = lab.add_host("one")
        host.run("sleep", "1000")
        pids = host.processes().keys()
        made = [lab.directory, lab.server.directory]
        host.freeze()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not any(path.exists() for path in made)


_MAKE_AND_FREEZE = """
import json, sys
from tests.hosts.lab import Laboratory
lab = Laboratory()
host = lab.add_host("one")
host.run("sleep", "1000")
pids = [*host.processes(), lab.server.pid, lab.switch.pid]
host.freeze()
print(json.dumps([pids, str(lab.directory)]), flush=True)
sys.stdin.read()
"""


def test_killed_tests_leave_no_process(namespaces: None) -> None:
    """Not even a frozen host, which cannot see that its test is gone."""
    with Piped(sys.executable, "-c", _MAKE_AND_FREEZE, cwd=ROOT) as tests:
        pids, directory = json.loads(tests.line())
        assert len(pids) == 4
        assert all(map(alive, pids))
        tests.kill()
    wait_until(lambda: not any(map(alive, pids)), 30, f"{pids} to end")
    shutil.rmtree(directory)
